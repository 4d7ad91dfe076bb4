"""A folder of finished reconstructions, measured as a model is: each file stands for the image of the same name."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.decode import converted_from, open_image, to_array, to_rgb
from tokenizers_lab.data.folder import ImageFolder, open_folder
from tokenizers_lab.data.sampling import spread
from tokenizers_lab.data.sources import resolve_source
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.network import CONFIG_FILE
from tokenizers_lab.settings import ImageDataConfig

from .candidates import Candidate, Reconstruction
from .gather import on_first
from .statistics import content_hash


def is_reconstructions(name: str) -> bool:
    """Whether a name is a folder of images and no model: a folder without config.json (saved weights), config.yaml or
    checkpoints (a run), that holds images."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / part).exists() for part in (CONFIG_FILE, "config.yaml", "checkpoints")):
        return False
    try:
        return len(open_folder(folder)) > 0
    except DataError:
        return False


def reconstruction_size(name: str) -> int:
    """Pixels a side of the first reconstruction. Raises InputError if it is not square, DataError if it is unreadable."""
    folder = open_folder(name)
    file = folder.root / folder.names[0]
    with open_image(file) as image:
        width, height = image.size
    if width != height:
        raise InputError(f"{file} has {width} × {height} pixels: reconstructions of centre crops are square")
    return width


def folder_candidate(name: str, data: ImageDataConfig) -> Candidate:
    """The row of a folder whose files have the names of the data's images, whatever their extensions.

    data: the originals, a folder; with `val_limit` the folder may hold the partners of those alone.
    Raises InputError if counts or names do not match; while measuring, InputError for another resolution and DataError for
    an unreadable file, each naming it.
    """
    folder = open_folder(name)
    source = resolve_source(str(data.val), "val")
    if source.folder is None:
        raise InputError("a folder of reconstructions is compared with a folder of images, not with shards")
    originals = open_folder(source.folder)
    partners = pair_names(name, folder, originals, data)

    def read(key: str, original: Tensor, converted: dict[str, str]) -> Tensor:
        file = folder.root / partners[key]
        with open_image(file, data.max_pixels) as image:
            stored = converted_from(image)
            pixels = to_rgb(image, str(file))
        if (pixels.height, pixels.width) != tuple(original.shape[1:]):
            raise InputError(f"{file} has {pixels.width} × {pixels.height} pixels, its original {original.shape[2]} × "
                             f"{original.shape[1]} (--size): a reconstruction has the size of the crop that it is compared with")
        if stored is not None:
            converted[key] = stored
        return torch.from_numpy(to_array(pixels).copy()).float() / 255

    def reconstruct(images: Tensor, keys: Sequence[str]) -> Reconstruction:
        converted: dict[str, str] = {}
        pixels = [read(key, image, converted) for key, image in zip(keys, images)]
        return Reconstruction(torch.stack(pixels), converted=converted)

    files = [folder.root / file for file in partners.values()]
    description: dict[str, Any] = {
        "system": "a folder of reconstructions", "content_hash": on_first(lambda: content_hash(files, folder.root)),
        "dtype": "uint8",
    }
    return Candidate(name, "model", reconstruct, description)


def pair_names(name: str, folder: ImageFolder, originals: ImageFolder, data: ImageDataConfig) -> dict[str, str]:
    """Each original's file in the folder of reconstructions. Raises InputError where they do not pair one to one."""
    theirs = by_stem(folder.names, name)
    everything = by_stem(originals.names, str(data.val))
    chosen = [originals.names[i] for i in spread(len(originals), data.val_limit)]      # all without a limit
    wanted = by_stem(chosen, str(data.val))
    missing = sorted(wanted.keys() - theirs.keys())
    if missing:
        raise InputError(f"{name} has {len(theirs)} images for the {len(wanted)} of {data.val}: there is no reconstruction of "
                         f"{wanted[missing[0]]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    extra = sorted(theirs.keys() - everything.keys())
    if extra:
        raise InputError(f"{name} has {len(theirs)} images for the {len(wanted)} of {data.val}: there is no original of "
                         f"{theirs[extra[0]]}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else ""))
    return {key: theirs[stem] for stem, key in wanted.items()}


def by_stem(names: Sequence[str], where: str) -> dict[str, str]:
    """Relative paths by their names without extension. Raises InputError where two share one."""
    found: dict[str, str] = {}
    for name in names:
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in found:
            raise InputError(f"{where}: {found[stem]} and {name} differ in their extension alone, so neither can be paired")
        found[stem] = name
    return found
