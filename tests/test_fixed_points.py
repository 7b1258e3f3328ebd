"""Bifurcations, fixed points and potentials against closed forms and independent one-dimensional solutions.

Exact values are wanted to 1e-8 through the general functions; they come out near 1e-12, and the tests say
1e-10 where nothing in the oracle is coarser.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar

from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.phases.bifurcations import bifurcation
from symbreak.phases.fixed_point_search import System, fixed_points, march
from symbreak.phases.potentials import drift, potential
from symbreak.runtime.files import InputError

TWO = Empirical([[-1.0], [1.0]])


def pair(M: float, s2: float, d: int = 2) -> Mixture:
    m = torch.full((d,), math.sqrt(M / d), dtype=torch.float64)
    return Mixture.from_parameters(torch.stack([m, -m]), s2)


def simplex(k: int) -> Empirical:
    y = torch.eye(k, dtype=torch.float64) - 1.0 / k
    return Empirical(y / y.norm(dim=1, keepdim=True))


def alpha_bar(c) -> float:
    assert c.level is not None, c.reason
    return c.level.alpha_bar


# --- the centre -----------------------------------------------------------------------------------


def test_two_points_by_flow_and_frame():
    sde = bifurcation(TWO, flow="sde", frame="vp")
    assert sde.level.alpha == pytest.approx(math.sqrt(math.sqrt(2) - 1), abs=1e-10)
    assert sde.level.ou_time == pytest.approx(0.5 * math.asinh(1), abs=1e-10)
    assert (sde.flow, sde.frame, sde.criterion) == ("sde", "vp", "bifurcation")
    ode = bifurcation(TWO, flow="ode", frame="vp")
    assert ode.level is None
    assert "unstable at every level" in ode.reason
    for flow in ("sde", "ode"):
        ve = bifurcation(TWO, flow=flow, frame="ve")
        assert ve.sigma == pytest.approx(1.0, abs=1e-10)
        assert ve.level.alpha == 1.0


@pytest.mark.parametrize("points", [2, 3, 4, 10])
def test_equal_norm_points(points):
    """lambda = 1 / (K - 1). VP SDE: sqrt(1 + lambda^2) - lambda; VE: sigma^2 = lambda; VP ODE: 1 - lambda."""
    lam = 1 / (points - 1)
    law = simplex(points)
    assert alpha_bar(bifurcation(law)) == pytest.approx(math.sqrt(1 + lam**2) - lam, abs=1e-10)
    assert bifurcation(law, "ode", "ve").sigma ** 2 == pytest.approx(lam, abs=1e-10)
    ode = bifurcation(law, "ode", "vp")
    if lam >= 1:
        assert ode.level is None
    else:
        assert alpha_bar(ode) == pytest.approx(1 - lam, abs=1e-10)


@pytest.mark.parametrize("lam", [0.5, 1.0, 3.05])
def test_lambda_of_the_paper(lam):
    r = math.sqrt(lam)
    law = Empirical(torch.tensor([[r, 0.0], [-r, 0.0], [r, 0.0], [-r, 0.0]], dtype=torch.float64))
    assert alpha_bar(bifurcation(law)) == pytest.approx(math.sqrt(1 + lam**2) - lam, abs=1e-10)


@pytest.mark.parametrize(("dim", "radius"), [(2, 1.0), (3, 1.0), (3, math.sqrt(3)), (17, 2.5)])
def test_hypersphere(dim, radius):
    r2 = radius**2
    theta = math.sqrt((math.sqrt(dim**2 + r2**2) - r2) / dim)
    assert bifurcation(Sphere(dim, radius)).level.alpha == pytest.approx(theta, abs=1e-10)
    assert bifurcation(Sphere(dim, radius), "sde", "ve").sigma ** 2 == pytest.approx(r2 / dim, rel=1e-10)


@pytest.mark.parametrize(
    ("M", "s2", "expected"), [(1, 0.25, 4 / 9), (4, 1, 1 / 8), (256, 1, 1 / 512), (9, 0.5, None), (2.5, 3, None)]
)
def test_two_gaussians(M, s2, expected):
    law = pair(M, s2)
    exact = 1 / (M + math.sqrt(M**2 + (1 - s2) ** 2))
    assert expected is None or exact == pytest.approx(expected, abs=1e-12)
    assert alpha_bar(bifurcation(law)) == pytest.approx(exact, abs=1e-10)
    ve = bifurcation(law, "sde", "ve")
    if s2 < M:
        assert ve.sigma**2 == pytest.approx(M - s2, rel=1e-10)
    else:
        assert ve.level is None  # log-concave
    assert bifurcation(law, "ode", "vp").level is None  # M + s2 >= 1


def test_two_gaussians_probability_flow():
    assert alpha_bar(bifurcation(pair(0.5, 0.2), "ode", "vp")) == pytest.approx(0.3 / 0.64, abs=1e-10)


def test_two_gaussians_with_a_full_covariance_and_an_offset():
    """Cov(x_0 | x*) = sigma^2 C (C + sigma^2)^-1 + g g^T, g = sigma^2 (C + sigma^2)^-1 m, solved by numpy."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    c = a @ a.T / 6
    m = 2 * torch.randn(6, generator=g, dtype=torch.float64)
    offset = torch.arange(6, dtype=torch.float64)
    law = Mixture.from_parameters(torch.stack([offset + m, offset - m]), torch.stack([c, c]))
    cn, mn = c.numpy(), m.numpy()

    def gap(log_sigma: float) -> float:
        s2 = math.exp(2 * log_sigma)
        inverse = np.linalg.inv(cn + s2 * np.eye(6))
        v = s2 * inverse @ mn
        return float(np.linalg.eigvalsh(s2 * cn @ inverse + np.outer(v, v))[-1]) - s2

    sigma = math.exp(brentq(gap, -2, 6, xtol=1e-14))
    assert bifurcation(law, "ode", "ve").sigma == pytest.approx(sigma, rel=1e-9)


def test_one_gaussian_never_in_ve_and_the_trap_in_vp():
    for v in (0.3, 9.0):
        wide = Gaussian(Moments(2, torch.zeros(3), torch.diag(torch.tensor([v, 0.1, 0.2]))))
        for flow in ("sde", "ode"):
            assert bifurcation(wide, flow, "ve").level is None
    assert alpha_bar(bifurcation(wide, "sde", "vp")) == pytest.approx(1 / 8, abs=1e-10)  # 1 / (v - 1)
    narrow = Gaussian(Moments(2, torch.ones(2), 1.9 * torch.eye(2)))
    assert bifurcation(narrow, "sde", "vp").level is None
    assert "stays stable" in bifurcation(narrow, "sde", "vp").reason


def test_a_moving_centre_is_followed():
    """An offset at right angles to the classes moves the central fixed point but breaks at the same level."""
    law = Empirical([[-1.0, 3.0], [1.0, 3.0]])
    assert bifurcation(law).level.alpha == pytest.approx(math.sqrt(math.sqrt(2) - 1), abs=1e-10)
    assert bifurcation(law, "ode", "vp").level is None


def test_asymmetric_data_have_wells_but_no_crossing():
    """Weights .7 / .3 on +-1, VE: D(x) = tanh(x / s + h); the fold is where also (1 - x^2) / s = 1."""
    law = Mixture.from_parameters([[1.0], [-1.0]], 0.0, [0.7, 0.3])
    assert bifurcation(law, "sde", "ve").level is None
    h = 0.5 * math.log(7 / 3)
    s = brentq(lambda s: math.atanh(-math.sqrt(1 - s)) + math.sqrt(1 - s) / s - h, 0.05, 0.99, xtol=1e-15)
    wells = bifurcation(law, "sde", "ve", criterion="wells")
    assert wells.sigma**2 == pytest.approx(s, rel=1e-9)
    assert wells.criterion == "wells"


def first_order(points: int) -> float:
    """kappa sigma^2 at which wells appear: along y_1 it is a K / ((K - 1) logit p(a)), maximal over a."""
    k = points

    def level(a: float) -> float:
        p = (1 + a * (k - 1)) / k
        return a * k / ((k - 1) * math.log(p * (k - 1) / (1 - p)))

    inside = (1e-3, 1 - 1e-9)
    found = minimize_scalar(lambda a: -level(a), bounds=inside, method="bounded", options={"xatol": 1e-10})
    return -float(found.fun)


@pytest.mark.parametrize(
    ("points", "wells", "centre"), [(3, 0.5932, 0.6180), (4, 0.6682, 0.7208), (10, 0.7856, 0.8950)]
)
def test_first_order_transitions(points, wells, centre):
    law = simplex(points)
    g = first_order(points)
    found = alpha_bar(bifurcation(law, criterion="wells"))
    assert found == pytest.approx(math.sqrt(1 + g * g) - g, abs=1e-9)
    assert found == pytest.approx(wells, abs=5e-5)  # four published digits
    assert alpha_bar(bifurcation(law)) == pytest.approx(centre, abs=5e-5)


def test_a_pitchfork_has_its_wells_at_the_centres_level():
    assert bifurcation(TWO, criterion="wells").level.alpha == pytest.approx(0.6435942529055827, abs=1e-9)
    # A sphere's wells are a ring: neutral along itself.
    ring = bifurcation(Sphere(3, 1.0), criterion="wells")
    assert ring.level.alpha == pytest.approx(0.8489753942583, abs=1e-9)


def test_a_march_along_a_ring_stays_to_its_last_point():
    system, lam = System(Sphere(3, 1.0), "sde", "vp"), math.log(0.3)
    w = system.newton(np.array([0.9, 0.0, 0.0]) * system.scale, lam)
    points = list(march(system, w, lam, -1, lam - 1.0, lam))
    assert points[-1].lam == lam - 1.0  # a step beyond it, put back
    assert all(p.still.shape == (2, 3) for p in points)


def test_a_march_above_the_dense_size_looks_at_no_eigenvalues(monkeypatch):
    system, lam = System(Sphere(3, 1.0), "sde", "vp"), math.log(0.3)
    w = system.newton(np.array([0.9, 0.0, 0.0]) * system.scale, lam)
    system.dense = False
    monkeypatch.setattr(System, "leading", None)
    assert next(march(system, w, lam, -1, lam - 1.0, lam)).still is None


def test_wells_are_looked_for_down_to_a_level():
    assert bifurcation(TWO, "sde", "ve", criterion="wells", low=0.5).sigma == pytest.approx(1, abs=1e-4)
    none = bifurcation(TWO, "sde", "ve", criterion="wells", low=1.5)
    assert none.level is None
    assert "down to 1.5" in none.reason
    assert "down to 1.5" in bifurcation(TWO, "sde", "ve", low=1.5).reason


def test_wells_that_are_always_or_never_there():
    assert "every level" in bifurcation(TWO, "ode", "vp", criterion="wells").reason
    one = Gaussian(Moments(2, torch.zeros(2), 9 * torch.eye(2)))
    assert "no stable fixed point apart" in bifurcation(one, "ode", "ve", criterion="wells").reason


def test_products_above_the_dense_limit():
    """d = 1,600: Lanczos and Krylov solves instead of matrices."""
    d = 1600
    law = Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)
    assert alpha_bar(bifurcation(law)) == pytest.approx(1 / (2 * d), rel=1e-10)


class Plain:
    """A denoiser that is no law."""

    def __init__(self, f, shape, sigma_range=(1e-3, 100.0)):
        self.f, self.shape, self.sigma_range = f, shape, sigma_range

    def __call__(self, x, sigma):
        return self.f(x, sigma)


def test_denoisers_through_automatic_derivatives():
    law = pair(4, 1, d=3)
    exact = Plain(law.denoise, law.shape)
    assert alpha_bar(bifurcation(exact)) == pytest.approx(1 / 8, abs=1e-9)
    single = Plain(lambda x, s: torch.tanh(x.float() / s**2).double(), (1,))
    # float32: its rounding (6e-8) limits the eigenvalue's zero.
    assert bifurcation(single).level.alpha == pytest.approx(0.6435942529, abs=1e-5)
    with pytest.raises(InputError, match="starts="):
        bifurcation(exact, criterion="wells")
    wells = bifurcation(single, criterion="wells", starts=torch.tensor([[1.0], [-1.0]]))
    # A parabola through points whose rounding grows towards the fold.
    assert wells.level.alpha == pytest.approx(0.6435942529, abs=1e-4)


def test_an_asymmetric_jacobian_is_decided_by_its_real_part_and_reported():
    """D(x) = 2 R x / (1 + sigma^2), R with eigenvalues 1 +- i/2: VE crossing at sigma = 1."""
    r = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    found = bifurcation(Plain(lambda x, s: 2 * x @ r.T / (1 + s**2), (2,)), "ode", "ve")
    assert found.sigma == pytest.approx(1.0, abs=1e-9)
    assert "asymmetric by 50.0%" in found.reason


# --- fixed points ---------------------------------------------------------------------------------


def test_fixed_points_of_two_points():
    theta = np.array([0.5, 0.65, 0.7, 0.8, 0.9])
    found = fixed_points(TWO, np.sqrt(1 / theta**2 - 1))
    assert [b.central for b in found.branches] == [True, False, False]
    central, *wells = found.branches
    assert central.points.abs().max() < 1e-12
    assert central.stable.tolist() == [True, False, False, False, False]
    # u''(0) / beta = -eigenvalue
    curvature = -1.0 * (0.5 + (2 * theta**2 - 1) / (1 - theta**2) ** 2)
    np.testing.assert_allclose(-central.eigenvalue, curvature, atol=1e-10)
    assert central.eigenvalue[0] == pytest.approx(-0.3888888889, abs=1e-10)
    assert central.eigenvalue[2] == pytest.approx(0.4231064975, abs=1e-10)
    expected = [0.2610549862, 0.6991741572, 0.9470385761, 0.9943138454]
    for branch in wells:
        np.testing.assert_allclose(branch.points[1:, 0].abs(), expected, atol=1e-9)
        assert not branch.exists[0]
        assert branch.stable[1:].all()
        assert branch.fold == pytest.approx(math.sqrt(math.sqrt(2) + 1 - 1), rel=1e-9)
    assert wells[0].points[2, 0] * wells[1].points[2, 0] < 0


def test_branches_that_are_not_connected_to_the_centre():
    """Three classes: each well is born with a saddle, in a fold far from the centre."""
    fold = bifurcation(simplex(3), criterion="wells").sigma
    sigma = np.geomspace(0.5, 1.1, 13)
    found = fixed_points(simplex(3), sigma)
    wells = [b for b in found.branches if not b.central and b.stable.any()]
    saddles = [b for b in found.branches if not b.central and not b.stable.any()]
    assert (len(wells), len(saddles)) == (3, 3)
    for branch in wells + saddles:
        assert branch.fold == pytest.approx(fold, rel=1e-8)
        assert branch.exists.tolist() == (sigma < fold).tolist()
    points, values = found.at(0)
    force = drift(simplex(3), points, float(sigma[0]))
    assert force.abs().max() < 1e-10
    assert (values < 0).sum() == 3


def test_fixed_points_at_one_level_have_saddles_too():
    found = fixed_points(simplex(3), 0.7)
    points, values = found.at(0)
    assert len(points) == 7  # the centre, three wells, three saddles
    assert (values < 0).sum() == 3


def test_fixed_points_of_probability_flow_and_ve():
    """VE: x = tanh(x / sigma^2)."""
    found = fixed_points(TWO, [0.5, 0.9, 1.5], "ode", "ve")
    well = found.branches[1].points[:, 0].abs()
    for i, s in enumerate((0.5, 0.9)):
        x = brentq(lambda x, s=s: math.tanh(x / s**2) - x, 1e-3, 2, xtol=1e-15)
        assert float(well[i]) == pytest.approx(x, abs=1e-10)
    assert math.isnan(float(well[2]))


@pytest.mark.parametrize("dim", [3, 20])
def test_a_sphere_of_fixed_points_is_one_branch(dim):
    """Sphere of radius 1: the centre, and below theta = sqrt((sqrt(d^2 + 1) - 1) / d) a sphere of wells."""
    theta = math.sqrt((math.sqrt(dim**2 + 1) - 1) / dim)
    critical = math.sqrt(1 / theta**2 - 1)
    found = fixed_points(Sphere(dim), critical * np.array([0.3, 0.5, 1.5]))
    centre, wells = found.branches
    assert centre.central
    assert centre.stable.tolist() == [False, False, True]
    assert (centre.continuum, wells.continuum) == (0, dim - 1)
    assert wells.exists.tolist() == wells.stable.tolist() == [True, True, False]
    assert wells.fold == pytest.approx(critical, rel=1e-9)
    assert f"one point of a continuum of dimension {dim - 1}" in repr(found)
    force = drift(Sphere(dim), wells.points[:2], float(wells.sigma[0]))[0]
    assert force.abs().max() < 1e-9
    assert repr(found).count("\n") == 2


@pytest.mark.parametrize(
    ("M", "s2", "centre", "wells"),
    [
        # Probability flow in VP, variances add to 1 or more: at infinite noise w solves (1 - s2) w = m tanh(m w + h).
        # s2 < 1: several stable solutions; s2 >= 1: one, and it repels.
        (4.0, 0.25, "stays stable", "several fixed points are stable at every level"),
        (16.0, 2.0, "is unstable at every level", None),
    ],
)
def test_unequal_weights_in_the_probability_flow(M, s2, centre, wells):
    m = math.sqrt(M)
    law = Mixture.from_parameters([[m], [-m]], s2, [0.25, 0.75])
    assert centre in bifurcation(law, "ode", "vp").reason
    if wells is not None:
        assert wells in bifurcation(law, "ode", "vp", criterion="wells").reason


# --- potential ------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [TWO, pair(2, 0.3, 1), Gaussian(Moments(2, [0.5], [[2.0]]))])
@pytest.mark.parametrize("sigma", [0.1, 0.8, 5.0])
def test_potential_is_that_of_the_density(law, sigma):
    """u = -x^2 / 4 - log p(x) (SDE), half the score for the ODE, -log p in VE; log p from the law."""
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    alpha = 1 / math.sqrt(1 + sigma**2)
    log_p, log_p_ve = law.log_prob(x / alpha, sigma), law.log_prob(x, sigma)
    quarter = (x[:, 0] ** 2) / 4
    for flow, frame, u in (
        ("sde", "vp", -quarter - log_p),
        ("ode", "vp", -quarter - 0.5 * log_p),
        ("sde", "ve", -log_p_ve),
    ):
        found = potential(law, x, sigma, flow, frame)
        expected = (u - u[0]).numpy()
        # The quadrature promises 1e-10 of the largest value.
        np.testing.assert_allclose(found.value, expected, atol=1e-9 * np.abs(expected).max())
        assert found.value[0] == 0
        assert np.abs(found.value - expected).max() <= found.error[-1] + 1e-11 * np.abs(expected).max()


def test_potential_splits_below_the_critical_level():
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)[:, None]

    def wells(theta):
        u = potential(TWO, x, math.sqrt(1 / theta**2 - 1)).value
        return int(((u[1:-1] < u[:-2]) & (u[1:-1] < u[2:])).sum())

    assert [wells(t) for t in (0.3, 0.6, 0.7, 0.9)] == [1, 1, 2, 2]


def test_potential_of_a_law_does_not_depend_on_the_path():
    law = Mixture.from_parameters([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], [0.1, 0.2, 0.3])
    a, b = torch.tensor([-1.0, -1.0]), torch.tensor([1.5, 0.5])
    straight = potential(law, torch.stack([a, b]), 0.4)
    detour = potential(law, torch.stack([a, torch.tensor([2.0, -2.0]), torch.tensor([0.0, 3.0]), b]), 0.4)
    assert straight.value[-1] == pytest.approx(detour.value[-1], abs=1e-8)
    assert straight.position[-1] == pytest.approx(float((b - a).norm()), rel=1e-6)
    assert len(potential(law, a[None], 0.4).value) == 1


def test_images_keep_their_shape():
    data = torch.randn(6, 1, 2, 3, generator=generator(3), dtype=torch.float64)
    law = Empirical(data)
    u = potential(law, data[:2], 0.5)
    flat = potential(Empirical(data.reshape(6, 6)), data[:2].reshape(2, 6), 0.5)
    assert u.value[1] == pytest.approx(flat.value[1], rel=1e-12)
    assert fixed_points(law, 0.2).branches[0].points.shape == (1, 1, 2, 3)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: potential(TWO, torch.zeros(0, 1), 1.0), "empty"),
        (lambda: potential(TWO, torch.zeros(3, 2), 1.0), r"path of shape \(3, 2\)"),
        (lambda: potential(TWO, torch.full((2, 1), math.nan), 1.0), "NaN"),
        (lambda: potential(TWO, torch.zeros(3, 1), 0.0), "sigma is 0"),
        (lambda: potential(TWO, torch.zeros(3, 1), 1.0, flow="pde"), "flow 'pde'"),
        (lambda: drift(TWO, torch.zeros(3, 2), 1.0), r"states of shape \(3, 2\)"),
        (lambda: bifurcation(TWO, frame="edm"), "frame 'edm'"),
        (lambda: bifurcation(TWO, criterion="both"), "criterion 'both'"),
        (lambda: bifurcation(TWO, x0=torch.zeros(2)), "x0 has the shape"),
        (lambda: bifurcation(TWO, criterion="wells", starts=torch.zeros(0, 1)), "starts of shape"),
        (lambda: bifurcation(TWO, low=0.0), "low=0; expected a sigma above 0 and below 99.8, where"),
        (lambda: fixed_points(TWO, [1.0, -1.0]), "sigma is -1"),
        (lambda: fixed_points(TWO, []), "expected a level or levels"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_not_a_denoiser():
    with pytest.raises(TypeError, match="neither a law"):
        bifurcation(3.0)
