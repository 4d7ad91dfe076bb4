"""Fréchet distance: closed forms, torch-fidelity's arithmetic, and what its interval promises."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.fid import evaluate_frechet, frechet_distance
from tokenizers_lab.eval.statistics import Statistics, compute_statistics
from tokenizers_lab.parity import verify

PARITY = Path(__file__).parents[1] / "parity" / "adm_evaluator"


def gaussian(n: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated float32 features."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(n, width, generator=generator) @ mix) * scale + shift


def exact(mean: list[float], variances: list[float]) -> Statistics:
    return Statistics(torch.tensor(mean).double(), torch.diag(torch.tensor(variances).double()), None)


def torch_fidelity(first: torch.Tensor, second: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(features) for features in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_every_output_of_adms_evaluator() -> None:
    checks = verify("adm_evaluator", PARITY)
    assert [check for check in checks if check.failed] == []
    assert sum(check.verdict == "ok" for check in checks) == 18


def test_closed_forms() -> None:
    # commuting covariances: |μ₁ − μ₂|² + Σ (σ₁ − σ₂)²
    assert frechet_distance(exact([0, 0, 3], [1, 4, 9]), exact([1, 0, 1], [4, 4, 1])) == pytest.approx(5 + 1 + 0 + 4, abs=1e-12)
    assert frechet_distance(exact([0, 0], [1, 0]), exact([0, 0], [0, 1])) == pytest.approx(2, abs=1e-12)      # singular
    # covariances that do not commute: in two dimensions tr A^½ = √(tr A + 2 √det A)
    first, second = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([[1.0, 0.0], [0.0, 5.0]]).double()
    product = first @ second
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    found = frechet_distance(Statistics(torch.zeros(2).double(), first, None), Statistics(torch.zeros(2).double(), second, None))
    assert found == pytest.approx(4 + 6 - 2 * root, abs=1e-12)


@pytest.mark.parametrize(("n", "width"), [(400, 64), (50, 64), (3000, 300)])
def test_equals_torch_fidelity(n: int, width: int) -> None:
    first, second = gaussian(n, width, 0), gaussian(n + 7, width, 1, 1.3, 0.2)
    assert evaluate_frechet(first, second, uncertainty=False).value == pytest.approx(torch_fidelity(first, second), abs=1e-5)


def test_equals_the_square_root_of_pytorch_fid_and_torchmetrics() -> None:
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    one, two = compute_statistics(gaussian(500, 40, 0)), compute_statistics(gaussian(500, 40, 1, 1.3, 0.2))
    root = sqrtm(one.covariance.numpy() @ two.covariance.numpy())
    scipys = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * np.trace(root.real)
    assert frechet_distance(one, two) == pytest.approx(float(scipys), abs=1e-9)
    other = _compute_fid(one.mean, one.covariance, two.mean, two.covariance)
    assert frechet_distance(one, two) == pytest.approx(float(other), abs=1e-6)


def test_singular_covariances_equal_the_nuclear_norm() -> None:
    # tr (S1 S2)^½ is the nuclear norm of Aᵀ B where S1 = A Aᵀ, S2 = B Bᵀ
    first, second = gaussian(8, 32, 0).double(), gaussian(9, 32, 1).double()
    a, b = [(x - x.mean(dim=0)).T / math.sqrt(len(x) - 1) for x in (first, second)]
    expected = (first.mean(0) - second.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.svdvals(a.T @ b).sum()
    one, two = compute_statistics(first), compute_statistics(second)
    assert frechet_distance(one, two) == pytest.approx(float(expected), abs=1e-9)
    one.factor = two.factor = None      # as read from files
    assert frechet_distance(one, two) == pytest.approx(float(expected), abs=1e-5)


def test_same_bits_with_any_number_of_threads() -> None:
    first, second = gaussian(5000, 300, 0), gaussian(4097, 300, 1, 1.2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append((evaluate_frechet(first, second), evaluate_frechet(first[:4097], second, paired=True)))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert results[0] == results[1] == results[2]


def test_influence_equals_delete_one_jackknife() -> None:
    first, second = gaussian(150, 4, 0), gaussian(150, 4, 1, 1.3, 0.3)
    base = evaluate_frechet(first, second, paired=True)

    def without(i: int) -> float:
        keep = torch.arange(len(first)) != i
        return frechet_distance(compute_statistics(first[keep]), compute_statistics(second[keep]))

    values = np.array([without(i) for i in range(len(first))])
    n = len(values)
    deviation = math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
    assert base.interval is not None and base.bias is not None
    assert (base.interval.high - base.value) / 1.959964 == pytest.approx(deviation, rel=0.03)
    assert base.bias == pytest.approx((n - 1) * (values.mean() - base.value), rel=0.1)


@pytest.mark.parametrize(
    ("width", "n", "shift", "scale", "paired"), [(4, 200, 1.0, 1.2, False), (16, 600, 1.0, 1.1, False), (16, 400, 0.3, 0.9, True)]
)
def test_interval_covers_as_often_as_it_claims(width: int, n: int, shift: float, scale: float, paired: bool) -> None:
    """Of 300 repetitions 95 % ± 3 standard errors: the interval around the value covers the distance expected at this n,
    the one around value − bias covers the true distance, known in closed form."""
    rng = np.random.default_rng(0)
    deviations = np.linspace(0.3, 2, width)
    results = []
    for _ in range(300):
        first = rng.normal(size=(n, width)) * deviations
        if paired:
            second = first * scale + shift / math.sqrt(width) + 0.3 * rng.normal(size=(n, width))
        else:
            second = rng.normal(size=(n, width)) * deviations * scale + shift / math.sqrt(width)
        results.append(evaluate_frechet(torch.from_numpy(first), torch.from_numpy(second), paired=paired))
    second_deviations = np.sqrt((deviations * scale) ** 2 + 0.3**2) if paired else deviations * scale
    truth = shift**2 + ((deviations - second_deviations) ** 2).sum()
    values = np.array([result.value for result in results])
    halves = np.array([result.interval.high - result.value for result in results])
    biases = np.array([result.bias for result in results])
    assert 0.912 <= np.mean(abs(values - values.mean()) <= halves) <= 0.988
    assert 0.912 <= np.mean(abs(values - biases - truth) <= halves) <= 0.988
    if width > 4:
        assert np.mean(abs(values - truth) <= halves) < 0.9      # without the correction it would not


def test_fixed_statistics_as_reference_vary_less() -> None:
    first, second = gaussian(500, 8, 0), gaussian(500, 8, 1, 1.3, 0.5)
    both, fixed = evaluate_frechet(first, second), evaluate_frechet(first, compute_statistics(second))
    assert fixed.value == both.value
    assert fixed.interval.high - fixed.interval.low < both.interval.high - both.interval.low


def test_too_few_samples_are_flagged() -> None:
    result = evaluate_frechet(gaussian(8, 16, 0), gaussian(40, 16, 1))
    assert result.interval is None and any("8 samples" in warning for warning in result.warnings)
    assert not evaluate_frechet(gaussian(40, 16, 0), gaussian(40, 16, 1)).warnings


def test_identical_sets() -> None:
    features = gaussian(300, 16, 0)
    result = evaluate_frechet(features, features, paired=True)
    assert abs(result.value) < 1e-9 and abs(result.interval.high) < 1e-6


def test_bad_features() -> None:
    good = gaussian(40, 8, 0)
    bad = good.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(InputError, match="1 of 40 samples are NaN or infinite \\(first: 3\\)"):
        evaluate_frechet(bad, good)
    with pytest.raises(InputError, match="different networks"):
        evaluate_frechet(good, gaussian(40, 7, 0))
    with pytest.raises(InputError, match="cannot be paired"):
        evaluate_frechet(good, gaussian(41, 8, 0), paired=True)
    with pytest.raises(InputError, match="at least two"):
        evaluate_frechet(good[:1], good)
