"""`toklab assets`: the pretrained networks that teachers and metrics need."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

help = "list the pretrained networks that teachers and metrics need, or fetch one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Names of networks; none: list all."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="fetch this network (from the list that `toklab assets` prints)")


def run(args: argparse.Namespace) -> int:
    """List the networks, or fetch those named and print where each lies and its source."""
    from rich.console import Console

    console = Console()
    if not args.names:
        _list(console)
        return 0
    from tokenizers_lab.assets import find, shown_path

    for name in args.names:
        found = find(name)
        console.print(f"{name}: {shown_path(found.path)}", highlight=False, soft_wrap=True)
        console.print(f"  {found.source}", highlight=False, soft_wrap=True)
    return 0


def _list(console: "Console") -> None:
    """A table of all networks."""
    from rich.table import Column, Table

    from tokenizers_lab.asset_fetch import offline
    from tokenizers_lab.assets import shown_path, status

    table = Table(Column("name", no_wrap=True), "for", "licence", Column("state", overflow="fold"))
    for line in status():
        if line.here is not None:
            state = f"[green]here[/] {shown_path(line.here)} ({line.size / 1e6:.0f} MB)"
        elif line.fetch:
            state = "can be fetched from " + ", else ".join(line.fetch)
        else:
            state = "[red]not here[/]" + (" (TOKENIZERS_LAB_OFFLINE is set)" if offline() else "")
        purpose = f"{line.asset.purpose}; {line.asset.note}" if line.asset.note else line.asset.purpose
        table.add_row(line.name, purpose, line.asset.licence, state)
    console.print(table)
