"""Published numbers: arXiv:2402.18491's measured cloning and excess-entropy curves (two Gaussians).

The data, with their standard errors, are in published.json.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from symbreak.laws import Empirical, Mixture
from symbreak.noise import generator
from symbreak.phases.branches import Paths
from symbreak.phases.cloning import clone_agreement
from symbreak.phases.information import excess_entropy
from symbreak.phases.speciation import cloning_probability

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
CLONING = PUBLISHED["two_gaussians_cloning"]["d"]
EXCESS = PUBLISHED["two_gaussians_excess_entropy"]


def world(d: int) -> Mixture:
    """Means +-ones(d), variance 1."""
    return Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)


def error_of(phi: np.ndarray, pairs: int) -> np.ndarray:
    """Standard error from the exact phi, with a floor: some measured values are exactly 1."""
    return np.maximum(np.sqrt(phi * (1 - phi) / pairs), 1e-3)


def test_cloning_curves_by_quadrature():
    beyond, points = 0, 0
    for d, curve in CLONING.items():
        phi = cloning_probability(world(int(d)), np.sqrt(np.expm1(2 * np.array(curve["tau"])))).value
        off = np.abs(phi - curve["phi"]) / error_of(phi, 10_000)
        beyond, points = beyond + int((off > 3).sum()), points + len(off)
    assert points == 76
    assert beyond <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("d", "pairs"), [(256, 2000), (1024, 1000)])
def test_cloning_curves_by_reverse_simulation(d, pairs):
    """Our own clones in the full dimension, through the general law, and in the reduced world."""
    curve = CLONING[str(d)]
    sigma = np.sqrt(np.expm1(2 * np.array(curve["tau"])))
    phi = cloning_probability(world(d), sigma).value
    line = Mixture.from_parameters([[math.sqrt(d)], [-math.sqrt(d)]], 1.0)
    full = clone_agreement(world(d), sigma, pairs=pairs, steps=150, paths=Paths(dtype=torch.float32))
    reduced = clone_agreement(line, sigma, pairs=10_000, steps=150)
    published = np.array(curve["phi"])
    for one, n, other, m in (
        (full.value, pairs, published, 10_000),
        (reduced.value, 10_000, published, 10_000),
        (full.value, pairs, reduced.value, 10_000),
    ):
        error = np.hypot(error_of(phi, n), error_of(phi, m))
        # 19 levels at a time: one beyond 3 standard errors is expected once in twenty such curves.
        assert (np.abs(one - other) > 3 * error).sum() <= 1
        assert (np.abs(one - other) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("d", "queries"),
    [(256, 400), pytest.param(1024, 400, marks=pytest.mark.slow), pytest.param(4096, 250, marks=pytest.mark.slow)],
)
def test_excess_entropy_curves(d, queries):
    n, a = 20_000, math.log(20_000) / d
    sigma = np.sqrt(np.expm1(2 * np.array(EXCESS["tau"])))
    published, error = (np.array(EXCESS[k][str(d)]) for k in ("f_over_alpha", "standard_error"))
    exact = excess_entropy(world(d), sigma, samples=n).value / a
    clear = published > 0.3
    assert clear.sum() >= 13
    assert (np.abs(published - exact)[clear] < 3.5 * error[clear]).all()
    # Without the class information the formula misses by far where the classes are resolved.
    plain = 1 - 0.5 * d * np.log1p(1 / sigma**2) / math.log(n)
    assert (np.abs(published - plain) / error)[clear].max() > 6
    ours = excess_entropy(Empirical(world(d).sample(n, 0.0, generator(1))), sigma, queries=queries)
    own = (ours.high - ours.low) / 2 / 1.96 / a
    assert (np.abs(ours.value / a - published) < 3 * np.hypot(own, error)).all()
    assert np.median(own) < np.median(error)  # the control variate, with far fewer queries than theirs
