"""How often the intervals of all measures of samples hold the right value: 100 worlds each, at least 90 of them.

Features are Gaussians, or heavy-tailed, in a few dimensions. The right value is the exact one where it is known
(distance of infinitely many, entropy, shares), else the expectation at these counts, by the mean over the worlds.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from symbreak.intervals import entropy_interval, proportion
from symbreak.metrics import distance, memorization
from symbreak.metrics.coverage import density_coverage, precision_recall, vendi_score
from symbreak.metrics.frechet import difference, extrapolated, frechet_distance, group_distance, ratio
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.memorization import nearer_to_train, nearest_summary
from symbreak.moments.one_pass import Moments
from symbreak.studies.sensitivity import flat_range

WORLDS = 100
pytestmark = pytest.mark.slow


def spectrum(d, power):
    return torch.arange(1, d + 1, dtype=torch.float64) ** -power


def draw(g, n, d, *, power=0.0, shift=0.0, scale=1.0, tail=None):
    """Rows of a Gaussian, or of Student's law with ``tail`` degrees of freedom, at the same covariance."""
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if tail:
        heavy = torch.randn(n, tail, generator=g, dtype=torch.float64).square().sum(1, keepdim=True) / (tail - 2)
        x = x / heavy.sqrt()
    return x * scale * spectrum(d, power) + shift


def cover(one, truth=None):
    """Of how many worlds the intervals (value, low, high) of ``one(generator)`` hold the truth."""
    with np.errstate(all="ignore"):
        rows = np.array([one(torch.Generator().manual_seed(seed)) for seed in range(WORLDS)], dtype=float)
    truth = rows[:, 0].mean() if truth is None else truth
    count = int(((rows[:, 1] <= truth + 1e-12) & (truth <= rows[:, 2] + 1e-12)).sum())
    print(f"cover {count} of {WORLDS}")  # noqa: T201, for the table of docs/uncertainty.md: pytest -m slow -rP
    return count


def ends(values, key):
    return values[key], values.get(f"{key}_low", values.get("low")), values.get(f"{key}_high", values.get("high"))


# dimension, power of the spectrum, samples a repeat, repeats, reference images, degrees of freedom
DISTANCES = {
    "digits-like": (64, 0.5, 200, 5, 599, None),
    "many samples": (64, 0.5, 1000, 5, 599, None),
    "flat spectrum": (64, 0.0, 200, 5, 599, None),
    "n near d": (64, 0.0, 80, 5, 100, None),
    "small": (8, 1.0, 20, 5, 40, None),
    "unequal counts": (8, 1.0, 20, 5, 400, None),
    "heavy tails": (8, 1.0, 100, 5, 200, 6),
}


@pytest.mark.parametrize("of", ["mean", "pooled", "extrapolated", "difference", "ratio"])
@pytest.mark.parametrize("world", DISTANCES)
def test_distance(world, of):
    d, power, n, repeats, m, tail = DISTANCES[world]

    def one(g):
        x = draw(g, n * repeats, d, power=power, shift=0.1, scale=math.sqrt(1.3), tail=tail)
        reference = Moments.fit([draw(g, m, d, power=power, tail=tail)])
        if of in ("difference", "ratio"):
            near = x - 0.05 + 0.05 * draw(g, len(x), d)
            compare = difference if of == "difference" else ratio
            return compare(*(distance(z, reference, repeats, "w").to_dict() for z in (x, near)))
        groups = [Moments.fit([part], parts=1) for part in x.split(n)]
        found = group_distance(groups, reference, "w")
        if of == "mean":
            return found.mean, found.low, found.high
        beyond = extrapolated(groups, reference, found.pooled)
        return ends({**beyond, "pooled": found.pooled}, "pooled") if of == "pooled" else ends(beyond, "value")

    truth = None
    if of == "extrapolated":
        cov = torch.diag(spectrum(d, power) ** 2)
        whole = Moments(10**9, torch.full((d,), 0.1), 1.3 * cov), Moments(10**9, torch.zeros(d), cov)
        truth = frechet_distance(*whole)
    assert cover(one, truth) >= 90


MEASURES = {
    "kernel distance": (partial(kid, subsets=0), ("value",)),
    "precision, recall": (precision_recall, ("precision", "recall")),
    "density, coverage": (density_coverage, ("density", "coverage")),
}
# samples, real images, dimension, shift, degrees of freedom
SETS = {
    "2,000 against 200": (2000, 200, 4, 0.2, None),
    "200 against 200": (200, 200, 8, 0.5, None),
    "100 against 100": (100, 100, 2, 1.0, None),
    "heavy tails": (300, 300, 4, 0.0, 6),
}


@pytest.mark.parametrize("world", SETS)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_two_sets(name, world):
    n, m, d, shift, tail = SETS[world]
    measure, keys = MEASURES[name]
    found = []
    for seed in range(WORLDS):
        g = torch.Generator().manual_seed(seed)
        found.append(measure(draw(g, n, d, shift=shift, tail=tail), draw(g, m, d, tail=tail)))
    for key in keys:
        assert cover(lambda g, key=key: ends(found[g.initial_seed()], key)) >= 90


@pytest.mark.parametrize(
    ("n", "d", "tail"), [(200, 8, None), (50, 2, None), (20, 8, None), (500, 32, None), (100, 4, 3)]
)
def test_vendi(n, d, tail):
    assert cover(lambda g: ends(vendi_score(draw(g, n, d, tail=tail)), "value")) >= 90


@pytest.mark.parametrize(
    ("classes", "n", "power"), [(10, 200, 0.0), (10, 200, 1.5), (10, 1000, 0.5), (2, 80, 1.5), (100, 2000, 1.5)]
)
def test_entropy(classes, n, power):
    p = spectrum(classes, power).numpy()
    p /= p.sum()

    def one(g):
        return ends(entropy_interval(np.random.default_rng(g.initial_seed()).multinomial(n, p)), "value")

    assert cover(one, -(p * np.log2(p)).sum()) >= 90


@pytest.mark.parametrize(("n", "p"), [(10, 0.018), (50, 0.02), (1000, 0.001), (20, 0.5)])
def test_shares(n, p):
    def one(g):
        return ends(proportion(np.random.default_rng(g.initial_seed()).binomial(n, p), n), "share")

    assert cover(one, p) >= 90


@pytest.mark.parametrize(("n", "share"), [(50, 0.02), (300, 0.3)])
def test_memorized_share(n, share):
    """Of a fixed training set: samples are copies with a probability, else new."""
    train = draw(torch.Generator().manual_seed(1000), 100, 8)

    def one(g):
        copied = torch.rand(n, generator=g) < share
        copies = train[torch.randint(100, (n,), generator=g)] + 0.01 * draw(g, n, 8)
        return ends(
            nearest_summary(torch.where(copied[:, None], copies, draw(g, n, 8)), train, None)["samples"], "memorized"
        )

    assert cover(one) >= 90


@pytest.mark.parametrize(
    ("n", "m", "share", "d"), [(500, 200, 0.3, 4), (100, 500, 0.5, 4), (20, 20, 0.0, 1), (1000, 20, 0.0, 2)]
)
def test_nearer_to_train(n, m, share, d, monkeypatch):
    monkeypatch.setattr(memorization, "PERMUTATIONS", 99)  # the p-value is another test's

    def one(g):
        train, others, new = draw(g, m, d), draw(g, m, d), draw(g, n, d)
        copied = torch.rand(n, generator=g) < share
        copies = train[torch.randint(m, (n,), generator=g)] + 0.05 * draw(g, n, d)
        x = torch.where(copied[:, None], copies, new)
        near = [torch.cdist(x, z).min(1) for z in (train, others)]
        return ends(nearer_to_train(*((z.values, z.indices) for z in near), m), "share")

    assert cover(one) >= 90


@pytest.mark.parametrize(("levels", "repeats"), [(8, 5), (9, 3), (9, 5), (8, 10)])
def test_flat_range(levels, repeats):
    """It holds the best level of a curve, and of equal levels all."""
    sigma = np.arange(1.0, levels + 1)

    def one(g, bend):
        rng = np.random.default_rng(g.initial_seed())
        curve = bend * np.abs(np.arange(levels) - levels // 2)
        spread = 1 + curve  # farther, and more so
        noise = rng.standard_normal(repeats) + spread[:, None] * rng.standard_normal((levels, repeats))
        return flat_range(sigma, curve[:, None] + noise)["paired"]

    assert cover(lambda g: (0.0, *one(g, 0.3)), 1.0 + levels // 2) >= 90
    assert sum(one(torch.Generator().manual_seed(s), 0.0) == [1.0, levels] for s in range(WORLDS)) >= 90
