"""The command `toklab`, from the outside: what it prints, what it writes, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from tokenizers_lab.cli import main as cli
from tokenizers_lab.cli.common import unique_names
from tokenizers_lab.cli.pictures import open_picture, reflect
from tokenizers_lab.config import load_config
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.metrics import psnr
from tokenizers_lab.models.rectok import convert
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig

SMALL = ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4))
CONFIG = """\
system: rectok
name: small
model:
  image_size: 16
  patch: 8
  latent_channels: 6
  encoder: {width: 48, depth: 1, heads: 4}
  decoder: {width: 64, depth: 2, heads: 4}
objective: {teachers: {}, lpips: none, logits_network: none}
data: {train: "sample:photos", val: "sample:photos", size: 16, val_limit: 3, workers: 0}
train: {batch_size: 4, validate_every: 0, checkpoint_every: 100, log_every: 1}
stages:
  - {name: one, steps: 3, lr: 1e-3, weights: {mse: 1, kl: 1e-6}}
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A working folder and a cache of its own; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def model(tmp_path) -> str:
    """A saved folder with random weights."""
    torch.manual_seed(0)
    return str(build_tokenizer("rectok", SMALL).save_pretrained(tmp_path / "model"))


@pytest.fixture
def photo(tmp_path) -> str:
    """A picture of 37 × 53 pixels (height × width)."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)).save("photo.png")
    return "photo.png"


def toklab(capsys, *words: str, status: int = 0) -> tuple[str, str]:
    """Run a command in this process; returns stdout and stderr."""
    capsys.readouterr()
    got = cli.call(words)
    out, err = capsys.readouterr()
    assert got == status, f"{got}: {out}{err}"
    return out, err


def one_line(err: str) -> str:
    """The only line on stderr."""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


# --- help and errors ----------------------------------------------------------------------------------------------------

def test_help_is_instant_and_imports_nothing_heavy():
    code = ("import sys; from tokenizers_lab.cli.main import build_parser; build_parser().format_help();"
            "print([m for m in ('torch', 'numpy', 'PIL', 'omegaconf', 'rich', 'accelerate') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        command = [sys.executable, "-m", "tokenizers_lab", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1
    assert all(re.search(rf"^    {name} +\S", shown, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(capsys, name):
    out, _ = toklab(capsys, name, "--help")
    assert f"example: toklab {name}" in out
    assert len(out.split("\n\n")[1]) > 30      # the description


def test_listing_imports_no_torch():
    code = "import sys; from tokenizers_lab.cli.main import call; call(['list']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("False\n")


@pytest.mark.parametrize("words, message", [
    (["trian"], "toklab: there is no command 'trian'; nearest: 'train'"),
    (["xyzzy"], "toklab: there is no command 'xyzzy'; commands: train, encode"),
    (["list", "extra"], "toklab: list does not know extra"),
    (["train", "rectok/tiny", "--resum", "--fresh"], "not allowed with argument"),
    (["config", "rectok/tny"], "ConfigError: there is no config file and no recipe 'rectok/tny'; nearest: 'rectok/tiny'"),
    (["config", "rectok/tiny", "modle.patch=8"], "ConfigError: the config has no option 'modle'; nearest: 'model'"),
    (["info", "nothing"], "CheckpointError: there is no folder nothing"),
    (["info", "runs/nothing"], "WeightsMissing: there is no folder runs/nothing here"),
    (["reconstruct", "x.png", "--model", "nothing"], "CheckpointError: there is no folder nothing"),
    (["report", "nothing"], "CheckpointError: nothing is not a run"),
    (["convert", "rektok", "x.pth", "out"], "ConfigError: there is no system 'rektok'; nearest: 'rectok'"),
    (["convert", "rectok", "x.pth", "out"], "CheckpointError: there is no file x.pth"),
])
def test_errors_are_one_line(capsys, words, message):
    _, err = toklab(capsys, *words, status=2)
    assert message in one_line(err)


def test_without_a_command_help_is_shown(capsys):
    assert "commands:" in toklab(capsys, status=2)[0]
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", toklab(capsys, "--version")[0])


def test_debug_shows_where_an_error_came_from(capsys, monkeypatch):
    monkeypatch.setenv("TOKLAB_DEBUG", "1")
    with pytest.raises(Exception, match="no recipe"):
        cli.call(["config", "rectok/tny"])


def test_interrupt_and_full_disk(capsys, monkeypatch):
    from tokenizers_lab.cli import list as command

    def interrupt(args):
        raise KeyboardInterrupt

    def full(args):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(command, "run", interrupt)
    assert one_line(toklab(capsys, "list", status=130)[1]) == "interrupted"
    monkeypatch.setattr(command, "run", full)
    assert one_line(toklab(capsys, "list", status=2)[1]) == "OSError: [Errno 28] No space left on device: 'x'"


def test_a_reader_that_stops_early_is_no_error():
    script = f"{sys.executable} -m tokenizers_lab config rectok/tiny | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("system: rectok") and "Traceback" not in ended.stderr


# --- config, list, info -------------------------------------------------------------------------------------------------

def test_config_shows_help_or_yaml(capsys, tmp_path):
    out, _ = toklab(capsys, "config", "rectok/tiny", "stages.0.steps=7")
    assert re.search(r"^model\.encoder\.width: 192 +# channels of a token$", out, re.MULTILINE)
    assert re.search(r"^stages\.0\.steps: 7 +# length in steps$", out, re.MULTILINE)
    out, _ = toklab(capsys, "config", "rectok/tiny", "stages.0.steps=7", "--yaml")
    (tmp_path / "copy.yaml").write_text(out)
    assert load_config("copy.yaml") == load_config("rectok/tiny", ["stages.0.steps=7"])


def test_list(capsys):
    out, _ = toklab(capsys, "list")
    assert "arXiv 2512.13421" in out and re.search(r"^  rectok/tiny +\S", out, re.MULTILINE)


def vit_flops(width: int, depth: int, tokens: int, inputs: int, outputs: int) -> int:
    """Two for each multiply-add of a SwiGLU transformer between two linear maps."""
    hidden = int(2 / 3 * 4 * width)
    block = tokens * (4 * width * width + 3 * width * hidden) + 2 * tokens * tokens * width
    return 2 * (tokens * inputs * width + depth * block + tokens * width * outputs)


def test_info_of_a_config_and_of_weights(capsys, model):
    Path("my.yaml").write_text(CONFIG)
    expected = sum(p.numel() for p in build_tokenizer("rectok", SMALL).parameters())
    out, _ = toklab(capsys, "info", "my.yaml", "--size", "32")
    smoothing = 2 * 32 * 32 * 3 * 27
    encode, decode = vit_flops(48, 1, 16, 192, 12), vit_flops(64, 2, 16, 6, 192) + smoothing
    assert f"{expected / 1e6:.2f} M parameters" in out and "6 × 4 × 4" in out and "96 floats, 32.0 times" in out
    from tokenizers_lab.cli.info import model_figures

    figures = model_figures("rectok", SMALL, 32)
    assert (figures["encode_flops"], figures["decode_flops"]) == (encode, decode)
    assert figures["parameters"] == expected == sum(figures["parts"].values())
    out, _ = toklab(capsys, "info", model)
    assert weights_sha256(model) in out and "6 × 2 × 2" in out
    assert "cannot be changed" in one_line(toklab(capsys, "info", model, "model.patch=4", status=2)[1])
    assert "must be multiples of 8" in one_line(toklab(capsys, "info", model, "--size", "12", status=2)[1])


# --- images -------------------------------------------------------------------------------------------------------------

def test_reflection_is_torchs_and_goes_on_where_torch_stops():
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(reflect(x, 2, 8, 1), F.pad(x, (0, 0, 1, 2), mode="reflect"))
    assert reflect(torch.arange(3.0)[None, None, None], 3, 8, 3).flatten().tolist() == [1, 2, 1, 0, 1, 2, 1, 0]
    assert reflect(torch.ones(1, 3, 1, 6), 2, 8, 3).shape == (1, 3, 8, 6)
    assert torch.equal(reflect(x, 2, 5, 0), x)


def test_padding_and_crop_are_undone(photo):
    pixels, geometry = open_picture(photo, 8, None)
    assert pixels.shape == (1, 3, 40, 56)
    original = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(geometry.undo(pixels), original)
    cropped, geometry = open_picture(photo, 8, 24)
    assert cropped.shape == geometry.undo(cropped).shape == (1, 3, 24, 24)


def test_output_names_never_collide(tmp_path):
    names = unique_names(["a/x.png", "b/x.png", "x.jpg", "y.png"], tmp_path, ".png")
    assert len(set(names)) == 4 and names[3].name == "y.png"


def test_encode_then_decode_is_reconstruct(capsys, model, photo):
    out, _ = toklab(capsys, "reconstruct", photo, "--model", model, "--out", "rec", "--device", "cpu")
    both = np.array(Image.open("rec/photo.png"))
    assert both.shape == (37, 106, 3)
    assert np.array_equal(both[:, :53], np.array(Image.open(photo)))
    left, right = (torch.from_numpy(half).permute(2, 0, 1)[None].float() / 255 for half in (both[:, :53], both[:, 53:]))
    assert float(re.search(r"PSNR ([\d.]+) dB", out).group(1)) == pytest.approx(psnr(right, left).item(), abs=0.006)
    toklab(capsys, "encode", photo, "--model", model, "--device", "cpu")
    with safe_open("latents/photo.safetensors", "pt") as file:
        assert file.get_tensor("latents").shape == (6, 5, 7)
        assert file.metadata()["model_sha256"] == weights_sha256(model) and file.metadata()["file_width"] == "53"
    toklab(capsys, "decode", "latents/photo.safetensors", "--model", model, "--device", "cpu")
    assert np.array_equal(np.array(Image.open("decoded/photo.png")), both[:, 53:])


def test_decode_refuses_what_it_should(capsys, model, photo, tmp_path):
    toklab(capsys, "encode", photo, "--model", model, "--size", "16")
    other = str(build_tokenizer("rectok", SMALL).save_pretrained(tmp_path / "other"))
    file = "latents/photo.safetensors"
    assert "encoded by other weights" in one_line(toklab(capsys, "decode", file, "--model", other, status=2)[1])
    toklab(capsys, "decode", file, "--model", other, "--any-model")
    assert Image.open("decoded/photo.png").size == (16, 16)
    for bad in (photo, f"{model}/model.safetensors", "none.safetensors"):
        assert "not a file that toklab encode wrote" in one_line(toklab(capsys, "decode", bad, "--model", model, status=2)[1])


@pytest.mark.parametrize("words, message", [
    (["--size", "12"], "InputError: --size must be a multiple of 8"),
    (["--device", "cuda:9"], "ConfigError: --device cuda:9 cannot be used here"),
    (["--out", "photo.png"], "InputError: --out photo.png cannot be made"),
    (["broken.jpg"], "DataError: broken.jpg"),
])
def test_reconstruct_errors(capsys, model, photo, words, message):
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    first = [] if words[0] == "broken.jpg" else [photo]
    assert message in one_line(toklab(capsys, "reconstruct", *first, *words, "--model", model, status=2)[1])


# --- eval, latent-stats, convert ----------------------------------------------------------------------------------------

def test_eval_writes_json(capsys, model):
    out, _ = toklab(capsys, "eval", model, "sample:photos", "--metrics", "psnr,ssim", "--limit", "3", "--out", "out/result.json")
    result = json.loads(Path("out/result.json").read_text())
    assert result["n"] == 3 and [row["role"] for row in result["rows"]] == ["model", "untrained", "baseline"]
    assert result["protocol"]["size"] == [16, 16]
    assert f"{result['rows'][0]['metrics']['psnr']['value']:.2f}" in out
    assert "no metric 'psn'" in one_line(toklab(capsys, "eval", model, "sample:photos", "--metrics", "psn", status=2)[1])
    Path("empty").mkdir()
    assert one_line(toklab(capsys, "eval", model, "empty", "--metrics", "psnr", status=2)[1]).startswith("DataError: ")


def test_eval_of_latents_pictures_and_peers(capsys, model, tmp_path):
    words = ["sample:photos", "--limit", "3", "--size", "16", "--device", "cpu", "--no-baselines"]
    out, _ = toklab(capsys, "eval", model, *words, "--metrics", "psnr,latents", "--sample", "--no-uint8", "--out", "r.json",
                    "--pictures", "grid.png")
    result = json.loads(Path("r.json").read_text())
    assert result["latents"]["shape"] == [6, 2, 2] and "6 × 2 × 2, 24 floats an image" in out
    assert result["protocol"]["latents"] == "sampled" and result["protocol"]["rounding"].startswith("none")
    assert Image.open("grid.png").size[0] > 3 * 128
    import diffusers

    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained("kl")
    out, _ = toklab(capsys, "eval", "diffusers:kl", *words, "--metrics", "psnr")
    assert out.splitlines()[1] == "diffusers:kl"


def test_eval_of_a_folder_of_reconstructions(capsys, tmp_path):
    for folder, mode in (("data", "RGB"), ("made", "L")):
        Path(folder).mkdir()
        for i in range(2):
            Image.new("RGB", (16, 16), (40 * i, 90, 9)).convert(mode).save(f"{folder}/{i}.png")
    out, _ = toklab(capsys, "eval", "made", "data", "--metrics", "psnr", "--out", "r.json")
    assert "2 images of data, 16 px" in out and "note: 2 of the reconstructions were converted to 8-bit RGB from: grey" in out
    assert json.loads(Path("r.json").read_text())["converted"]["reconstructions"] == {"0.png": "grey", "1.png": "grey"}
    Path("made/1.png").unlink()
    assert "no reconstruction of 1.png" in one_line(toklab(capsys, "eval", "made", "data", "--metrics", "psnr", status=2)[1])


def test_eval_errors(capsys, model):
    def error(*words):
        return one_line(toklab(capsys, "eval", model, "sample:photos", "--limit", "2", *words, status=2)[1])

    offline = error("--metrics", "rfid")
    assert offline.startswith("WeightsMissing: ") and "weights-inception-2015-12-05-6726825d.pth" in offline
    assert "put the file into" in offline and "random and teacher features (--features)" in offline
    assert "fid needs a reference" in error("--metrics", "fid", "--features", "random")
    assert "there is no statistics file x.npz" in error("--metrics", "fid", "--features", "random", "--reference", "x.npz")
    assert "--limit must be at least 1" in error("--limit", "0", "--metrics", "psnr")
    assert "--batch-size must be at least 1" in error("--batch-size", "0")
    broken = load(model)
    with torch.no_grad():
        for tensor in broken.decoder.parameters():
            tensor.fill_(float("nan"))
    broken.save_pretrained(model)
    assert "gave NaN or infinite pixels for" in error("--metrics", "psnr")


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """toklab in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tokenizers_lab"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()      # torchrun then ends its processes too
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("metrics", [
    "psnr,latents", pytest.param("psnr,ssim,rfid,sfid,kid,is,precision,recall,latents", marks=pytest.mark.slow)])
def test_two_processes_evaluate_as_one(capsys, model, metrics):
    words = ["eval", model, "sample:photos", "--metrics", metrics, "--features", "random", "--limit", "5", "--device", "cpu"]
    found = torchrun(*words, "--batch-size", "1", "--out", "two.json")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("5 images of sample:photos") == found.stdout.count("result: two.json") == 1
    toklab(capsys, *words, "--batch-size", "3", "--out", "one.json")
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.pop("environment").keys() == two.pop("environment").keys()
    assert json.dumps(one) == json.dumps(two) and one["n"] == 5


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_line(model):
    Path("data").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16)).save(f"data/{i}.png")
    Path("data/1.png").write_bytes(b"no picture")      # the second process's share
    found = torchrun("eval", model, "data", "--metrics", "psnr", "--device", "cpu")
    assert found.returncode != 0 and found.stdout == ""
    assert found.stderr.count("DataError: ") == 1 and "1.png: not an image" in found.stderr


def test_latent_stats_normalise_latents(capsys, model, photo):
    Path("photos").mkdir()
    Image.open(photo).save("photos/a.png")
    Image.open(photo).rotate(90, expand=True).save("photos/b.png")
    said = []
    for data, out in (("photos", "normal"), (str(Path("photos").resolve()), "again")):
        toklab(capsys, "latent-stats", model, data, "--out", out, "--size", "32", "--device", "cpu")
        said.append(json.loads(Path(out, "config.json").read_text())["provenance"]["latent_statistics"])
    assert said[0] == said[1] and len(said[0].pop("images_sha256")) == 64      # no path of this machine
    assert said[0] == {"data": "photos", "size": 32, "images": 2, "limit": None}
    toklab(capsys, "encode", "photos/a.png", "photos/b.png", "--model", "normal", "--size", "32", "--device", "cpu")
    latents = []
    for name in ("a", "b"):
        with safe_open(f"latents/{name}.safetensors", "pt") as file:
            latents.append(file.get_tensor("latents").flatten(1))
    values = torch.cat(latents, dim=1)
    assert torch.allclose(values.mean(1), torch.zeros(6), atol=1e-4)
    assert torch.allclose(values.std(1, correction=0), torch.ones(6), atol=1e-3)


def test_convert(capsys):
    torch.manual_seed(0)
    size = ViTConfig(192, 3, 4)
    tokenizer = build_tokenizer("rectok", ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=size, decoder=size))
    state = convert.to_official(dict(tokenizer.state_dict()))
    torch.save({"model_ema": state}, "official.pth")
    out, _ = toklab(capsys, "convert", "rectok", "official.pth", "converted", "--heads")
    assert "Apache-2.0" in out and weights_sha256("converted") in out
    assert all(torch.equal(v, load("converted").state_dict()[k]) for k, v in tokenizer.state_dict().items())
    assert "not empty" in one_line(toklab(capsys, "convert", "rectok", "official.pth", "converted", status=2)[1])
    torch.save({"model_ema": {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}}, "lacking.pth")
    assert "misses decoder.conv_out.bias" in one_line(toklab(capsys, "convert", "rectok", "lacking.pth", "out", status=2)[1])
    assert not Path("out").exists()


# --- train --------------------------------------------------------------------------------------------------------------

def test_train_resume_fresh_report(capsys):
    Path("my.yaml").write_text(CONFIG)
    out, _ = toklab(capsys, "train", "my.yaml", "--max-minutes", "5", "name=again")      # key=value after an option too
    run = Path("runs/rectok-again")
    assert "PSNR" in out and "patch mean" in out
    for name in ("grid.png", "metrics.jsonl", "results.json", "report.html", "checkpoints/step_00000003"):
        assert (run / name).exists() and name in out
    _, err = toklab(capsys, "train", "my.yaml", "name=again", status=2)
    assert "--resume" in one_line(err) and "--fresh" in err
    out, _ = toklab(capsys, "train", "my.yaml", "name=again", "--resume")
    assert "runs/rectok-again is finished already: all 3 steps are done" in out and "PSNR" in out and "report.html" in out
    out, _ = toklab(capsys, "train", "my.yaml", "name=again", "--auto-resume")
    assert "is finished already" in out
    (run / "report.html").unlink()
    out, _ = toklab(capsys, "report", str(run))
    assert (run / "report.html").exists() and "report.html" in out
    before = (run / "checkpoints/step_00000003/model.safetensors").read_bytes()
    toklab(capsys, "train", "my.yaml", "name=again", "--fresh", "train.seed=1", "data.val=null")
    assert (run / "checkpoints/step_00000003/model.safetensors").read_bytes() != before
    assert "nothing to resume" in toklab(capsys, "train", "my.yaml", "name=new", "--resume", status=2)[1]


def test_interrupted_training_is_saved(tmp_path):
    Path("my.yaml").write_text(CONFIG.replace("steps: 3", "steps: 100000"))
    process = subprocess.Popen([sys.executable, "-m", "tokenizers_lab", "train", "my.yaml"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = Path("runs/rectok-small/metrics.jsonl")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") >= 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    step = int(re.search(r"stopped at step (\d+) of 100000, saved in runs/rectok-small", out).group(1))
    assert "toklab train my.yaml --resume" in out
    assert Path(f"runs/rectok-small/checkpoints/step_{step:08d}/manifest.json").exists()


def test_two_processes_train_one_run(tmp_path):
    Path("my.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tokenizers_lab", "train", "my.yaml", "data.val=null"]
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.terminate()      # torchrun then ends its processes too
    assert process.returncode == 0, err
    assert out.count("trained weights: runs/rectok-small") == 1
    records = [json.loads(line) for line in Path("runs/rectok-small/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    folder = Path("runs/rectok-small/checkpoints/step_00000003/training")
    assert sorted(p.name for p in folder.glob("rank_*")) == ["rank_0.pt", "rank_1.pt"]
