import math

import numpy as np
import pytest

from symbreak.critical import CriticalTime, Curve, bootstrap, crossing, jackknife, mean_interval
from symbreak.noise import NoiseLevel


def test_crossing_is_linear_in_log_sigma_and_takes_the_noisiest():
    sigma = np.array([0.1, 1.0, 10.0])
    assert crossing(sigma, np.array([1.0, 0.0, 1.0]), 0.5) == pytest.approx(10**0.5)
    assert crossing(sigma[::-1], np.array([3.0, 2.0, 1.0]), 5.0) is None
    assert crossing(sigma, np.array([0.0, 0.0, 0.0]), 0.0) == pytest.approx(10.0)


def test_intervals_cover_at_the_stated_rate():
    rng = np.random.default_rng(0)
    hits = {"t": 0, "jackknife": 0, "bootstrap": 0}
    repeats = 300
    for i in range(repeats):
        x = rng.normal(size=8)
        _, low, high = mean_interval(x)
        hits["t"] += low <= 0 <= high
        # the jackknife of a mean is the t interval of the parts
        low_j, high_j = jackknife(x.mean(), np.array([np.delete(x, j).mean() for j in range(8)]))
        assert (low_j, high_j) == pytest.approx((low, high))
        hits["jackknife"] += low_j <= 0 <= high_j
        low_b, high_b = bootstrap(rng.normal(size=60), seed=i, resamples=200)
        hits["bootstrap"] += low_b <= 0 <= high_b
    for name, n in hits.items():
        # 95 % of 300 with a standard error of 1.3 %; the percentile bootstrap is known to be a little short
        assert 0.89 * repeats < n < 0.99 * repeats, name


def test_one_value_has_no_interval():
    assert mean_interval(np.array([2.0]))[0] == 2.0
    assert math.isnan(mean_interval(np.array([2.0]))[1])
    assert math.isnan(jackknife(1.0, np.array([1.0]))[0])


def test_curve_and_critical_time_become_plain_values():
    c = CriticalTime(NoiseLevel(1.0), None, None, criterion="x")
    assert c.to_dict()["level"]["sigma"] == 1.0
    assert CriticalTime(None, reason="nothing there").sigma is None
    curve = Curve([1, 2], [3, 4], [2, 3], [4, 5], "f")
    assert curve.to_dict()["value"] == [3.0, 4.0]
    with pytest.raises(ValueError, match="one length"):
        Curve([1, 2], [1], [1], [1])
