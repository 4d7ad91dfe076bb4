"""`toklab reconstruct`, `encode` and `decode` with a decoder that reads along, and with a vocoder alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from speech_networks import CLIPS, TA, network
from test_cli_sound import own_place, toklab  # noqa: F401      (own_place: a fixture for every test)

from tokenizers_lab.cli import spoken
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.resample import resample
from tokenizers_lab.hub import load
from tokenizers_lab.models.tadicodec.model import TaDiCodec


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Saved folders of a small TaDiCodec, of a vocoder alone, and of a codec that does not read."""
    root = tmp_path_factory.mktemp("spoken")
    torch.manual_seed(0)
    found = {"spoken": network("tadicodec", "6.25 Hz"), "vocoder": TaDiCodec(replace(TA, codec=False)),
             "other": network("dm_codec", "no LSTM")}
    return {key: str(tokenizer.save_pretrained(root / key)) for key, tokenizer in found.items()}


@pytest.fixture
def clip() -> str:
    """A held-out clip in the working folder."""
    return shutil.copy(sorted(CLIPS.rglob("*.flac"))[0], "clip.flac")


@pytest.fixture
def asr(monkeypatch):
    """A recognizer that hears how long a clip is; gives the list of what it was given."""
    heard = []

    class Recognizer:
        sample_rate = 16_000

        def transcribe(self, clips):
            heard.extend(len(clip) for clip in clips)
            return [f"{len(clip)} samples" for clip in clips]

    monkeypatch.setattr(spoken, "build_asr", lambda source, device: Recognizer())
    return heard


def decoded(model: str, clip: str, text: str | None, **options) -> torch.Tensor:
    tokenizer = load(model)
    audio, rate = read_audio(clip, None, 1)
    audio = resample(audio[None], rate, tokenizer.sample_rate).clamp(-1, 1)
    return tokenizer.reconstruct(audio, texts=[text], **options)[0, 0]


def wav(file: str) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(file, dtype="float32")[0])


def test_the_text_is_given_or_heard_and_told(capsys, models, clip, asr):
    model = models["spoken"]
    out, _ = toklab(capsys, "reconstruct", clip, "--model", model, "--text", "so", "--steps", "3", "--cfg", "1.5", "--float")
    assert not asr and "text heard" not in out and "bit/s" in out
    assert torch.allclose(wav("reconstructed/clip.wav"), decoded(model, clip, "so", steps=3, guidance=1.5), atol=1e-5)
    out, _ = toklab(capsys, "reconstruct", clip, "--model", model, "--float")
    assert f"clip.flac: text heard by whisper-base: {asr[0]} samples" in out and len(asr) == 1
    assert torch.allclose(wav("reconstructed/clip.wav"), decoded(model, clip, f"{asr[0]} samples"), atol=1e-5)


def test_another_seed_starts_from_other_noise_and_a_voice_changes_the_sound(capsys, models, clip, asr):
    base = ["reconstruct", clip, "--model", models["spoken"], "--text", "so"]
    sounds = {}
    for name, words in {"plain": [], "again": [], "seed": ["--seed", "1"], "prompt": ["--prompt", clip, "--prompt-text", "so"],
                        "heard": ["--prompt", clip]}.items():
        toklab(capsys, *base, *words, "--out", name)
        sounds[name] = wav(f"{name}/clip.wav")
    assert torch.equal(sounds["plain"], sounds["again"]) and len(asr) == 1      # the prompt's text was heard once
    others = [sounds[name] for name in ("seed", "prompt", "heard")]
    assert all(len(other) == len(sounds["plain"]) and not torch.equal(other, sounds["plain"]) for other in others)


def test_long_files_are_heard_and_decoded_piece_by_piece(capsys, models, clip, asr, monkeypatch):
    monkeypatch.setattr(spoken, "LONGEST", 1.5)
    out, _ = toklab(capsys, "reconstruct", clip, "--model", models["spoken"])
    seconds = soundfile.info(clip).duration
    assert len(asr) == out.count("text heard") >= seconds / 1.5
    assert abs(sum(asr) / 16_000 - seconds) < 0.01 and max(asr) <= 1.5 * 16_000 + 1
    assert soundfile.info("reconstructed/clip.wav").duration == pytest.approx(seconds, abs=1e-3)
    monkeypatch.setattr(spoken, "WITH_TEXT", 1.0)
    _, err = toklab(capsys, "reconstruct", clip, "--model", models["spoken"], "--text", "so", status=2)
    assert "leave --text out" in err


def test_codes_are_decoded_with_a_text_and_without(capsys, models, clip):
    model = models["spoken"]
    toklab(capsys, "encode", clip, "--model", model)
    toklab(capsys, "decode", "latents/clip.safetensors", "--model", model, "--text", "so", "--float", "--out", "with")
    toklab(capsys, "decode", "latents/clip.safetensors", "--model", model, "--float", "--out", "without")
    assert torch.allclose(wav("with/clip.wav"), decoded(model, clip, "so"), atol=1e-5)
    assert torch.allclose(wav("without/clip.wav"), decoded(model, clip, None), atol=1e-5)      # short: one window


def test_options_that_a_tokenizer_does_not_have_are_refused(capsys, models, clip):
    for words, said in (
        (["--text", "so"], "--text is for decoders that read along"), (["--steps", "3"], "--steps is for diffusion decoders"),
        (["--seed", "3"], "--seed is for diffusion decoders"), (["--prompt", clip], "--prompt is for decoders that read along"),
    ):
        _, err = toklab(capsys, "reconstruct", clip, "--model", models["other"], *words, status=2)
        assert said in err
    for words, said in (
        (["--prompt-text", "so"], "give --prompt too"), (["--steps", "0"], "--steps must be at least 1"),
        (["--channels", "each"], "--channels each is not for tadicodec"), (["--prompt", "missing.wav"], "missing.wav"),
    ):
        _, err = toklab(capsys, "reconstruct", clip, "--model", models["spoken"], "--text", "so", *words, status=2)
        assert said in err
    shutil.copy(clip, "other.flac")
    _, err = toklab(capsys, "reconstruct", clip, "other.flac", "--model", models["spoken"], "--text", "so", status=2)
    assert "go file by file" in err


def test_a_vocoder_alone_keeps_latents(capsys, models, clip):
    model = models["vocoder"]
    out, _ = toklab(capsys, "encode", clip, "--model", model)
    assert "latents (" in out and "frames of latents a second" in out
    toklab(capsys, "decode", "latents/clip.safetensors", "--model", model, "--float")
    out, _ = toklab(capsys, "reconstruct", clip, "--model", model, "--float")
    assert torch.allclose(wav("decoded/clip.wav"), wav("reconstructed/clip.wav"), atol=1e-6)
    tokenizer = load(model)
    audio, rate = read_audio(clip, None, 1)
    whole = tokenizer.reconstruct(resample(audio[None], rate, tokenizer.sample_rate).clamp(-1, 1))[0, 0]
    assert torch.allclose(wav("decoded/clip.wav"), whole, atol=1e-5)
    out, _ = toklab(capsys, "info", model)
    assert "continuous: no codes" in out and "bit rate" not in out
    _, err = toklab(capsys, "decode", "latents/clip.safetensors", "--model", models["other"], "--any-model", status=2)
    assert "does not hold codes of a sound" in err
    assert Path("latents/clip.safetensors").exists()
