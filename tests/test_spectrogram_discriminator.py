"""The discriminators of Vocos: magnitudes at several resolutions, and periods with a last kernel of 2."""

import math

import pytest
import torch

from tokenizers_lab.discriminators.mpd import PeriodDiscriminator
from tokenizers_lab.discriminators.spectrogram import MultiResolutionSpectrogramDiscriminator, SpectrogramDiscriminator


def test_magnitudes_are_those_of_a_tone_and_keep_to_their_limits():
    member = SpectrogramDiscriminator(64, channels=[2, 2])
    time = torch.arange(640, dtype=torch.float64)
    tone = 0.05 * torch.cos(2 * math.pi * 8 / 64 * time)[None, None]      # in the middle of bin 8
    made = member.spectrogram(torch.cat([tone, 100 * tone, 0 * tone]))
    assert made.shape == (3, 1, 33, 41) and made.dtype == torch.float32
    inside = made[0, 0, :, 4:-4]
    torch.testing.assert_close(inside[8], torch.full_like(inside[8], 0.05 * 32 / 2))      # amplitude · Σ window / 2
    torch.testing.assert_close(inside[7], torch.full_like(inside[7], 0.05 * 32 / 4))
    assert made[1].max().item() == pytest.approx(math.sqrt(1e3)) and (made[2] == math.sqrt(1e-7)).all()


def test_layers_halve_both_axes_and_the_output_is_no_feature():
    network = MultiResolutionSpectrogramDiscriminator([64, 128], [16, 64], [64, 100], [4, 8, 16, 8], (7, 3))
    judged = network(torch.randn(2, 1, 1000))
    assert [tuple(f.shape[1:]) for f in judged[0].features] == [(4, 17, 32), (8, 9, 16), (16, 5, 8), (8, 5, 8)]
    assert [tuple(f.shape[1:]) for f in judged[1].features] == [(4, 33, 8), (8, 17, 4), (16, 9, 2), (8, 9, 2)]
    assert [tuple(m.logits.shape) for m in judged] == [(2, 1, 5, 8), (2, 1, 9, 2)]
    assert [conv.kernel_size[0] for conv in network.discriminators[0].convs] == [7, 5, 5, 3]
    with pytest.raises(ValueError):
        MultiResolutionSpectrogramDiscriminator([64, 128], [16])


def test_silence_has_a_finite_gradient():
    audio = torch.zeros(1, 1, 300, requires_grad=True)
    SpectrogramDiscriminator(64, channels=[2, 2])(audio).logits.sum().backward()
    assert audio.grad.isfinite().all()


def test_the_last_kernel_of_a_period_discriminator():
    audio = torch.randn(2, 1, 1000)
    for kernel, longer in ((3, 0), (2, 1)):
        member = PeriodDiscriminator(5, [4, 4, 4], last_kernel=kernel)
        judged = member(audio)
        assert tuple(member.conv_post.weight.shape) == (1, 4, kernel, 1)
        assert judged.features[-2].shape[2] + longer == judged.features[-1].shape[2] == 23 + longer
        assert judged.logits.shape == (2, (23 + longer) * 5)
    assert PeriodDiscriminator(5, [4]).conv_post.kernel_size == (3, 1)
