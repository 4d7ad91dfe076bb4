"""`toklab eval` of a speech tokenizer."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import say
from .eval_table import show_codes, show_notes, show_rows, show_speed, show_steps

if TYPE_CHECKING:
    from tokenizers_lab.tokenizer import SpeechTokenizer

DEFAULT_METRICS = "mel,stft,sisdr,usage,bitrate"
OPTIONS = ("csv", "seconds", "rate", "channels", "decoding", "asr", "speaker", "utmos")


def add_speech_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of speech alone."""
    group = parser.add_argument_group("speech")
    group.add_argument("--csv", metavar="FILE", help="also write every clip's values, texts and counts of every row to this file")
    group.add_argument("--seconds", type=float, metavar="S", help="cut clips to this length")
    group.add_argument("--rate", type=int, metavar="HZ",
                       help="sample rate at which the clips are read, the same for codecs of several rates; default: the model's")
    group.add_argument("--channels", choices=["mixed", "each"],
                       help="clips of several channels: measure their mean, or each; default: mixed")
    group.add_argument("--decoding", metavar="WAY", help="one of the model's ways to decode, where it has several")
    group.add_argument("--asr", metavar="NET",
                       help="recognizer of wer and cer: whisper-tiny.en (default), whisper-base, a hub id or a folder")
    group.add_argument("--speaker", metavar="NET", help="encoder of sim: resemblyzer (default), a hub id or a folder")
    group.add_argument("--utmos", metavar="FILE", help="TorchScript file of UTMOS")


def measure_speech(
    args: argparse.Namespace, tokenizer: "SpeechTokenizer", names: list[str], workers: int, device: str,
    progress: Callable[[Iterable[Any], Any], Iterable[Any]], steps: Sequence[int] = (),
) -> dict[str, Any]:
    """The result. progress: wraps batches; takes them and the data config. steps: of a diffusion decoder."""
    from tokenizers_lab.eval.speech_data import evaluate_speech_data, speech_data_config
    from tokenizers_lab.eval.speech_metrics import MetricOptions

    data = speech_data_config(args.data, tokenizer, args.limit, args.seconds, args.rate, workers)
    chosen = {name: getattr(args, name) for name in ("asr", "speaker", "utmos") if getattr(args, name)}
    return evaluate_speech_data(
        tokenizer, data, names, batch_size=args.batch_size or 8, allow_skips=args.allow_skips, label=args.model,
        progress=lambda batches, what: progress(batches, data), baselines=not args.no_baselines, decoding=args.decoding,
        channels=args.channels or "mixed", allow_missing=args.allow_missing, steps=steps,
        options=MetricOptions(**chosen, device=device))


def show_speech(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print every row's values, the codes, and what to be wary of; write the CSV."""
    protocol = result["protocol"]
    say(f"{result['n']} clips of {args.data}, {protocol['seconds_total']:.0f} s at {protocol['sample_rate']} Hz (95 % intervals)")
    notes = show_rows(result["rows"])
    if "codes" in result:
        show_codes(result["codes"])
        notes += [f"codes: {warning}" for warning in result["codes"]["warnings"]]
    if "latents" in result:
        from tokenizers_lab.eval.summary_lines import latents_line

        say(latents_line(result["latents"]))
    if "speed" in result:
        show_speed(result["speed"])
    if "steps" in result:
        show_steps(result["steps"])
    show_notes(result, notes)
    if args.csv:
        from tokenizers_lab.eval.speech_data import write_clip_table

        say(f"clips: {write_clip_table(result, Path(args.csv))}")
