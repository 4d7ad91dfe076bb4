"""Where a run's numbers go: metrics.jsonl always, a progress bar, TensorBoard or Weights & Biases when asked."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenizers_lab.errors import ConfigError

TRACKERS = ("tensorboard", "wandb")
PLAIN_EVERY = 15.0      # seconds between two lines where there is no terminal


class Tracker:
    """Writes records of one run from the main process; on other ranks every method does nothing."""

    def __init__(self, run: Path, total: int, start: int, main: bool, accelerator: Any = None):
        self.main, self.file, self.total, self.accelerator = main, run / "metrics.jsonl", total, accelerator
        self.console = Console(file=sys.stderr, highlight=False)
        self._last_line, self._bar, self._note = 0.0, None, ""
        if not main:
            return
        keep_records(self.file, start)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console)
            self._task = self._bar.add_task("training", total=total, completed=start, note="")
            self._bar.start()

    def log(self, step: int, stage: str, kind: str, values: dict[str, float]) -> None:
        """Append one record. `step` counts finished steps."""
        if not self.main:
            return
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, "stage": stage, "kind": kind, **values}) + "\n")
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)
        if kind == "val":
            self.say(f"step {step} validation: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def progress(self, step: int, stage: str, note: str | None = None) -> None:
        """Move the bar, or print a line now and then; without a note the last one stays."""
        self._note = self._note if note is None else note
        note = self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=stage, note=note)
        elif self.main and time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            self.say(f"{stage}: step {step}/{self.total}  {note}")

    def say(self, text: str) -> None:
        """One line to the person, above the bar."""
        if self.main:
            self.console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stop the bar and finish the trackers."""
        if self._bar is not None:
            self._bar.stop()
        if self.main and self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.end_training()


def check_trackers(names: list[str]) -> None:
    """Raise ConfigError on a tracker whose package is not installed; accelerate would leave it out in silence."""
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"train.trackers knows {' and '.join(TRACKERS)}, not '{name}'; metrics.jsonl is always written")
        if name not in available:
            raise ConfigError(f"train.trackers names {name}, which is not installed: pip install {name}")


def keep_records(file: Path, step: int) -> None:
    """Drop the records after `step` and a torn last line, so that a resumed run writes each step once."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue      # a line that a killed process left half written
    draft = file.with_suffix(".tmp")
    draft.write_text("".join(line + "\n" for line in kept))
    os.replace(draft, file)


class Meter:
    """Means of named scalars since the last read, summed on the device: no synchronisation until `read`."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one value of each name."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, torch.Tensor]:
        """The means, and start anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
