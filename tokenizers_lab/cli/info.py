"""`toklab info`: sizes and cost of a model."""

import argparse
import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .common import MODEL_HELP, check_options, say

if TYPE_CHECKING:
    from tokenizers_lab.network import Network
    from tokenizers_lab.tokenizer import SpeechTokenizer

help = "show a model's parameters, code shape, rate and FLOPs"
description = """Parameters by part; latent shape and floats or bits per image, or frame rate, codebooks and bit rate of speech;
FLOPs of encode and decode. Nothing is computed: the network is built without memory, so that a recipe of any size is
answered in seconds."""
example = "toklab info rectok/imagenet256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL or CONFIG, and the size of what is encoded."""
    parser.add_argument("model", metavar="MODEL|CONFIG", help=f"{MODEL_HELP}; or a YAML file or a recipe's name")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options that differ from the config")
    parser.add_argument("--size", type=int, metavar="N", help="images: pixels a side; default: the training size")
    parser.add_argument("--seconds", type=float, metavar="S", help="speech: audio whose cost is counted; default: 1")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    from tokenizers_lab.registry import get_system

    system, model, provenance = find_model(args.model, args.overrides)
    kind = get_system(system).kind
    if kind == "generator":
        figures = generator_figures(system, model)
        rows = generator_rows(figures)
    elif kind == "speech":
        check_options(args, True, ["size"], ["seconds"])
        figures = speech_figures(system, model, args.seconds)
        rows = speech_rows(figures)
    else:
        check_options(args, False, ["size"], ["seconds"])
        figures = model_figures(system, model, args.size)
        rows = image_rows(figures)
    say(f"{args.model}: {system}, {figures['parameters'] / 1e6:.2f} M parameters")
    for name, count in figures["parts"].items():
        say(f"  {name:<20} {count / 1e6:>9.3f} M")
    for key, value in [*rows, *provenance.items()]:
        say(f"{key:<16} {value}")
    return 0


def image_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on an image tokenizer."""
    values = math.prod(figures["image"])
    if figures["floats"]:
        rate = f"{figures['floats']:,} floats, {values / figures['floats']:.1f} times fewer than pixel values"
    else:
        rate = f"{figures['bits']:,.0f} bits, {figures['bits'] / (values / 3):.3f} a pixel"
    return [
        ("image", " × ".join(map(str, figures["image"]))), (figures["kind"], " × ".join(map(str, figures["shape"]))),
        ("per image", rate),
        ("encode", f"{figures['encode_flops'] / 1e9:.2f} GFLOPs (a multiply-add counts as 2)"),
        ("decode", f"{figures['decode_flops'] / 1e9:.2f} GFLOPs"),
    ]


def generator_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on a generator of latents."""
    return [
        ("latents", " × ".join(map(str, figures["shape"]))), ("classes", f"{figures['classes']:,}"),
        ("evaluation", f"{figures['flops'] / 1e9:.2f} GFLOPs for one image (a multiply-add counts as 2)"),
        ("sampling", figures["sampling"]),
    ]


def speech_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on a speech tokenizer."""
    rate, out, books = figures["sample_rate"], figures["output_rate"], figures["codebook_sizes"]
    channels = "1 channel" if figures["channels"] == 1 else f"{figures['channels']} channels"
    runs = [(size, len(list(group))) for size, group in groupby(books)]
    entries = ", then ".join(f"{count} of {size:,} entries" for size, count in runs)
    raw = 16 * rate * figures["channels"]
    nominal = figures["bit_rate"]
    encode, decode = figures["encode_flops"] / 1e9, figures["decode_flops"] / 1e9
    return [
        *([("buffers", f"{figures['buffers'] / 1e6:.2f} M floats, codebooks with their averages among them")]
          if figures["buffers"] >= 10_000 else []),
        ("audio", f"{rate:,} Hz, {channels}" + (f"; decoded at {out:,} Hz" if out != rate else "")),
        ("frames", f"{rate / figures['hop']:g} a second, of {figures['hop']:,} samples"),
        *([("codebooks", entries),
           ("bit rate", f"{nominal:,.0f} bit/s nominal, {raw / nominal:.0f} times less than 16-bit samples")]
          if books else [("latents", "continuous: no codes")]),
        ("in pieces", figures["pieces"]),
        ("encode", f"{encode:.2f} GFLOPs a second of audio, {encode / 2:.2f} G multiply-adds"),
        ("decode", f"{decode:.2f} GFLOPs a second of audio, {decode / 2:.2f} G multiply-adds"),
    ]


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
    from tokenizers_lab.network import read_config
    from tokenizers_lab.registry import get_system

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
        raise InputError(f"{system} is not for images")
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


def generator_figures(system: str, model: Any) -> dict[str, Any]:
    """Parameters, shape and the FLOPs of one evaluation of a generator of latents."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tokenizers_lab.hub import build_tokenizer

    with torch.device("meta"):
        network: Any = build_tokenizer(system, model).eval()
    x, time = (torch.zeros(1, *shape, device="meta") for shape in (network.state_shape, ()))
    with torch.inference_mode(), FlopCounterMode(display=False) as cost:
        network.velocity(x, time, torch.zeros(1, dtype=torch.int64, device="meta"))
    options = model.sampling
    guidance = "no guidance" if options.guidance == 1 else f"guidance {options.guidance:g}"
    return {
        "parameters": sum(p.numel() for p in network.parameters()), "parts": parts_of(network), "shape": network.latent_shape,
        "classes": model.classes, "flops": cost.get_total_flops(),
        "sampling": f"{options.steps} steps of {options.solver}, {guidance}",
    }


def speech_figures(system: str, model: Any, seconds: float | None = None) -> dict[str, Any]:
    """Parameters, rates and FLOPs a second of a speech tokenizer; the cost is that of `seconds` of audio (default: 1), divided.

    The cost of convolutions and LSTMs does not depend on the duration, that of attention does. Raises InputError on a duration
    that is not above 0.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import build_tokenizer
    from tokenizers_lab.tokenizer import SpeechTokenizer

    from .sounds import bit_rate

    seconds = 1.0 if seconds is None else seconds
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds must be above 0, not {seconds:g}")
    with torch.device("meta"):
        tokenizer = build_tokenizer(system, model).eval()
    if not isinstance(tokenizer, SpeechTokenizer):
        raise InputError(f"{system} is not for speech")
    samples = tokenizer.frames(math.ceil(seconds * tokenizer.sample_rate)) * tokenizer.hop      # whole frames
    audio = torch.zeros(1, tokenizer.channels, samples, device="meta")
    # The counter cannot follow parametrised weights in inference mode.
    with torch.no_grad(), FlopCounterMode(display=False) as encoding_cost:
        code = tokenizer.encode(audio).code
    with torch.no_grad(), FlopCounterMode(display=False) as decoding_cost:
        tokenizer.decode(code)
    counted = samples / tokenizer.sample_rate
    return {
        "parameters": sum(p.numel() for p in tokenizer.parameters()), "parts": parts_of(tokenizer),
        "buffers": sum(b.numel() for b in tokenizer.buffers() if b.is_floating_point()),
        "sample_rate": tokenizer.sample_rate, "output_rate": tokenizer.output_rate(), "channels": tokenizer.channels,
        "hop": tokenizer.hop, "codebook_sizes": tokenizer.codebook_sizes, "bit_rate": bit_rate(tokenizer),
        "pieces": describe_pieces(tokenizer),
        "encode_flops": encoding_cost.get_total_flops() / counted, "decode_flops": decoding_cost.get_total_flops() / counted,
    }


def describe_pieces(tokenizer: "SpeechTokenizer") -> str:
    """Whether pieces give the same as the whole, and what encode and decode have to wait for."""
    encode, decode = tokenizer.encode_context(), tokenizer.decode_context()
    if encode is None or decode is None:
        return "close to the whole, not the same: the network is not local"
    codes, audio = encode.behind / tokenizer.sample_rate, decode.behind * tokenizer.hop / tokenizer.sample_rate
    ahead = "; causal, so that it streams" if tokenizer.causal else f"; codes look {codes:.2f} s ahead, audio {audio:.2f} s"
    return f"the same as the whole{ahead}"


def parts_of(tokenizer: "Network") -> dict[str, int]:
    """Parameters of each direct submodule, and of the network itself where it has some."""
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in tokenizer.named_children()}
    own = sum(p.numel() for p in tokenizer.parameters(recurse=False))
    return parts | ({"(itself)": own} if own else {})
