"""Predicted scores: the packages' own numbers, order on real speech with noise, windows, refusals."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizers_lab
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.errors import CheckpointError, WeightsMissing
from tokenizers_lab.eval.mos import DNSMOS, UTMOS, DistillMOS, ViSQOL, dnsmos_windows, means_of, optional_package

SPEECH = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"
CLIP = "en_US_f_Allison_43.flac"
# What speechmos 0.0.1.1 (ovr, sig, bak) and distillmos 0.9.1 give for CLIP.
STORED_DNSMOS = {"value": 2.962473, "sig": 3.292642, "bak": 3.926942}
STORED_DISTILLMOS = 3.925022


@pytest.fixture(scope="module")
def speech():
    return read_audio(SPEECH / CLIP)[0][0]


def noisy(audio, snr):
    """White noise at that many dB below the clip's power."""
    draw = torch.randn(len(audio), generator=torch.Generator().manual_seed(0))
    return (audio + draw * audio.square().mean().sqrt() * 10 ** (-snr / 20)).clamp(-1, 1)


def test_dnsmos_is_the_package_s_and_falls_with_noise(speech):
    measure = DNSMOS()
    found = measure(speech, speech, {})
    assert found == pytest.approx(STORED_DNSMOS, abs=1e-4) and "speechmos 0.0.1.1" in measure.provenance
    falling = [found["value"], *(measure(speech, noisy(speech, snr), {})["value"] for snr in (20, 10, 0))]
    assert falling == sorted(falling, reverse=True) and falling[0] - falling[1] > 0.3 and falling[2] - falling[3] > 0.2
    assert measure(speech, speech[:0], {})["value"] is None


def test_dnsmos_windows_are_those_of_the_published_protocol():
    """Doubled until 9.01 s are there; then a window a second, without those that its rounding makes a sample too short."""
    for seconds, windows in ((9.01, 1), (10.0, 1), (10.99, 1), (11, 2), (16.5, 7), (30, 7), (40, 14), (5, 1), (6, 3), (2.5, 1)):
        audio = np.arange(round(seconds * 16_000), dtype=np.float32)
        found = dnsmos_windows(audio)
        assert len(found) == windows and {len(window) for window in found} == {144_160}, seconds
        repeated, starts = np.tile(audio, 4), [i for i in range(31) if not 7 <= i <= 23]
        assert all(np.array_equal(window, repeated[i * 16_000 : i * 16_000 + 144_160]) for i, window in zip(starts, found))


def test_distillmos_is_the_package_s_and_falls_with_noise(speech):
    pytest.importorskip("distillmos")
    measure = DistillMOS()
    falling = [float(measure(speech, x, {})) for x in (speech, noisy(speech, 20), noisy(speech, 10), noisy(speech, 0))]
    assert falling[0] == pytest.approx(STORED_DISTILLMOS, abs=1e-4)
    assert falling == sorted(falling, reverse=True) and falling[0] - falling[1] > 0.5
    assert "distillmos 0.9.1" in measure.provenance


@pytest.mark.slow
def test_visqol_tells_its_mapping_and_falls_with_noise(speech):
    pytest.importorskip("visqol")
    measure = ViSQOL()
    found = [measure(speech, x, {}) for x in (speech, noisy(speech, 20), noisy(speech, 10), noisy(speech, 0))]
    similarity = [one["nsim"] for one in found]
    assert similarity == sorted(similarity, reverse=True) and similarity[0] == pytest.approx(1) and similarity[1] < 0.8
    assert found[0]["value"] > 4 and max(one["value"] for one in found[1:]) < found[0]["value"] - 0.5
    assert ("lattice mapping" in measure.provenance) != ("polynomial" in measure.provenance)
    assert "silent" in measure(torch.zeros(16_000), speech[:16_000], {})["reason"]
    assert "0.5 s" in measure(speech[:4000], speech[:4000], {})["reason"]


class Mean(torch.nn.Module):
    """Stands for UTMOS: like the published file it takes 16-bit integers (B, samples)."""

    def forward(self, pcm):
        assert pcm.dtype == torch.int16
        return pcm.float().abs().mean(1) / 32767


def test_utmos_by_path_and_refusals(speech, tmp_path, monkeypatch):
    torch.jit.script(Mean()).save(str(tmp_path / "my.jit"))
    measure = UTMOS(str(tmp_path / "my.jit"))
    assert measure(speech, speech, {}) == pytest.approx(float(speech.abs().mean()), abs=1e-4)
    assert "my.jit, SHA-256 " in measure.provenance and str(tmp_path) not in measure.provenance
    with pytest.raises(WeightsMissing, match="there is no file"):
        UTMOS(str(tmp_path / "other.jit"))
    (tmp_path / "text.jit").write_text("no network")
    with pytest.raises(CheckpointError, match="no TorchScript"):
        UTMOS(str(tmp_path / "text.jit"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match=r"hf download balacoon/utmos utmos\.jit"):
        UTMOS()


def test_a_missing_package_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "visqol", None)
    for build in (ViSQOL, lambda: optional_package("no_such_package", "It")):
        with pytest.raises(WeightsMissing, match=r"tokenizers-lab\[metrics\]") as raised:
            build()
        assert "\n" not in str(raised.value)


def test_parts_have_means_of_their_own():
    values = [{"value": 1.0, "sig": 1.0}, {"value": 2.0, "channels": [{"value": 1.0, "sig": 2.0}, {"value": 3.0, "sig": 6.0}]}]
    found = means_of("sig")(values, 0)["sig"]
    assert found["value"] == 3.0 and found["uncertainty"]["low"] < 3 < found["uncertainty"]["high"]
    assert json.loads(json.dumps(found)) == found
