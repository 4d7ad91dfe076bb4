"""`toklab probe asr`: how much of what is said can be read from a codec's codes."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import add_model, device_of, say, show_progress

help = "a recognizer on a speech codec's codes: held-out CTC loss, CER, WER"
description = """Train a two-layer bidirectional LSTM with CTC on characters on the frozen codes of DATA, and give its loss, CER
and WER on held-out clips, with 95 % intervals. It is given the codec's quantized vectors, or with --features entries learns a
vector for each entry of each codebook, repeated to at least 50 a second. Every 10th training clip is kept to choose the epoch.
DATA is sample:speech (its training part, its other part is held out), a folder, a manifest or shards, with transcripts.
MODEL is besides ours a peer, as of `toklab eval`: mimi:X, encodec:X, dac:X."""
example = "toklab probe asr runs/xy_tokenizer-tiny-stage1 --baseline --out probe.json"
SAMPLE = "sample:speech"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, the probe, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", nargs="?", default=SAMPLE, help=f"the training clips; default: {SAMPLE}")
    parser.add_argument("--held-out", metavar="DATA", help="the clips to measure on; default: the held-out part of a sample set")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K clips of each part, evenly spaced in a folder")
    parser.add_argument("--baseline", action="store_true", help="also probe the same network with random weights")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training clips; default: 60")
    parser.add_argument("--minutes", type=float, metavar="M", help="end each training after M minutes, whatever the epoch")
    parser.add_argument("--width", type=int, metavar="D", help="channels of the probe; default: 128")
    parser.add_argument("--features", choices=["vectors", "entries"],
                        help="vectors: the codec's own (default; not of every peer); entries: learned from the codes alone")
    parser.add_argument("--normaliser", choices=["basic", "english", "none"], help="of the transcripts; default: basic")
    parser.add_argument("--seed", type=int, metavar="S", help="of the probe, and of the random weights; default: 0")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")


def run(args: argparse.Namespace) -> int:
    """Train, measure, print a table."""
    from tokenizers_lab.data.loader import validation_batches
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.probe_asr import ProbeSettings, probe_asr
    from tokenizers_lab.eval.provenance import write_json
    from tokenizers_lab.eval.speech import data_protocol
    from tokenizers_lab.eval.speech_data import speech_data_config
    from tokenizers_lab.tokenizer import SpeechTokenizer

    from .eval import load_model
    from .eval_table import show_rows

    names = ("epochs", "minutes", "width", "features", "normaliser", "seed")
    settings = ProbeSettings(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    sources = parts_of(args.data, args.held_out)
    model = load_model(args.model, device_of(args))
    if not isinstance(model, SpeechTokenizer):
        raise InputError(f"{args.model} is a tokenizer for images: it has nothing to hear")
    train, held_out = (speech_data_config(source, model, args.limit) for source in sources)
    result = probe_asr(
        model, validation_batches(train, 1), validation_batches(held_out, 1), settings, label=args.model, baseline=args.baseline,
        data={"training": data_protocol(train), "held_out": data_protocol(held_out)}, progress=show_progress)
    protocol = result["protocol"]
    say(f"{result['n']} held-out clips ({protocol['held_out_seconds']:.0f} s), probe trained on {protocol['training_clips']} "
        f"({protocol['training_seconds']:.0f} s); texts: {protocol['normaliser']} (95 % intervals)")
    notes = show_rows(result["rows"])
    show_margins(result["margins"])
    for row in result["rows"]:
        notes += describe_row(row)
    left = protocol["without_text"]
    if any(left.values()):
        notes.append(f"{left['training']} training clips and {left['held_out']} held-out ones have no text and are left out")
    for note in notes:
        say(f"note: {note}")
    if args.out:
        say(f"result: {write_json(result, Path(args.out))}")
    return 0


def parts_of(data: str, held_out: str | None) -> tuple[str, str]:
    """(training source, held-out source). Raises InputError where nothing says what is held out."""
    from tokenizers_lab.errors import InputError

    sample = data.startswith("sample:") and "/" not in data
    if held_out is None and not sample:
        raise InputError(f"{data} does not say which clips are held out: name them by --held-out")
    return (f"{data}/train" if sample else data), held_out or f"{data}/val"


def show_margins(margins: Iterable[dict[str, Any]]) -> None:
    """Print how much better the model is than each other row."""
    for margin in margins:
        bounds = margin["uncertainty"]
        interval = "" if bounds is None else f" [{bounds['low']:.4f}, {bounds['high']:.4f}]"
        say(f"better than {margin['over']} by {margin['value']:.4f}{interval} ({margin['metric']}, mean over clips)")


def describe_row(row: dict[str, Any]) -> list[str]:
    """What to know of a row's codes and probe."""
    used = ", ".join(f"{n} of {size}" for n, size in zip(row["codes_used"], row["codebook_sizes"]))
    notes = [f"{row['label']}: entries used {used}; frames repeated {row['repeat']} times; weights of epoch {row['epoch']} of "
             f"{row['epochs']}"]
    short = row["metrics"]["ctc"]["too_short"]
    return notes + ([f"{row['label']}: {short} clips have too few frames for their text, and no CTC loss"] if short else [])
