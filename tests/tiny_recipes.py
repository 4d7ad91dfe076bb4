"""Trains a tiny recipe to its end and looks whether it beat its baseline, for the tests of both kinds."""

import json
import subprocess
import sys
from pathlib import Path


def check_recipe(out: Path, system: str, metric: str, sign: int, margin: float) -> None:
    """sign: 1 where more is better, else −1. margin: over the trivial baseline, on held-out data."""
    command = [sys.executable, "-m", "tokenizers_lab", "train", f"{system}/tiny", f"out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    folder = out / f"{system}-tiny"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    value = {row["role"]: sign * row["metrics"][metric]["value"] for row in rows if row["metrics"].get(metric)}
    assert value["model"] > value["baseline"] + margin
    assert value["untrained"] < value["baseline"]      # the margin is training's, not the network's
    assert (folder / "report.html").stat().st_size > 100_000
