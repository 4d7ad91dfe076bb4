"""`toklab info`: sizes and cost of a model."""

import argparse
import math
from typing import TYPE_CHECKING, Any

from .common import MODEL_HELP, say

if TYPE_CHECKING:
    from tokenizers_lab.tokenizer import ImageTokenizer

help = "show a model's parameters, latent shape, rate and FLOPs"
description = """Parameters by part, latent shape, floats or bits per image, and FLOPs of encode and decode.
Nothing is computed: the network is built without memory, so that a recipe of any size is answered in seconds."""
example = "toklab info rectok/imagenet256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL or CONFIG, and the image size."""
    parser.add_argument("model", metavar="MODEL|CONFIG", help=f"{MODEL_HELP}; or a YAML file or a recipe's name")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options that differ from the config")
    parser.add_argument("--size", type=int, metavar="N", help="pixels a side of the image; default: the training size")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    system, model, provenance = find_model(args.model, args.overrides)
    figures = model_figures(system, model, args.size)
    say(f"{args.model}: {system}, {figures['parameters'] / 1e6:.2f} M parameters")
    for name, count in figures["parts"].items():
        say(f"  {name:<20} {count / 1e6:>9.3f} M")
    say(f"image            {' × '.join(map(str, figures['image']))}")
    say(f"{figures['kind']:<16} {' × '.join(map(str, figures['shape']))}")
    values = math.prod(figures["image"])
    if figures["floats"]:
        say(f"per image        {figures['floats']:,} floats, {values / figures['floats']:.1f} times fewer than pixel values")
    else:
        say(f"per image        {figures['bits']:,.0f} bits, {figures['bits'] / (values / 3):.3f} a pixel")
    say(f"encode           {figures['encode_flops'] / 1e9:.2f} GFLOPs (a multiply-add counts as 2)")
    say(f"decode           {figures['decode_flops'] / 1e9:.2f} GFLOPs")
    for key, value in provenance.items():
        say(f"{key:<16} {value}")
    return 0


def find_model(name: str, overrides: list[str]) -> tuple[str, Any, dict[str, Any]]:
    """(system, model config, provenance) of a config, a recipe or saved weights."""
    from pathlib import Path

    from tokenizers_lab.config import list_recipes, load_config, override_objective
    from tokenizers_lab.errors import ConfigError

    if Path(name).suffix in (".yaml", ".yml") or name in list_recipes():
        cfg = load_config(name, overrides)
        return cfg.system, cfg.model, {}
    if overrides:
        raise ConfigError(f"{name} is a saved model: its options cannot be changed by {overrides[0]}")
    from tokenizers_lab.hub import resolve_folder, weights_sha256
    from tokenizers_lab.registry import get_system
    from tokenizers_lab.tokenizer import read_config

    folder = resolve_folder(name)
    saved = read_config(folder)
    model = override_objective(get_system(saved["system"]).resolve("model_config")(), saved["model"], "model")
    origin = {"folder": folder, "SHA-256": weights_sha256(folder), **(saved.get("provenance") or {})}
    return saved["system"], model, origin


def model_figures(system: str, model: Any, size: int | None = None) -> dict[str, Any]:
    """Parameters, shapes, rate and FLOPs of an image tokenizer for one image of size × size pixels (default: its training size).

    Raises InputError on a size that the model cannot take.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import build_tokenizer
    from tokenizers_lab.tokenizer import ImageTokenizer

    with torch.device("meta"):
        tokenizer = build_tokenizer(system, model).eval()
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{system} is not for images: its figures are not here yet")
    size = size or int(getattr(model, "image_size", 256))
    images = torch.zeros(1, 3, size, size, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as encoding_cost:
        encoding = tokenizer.encode(images)
    stored = encoding.codes if encoding.latents is None else encoding.latents
    assert stored is not None      # encode gives one of the two
    with torch.inference_mode(), FlopCounterMode(display=False) as decoding_cost:
        tokenizer.decode(stored)
    shape = tuple(stored.shape[1:])
    book = getattr(tokenizer, "codebook_size", None)
    return {
        "parameters": sum(p.numel() for p in tokenizer.parameters()), "parts": parts_of(tokenizer), "image": (3, size, size),
        "kind": "codes" if encoding.latents is None else "latents", "shape": shape,
        "floats": 0 if encoding.latents is None else math.prod(shape),
        "bits": math.prod(shape) * math.log2(book) if book else 0,
        "encode_flops": encoding_cost.get_total_flops(), "decode_flops": decoding_cost.get_total_flops(),
    }


def parts_of(tokenizer: "ImageTokenizer") -> dict[str, int]:
    """Parameters of each direct submodule, and of the tokenizer itself where it has some."""
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in tokenizer.named_children()}
    own = sum(p.numel() for p in tokenizer.parameters(recurse=False))
    return parts | ({"(itself)": own} if own else {})
