"""`toklab eval statistics`: the features' mean and covariance of a set of images, as a reference of later evaluations."""

import argparse
import warnings
from pathlib import Path

from .common import device_of, process_group, say
from .eval_gfid import USER_ERROR, add_features, bar, check_batch, workers

help = "compute a set of images' statistics once, as a reference of FID"
description = """Compute the mean and covariance of the features of a set of images and write them as an .npz file, which toklab
eval gfid and toklab eval --reference take. The file says by which network and from which images it was made.

IMAGES   a folder, of which --size N takes centre crops of N × N pixels (ADM's), or an .npz file whose arr_0 is uint8 (N, H, W, 3)
Statistics serve Fréchet distances; precision, recall and kid need images (give the folder itself)."""
example = "toklab eval statistics imagenet/train imagenet64.npz --size 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, file, protocol."""
    parser.add_argument("images", metavar="IMAGES", help="a folder or an .npz file of images")
    parser.add_argument("out", metavar="OUT", help="the .npz file to write")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels; default: images as they are")
    add_features(parser)


def run(args: argparse.Namespace) -> int:
    """Compute in all processes; the first one writes the file."""
    from tokenizers_lab.errors import ConfigError, InputError, TokenizersLabError
    from tokenizers_lab.eval.gfid import make_statistics
    from tokenizers_lab.eval.statistics import save_statistics

    check_batch(args)
    if args.size is not None and args.size < 1:
        raise ConfigError(f"--size must be at least 1, not {args.size}")
    if not args.out.endswith(".npz"):
        raise InputError(f"{args.out}: the file's name must end in .npz")
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            pooled, spatial = make_statistics(
                args.images, args.features, args.size, args.batch_size, workers(), device_of(args), bar(rank, args.batch_size))
        except (TokenizersLabError, OSError):
            if rank:
                return USER_ERROR
            raise
    if rank == 0:
        say(f"{pooled.n:,} images, {pooled.width} features: {save_statistics(Path(args.out), pooled, spatial)}")
    return 0
