"""Linear probe: how well a linear classifier on frozen features tells classes apart, on images that it was not fitted to.

`lbfgs`: multinomial logistic regression, fitted to convergence in float64, its penalty chosen on a part of the training images
(Kornblith et al. 2019, app. A). `sgd`: the schedule of DINOv2's and VTP's probes (momentum, cosine, thirteen learning rates at
once), on fixed features; the learning rate is chosen on the same part, and what the held-out images themselves would choose,
which is what those papers report, stands beside it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, DataError

from .deterministic import one_thread
from .image_features import ImageFeatures
from .labelled import Labelled, accuracy, by_class, collect_labelled, hold_out, majority_row, margins
from .provenance import environment

SOLVERS = ("lbfgs", "sgd")
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)              # large to small: each fit starts from the one before
RATES = tuple(base * 10.0**power for power in range(-5, -1) for base in (1, 2, 5)) + (0.1,)      # for 256 images a step
MOMENTUM, INITIAL_STD = 0.9, 0.01
SMALLEST_STD = 1e-6                                                # a feature that never moves is not divided by zero


@dataclass(frozen=True)
class LinearSettings:
    """How the classifier is fitted."""

    solver: str = "lbfgs"
    iterations: int | None = None      # lbfgs: at most, 500 if none; sgd: steps, 12,500 if none as published
    batch_size: int = 128              # sgd: images of a step
    selection: int = 5                 # one training image in so many of each class chooses the penalty or the learning rate
    seed: int = 0                      # sgd: of first weights and order

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"there is no solver '{self.solver}'; known: {', '.join(SOLVERS)}")
        if min(1 if self.iterations is None else self.iterations, self.batch_size) < 1 or self.selection < 2:
            raise ConfigError("--iterations and the batch size must be at least 1, and one image in 2 or more chooses")

    @property
    def steps(self) -> int:
        """Iterations or steps."""
        return self.iterations or (500 if self.solver == "lbfgs" else 12_500)


# --- fitting: weights are (D + 1, K), the last row is the bias ------------------------------------------------------------------

def logits(weights: Tensor, x: Tensor) -> Tensor:
    """(..., N, K) of features (N, D) by weights (..., D + 1, K)."""
    return x @ weights[..., :-1, :] + weights[..., -1:, :]


def fit_lbfgs(x: Tensor, y: Tensor, classes: int, penalty: float, steps: int = 500, start: Tensor | None = None) -> Tensor:
    """Weights that minimise mean cross-entropy + penalty / 2 · |W|² (the bias is free). x: (N, D) float64, y: (N,) int64."""
    weights = (torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype, device=x.device) if start is None else start.clone())
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(weights, x), y) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)      # type: ignore[arg-type]      # a closure gives a tensor
    return weights.detach()


def fit_sgd(x: Tensor, y: Tensor, classes: int, settings: LinearSettings) -> Tensor:
    """Weights (rates, D + 1, K), one classifier for each of `RATES`, trained at once on the same batches."""
    draw = Draw(settings.seed, device=x.device)
    weights = torch.zeros(len(RATES), x.shape[1] + 1, classes, dtype=x.dtype, device=x.device)
    weights[:, :-1] = INITIAL_STD * draw.normal("linear probe", (x.shape[1], classes)).to(x.dtype)
    weights.requires_grad_()
    moving = torch.zeros_like(weights)
    size = min(settings.batch_size, len(x))
    rates = torch.tensor(RATES, dtype=x.dtype, device=x.device)[:, None, None] * size / 256
    an_epoch = len(x) // size
    for step in range(settings.steps):
        if step % an_epoch == 0:
            order = Draw(settings.seed, step=step // an_epoch, device=x.device).permutation("linear probe", len(x))
        taken = order[step % an_epoch * size :][:size]
        scores = logits(weights, x[taken])                                                       # (rates, size, K)
        loss = F.cross_entropy(scores.flatten(0, 1), y[taken].repeat(len(RATES))) * len(RATES)   # the sum over classifiers
        (gradient,) = torch.autograd.grad(loss, weights)
        moving = MOMENTUM * moving + gradient
        with torch.no_grad():
            weights -= rates * (1 + cos(pi * step / settings.steps)) / 2 * moving
    return weights.detach()


def candidates_of(x: Tensor, y: Tensor, classes: int, settings: LinearSettings) -> tuple[list[float], Callable[[int], Tensor]]:
    """(The penalties or learning rates, the weights of the one of that number), fitted to all of x."""
    if settings.solver == "sgd":
        every = fit_sgd(x, y, classes, settings)
        return list(RATES), lambda number: every[number]
    fitted: list[Tensor] = []

    def weights(number: int) -> Tensor:
        while len(fitted) <= number:
            fitted.append(fit_lbfgs(x, y, classes, PENALTIES[len(fitted)], settings.steps, fitted[-1] if fitted else None))
        return fitted[number]

    return list(PENALTIES), weights


# --- the probe ------------------------------------------------------------------------------------------------------------------

def probe_row(source: ImageFeatures, row: int, train: Labelled, held_out: Labelled, settings: LinearSettings) -> dict[str, Any]:
    """Fit a row's classifier and measure it on the held-out images."""
    names = sorted(set(train.classes))
    number = {name: i for i, name in enumerate(names)}
    device = torch.device("cpu") if source.device.type == "mps" else source.device      # which has no float64
    vectors = train.vectors[row].to(device).double()
    mean, std = vectors.mean(0), vectors.std(0, correction=0).clamp(min=SMALLEST_STD)
    x, y = (vectors - mean) / std, torch.tensor([number[name] for name in train.classes], device=device)
    theirs = (held_out.vectors[row].to(device).double() - mean) / std
    if settings.solver == "sgd":
        x, theirs = x.float(), theirs.float()
    parts = hold_out(train.keys, train.classes, settings.selection, "selection")
    fitting, choosing = (torch.tensor(part, dtype=torch.int64, device=device) for part in parts)
    if not len(choosing):
        raise DataError("every class has a single training image: none can be spared to choose the penalty by")
    with one_thread():      # so that no digit depends on how many there are
        values, weights = candidates_of(x[fitting], y[fitting], len(names), settings)
        curve = []
        for i, value in enumerate(values):
            scores = logits(weights(i), x[choosing])
            curve.append({"value": value, "selection_loss": float(F.cross_entropy(scores, y[choosing])),
                          "selection_accuracy": 100 * float((scores.argmax(1) == y[choosing]).double().mean())})
        losses = [point["selection_loss"] for point in curve]
        chosen = losses.index(min(losses))
        _, final = candidates_of(x, y, len(names), settings)
        answers = [names[i] for i in logits(final(chosen), theirs).argmax(1).tolist()]
        if settings.solver == "sgd":
            for i, point in enumerate(curve):
                told = logits(final(i), theirs).argmax(1).tolist()
                point["held_out_accuracy"] = accuracy([names[j] == name for j, name in zip(told, held_out.classes)])["value"]
    right = [answer == name for answer, name in zip(answers, held_out.classes)]
    found = {
        "label": source.label, "role": source.role, **source.description, "features": source.name, "width": x.shape[1],
        "metrics": {"accuracy": accuracy(right)}, "per_class": by_class(held_out.classes, right), "answers": answers,
        "chosen": values[chosen], "curve": curve}
    if settings.solver == "sgd":
        found["best_on_held_out"] = max(point["held_out_accuracy"] for point in curve)
    return found


def probe_linear(
    sources: Sequence[ImageFeatures],
    train: Iterable[ImageBatch],
    held_out: Iterable[ImageBatch] | None = None,
    settings: LinearSettings | None = None,
    *,
    holdout: int = 5,
    majority: bool = True,
    names: tuple[Callable[[int], str], Callable[[int], str]] = (str, str),
    forward_batch: int = 1,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy of a linear classifier on each row's frozen features, as JSON data; `margins` say how much better the first is.

    train, held_out: batches with labels. held_out none: one image in `holdout` of each class is held out (`labelled.hold_out`).
    Training images whose pixels are those of a held-out one are left out and counted. names: what labels of the two are called;
    classes are the same if they are called the same. majority: also a row that always says the training images' largest class.
    Raises DataError for fewer than two classes or no images, InputError on features that are not finite.
    """
    settings = settings or LinearSettings()
    known = collect_labelled(sources, train, names[0], forward_batch)
    if held_out is None:
        rest, held = hold_out(known.keys, known.classes, holdout)
        known, tested = known.take(rest), known.take(held)
    else:
        tested = collect_labelled(sources, held_out, names[1], forward_batch)
    if not len(tested):
        raise DataError("no class has an image to spare: nothing can be held out")
    seen = set(tested.digests)
    own = [i for i, digest in enumerate(known.digests) if digest not in seen]
    same, known = len(known) - len(own), known.take(own)
    if len(set(known.classes)) < 2:
        why = f" besides the {same} that are held out" if same else ""
        raise DataError(f"a probe needs training images of two classes or more{why}")
    rows = [probe_row(source, row, known, tested, settings) for row, source in enumerate(sources)]
    if majority:
        rows.append(majority_row(known.classes, tested.classes, "of the training images"))
    unknown = sorted(set(tested.classes) - set(known.classes))
    return {
        "probe": "linear", "n": len(tested), "keys": tested.keys, "classes": sorted(set(known.classes)), "true": tested.classes,
        "rows": rows, "margins": margins(rows),
        "protocol": {
            "data": data or {}, **asdict(settings), "iterations": settings.steps,
            "holdout": holdout if held_out is None else None,
            "candidates": list(PENALTIES if settings.solver == "lbfgs" else RATES), "augmentation": "none",
            "standardised": "by mean and deviation of the training images", "training_images": len(known),
            "same_as_held_out": same, "classes_never_seen": unknown, "forward_batch": forward_batch,
            "training_sha256": known.sha256, "held_out_sha256": tested.sha256},
        "environment": environment(sources[0].device),
    }
