"""`toklab latents`: killed anywhere and run again, in two processes, refused, damaged, reported."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import SMALL, one_line, toklab, torchrun

from tokenizers_lab.cli import main as cli
from tokenizers_lab.data.latents import read_latent_manifest
from tokenizers_lab.data.loader import build_loader, validation_batches
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.settings import ImageDataConfig, LatentDataConfig

IMAGES = 11
WORDS = ("--flips", "--moments", "--shard-size", "3", "--batch-size", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A working folder and a cache of its own; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def model() -> str:
    """A saved folder with random weights."""
    torch.manual_seed(0)
    return str(build_tokenizer("rectok", SMALL).save_pretrained("model"))


@pytest.fixture
def photos() -> str:
    """Images of two classes, one of which is no image."""
    for i in range(IMAGES):
        path = Path("photos", "owl" if i % 2 else "elk", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(i)
        pixels = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((40, 48)).save(path)
    Path("photos/owl/5.png").write_bytes(b"no image")
    return "photos"


def contents(folder: str) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def killed_before(replace: int, words: tuple[str, ...]) -> None:
    """Run a command that is killed when it would rename its so-manieth file."""
    count, real = 0, os.replace

    def counted(source, target):
        nonlocal count
        count += 1
        if count == replace:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = counted
    os._exit(cli.call(words))


def in_child(function, *args) -> int | None:
    """The exit status of a function in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_killed_before_any_of_its_files_it_ends_with_the_same_bytes(capsys, model, photos, form):
    words = (*WORDS, "--format", form)
    toklab(capsys, "latents", model, photos, "whole", *words)
    whole = contents("whole")
    files = 2 * 4 + 2      # four shards with their records, the beginning, the manifest
    for number in range(1, files + 1):
        folder = f"killed-{number}"
        assert in_child(killed_before, number, ("latents", model, photos, folder, *words)) == -signal.SIGKILL
        assert "latents.json" not in contents(folder)
        out, _ = toklab(capsys, "latents", model, photos, folder, *words)
        there = max(0, (number - 2) // 2)
        assert (f"({there} were there)" in out) if there else ("were there" not in out)
        assert contents(folder) == whole
    assert in_child(killed_before, files + 1, ("latents", model, photos, "never", *words)) == 0      # there was no other file


def test_a_real_kill_is_nothing_else(capsys, model, photos):
    words = ["latents", model, photos, "killed", "--shard-size", "1", "--batch-size", "1", "--device", "cpu"]
    toklab(capsys, *words[:3], "whole", *words[4:])
    process = subprocess.Popen([sys.executable, "-m", "tokenizers_lab", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None and len(list(Path("killed").glob("shard-*.json"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(Path("killed").glob("shard-*.json"))) >= 3
    toklab(capsys, *words)
    assert contents("killed") == contents("whole")


def test_what_was_finished_is_not_made_again(capsys, monkeypatch, model, photos):
    words = ("latents", model, photos, "out", *WORDS)
    assert in_child(killed_before, 6, words) == -signal.SIGKILL      # two shards are there
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("shard-0000[01].safetensors")}
    assert len(times) == 2
    seen = []
    from tokenizers_lab.models.rectok.model import RecTok

    encode = RecTok.encode
    monkeypatch.setattr(RecTok, "encode", lambda self, images, *rest: (seen.append(len(images)), encode(self, images, *rest))[1])
    toklab(capsys, *words)
    assert sum(seen) == 1 + 2 * 4      # the probe; twice, for the mirrored crops, the images of the other shards
    assert {name: Path("out", name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize("source", ["photos", "tars"])
def test_two_processes_write_the_bytes_of_one(capsys, model, photos, source):
    import tarfile

    Path("tars").mkdir()
    for shard in range(2):
        with tarfile.open(f"tars/{shard}.tar", "w") as tar:
            for i in range(shard, IMAGES, 2):
                tar.add(f"photos/{'owl' if i % 2 else 'elk'}/{i}.png", f"{i}.png")
    data = photos if source == "photos" else "tars/{0..1}.tar"
    torch.set_num_threads(2)      # one process may use as many as it likes
    toklab(capsys, "latents", model, data, "one", *WORDS)
    found = torchrun("latents", model, data, "two", *WORDS)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("10 images of ") == found.stdout.count("-> two") == 1
    assert contents("two") == contents("one")


@pytest.mark.slow
def test_an_error_of_several_processes_is_one_line(capsys, model, photos):
    toklab(capsys, "latents", model, photos, "two", *WORDS)
    found = torchrun("latents", model, photos, "two", *WORDS, "--limit", "3")
    assert found.returncode != 0 and found.stdout == ""
    assert found.stderr.count("CheckpointError: ") == 1 and "made with --limit None, not 3" in found.stderr


def test_what_is_said_and_what_is_in_it(capsys, model, photos):
    out, _ = toklab(capsys, "latents", model, photos, "out", *WORDS)
    assert re.search(r"^10 images of photos, 16 px: latents 6 × 2 × 2, float32, in 4 shards, 0\.0 MB -> out$", out, re.MULTILINE)
    assert "1 could not be read; they are listed in out/latents.json" in out and "data.train=out\n" in out
    manifest = read_latent_manifest("out")
    assert (manifest.tokenizer, manifest.system, manifest.weights_sha256) == (model, "rectok", weights_sha256(model))
    assert manifest.classes == ["elk", "owl"] and [s["key"] for s in manifest.skipped] == ["owl/5.png"]
    assert str(Path.cwd()) not in Path("out/latents.json").read_text()
    tokenizer = load(model)
    encodings = {}
    with torch.inference_mode():
        data = ImageDataConfig(train="x", val=photos, size=16, workers=0)
        for batch in validation_batches(data, 1, on_bad=lambda bad: None):
            encodings[batch.keys[0]] = tokenizer.encode(batch.images), int(batch.labels)
    cfg = LatentDataConfig(train="out", val="out", workers=0, flip=False)
    (found,) = validation_batches(cfg, 20)
    assert found.keys == list(encodings)
    for i, (encoding, label) in enumerate(encodings.values()):
        torch.testing.assert_close(found.latents[i], encoding.latents[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.spread[i], encoding.posterior.std[0], rtol=1e-5, atol=1e-6)
        assert int(found.labels[i]) == label
    assert next(build_loader(cfg, 4, 0))[0].latents.shape == (4, 6, 2, 2)


def test_latents_are_normalised_by_the_tokenizers_statistics(capsys, model, photos):
    toklab(capsys, "latent-stats", model, "photos/elk", "--out", "normal", "--device", "cpu")
    toklab(capsys, "latents", "normal", "photos/elk", "out", *WORDS)
    manifest = read_latent_manifest("out")
    torch.testing.assert_close(manifest.mean, torch.zeros(6).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(manifest.std, torch.ones(6).double(), atol=1e-4, rtol=0)
    (found,) = validation_batches(LatentDataConfig(train="out", val="out", workers=0), 20)
    toklab(capsys, "latents", model, "photos/elk", "raw", *WORDS)
    (raw,) = validation_batches(LatentDataConfig(train="raw", val="raw", workers=0), 20)
    std = load("normal").latent_std[:, None, None]
    torch.testing.assert_close(found.spread * std, raw.spread)      # the posterior's deviation is in the same unit


def test_another_tokenizer_other_options_or_other_images_are_refused(capsys, model, photos):
    toklab(capsys, "latents", model, photos, "out", *WORDS)
    before = contents("out")

    def error(*words, name=model, data=photos, out="out"):
        return one_line(toklab(capsys, "latents", name, data, out, *words, status=2)[1])

    torch.manual_seed(1)
    build_tokenizer("rectok", SMALL).save_pretrained("other")
    text = error(*WORDS, name="other")
    assert text.startswith("CheckpointError: the latents in out are of another tokenizer (rectok, SHA-256 ")
    assert weights_sha256(model)[:12] in text and weights_sha256("other")[:12] in text
    assert "made with --flips True, not False" in error(*WORDS[1:])
    for words, what in ((["--size", "32"], "--size 16, not 32"), (["--dtype", "float16"], "--dtype float32, not float16"),
                        (["--limit", "5"], "--limit None, not 5"), (["--format", "webdataset"], "--format safetensors, not"),
                        (["--shard-size", "4"], "--shard-size 3, not 4")):
        assert f"the latents in out were made with {what}" in error(*WORDS, *words)
    Path("photos/elk/0.png").rename("photos/elk/00.png")
    assert "CheckpointError: the latents in out are of other images (photos)" in error(*WORDS)
    assert contents("out") == before
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert "CheckpointError: full is not empty and holds no latents" in error(*WORDS, out="full")
    assert "multiples of 8" in error("--size", "20", out="new")
    assert "--batch-size must be at least 1" in error("--batch-size", "0", out="new")
    assert "--bad-fraction must be within [0, 1]" in error("--bad-fraction", "2", out="new")
    assert "more than --bad-fraction (0) allows" in error("--bad-fraction", "0", out="new")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shards_are_made_anew(capsys, model, photos, damage):
    words = ("latents", model, photos, "out", *WORDS)
    toklab(capsys, *words)
    whole = contents("out")
    assert "(4 were there)" in toklab(capsys, *words)[0] and contents("out") == whole
    file = Path("out/shard-00002.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x") if damage == "cut" else file.unlink()
    assert "(3 were there)" in toklab(capsys, *words)[0]
    assert contents("out") == whole


def test_a_peers_latents(capsys, photos):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "scaling_factor": 0.5}
    AutoencoderKL(**blocks, **sizes).save_pretrained("vae")
    toklab(capsys, "latents", "diffusers:vae", "photos/elk", "out", "--size", "16", "--moments", "--device", "cpu")
    tensors = load_file("out/shard-00000.safetensors")
    with torch.inference_mode():
        (images,) = validation_batches(ImageDataConfig(train="x", val="photos/elk", size=16, workers=0), 20)
        posterior = AutoencoderKL.from_pretrained("vae").encode(images.images * 2 - 1).latent_dist
    torch.testing.assert_close(tensors["latents"], posterior.mean * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["spread"], posterior.std * 0.5, rtol=1e-4, atol=1e-5)
    assert json.loads(Path("out/latents.json").read_text())["tokenizer"]["name"] == "diffusers:vae"
