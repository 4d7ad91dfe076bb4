"""`toklab latents`: a tokenizer's latents of a data set, computed once."""

import argparse
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import add_model, data_config, device_of, process_group, say, show_progress
from .eval import DECODERS, load_model
from .latent_stats import data_name

help = "store the latents of a set of images, for training generators"
description = """Encode every image of DATA by an image tokenizer with continuous latents and store the latents in the folder
OUT, from which generators train: data.train=OUT. DATA is a folder (its sub-folders are classes), a manifest, webdataset
shards, or sample:photos; images are centre-cropped as evaluation does it (ADM). Latents are the posterior's mode as the
tokenizer normalises it, or one draw (--sample), or mean and standard deviation, from which training draws (--moments).
OUT/latents.json names the tokenizer and its SHA-256, the options, the classes, images that could not be read, and the mean
and standard deviation of each channel. A command that was interrupted goes on where it stopped when it is run again in the
same way, and gives the same bytes; damaged shards are made anew. MODEL may be a peer too: diffusers:X.
Several processes share the work: torchrun --nproc_per_node 8 -m tokenizers_lab latents MODEL DATA OUT …"""
example = "toklab latents runs/rectok-tiny sample:photos/train latents/photos --size 64 --flips"
USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, folder, what is stored and how."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="a folder, a manifest, shards, or sample:photos")
    parser.add_argument("out", metavar="OUT", help="folder of the latents: a new one, or one that this command began")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels; default: the training size")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images, evenly spaced in a folder")
    parser.add_argument("--flips", action="store_true", help="store the mirrored crop's latents too, for data.flip")
    parser.add_argument("--moments", action="store_true", help="store the posterior's mean and standard deviation")
    parser.add_argument("--sample", action="store_true", help="store one draw from the posterior in place of its mode")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --sample and --shuffle; default: 0")
    parser.add_argument("--format", choices=["safetensors", "webdataset"], default="safetensors",
                        help="shards that training reads in any order (default), or as a stream, from anywhere")
    parser.add_argument("--shuffle", action="store_true",
                        help="write a folder's images in a permuted order: for streams, which else come class by class")
    parser.add_argument("--shard-size", type=int, default=4096, metavar="N", help="images of a shard; default: 4096")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time; default: 16")
    parser.add_argument("--bad-fraction", type=float, default=0.01, metavar="F",
                        help="unreadable images above this share (of 1000 at least) end the command; default: 0.01")


def run(args: argparse.Namespace) -> int:
    """Encode in all processes; the first one says what was done."""
    from tokenizers_lab.errors import ConfigError, TokenizersLabError

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    if not 0 <= args.bad_fraction <= 1:
        raise ConfigError(f"--bad-fraction must be within [0, 1], not {args.bad_fraction:g}")
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            manifest, there = encode(args, rank)
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if not rank:
        report(args, manifest, there)
    return 0


def encode(args: argparse.Namespace, rank: int) -> tuple[dict[str, Any], int]:
    """The manifest of the latents, and how many shards were there already."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.gather import in_step
    from tokenizers_lab.eval.latent_cache import CacheOptions, write_latents
    from tokenizers_lab.tokenizer import ImageTokenizer

    options = CacheOptions(
        args.flips, args.moments, args.sample, args.seed, args.dtype, args.format, args.shard_size, args.shuffle)
    options.check()      # before anything slow
    device = in_step(lambda: device_of(args))
    tokenizer = in_step(lambda: load_model(args.model, device))
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{args.model} is a {tokenizer.system} tokenizer, which is not for images")
    size = args.size if args.size is not None else int(getattr(tokenizer.cfg, "image_size", 256))
    data = data_config(args.data, size, args.limit, min(DECODERS, os.cpu_count() or 1))

    def progress(batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        return batches if rank else show_progress(batches, "encoding", total)

    return write_latents(tokenizer, data, Path(args.out), options, name=args.model, source=data_name(args.data),
                         batch_size=args.batch_size, bad_fraction=args.bad_fraction, progress=progress)


def report(args: argparse.Namespace, manifest: dict[str, Any], there: int) -> None:
    """Say what is in the folder."""
    from tokenizers_lab.data.latent_manifest import MANIFEST

    shape = " × ".join(str(n) for n in manifest["shape"])
    kept = f" ({there} were there)" if there else ""
    size = sum(path.stat().st_size for path in Path(args.out).glob("shard-*")) / 1e6
    say(f"{manifest['samples']} images of {manifest['source']}, {manifest['options']['size']} px: latents {shape}, "
        f"{manifest['options']['dtype']}, in {len(manifest['shards'])} shards{kept}, {size:.1f} MB -> {args.out}")
    if manifest["skipped"]:
        say(f"{len(manifest['skipped'])} could not be read; they are listed in {Path(args.out) / MANIFEST}")
    mean, std = manifest["mean"], manifest["std"]
    say(f"{len(mean)} channels: mean {min(mean):.3g} to {max(mean):.3g}, deviation {min(std):.3g} to {max(std):.3g}")
    say(f"train a generator with: data.train={args.out}" + ("" if manifest["options"]["flips"] else " data.flip=false"))
