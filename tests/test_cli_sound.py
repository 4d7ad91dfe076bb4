"""`toklab encode`, `decode`, `reconstruct` and `info` with sounds: any file gives the right result or one clear line."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from speech_networks import network, speech
from torch import nn

from tokenizers_lab.cli import main as cli
from tokenizers_lab.cli.info import model_figures, speech_figures
from tokenizers_lab.cli.sound_meter import PairMeter
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.resample import resample, resampled_length
from tokenizers_lab.errors import InputError
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.metrics import speech_metrics
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig

LSB = 2**-15
NAMES = {"dm_codec": "LSTM", "lm_spt": "12.5 Hz", "lm_spt_48": "no subtraction, 48 kHz"}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Saved folders of small speech tokenizers, and of one for images."""
    root = tmp_path_factory.mktemp("models")
    saved = {key: str(network(key.removesuffix("_48"), name).save_pretrained(root / key)) for key, name in NAMES.items()}
    torch.manual_seed(0)
    small = ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4))
    return saved | {"rectok": str(build_tokenizer("rectok", small).save_pretrained(root / "rectok"))}


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A working folder; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


def toklab(capsys, *words: str, status: int = 0) -> tuple[str, str]:
    """Run a command in this process; returns stdout and stderr."""
    capsys.readouterr()
    device = ["--device", "cpu"] if words[0] in ("encode", "decode", "reconstruct") else []
    got = cli.call([*words, *device])
    out, err = capsys.readouterr()
    assert got == status, f"{got}: {out}{err}"
    return out, err


def refusal(capsys, *words: str) -> str:
    """The one line of a command's error; nothing was written."""
    _, err = toklab(capsys, *words, status=2)
    assert len(err.strip().splitlines()) == 1, err
    assert not [p for p in Path().rglob("*") if p.suffix == ".tmp"]
    assert not [p for folder in ("reconstructed", "decoded") for p in Path(folder).rglob("*")]
    return err.strip()


def write(file: str, seconds: float = 2.0, rate: int = 16_000, channels: int = 1, subtype: str | None = None) -> str:
    """A file of real speech; each channel says something else."""
    whole = speech(seconds * channels, rate)[0, 0].numpy()
    samples = len(whole) // channels
    kind = "OGG" if file.endswith("opus") else file.rpartition(".")[2].upper()
    soundfile.write(file, whole[: samples * channels].reshape(channels, samples).T, rate, subtype, format=kind)
    return file


def wav(file: str) -> torch.Tensor:
    """(channels, samples)."""
    values, _ = soundfile.read(file, dtype="float32", always_2d=True)
    return torch.from_numpy(values.T.copy())


def heard(file: str, tokenizer, channel: int | None = None) -> torch.Tensor:
    """A whole file as the tokenizer takes it: (1, 1, samples)."""
    audio, rate = read_audio(file)
    mono = audio.mean(0, keepdim=True) if channel is None else audio[channel : channel + 1]
    return resample(mono, rate, tokenizer.sample_rate).clamp(-1, 1)[None]


# --- any file is what the whole of it would be ------------------------------------------------------------------------------

@pytest.mark.parametrize("file, seconds, rate, channels", [
    ("a.wav", 11.0, 44_100, 2), ("a.flac", 1.3, 24_000, 1), ("a.ogg", 1.5, 48_000, 1), ("a.mp3", 2.1, 22_050, 2),
    ("a.opus", 1.2, 48_000, 1),
])  # fmt: skip
def test_reconstruct_is_what_the_library_makes_of_the_whole_file(capsys, models, file, seconds, rate, channels):
    write(file, seconds, rate, channels, "OPUS" if file.endswith("opus") else None)
    tokenizer = load(models["lm_spt"])
    out, _ = toklab(capsys, "reconstruct", file, "--model", models["lm_spt"])
    audio = heard(file, tokenizer)
    expected = tokenizer.reconstruct(audio)
    found, info = wav("reconstructed/a.wav"), soundfile.info("reconstructed/a.wav")
    assert (info.samplerate, info.subtype) == (24_000, "PCM_16")
    assert found.shape == expected[0].shape and (found - expected[0]).abs().max() <= 1.5 * LSB
    assert abs(info.frames / 24_000 - soundfile.info(file).frames / rate) < 1 / 24_000
    metrics = speech_metrics(expected, audio, 24_000)
    said = re.search(r"mel distance ([\d.]+), SI-SDR (-?[\d.]+) dB, ([\d,]+) bit/s, real-time factor ([\d.]+)", out)
    assert float(said[1]) == pytest.approx(metrics["mel"].item(), abs=0.0006)
    assert float(said[2]) == pytest.approx(metrics["sisdr"].item(), abs=0.5)      # far below 0 dB each rounding tells
    assert said[3] == "262" and float(said[4]) > 0      # 12.5 · (6 + 3 · 5)


@pytest.mark.parametrize("model, dtype, shape", [
    ("dm_codec", torch.uint8, (3, 150)), ("lm_spt", torch.uint8, (4, 38)), ("lm_spt_48", torch.uint8, (4, 75))])
def test_encode_then_decode_is_reconstruct(capsys, models, model, dtype, shape):
    write("a.flac", 3.0, 44_100, 2)
    tokenizer = load(models[model])
    toklab(capsys, "encode", "a.flac", "--model", models[model])
    with safe_open("latents/a.safetensors", "pt") as file:
        codes, header = file.get_tensor("codes"), file.metadata()
    assert codes.dtype == dtype and tuple(codes.shape) == shape
    with torch.inference_mode():      # LSTMs that keep nothing for a gradient round otherwise
        assert torch.equal(codes.long(), tokenizer.encode(heard("a.flac", tokenizer)).codes[0])
    assert header == {
        "system": tokenizer.system, "model_sha256": weights_sha256(models[model]), "file": "a.flac", "samples": "132300",
        "original_rate": "44100", "sample_rate": str(tokenizer.sample_rate), "channels": "1", "each": "0"}
    toklab(capsys, "decode", "latents/a.safetensors", "--model", models[model])
    toklab(capsys, "reconstruct", "a.flac", "--model", models[model])
    assert Path("decoded/a.wav").read_bytes() == Path("reconstructed/a.wav").read_bytes()
    assert soundfile.info("decoded/a.wav").frames == 3 * tokenizer.output_rate()


@pytest.mark.parametrize("model", ["dm_codec", "lm_spt"])
def test_each_channel_on_its_own(capsys, models, model):
    """Codes and sound of a channel are those of a file of that channel alone."""
    write("three.flac", 1.5, 32_000, 3)
    for i in range(3):
        soundfile.write(f"{i}.flac", soundfile.read("three.flac", dtype="int16")[0][:, i], 32_000)
    toklab(capsys, "encode", "three.flac", "--channels", "each", "--model", models[model])
    toklab(capsys, "encode", "0.flac", "1.flac", "2.flac", "--model", models[model])
    codes = [safe_open(f"latents/{name}.safetensors", "pt").get_tensor("codes") for name in ("three", "0", "1", "2")]
    assert torch.equal(codes[0], torch.stack(codes[1:])) and not torch.equal(codes[1], codes[2])
    toklab(capsys, "decode", "latents/three.safetensors", "latents/1.safetensors", "--model", models[model])
    out, _ = toklab(capsys, "reconstruct", "three.flac", "--channels", "each", "--model", models[model])
    assert torch.equal(wav("decoded/three.wav"), wav("reconstructed/three.wav"))
    assert wav("decoded/three.wav").shape[0] == 3 and torch.equal(wav("decoded/three.wav")[1], wav("decoded/1.wav")[0])
    single = [toklab(capsys, "reconstruct", f"{i}.flac", "--model", models[model])[0] for i in range(3)]
    mels = [float(re.search(r"mel distance ([\d.]+)", text)[1]) for text in [out, *single]]
    assert mels[0] == pytest.approx(sum(mels[1:]) / 3, abs=0.0011)


@pytest.mark.parametrize("rate, samples", [(8_000, 8_001), (11_025, 7_777), (44_100, 44_101), (192_000, 96_000)])
def test_original_rate_and_floats(capsys, models, rate, samples):
    """The WAV has exactly the samples of the file, and holds what the codec made, resampled."""
    soundfile.write("a.wav", 0.3 * np.sin(np.arange(samples) / rate * 3000), rate, "FLOAT")
    toklab(capsys, "reconstruct", "a.wav", "--rate", "original", "--float", "--model", models["lm_spt_48"])
    info = soundfile.info("reconstructed/a.wav")
    assert (info.frames, info.samplerate, info.subtype) == (samples, rate, "FLOAT")
    tokenizer = load(models["lm_spt_48"])
    expected = tokenizer.reconstruct(heard("a.wav", tokenizer))[0, :, : resampled_length(samples, rate, 48_000)]
    difference = (wav("reconstructed/a.wav") - resample(expected, 48_000, rate)[:, :samples]).abs()
    assert difference[:, : samples - rate // 100].max() < 2e-5      # at the end the codec's last frame goes on behind the file


def test_ways_of_decoding(capsys, models):
    write("a.wav", 1.0)
    tokenizer = load(models["lm_spt"])
    codes = tokenizer.encode(heard("a.wav", tokenizer)).codes
    toklab(capsys, "encode", "a.wav", "--model", models["lm_spt"])
    for way, rate in (("semantic", 24_000), ("auxiliary", 16_000), ("acoustic", 24_000)):
        toklab(capsys, "decode", "latents/a.safetensors", "--model", models["lm_spt"], "--decoding", way)
        assert soundfile.info("decoded/a.wav").samplerate == rate
        with torch.inference_mode():
            expected = tokenizer.decode(codes, decoding=way)[0, :, :rate]
        assert (wav("decoded/a.wav") - expected).abs().max() <= 1.5 * LSB
        Path("decoded/a.wav").unlink()
    assert "no way of decoding called 'semantics'; it has semantic, aux" in refusal(
        capsys, "reconstruct", "a.wav", "--model", models["lm_spt"], "--decoding", "semantics")
    assert "it has but one" in refusal(capsys, "reconstruct", "a.wav", "--model", models["dm_codec"], "--decoding", "all")


@pytest.mark.parametrize("original_rate, rate", [(16_000, 16_000), (24_000, 24_000), (24_000, 48_000), (24_000, 16_000)])
@pytest.mark.parametrize("samples, sizes", [
    (700, (333, 2)), (400_001, (65_536, 240_000)), (241_000, (241_000, 241_000)), (30_000, (1_000, 30_000)), (1, (1, 1))])
def test_metrics_of_pieces_are_those_of_the_whole(original_rate, rate, samples, sizes):
    original = speech(1 + samples / original_rate, original_rate)[:, :, 9_000 : 9_000 + samples]
    reference = resample(original, original_rate, rate)
    made = reference + 0.1 * reference.roll(7, -1) + 0.01
    meter = PairMeter(original_rate, rate)
    left, right = original[0].split(sizes[0], -1), made[0].split(sizes[1], -1)
    for i in range(max(len(left), len(right))):
        for push, pieces in ((meter.push_original, left), (meter.push_reconstruction, right)):
            if i < len(pieces):
                push(pieces[i])
    found, expected = meter.result(), speech_metrics(made, reference, rate)
    assert found["mel"] == pytest.approx(expected["mel"].item(), abs=2e-5)
    assert found["sisdr"] == pytest.approx(expected["sisdr"].item(), abs=2e-3)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(models):
    """Peak memory of the whole command."""
    code = ("import resource, sys; from tokenizers_lab.cli.main import call; call(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for minutes in (1, 10):
        with soundfile.SoundFile("long.flac", "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write(np.resize(speech(30.0, 16_000)[0, 0].numpy(), 60 * 16_000))
        command = [sys.executable, "-c", code, "reconstruct", "long.flac", "--model", models["lm_spt"], "--device", "cpu"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert soundfile.info("reconstructed/long.wav").frames == minutes * 60 * 24_000
        peaks.append(int(out.split()[-1]))
    assert peaks[1] <= 1.1 * peaks[0]


# --- bad input --------------------------------------------------------------------------------------------------------------

def broken(kind: str) -> str:
    """A file that is no sound, or not a whole one."""
    if kind == "empty":
        Path("x.wav").write_bytes(b"")
    elif kind == "text":
        Path("x.wav").write_text("this is no sound\n" * 100)
    elif kind == "no samples":
        soundfile.write("x.wav", np.zeros(0), 16_000)
    elif kind in ("NaN", "infinity", "no audio values"):
        values = np.zeros(40_000, np.float32)
        values[30_000] = {"NaN": np.nan, "infinity": np.inf, "no audio values": 3e4}[kind]
        soundfile.write("x.wav", values, 16_000, "FLOAT")
    elif kind.startswith("truncated"):
        name = "x." + kind.split()[1]
        Path(name).write_bytes(Path(write(name, 15.0, 32_000)).read_bytes()[:-9000])
        return name
    return "x.wav"


@pytest.mark.parametrize("kind, message", [
    ("empty", "an empty file"), ("text", "not a sound file"), ("no samples", "no samples"), ("missing", "no such file"),
    ("NaN", "NaN"), ("infinity", "NaN or infinity"), ("no audio values", "scale them"), ("truncated wav", "truncated"),
    ("truncated flac", "truncated"), ("truncated ogg", "truncated"), ("truncated mp3", "truncated"),
])  # fmt: skip
def test_what_is_no_sound_is_one_line(capsys, models, kind, message):
    """Also where the fault shows late: no half of a result is left."""
    file = broken(kind)
    for command in ("reconstruct", "encode"):
        said = refusal(capsys, command, file, "--model", models["dm_codec"])
        assert said.startswith(f"DataError: {file}: ") and message in said, said
    assert not list(Path().rglob("*.safetensors"))


def test_headers_of_all_files_are_read_first(capsys, models):
    write("a.wav")
    assert "b.wav: there is no such file" in refusal(capsys, "reconstruct", "a.wav", "b.wav", "--model", models["lm_spt"])


@pytest.mark.parametrize("kind, model", [
    *[(kind, "dm_codec") for kind in ("1 sample", "clipped", "PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "192 kHz", "6 channels")],
    *[(kind, "lm_spt") for kind in ("1 sample", "clipped", "loud", "silent")]])
def test_odd_files_are_taken_right(capsys, models, kind, model):
    values = speech(1.0, 16_000)[0, 0].numpy()
    rate, subtype = 16_000, kind if kind.startswith(("PCM", "FLOAT", "DOUBLE")) else "PCM_16"
    if kind == "1 sample":
        values = values[5000:5001]
    elif kind == "clipped":
        values = np.clip(20 * values, -1, 1)
    elif kind == "192 kHz":
        values, rate = np.repeat(values, 12), 192_000
    elif kind == "6 channels":
        values = values[:, None] * np.linspace(0.2, 1, 6)
    elif kind == "loud":      # as a float or a lossy format may be
        values, subtype = 1.3 * values / np.abs(values).max(), "FLOAT"
    elif kind == "silent":
        values = 0 * values
    soundfile.write("a.wav", values, rate, subtype)
    tokenizer = load(models[model])
    _, err = toklab(capsys, "reconstruct", "a.wav", "--model", models[model])
    assert err == ""
    expected = tokenizer.reconstruct(heard("a.wav", tokenizer))[0]
    found = wav("reconstructed/a.wav")
    assert found.shape[1] == resampled_length(len(values), rate, tokenizer.sample_rate)
    assert (found - expected).abs().max() <= 1.5 * LSB


def test_what_is_far_too_loud_is_said(capsys, models):
    soundfile.write("a.wav", 3 * np.sin(np.arange(16_000) / 9), 16_000, "FLOAT")
    _, err = toklab(capsys, "encode", "a.wav", "--model", models["dm_codec"])
    assert err == "warning: a.wav: peaks of 3 were clipped to 1; scale it if that is not meant\n"


@pytest.mark.parametrize("kind, message", [
    ("out of range", "semantic codes must be below 64, not 99|codes must be in [0, 64), not in [99, 99]"),
    ("negative", "codes must be in [0, 64), not in [-1"),
    ("nine codebooks", "of 9 codebooks, but the model has 4"), ("no codebooks", "of 0 codebooks"), ("floats", "whole numbers"),
    ("too few frames", "have 10 frames; the model would have 25"), ("one axis", "do not fit its header"),
    ("no samples", "do not fit its header"), ("lost header", "its header is damaged"),
    ("another rate", "2.00 s at 16000 Hz have 25 frames"), ("another model", "was encoded by other weights (dm_codec, SHA-256"),
    ("no codes", "does not hold codes of a sound"), ("weights", "is not a file that toklab encode wrote"),
    ("text", "is not a file that toklab encode wrote"), ("missing", "is not a file that toklab encode wrote"),
])  # fmt: skip
def test_bad_codes_are_one_line(capsys, models, kind, message):
    header = {"system": "lm_spt", "model_sha256": weights_sha256(models["lm_spt"]), "file": "a.wav", "samples": "32000",
              "original_rate": "16000", "sample_rate": "24000", "channels": "1", "each": "0"}
    codes = torch.zeros(4, 25, dtype=torch.int16)
    name = "codes"
    if kind == "out of range":
        codes += 99
    elif kind == "negative":
        codes -= 1
    elif kind.endswith("codebooks"):
        codes = codes[:1].expand({"nine": 9, "no": 0}[kind.split()[0]], -1)
    elif kind == "floats":
        codes = codes.float()
    elif kind == "too few frames":
        codes = codes[:, :10]
    elif kind == "one axis":
        codes = codes[0]
    elif kind == "no samples":
        header["samples"] = "0"
    elif kind == "lost header":
        del header["channels"]
    elif kind == "another rate":
        header["sample_rate"] = "16000"
    elif kind == "another model":
        header |= {"system": "dm_codec", "model_sha256": weights_sha256(models["dm_codec"])}
    elif kind == "no codes":
        name = "latents"
    save_file({name: codes.contiguous()}, "a.safetensors", metadata=header)
    if kind == "text":
        Path("a.safetensors").write_text("no tensors")
    elif kind == "missing":
        Path("a.safetensors").unlink()
    file = f"{models['lm_spt']}/model.safetensors" if kind == "weights" else "a.safetensors"
    said = refusal(capsys, "decode", file, "--model", models["lm_spt"])
    assert said.startswith("InputError: ") and any(part in said for part in message.split("|")), said


def test_first_codebooks_alone_and_another_model_on_demand(capsys, models):
    write("a.wav")
    toklab(capsys, "encode", "a.wav", "--model", models["lm_spt"])
    with safe_open("latents/a.safetensors", "pt") as file:
        codes, header = file.get_tensor("codes"), file.metadata()
    save_file({"codes": codes[:1].contiguous()}, "one.safetensors", metadata=header | {"model_sha256": "0" * 64})
    assert "--any-model" in refusal(capsys, "decode", "one.safetensors", "--model", models["lm_spt"])
    toklab(capsys, "decode", "one.safetensors", "--any-model", "--model", models["lm_spt"])
    with torch.inference_mode():
        expected = load(models["lm_spt"]).decode(codes[None, :1].long())[0]
    assert (wav("decoded/one.wav") - expected[:, :48_000]).abs().max() <= 1.5 * LSB


@pytest.mark.parametrize("words, message", [
    (["reconstruct", "x.png", "--model", "lm_spt"], "x.png is an image, but"),
    (["encode", "a.wav", "--model", "rectok"], "a.wav is a sound, but"),
    (["encode", "a.wav", "--model", "lm_spt", "--size", "16"], "--size is for images"),
    (["reconstruct", "x.png", "--model", "rectok", "--rate", "codec"], "--rate is for speech"),
    (["encode", "x.png", "--model", "rectok", "--channels", "each"], "--channels is for speech"),
    (["decode", "latents/x.safetensors", "--model", "lm_spt"], "does not hold codes of a sound"),
    (["decode", "latents/a.safetensors", "--model", "rectok"], "does not hold an image"),
    (["reconstruct", "a.wav", "--model", "lm_spt", "--out", "."], "--out . would replace a.wav"),
])  # fmt: skip
def test_files_and_options_of_the_other_kind(capsys, models, words, message):
    write("a.wav", 1.0)
    Image.new("RGB", (16, 16)).save("x.png")
    if words[0] == "decode":
        toklab(capsys, "encode", "a.wav", "--model", models["lm_spt"])
        toklab(capsys, "encode", "x.png", "--model", models["rectok"])
    said = refusal(capsys, *[models.get(word, word) for word in words])
    assert said.startswith("InputError: ") and message in said
    assert read_audio("a.wav")[0].shape == (1, 16_000)


# --- info and list ----------------------------------------------------------------------------------------------------------

def counted(tokenizer, samples: int) -> tuple[int, int]:
    """FLOPs of encode and decode: two for each multiply-add of every convolution, LSTM and look-up of a real pass."""
    total = 0

    def convolved(layer, inputs, output):
        nonlocal total
        steps = inputs[0].shape[-1] if isinstance(layer, nn.ConvTranspose1d) else output.shape[-1]
        total += 2 * steps * layer.in_channels * layer.out_channels * layer.kernel_size[0]

    def recurred(layer, inputs, output):
        nonlocal total
        weights = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))
        total += 2 * inputs[0].shape[0] * weights

    for layer in tokenizer.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            layer.register_forward_hook(convolved)
        elif isinstance(layer, nn.LSTM):
            layer.register_forward_hook(recurred)
    with torch.no_grad():
        codes = tokenizer.encode(torch.zeros(1, 1, samples)).codes
        encode, total = total, 0
        tokenizer.decode(codes)
    cfg = tokenizer.cfg
    if tokenizer.system == "dm_codec":
        sizes = cfg.codebooks * cfg.codebook_size * cfg.width
    else:
        sizes = cfg.semantic_size * cfg.semantic_dim + (cfg.codebooks - 1) * cfg.acoustic_size * cfg.acoustic_dim
    return encode + 2 * codes.shape[-1] * sizes, total


@pytest.mark.parametrize("system, name, rows", [
    ("dm_codec", "LSTM", ["16,000 Hz, 1 channel", "50 a second, of 320 samples", "3 of 64 entries", "900 bit/s", "not local"]),
    ("lm_spt", "6.25 Hz causal", ["6.25 a second, of 3,840 samples", "1 of 64 entries, then 3 of 32 entries", "causal"]),
    ("lm_spt", "no subtraction, 48 kHz", ["24,000 Hz, 1 channel; decoded at 48,000 Hz", "25 a second", "525 bit/s", "s ahead"]),
])  # fmt: skip
def test_info(capsys, tmp_path, system, name, rows):
    tokenizer = network(system, name)
    folder = str(tokenizer.save_pretrained(tmp_path / "saved"))
    out, _ = toklab(capsys, "info", folder, "--seconds", "0.1")
    assert all(row in out for row in rows) and weights_sha256(folder) in out, out
    figures = speech_figures(system, tokenizer.cfg, 0.2)
    frames = tokenizer.frames(round(0.2 * tokenizer.sample_rate))
    seconds = frames * tokenizer.hop / tokenizer.sample_rate
    encode, decode = counted(load(folder), frames * tokenizer.hop)
    assert (figures["encode_flops"], figures["decode_flops"]) == pytest.approx((encode / seconds, decode / seconds))
    assert figures["parameters"] == sum(p.numel() for p in tokenizer.parameters()) == sum(figures["parts"].values())
    assert "--size is for images" in refusal(capsys, "info", folder, "--size", "16")


def test_info_of_configs_and_the_other_kind(capsys, models):
    Path("my.yaml").write_text("system: lm_spt\nname: x\ndata: {train: 'sample:speech', sample_rate: 24000}\n"
                               "stages:\n  - {name: one, steps: 1, lr: 1e-3, weights: {mel: 1}}\n")
    out, _ = toklab(capsys, "info", "my.yaml", "model.codebooks=4")      # the released size, never allocated
    assert "M parameters" in out and "1 of 16,384 entries, then 3 of 4,096 entries" in out and "625 bit/s" in out
    assert "--seconds must be above 0" in refusal(capsys, "info", "my.yaml", "--seconds", "0")
    assert "--seconds is for speech" in refusal(capsys, "info", models["rectok"], "--seconds", "0")
    with pytest.raises(InputError, match="not for images"):
        model_figures("lm_spt", load(models["lm_spt"]).cfg)


def test_list_says_which_are_for_speech(capsys):
    out, _ = toklab(capsys, "list")
    assert re.search(r"^  dm_codec +speech ", out, re.MULTILINE) and re.search(r"^  rectok +image ", out, re.MULTILINE)
