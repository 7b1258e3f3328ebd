import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from symbreak.critical import Curve
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import as_denoiser
from symbreak.noise import generator
from symbreak.phases.gaussian_tests import (
    MULTIVARIATE,
    PROJECTED,
    Gaussianity,
    first_rejection,
    gaussianity,
    henze_zirkler,
    holm,
    mardia,
)
from symbreak.phases.reverse_paths import reverse_states
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from tests.worlds import gaussian_law, two_gaussians

QUICK = {"modes": 2, "directions": 3, "simulations": (199, 1999)}
# One null for all repeats: simulations of 1,999 and 9,999.
MANY = {"modes": 3, "directions": 5, "samples": 100, "simulations": (1999, 9999)}


def test_mardia_against_its_definition():
    x = np.random.default_rng(0).gamma(2.0, size=(40, 3))
    c = x - x.mean(0)
    g = c @ np.linalg.inv(c.T @ c / len(c)) @ c.T
    b1, b2 = mardia(x)
    assert b1 == pytest.approx((g**3).mean(), rel=1e-10)
    assert b2 == pytest.approx((np.diag(g) ** 2).mean(), rel=1e-10)
    # in one dimension they are the squared skewness and the kurtosis
    b1, b2 = mardia(x[:, :1])
    assert b1 == pytest.approx(stats.skew(x[:, 0]) ** 2, rel=1e-10)
    assert b2 == pytest.approx(stats.kurtosis(x[:, 0], fisher=False), rel=1e-10)


def test_henze_zirkler_is_a_distance_of_characteristic_functions():
    x = np.random.default_rng(1).gamma(2.0, size=(30, 1))
    y = (x[:, 0] - x.mean()) / x.std()
    beta = (3 * len(y) / 4) ** 0.2 / math.sqrt(2)

    def integrand(t):
        return abs(np.exp(1j * t * y).mean() - math.exp(-0.5 * t * t)) ** 2 * stats.norm.pdf(t, scale=beta)

    expected = len(y) * integrate.quad(integrand, -12 * beta, 12 * beta, limit=400)[0]
    assert henze_zirkler(x) == pytest.approx(expected, rel=1e-7)


def test_statistics_do_not_see_affine_maps():
    rng = np.random.default_rng(2)
    x = rng.gamma(2.0, size=(60, 3))
    moved = x @ rng.normal(size=(3, 3)) + 5.0
    assert mardia(moved) == pytest.approx(mardia(x), rel=1e-9)
    assert henze_zirkler(moved) == pytest.approx(henze_zirkler(x), rel=1e-9)


def test_projections_against_scipy():
    x = torch.from_numpy(np.random.default_rng(3).gamma(2.0, size=(80, 1)))
    found = gaussianity({1.0: x}, modes=1, directions=0, simulations=(19, 99))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer scipy says that its p-values will come another way
        expected = stats.anderson(x[:, 0].numpy(), "norm").statistic
    assert abs(found.statistics["Anderson-Darling"][0, 0]) == pytest.approx(expected, rel=1e-9)
    assert found.statistics["D'Agostino K2"][0, 0] == pytest.approx(stats.normaltest(x[:, 0]).statistic, rel=1e-9)


def test_holm_is_the_step_down_procedure():
    rng = np.random.default_rng(4)
    for _ in range(50):
        p = rng.random(6) ** 3
        order = np.argsort(p)
        fails = [i for i in range(6) if p[order[i]] > 0.05 / (6 - i)]
        rejected = set(order[: fails[0]] if fails else order)
        assert set(np.flatnonzero(holm(p) <= 0.05)) == rejected


def test_under_the_null_five_in_a_hundred_reject():
    """Gaussian data of a steep spectrum, tested in the modes of the same images before noise."""
    law = Gaussian(Moments(2, torch.zeros(6), torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.0]))))
    repeats, hits = 400, {name: np.zeros(2) for name in (*MULTIVARIATE, *PROJECTED)}
    single = []
    for r in range(repeats):
        x = law.sample(100, 0.0, generator(r, 7))
        found = gaussianity(x, [0.5, 5.0], seed=r, **MANY)
        for name, rejected in found.rejected.items():
            hits[name] += rejected
        single.append(found.raw["Anderson-Darling"][:, 0])
    for name in MULTIVARIATE:
        # Binomial error .0109 of 400 repeats; the simulated 5 % point itself is off by sqrt(.05 .95 / 2000) = .0049:
        # together .0120. Twice 3 tests: 3.5 standard errors are passed by chance once in 360 runs.
        assert np.abs(hits[name] / repeats - 0.05).max() < 3.5 * 0.0120, name
    for name in PROJECTED:
        # Holm is exact for independent directions, below that otherwise: no lower bound but that it rejects at all.
        assert (hits[name] / repeats < 0.05 + 3.5 * 0.0120).all(), name
        assert hits[name].sum() > 0
    # A single direction is exactly uniform: Kolmogorov-Smirnov at one in a thousand, p-values of 1/10,000 steps.
    assert stats.kstest(np.array(single)[:, 0], "uniform").pvalue > 1e-3


def test_two_clusters_are_seen_below_and_not_far_above():
    law = two_gaussians(4.0, 0.1, dim=3)
    found = gaussianity(law, np.geomspace(0.2, 40.0, 8), samples=400, **{**QUICK, "simulations": (399, 1999)})
    for name in (*MULTIVARIATE[1:], *PROJECTED):
        assert found.rejected[name][0], name
        assert not found.rejected[name][-1], name
        at = first_rejection(found, name)
        assert at.low.sigma == at.sigma < at.high.sigma
        assert "400 samples" in at.reason
        # Along m the excess kurtosis is -2 M^2 / (M + s2 + sigma^2)^2, which 400 samples (standard error sqrt(24 / n)
        # = .245) tell from 0 at four errors where it is .98: sigma^2 = 4 sqrt(2 / .98) - 4.1, sigma 1.27. The modes'
        # own tests share their power with other directions: between half of that and twice.
        assert 0.6 < at.sigma < 2.6, name
    # a symmetric law has no skewness, but twice as many clusters on one side have
    lopsided = gaussianity(two_gaussians(4.0, 0.1, 3, (0.8, 0.2)), [0.3, 40.0], samples=400, **QUICK)
    assert lopsided.rejected["Mardia skewness"].tolist() == [True, False]


def test_more_samples_see_it_earlier():
    law = two_gaussians(4.0, 0.1, dim=2)
    at = [
        first_rejection(
            gaussianity(law, np.geomspace(0.3, 8.0, 7), samples=n, modes=1, directions=0, simulations=(299, 999)),
            "Mardia kurtosis",
        ).sigma
        for n in (50, 500)
    ]
    assert at[0] < at[1]


def test_no_rejection_is_an_answer_with_a_reason():
    found = gaussianity(gaussian_law(), [1.0, 4.0], samples=100, **QUICK)
    nowhere = first_rejection(found, "Henze-Zirkler")
    assert nowhere.level is None
    assert "does not reject at sigma 1, the lowest level; 100 samples" in nowhere.reason
    assert found.to_dict()["first_rejection"]["Henze-Zirkler"]["level"] is None
    few = gaussianity(two_gaussians(4.0, 0.1), [0.1, 0.2], samples=30, modes=1, directions=0, simulations=(9, 9))
    assert "at least 19 are needed" in first_rejection(few, "Henze-Zirkler").reason


def test_a_chance_rejection_above_is_no_finding():
    p = np.array([0.001, 0.03, 0.2, 0.001])
    names = (*MULTIVARIATE, *PROJECTED)
    found = Gaussianity(np.array([1.0, 2.0, 3.0, 4.0]), 50, 2, 2, 0.05, {}, dict.fromkeys(names, p), {}, (999, 999))
    at = first_rejection(found, "Henze-Zirkler")
    assert (at.low.sigma, at.sigma, at.high.sigma) == (2.0, 2.0, 3.0)
    every = replace(found, p_values={"Henze-Zirkler": np.zeros(4)})
    assert first_rejection(every, "Henze-Zirkler").sigma == 4.0
    assert first_rejection(every, "Henze-Zirkler").high is None


def test_data_and_their_states_are_one_thing():
    law = two_gaussians(4.0, 0.1, dim=3)
    x = law.sample(80, 0.0, generator(1))
    curve = Curve([0.5], [2.0], [1.0], [3.0], "nats")
    found = gaussianity(x, [0.5], moments=law.moments, **QUICK)
    picks = torch.randperm(80, generator=generator(0, 57))
    noise = torch.randn(80, 3, generator=generator(0, 51, 0), dtype=torch.float64)
    again = gaussianity({0.5: x[picks] + 0.5 * noise}, moments=law.moments, **QUICK)
    for name in found.p_values:
        assert np.array_equal(found.statistics[name], again.statistics[name])
    with pytest.raises(InputError, match=r"dataclasses.replace\(answer, nats=...\)"):
        gaussianity(x, [0.5], nats=curve)
    assert replace(found, nats=curve).to_dict()["nats"] == curve.to_dict()
    counts = found.directions_rejected("bh")["Anderson-Darling"], found.directions_rejected()["Anderson-Darling"]
    assert counts[0][0] >= counts[1][0] >= 1  # Benjamini-Hochberg rejects whatever Holm does


def test_finished_levels_are_taken_again_and_no_others(tmp_path):
    law, seen = two_gaussians(4.0, 0.1, dim=3), []
    first = gaussianity(law, [0.5, 1.0], samples=60, run=Run(tmp_path), **QUICK)
    parts = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    run = Run(tmp_path, progress=lambda *a: seen.append(a))
    again = gaussianity(law, [0.5, 1.0], samples=60, run=run, **QUICK)
    assert first.to_dict() == again.to_dict()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == parts
    assert seen == [("gaussianity", 1, 2), ("gaussianity", 2, 2)]
    # Another law, seed or states have other parts.
    other = two_gaussians(4.0, 0.2, dim=3)
    for source, seed in ((other, 0), (law, 1)):
        whole = gaussianity(source, [0.5, 1.0], samples=60, seed=seed, **QUICK)
        assert (
            gaussianity(source, [0.5, 1.0], samples=60, seed=seed, run=Run(tmp_path), **QUICK).to_dict()
            == whole.to_dict()
        )
    for scale in (1.0, 2.0):
        states = {0.5: law.sample(60, 0.5, generator(3)), 1.0: scale * law.sample(60, 1.0, generator(4)) ** 3}
        whole = gaussianity(states, **QUICK)
        assert gaussianity(states, run=Run(tmp_path), **QUICK).to_dict() == whole.to_dict()


def test_states_of_an_exact_denoiser_have_its_law():
    law = gaussian_law(shape=(4,))
    # Each step holds D for its length, so the states' covariance is off by O(1 / steps): 5 % at 100 steps.
    states = reverse_states(as_denoiser(law), [0.5, 3.0], paths=4000, steps=100, sigma_start=60.0)
    for sigma, x in states.items():
        exact = law.moments.eigh[0].numpy() + sigma**2
        found = np.diag(law.moments.eigh[1].numpy().T @ np.cov(x.numpy().T) @ law.moments.eigh[1].numpy())
        # a variance of 4,000 draws has the relative error sqrt(2 / 4000) = .022: 4 of them, and 5 %
        assert np.abs(found / exact - 1).max() < 0.09 + 0.05, sigma
    found = gaussianity(states, moments=law.moments, samples=500, **QUICK)
    assert found.samples == 500
    # every step is affine in Gaussian noise: exactly Gaussian, five tests at two levels, p at 1 in 500 or above
    assert min(p.min() for p in found.p_values.values()) > 0.002


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gaussianity(torch.randn(10, 3, generator=generator(0)), 1.0), "10 samples for 3 modes"),
        (lambda: gaussianity(gaussian_law()), "no levels"),
        (lambda: gaussianity(gaussian_law(), 1.0, alpha=2.0), "expected 0 < alpha"),
        (lambda: gaussianity({1.0: torch.eye(3)[:2].repeat(15, 1)}, **QUICK), "do not vary"),
        (lambda: gaussianity({1.0: torch.full((30, 2), math.nan)}, **QUICK), "NaN"),
        (lambda: gaussianity(torch.zeros(30, 2), 1.0, samples=50), "50 samples of 30"),
        (lambda: gaussianity({1.0: torch.zeros(30, 2), 2.0: torch.zeros(20, 2)}), "one number at every level"),
        (lambda: gaussianity(gaussian_law(), 1.0, moments=two_gaussians(1.0, 1.0).moments), "1 dimensions for"),
        (lambda: reverse_states(as_denoiser(gaussian_law()), [1.0], paths=5, sigma_start=0.5), "not above the start"),
        (lambda: first_rejection(gaussianity(gaussian_law(), 1.0, samples=30, **QUICK), "Lilliefors"), "no test"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(InputError, match=match):
        make()
