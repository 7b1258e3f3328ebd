import math

import numpy as np
import pytest

from symbreak.critical import CriticalTime, Curve, crossing, mean_curve, passing, passing_interval, passing_time
from symbreak.intervals import jackknife, mean_interval, percentiles, proportion, resampled
from symbreak.noise import NoiseLevel


def test_crossing_is_linear_in_log_sigma_and_takes_the_noisiest():
    sigma = np.array([0.1, 1.0, 10.0])
    assert crossing(sigma, np.array([1.0, 0.0, 1.0]), 0.5) == pytest.approx(10**0.5)
    assert crossing(sigma[::-1], np.array([3.0, 2.0, 1.0]), 5.0) is None
    assert crossing(sigma, np.array([0.0, 0.0, 0.0]), 0.0) == pytest.approx(10.0)


def test_curves_pass_between_the_levels_or_beyond_an_end():
    sigma = np.array([1.0, 100.0, 10.0])  # in any order
    falling = np.array([[4.0, 0.0, 2.0], [9.0, 7.0, 8.0], [0.5, 0.1, 0.2], [3.0, 1.0, 2.0]])
    # Halfway between two levels in log sigma; above 1 everywhere: passes at higher levels, below it: at lower ones.
    expected = [10**1.5, math.inf, 0.0, 100.0]
    assert passing(sigma, falling, 1.0).tolist() == pytest.approx(expected)
    assert passing(sigma, -falling, -1.0).tolist() == pytest.approx(expected)
    # The resamples' side is the one that the estimate, curve 0, has told: a flat resample does not change it.
    flat = np.full((1, 3), 5.0)
    assert passing(sigma, np.concatenate([falling[:1], flat]), 1.0)[1] == math.inf
    assert passing(sigma, np.concatenate([-falling[:1], flat]), 1.0)[1] == 0.0
    # Each curve with a threshold of its own.
    own = passing(sigma, falling, [3.0, 7.5, 0.2, 0.5])
    assert own.tolist() == pytest.approx([10**0.5, 10**1.5, 10.0, math.inf])


def test_the_interval_of_resampled_levels():
    passed = np.arange(1.0, 201.0)
    # Of 200 values the interval leaves out five on either side: it begins at the fifth and ends at the 195th.
    assert [float(end) for end in percentiles(passed)] == [5.0, 195.0]
    low, high, sides = passing_interval(passed[::-1])
    assert (low.sigma, high.sigma, sides) == (5.0, 195.0, ())
    low, high, sides = passing_interval(np.append(passed[4:], [0.0] * 4))
    assert (low.sigma, high.sigma, sides) == (5.0, 195.0, ())  # four of 200 beyond an end are fewer than 2.5 %
    low, high, sides = passing_interval(np.concatenate([[0.0] * 5, passed[5:194], [math.inf] * 6]))
    assert (low, high, sides) == (None, None, ("below", "above"))
    assert passing_interval(np.zeros(9)) == (None, None, ("below",))


def test_the_time_of_passing():
    sigma, about = np.array([1.0, 10.0]), ("it stays below", "height", "derived")
    # Lines in log sigma from -u to 1 - u pass zero at 10^u.
    u = np.append(0.5, np.linspace(0.1, 0.9, 201))
    found = passing_time(sigma, np.stack([-u, 1 - u], axis=1), 0.0, *about)
    assert found.sigma == pytest.approx(10**0.5)
    # 201 resamples in steps of 0.004: the sixth and the 196th.
    assert (found.low.sigma, found.high.sigma) == (pytest.approx(10**0.12), pytest.approx(10**0.88))
    assert (found.reason, found.criterion, found.source) == (None, "height", "derived")
    u = np.append(0.5, np.linspace(-0.1, 1.1, 201))
    found = passing_time(sigma, np.stack([-u, 1 - u], axis=1), 0.0, *about)
    assert (found.low, found.high) == (None, None)
    assert found.reason == "the interval ends below 1 and above 10, outside the levels measured"
    found = passing_time(sigma, np.stack([-u, 1 - u], axis=1), 2.0, *about)
    assert (found.level, found.reason) == (None, "it stays below")


def test_curves_of_means():
    sigma, values = np.array([1.0, 2.0]), np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
    student = mean_curve(sigma, values, "x")
    for i in range(2):
        assert (student.value[i], student.low[i], student.high[i]) == mean_interval(values[i])
    # All items once, then 40 resamples that hold one of them thrice: 2.5 % of 40 is the first one.
    weights = np.concatenate([np.ones((1, 3)), [[3.0, 0, 0]], np.tile([0, 3.0, 0], (38, 1)), [[0, 0, 3.0]]])
    drawn = mean_curve(sigma, values, "x", weights)
    assert drawn.value.tolist() == [2.0, 1.0]
    assert (drawn.low.tolist(), drawn.high.tolist()) == ([1.0, 0.0], [2.0, 0.0])
    one = mean_curve(sigma[:1], values[:1], "x", weights, ())
    assert (one.sigma.shape, float(one.value)) == ((), 2.0)
    # What none of 50 showed may be a share of up to 1 - .025^(1/50): resamples of nothing say nothing.
    share = mean_curve(sigma, np.array([np.zeros(50), np.arange(50) < 10]), "x", np.ones((41, 50)))
    assert (share.value.tolist(), share.low[0]) == ([0.0, 0.2], 0.0)
    assert share.high[0] == pytest.approx(1 - 0.025**0.02)
    assert (share.low[1], share.high[1]) == pytest.approx((proportion(10, 50)["low"], proportion(10, 50)["high"]))


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
        low_b, high_b = percentiles(resampled(rng.normal(size=(1, 60)), seed=i, resamples=200)[:, 0])
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
