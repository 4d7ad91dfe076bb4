"""`toklab tokenize`: a whole data set to codes or latents."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_model, check_options, device_of, say, terminal_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers_lab.data.quarantine import Bad
    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer
    from tokenizers_lab.tokenizing.local import Job

help = "encode a whole data set to shards of codes or latents"
description = """Encode every image or clip of SOURCE to shards in the folder OUT: webdataset's tar, or Parquet. SOURCE is a
folder, a manifest (.jsonl, .csv, .tsv), webdataset shards (a .tar path, a glob, a brace range, a URL), or a sample
set. Codes are stored as uint16 or int32, latents as float32 or float16, beside the key, the length, and text, label,
speaker and language where they are known. Of a folder or manifest, --shard-size samples make a shard; of webdataset shards each
makes one. Clips of any length are encoded in constant memory.
Interrupted, the same command goes on: finished shards are kept, and all bytes are those of a run that was not
interrupted. manifest.json tells model, source, options, what was skipped and why, and the hash of every shard.
Each GPU gets a process; --ray runs on a Ray cluster. tokenizers_lab.data.tokens.read_tokens and toklab decode read OUT."""
example = "toklab tokenize 'clips/shard-{000..099}.tar' tokens --model runs/lm_spt-tiny --workers 4"
VERSION = 1
EVERY = 60.0      # seconds between two lines of progress where stderr is no terminal
SIZES = {False: 32, True: 16}      # samples of a block: images, clips


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output, model, how."""
    parser.add_argument("source", metavar="SOURCE", help="a folder, a manifest, webdataset shards, sample:photos, sample:speech")
    parser.add_argument("out", metavar="OUT", help="folder of the shards")
    add_model(parser)
    parser.add_argument("--format", choices=["webdataset", "parquet"], default="webdataset", help="default: webdataset")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of latents; default: float32")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="folders and manifests: samples of a shard; "
                        "default: 1000")
    parser.add_argument("--batch-size", type=int, metavar="B", help="samples that are decoded, and encoded, together; default: "
                        "32 images or 16 clips")
    parser.add_argument("--size", type=int, metavar="N", help="images: centre crop, scaled to N × N pixels; default: the model's")
    parser.add_argument("--whole", action="store_true", help="images: in their own size, padded to a multiple of the patch")
    parser.add_argument("--batch-seconds", type=float, metavar="S", help="speech: clips of a batch × the longest; default: 120")
    parser.add_argument("--window", type=float, metavar="S", help="speech: longer clips are encoded piece by piece; default: 30")
    parser.add_argument("--bad-fraction", type=float, default=0.01, metavar="F", help="share of samples that may be unreadable; "
                        "default: 0.01")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="decoding processes for each network; default: 2")
    parser.add_argument("--processes", type=int, metavar="P", help="processes that run the network; default: one a GPU, or one")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on the Ray cluster at HOST:PORT, 'auto', or on a 'local' one")


def run(args: argparse.Namespace) -> int:
    """Plan, make what is missing, close the manifest."""
    from tokenizers_lab.data.tokens import import_parquet
    from tokenizers_lab.hub import resolve_folder, weights_sha256
    from tokenizers_lab.tokenizer import SpeechTokenizer
    from tokenizers_lab.tokenizing.encoding import Settings, load_network
    from tokenizers_lab.tokenizing.folder import open_token_folder
    from tokenizers_lab.tokenizing.local import Job
    from tokenizers_lab.tokenizing.plan import plan_source

    check_numbers(args)
    if args.format == "parquet":
        import_parquet()
    if args.ray:
        from tokenizers_lab.tokenizing.cluster import import_ray

        import_ray()
    model = resolve_folder(args.model)
    settings = Settings(str(model.absolute()), weights_sha256(model), args.dtype, args.batch_seconds or 120.0)
    tokenizer = load_network(settings, "cpu")
    speech = isinstance(tokenizer, SpeechTokenizer)
    check_options(args, speech, ["size", "whole"], ["batch_seconds", "window"])
    view = view_of(args, tokenizer, settings)
    plan = plan_source(args.source, speech, args.shard_size, args.batch_size or SIZES[speech])
    header = header_of(args, plan, view, settings, tokenizer.system)
    del tokenizer
    with open_token_folder(Path(args.out), header) as folder:
        make_missing(args, Job(plan, view, settings, folder, args.workers))
        manifest = folder.close_manifest(args.bad_fraction)
    hours = f", {manifest['seconds'] / 3600:.2f} h of audio" if speech else ""
    shards, skipped = f"{plan.shards:,} shard{'s' * (plan.shards != 1)}", manifest["skipped_samples"]
    say(f"{manifest['samples']:,} samples{hours} in {shards}, {skipped:,} skipped -> {args.out}")
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ConfigError on an option out of its range."""
    from tokenizers_lab.errors import ConfigError

    for name in ("shard_size", "batch_size", "batch_seconds", "window", "processes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.workers < 0 or not 0 <= args.bad_fraction <= 1:
        raise ConfigError("--workers must be at least 0, --bad-fraction within [0, 1]")
    if args.whole and args.size is not None:
        raise ConfigError("--whole and --size exclude each other")


def view_of(args: argparse.Namespace, tokenizer: "ImageTokenizer | SpeechTokenizer", settings: Any) -> Any:
    """What the network is shown of a sample. Raises ConfigError, InputError on a size that does not fit."""
    from tokenizers_lab.errors import ConfigError, InputError
    from tokenizers_lab.tokenizer import SpeechTokenizer
    from tokenizers_lab.tokenizing.decoding import View

    if isinstance(tokenizer, SpeechTokenizer):
        window = min(30.0, settings.batch_seconds) if args.window is None else args.window
        if window > settings.batch_seconds:
            raise ConfigError(f"--window {window:g} is more than --batch-seconds {settings.batch_seconds:g}: lower it")
        return View(True, sample_rate=tokenizer.sample_rate, channels=tokenizer.channels, window=window)
    if args.whole:
        return View(False, tokenizer.downsample)
    size = int(getattr(tokenizer.cfg, "image_size", 256)) if args.size is None else args.size
    if size < 1 or size % tokenizer.downsample:
        raise InputError(f"--size must be a multiple of {tokenizer.downsample} for this model, not {size}")
    return View(False, tokenizer.downsample, size)


def header_of(args: argparse.Namespace, plan: Any, view: Any, settings: Any, system: str) -> dict[str, Any]:
    """What manifest.json says from the start on; a run that goes on must have the same."""
    from .latent_stats import data_name

    options = {"format": args.format, "dtype": args.dtype, "batch_size": plan.block_size}
    if plan.listing is not None:
        options["shard_size"] = plan.shard_size
    if view.speech:
        options |= {"batch_seconds": settings.batch_seconds, "window": view.window}
    else:
        options |= {"whole": True} if view.size is None else {"size": view.size}
    return {
        "made_by": "toklab tokenize", "version": VERSION, "state": "unfinished", "kind": "speech" if view.speech else "images",
        "system": system, "model": data_name(args.model), "model_sha256": settings.sha256, "source": data_name(args.source),
        "source_fingerprint": plan.fingerprint(), "shards": plan.shards, "options": options}


def make_missing(args: argparse.Namespace, job: "Job") -> None:
    """Make the shards that are not finished, on this machine or on a Ray cluster."""
    from tokenizers_lab.tokenizing.folder import Tally
    from tokenizers_lab.tokenizing.local import run_local

    with terminal_bar() as bar:
        shards = [shard for shard in bar.track(range(job.plan.shards), description="checking")
                  if not job.folder.finished(shard)]
    if len(shards) < job.plan.shards:
        say(f"{job.plan.shards - len(shards):,} of {job.plan.shards:,} shards are finished already")
    if not shards:
        return
    meter = Meter(job, shards, Tally(job.folder, args.bad_fraction))
    with meter.bar:
        if args.ray:
            from tokenizers_lab.tokenizing.cluster import run_ray

            run_ray(job, shards, args.ray, args.processes, args.device, meter.note)
        else:
            run_local(job, shards, devices_of(args), meter.note)


def devices_of(args: argparse.Namespace) -> "list[str]":
    """The device of each process: every GPU, unless one is named; on a CPU as many as --processes says."""
    import torch

    name = device_of(args)
    if name == "cuda":
        gpus = torch.cuda.device_count()
        return [f"cuda:{i % gpus}" for i in range(args.processes or gpus)]
    return [name] * (args.processes or 1)


class Meter:
    """Progress: samples and hours of audio a second, and the time left."""

    def __init__(self, job: "Job", shards: "Sequence[int]", tally: Any):
        from tokenizers_lab.tokenizing.plan import block_total

        self.job, self.tally, self.count, self.begin = job, tally, len(shards), time.monotonic()
        self.total = block_total(job.plan, shards)      # samples; none: shards are counted
        self.bar = terminal_bar()
        self.task = self.bar.add_task("tokenizing", total=self.total or self.count)
        self.samples = self.skipped = self.shards = 0
        self.seconds, self.told = 0.0, self.begin

    def note(self, samples: int, bad: "list[Bad]", seconds: float, finished: bool) -> None:
        """Add a block. Raises DataError if too many samples are unreadable."""
        self.samples += samples
        self.skipped += len(bad)
        self.seconds += seconds
        self.shards += finished
        done = self.samples + self.skipped if self.total else self.shards
        self.bar.update(self.task, completed=done, description=f"tokenizing {self.rate()}")
        now = time.monotonic()
        if self.bar.disable and now - self.told > EVERY:
            self.told = now
            total = f"{self.total:,} samples" if self.total else f"{self.count:,} shards"
            print(f"{done:,} of {total}, {self.rate()}", file=sys.stderr)
        self.tally.count(samples, bad)

    def rate(self) -> str:
        """Samples, and hours of audio, a second."""
        spent = max(1e-9, time.monotonic() - self.begin)
        audio = f", {self.seconds / 3600 / spent:.3g} h of audio/s" if self.job.view.speech else ""
        return f"{self.samples / spent:.3g} samples/s{audio}"
