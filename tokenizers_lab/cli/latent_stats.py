"""`toklab latent-stats`: the statistics by which latents are normalised."""

import argparse
from pathlib import Path

from .common import add_model, data_config, device_of, load_image_tokenizer, say, show_progress

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
    from tokenizers_lab.training.checkpoint import MANIFEST

    if (Path(args.out) / MANIFEST).exists():
        raise CheckpointError(f"{args.out} is a run's checkpoint, which must stay as it is: choose another --out")
    tokenizer = load_image_tokenizer(args.model, device_of(args))
    data = data_config(args.data, args.size or int(getattr(tokenizer.cfg, "image_size", 256)), args.limit)
    batches = show_progress(validation_batches(data, args.batch_size), "encoding")
    mean, std = collect_latent_stats(tokenizer, batches)
    tokenizer.provenance = {**tokenizer.provenance, "latent_statistics": f"{args.data} at {data.size} px"}
    tokenizer.save_pretrained(args.out)
    say(f"{len(mean)} channels: mean {mean.min():.3g} to {mean.max():.3g}, deviation {std.min():.3g} to {std.max():.3g}")
    say(f"saved with the model in {args.out}")
    return 0
