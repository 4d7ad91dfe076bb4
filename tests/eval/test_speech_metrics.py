"""The metrics of speech against the packages that define them, closed forms, and what they cannot measure."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.loader import sample_path
from tokenizers_lab.data.resample import resample
from tokenizers_lab.errors import InputError, WeightsMissing
from tokenizers_lab.eval import speech_metrics
from tokenizers_lab.eval.speech_metrics import SPEECH_METRICS, MetricOptions, build_metrics, expand_names, stft_distance

pesq_package, pystoi_package = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
FILES = sorted(sample_path("speech", "val").glob("*.flac"))[:3]


def measure(name: str, original: torch.Tensor, made: torch.Tensor):
    return SPEECH_METRICS[name].build(MetricOptions())(original, made, {"key": "a"})


@pytest.fixture(scope="module")
def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clips at 16 kHz, clean and with noise."""
    clean = [read_audio(file, 16_000, 1)[0][0] for file in FILES]
    noise = torch.Generator().manual_seed(0)
    return [(audio, audio + 0.01 * torch.randn(audio.shape, generator=noise)) for audio in clean]


def test_pesq_and_stoi_are_those_of_their_packages(pairs):
    for original, made in pairs:
        x, y = original.numpy(), made.numpy()
        assert measure("pesq_wb", original, made) == pesq_package.pesq(16_000, x, y, "wb")
        assert measure("stoi", original, made) == pytest.approx(pystoi_package.stoi(x, y, 16_000), abs=1e-9)
        assert measure("estoi", original, made) == pytest.approx(pystoi_package.stoi(x, y, 16_000, extended=True), abs=1e-6)
        narrow = [resample(audio, 16_000, 8_000) for audio in (original, made)]
        assert measure("pesq_nb", *narrow) == pesq_package.pesq(8_000, narrow[0].numpy(), narrow[1].numpy(), "nb")


def test_threads_do_not_disturb_each_other(pairs):
    """ITU's code keeps the sample rate in global variables."""
    names = ["pesq_wb", "pesq_nb", "estoi"] * 3
    alone = [measure(name, *pairs[0]) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: measure(name, *pairs[0]), names)) == alone


def test_estoi_of_silent_stretches_is_repeatable(pairs):
    """pystoi fills them with noise from numpy's global generator."""
    original, made = pairs[0][0].clone(), pairs[0][1].clone()
    spectrum = torch.fft.rfft(original)
    spectrum[len(spectrum) // 8 :] = 0      # bands without any sound
    original = torch.fft.irfft(spectrum, len(made))
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = measure("estoi", original, made)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(6)
    assert measure("estoi", original, made) == first


@pytest.mark.parametrize(("name", "identical"), [
    ("mel", 0), ("stft", 0), ("pesq_wb", 4.644), ("pesq_nb", 4.549), ("stoi", 1), ("estoi", 1)])
def test_identical_clips(pairs, name, identical):
    original = pairs[0][0]
    if name == "pesq_nb":
        original = resample(original, 16_000, 8_000)
    assert measure(name, original, original.clone()) == pytest.approx(identical, abs=2e-3)


def test_sisdr(pairs):
    original = pairs[0][0]
    noise = torch.randn(len(original), generator=torch.Generator().manual_seed(1))
    noise = noise - noise.mean() - (noise @ (original - original.mean())) / (original - original.mean()).square().sum() * (
        original - original.mean())      # orthogonal, so that the ratio is that of the energies
    made = 3 * original + 0.1 * noise
    energies = 9 * (original - original.mean()).square().sum() / (0.01 * noise.square().sum())
    assert measure("sisdr", original, made) == pytest.approx(10 * math.log10(energies), abs=1e-2)
    assert 80 < measure("sisdr", original, original.clone()) <= speech_metrics.SI_SDR_CAP


@pytest.mark.parametrize("name", ["stft", "mel", "pesq_wb", "stoi", "estoi", "sisdr"])
def test_worse_is_worse(pairs, name):
    original, made = pairs[0]
    worse = original + 5 * (made - original)
    sign = 1 if SPEECH_METRICS[name].better == "higher" else -1
    assert sign * measure(name, original, made) > sign * measure(name, original, worse)


def test_stft_distance_of_a_quieter_clip_is_the_log_of_its_gain(pairs):
    original = torch.randn(16_000, generator=torch.Generator().manual_seed(0))      # far above the floor in every band
    assert stft_distance(0.5 * original, original) == pytest.approx(math.log(2), abs=1e-4)
    silence = torch.zeros(16_000)
    assert stft_distance(silence, silence) == 0 and math.isfinite(stft_distance(torch.zeros(1), torch.ones(1)))


@pytest.mark.parametrize(("name", "reason"), [
    ("pesq_wb", "shorter than PESQ's 0.25 s"), ("pesq_nb", "shorter than PESQ's 0.25 s"), ("stoi", "shorter than STOI's 0.4 s"),
    ("estoi", "shorter than STOI's 0.4 s")])
def test_short_clips_have_no_value(name, reason):
    clip = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    found = measure(name, clip, 0.9 * clip)
    assert found["value"] is None and reason in found["reason"]


@pytest.mark.parametrize("name", ["sisdr", "pesq_wb", "pesq_nb"])
def test_silence_has_no_value(pairs, name):
    original = pairs[0][0]
    for one, two in ((torch.zeros_like(original), original), (original, torch.zeros_like(original))):
        found = measure(name, one, two)
        assert found["value"] is None and "silent" in found["reason"]


def test_a_silent_reconstruction_is_not_intelligible(pairs):
    original = pairs[0][0]
    assert abs(measure("stoi", original, torch.zeros_like(original))) < 0.01
    assert measure("stoi", torch.zeros_like(original), original)["value"] is None
    barely = torch.zeros(16_000)
    barely[8000:8100] = 0.5
    assert "is not silent" in measure("stoi", barely, barely)["reason"]      # pystoi itself says 1e-5


def test_what_pesq_gives_up_on_has_no_value(pairs):
    start = pairs[0][0][:4800]      # before anybody speaks
    assert "hears no utterance" in measure("pesq_wb", start, start)["reason"]
    long = pairs[0][0].repeat(20)
    assert len(long) > 40 * 16_000
    assert "longer than PESQ's 40 s" in measure("pesq_wb", long, long)["reason"]      # the package's arrays end somewhere beyond


def test_names_and_missing_packages(monkeypatch):
    assert expand_names(["pesq", "mel", "pesq_nb"]) == ["pesq_wb", "pesq_nb", "mel"]
    with pytest.raises(InputError, match="there is no speech metric 'PESQ'"):
        expand_names(["PESQ"])
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(WeightsMissing, match=r"STOI needs the package pystoi: pip install 'tokenizers-lab\[metrics\]'"):
        build_metrics(["mel", "stoi"])
    built, missing = build_metrics(["mel", "stoi"], allow_missing=True)
    assert [metric.spec.name for metric in built] == ["mel"] and list(missing) == ["stoi"]
