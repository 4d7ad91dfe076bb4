"""`toklab compare`: several tokenizers, ours and peers', in one table."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import MODEL_HELP, device_of, output_folder, say, show_progress

help = "measure several models under one protocol and print one table"
description = """Measure each MODEL on the same images or clips by the same metrics, one process, one run, and print one table:
ours and peers' together, as toklab eval names them (diffusers:X for images; mimi:X, encodec:X, dac:X, encodec-package:X for
speech, X@K for the first K codebooks; X may be random: its row is then labelled so). Codecs of several sample rates get clips
that were read at the highest of them. With metrics that need no original (wer, dnsmos, …) the originals have a row too."""
example = "toklab compare runs/dm_codec-tiny mimi:kyutai/mimi@8 --data sample:speech --metrics mel,wer,bitrate --out table"
IMAGE_METRICS, SPEECH_METRICS = "psnr,ssim,lpips", "mel,stft,sisdr,usage,bitrate"
FOR_IMAGES, FOR_SPEECH = ("size", "features"), ("seconds", "rate", "asr", "speaker", "utmos")
DECODERS = 4         # processes that decode files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, data, metrics, protocol, output."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help=f"{MODEL_HELP}, or a peer; two or more")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")
    parser.add_argument("--data", required=True, help="a folder, shards, a manifest of clips, sample:photos or sample:speech")
    parser.add_argument("--metrics", help=f"comma-separated; default: {IMAGE_METRICS}, or {SPEECH_METRICS}")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images or clips, evenly spaced in a folder")
    parser.add_argument("--size", type=int, metavar="N", help="images: centre crop, scaled to N × N pixels")
    parser.add_argument("--features", metavar="NET", help="images: network of rfid and its kin; default: inception")
    parser.add_argument("--seconds", type=float, metavar="S", help="speech: cut clips to this length")
    parser.add_argument("--rate", type=int, metavar="HZ",
                        help="speech: rate at which clips are read; default: the highest of the models")
    parser.add_argument("--asr", metavar="NET", help="speech: recognizer of wer and cer; default: whisper-tiny.en")
    parser.add_argument("--speaker", metavar="NET", help="speech: encoder of sim; default: resemblyzer")
    parser.add_argument("--utmos", metavar="FILE", help="speech: TorchScript file of UTMOS")
    parser.add_argument("--allow-missing", action="store_true", help="go on without a metric whose weights are not here")
    parser.add_argument("--allow-skips", type=int, default=0, metavar="N", help="leave out up to N unreadable files; default: 0")
    parser.add_argument("--out", metavar="FOLDER", help="write compare.md, compare.json and compare.html into this folder")


def run(args: argparse.Namespace) -> int:
    """Load all, measure one after another, print the table."""
    from tokenizers_lab.errors import ConfigError, InputError
    from tokenizers_lab.eval.compare import compare_models, write_comparison
    from tokenizers_lab.tokenizer import SpeechTokenizer

    from .eval import load_model

    for option in ("limit", "size"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ConfigError(f"--{option} must be at least 1, not {getattr(args, option)}")
    if len(args.models) < 2:
        raise InputError("a comparison needs two models or more; toklab eval measures one")
    folder = output_folder(args.out) if args.out else None      # before anything slow
    device = device_of(args)
    models = [(name, load_model(name, device)) for name in args.models]
    speech = isinstance(models[0][1], SpeechTokenizer)
    for option in FOR_IMAGES if speech else FOR_SPEECH:
        if getattr(args, option) is not None:
            kinds = ("images", "speech") if speech else ("speech", "images")
            raise InputError(f"--{option} is for {kinds[0]}; {args.models[0]} is a tokenizer for {kinds[1]}")
    names = [name.strip() for name in (args.metrics or (SPEECH_METRICS if speech else IMAGE_METRICS)).split(",") if name.strip()]
    options = speech_options(args, device) if speech else {"size": args.size, "features": args.features or "inception"}
    result = compare_models(
        models, args.data, names, device=device, limit=args.limit, workers=min(DECODERS, os.cpu_count() or 1),
        allow_missing=args.allow_missing, allow_skips=args.allow_skips, progress=progress, **options)
    show(result)
    if folder is None:
        return 0
    for path in write_comparison(result, Path(folder)):
        say(f"written: {path}")
    return 0


def speech_options(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What `compare_speech` takes beside what is common."""
    from tokenizers_lab.eval.speech_metrics import MetricOptions

    chosen = {name: getattr(args, name) for name in ("asr", "speaker", "utmos") if getattr(args, name)}
    return {"seconds": args.seconds, "rate": args.rate, "options": MetricOptions(**chosen, device=device)}


def progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar for each model."""
    return show_progress(batches, what)


def show(result: dict[str, Any]) -> None:
    """Print the table without intervals, then what to be wary of."""
    from rich.console import Console
    from rich.table import Table

    from tokenizers_lab.eval.compare import heading, label_of
    from tokenizers_lab.eval.summary_lines import format_value

    noun = "clips" if "speech" in result["kind"] else "images"
    table = Table(title=f"{result['n']} {noun} of {result['protocol']['source']}", title_justify="left")
    table.add_column("", overflow="fold")
    for column in result["columns"]:
        table.add_column(heading(column), justify="right")
    for row in result["rows"]:
        cells = [format_value(row["metrics"].get(column["name"]), interval=False) for column in result["columns"]]
        table.add_row(label_of(row), *cells)
    console = Console()
    if not console.is_terminal:      # a file or a pipe has no width to fit into
        console = Console(width=max(120, Console(width=10_000).measure(table).maximum))
    console.print(table, markup=False)
    for note in [*result["warnings"], *(f"left out: {text}" for text in result["skipped"])]:
        say(f"note: {note}")
