"""`toklab generate` from the outside, with real networks of a few thousand weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_lab.cli import main as cli
from tokenizers_lab.eval.generation.lightningdit.config import ModelConfig as DiTConfig
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig

TOKENIZER = ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4))
GENERATOR = DiTConfig(channels=6, grid=2, classes=4, width=24, depth=1, heads=2)
NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A working folder with a tokenizer, a generator that names it, and a weaker one; no network."""
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENIZERS_LAB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build_tokenizer("rectok", TOKENIZER).save_pretrained("tokenizer")
    for name in ("generator", "weak"):
        network = build_tokenizer("lightningdit", GENERATOR)
        for parameter in network.parameters():      # its last layer begins at 0
            parameter.data += 0.1 * torch.randn_like(parameter)
        network.provenance = {"tokenizer": {"name": "tokenizer", "sha256": weights_sha256("tokenizer")}, "classes": NAMES}
        network.save_pretrained(name)


def toklab(capsys, *words: str, status: int = 0) -> str:
    capsys.readouterr()
    got = cli.call(words)
    out, err = capsys.readouterr()
    assert got == status, f"{got}: {out}{err}"
    if status:
        assert len(err.strip().splitlines()) == 1, err
    return err if status else out


def images(folder: str) -> np.ndarray:
    with np.load(f"{folder}/samples.npz") as file:
        return file["arr_0"]


def generate(capsys, out: str, *words: str, status: int = 0) -> str:
    return toklab(capsys, "generate", "generator", "--n", "5", "--steps", "3", "--device", "cpu", "--out", out, *words,
                  status=status)


def test_samples_are_measured_at_once(capsys):
    shown = generate(capsys, "out", "--format", "npz,png", "--batch-size", "2")
    assert "5 samples of 16 × 16 px; labels balanced" in shown and "the tokenizer that the generator names" in shown
    assert all(str(Path("out", name)) in shown for name in ("samples.npz", "images", "grid.png", "samples.json"))
    assert images("out").shape == (5, 16, 16, 3) and len(list(Path("out/images").glob("*.png"))) == 5
    assert Image.open("out/grid.png").size[0] > 128
    said = json.loads(Path("out/samples.json").read_text())
    assert said["sampling"]["steps"] == 3 and said["generator"]["name"] == "generator"
    generate(capsys, "again", "--batch-size", "5")
    assert np.abs(images("again").astype(int) - images("out").astype(int)).max() <= 1
    words = ["eval", "gfid", "out", "again", "--features", "random", "--allow-count", "--metrics", "gfid", "--device", "cpu"]
    shown = toklab(capsys, *words, "--out", "out.json")
    result = json.loads(Path("out.json").read_text())
    assert result["protocol"]["sampling"] == said and "labels: balanced" in shown and "FID" not in shown.replace("gFID", "")


def test_options_reach_the_sampler(capsys):
    generate(capsys, "plain")
    plain = images("plain")
    different = {"solver": ["--solver", "heun"], "shift": ["--shift", "3"], "steps": ["--steps", "4"], "stop": ["--stop", "0.3"],
                 "cfg": ["--cfg", "9"], "channels": ["--cfg", "9", "--cfg-channels", "2"],
                 "guide": ["--cfg", "9", "--guide", "weak"],
                 "interval": ["--cfg", "9", "--cfg-interval", "0.5,1"], "seed": ["--seed", "1"], "class": ["--classes", "3"]}
    found = {name: images(name).tobytes() for name, words in different.items() if generate(capsys, name, *words)}
    assert len({plain.tobytes(), *found.values()}) == len(different) + 1      # each makes other images
    generate(capsys, "never", "--cfg", "9", "--cfg-interval", "2,3")
    assert np.array_equal(images("never"), plain)
    assert json.loads(Path("guide/samples.json").read_text())["guide"]["name"] == "weak"
    generate(capsys, "nearest", "--rounding", "nearest")
    difference = images("nearest").astype(int) - plain
    assert set(np.unique(difference)) == {0, 1}


def test_classes_by_number_by_name_and_from_a_file(capsys):
    Path("names.txt").write_text("dog\n1\n\n")
    for name, words, classes in (("a", ["--classes", "3,1"], [3, 1]), ("b", ["--classes", "dog, bee"], [3, 1]),
                                 ("c", ["--classes", "names.txt"], [3, 1]), ("d", [], [0, 1, 2, 3])):
        generate(capsys, name, *words)
        assert json.loads(Path(name, "samples.json").read_text())["labels"]["classes"] == classes
    assert np.array_equal(images("a"), images("b")) and np.array_equal(images("a"), images("c"))
    generate(capsys, "random", "--labels", "random")
    assert "with replacement" in json.loads(Path("random/samples.json").read_text())["labels"]["rule"]


def test_errors(capsys):
    for words, message in (
        (["--classes", "cow"], "there is no class 'cow'; known: 0 to 3, or a name such as ant"),
        (["--classes", "4"], "there is no class '4'"), (["--cfg-interval", "1"], "--cfg-interval takes two times"),
        (["--guide", "weak"], "--guide needs a strength of guidance"), (["--solver", "rk9"], "solver must be one of euler"),
        (["--format", "gif"], "no format 'gif'"), (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--steps", "0"], "needs steps"), (["--n", "0"], "must be at least 1"),
    ):
        assert message in generate(capsys, "out", *words, status=2)
    assert not Path("out").exists()
    assert "is a rectok tokenizer, not a generator" in toklab(
        capsys, "generate", "tokenizer", "--n", "1", "--out", "out", status=2)
    torch.manual_seed(1)
    build_tokenizer("rectok", TOKENIZER).save_pretrained("other")
    assert "learned the latents of tokenizer" in generate(capsys, "out", "--tokenizer", "other", status=2)
    Path("tokenizer").rename("moved")
    assert "tokenizer is not where it was" in generate(capsys, "out", status=2)
    generate(capsys, "out", "--tokenizer", "moved")
    assert "choose another folder" in generate(capsys, "out", "--tokenizer", "moved", "--seed", "1", status=2)
    network = load("generator")
    network.provenance = {}
    network.save_pretrained("nameless")
    words = ["generate", "nameless", "--n", "1", "--steps", "1", "--device", "cpu", "--out", "nameless-out"]
    assert "name the tokenizer by --tokenizer" in toklab(capsys, *words, status=2)
    assert "not checked" in toklab(capsys, *words, "--tokenizer", "other")


@pytest.mark.slow
def test_two_processes_generate_as_one(capsys):
    generate(capsys, "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tokenizers_lab",
               "generate", "generator", "--samples", "5", "--steps", "3", "--device", "cpu", "--out", "two", "--batch-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 samples of") == 1
    assert np.abs(images("one").astype(int) - images("two").astype(int)).max() <= 1
    one, two = (json.loads(Path(name, "samples.json").read_text()) for name in ("one", "two"))
    assert {**one, "files": 0, "environment": 0} == {**two, "files": 0, "environment": 0}
