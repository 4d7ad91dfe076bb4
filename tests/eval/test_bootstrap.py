import numpy as np
import pytest

from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.bootstrap import exact_mean, mean_interval


@pytest.mark.parametrize("n", [12, 50])
def test_interval_covers_the_true_mean_as_often_as_it_claims(n):
    rng = np.random.default_rng(n)
    trials, true_mean = 400, 3.0
    inside = 0
    for _ in range(trials):
        interval = mean_interval(rng.gamma(9.0, true_mean / 9.0, n).tolist(), resamples=500)
        inside += interval.low <= true_mean <= interval.high
    # three standard errors of a proportion of 0.95 in 400 trials are 0.033; a plain percentile interval at n = 12 covers 0.90
    assert 0.917 <= inside / trials <= 0.98


def test_interval_is_student_s_for_normal_values():
    from scipy import stats

    values = np.random.default_rng(0).normal(size=15)
    low, high = stats.t.interval(0.95, 14, values.mean(), stats.sem(values))
    interval = mean_interval(values.tolist(), resamples=20000)
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.06)


def test_order_does_not_matter():
    values = np.random.default_rng(0).lognormal(size=33)
    shuffled = np.random.default_rng(1).permutation(values)
    assert mean_interval(values.tolist()) == mean_interval(shuffled.tolist())
    assert exact_mean(values.tolist()) == exact_mean(shuffled.tolist())


def test_one_value_has_no_interval_and_nan_is_refused():
    assert mean_interval([1.0]) is None
    with pytest.raises(InputError, match="finite"):
        mean_interval([1.0, float("nan")])
