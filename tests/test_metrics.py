"""PSNR, SSIM and the patch-mean baseline against closed forms and other implementations."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tokenizers_lab.errors import InputError
from tokenizers_lab.metrics import IMAGE_METRICS, image_metrics, patch_mean, psnr, ssim


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 40, generator=generator)
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def test_psnr_closed_form():
    x = torch.full((3, 3, 8, 8), 0.5)
    y = x.clone()
    y[0] += 0.1                 # error 0.01: 20 dB
    y[1, :, :4] += 0.01         # error 1e-4 on half of the image: 43.01 dB
    assert torch.allclose(psnr(x, y)[:2], torch.tensor([20.0, 40 + 10 * float(np.log10(2))]), atol=1e-3)
    assert psnr(x, y)[2] == torch.inf


def test_psnr_equals_torchmetrics(pair):
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = pair
    each = [peak_signal_noise_ratio(a[None], b[None], data_range=1.0) for a, b in zip(x, y)]
    assert torch.allclose(psnr(x, y), torch.stack(each), atol=1e-4)


def test_ssim_equals_a_reference_in_float64(pair):
    """Wang's formula with scipy's Gaussian filter, the image mirrored at its borders."""
    x, y = (t.double().numpy() for t in pair)
    wanted = []
    for a, b in zip(x, y):
        def blur(image):
            return np.stack([gaussian_filter(c, 1.5, radius=5, mode="mirror") for c in image])

        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        local = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        wanted.append(local.mean())
    assert np.allclose(ssim(*pair).numpy(), wanted, atol=1e-5)


def test_ssim_orders_and_shapes(pair):
    x, y = pair
    assert torch.allclose(ssim(x, x), torch.ones(3), atol=1e-5)
    assert (ssim(x, y) > ssim(x, 1 - x)).all()
    assert ssim(x[:1], y[:1]).shape == (1,)
    assert torch.allclose(ssim(x, y)[1:2], ssim(x[1:2], y[1:2]), atol=1e-6)      # each image as if it were alone


def test_half_precision_images_are_measured_in_float32(pair):
    x, y = (t.bfloat16() for t in pair)
    assert tuple(image_metrics(x, y)) == IMAGE_METRICS
    for name, values in image_metrics(x, y).items():
        assert values.dtype == torch.float32
        assert torch.equal(values, image_metrics(x.float(), y.float())[name])


def test_patch_mean():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    rows = [[2.5, 2.5, 4.5, 4.5], [2.5, 2.5, 4.5, 4.5], [10.5, 10.5, 12.5, 12.5], [10.5, 10.5, 12.5, 12.5]]
    assert torch.equal(patch_mean(x, 2)[0, 0], torch.tensor(rows))
    assert torch.equal(patch_mean(x, 1), x)


def test_wrong_inputs(pair):
    x, y = pair
    for metric in (psnr, ssim):
        with pytest.raises(InputError, match="one shape"):
            metric(x, y[:1])
        with pytest.raises(InputError, match="uint8"):
            metric(x, (y * 255).byte())
    with pytest.raises(InputError, match="11 pixels"):
        ssim(x[..., :10], y[..., :10])
    with pytest.raises(InputError, match="patches of 16"):
        patch_mean(x, 16)
