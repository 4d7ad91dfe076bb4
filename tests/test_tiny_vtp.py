"""VTP's tiny recipe on a small set of pairs that is made here: it learns to rebuild held-out pictures, and the probes run on it.

The recipe's own pictures are a package that tests do not fetch; the whole of it takes minutes (docs/results.md).
"""

import json

import pytest
from pairs import write_shapes

from tokenizers_lab.cli.main import call
from tokenizers_lab.config import load_config
from tokenizers_lab.training.loop import train

MARGIN = 3.0      # dB over the untrained network; measured: 11.7 against 5.6 dB


@pytest.mark.slow
def test_forty_steps_rebuild_held_out_shapes_and_are_probed(tmp_path, capsys):
    train_pairs = write_shapes(tmp_path / "train", 48, side=96)
    val_pairs = write_shapes(tmp_path / "val", 16, first=51, side=96)      # other places than any training picture of its kind
    cfg = load_config("vtp/tiny", [
        f"data.train={train_pairs}", f"data.val={val_pairs}", f"out={tmp_path}", "train.batch_size=16", "train.validate_every=0",
        "train.checkpoint_every=100", "train.log_every=5", "train.ema=0.8", "stages.0.steps=30", "stages.0.warmup=5",
        "stages.1.steps=10", "stages.1.warmup=2", "stages.1.starts.gan=3"])
    result = train(cfg)
    assert (result.status, result.step) == ("finished", 40)
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    seen = set().union(*(record for record in records if record["kind"] == "train"))
    assert {"l1", "lpips", "dino", "ibot", "koleo", "contrastive", "gan", "discriminator"} <= seen

    def measure(*words):
        assert call([*words, "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
        capsys.readouterr()
        return {row["role"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}

    model = str(result.folder)
    rows = measure("eval", model, str(val_pairs), "--metrics", "psnr")
    psnr = {role: row["metrics"]["psnr"]["value"] for role, row in rows.items()}
    assert psnr["model"] > psnr["untrained"] + MARGIN, psnr
    linear = measure("probe", "linear", model, str(tmp_path), "--blocks", "2", "--iterations", "50")
    assert linear["model"]["width"] == 3 * 128 and linear["model"]["metrics"]["accuracy"]["n"] == 16
    assert linear["model"]["metrics"]["accuracy"]["value"] > 75      # measured: 100, of the untrained network too; chance: 50
    classes, templates = tmp_path / "classes.tsv", tmp_path / "templates.txt"
    classes.write_text("circle\tcircle\nsquare\tsquare\n")
    templates.write_text("\n".join(f"A {colour} {{}}." for colour in ("red", "blue", "green", "black")) + "\n")
    zero = measure("probe", "zeroshot", model, str(val_pairs), "--classes", str(classes), "--templates", str(templates))
    assert zero["model"]["metrics"]["accuracy"]["n"] == 16 and set(zero["model"]["answers"]) <= {"circle", "square"}
