"""`toklab export`: encode and decode as files that run without this package."""

import argparse
from pathlib import Path

from .common import MODEL_HELP, load_tokenizer, say

help = "export encode and decode as programs that need only PyTorch, or ONNX"
description = """Write encode.pt2 and decode.pt2 (torch.export; run them with torch.export.load(FILE).module()) and export.json
(shapes and ranges) into the folder OUT. The size of images is fixed; the batch size is not, nor is the length of audio, which
must be whole frames (fill the last one with zeros). Programs take whole items: a padded batch needs the tokenizer itself."""
example = "toklab export runs/rectok-tiny rectok-tiny-exported --onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, output, size, format."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="folder for the programs")
    parser.add_argument("--size", type=int, metavar="N", help="pixels a side of the images; default: the training size")
    parser.add_argument("--seconds", type=float, metavar="S", help="a fixed length of the audio; default: any length")
    parser.add_argument("--onnx", action="store_true", help="also write encode.onnx and decode.onnx")


def run(args: argparse.Namespace) -> int:
    """Load, export, say what was written."""
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.export import EXPORT_FILE, export_tokenizer
    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

    tokenizer = load_tokenizer(args.model, "cpu", fuse=False)
    if args.size is not None and not isinstance(tokenizer, ImageTokenizer):
        raise ConfigError(f"--size is for images; {args.model} is for audio")
    if args.seconds is not None and not isinstance(tokenizer, SpeechTokenizer):
        raise ConfigError(f"--seconds is for audio; {args.model} is for images")
    about = export_tokenizer(tokenizer, args.out, args.size, args.onnx, args.seconds)
    for part in ("encode", "decode"):
        sides = [about[part]["input"], about[part]["output"]]
        given, made = (f"{side['name']} {' × '.join(map(str, side['shape']))}" for side in sides)
        for file in about[part]["files"].values():
            path = Path(args.out) / file
            say(f"{path}: {given} -> {made} ({path.stat().st_size / 1e6:.1f} MB)")
    say(f"shapes and ranges: {Path(args.out) / EXPORT_FILE}")
    return 0
