"""Reconstruction metrics of whole sets of images (rFID and its kin), in the same pass as the metrics of single images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.tokenizer import ImageTokenizer

from .candidates import Candidate
from .feature_metrics import Reference, check_metrics, check_reference, feature_metrics
from .features import FeatureExtractor, Features, to_uint8
from .gather import gather_rows, in_step, on_first
from .images import evaluate_images
from .statistics import Statistics, cached_statistics, compute_statistics

PENDING = 32       # images that are collected before the network sees them, so that all cores or a GPU have work


class FeatureStore:
    """Features of named images, as they come; each image's features depend on that image alone."""

    def __init__(self, extractor: FeatureExtractor, spatial: bool = False):
        """spatial: keep the features of sFID too (8 kB for each image)."""
        self.extractor, self.spatial = extractor, spatial
        self.keys: list[str] = []
        self.pieces: list[Features] = []
        self.pending: list[Tensor] = []

    def add(self, keys: Sequence[str], images: Tensor) -> None:
        """images: float (B, 3, H, W) in [0, 1] or uint8. Raises InputError on bad images."""
        rounded = to_uint8(images, self.extractor.rounding).cpu()
        if self.pending and self.pending[0].shape != rounded.shape[1:]:
            self.flush()
        self.keys += keys
        self.pending += rounded
        if len(self.pending) >= PENDING:
            self.flush()

    def flush(self) -> None:
        """Compute what is pending."""
        if not self.pending:
            return
        found = self.extractor(torch.stack(self.pending))
        if not self.spatial:
            found.spatial = None
        self.pieces.append(found)
        self.pending = []

    def gather(self, together: bool = True) -> tuple[list[str], Features] | None:
        """All processes' keys, sorted, and features, on the first process; None on the others. Raises DataError on none.

        together: false: this process's alone.
        """
        self.flush()
        gathered = gather_rows(self.keys, Features.join(self.pieces).parts() if self.pieces else {}, together)
        if gathered is None:
            return None
        if not gathered[0]:
            raise DataError("there are no images to evaluate")
        return gathered[0], Features(**gathered[1])


class FeatureCollector:
    """`observe` of `evaluate_images`: gathers the features of originals and of each candidate's reconstructions."""

    def __init__(self, extractor: FeatureExtractor, metrics: Sequence[str], reference: Reference | None = None):
        """reference: none: the originals themselves, each the partner of its reconstruction."""
        check_metrics(metrics, extractor)
        if reference is not None:
            check_reference(metrics, extractor, reference)
        self.extractor, self.metrics, self.reference = extractor, list(metrics), reference
        self.spatial = "sfid" in metrics
        self.first: str | None = None          # label of the candidate with whom the originals are taken
        self.originals = FeatureStore(extractor, self.spatial)
        self.reconstructions: dict[str, FeatureStore] = {}

    def observe(self, candidate: Candidate, originals: Tensor, reconstructions: Tensor, keys: Sequence[str]) -> None:
        """Take a batch of float images in [0, 1]."""
        self.first = self.first or candidate.label
        if self.reference is None and candidate.label == self.first:
            self.originals.add(keys, originals)
        store = self.reconstructions.setdefault(candidate.label, FeatureStore(self.extractor, self.spatial))
        store.add(keys, reconstructions)

    def results(self, labels: Sequence[str], together: bool = True) -> dict[str, dict[str, Any]]:
        """label -> metric -> result, on every process; computed on the first. Raises as `feature_metrics`."""
        reference, paired = self.reference, self.reference is None
        if reference is None:
            gathered = self.originals.gather(together)
            reference = Reference(None if gathered is None else gathered[1])
        results = {}
        for label in labels:
            store = self.reconstructions.get(label) or FeatureStore(self.extractor, self.spatial)
            found = store.gather(together)

            def compute(found: tuple[list[str], Features] | None = found) -> dict[str, dict[str, Any]]:
                assert found is not None and reference is not None      # the first process has all
                return feature_metrics(self.metrics, self.extractor, found[1], reference, paired, found[0])

            results[label] = on_first(compute, together)
        return results


def evaluate_rfid(
    model: ImageTokenizer | Candidate,
    batches: Iterable[ImageBatch],
    extractor: FeatureExtractor,
    metrics: Sequence[str] = ("rfid",),
    *,
    image_metrics: Sequence[str] = (),
    reference: Reference | None = None,
    baselines: bool = False,
    observe: Callable[[Candidate, Tensor, Tensor, Sequence[str]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The result of `evaluate_images`, whose rows also have `metrics` of features: rfid, sfid, kid, is, precision, recall.

    Reference: the originals as they enter the tokenizer; or `reference`, for example `reference_statistics`. The Inception
    Score is the reconstructions'. With an extractor other than FID's the results bear other names (`frechet_random`).
    image_metrics, baselines, observe, options: of `evaluate_images`; under torch.distributed each process passes its share.
    """
    if extractor.rounding != "nearest" and options.get("round_uint8", True):
        raise InputError("images are rounded to the nearest uint8 before they are measured: truncation needs round_uint8=False")
    collector = FeatureCollector(extractor, metrics, reference)

    def both(candidate: Candidate, originals: Tensor, reconstructions: Tensor, keys: Sequence[str]) -> None:
        collector.observe(candidate, originals, reconstructions, keys)
        if observe is not None:
            observe(candidate, originals, reconstructions, keys)

    result = evaluate_images(model, batches, image_metrics, baselines=baselines, observe=both, **options)
    found = collector.results([row["label"] for row in result["rows"]], options.get("together", True))
    for row in result["rows"]:
        row["metrics"] |= found[row["label"]]
    source = None if reference is None else reference.name
    result["protocol"]["features"] = {**extractor.protocol(), "reference": source or "the originals"}
    return result


def collect_features(
    batches: Callable[[], Iterable[ImageBatch]], extractor: FeatureExtractor, spatial: bool = False
) -> Features | None:
    """Features of all processes' images, in order of keys, on the first process; None on the others.

    batches: gives this process's share when called. Raises DataError for none, or what reading and the extractor raise.
    """
    store = FeatureStore(extractor, spatial)

    def share() -> None:
        for batch in batches():
            store.add(batch.keys, batch.images)
        store.flush()

    in_step(share)
    gathered = store.gather()
    return None if gathered is None else gathered[1]


def reference_statistics(
    batches: Callable[[], Iterable[ImageBatch]],
    extractor: FeatureExtractor,
    images: Mapping[str, Any],
    spatial: bool = False,
    folder: str | None = None,
) -> Reference:
    """Statistics of a set of images, from the cache if the same set was measured before; for all processes.

    batches: gives this process's share when called. images: JSON data that says what the set is, with a `content_hash` of
    its files, crop and size. folder: of the cache. Raises as the extractor does.
    """
    source = {"images": dict(images), **extractor.protocol(), "spatial": spatial}

    def missing() -> tuple[Statistics, Statistics | None]:
        raise LookupError

    def look_up() -> tuple[Statistics, Statistics | None] | None:
        try:
            return cached_statistics(source, missing, folder)[:2]
        except LookupError:
            return None

    found = on_first(look_up)
    if found is None:
        features = collect_features(batches, extractor, spatial)

        def compute() -> tuple[Statistics, Statistics | None]:
            assert features is not None      # the first process has all
            return compute_statistics(features.pool), None if features.spatial is None else compute_statistics(features.spatial)

        found = on_first(lambda: cached_statistics(source, compute, folder)[:2])
    return Reference(statistics=found[0], spatial_statistics=found[1])
