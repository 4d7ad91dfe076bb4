"""The fixed noise of diffusion decoders is normal noise, and the same for every item."""

import pytest
import torch
from scipy import stats

from tokenizers_lab.diffusion.noise import fixed_noise, start_noise


def test_fixed_noise_is_normal_and_white():
    noise = fixed_noise(2**18, "cpu").double()
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and noise.abs().max() < 7
    for lag in (1, 2, 3, 16, 64, 128, 1000):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 0.01, lag      # 5 standard deviations
        squares = noise.square() - 1
        assert abs((squares[lag:] * squares[:-lag]).mean()) < 0.03, lag


def test_every_item_starts_alike_and_a_short_clip_as_a_long_one():
    long, short = start_noise((2, 53, 7), "cpu"), start_noise((1, 37, 7), "cpu")
    assert torch.equal(long[0], long[1]) and torch.equal(short[0], long[0, :37])
    assert torch.equal(start_noise((1, 37, 7), "cpu"), short)


def test_a_generator_draws_other_noise_for_every_item():
    first, second = (start_noise((2, 30), "cpu", torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_same_noise(strict):
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + start_noise(tuple(x.shape), x.device)

    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Noise(), (torch.zeros(2, 5, 3),), dynamic_shapes=(batch,), strict=strict).module()
    assert torch.allclose(program(torch.zeros(3, 5, 3)), start_noise((3, 5, 3), "cpu"), atol=1e-6)
