"""What a person wants to see when training ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .images import UNTRAINED_LABEL
from .report import REPORT, write_report
from .runs import EXAMPLES, GRID, METRICS_FILE, NOUNS, RESULTS, RunFolder, evaluate_run, open_run
from .summary_lines import codes_line, format_value, latents_line, step_cells, step_heads, steps_note

NUMBER_WIDTHS = 8, 11      # characters of a value, and of its column where there are many


def finish_run(
    run_folder: str | Path, device: torch.device | str = "cpu", metrics: Sequence[str] | None = None
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint and write results.json, grid.png or examples/*.wav, and report.html beside it.

    Works for an interrupted run too: the summary then says `step k of n`. Returns the results with `paths` added.
    metrics: none: those of `runs.METRICS`. Raises CheckpointError without a finished checkpoint, DataError without
    validation data.
    """
    run = open_run(run_folder)
    results = evaluate_run(run, metrics, device)
    write_report(run.path)
    return {**results, "paths": {name: str(path) for name, path in result_paths(run).items()}}


def result_paths(run: RunFolder) -> dict[str, Path]:
    """What a finished run leaves for a person, by name."""
    seen = {"sounds": run.path / EXAMPLES} if run.kind == "speech" else {"grid": run.path / GRID}
    checkpoint = {} if run.checkpoint is None else {"checkpoint": run.checkpoint}
    return {**seen, "metrics": run.path / METRICS_FILE, "results": run.path / RESULTS, **checkpoint, "report": run.path / REPORT}


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """A table of the trained model beside the untrained network and the trivial baseline, what is missing, and the paths."""
    console = console or Console()
    run, noun = summary["run"], NOUNS[summary["kind"].split()[0]]
    table = Table(title=f"{run['system']}-{run['name']}: {run['status']}, {summary['n']} held-out {noun}", title_justify="left")
    names = list(summary["rows"][0]["metrics"])
    table.add_column("", no_wrap=len(names) < 4, overflow="fold")      # many metrics leave it little room
    titles = {name: summary["rows"][0]["metrics"][name]["title"] for name in names}
    for name in names:
        unit = summary["rows"][0]["metrics"][name].get("unit")
        table.add_column(f"{titles[name]}, {unit}" if unit else titles[name], justify="right", min_width=NUMBER_WIDTHS[0],
                         max_width=NUMBER_WIDTHS[1] if len(names) > 3 else None)
    for row in summary["rows"]:
        table.add_row(row["label"], *(format_value(row["metrics"].get(name), interval=False) for name in names))
    table.add_section()
    for label in dict.fromkeys(m["over"] for m in summary["margins"]):
        margins = {m["metric"]: m["value"] for m in summary["margins"] if m["over"] == label}
        short = label.replace(UNTRAINED_LABEL, "untrained")
        table.add_row(f"better than {short} by", *(f"{margins[n]:+.3g}" if n in margins else "–" for n in names))
    console.print(table)
    for name in names:
        if "missing" in summary["rows"][0]["metrics"][name]:
            console.print(f"{titles[name]}: {summary['rows'][0]['metrics'][name]['missing']}", markup=False, soft_wrap=True)
    if "steps" in summary:
        print_steps(summary["steps"], console)
    if summary.get("latents", {}).get("floats_per_second"):
        console.print(latents_line(summary["latents"]), markup=False, soft_wrap=True, highlight=False)
    if "codes" in summary:
        console.print(codes_line(summary["codes"]), markup=False, soft_wrap=True, highlight=False)
    for network, source in summary["teachers"].items():
        console.print(f"{network}: {source}", markup=False, soft_wrap=True)
    for name, path in summary["paths"].items():
        console.print(f"{name:>10}  {path}", markup=False, soft_wrap=True, highlight=False)


def print_steps(steps: dict[str, Any], console: Console) -> None:
    """A table of a diffusion decoder's quality and time at each number of sampling steps."""
    noun = NOUNS[steps["kind"]]
    own = "" if steps["own"] is None else f"; the model's own number is {steps['own']}"
    console.print(f"sampling steps, {steps['n']} of {steps['of']} {noun}{own}", markup=False, soft_wrap=True, highlight=False)
    table = Table()
    for name in step_heads(steps):
        table.add_column(name, justify="right")
    for row in step_cells(steps, interval=False):
        table.add_row(*row)
    console.print(table)
    console.print(steps_note(steps), markup=False, soft_wrap=True, highlight=False)
