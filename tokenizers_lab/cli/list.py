"""`toklab list`: the systems and the recipes."""

import argparse
from pathlib import Path

from .common import say

help = "list the systems and the recipes"
example = "toklab list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print both lists; nothing heavy is imported."""
    from tokenizers_lab.config import find_recipe, list_recipes
    from tokenizers_lab.registry import systems

    recipes = list_recipes()
    say("systems")
    for name, system in systems().items():
        judged_by = f"-{name}-"      # a generator's recipes are called TOKENIZER-GENERATOR-SIZE
        trains = any(recipe.startswith(f"{name}/") or judged_by in recipe for recipe in recipes)
        status = ["trains" if trains else "network and losses; no recipe yet, so it does not train"]
        if system.convert:
            status.append(f"loads the authors' weights ({name}/official)")
        if system.parity:
            status.append("numerics compared with the authors' code")
        say(f"  {name:<12} {system.kind:<9} {system.summary}")
        say(f"  {'':<12} {'':<9} {system.paper}")
        say(f"  {'':<12} {'':<9} {'; '.join(status)}")
    say()
    say("recipes (toklab train NAME, toklab config NAME)")
    for name in recipes:
        say(f"  {name:<34} {first_comment(find_recipe(name))}")
    return 0


def first_comment(file: Path) -> str:
    """The first line of a recipe's header."""
    line = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
    return line.lstrip("# ") if line.startswith("#") else ""
