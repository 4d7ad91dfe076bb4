"""`toklab probe`: train a small network on what a frozen model gives, and measure it on held-out data."""

import argparse
import importlib
from types import ModuleType

help = "train a small network on a frozen model's codes, to see what they say"
description = """Train a small network on what a frozen model makes of DATA, and measure it on held-out data: what it can
read, the codes or latents say. toklab probe KIND --help explains a kind."""
example = "toklab probe asr runs/xy_tokenizer-tiny-stage1 --baseline --out probe.json"
KINDS = ("asr", "linear", "zeroshot")      # modules probe_KIND beside this one


def kind_module(name: str) -> ModuleType:
    """The module of a kind of probe: what a command's has."""
    return importlib.import_module(f"tokenizers_lab.cli.probe_{name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each kind."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND [option …]", title="kinds", required=True)
    for name in KINDS:
        module = kind_module(name)
        sub = kinds.add_parser(name, help=module.help, description=module.description, epilog=f"example: {module.example}",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(sub)
        sub.set_defaults(run_probe=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the kind."""
    return int(args.run_probe(args) or 0)
