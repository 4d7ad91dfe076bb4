"""Images from a generator: which classes and noise each sample has, and a folder of them that any number of processes fill."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import ConfigError, DataError, InputError
from tokenizers_lab.eval.gather import in_step, on_first, processes
from tokenizers_lab.eval.grid import save_rows
from tokenizers_lab.eval.image_arrays import to_images, write_image_array
from tokenizers_lab.eval.provenance import environment, weights_sha256, write_json
from tokenizers_lab.eval.sample_sets import IMAGES_FOLDER, PROTOCOL_FILE, SAMPLES_FILE, read_protocol
from tokenizers_lab.eval.statistics import content_hash
from tokenizers_lab.tokenizer import ImageTokenizer

from .generator import LatentGenerator, SamplingConfig
from .pixels import RULES as ROUNDINGS
from .pixels import to_uint8

RULES = {
    "balanced": "balanced: the class of sample i is i modulo their number",
    "random": "random: each class drawn uniformly, with replacement",
    "permuted": "permuted: as many of each class, in an order shuffled by the seed",
}
FORMATS = ("npz", "png")
UNFINISHED = "unfinished"                  # folder of the images that are done, until all are
GRID = "grid.png"
GRID_CLASSES, GRID_IMAGES = 8, 8           # rows and columns of the grid; of fewer classes, rows go on below
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class SampleRequest:
    """Which samples. Each depends on its own number alone, not on how many are drawn at a time or by how many processes."""

    n: int
    classes: tuple[int, ...]               # that are asked for
    rule: str = "balanced"                 # of RULES
    seed: int = 0
    rounding: str = "truncate"             # to 8 bits: a rule of `pixels.to_uint8`

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"the number of samples must be at least 1, not {self.n}")
        if not self.classes:
            raise ConfigError("there must be a class to sample")
        if self.rule not in RULES:
            raise ConfigError(f"there is no rule of labels '{self.rule}'; known: {', '.join(RULES)}")
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"there is no rule '{self.rounding}' for 8-bit images; known: {', '.join(ROUNDINGS)}")

    def labels(self) -> Tensor:
        """The class of every sample, int64 (n,)."""
        count = len(self.classes)
        places = torch.arange(self.n) % count
        if self.rule == "random":
            places = torch.tensor([stable_seed(self.seed, "label", i) % count for i in range(self.n)])
        elif self.rule == "permuted":
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "labels"))
            places = places[torch.randperm(self.n, generator=generator)]
        return torch.tensor(self.classes, dtype=torch.int64)[places]

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """What the noise of these samples follows from."""
        return [stable_seed(self.seed, "sample", i) for i in indices]


@torch.inference_mode()
def draw_images(
    generator: LatentGenerator, tokenizer: ImageTokenizer, labels: Tensor, seeds: Sequence[int],
    sampling: SamplingConfig | None = None, guide: LatentGenerator | None = None,
) -> Tensor:
    """Images (B, 3, H, W), float32 in [0, 1] on the CPU, of these classes (B,) and seeds.

    A decoder that itself samples starts every image from the same fixed noise. Raises InputError where an image has NaN.
    """
    latents = generator.denormalise(generator.sample(labels, seeds, sampling, guide))
    tensor = next(tokenizer.parameters())
    images = tokenizer.decode(latents.to(tensor.device, tensor.dtype)).float().cpu()
    if not images.isfinite().all():
        raise InputError("a sample has NaN or infinite pixels: the guidance may be too strong, or the generator broken")
    return images.clamp(0, 1)


def check_tokenizer(generator: LatentGenerator, sha256: str, name: str) -> str:
    """What is known of whether the tokenizer is the one whose latents the generator learned, for the result.

    sha256: of the weights of the tokenizer called `name`. Raises InputError if it is another one.
    """
    about = generator.provenance.get("tokenizer") or {}
    known = about.get("sha256") if isinstance(about, dict) else None
    if not known:
        return "not checked: the generator does not say whose latents it learned"
    if known != sha256:
        raise InputError(f"the generator learned the latents of {about.get('name')} (weights {known[:12]}…), {name} is another "
                         f"tokenizer (weights {sha256[:12]}…)")
    return "the tokenizer that the generator names"


def generate_samples(
    generator: LatentGenerator, tokenizer: ImageTokenizer, out: str | Path, request: SampleRequest, *,
    sampling: SamplingConfig | None = None, guide: LatentGenerator | None = None, batch_size: int = 16,
    formats: Sequence[str] = ("npz",), about: dict[str, Any] | None = None, names: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fill the folder `out`: samples.npz (ADM's `arr_0`, uint8 (n, H, W, 3)) or images/*.png, grid.png, and samples.json.

    What is done is kept, so that an interrupted call goes on; under torch.distributed the processes share the work.
    about: what samples.json also says of generator, guide and tokenizer, by these keys. names: of the classes.
    progress: wraps this process's batches (batches, how many). Returns what samples.json says, on all processes.
    Raises InputError if `out` holds samples that were made otherwise, and what sampling raises, on all processes.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"there is no format '{name}' of samples; known: {', '.join(FORMATS)}")
    folder, sampling = Path(out), sampling or generator.cfg.sampling
    protocol = describe(generator, tokenizer, request, sampling, guide, about or {})
    finished = on_first(lambda: _start(folder, protocol, formats))
    if finished is not None:
        return finished
    labels = request.labels()
    rank, world = processes()
    blocks = on_first(lambda: remaining(folder / UNFINISHED, request.n, batch_size))[rank::world]

    def share() -> None:
        for block in blocks if progress is None else progress(blocks, len(blocks)):
            images = draw_images(generator, tokenizer, labels[block], request.seeds(block), sampling, guide)
            array = to_uint8(images, request.rounding).permute(0, 2, 3, 1).contiguous().numpy()
            if "png" in formats:
                _save_pngs(folder / IMAGES_FOLDER, block, array)
            _save_part(folder / UNFINISHED, block, array)

    in_step(share)
    return on_first(lambda: _finish(folder, protocol, labels, formats, names, generator.device))


def describe(
    generator: LatentGenerator, tokenizer: ImageTokenizer, request: SampleRequest, sampling: SamplingConfig,
    guide: LatentGenerator | None, about: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the images follow from, as JSON data."""
    def network(module: Any, key: str) -> dict[str, Any]:
        return {"system": module.system, "weights_sha256": weights_sha256(module),
                "dtype": str(next(module.parameters()).dtype).removeprefix("torch."), **about.get(key, {})}

    return {
        "kind": "samples", "n": request.n,
        "generator": network(generator, "generator"), "tokenizer": network(tokenizer, "tokenizer"),
        "guide": None if guide is None else network(guide, "guide"),
        "sampling": {**asdict(sampling), "guidance_from": "no class" if guide is None else "the guide (autoguidance)"},
        "labels": {"rule": RULES[request.rule], "classes": list(request.classes)},
        "seed": request.seed, "rounding": f"uint8, {request.rounding}",
    }


def _start(folder: Path, protocol: dict[str, Any], formats: Sequence[str]) -> dict[str, Any] | None:
    """Prepare the folder; what samples.json says if it is finished. Raises InputError if it holds other samples."""
    parts = folder / UNFINISHED
    for file in (folder / PROTOCOL_FILE, parts / PROTOCOL_FILE):
        found = read_protocol(file)
        if found is None:
            continue
        other = [name for name in protocol if found.get(name) != protocol[name]]
        if other:
            said = ", ".join(_difference(name, found.get(name), protocol[name]) for name in other)
            raise InputError(f"{folder} holds samples that were made otherwise ({said}): choose another folder, or delete it")
        if file.parent == folder and {_file_of(name) for name in formats} <= set(found.get("files", {})):
            return found
    parts.mkdir(parents=True, exist_ok=True)
    write_json(protocol, parts / PROTOCOL_FILE)
    return None


def _difference(name: str, one: Any, two: Any) -> str:
    """What differs, in a few words."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
        return ", ".join(f"{name}.{key}" for key in sorted(keys))
    return f"{name} {one}, not {two}" if len(f"{one}{two}") < 40 else name


def _file_of(name: str) -> str:
    return SAMPLES_FILE if name == "npz" else IMAGES_FOLDER


def remaining(parts: Path, n: int, size: int) -> list[list[int]]:
    """Numbers of the samples that are not done, in order, in stretches of at most `size`."""
    done = {i for indices, _ in _parts(parts) for i in indices}
    blocks: list[list[int]] = []
    for i in range(n):
        if i in done:
            continue
        if blocks and len(blocks[-1]) < size and blocks[-1][-1] == i - 1:
            blocks[-1].append(i)
        else:
            blocks.append([i])
    return blocks


def _parts(folder: Path) -> list[tuple[range, Path]]:
    """(Numbers of the images, file) of each part, in order. A part's name is its first number and the one behind its last."""
    files = sorted(folder.glob("*-*.npy"))
    bounds = [file.stem.split("-") for file in files]
    return [(range(int(start), int(stop)), file) for (start, stop), file in zip(bounds, files)]


def _save_part(folder: Path, block: Sequence[int], array: np.ndarray) -> None:
    """Images of a stretch of numbers as one file, aside and then renamed."""
    aside = folder / f".{block[0]:08d}.tmp"
    with open(aside, "wb") as file:
        np.save(file, array)
    os.replace(aside, folder / f"{block[0]:08d}-{block[-1] + 1:08d}.npy")


def _save_pngs(folder: Path, indices: Sequence[int], array: np.ndarray) -> None:
    """A PNG of each image, named by its number, aside and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(indices, array):
        aside = folder / f".{index:08d}.tmp"
        Image.fromarray(image).save(aside, format="PNG")
        os.replace(aside, folder / f"{index:08d}.png")


def _images(parts: Sequence[tuple[range, Path]]) -> Iterator[tuple[range, np.ndarray]]:
    for indices, file in parts:
        yield indices, np.load(file)


def _finish(
    folder: Path, protocol: dict[str, Any], labels: Tensor, formats: Sequence[str], names: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Put the parts together, draw the grid, write samples.json, and clear away."""
    parts = _parts(folder / UNFINISHED)
    if [i for indices, _ in parts for i in indices] != list(range(len(labels))):
        raise DataError(f"{folder / UNFINISHED} lacks samples that were made: run the same command again")
    shape = next(_images(parts))[1].shape[1:]
    files = {}
    if "npz" in formats:
        height, width, channels = shape
        path = write_image_array(folder / SAMPLES_FILE, (len(labels), height, width, channels),
                                 (array for _, array in _images(parts)))
        files[SAMPLES_FILE] = sha256_of(path)
    if "png" in formats:
        images = [folder / IMAGES_FOLDER / f"{i:08d}.png" for i in range(len(labels))]
        files[IMAGES_FOLDER] = content_hash(images, folder / IMAGES_FOLDER)
    shown = class_rows(labels, names)
    wanted = {i for row in shown.values() for i in row}
    found = {i: array[place] for indices, array in _images(parts) for place, i in enumerate(indices) if i in wanted}
    save_rows({label: to_images(np.stack([found[i] for i in row])) for label, row in shown.items()}, folder / GRID, GRID_IMAGES)
    result = {**protocol, "size": list(shape[:2]), "files": files, "environment": environment(device)}
    write_json(result, folder / PROTOCOL_FILE)
    shutil.rmtree(folder / UNFINISHED)
    return result


def class_rows(labels: Tensor, names: Sequence[str] = ()) -> dict[str, list[int]]:
    """Numbers of the samples of each row of the grid, as many in each: of the classes of most samples, or, where no class has
    two, of the first samples in order."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(i)
    if max(map(len, members.values())) == 1:
        size = min(GRID_IMAGES, len(labels))
        starts = range(0, min(len(labels) // size, GRID_CLASSES) * size, size)
        return {f"{start} to {start + size - 1}": list(range(start, start + size)) for start in starts}
    chosen = sorted(sorted(members, key=lambda label: (-len(members[label]), label))[:GRID_CLASSES])
    size = min(GRID_IMAGES * (GRID_CLASSES // len(chosen)), *(len(members[label]) for label in chosen))
    return {class_name(label, names): members[label][:size] for label in chosen}


def class_name(label: int, names: Sequence[str]) -> str:
    """The class's name in at most 16 letters, else its number."""
    return str(names[label])[:16] if label < len(names) else f"class {label}"
