"""Zero-shot classification: each image is given the class whose texts lie closest to it (CLIP, Radford et al. 2021, sec. 3.1).

For tokenizers with `image_embedding(images)` and `text_embedding(texts)`. A name is the mean, of length 1 again, of its texts in
every template; a class may have several names, of which the closest counts.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.tokenizer import ImageTokenizer

from .candidates import UNTRAINED_LABEL, describe, untrained_copy
from .image_features import ImageFeatures
from .labelled import Labelled, accuracy, by_class, collect_labelled, hold_out, majority_row, margins
from .provenance import environment, text_sha256

SCALE = 100.0               # of cosines to logits
TOP = 5
TEMPLATES = (               # ours; the 80 of CLIP's authors come from a file
    "{}", "a picture of {}", "a photo of {}", "a photograph of one {}", "a small picture of {}", "a close view of {}",
    "a drawing of {}", "a painting of {}", "an image that shows {}", "this is {}", "here you see {}",
    "{} in front of a plain ground",
)


def read_templates(path: str | Path) -> list[str]:
    """Templates of a file, one a line, with {} where the name of the class goes. Raises InputError."""
    lines = [line.strip() for line in _lines(path)]
    lines = [line for line in lines if line]
    for line in lines:
        if line.count("{}") != 1:
            raise InputError(f"{path}: a template has {{}} once, where the class goes; not '{line}'")
    if not lines:
        raise InputError(f"{path} holds no template")
    return lines


def read_classes(path: str | Path, labels: Sequence[str]) -> dict[str, str]:
    """Label -> name from a file: `label<TAB>name` a line, or as many names as there are labels, in their order. A name may be
    several, with `|` between them.

    Raises InputError where a label has no name.
    """
    lines = [line.rstrip("\r\n") for line in _lines(path) if line.strip()]
    if any("\t" in line for line in lines):
        pairs = [line.partition("\t") for line in lines]
        named = {label.strip(): name.strip() for label, _, name in pairs}
    elif len(lines) == len(labels):
        named = dict(zip(labels, map(str.strip, lines)))
    else:
        raise InputError(f"{path} holds {len(lines)} names for {len(labels)} classes: write label<TAB>name a line")
    lacking = [label for label in labels if not named.get(label)]
    if lacking or not all(named.values()):
        raise InputError(f"{path} has no name for the class '{next(iter(lacking), 'of a line without one')}'")
    return named


def plain_names(labels: Sequence[str]) -> dict[str, str]:
    """Label -> the words that it is made of: what folders are usually called."""
    return {label: " ".join(label.replace("_", " ").replace("-", " ").split()) for label in labels}


@torch.inference_mode()
def class_embeddings(model: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(names, W) of length 1, float32: the mean of a name's embeddings in all templates. Raises InputError if not finite."""
    rows = []
    for name in names:
        found = model.text_embedding([template.replace("{}", name) for template in templates]).float()
        rows.append(F.normalize(F.normalize(found, dim=-1).mean(dim=0), dim=-1))
    stacked = torch.stack(rows)
    if not stacked.isfinite().all():
        raise InputError("embeddings of texts are not finite: the model's weights or its precision are broken")
    return stacked


def check_model(model: ImageTokenizer, label: str) -> None:
    """Raise InputError unless it compares images with texts."""
    if not all(callable(getattr(model, name, None)) for name in ("image_embedding", "text_embedding")):
        raise InputError(f"{label} ({model.system}) does not compare images with texts: zero-shot needs a tokenizer that was "
                         "trained with captions, such as VTP")


def embedding_features(model: Any, label: str, role: str) -> ImageFeatures:
    """The image's side of the comparison."""
    dtype = next(model.parameters()).dtype

    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        return F.normalize(model.image_embedding(images.to(dtype)).float(), dim=-1)

    return ImageFeatures(label, role, "embedding in the space of texts", compute, describe(model, role), model.device,
                         model.downsample)


def zeroshot_row(
    source: ImageFeatures, vectors: Tensor, texts: Sequence[Tensor], labels: Sequence[str], truth: Sequence[str]
) -> dict[str, Any]:
    """A row's answers. vectors: (N, W) of images; texts: (names, W) of each class."""
    scores = SCALE * torch.stack([(vectors @ names.cpu().T).amax(1) for names in texts], dim=1)      # (N, classes)
    best = scores.topk(min(TOP, len(labels)), dim=1).indices.tolist()
    right = [labels[numbers[0]] == name for numbers, name in zip(best, truth)]
    metrics = {"accuracy": accuracy(right)}
    if len(labels) > TOP:
        near = [name in [labels[i] for i in numbers] for numbers, name in zip(best, truth)]
        metrics["top5"] = accuracy(near, f"among the {TOP} best")
    return {"label": source.label, "role": source.role, **source.description, "features": source.name, "width": vectors.shape[1],
            "metrics": metrics, "per_class": by_class(truth, right), "answers": [labels[numbers[0]] for numbers in best]}


def probe_zeroshot(
    model: ImageTokenizer,
    batches: Iterable[ImageBatch],
    templates: Sequence[str] = TEMPLATES,
    *,
    class_names: Callable[[Sequence[str]], dict[str, str]] = plain_names,
    name_of: Callable[[int], str] = str,
    holdout: int | None = None,
    label: str = "model",
    baselines: bool = True,
    forward_batch: int = 1,
    seed: int = 0,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy of the classes that texts say, as JSON data; `margins` say how much better the model is than each other row.

    batches: images with labels. class_names: what the classes of the images (sorted) are called, with perhaps further classes,
    which are then wrong answers. holdout: measure one image in so many of each class only, those of `labelled.hold_out`.
    baselines: also the same network untrained and the images' own largest class. Raises DataError for images without classes,
    InputError of a model that knows no texts or two classes of one name.
    """
    check_model(model, label)
    model.eval()
    networks = [(label, "model", model)]
    if baselines and hasattr(model, "cfg"):
        networks.append((UNTRAINED_LABEL, "untrained", untrained_copy(model, seed)))
    sources = [embedding_features(network, name, role) for name, role, network in networks]
    found: Labelled = collect_labelled(sources, batches, name_of, forward_batch)
    if holdout is not None:
        found = found.take(hold_out(found.keys, found.classes, holdout)[1])
    if not len(found):
        raise DataError("no class has an image to spare: nothing is held out")
    named = class_names(sorted(set(found.classes)))
    if len(set(named.values())) < len(named):
        twice = next(name for name in named.values() if list(named.values()).count(name) > 1)
        raise InputError(f"two classes are called '{twice}': no text tells them apart")
    if len(named) < 2:
        raise DataError("zero-shot needs two classes or more")
    labels = list(named)
    rows = []
    for (_, _, network), source, vectors in zip(networks, sources, found.vectors):
        texts = [class_embeddings(network, [one.strip() for one in name.split("|")], templates) for name in named.values()]
        rows.append(zeroshot_row(source, vectors, texts, labels, found.classes))
    if baselines:
        rows.append(majority_row(found.classes, found.classes, "of these images"))
    return {
        "probe": "zeroshot", "n": len(found), "keys": found.keys, "classes": named, "true": found.classes, "rows": rows,
        "margins": margins(rows, seed),
        "protocol": {
            "data": data or {}, "templates": list(templates), "templates_sha256": text_sha256(list(templates)),
            "text_features": "mean over templates, of length 1; of several names the closest", "logits": f"cosine × {SCALE:g}",
            "holdout": holdout,
            "forward_batch": forward_batch, "seed": seed, "images_sha256": found.sha256},
        "environment": environment(model.device),
    }


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
