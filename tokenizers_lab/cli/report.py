"""`toklab report`: a run as one HTML page."""

import argparse

from .common import say

help = "write a run's report as one HTML page"
description = """Write report.html of a run anew (curves, pictures or sounds, config). The run is evaluated first where its
results are not of the newest checkpoint, or lack one of the --metrics."""
example = "toklab report runs/rectok-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument("--against", metavar="RUN", help="show this run beside it")
    parser.add_argument("--metrics", metavar="NAMES", help="further metrics, such as wer,sim (toklab eval --help lists them)")
    parser.add_argument("--out", metavar="HTML", help="file to write; default: report.html in the run's folder")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from tokenizers_lab.eval.report import write_report

    metrics = None if args.metrics is None else [name.strip() for name in args.metrics.split(",") if name.strip()]
    say(str(write_report(args.run_folder, args.against, args.out, metrics)))
    return 0
