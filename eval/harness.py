"""Everything that `toklab eval` measures of one model on one set of images, in one pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.folder import open_folder
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.data.sources import resolve_source
from tokenizers_lab.errors import InputError, WeightsMissing
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

from . import alignment, feature_metrics, image_metrics
from .candidates import Candidate, check_sampling
from .feature_metrics import NEED_IMAGES, Reference
from .features import FeatureExtractor, build_extractor
from .gather import in_step, on_first, processes
from .image_features import load_teacher
from .images import data_protocol, evaluate_images
from .rfid import collect_features, evaluate_rfid, reference_statistics
from .skips import Skips
from .statistics import content_hash, read_statistics
from .steps import split_steps, sweep_images

LATENTS = "latents"
KINDS = ("inception", "random", "teacher")
AGAINST_ORIGINALS, AGAINST_REFERENCE = "rfid", "fid"
Batches = Iterable[ImageBatch]


@dataclass(frozen=True)
class Plan:
    """Metric names by what they are computed from."""

    pairs: tuple[str, ...]         # an image and its reconstruction
    features: tuple[str, ...]      # features of sets of images
    latents: bool
    alignment: tuple[str, ...] = ()     # latents and a teacher's features


def plan_metrics(names: Sequence[str], reference: bool = False) -> Plan:
    """Sort metric names. Raises InputError for an unknown one, for `fid` without a reference and `rfid` with one."""
    pairs, features, aligned = [], [], []
    for name in names:
        if name in feature_metrics.METRICS:
            features.append(name)
        elif name in alignment.METRICS:
            aligned.append(name)
        elif name in image_metrics.METRICS or name in image_metrics.ALIASES:
            pairs.append(name)
        elif name != LATENTS:
            known = [*image_metrics.METRICS, *image_metrics.ALIASES, *feature_metrics.METRICS, *alignment.METRICS, LATENTS]
            raise InputError(f"there is no metric '{name}'; known: {', '.join(known)}")
    if reference and AGAINST_ORIGINALS in features:
        raise InputError("rfid compares reconstructions with their originals: against another reference it is fid")
    if not reference and AGAINST_REFERENCE in features:
        raise InputError("fid needs a reference (--reference): against the originals themselves it is rfid")
    if reference and not any(name != "is" for name in features):      # the score has no reference
        raise InputError("a reference is for fid, sfid, kid, precision and recall: none of them was asked for")
    return Plan(tuple(image_metrics.expand_names(pairs)), tuple(dict.fromkeys(features)), LATENTS in names,
                tuple(dict.fromkeys(aligned)))


def load_extractor(features: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The network of that kind, or Inception with the weights of a file. Raises as `features.build_extractor`."""
    if features in KINDS:
        try:
            return build_extractor(features, device=device)
        except WeightsMissing as error:
            if features != "inception":
                raise
            raise WeightsMissing(f"{error}; random and teacher features (--features) need no such file, but what they give is "
                                 "not FID and not called so") from error
    if not Path(features).expanduser().is_file():
        raise InputError(f"there are no features '{features}': known are {', '.join(KINDS)}, or a file of Inception's weights")
    return build_extractor("inception", features, device)


def load_reference(
    source: str, extractor: FeatureExtractor, metrics: Sequence[str], data: ImageDataConfig, batch_size: int = 16,
    progress: Callable[[Batches, str], Batches] | None = None,
) -> Reference:
    """A statistics file (.npz: ours, ADM's), or a folder of images prepared as `data` is; for all processes.

    A folder's statistics are kept in our cache by the hash of its files; its features are computed anew where kid, precision
    or recall need them. Raises DataError, InputError.
    """
    if source.endswith(".npz"):
        pooled, early = read_statistics(source)
        return Reference(statistics=pooled, spatial_statistics=early, source={"file": source, **pooled.source})
    cfg = ImageDataConfig(train=source, val=source, size=data.size, workers=data.workers)
    root = resolve_source(source, "val").folder
    if root is None:
        raise InputError(f"a reference is an .npz file of statistics or a folder of images, not {source}")
    folder = open_folder(root)
    digest = on_first(lambda: content_hash([root / name for name in folder.names], root))
    images = {**data_protocol(cfg), "content_hash": digest, "n": len(folder)}
    del images["source"], images["limit"]      # the same files under another name are the same reference
    spatial = "sfid" in metrics

    def batches() -> Batches:
        mine = validation_batches(cfg, batch_size, *processes())
        return mine if progress is None else progress(mine, "reference")

    if any(name in NEED_IMAGES for name in metrics):
        reference = Reference(collect_features(batches, extractor, spatial))
        return Reference(reference.features, source={"folder": source, "images": images, **extractor.protocol()})
    reference = reference_statistics(batches, extractor, images, spatial)
    assert reference.statistics is not None      # that is what it makes
    reference.source = {"folder": source, **reference.statistics.source}
    return reference


def evaluate(
    model: ImageTokenizer | Candidate,
    data: ImageDataConfig,
    metrics: Sequence[str],
    *,
    features: str = "inception",
    reference: str | None = None,
    teacher: str | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    allow_missing: bool = False,
    allow_skips: int = 0,
    progress: Callable[[Batches, str], Batches] | None = None,
    steps: Sequence[int] = (),
    **options: Any,
) -> dict[str, Any]:
    """The result of `evaluate_rfid`, or of `evaluate_images` where no metric needs features, with `latents` if asked for.

    metrics: names of single images, of sets of images, of latents beside a teacher (`alignment.METRICS`), and `latents`.
    features: inception, random, teacher, or a file. teacher: of cknna and se_cknna (`image_features.parse_teacher`).
    reference: of fid, sfid, kid, precision and recall instead of the originals (`load_reference`).
    Under torch.distributed each process reads its own share of the data, every image once, and gets the whole result.
    allow_skips: so many images may be unreadable; they are left out and listed in `skipped`.
    steps: of a diffusion decoder: one number for the whole evaluation, or several that are compared (`steps.sweep_images`).
    progress: wraps batches. options: of `evaluate_images`. Raises TokenizersLabError of every kind.
    """
    plan = plan_metrics(metrics, reference is not None)
    check_sampling(bool(options.get("sample")), options.get("forward_batch", 1))
    whole, compared = split_steps(model, steps)
    if compared and options.get("sample"):
        raise InputError("drawn latents (sample) go with one number of steps: several are compared from the same fixed noise")
    if whole is not None:
        options["steps"] = whole
    extractor, why = None, ""
    if plan.features:
        try:
            extractor = in_step(lambda: load_extractor(features, device))
        except WeightsMissing as error:
            if not allow_missing:
                raise
            why = str(error)
    if extractor is not None:
        feature_metrics.check_metrics(plan.features, extractor)
    named, network, why_none = teacher or alignment.DEFAULT_TEACHER, None, ""
    if plan.alignment:
        if isinstance(model, Candidate):
            raise InputError("cknna and se_cknna compare latents: a folder of reconstructions has none")
        network, why_none = _load_teacher(named, device, allow_missing)
    skips = Skips(allow_skips)
    mine: Batches = validation_batches(data, batch_size, *processes(), on_bad=skips)
    mine = mine if progress is None else progress(mine, "evaluating")
    options |= {
        "data": data_protocol(data), "allow_missing": allow_missing, "latents": plan.latents, "skipped": skips.reasons}
    if extractor is None:
        result = evaluate_images(model, mine, plan.pairs, **options)
        for row in result["rows"]:
            row["metrics"] |= {name: _absent(feature_metrics.METRICS[name][0], why) for name in plan.features}
    else:
        found = None if reference is None else load_reference(reference, extractor, plan.features, data, batch_size, progress)
        result = evaluate_rfid(model, mine, extractor, plan.features, image_metrics=plan.pairs, reference=found, **options)
        result["warnings"] = reference_warnings(found, result["protocol"])
    skips.check(result["skipped"])      # of all processes
    if network is not None and isinstance(model, ImageTokenizer):
        def again() -> Batches:
            share = validation_batches(data, batch_size, *processes(), on_bad=lambda bad: None)      # counted the first time
            return share if progress is None else progress(share, "comparing with the teacher")

        given = {name: options[name] for name in ("sample", "seed", "forward_batch", "together") if name in options}
        alignment.add_alignment(model, network, named, again, result, plan.alignment, **given)
    for row in result["rows"] if why_none else ():
        row["metrics"] |= {name: _absent(alignment.METRICS[name], why_none) for name in plan.alignment}
    return {**result, **_compare_steps(model, data, batch_size, plan, compared, result, options)}


def _load_teacher(name: str, device: torch.device | str, allow_missing: bool) -> tuple[Any, str]:
    """(The teacher of cknna, ""), or, if it may be missing and is, (none, why)."""
    try:
        return in_step(lambda: load_teacher(name, device)), ""
    except WeightsMissing as error:
        if not allow_missing:
            raise
        return None, str(error)


def _compare_steps(
    model: ImageTokenizer | Candidate, data: ImageDataConfig, batch_size: int, plan: Plan, counts: list[int],
    result: dict[str, Any], options: dict[str, Any],
) -> dict[str, Any]:
    """{"steps": …} where numbers of steps are compared, by the metrics of single images, PSNR if none was asked for."""
    if not counts or isinstance(model, Candidate):
        return {}
    batches = validation_batches(data, batch_size, *processes(), on_bad=lambda bad: None)      # counted the first time
    given = {name: options[name] for name in ("round_uint8", "seed", "together") if name in options}
    return {"steps": sweep_images(model, batches, result, plan.pairs or ("psnr",), counts, **given)}


def _absent(title: str, why: str) -> dict[str, Any]:
    return {"title": title, "value": None, "missing": why}


def reference_warnings(reference: Reference | None, protocol: dict[str, Any]) -> list[str]:
    """What makes a reference another protocol than that of the images, in words; empty where nothing is known to."""
    if reference is None or reference.name is None:
        return []
    unnamed = reference.statistics is not None and not (reference.name.get("extractor") or reference.name.get("resize"))
    warnings = ["the reference's file names neither network nor resize mode: assumed to be FID's Inception"] if unnamed else []
    images = reference.name.get("images")
    if not isinstance(images, dict):
        return [*warnings, "the file does not say how its images were cropped and resized before the network's own resize"]
    return warnings + [
        f"the reference's images were prepared otherwise ({what}: {images.get(what)}) than these ({protocol.get(what)})"
        for what in ("resize", "crop") if images.get(what) != protocol.get(what)
    ]
