"""The resampler against torchaudio's function, and in pieces against itself."""

import pytest
import torch
from torchaudio.functional import resample as reference

from tokenizers_lab.data import resample as module
from tokenizers_lab.data.resample import Resampler, resample, resample_span, resampled_length

RATES = [
    (16_000, 24_000), (24_000, 16_000), (44_100, 16_000), (16_000, 44_100), (48_000, 16_000), (22_050, 24_000), (192_000, 16_000),
]   # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.2


@pytest.mark.parametrize("old, new", RATES)
def test_equals_torchaudio(old, new):
    x = noise(2, 9001)
    expected = reference(x.double(), old, new).float()
    found = resample(x, old, new)
    assert found.shape == expected.shape == (2, resampled_length(9001, old, new))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("old, new", RATES)
def test_the_way_without_a_table_gives_the_same(old, new, monkeypatch):
    x = noise(3, 9001)
    expected = resample(x, old, new)
    monkeypatch.setattr(module, "MAX_KERNEL", 0)
    monkeypatch.setattr(module, "DIRECT_OUTPUTS", 1000)
    assert (resample(x, old, new) - expected).abs().max() < 1e-6


def test_rates_without_common_factors_need_no_huge_table():
    x = torch.sin(torch.arange(44_101) * (2 * torch.pi * 440 / 44_101))[None]
    found = resample(x, 44_101, 16_000)
    expected = torch.sin(torch.arange(16_000) * (2 * torch.pi * 440 / 16_000))
    assert found.shape == (1, 16_000) and (found[0] - expected)[100:-100].abs().max() < 5e-3


@pytest.mark.parametrize("old, new", [*RATES, (16_000, 16_000), (16_001, 16_000), (8_000, 44_101)])
@pytest.mark.parametrize("pieces", [(1,) * 50, (7, 4000, 1, 0, 12_000), (20_001,), (3,)])
def test_pieces_joined_equal_the_whole(old, new, pieces):
    x = noise(2, sum(pieces))
    resampler = Resampler(old, new)
    out = [resampler.push(piece) for piece in x.split(list(pieces), dim=1)]
    rest = resampler.flush()
    joined = torch.cat(out + ([rest] if rest is not None else []), dim=1)
    whole = resample(x, old, new)
    assert joined.shape == whole.shape and (joined - whole).abs().max() < 1e-6


def test_the_resampler_holds_little_and_answers_early():
    resampler = Resampler(48_000, 16_000)
    given = 0
    for i in range(1, 200):
        given += resampler.push(noise(1, 480)).shape[1]
        assert resampler._held.untyped_storage().nbytes() < 4 * (480 + 400)
        assert given >= 160 * i - 20
    assert Resampler(16_000, 24_000).flush() is None


@pytest.mark.parametrize("old, new", [*RATES, (16_000, 16_000), (16_001, 16_000)])
@pytest.mark.parametrize("start, samples", [(0, 100), (57, 1), (5000, 2000)])
def test_the_span_that_a_stretch_needs(old, new, start, samples):
    x = noise(1, 40_000)
    whole = resample(x, old, new)
    if start + samples > whole.shape[1]:
        pytest.skip("beyond the end")
    first, last, skip = resample_span(start, samples, old, new)
    part = resample(x[:, first:last], old, new)[:, skip : skip + samples]
    assert (part - whole[:, start : start + samples]).abs().max() < 1e-6
    assert last - first <= samples * old / new + 4 * max(old, 200)
