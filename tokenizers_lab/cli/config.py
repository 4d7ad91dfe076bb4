"""`toklab config`: the resolved config, every option with its help."""

import argparse
from typing import Any

from .common import say

help = "show a config with every option resolved and explained"
description = """Resolve a recipe or a config file with its inheritance and overrides, check it, and show every
option with its help. With --yaml the output is a config file of its own."""
example = "toklab config rectok/tiny model.encoder.width=256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe's name such as rectok/tiny")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options that differ from the config")
    parser.add_argument("--yaml", action="store_true", help="print plain YAML, without the help")


def run(args: argparse.Namespace) -> int:
    """Print the config."""
    from tokenizers_lab.config import describe, load_config, to_yaml

    cfg = load_config(args.config, args.overrides)
    if args.yaml:
        say(to_yaml(cfg).rstrip())
        return 0
    rows = [(key, shown(value), text) for key, value, text in describe(cfg)]
    left = min(max(len(key) + len(value) + 2 for key, value, _ in rows), 60)
    section = ""
    for key, value, text in rows:
        if key.split(".")[0] != section and "." in key:
            say()
        section = key.split(".")[0] if "." in key else ""
        say(f"{f'{key}: {value}':<{left}}  # {text}" if text else f"{key}: {value}")
    return 0


def shown(value: Any) -> str:
    """A value as YAML would have it in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
