import numpy as np
import pytest
import torch
from toy import Toy, ToyConfig, batches, pictures

from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval.latents import LatentMoments, collect_latent_stats, latent_statistics, principal_colours
from tokenizers_lab.tokenizer import ImageEncoding

N = 9


def raw(model, images) -> np.ndarray:
    """All latent vectors, (N h w, C) float64."""
    with torch.inference_mode():
        return model.encode(images).posterior.mean.double().permute(0, 2, 3, 1).reshape(-1, model.cfg.channels).numpy()


@pytest.mark.parametrize("size", [1, 4, N])
def test_collected_statistics_normalise_the_latents(fitted, size):
    images = pictures(N)
    vectors = raw(fitted, images)
    before = fitted.reconstruct(images)
    mean, std = collect_latent_stats(fitted, batches(images, size))
    assert mean.numpy() == pytest.approx(vectors.mean(0), abs=1e-6)
    assert std.numpy() == pytest.approx(vectors.std(0), rel=1e-6)
    normalised = fitted.encode(images).latents.double()
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5 and (normalised.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert (fitted.reconstruct(images) - before).abs().max() < 1e-5
    again = collect_latent_stats(fitted, batches(images, size))
    assert torch.equal(again[0], mean) and torch.equal(again[1], std), "from un-normalised latents: a second call changes nothing"


def test_double_sums_survive_a_large_offset(fitted):
    with torch.no_grad():
        fitted.analysis.bias += 1000.0
    images = pictures(N)
    _, std = collect_latent_stats(fitted, batches(images, 2))
    assert std.numpy() == pytest.approx(raw(fitted, images).std(0), rel=1e-4)


def test_report_of_continuous_latents(fitted):
    images = pictures(N)
    with torch.no_grad():      # a dead channel
        fitted.analysis.weight[2] = 0
        fitted.analysis.bias[2] = 0
    collect_latent_stats(fitted, batches(images, 4))
    result, colours = latent_statistics(fitted, batches(images, 4))
    assert result == latent_statistics(fitted, batches(images, 1))[0]
    assert result["n"] == N and result["shape"] == [6, 4, 4]
    assert result["floats_per_image"] == 96 and result["values_per_float"] == 32
    vectors = raw(fitted, images)
    assert result["active_units"] == (vectors.var(0) > 0.01).sum() < 6
    assert result["raw_std"] == pytest.approx(vectors.std(0).tolist(), abs=1e-6)
    kl = 0.5 * (vectors**2 + np.exp(-3.0) - 1 + 3.0).sum() / N / np.log(2)
    assert result["kl_bits_per_image"] == pytest.approx(kl, rel=1e-6)
    painted = colours.paint(fitted.encode(images).latents)
    assert painted.shape == (N, 4, 4, 3) and painted.dtype == np.uint8 and painted.std() > 20


def test_principal_axes_are_those_of_an_svd():
    vectors = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.5, 2]) + 7
    moments = LatentMoments()
    for part in vectors.split(123):
        moments.add(part)
    colours = principal_colours(moments)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    assert colours.scale == pytest.approx(singular[:3] / np.sqrt(500), rel=1e-6)
    assert np.abs((colours.axes * axes[:3]).sum(1)) == pytest.approx(np.ones(3), abs=1e-6)
    assert colours.explained == pytest.approx((singular**2 / (singular**2).sum()).tolist(), rel=1e-6)


class Codes(Toy):
    """Gives two codebooks' indices."""

    codebook_size = 16

    def encode(self, images, sample=False, generator=None):
        first = torch.zeros(len(images), 1, 4, 4, dtype=torch.int64)
        return ImageEncoding(codes=torch.cat([first, torch.arange(16).reshape(1, 1, 4, 4).expand_as(first)], 1))


def test_report_of_codes():
    result, colours = latent_statistics(Codes(ToyConfig()), batches(pictures(3), 2))
    assert colours is None and result["kind"] == "codes"
    assert result["codes_used"] == [1, 16] and result["perplexity"] == pytest.approx([1, 16])
    assert result["bits_per_image"] == 2 * 4 * 4 * 4


def test_wrong_inputs_are_typed_errors(fitted):
    with pytest.raises(DataError):
        latent_statistics(fitted, [])
    with pytest.raises(DataError):
        collect_latent_stats(fitted, [])
    with pytest.raises(InputError, match="codes only"):
        collect_latent_stats(Codes(ToyConfig()), batches(pictures(1), 1))
    with torch.no_grad():
        fitted.analysis.weight[0, 0] = float("nan")
    for function in (latent_statistics, collect_latent_stats):
        with pytest.raises(InputError, match="not finite"):
            function(fitted, batches(pictures(1), 1))
