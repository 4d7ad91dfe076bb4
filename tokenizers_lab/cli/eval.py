"""`toklab eval`: measure a model's reconstructions of images or speech."""

import argparse
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_model, check_options, data_config, device_of, load_tokenizer, process_group, say, show_progress
from .eval_speech import DEFAULT_METRICS as SPEECH_METRICS
from .eval_speech import OPTIONS as SPEECH_OPTIONS
from .eval_speech import add_speech_arguments, measure_speech, show_speech
from .eval_table import show_latents, show_notes, show_rows, show_steps

if TYPE_CHECKING:
    from tokenizers_lab.eval.candidates import Candidate
    from tokenizers_lab.tokenizer import ImageTokenizer, Tokenizer

Progress = Callable[[Iterable[Any], Any], Iterable[Any]]
help = "measure a model's reconstructions, or generated images (toklab eval gfid)"
WORDS = ("gfid", "statistics")      # modules eval_WORD beside this one
description = """Reconstruct every image or clip of DATA and measure it beside baselines: the same network untrained, and each
patch replaced by its mean colour, or each clip's mean mel spectrum held still. DATA is a folder, webdataset shards, a manifest
of clips, or the held-out part of sample:photos or sample:speech. The JSON holds every value, its interval, and the protocol.
Two first words have a help of their own: toklab eval gfid (generated images), toklab eval statistics (a reference for FID).

MODEL is besides those of ours a peer or finished reconstructions:
  diffusers:X   AutoencoderKL or AutoencoderDC: X is a folder that diffusers saved, a pipeline's folder, or a hub id
  mimi:X, encodec:X, dac:X, encodec-package:X   a speech codec: X is a folder, a hub id, or random
  FOLDER        of images, one for each of DATA with the same name (the extension may differ). A folder with config.json is a
                saved tokenizer, one with config.yaml or checkpoints a run; any other folder of images is reconstructions

Metrics of an image and its reconstruction: psnr, ssim, ms_ssim, lpips (both backbones), lpips_alex, lpips_vgg.
Of sets of images, by --features: rfid (against the originals), fid (against --reference), sfid, kid, is, precision, recall.
Of the latents beside --teacher: cknna (do the two agree about neighbours?), se_cknna (also of noisy, turned, scaled images).
Of the latents: latents (statistics of each channel, active units, size in floats or bits).
Of a clip and its reconstruction: mel, stft, sisdr, pesq (pesq_wb and pesq_nb), stoi, estoi, visqol, sim (speaker similarity);
of a reconstruction: wer and cer (by --asr, against the clip's text), utmos, dnsmos, distillmos, beside those of the originals.
Of the codes of speech: usage and bitrate. rtf: real-time factors of encode and decode.
A diffusion decoder starts every item from the same fixed noise; --steps N decodes in N sampling steps, --steps 1,4,16 compares.
Values do not depend on --batch-size, on threads or on the number of processes. On several GPUs:
torchrun --nproc_per_node 8 -m tokenizers_lab eval MODEL DATA …, or accelerate launch -m tokenizers_lab eval MODEL DATA …"""
example = "toklab eval runs/rectok-tiny sample:photos --size 64 --out results.json"
IMAGE_METRICS = "psnr,ssim,lpips"
IMAGE_OPTIONS = ("features", "reference", "teacher", "size", "sample", "no_uint8", "forward_batch", "pictures")
DECODERS = 4         # processes that decode files, where there are enough to be worth starting them
PICTURES = 8         # images in the grid
USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, metrics, protocol, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="a folder, shards, a manifest of clips, sample:photos or sample:speech")
    parser.add_argument("--metrics", help=f"comma-separated; default: {IMAGE_METRICS}, or {SPEECH_METRICS}")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images or clips, evenly spaced in a folder")
    parser.add_argument("--batch-size", type=int, metavar="B", help="images or clips read at a time; default: 16, or 8 clips")
    parser.add_argument("--no-baselines", action="store_true", help="measure the model alone")
    parser.add_argument("--allow-missing", action="store_true",
                        help="go on without a metric whose weights or package are not here")
    parser.add_argument("--allow-skips", type=int, default=0, metavar="N",
                        help="leave out up to N unreadable files and list them; default: 0, the first one is an error")
    parser.add_argument("--steps", metavar="N[,N…]",
                        help="sampling steps of a diffusion decoder: one number for the whole evaluation, or several, at which "
                        "some of DATA are decoded again (JSON: steps); default: the model's own")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")
    group = parser.add_argument_group("images")
    group.add_argument("--features", metavar="NET",
                       help="network of rfid and its kin: inception (FID's), or a stand-in whose results are named after it and "
                       "never FID: random, teacher, or a file of Inception's weights; default: inception")
    group.add_argument("--reference", metavar="REF",
                       help="compare features with this instead of the originals: a .npz of statistics (ADM's or ours), or a "
                       "folder of images")
    group.add_argument("--teacher", metavar="NET",
                       help="of cknna and se_cknna: efficientnet-lite0, timm:NAME, transformers:ID or FOLDER; default: "
                       "transformers:facebook/dinov2-giant")
    group.add_argument("--size", type=int, metavar="N",
                       help="centre crop, scaled to N × N pixels; default: the training size, or that of the reconstructions")
    group.add_argument("--sample", action="store_true", help="draw latents from the posterior instead of taking its mode")
    group.add_argument("--no-uint8", action="store_true",
                       help="measure pairs without rounding to 8 bits (features are always of 8-bit images)")
    group.add_argument("--forward-batch", type=int, metavar="B",
                       help="images the network sees at a time; default: 1; more is faster on a GPU and may change last "
                       "digits; not with --sample")
    group.add_argument("--pictures", metavar="PNG",
                       help=f"also write a grid of {PICTURES} originals, reconstructions, and latents as colours (PCA)")
    add_speech_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure in all processes; the first one prints a table and writes the JSON."""
    from tokenizers_lab.errors import ConfigError, TokenizersLabError

    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {args.limit}")
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            result, model, data = measure(args, rank)
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if rank:
        return 0
    if data is None:
        show_speech(args, result)
    else:
        show_images(result, args.data, data.size)
    if args.out:
        from tokenizers_lab.eval.provenance import write_json

        say(f"result: {write_json(result, Path(args.out))}")
    if args.pictures:
        from tokenizers_lab.eval.pictures import save_pictures

        counts = parse_steps(args.steps)
        alone = counts[0] if len(counts) == 1 else None
        say(f"pictures: {save_pictures(model, data, Path(args.pictures), PICTURES, alone)}")
    return 0


def measure(args: argparse.Namespace, rank: int) -> tuple[dict[str, Any], Any, Any]:
    """The result, the model and the data config of images (None of speech)."""
    from tokenizers_lab.eval.gather import in_step, processes
    from tokenizers_lab.eval.reconstructions import is_reconstructions
    from tokenizers_lab.tokenizer import SpeechTokenizer

    def progress(batches: Iterable[Any], data: Any) -> Iterable[Any]:
        """data: the config of what is read; none: not counted."""
        total = None if data is None or rank else count_batches(data, args.batch_size or 16, processes()[1])
        return batches if rank else show_progress(batches, "evaluating", total)

    parse_steps(args.steps)      # before anything slow
    device = in_step(lambda: device_of(args))
    workers = min(DECODERS, os.cpu_count() or 1)
    tokenizer = None if is_reconstructions(args.model) else in_step(lambda: load_model(args.model, device))
    speech = isinstance(tokenizer, SpeechTokenizer)
    check_options(args, speech, IMAGE_OPTIONS, SPEECH_OPTIONS)
    names = [name.strip() for name in (args.metrics or (SPEECH_METRICS if speech else IMAGE_METRICS)).split(",") if name.strip()]
    if isinstance(tokenizer, SpeechTokenizer):
        args.batch_size = args.batch_size or 8
        return measure_speech(args, tokenizer, names, workers, device, progress, parse_steps(args.steps)), tokenizer, None
    return measure_images(args, tokenizer, names, workers, device, progress)


def measure_images(
    args: argparse.Namespace, tokenizer: Any, names: list[str], workers: int, device: str, progress: Progress
) -> tuple[dict[str, Any], "ImageTokenizer | Candidate", Any]:
    """The result, the model and the data config. tokenizer: none for a folder of reconstructions."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.candidates import check_sampling
    from tokenizers_lab.eval.gather import in_step
    from tokenizers_lab.eval.harness import evaluate, plan_metrics
    from tokenizers_lab.eval.reconstructions import folder_candidate, reconstruction_size

    plan = plan_metrics(names, args.reference is not None)      # before anything slow
    if args.teacher is not None and not plan.alignment:
        raise InputError("--teacher is for cknna and se_cknna: neither was asked for (--metrics)")
    forward_batch = 1 if args.forward_batch is None else args.forward_batch
    check_sampling(args.sample, forward_batch)
    model: ImageTokenizer | Candidate
    if tokenizer is None:
        size = args.size or in_step(lambda: reconstruction_size(args.model))
        data = data_config(args.data, size, args.limit, workers)
        model = folder_candidate(args.model, data)
    else:
        size = args.size if args.size is not None else int(getattr(tokenizer.cfg, "image_size", 256))
        data = data_config(args.data, size, args.limit, workers)
        model = tokenizer
    result = evaluate(
        model, data, names, features=args.features or "inception", reference=args.reference, teacher=args.teacher,
        batch_size=args.batch_size or 16, device=device, allow_missing=args.allow_missing, allow_skips=args.allow_skips,
        label=args.model,
        progress=lambda batches, what: progress(batches, None if what == "reference" else data),
        baselines=not args.no_baselines, forward_batch=forward_batch, round_uint8=not args.no_uint8, sample=args.sample,
        steps=parse_steps(args.steps))
    return result, model, data


def parse_steps(text: str | None) -> list[int]:
    """Numbers of sampling steps, such as 1,4,16; none: empty. Raises InputError on anything else."""
    from tokenizers_lab.errors import InputError

    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if (text is not None and not words) or any(not word.isdecimal() or int(word) < 1 for word in words):
        raise InputError(f"--steps takes whole numbers from 1 on, such as 4 or 1,4,16, not '{text}'")
    return list(dict.fromkeys(int(word) for word in words))


def load_model(name: str, device: str) -> "Tokenizer":
    """A tokenizer of ours or a peer's, for images or speech."""
    from tokenizers_lab.eval.peers import PREFIX, load_peer
    from tokenizers_lab.eval.speech_peers import PEERS, load_speech_peer

    if name.startswith(PREFIX):
        return load_peer(name.removeprefix(PREFIX), device)
    if name.partition(":")[0] in PEERS and ":" in name:
        return load_speech_peer(name, device)
    return load_tokenizer(name, device, fuse=False)


def count_batches(data: Any, batch_size: int, world: int) -> int | None:
    """Batches of this process's share; None for shards, whose samples are not counted."""
    from tokenizers_lab.data.loader import checked_reader, find_source
    from tokenizers_lab.data.sampling import spread

    reader = checked_reader(data)
    source = find_source(reader, data.val, "val")
    return None if source.shards else -(-len(spread(len(reader.listing(source)), data.val_limit)) // (batch_size * world))


def show_images(result: dict[str, Any], data: str, size: int) -> None:
    """Print every row's values, then what to be wary of."""
    say(f"{result['n']} images of {data}, {size} px (95 % intervals)")
    notes = [*result.get("warnings", []), *show_rows(result["rows"])]
    if "latents" in result:
        show_latents(result["latents"])
    if "steps" in result:
        show_steps(result["steps"])
    for which, files in result["converted"].items():
        kinds = sorted(set(files.values()))
        notes += [f"{list(files.values()).count(kind)} of the {which} were converted to 8-bit RGB from: {kind}" for kind in kinds]
    show_notes(result, notes)
