"""KID, Inception Score, precision and recall from features."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_mmd

from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.inception_score import inception_score
from tokenizers_lab.eval.kid import kernel_distance, squared_mmd
from tokenizers_lab.eval.precision_recall import in_manifold, manifold_radii, precision_recall


def normal(n: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_kid_equals_torch_fidelity_and_torchmetrics() -> None:
    first, second = normal(400, 32, 0), normal(350, 32, 1, 1.2, 0.1)
    options = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    expected = kid_features_to_metric(first.double(), second.double(), **options)
    found = kernel_distance(first, second, subsets=20, subset_size=100)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-12)
    assert found.subset_std == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-12)
    x, y = first[:200].double(), second[:200].double()
    assert squared_mmd(x, y) == pytest.approx(float(poly_mmd(x, y, degree=3, gamma=1 / 32, coef=1.0)), abs=1e-12)


def test_kid_closed_form_and_coverage() -> None:
    # one feature, N(0, 1) against N(s, 1): E (x y + 1)³ by moments of the two means
    shift = 0.7
    m = [1, shift, 1 + shift**2, shift**3 + 3 * shift]      # moments of N(s, 1)
    z = [1, 0, 1, 0]
    binomial = (1, 3, 3, 1)
    truth = sum(c * (a * a + b * b - 2 * a * b) for c, a, b in zip(binomial, m, z))
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(120):
        first, second = torch.from_numpy(rng.normal(size=(400, 1))), torch.from_numpy(rng.normal(size=(400, 1)) + shift)
        found = kernel_distance(first, second, subsets=40, subset_size=50)
        inside += found.interval.low <= truth <= found.interval.high
    assert 0.88 <= inside / 120 <= 0.995


def test_kid_needs_a_subset() -> None:
    with pytest.raises(InputError, match="at least 1000 samples"):
        kernel_distance(normal(1200, 4, 0), normal(999, 4, 1))
    assert kernel_distance(normal(20, 4, 0), normal(20, 4, 1), subset_size=20).interval is None


def test_inception_score_equals_torch_fidelity() -> None:
    logits = normal(205, 12, 0, 2.0)
    expected = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    found = inception_score(logits, splits=10, shuffle_seed=2020)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert np.std(found.splits) == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_closed_form() -> None:
    certain = torch.eye(7).repeat(5, 1) * 1e4                 # seven classes, each certain: the score is 7
    assert inception_score(certain).value == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(10, 7)).value == pytest.approx(1, rel=1e-12)
    assert len(inception_score(certain, split_size=10).splits) == 4      # 35 images: the last split has 5
    with pytest.raises(InputError, match="as many images as splits"):
        inception_score(certain[:5], splits=10)
    with pytest.raises(InputError, match="positive split_size"):
        inception_score(certain, split_size=0)


def test_inception_score_coverage() -> None:
    def draw(rng: np.random.Generator) -> float:
        return inception_score(torch.from_numpy(rng.normal(size=(300, 5)) * 2))

    expected = np.mean([draw(np.random.default_rng(10_000 + i)).value for i in range(600)])
    found = [draw(np.random.default_rng(i)) for i in range(300)]
    assert 0.91 <= np.mean([one.interval.low <= expected <= one.interval.high for one in found]) <= 0.985


def test_precision_recall_equals_torch_fidelity() -> None:
    first, second = normal(700, 8, 0, 1.2, 0.3), normal(600, 8, 1)
    precision, recall = calculate_precision_recall_full(first, second, 3, 10_000)
    found = precision_recall(first, second)
    assert (found.precision, found.recall) == (pytest.approx(precision, abs=1e-6), pytest.approx(recall, abs=1e-6))
    assert found.precision_interval.low < found.precision < found.precision_interval.high
    assert precision_recall(first, second, arithmetic="float64").precision == found.precision


def test_splits_of_images_that_are_sorted_by_class() -> None:
    logits = torch.eye(10).repeat_interleave(40, 0) * 1e4          # ten certain classes: the score is 10
    keys = [f"class_{i // 40}/{i:04d}.png" for i in range(400)]
    assert inception_score(logits, split_size=80).value == pytest.approx(2)
    found = inception_score(logits, split_size=80, keys=keys)
    assert min(found.splits) > 9 and "hash of their names" in found.protocol
    assert inception_score(logits.flip(0), split_size=80, keys=keys[::-1]) == found


def test_precision_interval_covers() -> None:
    reference = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]      # with k = 3 its manifold is [−0.15, 1.15]
    for truth in (0.5, 0.97):
        rng, inside = np.random.default_rng(0), 0
        for _ in range(300):
            points = torch.from_numpy(rng.uniform(-0.15, 1.3 / truth - 0.15, (60, 1)))
            interval = precision_recall(points, reference, arithmetic="float64").precision_interval
            inside += interval.low <= truth <= interval.high
        assert 0.92 <= inside / 300 <= 0.99
    assert interval.method == "Wilson, the other set taken as given"


def test_precision_recall_by_hand() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert manifold_radii(reference, k=1).tolist() == [1.0, 1.0, 1.0, 64.0]        # squared
    inside = in_manifold(torch.tensor([[-1.0], [-1.5], [3.0], [5.0], [18.5]]), reference, torch.tensor([1.0, 1.0, 1.0, 64.0]))
    assert inside.tolist() == [True, False, True, True, False]                      # a rim belongs to its ball
    assert precision_recall(reference, reference, k=1).precision == 1


def test_half_precision_falls_back_where_it_overflows() -> None:
    points = normal(50, 4, 0)
    assert torch.allclose(manifold_radii(points * 1000, 3, "adm-float16"), manifold_radii(points * 1000, 3), rtol=1e-6)
    half = manifold_radii(points, 3, "adm-float16")
    assert torch.equal(half, half.half().float()) and not torch.equal(half, manifold_radii(points, 3))


def test_precision_recall_needs_neighbours() -> None:
    with pytest.raises(InputError, match="at least 4 points"):
        precision_recall(normal(10, 4, 0), normal(3, 4, 1))
    with pytest.raises(InputError, match="no arithmetic"):
        precision_recall(normal(10, 4, 0), normal(10, 4, 1), arithmetic="bf16")      # type: ignore[arg-type]


def test_same_bits_with_any_number_of_threads() -> None:
    first, second = normal(1500, 40, 0), normal(1300, 40, 1, 1.1)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append((kernel_distance(first, second, 10, 300), precision_recall(first, second), inception_score(first)))
        finally:
            torch.set_num_threads(1)
    assert results[0] == results[1] and not math.isnan(results[0][0].value)
