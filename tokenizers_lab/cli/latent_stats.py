"""`toklab latent-stats`: the statistics by which latents are normalised."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .common import add_model, data_config, device_of, load_image_tokenizer, say, show_progress

if TYPE_CHECKING:
    from tokenizers_lab.data.batch import ImageBatch

help = "collect the latents' mean and standard deviation and save them with the model"
description = """Encode every image of DATA (the training set), collect the mean and the standard deviation of each latent
channel, and save the model with them in the folder OUT: its latents then have mean 0 and deviation 1.
DATA is a folder, shards, or sample:photos/train."""
example = "toklab latent-stats runs/rectok-tiny sample:photos/train --out rectok-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="the training images: a folder, shards, or sample:photos/train")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for the model with its statistics")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels; default: the training size")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images, spread over the set")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time; default: 16")


def run(args: argparse.Namespace) -> int:
    """Collect, set, save."""
    from tokenizers_lab.data.loader import validation_batches
    from tokenizers_lab.errors import CheckpointError
    from tokenizers_lab.eval.latents import collect_latent_stats
    from tokenizers_lab.eval.provenance import text_sha256
    from tokenizers_lab.training.checkpoint import MANIFEST

    if (Path(args.out) / MANIFEST).exists():
        raise CheckpointError(f"{args.out} is a run's checkpoint, which must stay as it is: choose another --out")
    tokenizer = load_image_tokenizer(args.model, device_of(args))
    data = data_config(args.data, args.size or int(getattr(tokenizer.cfg, "image_size", 256)), args.limit)
    hashes: list[tuple[str, str]] = []
    batches = hashed(show_progress(validation_batches(data, args.batch_size), "encoding"), hashes)
    mean, std = collect_latent_stats(tokenizer, batches)
    tokenizer.provenance = {**tokenizer.provenance, "latent_statistics": {
        "data": data_name(args.data), "size": data.size, "images": len(hashes), "limit": args.limit,
        "images_sha256": text_sha256([digest for _, digest in sorted(hashes)]),      # as in an evaluation's protocol
    }}
    tokenizer.save_pretrained(args.out)
    say(f"{len(mean)} channels: mean {mean.min():.3g} to {mean.max():.3g}, deviation {std.min():.3g} to {std.max():.3g}")
    say(f"saved with the model in {args.out}")
    return 0


def hashed(batches: "Iterable[ImageBatch]", hashes: list[tuple[str, str]]) -> "Iterator[ImageBatch]":
    """The batches; each image's key and the hash of its pixels are appended to `hashes` as it passes."""
    from tokenizers_lab.eval.provenance import pixels_sha256

    for batch in batches:
        hashes.extend((key, pixels_sha256(image)) for key, image in zip(batch.keys, batch.images))
        yield batch


def data_name(source: str) -> str:
    """A source as given, but of an absolute path only the last part: a model that is passed on tells no machine's folders."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() else source
