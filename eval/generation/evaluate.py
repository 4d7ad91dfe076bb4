"""What a generator's run is measured by when it ends: distances of a few samples to the images whose latents it learned."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.latent_manifest import find_latent_manifest
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import CheckpointError, DataError, InputError, WeightsMissing
from tokenizers_lab.eval.candidates import UNTRAINED_LABEL, describe, untrained_copy
from tokenizers_lab.eval.feature_metrics import Reference, check_metrics, feature_metrics
from tokenizers_lab.eval.features import FeatureExtractor, build_extractor
from tokenizers_lab.eval.grid import save_rows
from tokenizers_lab.eval.images import data_protocol
from tokenizers_lab.eval.provenance import environment, pixels_sha256, text_sha256
from tokenizers_lab.eval.rfid import FeatureStore
from tokenizers_lab.eval.runs import EXAMPLE_COUNT, EXAMPLES, GRID, MODEL_LABEL, RunFolder
from tokenizers_lab.hub import load, resolve_folder, weights_sha256
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

from .generator import LatentGenerator
from .pixels import to_uint8
from .sampling import RULES, SampleRequest, check_tokenizer, class_name, class_rows, draw_images

LIMIT = 64                 # reference images, and as many samples, where data.val_limit says nothing
FLOOR_LABEL = "the tokenizer's reconstructions"
LABELS_OF_REFERENCE = "those of the reference images"
EXPLANATION = (
    "Distances of generated images to the reference images, by the features that the column names: never FID, and of few images, "
    "so that only rows of one table compare. The untrained network starts from the same noise; the tokenizer's reconstructions "
    "of the reference images are what no generator of its latents can be expected to go below by much."
)


def evaluate_generator(
    run: RunFolder, generator: LatentGenerator, metrics: Sequence[str], batch_size: int = 16
) -> dict[str, Any]:
    """Samples of a run's generator, of the same network untrained, and the tokenizer's reconstructions, against the images.

    Of each reference image's class one sample, with the network's own sampling; at most data.val_limit images, or LIMIT.
    metrics: fid, kid, precision, recall, named after the features: a random Inception's, and EfficientNet-Lite0's if it is here.
    Writes grid.png and examples/ into the run's folder. Raises CheckpointError or InputError where the tokenizer is not here or
    another one, DataError where the images are not.
    """
    tokenizer, about = open_tokenizer(generator)
    extractors = offline_extractors(generator.device)
    for extractor in extractors:
        check_metrics(metrics, extractor)
    data = reference_data(run.config.data, LIMIT)
    images, keys, classes = read_reference(validation_batches(data, batch_size))
    request = SampleRequest(len(images), tuple(range(generator.null_class)))
    labels, rule = request.labels(), RULES[request.rule]
    if classes is not None and int(classes.max()) < generator.null_class:
        labels, rule = classes, LABELS_OF_REFERENCE
    untrained = untrained_copy(generator)
    untrained.set_latent_statistics(generator.latent_mean[:, 0, 0], generator.latent_std[:, 0, 0])

    def sampled(network: LatentGenerator) -> Tensor:
        pieces = [draw_images(network, tokenizer, labels[part], request.seeds(part)) for part in _parts(len(images), batch_size)]
        return torch.cat(pieces)

    samples, others, floor = sampled(generator), sampled(untrained), reconstruct(tokenizer, images, batch_size)
    references = [Reference(features_of(extractor, keys, images), source={"folder": data.val}) for extractor in extractors]
    rows = []
    for label, role, network, made in (
        (MODEL_LABEL, "model", generator, samples), (UNTRAINED_LABEL, "untrained", untrained, others),
        (FLOOR_LABEL, "baseline", tokenizer, floor),
    ):
        found: dict[str, Any] = {}
        for extractor, reference in zip(extractors, references):
            features = features_of(extractor, keys, to_uint8(made, request.rounding))
            found |= feature_metrics(metrics, extractor, features, reference, keys=keys)
        rows.append({"label": label, "role": role, **describe(network, role), "metrics": found})
    names = [str(name) for name in generator.provenance.get("classes", [])]
    save_rows({label: samples[row] for label, row in class_rows(labels, names).items()}, run.path / GRID)
    return {
        "kind": "generator samples", "n": len(images), "keys": list(keys), "skipped": [],
        "converted": {"originals": {}, "reconstructions": {}}, "rows": rows, "margins": margins(rows),
        "explanation": EXPLANATION,
        "examples": write_examples(
            run.path, {"sample": samples, "reference": images, "untrained": others}, keys, labels, names),
        "protocol": {
            **data_protocol(data), "images_sha256": text_sha256([pixels_sha256(image) for image in images]),
            "size": list(images.shape[2:]), "rounding": f"uint8, {request.rounding}", "labels": rule, "seed": request.seed,
            "sampling": asdict(generator.cfg.sampling), "tokenizer": about,
            "features": [extractor.protocol() for extractor in extractors],
        },
        "environment": environment(generator.device),
    }


def open_tokenizer(generator: LatentGenerator) -> tuple[ImageTokenizer, dict[str, Any]]:
    """The tokenizer that a generator names, in eval mode, and what is known of it. Raises CheckpointError, InputError."""
    named = generator.provenance.get("tokenizer")
    if not isinstance(named, dict) or not named.get("name"):
        raise CheckpointError("the generator does not say whose latents it learned: its samples cannot be decoded")
    folder = resolve_folder(str(named["name"]))
    digest = weights_sha256(folder)
    check = check_tokenizer(generator, digest, str(named["name"]))
    tokenizer = load(str(folder), device=generator.device)
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{named['name']} is a {tokenizer.system} network, not a tokenizer of images")
    return tokenizer, {"name": named["name"], "weights_sha256": digest, "check": check}


def offline_extractors(device: torch.device) -> list[FeatureExtractor]:
    """Inception with random weights, and EfficientNet-Lite0 where it is here or can be fetched."""
    random = build_extractor("random", device=device)
    try:
        return [random, build_extractor("teacher", device=device)]
    except WeightsMissing:
        return [random]


def reference_data(cfg: Any, limit: int) -> ImageDataConfig:
    """What reads the images of a run's held-out data: themselves, or those whose latents were cached. Raises DataError."""
    manifest = find_latent_manifest(cfg.val)
    source, size = (cfg.val, cfg.size) if manifest is None else (manifest.source, manifest.size)
    return ImageDataConfig(train="", val=source, size=size, val_limit=cfg.val_limit or limit, workers=0)


def read_reference(batches: Iterable[ImageBatch]) -> tuple[Tensor, list[str], Tensor | None]:
    """Images (N, 3, H, W) in [0, 1], keys, and classes (N,), none if an image has none. Raises DataError for fewer than two."""
    read = list(batches)
    if sum(map(len, read)) < 2:
        raise DataError("there are fewer than two reference images: samples cannot be compared with them")
    labels = [batch.labels for batch in read if batch.labels is not None]
    classes = torch.cat(labels) if len(labels) == len(read) else None
    keys = [key for batch in read for key in batch.keys]
    return torch.cat([batch.images for batch in read]), keys, classes if classes is None or bool((classes >= 0).all()) else None


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> Tensor:
    """What the tokenizer makes of images (N, 3, H, W), in [0, 1] on the CPU."""
    made = [tokenizer.reconstruct(images[part].to(tokenizer.device)).float().cpu() for part in _parts(len(images), batch_size)]
    return torch.cat(made).clamp(0, 1)


def features_of(extractor: FeatureExtractor, keys: Sequence[str], images: Tensor) -> Any:
    """Features of images, in order."""
    store = FeatureStore(extractor)
    store.add(keys, images)
    gathered = store.gather(together=False)
    assert gathered is not None      # this process is alone
    return gathered[1]


def margins(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much better the trained generator is than each other row: positive is better."""
    found = []
    for other in rows[1:]:
        for name, metric in rows[0]["metrics"].items():
            sign = 1 if metric["better"] == "higher" else -1
            value = sign * (metric["value"] - other["metrics"][name]["value"])
            found.append({"metric": name, "over": other["label"], "role": other["role"], "value": value, "uncertainty": None})
    return found


def write_examples(
    folder: Path, pictures: dict[str, Tensor], keys: Sequence[str], labels: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The first images of each kind as files examples/NN_<kind>.png, and what the report says of them."""
    (folder / EXAMPLES).mkdir(exist_ok=True)
    entries = []
    for i in range(min(EXAMPLE_COUNT, len(keys))):
        entry: dict[str, Any] = {"key": keys[i], "class": class_name(int(labels[i]), names), "files": {}}
        for kind, images in pictures.items():
            entry["files"][kind] = f"{EXAMPLES}/{i:02d}_{kind}.png"
            array = to_uint8(images[i : i + 1])[0].permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / entry["files"][kind], optimize=True)
        entries.append(entry)
    return entries


def _parts(n: int, size: int) -> list[range]:
    """Stretches of 0 … n − 1."""
    return [range(i, min(n, i + size)) for i in range(0, n, size)]
