"""gFID and its kin: generated images against a reference, as ADM's evaluator measures them (Dhariwal & Nichol 2021, app. B).

Fréchet distances of pooled and of spatial features, Inception Score, precision and recall. Statistics that the reference file
holds (ADM's: of the whole training set) serve the Fréchet distances, its images precision and recall.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.folder import open_folder
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.data.sources import resolve_source
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.settings import ImageDataConfig

from .feature_metrics import NEED_IMAGES, Reference, check_metrics, check_reference, feature_metrics
from .features import FeatureExtractor
from .gather import in_step, on_first, processes
from .harness import load_extractor, load_reference
from .image_arrays import IMAGES, array_names
from .images import data_protocol
from .precision_recall import Arithmetic
from .provenance import environment
from .rfid import collect_features
from .sample_sets import SampleSet, find_images, open_samples
from .statistics import Statistics, compute_statistics, content_hash, read_statistics

COUNT = 50_000       # samples of every published gFID
GFID = "gfid"
DEFAULT_METRICS = ("gfid", "is", "sfid", "precision", "recall")
KNOWN = (*DEFAULT_METRICS, "kid")
SCORES: dict[str, dict[str, Any]] = {      # protocols of the Inception Score
    "adm": {}, "torch-fidelity": {"splits": 10, "shuffle_seed": 2020, "keys": None},
}
Batches = Iterable[ImageBatch]
Progress = Callable[[Batches, str, int | None], Batches]


def evaluate_samples(
    samples: str,
    reference: str,
    metrics: Sequence[str] | None = None,
    *,
    features: str = "inception",
    count: int | None = COUNT,
    arithmetic: Arithmetic = "float32",
    score: str = "adm",
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a set of samples against a reference; JSON data, with one row.

    samples: an NPZ file with `arr_0` uint8 (N, H, W, 3), a folder of images, or one of `toklab generate`.
    reference: an NPZ file with mu and sigma (of sFID: mu_s, sigma_s), images (`arr_0`), or both; or a folder of images, which are
        centre-cropped to the samples' size.
    metrics: of KNOWN; none: DEFAULT_METRICS, without sFID where the network has no spatial features.
    features: inception (FID's), or a stand-in whose results are named after it: random, teacher, a file of weights.
    count: so many samples there must be; none: any number. arithmetic: of precision and recall.
    score: adm (splits of 5,000 in the order of the file; of names, hashed where they lie in sub-folders) or torch-fidelity.
    Under torch.distributed each process takes a share; all get the result. progress: wraps batches (batches, what, how many).
    Raises InputError for a wrong number or size of images, statistics of another network, an unknown metric; DataError.
    """
    names = list(dict.fromkeys(DEFAULT_METRICS if metrics is None else metrics))
    for name in names:
        if name not in KNOWN:
            raise InputError(f"there is no metric of samples '{name}'; known: {', '.join(KNOWN)}")
    if score not in SCORES:
        raise InputError(f"there is no protocol '{score}' of the Inception Score; known: {', '.join(SCORES)}")
    reference = str(find_images(reference)) if Path(reference).is_dir() else reference
    found = in_step(lambda: open_samples(samples))
    if count is not None and len(found) != count:
        raise InputError(f"{samples} holds {len(found):,} images, a gFID is of {count:,}: --allow-count measures them all the "
                         "same, but fewer make every distance larger, so that no published number compares")
    extractor = in_step(lambda: load_extractor(features, device))
    if metrics is None and extractor.kind == "teacher":
        names.remove("sfid")
    if metrics is None:
        names = [name for name in names if name not in in_step(lambda: _not_told(reference))]
    inner = ["fid" if name == GFID else name for name in names]      # what `feature_metrics` calls it
    check_metrics(inner, extractor)

    def tracked(batches: Batches, what: str, total: int | None) -> Batches:
        return batches if progress is None else progress(batches, what, total)

    theirs, notes = _load_reference(reference, found, extractor, inner, batch_size, workers, tracked)
    check_reference(inner, extractor, theirs)
    made = collect_features(
        lambda: tracked(found.batches(batch_size, workers), "measuring samples", len(found)), extractor, "sfid" in inner)

    def measure() -> dict[str, dict[str, Any]]:
        assert made is not None      # the first process has all
        ways = {"keys": found.hashed, **SCORES[score]}
        return feature_metrics(inner, extractor, made, theirs, arithmetic=arithmetic, score=ways)

    values = on_first(measure)
    if "fid" in values:      # with FID's network alone: what stand-ins give bears no such name
        values = {GFID if name == "fid" else name: value for name, value in values.items()}
        values[GFID]["title"] = "gFID"
    digest = found.sha256()
    sampling, doubts = _sampling(found, digest)
    return {
        "kind": "generated images", "n": len(found), "skipped": [],
        "rows": [{"label": samples, "role": "model", "metrics": values}], "margins": [],
        "protocol": {
            "samples": samples, "samples_sha256": digest, "size": list(found.size), "published_count": COUNT,
            "features": {**extractor.protocol(), "reference": theirs.name}, "sampling": sampling,
        },
        "warnings": [*notes, *doubts], "environment": environment(device),
    }


def _load_reference(
    source: str, samples: SampleSet, extractor: FeatureExtractor, metrics: Sequence[str], batch_size: int, workers: int,
    progress: Progress,
) -> tuple[Reference, list[str]]:
    """The reference, and what to be wary of. Raises InputError where its images have another size than the samples."""
    if not source.endswith(".npz"):
        height, width = samples.size
        if height != width:
            raise InputError(f"a folder is cropped to squares, the samples have {width} × {height} pixels: give an .npz file")
        data = ImageDataConfig(train="", val=source, size=height, workers=workers)
        return load_reference(source, extractor, metrics, data, batch_size, lambda b, what: progress(b, what, None)), []
    names = in_step(lambda: array_names(source))
    stored, images, notes = {"mu", "sigma"} <= set(names), IMAGES in names, []
    if not stored and not images:
        raise DataError(f"{source} holds neither statistics (mu, sigma) nor images ({IMAGES})")
    array = in_step(lambda: open_samples(source)) if images else None
    pooled, spatial = in_step(lambda: read_statistics(source)) if stored else (None, None)
    if pooled is not None and not pooled.source.get("extractor"):
        if extractor.is_inception:
            notes.append("the reference's file names neither network nor resize mode: assumed to be FID's Inception")
        elif array is not None:
            notes.append("the reference's stored statistics are not of this network: its images serve instead")
            pooled = spatial = None
    _check_size(source, samples, None if array is None else array.size, pooled)
    name: dict[str, Any] = {"file": source, "file_sha256": on_first(lambda: sha256_of(Path(source)))}
    name["statistics"] = pooled.source if pooled is not None else f"of its {len(array or ())} images"
    missing = pooled is None or ("sfid" in metrics and spatial is None)
    if array is None or not (missing or any(metric in NEED_IMAGES for metric in metrics)):
        return Reference(None, pooled, spatial, name), notes
    reader = array
    features = collect_features(
        lambda: progress(reader.batches(batch_size), "reference", len(reader)), extractor, "sfid" in metrics and spatial is None)
    return Reference(features, pooled, spatial, {**name, "images": len(reader)}), notes


def _not_told(reference: str) -> list[str]:
    """Metrics that a reference of mere statistics does not serve: those of its images, and sFID without statistics for it."""
    names = array_names(reference) if reference.endswith(".npz") else [IMAGES]
    if IMAGES in names:
        return []
    return [*NEED_IMAGES, *([] if {"mu_s", "sigma_s"} <= set(names) else ["sfid"])]


def _check_size(source: str, samples: SampleSet, images: tuple[int, int] | None, statistics: Statistics | None) -> None:
    """Raise InputError where the reference is known to be of images of another size."""
    said = statistics.source.get("images") if statistics is not None else None
    size = said.get("size") if isinstance(said, Mapping) else None
    for theirs in (images, tuple(size) if size else None):
        if theirs is not None and tuple(theirs) != samples.size:
            raise InputError(f"{samples.name} has images of {samples.size[1]} × {samples.size[0]} pixels, the reference {source} "
                             f"of {theirs[1]} × {theirs[0]}: compare images of one size")


def _sampling(samples: SampleSet, digest: str) -> tuple[dict[str, Any] | None, list[str]]:
    """How the samples were made, if `toklab generate` says so of these very files; else why not."""
    protocol = samples.protocol()
    if protocol is None:
        return None, ["nothing says how the samples were made: sampler, guidance and the rule of the labels change a gFID"]
    if digest not in protocol.get("files", {}).values():
        return None, ["the samples.json beside the samples is of other images"]
    return protocol, []


def make_statistics(
    source: str, features: str = "inception", size: int | None = None, batch_size: int = 64, workers: int = 0,
    device: torch.device | str = "cpu", progress: Progress | None = None,
) -> tuple[Statistics, Statistics | None]:
    """Statistics of pooled and, where the network has them, of spatial features of a set of images, with their origin.

    source: an NPZ file of images, or a folder: centre-cropped to size × size pixels; without a size its images are taken as
    they are, all of one size. For all processes; raises DataError, InputError, WeightsMissing.
    """
    extractor = in_step(lambda: load_extractor(features, device))
    spatial = extractor.kind != "teacher"
    batches: Callable[[], Batches]
    if size is None or source.endswith(".npz"):
        found = in_step(lambda: open_samples(source))
        if size is not None and found.size != (size, size):
            raise InputError(f"{source} has images of {found.size[1]} × {found.size[0]} pixels: leave --size away")
        images: dict[str, Any] = {"content_hash": found.sha256(), "n": len(found), "size": list(found.size), "crop": "none"}
        total, batches = len(found), lambda: found.batches(batch_size, workers)
    else:
        data = ImageDataConfig(train="", val=source, size=size, workers=workers)
        images, total, batches = _cropped(data, batch_size)
    made = collect_features(
        lambda: batches() if progress is None else progress(batches(), "measuring images", total), extractor, spatial)
    origin = {**extractor.protocol(), "images": images}

    def compute() -> tuple[Statistics, Statistics | None]:
        assert made is not None      # the first process has all
        return (compute_statistics(made.pool, origin),
                None if made.spatial is None else compute_statistics(made.spatial, origin))

    return on_first(compute)


def _cropped(data: ImageDataConfig, batch_size: int) -> tuple[dict[str, Any], int, Callable[[], Batches]]:
    """What a folder's cropped images are, how many, and what reads this process's share of them."""
    root = resolve_source(str(data.val), "val").folder
    if root is None:
        raise InputError(f"statistics are of a folder of images or an .npz file, not of {data.val}")
    folder = in_step(lambda: open_folder(root))
    digest = on_first(lambda: content_hash([folder.root / name for name in folder.names], folder.root))
    images = {**data_protocol(data), "content_hash": digest, "n": len(folder), "size": [data.size, data.size]}
    del images["source"], images["limit"]      # the same files under another name are the same images
    return images, len(folder), lambda: validation_batches(data, batch_size, *processes())
