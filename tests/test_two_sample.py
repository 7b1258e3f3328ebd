"""Sliced Wasserstein distance and classifier two-sample test against closed forms, and what they say by chance."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from symbreak.metrics.two_sample import classifier_test, sliced_wasserstein
from symbreak.noise import generator
from symbreak.runtime.errors import InputError


def draws(n, d, seed, spread=1.0):
    return spread * torch.randn(n, d, generator=generator(seed, 1), dtype=torch.float64)


def test_a_shift_is_measured_exactly():
    """|t . c|^2 sums to |c|^2 over an orthonormal basis: SW = |c| / sqrt(d) whatever the directions."""
    x, c = draws(50, 7, 0), draws(1, 7, 1)
    for directions in (7, 100, 130):
        value = sliced_wasserstein(x, x + c, directions=directions)
        assert value["value"] == pytest.approx(float(c.norm()) / math.sqrt(7), rel=1e-12)
        assert value["directions"] % 7 == 0


def test_unequal_counts_are_the_distance_of_quantile_functions():
    x, y = draws(30, 1, 2), draws(42, 1, 3)
    # By brute force: 30 and 42 rows, each repeated to 210.
    a, b = (np.sort(np.repeat(z.numpy()[:, 0], 210 // len(z))) for z in (x, y))
    assert sliced_wasserstein(x, y)["value"] == pytest.approx(math.sqrt(((a - b) ** 2).mean()), rel=1e-12)
    assert sliced_wasserstein(x, x)["value"] == 0


def test_gaussians_of_two_widths():
    """Along every direction N(0, s^2) against N(0, r^2): W_2 = |s - r|."""
    made = sliced_wasserstein(draws(4000, 5, 4, 2.0), draws(4000, 5, 5, 0.5))
    assert made["value"] == pytest.approx(1.5, abs=0.03)  # 1.5 standard errors of a spread of 4,000 rows a direction
    assert made["low"] < 1.5 < made["high"]


def test_the_interval_covers_a_shift():
    """Of 100 pairs of samples 95 are expected to cover, 88 is three errors below; the bias is small at |c| = 2."""
    inside = 0
    for seed in range(100):
        made = sliced_wasserstein(draws(150, 3, seed) + 2.0, draws(150, 3, 1000 + seed), directions=30)
        inside += made["low"] <= 2.0 <= made["high"]
    assert inside >= 88


def test_classifiers_find_what_bayes_rule_finds():
    """N(+-c / 2, 1): right with probability Phi(|c| / 2); N(0, 1) against N(0, 4): seen by the squares alone."""
    shift = torch.tensor([1.2, -0.9, 0.0], dtype=torch.float64)
    told = classifier_test(draws(3000, 3, 6) + shift, draws(3000, 3, 7))
    best = stats.norm.cdf(float(shift.norm()) / 2)
    assert told["logistic"]["share"] == pytest.approx(best, abs=0.03)  # three errors of 3,000
    assert best - 0.04 < told["knn"]["share"] < best + 0.03
    assert told["logistic"]["of"] == 3000
    wide = classifier_test(draws(3000, 1, 8, 2.0), draws(3000, 1, 9))
    at = math.sqrt(8 * math.log(2) / 3)  # where the two densities cross
    best = 0.5 * (2 * stats.norm.cdf(at) - 1 + 2 * (1 - stats.norm.cdf(at / 2)))
    assert wide["logistic"]["share"] == pytest.approx(best, abs=0.03)


def test_equal_laws_are_told_apart_by_chance_alone():
    """The p-value is at most 0.1 in about a tenth of 120 pairs: at most 21 of them, three errors above 12."""
    small = {"logistic": 0, "knn": 0}
    for seed in range(120):
        told = classifier_test(draws(60, 3, seed), draws(60, 3, 500 + seed), seed=seed)
        for name in small:
            small[name] += told[name]["p_value"] <= 0.1
    assert max(small.values()) <= 21


def test_bad_input():
    for call, said in (
        (lambda: sliced_wasserstein(draws(9, 2, 0), draws(9, 3, 0)), "expected .N, F. and .M, F."),
        (lambda: sliced_wasserstein(draws(3, 2, 0), draws(9, 2, 0)), "expected at least 4 of each"),
        (lambda: classifier_test(draws(19, 2, 0), draws(90, 2, 0)), "expected 20 of each"),
        (lambda: classifier_test(draws(90, 2, 0), draws(90, 3, 0)), "expected .N, F., .M, F."),
    ):
        with pytest.raises(InputError, match=said):
            call()
    same = classifier_test(torch.ones(40, 2), torch.ones(40, 2))  # nothing varies
    assert same["logistic"]["share"] == pytest.approx(0.5, abs=0.2)
