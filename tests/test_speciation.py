"""Speciation criteria and cloning, against closed forms, scipy quadrature and each other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit

from symbreak.laws import Empirical, Mixture
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.phases.branches import Paths
from symbreak.phases.cloning import clone_agreement
from symbreak.phases.speciation import SpeciationTime, cloning_probability, cloning_time, ladder, speciation_time
from symbreak.runtime.files import InputError


def pair(M: float, s2: float = 1.0, d: int = 1, weights=None) -> Mixture:
    m = torch.full((d,), math.sqrt(M / d), dtype=torch.float64)
    return Mixture.from_parameters(torch.stack([m, -m]), s2, weights)


# --- criteria -------------------------------------------------------------------------------------


def test_the_criteria_in_order():
    """Two Gaussians, M = 256, s2 = 1: spectral 2.7745, signal-to-noise 2.7765, free entropy 2.7726 in tau."""
    law = pair(256, 1, d=2)
    spectral = speciation_time(law)
    assert spectral.level.ou_time == pytest.approx(0.5 * math.log(257), abs=1e-12)
    assert spectral.criterion == "spectral"
    noise = speciation_time(law, "signal-to-noise")
    assert noise.level.ou_time == pytest.approx(0.5 * math.log(258), abs=1e-12)
    free = speciation_time(law, criterion="free-entropy")
    assert isinstance(free, SpeciationTime)
    assert free.sigma**2 == pytest.approx(255, rel=1e-10)
    assert {c.criterion for c in (noise, free)} == {"signal-to-noise", "free-entropy"}


def test_two_points():
    law = Mixture.from_parameters([[1.0], [-1.0]], 0.0)
    assert speciation_time(law).level is None  # Lambda = 1
    assert speciation_time(law, "signal-to-noise").level.ou_time == pytest.approx(0.5 * math.log(2), abs=1e-12)
    assert speciation_time(law, "free-entropy").sigma == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("criterion", ["spectral", "signal-to-noise", "free-entropy"])
def test_scale_multiplies_the_data(criterion):
    law, half = pair(20, 0.5, 3), pair(5, 0.125, 3)
    assert speciation_time(law, criterion, scale=0.5).sigma == pytest.approx(
        speciation_time(half, criterion).sigma, rel=1e-10
    )


def test_measured_moments_have_an_interval():
    data = pair(9, 1, 2).sample(4000, 0.0, generator(1))
    found = speciation_time(Moments.fit([data]), "signal-to-noise")
    assert found.low.sigma < found.sigma < found.high.sigma
    assert found.low.sigma**2 < 10 < found.high.sigma**2
    assert len(ladder(Moments.fit([data]), 2)) == 2


def test_free_entropy_of_unequal_classes_has_two_times():
    """Variances 1 and 4 in d = 64, one mean: tau 1.010 and .940."""
    law = Mixture.from_parameters(torch.zeros(2, 64), [1.0, 4.0])
    found = speciation_time(law, "free-entropy")
    times = [c.level.ou_time for c in found.classes]
    for k, tau in enumerate(times):
        s2 = math.expm1(2 * tau)
        a, b = [(1 + s2, 4 + s2), (4 + s2, 1 + s2)][k]
        mean = 0.5 * 64 * (a / b - 1 - math.log(a / b))
        spread = math.sqrt(0.5 * 64) * abs(a / b - 1)
        assert mean == pytest.approx(spread, rel=1e-9)
    np.testing.assert_allclose(times, [1.010, 0.940], atol=5e-4)  # three published digits
    assert found.level == found.classes[0].level  # the first to stand out
    assert [c["criterion"] for c in found.to_dict()["classes"]] == ["free-entropy"] * 2


def test_free_entropy_of_full_covariances_against_draws():
    """E[L] = Std[L] at the level found, with L from the components' densities over 400,000 draws."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    law = Mixture.from_parameters(4 * torch.randn(2, 4, generator=g), a @ a.mT, [0.2, 0.8])
    low = Mixture.from_parameters(
        law.means, (law.vectors[:, :, :2], law.eigenvalues[:, :2], torch.tensor([0.1, 0.3])), [0.2, 0.8]
    )
    for world in (law, low):
        for k, found in enumerate(speciation_time(world, "free-entropy").classes):
            x = world.sample(400_000, found.sigma, generator(k), component=k)
            log_p = world.component_log_prob(x, found.sigma)
            odds = log_p[:, k] - log_p[:, 1 - k]
            # Mean and spread of 400,000 draws are each known to about .2 %.
            assert float(odds.mean() / odds.std()) == pytest.approx(1.0, abs=0.012)


def test_free_entropy_of_more_classes_by_draws():
    """Classes 1 and 2 are the same Gaussian, so class 0 against the rest is a pair: sigma^2 = M - s2 = 3."""
    law = Mixture.from_parameters([[2.0], [-2.0], [-2.0]], 1.0, [0.5, 0.25, 0.25])
    found = speciation_time(law, "free-entropy")
    first = found.classes[0]
    assert first.low.sigma < math.sqrt(3) < first.high.sigma
    assert first.high.sigma - first.low.sigma < 0.25  # 6,667 draws: 3 % in sigma
    assert found.sigma == max(c.sigma for c in found.classes)
    # Twins: their times agree within their errors, and they stand out later than the class without a double.
    one, two = found.classes[1:]
    assert max(one.low.sigma, two.low.sigma) < min(one.high.sigma, two.high.sigma)
    assert max(one.sigma, two.sigma) < first.sigma


def test_classes_that_coincide_never_speciate():
    found = speciation_time(Mixture.from_parameters([[1.0, 0.0], [1.0, 0.0]], 1.0), "free-entropy")
    assert found.level is None
    assert found.reason


# --- cloning probability --------------------------------------------------------------------------


@pytest.mark.parametrize(("z2", "phi"), [(0.25, 0.6020271328), (1.0, 0.7752002454), (4.0, 0.9657012956)])
def test_cloning_of_two_gaussians(z2, phi):
    s = math.sqrt(9 / z2 - 0.5)  # z^2 = M / (s2 + sigma^2)
    found = cloning_probability(pair(9, 0.5, 7), s)
    assert float(found.value) == pytest.approx(phi, abs=1e-10)
    assert found.low == found.value == found.high


def test_cloning_of_unequal_weights_against_scipy():
    law = pair(4, 1, 1, [0.15, 0.85])
    for sigma in (0.3, 2.0, 9.0):
        v = 1 + sigma**2

        def f(x, v=v):
            p = 0.15 * math.exp(-((x - 2) ** 2) / (2 * v)), 0.85 * math.exp(-((x + 2) ** 2) / (2 * v))
            total = sum(p)
            return (p[0] ** 2 + p[1] ** 2) / total / math.sqrt(2 * math.pi * v) if total else 0.0

        phi = quad(f, -60, 60, points=[-2, 0, 2], epsabs=1e-13, limit=400)[0]
        assert float(cloning_probability(law, sigma).value) == pytest.approx(phi, abs=1e-10)


def test_quadrature_and_draws_agree():
    """A covariance that differs in the twelfth digit takes the way of any mixture."""
    sigma = np.array([0.5, 1.5, 4.0, 12.0])
    exact = cloning_probability(pair(9, 1.0, 5), sigma).value
    m = torch.full((5,), math.sqrt(9 / 5), dtype=torch.float64)
    law = Mixture.from_parameters(torch.stack([m, -m]), [1.0, 1.0 + 1e-12])
    drawn = cloning_probability(law, sigma, samples=40_000)
    error = (drawn.high - drawn.low) / 2 / 1.96
    assert (np.abs(drawn.value - exact) < 4 * error + 1e-9).all()
    assert error.max() < 2e-3


def test_a_common_full_covariance_is_a_quadrature_too():
    g = torch.Generator().manual_seed(4)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    m = torch.randn(2, 3, generator=g, dtype=torch.float64)
    law = Mixture.from_parameters(m, torch.stack([a @ a.T, a @ a.T]))
    found = cloning_probability(law, 0.7)
    x = law.sample(200_000, 0.7, generator(8))
    draws = law.responsibilities(x, 0.7).square().sum(1)
    assert found.low == found.high
    assert float(found.value) == pytest.approx(float(draws.mean()), abs=4 * float(draws.std()) / 447)


def test_floor_and_ceiling():
    """Large noise: sum of squared weights, not 1 / K. Small noise: 1."""
    law = Mixture.from_parameters([[0.0], [3.0], [9.0]], 0.1, [0.2, 0.3, 0.5])
    found = cloning_probability(law, [1e-2, 1e4])
    assert found.value[0] == pytest.approx(1.0, abs=1e-5)
    assert found.value[1] == pytest.approx(0.04 + 0.09 + 0.25, abs=1e-3)
    assert expit(0) ** 2 * 2 == pytest.approx(float(cloning_probability(pair(1), 1e4).value), abs=1e-6)


def test_the_halfway_level_of_clones():
    """Two Gaussians: the level is where z^2 has the value that gives phi = 3/4, in every dimension and scale."""
    z2 = (1 / cloning_time(Mixture.from_parameters([[-1.0], [1.0]], 0.0)).sigma) ** 2
    assert cloning_time(pair(9, 0.5, 7)).sigma == pytest.approx(math.sqrt(9 / z2 - 0.5), rel=1e-8)
    assert cloning_time(pair(9, 0.5, 7), [1.0, 20.0]).sigma == pytest.approx(math.sqrt(9 / z2 - 0.5), rel=1e-8)
    law = Mixture.from_parameters([[0.0], [3.0], [9.0]], 0.1, [0.2, 0.3, 0.5])
    found = cloning_time(law, samples=40_000)
    again = cloning_probability(law, found.sigma, samples=400_000, seed=1)
    # The interval of the level is that of phi over its slope: 40,000 draws against ten times as many.
    ends = cloning_probability(law, [found.low.sigma, found.high.sigma], samples=400_000, seed=1).value
    half = (1 + 0.38) / 2
    assert float(again.value) == pytest.approx(half, abs=2 * abs(ends[0] - ends[1]) / 2 + 1e-3)
    assert found.low.sigma < found.sigma < found.high.sigma
    none = cloning_time(law, [20.0, 50.0])
    assert none.level is None
    assert "from sigma 20 to 50" in none.reason


# --- clones ---------------------------------------------------------------------------------------

TAU = np.array([1.0, 2.0, 2.75, 3.5, 5.0, 7.0])


def test_clones_in_one_dimension():
    """The reduced world: only m.x decides. 4,000 pairs; standard error from the exact phi, floor 2e-3."""
    law, sigma = pair(256, 1, 1), np.sqrt(np.expm1(2 * TAU))
    phi = cloning_probability(law, sigma).value
    found = clone_agreement(law, sigma, pairs=4000, steps=150, seeds=3)
    error = np.maximum(np.sqrt(phi * (1 - phi) / 4000), 2e-3)
    assert (np.abs(found.value - phi) < 3.5 * error).all()
    # Same seeds, same answer; intervals are 95 %.
    again = clone_agreement(law, sigma, pairs=4000, steps=150, seeds=3)
    np.testing.assert_array_equal(found.value, again.value)
    assert ((found.low <= found.value) & (found.value <= found.high)).all()
    assert not np.array_equal(found.value, clone_agreement(law, sigma, pairs=4000, steps=150, seeds=4).value)


def test_clones_of_a_denoiser_start_from_noise():
    law, sigma = pair(16, 1, 3), [1.0, 4.0, 12.0]

    class Plain:
        shape, sigma_range = (3,), (0.01, 200.0)

        def __call__(self, x, s):
            return law.denoise(x, s)

    def side(images):
        return (images.sum(1) > 0).long()

    phi = cloning_probability(law, sigma).value
    found = clone_agreement(Plain(), sigma, side, pairs=1500, steps=100)
    error = np.maximum(np.sqrt(phi * (1 - phi) / 1500), 3e-3)
    assert (np.abs(found.value - phi) < 3.5 * error).all()


def test_unequal_classes_by_clones():
    law = Mixture.from_parameters([[0.0, 0.0], [4.0, 0.0], [0.0, 6.0]], [0.2, 1.0, 0.5], [0.5, 0.3, 0.2])
    sigma = [0.8, 2.0, 5.0]
    phi = cloning_probability(law, sigma, samples=100_000).value
    found = clone_agreement(law, sigma, pairs=3000, steps=150)
    error = np.sqrt(phi * (1 - phi) / 3000) + 2e-3  # plus the discretization of 150 steps
    assert (np.abs(found.value - phi) < 3.5 * error).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speciation_time(pair(1), "entropy"), "unknown speciation criterion"),
        (lambda: speciation_time(pair(1), scale=0.0), "scale is 0"),
        (lambda: speciation_time(Empirical([[1.0], [2.0]]), "free-entropy"), "has no classes"),
        (lambda: speciation_time(Mixture.from_parameters([[1.0]], 1.0), "free-entropy"), "of one class"),
        (lambda: cloning_probability(pair(1), 0.0), "sigma is 0"),
        (lambda: cloning_probability(pair(1), [1.0, math.nan]), "sigma is nan"),
        (lambda: cloning_probability(pair(1), []), "sigma of shape"),
        (lambda: cloning_probability(Empirical([[1.0], [2.0]]), 1.0), "has no classes"),
        (lambda: clone_agreement(pair(1), 1.0, pairs=0), "0 pairs"),
        (lambda: clone_agreement(pair(1), 1.0, paths=Paths(sigma_start=0.5)), "branch levels from 1 to 1"),
        (lambda: clone_agreement(Empirical([[1.0], [2.0]]), 1.0), "has no classes"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_labelled_data_set_agrees_with_the_mixture_of_its_points():
    """p(c | x) of labelled points adds up over the points of a class: phi is the same to Monte Carlo error."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(400) % 2
    points = torch.randn(400, 3, generator=g, dtype=torch.float64) + torch.where(y == 0, -1.2, 1.2)[:, None]
    sigma = np.array([0.05, 1.0, 3.0, 200.0])
    found = cloning_probability(Empirical(points), sigma, labels=y)
    per_point = Mixture.from_parameters(points, 1e-12)
    x = points[:, None] + torch.as_tensor(sigma)[:, None] * torch.randn(400, 4, 3, generator=g, dtype=torch.float64)
    for i, s in enumerate(sigma):
        p = per_point.responsibilities(x[:, i], float(s)).double()
        phi = torch.stack([p[:, y == c].sum(1) for c in (0, 1)], 1).square().sum(1)
        # 4 standard errors of 400 independent draws; the interval of the curve is 1.96 of its own
        error = 4 * float(phi.std()) / 20 + (found.high[i] - found.low[i])
        assert abs(found.value[i] - float(phi.mean())) <= error + 1e-12
    assert found.value[0] > 0.95
    assert abs(found.value[-1] - 0.5) < 1e-3
    with pytest.raises(InputError, match="3 labels for 400 points"):
        cloning_probability(Empirical(points), 1.0, labels=y[:3])
