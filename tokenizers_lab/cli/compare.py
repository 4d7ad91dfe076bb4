"""`toklab compare`: several tokenizers, ours and peers', on one page: a leaderboard."""

import argparse
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import MODEL_HELP, device_of, output_folder, process_group, say, show_progress

if TYPE_CHECKING:
    from tokenizers_lab.tokenizer import Tokenizer

help = "measure several models under one protocol: a leaderboard"
description = """Measure each MODEL and peer on the same images or clips by the same metrics, in one run, and print one table.
--out FOLDER writes it as one HTML page that needs nothing else (compare.html: a table to sort, quality against rate, speed and
memory, the same reconstructions side by side), as compare.json, compare.md, and the reconstructions as files.

MODEL is a run, a checkpoint, a saved folder, SYSTEM/official or a hub id of ours, or a peer:
  diffusers:X   images: X is a folder that diffusers saved, a hub id, or kl-random, kl-random-tiny, dc-random-tiny
  mimi:X, encodec:X, dac:X, encodec-package:X   speech: X is a folder, a hub id, random or random-tiny; X@K: the first K codebooks
Rows of random weights say so. A model that cannot be loaded or measured has a row that says why, and the others go on.

Codecs of several sample rates get clips that were read at the highest of them. With metrics that need no original (wer, dnsmos,
…) the originals have a row too. Speed and memory are measured of all models in turns, over the same batch, --repeats times.
On several GPUs: torchrun --nproc_per_node 8 -m tokenizers_lab compare MODEL … (each item is measured once; the first process
alone measures speed and memory)."""
example = "toklab compare runs/dm_codec-tiny --peer mimi:kyutai/mimi@8 --data sample:speech --metrics mel,wer,bitrate --out table"
IMAGE_METRICS, SPEECH_METRICS = "psnr,ssim,lpips", "mel,stft,sisdr,usage,bitrate"
FOR_IMAGES, FOR_SPEECH = ("size", "features", "speed_batch"), ("seconds", "rate", "asr", "speaker", "utmos")
AT_LEAST = {"limit": 1, "size": 1, "repeats": 0, "speed_batch": 1, "examples": 0}
DECODERS = 4         # processes that decode files
EXAMPLES = {"images": 8, "speech": 4}
USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, data, metrics, protocol, output."""
    parser.add_argument("models", metavar="MODEL", nargs="*", help=f"{MODEL_HELP}, or a peer; two or more with --peer")
    parser.add_argument("--peer", metavar="PEER", action="append", default=[], help="a peer; may be given several times")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")
    parser.add_argument("--data", required=True, help="a folder, shards, a manifest of clips, sample:photos or sample:speech")
    parser.add_argument("--metrics", help=f"comma-separated; default: {IMAGE_METRICS}, or {SPEECH_METRICS}")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images or clips, evenly spaced in a folder")
    parser.add_argument("--repeats", type=int, metavar="N", default=5,
                        help="of the timing of each model; 0: measure neither speed nor memory; default: 5")
    parser.add_argument("--size", type=int, metavar="N", help="images: centre crop, scaled to N × N pixels")
    parser.add_argument("--features", metavar="NET", help="images: network of rfid and its kin; default: inception")
    parser.add_argument("--speed-batch", type=int, metavar="B", help="images: so many are timed in one forward; default: 8")
    parser.add_argument("--seconds", type=float, metavar="S", help="speech: cut clips to this length")
    parser.add_argument("--rate", type=int, metavar="HZ",
                        help="speech: rate at which clips are read; default: the highest of the models")
    parser.add_argument("--asr", metavar="NET", help="speech: recognizer of wer and cer; default: whisper-tiny.en")
    parser.add_argument("--speaker", metavar="NET", help="speech: encoder of sim; default: resemblyzer")
    parser.add_argument("--utmos", metavar="FILE", help="speech: TorchScript file of UTMOS")
    parser.add_argument("--allow-missing", action="store_true", help="go on without a metric whose weights are not here")
    parser.add_argument("--allow-skips", type=int, default=0, metavar="N", help="leave out up to N unreadable files; default: 0")
    parser.add_argument("--examples", type=int, metavar="K",
                        help="reconstructions of K items on the page; default: 8 images, 4 clips")
    parser.add_argument("--out", metavar="FOLDER",
                        help="write compare.html, compare.json, compare.md and the examples into this folder")


def run(args: argparse.Namespace) -> int:
    """Load all, measure one after another in all processes; the first one prints the table and writes the page."""
    from tokenizers_lab.errors import ConfigError, InputError, TokenizersLabError

    for option, least in AT_LEAST.items():
        if getattr(args, option) is not None and getattr(args, option) < least:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least {least}, not {getattr(args, option)}")
    names = [*args.models, *args.peer]
    if len(names) < 2:
        raise InputError("a comparison needs two models or more; toklab eval measures one")
    check_peers(args.models, args.peer)
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            result, examples = measure(args, names, rank)
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if rank:
        return 0
    show(result)
    if args.out:
        from tokenizers_lab.eval.compare import write_comparison

        for path in write_comparison(result, Path(args.out), examples):
            say(f"written: {path}")
    return 0


def measure(args: argparse.Namespace, names: list[str], rank: int) -> tuple[dict[str, Any], Any]:
    """The result and its examples."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.compare import compare_models
    from tokenizers_lab.eval.compare_examples import Examples
    from tokenizers_lab.eval.gather import in_step, on_first
    from tokenizers_lab.tokenizer import SpeechTokenizer

    if args.out:
        on_first(lambda: output_folder(args.out))      # before anything slow
    device = in_step(lambda: device_of(args))
    models = [(name, load(name, device, rank)) for name in names]
    loaded = [(name, model) for name, model in models if not isinstance(model, Exception)]
    speech = bool(loaded) and isinstance(loaded[0][1], SpeechTokenizer)
    for option in FOR_IMAGES if speech else FOR_SPEECH:
        if loaded and getattr(args, option) is not None:
            kinds = ("images", "speech") if speech else ("speech", "images")
            raise InputError(f"--{option.replace('_', '-')} is for {kinds[0]}; {loaded[0][0]} is a tokenizer for {kinds[1]}")
    wanted = args.metrics or (SPEECH_METRICS if speech else IMAGE_METRICS)
    metrics = [name.strip() for name in wanted.split(",") if name.strip()]
    count = EXAMPLES["speech" if speech else "images"] if args.examples is None else args.examples
    examples = Examples(count) if args.out else None
    options = speech_options(args, device) if speech else {"size": args.size, "features": args.features or "inception"}
    if args.speed_batch is not None:
        options["speed_batch"] = args.speed_batch
    result = compare_models(
        models, args.data, metrics, device=device, limit=args.limit, workers=min(DECODERS, os.cpu_count() or 1),
        allow_missing=args.allow_missing, allow_skips=args.allow_skips, repeats=args.repeats, examples=examples,
        progress=(lambda items, what: items) if rank else progress, **options)
    return result, examples


def check_peers(models: list[str], peers: list[str]) -> None:
    """Raise InputError on a name with a colon before which stands no peer, and on a --peer that is none."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.peers import PEER_HELP, PREFIX
    from tokenizers_lab.eval.speech_peers import PEER_HELP as SPEECH_PEER_HELP
    from tokenizers_lab.eval.speech_peers import PEERS

    known = (PREFIX, *(f"{name}:" for name in PEERS))
    for name in (*peers, *(name for name in models if ":" in name and not Path(name).exists())):
        if not name.startswith(known):
            raise InputError(f"there is no peer '{name}'; known for images: {PEER_HELP}; for speech: {SPEECH_PEER_HELP}")


def load(name: str, device: str, rank: int) -> "Tokenizer | Exception":
    """A model, or why it cannot be loaded, the same in all processes. Raises InputError on an unfit name."""
    from tokenizers_lab.errors import InputError, TokenizersLabError
    from tokenizers_lab.eval.gather import in_step

    from .eval import load_model

    try:
        return in_step(lambda: load_model(name, device))
    except InputError:      # a name that nothing can have
        raise
    except (TokenizersLabError, RuntimeError, OSError) as error:      # also too little memory
        if not rank:
            say(f"note: {name} could not be loaded: {' '.join(str(error).split())}")
        return error


def speech_options(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What `compare_speech` takes beside what is common."""
    from tokenizers_lab.eval.speech_metrics import MetricOptions

    chosen = {name: getattr(args, name) for name in ("asr", "speaker", "utmos") if getattr(args, name)}
    return {"seconds": args.seconds, "rate": args.rate, "options": MetricOptions(**chosen, device=device)}


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar for each model, and for the timing."""
    return show_progress(items, what)


def show(result: dict[str, Any]) -> None:
    """Print the table without intervals, then what to be wary of."""
    from rich.console import Console
    from rich.table import Table

    from tokenizers_lab.eval.compare_text import cell_text, failures, heading, label_of, noun_of

    table = Table(title=f"{result['n']} {noun_of(result)} of {result['protocol']['source']}", title_justify="left")
    table.add_column("", overflow="fold")
    for column in result["columns"]:
        table.add_column(heading(column), justify="right")
    for row in result["rows"]:
        cells = [cell_text(row["metrics"].get(column["name"]), column, interval=False) for column in result["columns"]]
        table.add_row(label_of(row), *cells)
    console = Console()
    if not console.is_terminal:      # a file or a pipe has no width to fit into
        console = Console(width=max(120, Console(width=10_000).measure(table).maximum))
    console.print(table, markup=False)
    for note in [*failures(result), *result["warnings"], *(f"left out: {text}" for text in result["skipped"])]:
        say(f"note: {note}")
