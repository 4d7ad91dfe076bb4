"""The tiny recipes, trained to their end, beat trivial baselines on held-out data; the untrained networks do not."""

import json
import subprocess
import sys

import pytest

# system: metric, whether more is better, the margin over the baseline (measured: RecTok 1.3 dB, DM-Codec 0.28, LM-SPT 0.33,
# UniFlow 1.5 dB, TaDiCodec 0.15, XY-Tokenizer 0.46)
RECIPES = {"rectok": ("psnr", 1, 0.5), "dm_codec": ("mel", -1, 0.1), "lm_spt": ("mel", -1, 0.1), "uniflow": ("psnr", 1, 0.5),
           "tadicodec": ("mel", -1, 0.05), "xy_tokenizer": ("mel", -1, 0.1)}


@pytest.mark.slow
@pytest.mark.parametrize("system", RECIPES)
def test_a_tiny_recipe_beats_its_baseline(tmp_path, system):
    metric, sign, margin = RECIPES[system]
    command = [sys.executable, "-m", "tokenizers_lab", "train", f"{system}/tiny", f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"{system}-tiny"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    value = {row["role"]: sign * row["metrics"][metric]["value"] for row in rows if row["metrics"].get(metric)}
    assert value["model"] > value["baseline"] + margin
    assert value["untrained"] < value["baseline"]      # the margin is training's, not the network's
    assert (folder / "report.html").stat().st_size > 100_000
