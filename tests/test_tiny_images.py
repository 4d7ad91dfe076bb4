"""The tiny recipes of images, trained to their end, beat trivial baselines on held-out data; the untrained networks do not.

Three files for the tiny recipes, since tests of one file run one after another.
"""

import json
import subprocess
import sys

import pytest
from tiny_recipes import check_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the recipes' runs are: a generator learns the latents of the first."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize(("system", "margin"), [("rectok", 0.5), ("uniflow", 0.5)])      # measured: 1.3 dB, 1.5 dB
def test_a_tiny_recipe_beats_its_baseline(runs, system, margin):
    check_recipe(runs, system, "psnr", 1, margin)


@pytest.mark.slow
def test_a_generator_of_latents_comes_closer_to_photographs_than_untrained(runs):
    if not (runs / "rectok-tiny" / "results.json").exists():
        check_recipe(runs, "rectok", "psnr", 1, 0.5)
    command = [sys.executable, "-m", "tokenizers_lab", "train", "generation/rectok-ditdh-tiny", f"out={runs}",
               f"objective.tokenizer={runs / 'rectok-tiny'}", "stages.0.steps=150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    rows = json.loads((runs / "ditdh-rectok-tiny" / "results.json").read_text())["rows"]
    distance = {row["role"]: row["metrics"]["frechet_random"]["value"] for row in rows}
    assert distance["baseline"] < distance["model"] < distance["untrained"] / 2      # the first: the tokenizer's own
