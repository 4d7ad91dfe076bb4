"""Mel filters, spectral losses and distillation losses, against another library and in closed form."""

import math

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from tokenizers_lab.distillation import dimension_distance, frame_distance
from tokenizers_lab.losses.spectral import (
    MelSpectrogram,
    MultiScaleMelLoss,
    MultiScaleSTFTLoss,
    hz_to_mel,
    log_mel,
    mel_filters,
    mel_to_hz,
)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize(("fft", "bands", "rate"), [(1024, 80, 16_000), (2048, 128, 24_000), (512, 20, 16_000)])
def test_filters_are_those_of_transformers(scale, fft, bands, rate):
    theirs = mel_filter_bank(fft // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale=scale)
    np.testing.assert_allclose(mel_filters(rate, fft, bands, scale=scale).numpy(), theirs, atol=1e-7)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_the_mel_scale_has_an_inverse(scale):
    hz = torch.linspace(0, 8000, 50, dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(hz_to_mel(hz, scale), scale), hz, atol=1e-6, rtol=1e-9)


def test_a_tone_is_in_its_band():
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    mel = MelSpectrogram(16_000, 1024, 256, 80)(tone)[0, :, 10:-10]
    centres = mel_to_hz(torch.linspace(0, hz_to_mel(torch.tensor(8000.0), "htk").item(), 82), "htk")[1:-1]
    assert (centres[mel.argmax(0)] - 1000).abs().max() < 30


@pytest.mark.parametrize(("center", "frames"), [(True, 8000 // 200 + 1), (False, 8000 // 200)])
def test_frames(center, frames):
    assert MelSpectrogram(16_000, 800, 200, 40, center=center)(torch.randn(2, 1, 8000)).shape == (2, 40, frames)


def test_mel_loss_is_zero_on_the_same_and_log_two_on_twice():
    loss, audio = MultiScaleMelLoss(16_000, bands=20), torch.randn(2, 1, 8000)
    assert loss(audio, audio).tolist() == [0, 0, 0, 0]
    assert loss(2 * audio, audio)[0].item() == pytest.approx(math.log(2), abs=1e-5)
    assert log_mel(torch.tensor([0.0])).item() == pytest.approx(math.log(1e-5))


def test_stft_loss_in_closed_form():
    audio = torch.randn(2, 1, 8000)
    assert MultiScaleSTFTLoss()(audio, audio).item() == 0
    assert MultiScaleSTFTLoss()(2 * audio, audio).item() == pytest.approx(1 + math.log(2), abs=1e-4)


SAME, UNRELATED = math.log(1 + math.exp(-1)), math.log(2)


def test_dimension_distance_compares_over_time():
    target = torch.randn(2, 30, 5)
    scaled = target * torch.rand(5)      # each dimension by a factor of its own: the same direction over time
    assert dimension_distance(target, scaled).item() == pytest.approx(SAME, abs=1e-5)
    assert frame_distance(target, scaled, similarity=0.0).item() == pytest.approx((target - scaled).abs().mean().item())
    early, late = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    early[:, :2], late[:, 2:] = 1, 1
    assert dimension_distance(early, late).item() == pytest.approx(UNRELATED)


def test_frame_distance_compares_within_frames():
    target = torch.randn(2, 30, 5)
    scaled = target * torch.rand(2, 30, 1).add(0.1)
    cosine = frame_distance(target, scaled, 1.0) - frame_distance(target, scaled, 0.0)
    assert cosine.item() == pytest.approx(SAME, abs=1e-5)


def test_features_are_cut_to_the_shorter_and_must_fit():
    target, student = torch.randn(2, 19, 5), torch.randn(2, 20, 5)
    assert torch.equal(dimension_distance(target, student), dimension_distance(target, student[:, :19]))
    for wrong in (torch.randn(2, 1, 19, 5), torch.randn(2, 19, 6), torch.randn(3, 19, 5)):
        with pytest.raises(ValueError, match="features must be"):
            dimension_distance(wrong, student)
    four = target[:, None]      # the released files' axis: the cosine runs over the batch
    fault = dimension_distance(four, student, as_released=True)
    assert fault.isfinite() and not torch.isclose(fault, dimension_distance(target, student))
