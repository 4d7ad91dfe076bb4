"""Metrics between two sets of images by their features, by name, as JSON data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tokenizers_lab.errors import InputError

from .bootstrap import Interval
from .features import FeatureExtractor, Features
from .fid import FrechetResult, evaluate_frechet, frechet_json
from .inception_score import inception_score
from .kid import SUBSET_SIZE, kernel_distance
from .precision_recall import Arithmetic, PrecisionRecall, precision_recall
from .statistics import Statistics, check_compatible, compute_statistics

FEW = 10       # samples for each feature, below which the interval of a Fréchet distance was not tested
METRICS = {      # name: (title, better)
    "rfid": ("rFID", "lower"), "fid": ("FID", "lower"), "sfid": ("sFID", "lower"), "kid": ("KID", "lower"),
    "is": ("Inception Score", "higher"), "precision": ("Precision", "higher"), "recall": ("Recall", "higher"),
}
NEED_IMAGES = ("kid", "precision", "recall")      # statistics of a reference are not enough
STAND_IN_TITLES = {
    "rfid": "Fréchet distance", "fid": "Fréchet distance", "sfid": "spatial Fréchet distance", "kid": "kernel distance",
    "is": "class score", "precision": "Precision", "recall": "Recall",
}


@dataclass
class Ways:
    """How the metrics are computed that are computed in several ways."""

    arithmetic: Arithmetic = "float32"                           # of precision and recall
    score: dict[str, Any] = field(default_factory=dict)          # options of `inception_score`; none: ADM's splits
    _manifolds: PrecisionRecall | None = field(default=None, repr=False)

    def manifolds(self, samples: Tensor, reference: Tensor) -> PrecisionRecall:
        """Precision and recall, computed once for both."""
        self._manifolds = self._manifolds or precision_recall(samples, reference, arithmetic=self.arithmetic)
        return self._manifolds


@dataclass
class Reference:
    """What samples are compared with: features, or statistics where only a file of them is at hand."""

    features: Features | None = None
    statistics: Statistics | None = None            # of the pooled features
    spatial_statistics: Statistics | None = None
    source: dict[str, Any] | None = None            # what the result calls it; none: the statistics' own source
    _fixed: dict[bool, Statistics] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> dict[str, Any] | None:
        """What the result says of it; None where nothing is known."""
        return self.source or (None if self.statistics is None else self.statistics.source)

    @property
    def label(self) -> str:
        """Its name in a few words."""
        name = self.name or {}
        return str(name.get("file") or name.get("folder") or "the given reference")

    def fixed(self, spatial: bool = False) -> Statistics:
        """Statistics of the pooled or spatial features, whatever is at hand: the same bits of the same images."""
        either = self.spatial() if spatial else self.pool()
        if isinstance(either, Statistics):
            return either
        if spatial not in self._fixed:
            self._fixed[spatial] = replace(compute_statistics(either), factor=None)      # as statistics that were stored
        return self._fixed[spatial]

    def pool(self) -> Tensor | Statistics:
        """Pooled features, else their statistics."""
        return self._either(None if self.features is None else self.features.pool, self.statistics, "pooled")

    def spatial(self) -> Tensor | Statistics:
        """Spatial features, else their statistics."""
        return self._either(None if self.features is None else self.features.spatial, self.spatial_statistics, "spatial")

    def _either(self, features: Tensor | None, statistics: Statistics | None, what: str) -> Tensor | Statistics:
        if statistics is not None:
            return statistics
        if features is None:
            raise InputError(f"the reference has no {what} features and no statistics of them")
        return features

    def images(self, metric: str) -> Tensor:
        """Pooled features for a metric that statistics are not enough for."""
        if self.features is None:
            raise InputError(f"{metric} needs the reference's images: statistics are not enough")
        return self.features.pool


def check_metrics(names: Sequence[str], extractor: FeatureExtractor | None = None) -> None:
    """Raise InputError for an unknown metric, or one that the extractor's network has no features for."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"there is no metric of features '{name}'; known: {', '.join(METRICS)}")
        if name == "sfid" and extractor is not None and extractor.kind == "teacher":
            raise InputError("sfid needs Inception's spatial features: the teacher has none")


def check_reference(names: Sequence[str], extractor: FeatureExtractor, reference: Reference) -> None:
    """Before any image is measured: raise InputError if statistics cannot serve these metrics with this extractor."""
    if reference.statistics is None or reference.features is not None:
        return
    for name in names:
        if name in NEED_IMAGES:
            reference.images(name)
        if name == "sfid":
            reference.spatial()
    for statistics in (reference.statistics, reference.spatial_statistics):
        if statistics is not None:
            _check_made_alike(statistics, extractor, statistics.width)


def feature_metrics(
    names: Sequence[str], extractor: FeatureExtractor, samples: Features, reference: Reference, paired: bool = False,
    keys: Sequence[str] | None = None, arithmetic: Arithmetic = "float32", score: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Each metric's result by the name it may bear with this extractor: `rfid` only with FID's network.

    A result has value, uncertainty, n, warnings, title, better, network and what the metric adds (`bias_estimate`, splits, …).
    paired: samples[i] is the reconstruction of reference[i]; narrows the interval of Fréchet distances.
        Otherwise Fréchet distances take the reference as exact.
    keys: names of the samples, by which the Inception Score's splits are drawn; none: splits in the order given.
    arithmetic: of precision and recall. score: options of `inception_score`; none: ADM's splits.
    Raises InputError for too few samples, non-finite features, statistics of another network or resize mode.
    """
    check_metrics(names, extractor)
    _check_reference(extractor, samples, reference)
    results: dict[str, dict[str, Any]] = {}
    ways = Ways(arithmetic, {"keys": keys, **(score or {})})
    for name in names:
        title, better = METRICS[name]
        title = title if extractor.is_inception else f"{STAND_IN_TITLES[name]} ({extractor.kind} features)"
        results[extractor.metric_name(name)] = {
            "title": title, "unit": "", "better": better, "network": extractor.provenance, "n": len(samples.pool),
            **_compute(name, samples, reference, paired, ways),
        }
        if name != "is":
            results[extractor.metric_name(name)]["reference"] = "originals" if paired else reference.label
    return results


def _compute(name: str, samples: Features, reference: Reference, paired: bool, ways: Ways) -> dict[str, Any]:
    if name in ("rfid", "fid", "sfid"):
        return frechet_json(_frechet(name == "sfid", samples, reference, paired))
    if name == "kid":
        theirs = reference.images("kid")
        size = min(SUBSET_SIZE, len(samples.pool), len(theirs))
        distance = kernel_distance(samples.pool, theirs, subset_size=size)
        warnings = [] if size == SUBSET_SIZE else [f"subsets of {size} images: fewer than the usual {SUBSET_SIZE}"]
        return {"value": distance.value, "uncertainty": _interval(distance.interval), "warnings": warnings,
                "subset_std": distance.subset_std, "subsets": distance.subsets, "subset_size": size}
    if name == "is":
        if samples.logits is None:
            raise InputError("the Inception Score needs class logits: this network has none")
        score = inception_score(samples.logits, **ways.score)
        return {"value": score.value, "uncertainty": _interval(score.interval), "warnings": [],
                "splits": list(score.splits), "split_protocol": score.protocol}
    manifolds = ways.manifolds(samples.pool, reference.images(name))
    interval = manifolds.precision_interval if name == "precision" else manifolds.recall_interval
    return {"value": getattr(manifolds, name), "uncertainty": _interval(interval), "warnings": [],
            "k": manifolds.k, "arithmetic": manifolds.arithmetic}


def _frechet(spatial: bool, samples: Features, reference: Reference, paired: bool) -> FrechetResult:
    ours = samples.spatial if spatial else samples.pool
    assert ours is not None      # check_metrics has seen to it
    if paired:
        theirs = reference.spatial() if spatial else reference.pool()
        found = evaluate_frechet(ours, theirs, paired=isinstance(theirs, Tensor))
    else:
        found = evaluate_frechet(ours, reference.fixed(spatial))
        if found.interval is not None:
            method = f"{found.interval.method}, reference taken as exact"
            found = replace(found, interval=replace(found.interval, method=method))
    if found.interval is not None and len(ours) < FEW * ours.shape[1]:
        found = replace(found, warnings=(*found.warnings, "few samples for this width: interval untested"))
    return found


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))


def _check_reference(extractor: FeatureExtractor, samples: Features, reference: Reference) -> None:
    for statistics, ours in ((reference.statistics, samples.pool), (reference.spatial_statistics, samples.spatial)):
        if statistics is not None and ours is not None:
            _check_made_alike(statistics, extractor, ours.shape[1])


def _check_made_alike(statistics: Statistics, extractor: FeatureExtractor, width: int) -> None:
    """Statistics must have been made by this network on images resized alike; ADM's files, which say neither, fit FID's only."""
    check_compatible(statistics, extractor.identifier, extractor.resize, width, assumed=extractor.is_inception)
