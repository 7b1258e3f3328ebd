"""Excess entropy and collapse, against closed forms, brute force and Monte Carlo."""

import math

import numpy as np
import pytest
import torch

from symbreak.files import InputError
from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.moments import Moments
from symbreak.noise import generator
from symbreak.phases.collapse import collapse_time, excess_entropy


def isotropic(d: int, v: float = 1.0) -> Mixture:
    return Mixture.from_parameters(torch.zeros(1, d), v)


def pair(d: int) -> Mixture:
    return Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)


# --- collapse time --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "tau"),
    [
        (20000, 256, 1.2987896868),
        (20000, 1024, 1.9775467186),
        (20000, 4096, 2.6670744412),
        (1000, 64, 0.8195419927),
    ],
)
def test_one_gaussian(n, d, tau):
    assert collapse_time(isotropic(d), samples=n).level.ou_time == pytest.approx(tau, abs=1e-9)
    for v in (1.0, 0.04):
        found = collapse_time(isotropic(d, v), samples=n)
        assert found.level.ou_time == pytest.approx(0.5 * math.log1p(v / math.expm1(2 * math.log(n) / d)), rel=1e-9)
        assert (found.criterion, found.low) == ("collapse", None)


def test_general_spectrum():
    values = torch.tensor([50.0, 3.0, 1.0, 0.01, 0.0], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator(2), dtype=torch.float64))[0]
    law = Gaussian(Moments(2, torch.ones(5), (q * values) @ q.T))
    sigma = collapse_time(law, samples=5000).sigma
    assert float(torch.log1p(values / sigma**2).sum()) == pytest.approx(2 * math.log(5000), rel=1e-9)
    assert collapse_time(law, samples=5001).sigma < sigma


@pytest.mark.parametrize(("d", "tau"), [(256, 1.33373), (1024, 2.01349), (4096, 2.70327)])
def test_two_gaussians_collapse_class_by_class(d, tau):
    """Resolved classes: n becomes n / K."""
    found = collapse_time(pair(d), samples=20000).level.ou_time
    assert found == pytest.approx(tau, abs=5e-6)  # the digits given
    assert found == pytest.approx(collapse_time(isotropic(d), samples=10000).level.ou_time, abs=2e-6)


def test_a_law_of_fewer_points_than_samples_never_tells_log_n():
    found = collapse_time(Mixture.from_parameters([[0.0], [1.0], [5.0]], 0.0), samples=100)
    assert found.level is None
    assert "1.099 nats" in found.reason  # log 3


# --- excess entropy of laws -----------------------------------------------------------------------


def test_gaussian_curve():
    sigma = np.array([0.5, 2.0, 40.0])
    law = Gaussian(Moments(2, torch.zeros(3), torch.diag(torch.tensor([4.0, 1.0, 0.25]))))
    found = excess_entropy(law, sigma, samples=300)
    values = np.array([4.0, 1.0, 0.25])
    exact = (math.log(300) - 0.5 * np.log1p(values / sigma[:, None] ** 2).sum(1)) / 3
    np.testing.assert_allclose(found.value, np.maximum(exact, 0), rtol=1e-12)
    assert found.value[2] == pytest.approx(math.log(300) / 3, rel=1e-3)  # a at large noise
    assert float(excess_entropy(law, 1e-3, samples=300).value) == 0.0
    np.testing.assert_array_equal(found.low, found.high)


def test_class_information_of_two_gaussians():
    """1 - f / a = [(d/2) log(1 + v / sigma^2) + I] / log n, I = log 2 - E log(1 + exp(-2 z (z + Y)))."""
    d, n, tau = 256, 20000, np.array([1.5, 2.5, 3.0, 4.0])
    s2 = np.expm1(2 * tau)
    y = np.linspace(-12, 12, 48001)
    weight = np.exp(-y * y / 2) * (y[1] - y[0]) / math.sqrt(2 * math.pi)
    z = np.sqrt(d / (1 + s2))[:, None]
    information = math.log(2) - (np.logaddexp(0, -2 * z * (z + y)) * weight).sum(1)
    exact = 1 - (0.5 * d * np.log1p(1 / s2) + information) / math.log(n)
    found = excess_entropy(pair(d), np.sqrt(s2), samples=n).value * d / math.log(n)
    np.testing.assert_allclose(found, np.maximum(exact, 0), atol=1e-9)


def test_unequal_classes_against_their_density():
    """Mixture by components and class information = any law by its density."""
    law = Mixture.from_parameters([[0.0, 0.0], [4.0, 0.0], [0.0, 6.0]], [0.2, 1.0, 0.5], [0.5, 0.3, 0.2])

    class Density:
        shape, dim = law.shape, law.dim
        sample, log_prob = law.sample, law.log_prob

    sigma = np.array([0.5, 1.5, 4.0])
    a = excess_entropy(law, sigma, samples=1000, draws=40_000)
    b = excess_entropy(Density(), sigma, samples=1000, draws=40_000, seed=1)
    error = np.hypot(a.high - a.low, b.high - b.low) / 2 / 1.96
    assert (np.abs(a.value - b.value) < 4 * error).all()
    assert error.max() < 0.01 * math.log(1000) / 2
    times = [collapse_time(w, 1000, draws=20_000, seed=i) for i, w in enumerate((law, Density()))]
    assert times[1].low.sigma < times[0].sigma < times[1].high.sigma
    assert times[0].low.sigma < times[0].sigma < times[0].high.sigma


def test_sphere():
    """Far from it a sphere is Gaussian to second order: I = 1/2 sum log(1 + (r^2 / d) / sigma^2)."""
    found = excess_entropy(Sphere(3, 1.0), 6.0, samples=50, draws=50_000)
    exact = (math.log(50) - 1.5 * math.log1p(1 / 3 / 36)) / 3
    assert float(found.value) == pytest.approx(exact, abs=2e-4 + float(found.high - found.low))


# --- measured on a data set -----------------------------------------------------------------------


def test_measured_against_brute_force():
    """The same f^e from the density: log sum_nu exp(...) = log n + log p(x) - log p(x | x_0)."""
    g = generator(7)
    points = torch.randn(60, 5, generator=g, dtype=torch.float64) + 30.0
    law = Empirical(points)
    for sigma in (0.2, 1.0, 5.0):
        found = excess_entropy(law, sigma, queries=60)
        mu = torch.arange(60).repeat(2000)
        z = torch.randn(len(mu), 5, generator=g, dtype=torch.float64)
        own = -0.5 * (z * z).sum(1) - 5 * math.log(sigma * math.sqrt(2 * math.pi))
        values = (math.log(60) + law.log_prob(points[mu] + sigma * z, sigma) - own) / 5
        error = (float(found.high - found.low)) / 2 / 1.96
        assert float(found.value) == pytest.approx(float(values.mean()), abs=4 * error + 1e-6)


def test_measured_limits_and_blocks():
    n, d = 5000, 20  # more points and queries than a block
    law = Empirical(isotropic(d).sample(n, 0.0, generator(3)))
    found = excess_entropy(law, [1e-4, 1e4], queries=400)
    assert found.value[0] == pytest.approx(0.0, abs=1e-12)  # its own point only
    assert found.value[1] == pytest.approx(math.log(n) / d, rel=1e-4)
    again = excess_entropy(law, 2.0, queries=400)
    exact = float(excess_entropy(isotropic(d), 2.0, samples=n).value)
    # Its own error is 1.5 %; the rest is left for the draw of the data and the rounding at finite n.
    assert float(again.value) == pytest.approx(exact, rel=0.08)


def test_control_variate_lowers_the_error():
    """d = 256, n = 4000: the plain estimate's spread is that of |z|^2 / 2 d, sqrt(1 / 2 d)."""
    law = Empirical(pair(256).sample(4000, 0.0, generator(5)))
    found = excess_entropy(law, math.sqrt(math.expm1(2 * 3.0)), queries=400)
    plain = math.sqrt(1 / 512 / 400)
    assert float(found.high - found.low) / 2 / 1.96 < plain / 8


def test_collapse_of_a_data_set_is_extrapolated():
    d, n = 128, 4000
    law = Empirical(isotropic(d).sample(n, 0.0, generator(6)))
    found = collapse_time(law, queries=500)
    exact = collapse_time(isotropic(d), samples=n).level.ou_time
    # f^e is rounded upward, so the extrapolation comes out low: by 0.1 at these sizes.
    assert found.level.ou_time == pytest.approx(exact, abs=0.15)
    assert found.low.sigma < found.sigma < found.high.sigma
    assert "extrapolated" in found.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: excess_entropy(pair(4), 1.0), "samples=n"),
        (lambda: excess_entropy(pair(4), 1.0, samples=1), "samples is 1"),
        (lambda: excess_entropy(pair(4), 0.0, samples=10), "sigma is 0"),
        (lambda: excess_entropy(pair(4), [], samples=10), "sigma of shape"),
        (lambda: excess_entropy(Empirical([[1.0], [2.0]]), 1.0, samples=3), "holds 2 points"),
        (lambda: excess_entropy(Empirical([[1.0]]), 1.0), "one point"),
        (lambda: excess_entropy(Empirical([[1.0], [2.0]]), 1.0, queries=1), "1 queries"),
        (lambda: collapse_time(pair(4)), "samples=n"),
        (lambda: collapse_time(pair(4), samples=math.inf), "samples is inf"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
