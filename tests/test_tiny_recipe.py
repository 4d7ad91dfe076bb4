"""The tiny recipe, trained to its end, beats replacing each patch by its mean colour on held-out photographs."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_rectok_tiny_beats_the_mean_colour(tmp_path):
    command = [sys.executable, "-m", "tokenizers_lab", "train", "rectok/tiny", f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rectok-tiny/results.json").read_text())["rows"]
    psnr = {row["role"]: row["metrics"]["psnr"]["value"] for row in rows}
    assert psnr["model"] > psnr["baseline"] + 0.5
    assert psnr["untrained"] < psnr["baseline"]      # the margin is training's, not the network's
