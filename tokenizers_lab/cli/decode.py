"""`toklab decode`: latents or codes back to images."""

import argparse
from typing import TYPE_CHECKING

from .common import add_model, device_of, load_image_tokenizer, output_folder, say, show_progress, unique_names

if TYPE_CHECKING:
    from torch import Tensor

    from .pictures import Geometry

help = "decode files of toklab encode to images"
description = "Decode the safetensors files that toklab encode wrote to PNG, in the size of the original image (or of its crop)."
example = "toklab decode latents/*.safetensors --model runs/rectok-tiny --out decoded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, model, folder."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="files that toklab encode wrote")
    add_model(parser)
    parser.add_argument("--out", default="decoded", help="folder for the PNG files; default: decoded")
    parser.add_argument("--any-model", action="store_true", help="decode what another model encoded, too")


def run(args: argparse.Namespace) -> int:
    """Write one PNG for each file."""
    import torch

    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import resolve_folder, weights_sha256

    from .pictures import save_png

    tokenizer = load_image_tokenizer(args.model, device_of(args))
    sha256 = weights_sha256(resolve_folder(args.model))
    targets = unique_names(args.files, output_folder(args.out), ".png")
    for file, target in show_progress(zip(args.files, targets), "decoding", len(targets)):
        stored, geometry, made_by = read_encoded(file)
        if made_by != sha256 and not args.any_model:
            whose = f"SHA-256 {made_by[:12]}, not {sha256[:12]}"
            raise InputError(f"{file} was encoded by other weights ({whose}); --any-model decodes it all the same")
        with torch.inference_mode():
            images = tokenizer.decode(stored[None].to(tokenizer.device))
        save_png(geometry.undo(images), target)
        say(f"{file} -> {target}")
    return 0


def read_encoded(file: str) -> "tuple[Tensor, Geometry, str]":
    """(latents (C, h, w) or codes (K, h, w), geometry, SHA-256 of the model) of a file. Raises InputError if it is not ours."""
    from dataclasses import fields

    from safetensors import SafetensorError, safe_open

    from tokenizers_lab.errors import InputError

    from .pictures import Geometry

    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}      # noqa: SIM118 (safe_open is no mapping)
        geometry = Geometry(**{f.name: int(header[f.name]) for f in fields(Geometry)})
        return tensors.get("latents", tensors.get("codes")), geometry, header["model_sha256"]      # type: ignore[return-value]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{file} is not a file that toklab encode wrote, or is damaged ({error})") from error
