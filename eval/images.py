"""Reconstruction quality of image tokenizers: one streaming pass over the images, each counted exactly once."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

from .bootstrap import mean_summary
from .candidates import UNTRAINED_LABEL, Candidate, all_candidates, decoder_protocol
from .gather import all_processes, check_names, in_step
from .image_metrics import METRICS, PSNR_CAP, PairMetric, build_metrics
from .latents import LatentTally, tally_statistics
from .measure import Measured, Observe, Record, measure
from .provenance import environment, text_sha256

__all__ = ["UNTRAINED_LABEL", "Candidate", "data_protocol", "evaluate_images"]


def data_protocol(cfg: ImageDataConfig) -> dict[str, Any]:
    """How validation images of a data config are prepared, for the result."""
    return {
        "source": cfg.val, "limit": cfg.val_limit, "resize": "ADM: halved by box filter while twice as large, then bicubic",
        "crop": f"centre, {cfg.size} × {cfg.size} px",
    }


def evaluate_images(
    model: ImageTokenizer | Candidate,
    batches: Iterable[ImageBatch],
    metrics: Sequence[str] = ("psnr", "ssim", "lpips"),
    *,
    label: str = "model",
    data: dict[str, Any] | None = None,
    baselines: bool = True,
    forward_batch: int = 1,
    round_uint8: bool = True,
    sample: bool = False,
    seed: int = 0,
    allow_missing: bool = False,
    skipped: Sequence[str] = (),
    together: bool = True,
    latents: bool = False,
    steps: int | None = None,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """Reconstruct every image and measure it; the result is JSON data.

    model: a tokenizer, or a candidate such as `reconstructions.folder_candidate`, which is measured alone.
    batches: ImageBatch with images (B, 3, H, W) in [0, 1]; under torch.distributed each process passes its own share and
        gets the whole result (unless not `together`: then this process is alone). Batch sizes, shares and threads do not
        change a value: the network sees `forward_batch` images at a time, however they arrive (1 by default: exact; more is
        faster on a GPU and may change last digits).
    metrics: names of `image_metrics.METRICS`. With `allow_missing`, one whose weights are not here becomes a row that says why.
    baselines: also measure the mean colour of each patch and the same network with random weights.
    round_uint8: compare images as they would be saved; sample: draw latents instead of their mode.
    data: the protocol of the images (`data_protocol`). observe: called with (candidate, originals, reconstructions, keys).
    latents: also give `latent_statistics` of the model, from the same forwards. steps: of a decoder that samples; none: its own
        number (`steps.sweep_images` compares several).
    Raises DataError without images or on two of one name, InputError on another size or non-finite output, WeightsMissing.
    What one process raises, all raise.
    """
    if forward_batch < 1:
        raise InputError(f"the network sees at least one image at a time, not {forward_batch}")
    tally = LatentTally()

    def share() -> tuple[list[Candidate], list[PairMetric], dict[str, str], Measured]:
        candidates = all_candidates(model, label, baselines, sample, seed, steps)
        built, missing = build_metrics(metrics, candidates[0].device, allow_missing)
        tallied = None if not latents else lambda encoding, images: tally.add_encoding(model, encoding, images)
        return candidates, built, missing, measure(candidates, built, batches, forward_batch, round_uint8, observe, tallied)

    if latents and isinstance(model, Candidate):
        raise InputError("latents are measured of a tokenizer: a folder of reconstructions has none")
    candidates, pair_metrics, missing, mine = in_step(share, together)
    found = gather_measured(mine, together)
    dtype = candidates[0].description.get("dtype")
    result: dict[str, Any] = {
        "kind": "image reconstruction",
        "n": len(found.records),
        "keys": [key for key, _, _ in found.records],
        "skipped": sorted(reason for share in all_processes(list(skipped), together) for reason in share),
        "converted": {"originals": found.originals_converted, "reconstructions": found.reconstructions_converted},
        "rows": [result_row(candidate, i, pair_metrics, missing, found.records, seed) for i, candidate in enumerate(candidates)],
        "margins": _margins(candidates, pair_metrics, found.records, seed),
        "protocol": {
            **(data or {"source": "given batches", "resize": "as given", "crop": "as given"}),
            "images_sha256": text_sha256([digest for _, digest, _ in found.records]),
            "size": list(found.size or ()), "range": "[0, 1]", "dtype": dtype,
            "rounding": "uint8" if round_uint8 else "none, clamped to [0, 1]",
            "latents": "sampled" if sample else "mode", "forward_batch": forward_batch, "psnr_cap_db": PSNR_CAP, "seed": seed,
            **({} if isinstance(model, Candidate) else decoder_protocol(model, steps)),
        },
        "environment": environment(candidates[0].device),
    }
    if isinstance(model, Candidate):
        result["protocol"]["latents"] = "none: finished images"
    if latents:
        result["latents"], _ = tally_statistics(model, tally, together)
    return result


def gather_measured(mine: Measured, together: bool) -> Measured:
    """What all processes measured, in an order that does not depend on who measured what. Raises DataError, InputError."""
    shares = all_processes(mine, together)
    sizes = {share.size for share in shares if share.size is not None}
    if len(sizes) > 1:
        raise InputError(f"processes saw images of different sizes: {sorted(sizes)}")
    records: list[Record] = sorted(record for share in shares for record in share.records)
    if not records:
        raise DataError("there are no images to evaluate")
    check_names([key for key, *_ in records])
    converted = [
        dict(sorted(item for share in shares for item in getattr(share, name).items()))
        for name in ("originals_converted", "reconstructions_converted")
    ]
    return Measured(records, next(iter(sizes)), *converted)


def result_row(
    candidate: Candidate, index: int, metrics: list[PairMetric], missing: dict[str, str], records: list[Record], seed: int
) -> dict[str, Any]:
    """A candidate's results by metric, with the value of every image in the order of `keys`."""
    results: dict[str, Any] = {}
    for m, metric in enumerate(metrics):
        values = [measured[index][m] for _, _, measured in records]
        results[metric.spec.name] = {
            "title": metric.spec.title, "unit": metric.spec.unit, "better": metric.spec.better, "network": metric.network,
            "n": len(values), **mean_summary(values, seed), "per_image": values,
        }
    for name, reason in missing.items():
        results[name] = {"title": METRICS[name].title, "value": None, "missing": reason}
    return {"label": candidate.label, "role": candidate.role, **candidate.description, "metrics": results}


def _margins(candidates: list[Candidate], metrics: list[PairMetric], records: list[Record], seed: int) -> list[dict[str, Any]]:
    """How much better the model is than each other row, image by image: positive is better."""
    margins = []
    for c, other in enumerate(candidates[1:], start=1):
        for m, metric in enumerate(metrics):
            sign = 1 if metric.spec.better == "higher" else -1
            values = [sign * (measured[0][m] - measured[c][m]) for _, _, measured in records]
            margins.append({"metric": metric.spec.name, "over": other.label, "role": other.role, **mean_summary(values, seed)})
    return margins
