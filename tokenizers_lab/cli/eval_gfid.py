"""`toklab eval gfid`: measure generated images against a reference, as ADM's evaluator does."""

import argparse
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import device_of, process_group, say, show_progress
from .eval_table import show_notes, show_rows

help = "measure generated images against a reference: gFID, Inception Score, sFID, precision, recall"
description = """Measure generated images against a reference, by the definitions of ADM's evaluator.

SAMPLES     an .npz file whose arr_0 is uint8 (N, H, W, 3), a folder of images of one size, or what toklab generate made
REFERENCE   an .npz file: of statistics (mu, sigma and, of sFID, mu_s, sigma_s), of images (arr_0), or of both, such as ADM's
            VIRTUAL_imagenet256_labeled.npz, whose statistics serve FID and sFID, and whose images precision and recall; or a
            folder of images, centre-cropped to the samples' size. toklab eval statistics FOLDER FILE makes one

Metrics: gfid, is, sfid, precision, recall, kid. A published gFID is of 50,000 samples; another number is refused unless
--allow-count. FID's Inception is fetched; --features random or teacher needs no download, and what it gives is never called FID.
Values do not depend on --batch-size, on threads or on the number of processes:
torchrun --nproc_per_node 8 -m tokenizers_lab eval gfid SAMPLES REFERENCE"""
example = "toklab eval gfid samples/samples.npz VIRTUAL_imagenet256_labeled.npz --out gfid.json"
USER_ERROR = 2
DECODERS = 4       # processes that decode the files of folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Samples, reference, protocol, output."""
    parser.add_argument("samples", metavar="SAMPLES", help="an .npz file or a folder")
    parser.add_argument("reference", metavar="REFERENCE", help="an .npz file or a folder of images")
    parser.add_argument("--metrics", help="comma-separated; default: gfid,is,sfid,precision,recall, where REFERENCE serves them")
    add_features(parser)
    parser.add_argument("--allow-count", action="store_true", help="measure another number of samples than 50,000")
    parser.add_argument("--arithmetic", choices=["float32", "float64", "adm-float16"], default="float32",
                        help="of the distances of precision and recall; adm-float16: as ADM's evaluator computes them; default: "
                        "float32")
    parser.add_argument("--score", choices=["adm", "torch-fidelity"], default="adm",
                        help="splits of the Inception Score: adm, of 5,000 images in order of the file, or torch-fidelity, ten "
                        "of shuffled images; default: adm")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")


def add_features(parser: argparse.ArgumentParser) -> None:
    """The network, and how it is run."""
    parser.add_argument("--features", default="inception", metavar="NET",
                        help="inception (FID's), random, teacher, or a file of Inception's weights; default: inception")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images read at a time; default: 64")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Measure in all processes; the first one prints a table and writes the JSON."""
    from tokenizers_lab.errors import TokenizersLabError
    from tokenizers_lab.eval.gfid import COUNT, evaluate_samples

    check_batch(args)
    names = None if args.metrics is None else [name.strip() for name in args.metrics.split(",") if name.strip()]
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            result = evaluate_samples(
                args.samples, args.reference, names, features=args.features, count=None if args.allow_count else COUNT,
                arithmetic=args.arithmetic, score=args.score, batch_size=args.batch_size, workers=workers(),
                device=device_of(args), progress=bar(rank, args.batch_size))
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if rank:
        return 0
    show(result, args.reference)
    if args.out:
        from tokenizers_lab.eval.provenance import write_json

        say(f"result: {write_json(result, Path(args.out))}")
    return 0


def show(result: dict[str, Any], reference: str) -> None:
    """Print what was compared with what, every value, and what to be wary of."""
    protocol = result["protocol"]
    height, width = protocol["size"]
    say(f"{result['n']:,} samples, {width} × {height} px, against {reference} (95 % intervals)")
    theirs = protocol["features"]["reference"] or {}
    if "file_sha256" in theirs:
        say(f"reference: SHA-256 {theirs['file_sha256']}")
    if protocol["sampling"] is not None:
        say(f"labels: {protocol['sampling']['labels']['rule']} (never compare balanced labels with random ones)")
    show_notes(result, [*result["warnings"], *show_rows(result["rows"])])


def check_batch(args: argparse.Namespace) -> None:
    """Raise ConfigError unless the batch size is positive."""
    from tokenizers_lab.errors import ConfigError

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")


def workers() -> int:
    """Processes that decode files, where there are cores for them."""
    return min(DECODERS, os.cpu_count() or 1)


def bar(rank: int, batch_size: int) -> Any:
    """Wraps batches with a bar on the first process."""
    from tokenizers_lab.eval.gather import processes

    def tracked(batches: Iterable[Any], what: str, images: int | None) -> Iterable[Any]:
        total = None if images is None else -(-images // (batch_size * processes()[1]))
        return batches if rank else show_progress(batches, what, total)

    return tracked
