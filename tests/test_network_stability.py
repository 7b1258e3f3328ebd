"""The centre of a network followed down, and wells on an arc: exact laws posing as networks against closed forms."""

import math

import numpy as np
import pytest
import torch

from symbreak.laws import Empirical, Gaussian, Mixture
from symbreak.moments.one_pass import Moments, mode_images
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.phases.bifurcations import bifurcation
from symbreak.phases.potentials import Wells, arc_potential, potential
from symbreak.phases.stability import network_stability, stability_times
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run

SCHEDULER = scheduler("ddpm", clip_sample=False)
SHAPE = (1, 2, 2)
AXIS = torch.full(SHAPE, 0.5, dtype=torch.float64)  # unit length


def network(law, dtype=torch.float64):
    """A law posing as a diffusers network whose weights have a dtype."""
    unet = as_unet(law, SCHEDULER)
    unet.register_parameter("weight", torch.nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False))
    return denoiser(unet, SCHEDULER)


def pair(M: float, s2: float, weights=None) -> Mixture:
    m = math.sqrt(M) * AXIS
    return Mixture.from_parameters(torch.stack([m, -m]), s2, weights)


class Plain:
    """A denoiser that is no law."""

    def __init__(self, f, shape, sigma_range=(1e-2, 100.0)):
        self.f, self.shape, self.sigma_range = f, shape, sigma_range

    def __call__(self, x, sigma):
        return self.f(x, sigma)


# --- the centre -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_gaussians_in_every_flow_and_frame(dtype):
    """VE sigma_c^2 = M - s2; VP SDE q_c = 1 / (M + sqrt(M^2 + (1 - s2)^2)); VP ODE unstable from M + s2 >= 1 on.

    float64: the schedule's interpolation of t and the root finding leave 1e-9. float32: the top eigenvalue is known
    to about 1e-6 and the root is looked for to 1e-4 in log sigma.
    """
    M, s2 = 4.0, 0.25
    sigma = np.geomspace(8.0, 0.5, 4)
    rel = 1e-8 if dtype == torch.float64 else 2e-4
    posing = network(pair(M, s2), dtype)
    sde_ve, ode_ve, vp, ode_vp = stability_times(
        posing, sigma, [("sde", "ve"), ("ode", "ve"), ("sde", "vp"), ("ode", "vp")]
    )
    exact = math.sqrt(M - s2)
    assert sde_ve.sigma == pytest.approx(exact, rel=rel)
    assert sde_ve.low.sigma < sde_ve.level.sigma < sde_ve.high.sigma
    assert sde_ve.level.alpha == 1.0
    assert (ode_ve.sigma, ode_ve.flow, ode_ve.frame) == (sde_ve.sigma, "ode", "ve")
    q = 1 / (M + math.sqrt(M**2 + (1 - s2) ** 2))
    assert vp.sigma == pytest.approx(math.sqrt(1 / q - 1), rel=rel)
    assert (vp.flow, vp.frame, vp.criterion) == ("sde", "vp", "bifurcation")
    assert ode_vp.level is None
    assert "unstable at every level" in ode_vp.reason


def test_eigenvalues_states_and_direction_of_two_gaussians():
    """At the centre Cov(x_0 | 0) = s2 s / (s2 + s) + M (s / (s2 + s))^2 along the classes, s = sigma^2."""
    M, s2 = 4.0, 0.25
    sigma = np.array([1.0, 8.0, 3.0])  # the order that comes is the order that is answered
    found = network_stability(network(pair(M, s2)), sigma, directions=2, starts=torch.stack([AXIS, -AXIS]))
    s = sigma**2
    top = s2 / (s2 + s) + M * s / (s2 + s) ** 2
    # The network's levels come back from an interpolated t, good to about 1e-9.
    np.testing.assert_allclose(found.eigenvalues[:, 0], top, rtol=1e-7)
    np.testing.assert_allclose(found.eigenvalues[:, 1], s2 / (s2 + s), rtol=1e-7)
    np.testing.assert_allclose(found.margin, top - 1, atol=1e-7)
    assert found.states.abs().max() < 1e-9
    assert found.asymmetry.max() < 1e-9
    assert float((found.direction * AXIS).sum()) == pytest.approx(1.0, abs=1e-9)
    assert found.wells.tolist() == [2, 1, 1]
    assert found.reason is None


@pytest.mark.parametrize("flow_frame", [("sde", "ve"), ("sde", "vp")])
def test_a_moving_centre_of_unequal_weights(flow_frame):
    """Two classes that mirror each other and a smaller third: the centre moves; the law's own answer is exact."""
    offset = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).reshape(SHAPE)
    means = torch.stack([2 * AXIS, -2 * AXIS, 0.4 * offset])
    law = Mixture.from_parameters(means, 0.2, [0.4, 0.4, 0.2])
    exact = bifurcation(law, *flow_frame)
    found = network_stability(network(law), np.geomspace(10, 0.7, 5), *flow_frame, wells=False)
    assert exact.level is not None
    assert found.critical.sigma == pytest.approx(exact.sigma, rel=1e-7)
    along = found.states.flatten(1) @ offset.flatten() / 4
    assert float(along.max() - along.min()) > 0.1  # it does move
    assert found.reason is None


def test_unequal_weights_have_wells_but_no_crossing():
    """Weights .7 / .3, spread 0, VE: the centre becomes a well; the other appears at the fold, known in closed form."""
    law = Empirical(torch.stack([AXIS] * 7 + [-AXIS] * 3))
    exact = bifurcation(Mixture.from_parameters([[1.0], [-1.0]], 0.0, [0.7, 0.3]), "sde", "ve", criterion="wells")
    found = network_stability(network(law), np.geomspace(4, 0.2, 4), starts=torch.stack([AXIS, -AXIS]))
    assert found.critical.level is None
    assert "stays stable" in found.critical.reason
    # The bracket is closed to 2 % in sigma; a well right below its fold may be missed by the iteration.
    assert found.splitting.low.sigma <= exact.sigma * 1.001
    assert found.splitting.sigma == pytest.approx(exact.sigma, rel=0.03)


def test_three_classes_split_before_the_centre_destabilises():
    """K points on a simplex, VP SDE: wells at alpha-bar .5932, the centre at .6180."""
    y = torch.eye(3, dtype=torch.float64) - 1 / 3
    law = Empirical(torch.cat([y / y.norm(dim=1, keepdim=True), torch.zeros(3, 1)], 1).reshape(3, *SHAPE))
    found = network_stability(network(law), np.geomspace(3, 0.5, 5), "sde", "vp", starts=law.points)
    assert found.critical.level.alpha_bar == pytest.approx(0.6180339887, rel=1e-7)
    assert found.splitting.level.alpha_bar == pytest.approx(0.5932, rel=0.02)  # the bracket is 2 % of sigma
    assert found.splitting.low.sigma > found.critical.sigma
    assert "other wells exist" in found.critical.reason


def test_one_gaussian_never_breaks_in_ve():
    cov = torch.diag(torch.tensor([9.0, 1.0, 0.5, 0.1]))
    law = Gaussian(Moments(2, torch.zeros(SHAPE), cov))
    posing = network(law)
    sigma = np.geomspace(10, 0.1, 5)
    found = network_stability(posing, sigma, seed=3)
    assert found.critical.level is None
    assert found.splitting.level is None
    assert found.wells.tolist() == [1] * 5
    np.testing.assert_allclose(found.eigenvalues[:, 0], 9 / (9 + sigma**2), rtol=1e-7)
    # The trap: VP fires for a variance above 2, at 1 / (v - 1).
    assert stability_times(posing, sigma, [("sde", "vp")])[0].level.alpha_bar == pytest.approx(1 / 8, rel=1e-7)
    arc = arc_potential(posing, sigma, points=31)
    assert arc.wells.max() <= 1
    assert arc.critical.level is None
    assert "try lower" in arc.critical.reason


# --- Jacobians ------------------------------------------------------------------------------------


def test_an_asymmetric_jacobian_by_arnoldi():
    """D(x) = A x / (1 + sigma^2), d = 400: A has eigenvalues 2 +- i and smaller ones; VE crossing at sigma = 1."""
    d = 400
    rng = np.random.default_rng(0)
    a = np.diag(np.linspace(0.0, 1.0, d))
    a[-2:, -2:] = [[2.0, 1.0], [-1.0, 2.0]]
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a = torch.from_numpy(q @ a @ q.T)
    exact = float((a - a.T).norm() / (a + a.T).norm())
    toy = Plain(lambda x, s: x @ a.T / (1 + s**2), (d,))
    sigma = np.geomspace(5, 0.3, 4)
    found = network_stability(toy, sigma, wells=False)
    np.testing.assert_allclose(found.eigenvalues[:, 0], 2 / (1 + sigma**2), rtol=1e-9)
    assert found.critical.sigma == pytest.approx(1.0, rel=1e-9)
    # Estimated from 496 random pairs: relative error about 1 / sqrt(2 x 496) of either norm, 4 sigma.
    np.testing.assert_allclose(found.asymmetry, exact, rtol=4 * math.sqrt(2 / 992))
    # The direction lies in the plane of the complex pair.
    plane = torch.from_numpy(q[:, -2:])
    assert float((found.direction @ plane).norm()) == pytest.approx(1.0, abs=1e-7)


def test_the_asymmetry_of_a_known_matrix():
    a = torch.tensor([[0.9, 0.5], [-0.1, 0.2]], dtype=torch.float64)
    found = network_stability(Plain(lambda x, s: x @ a.T, (2,)), [5.0, 0.5], wells=False)
    eigenvalues = np.sort(np.linalg.eigvals(a.numpy()).real)[::-1]
    np.testing.assert_allclose(found.eigenvalues[:, 0], eigenvalues[0], rtol=1e-12)
    expected = float((a - a.T).norm() / (a + a.T).norm())
    np.testing.assert_allclose(found.asymmetry, expected, rtol=1e-12)


def test_products_on_the_bundled_network():
    """Forward-mode products pass through attention and group norms, and agree with differences."""
    from symbreak.phases.fixed_point_search import System
    from symbreak.start.loading import load_pipeline

    pipe = load_pipeline("digits")
    d = denoiser(pipe.unet, pipe.scheduler)
    system = System(d, "sde", "ve")
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, system.dim))
    product = system.products(x, v[None], 0.0)[0]
    h = 1e-2
    ends = [d(torch.from_numpy(x + k * h * v).reshape(1, *d.shape), 1.0).detach().numpy().ravel() for k in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * h)
    # Central differences: curvature h^2 and float32's 1e-6 / h, both near 1e-4 of the product.
    assert np.linalg.norm(product - difference) < 2e-3 * np.linalg.norm(product)


# --- the arc --------------------------------------------------------------------------------------


def test_two_wells_on_the_arc_where_theory_says():
    """VP SDE, two Gaussians, trajectories along the classes that mirror each other: the arc is a line."""
    M, s2 = 4.0, 0.25
    law = pair(M, s2)
    q = 1 / (M + math.sqrt(M**2 + (1 - s2) ** 2))
    critical = math.sqrt(1 / q - 1)
    sigma = np.concatenate([critical * np.array([2.0, 1.3, 1.03]), critical * np.array([0.9, 0.5, 0.2])])
    found = arc_potential(network(law), sigma, torch.stack([AXIS, -AXIS]), wells=Wells(depth=1e-6))
    assert found.wells.tolist() == [1, 1, 1, 2, 2, 2]
    assert found.critical.low.sigma == pytest.approx(0.9 * critical)
    assert found.critical.high.sigma == pytest.approx(1.03 * critical)
    assert found.critical.low.sigma < critical < found.critical.high.sigma
    assert (np.diff(found.depth[3:]) > 0).all()
    # The depth by the law's own potential on the line, from the centre to the well on a fine grid.
    at = 4
    reach = float(found.states[at, 0].flatten().norm()) * math.sqrt(2)
    line = torch.linspace(0, reach, 2001, dtype=torch.float64).reshape(-1, 1, 1, 1) * AXIS
    u = potential(law, line, float(sigma[at])).value
    # 61 points miss the bottom of a well by at most half a step: u'' (step / 2)^2 / 2, below 1 % here.
    assert found.depth[at] == pytest.approx(float(u[0] - u.min()), rel=0.01)
    assert float((found.ends[0] * AXIS).sum()) == pytest.approx(-float((found.ends[1] * AXIS).sum()), rel=1e-9)


def test_the_arc_of_seeds_joins_different_classes():
    law = pair(16.0, 0.1)

    def classify(x):
        return ((x.double() * AXIS).flatten(1).sum(1) > 0).long()

    found = arc_potential(network(law), [30.0, 0.3], candidates=6, points=21, classify=classify)
    assert classify(found.ends).tolist() in ([0, 1], [1, 0])
    assert found.wells.tolist()[1] == 2
    again = arc_potential(network(law), [30.0, 0.3], found.seeds, points=21)
    # The same trajectories, in a batch of 2 instead of 6: float64 rounding over 40 steps.
    np.testing.assert_allclose(again.value, found.value, rtol=1e-9, atol=1e-9)
    high = arc_potential(network(law), [0.3], found.seeds, points=21).critical
    assert high.level is None
    assert "try higher" in high.reason


# --- resuming, modes, bad input -------------------------------------------------------------------


class Interrupted(Run):
    """Stops where more parts than a limit would be made."""

    made, limit = 0, 10**6

    def part(self, key, make, *settings):
        def counted():
            if Interrupted.made >= Interrupted.limit:
                raise KeyboardInterrupt
            Interrupted.made += 1
            return make()

        return super().part(key, counted, *settings)


def test_an_interrupted_run_has_the_same_bits_and_another_one_its_own(tmp_path):
    posing = network(pair(4.0, 0.25), torch.float32)
    sigma = np.geomspace(8, 0.5, 3)

    def both(folder=None, posing=posing, **settings):
        done = []
        run = Interrupted(folder, progress=lambda stage, i, n: done.append((stage, i, n)))
        a = network_stability(posing, sigma, run=run, **settings)
        assert done == [("stability", i + 1, done[-1][2]) for i in range(done[-1][2])]
        b = arc_potential(posing, sigma, points=9, candidates=3, run=run)
        return a.to_dict() | b.to_dict(), a.states, a.directions, b.states, b.value

    def same(run, whole):
        return run[0] == whole[0] and all(
            np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(run[1:], whole[1:], strict=True)
        )

    whole = both()
    Interrupted.made = 0
    for Interrupted.limit in (2, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            both(tmp_path)
    Interrupted.limit = 10**6
    assert same(both(tmp_path), whole)
    Interrupted.limit = 0
    assert same(both(tmp_path), whole)
    # What decides a part is in its name: nothing of another network or other settings is taken.
    Interrupted.limit = 10**6
    starts = 2 * torch.stack([AXIS, -AXIS, 0.1 * AXIS])
    for settings in ({"posing": network(pair(4.0, 0.3), torch.float32)}, {"starts": starts}, {"x0": 0.5 * AXIS}):
        assert same(both(tmp_path, **settings), both(**settings))


@pytest.mark.parametrize("old", ["progress", "keep", "depth", "tolerance", "seeds"])
def test_the_old_spelling_names_the_new_one(old):
    call = arc_potential if old in ("depth", "tolerance", "seeds") else network_stability
    with pytest.raises(InputError, match=f"{old}=...") as error:
        call(None, 1.0, **{old: 1})
    assert ("run=" if call is network_stability else "candidates=" if old == "seeds" else "wells=Wells(") in str(
        error.value
    )


def test_mode_images_are_the_leading_eigenvectors():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    values = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    m = Moments(50, torch.zeros(1, 2, 3), (q * values) @ q.T)
    for moments in (m, m.truncate(4)):
        images = mode_images(moments, 3)
        assert images.shape == (3, 1, 2, 3)
        rows = images.flatten(1)
        torch.testing.assert_close((rows @ q[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
        assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())
    assert len(mode_images(m.truncate(2), 8)) == 2
    # Above d = 256 by Lanczos.
    big = torch.diag(torch.linspace(0.1, 1.0, 300, dtype=torch.float64))
    big[7, 7] = 5.0
    image = mode_images(Moments(50, torch.zeros(300), big), 1)
    assert float(image[0, 7]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: network_stability(d, [1.0, 1e4]), "the denoiser knows"),
        (lambda d: network_stability(d, []), "sigma of shape"),
        (lambda d: network_stability(d, 1.0, frame="edm"), "frame 'edm'"),
        (lambda d: network_stability(d, 1.0, directions=0), "0 directions"),
        (lambda d: network_stability(d, 1.0, x0=torch.zeros(3)), "x0 has the shape"),
        (lambda d: network_stability(d, 1.0, starts=torch.zeros(2, 3)), "starts of shape"),
        (lambda d: arc_potential(d, 1.0, points=2), "2 points"),
        (lambda d: arc_potential(d, 1.0, torch.zeros(2, 3)), "a pair of shape"),
        (lambda d: arc_potential(d, 1.0, (1, 2, 3)), "a pair of seeds"),
        (lambda d: arc_potential(d, 1.0, classify=lambda x: torch.full((len(x),), math.nan)), "classify gave"),
        (lambda d: arc_potential(d, 1.0, classify=lambda x: torch.zeros(3)), "classify gave"),
        (lambda d: mode_images(Moments(2, [0.0], [[1.0]]), 0), "0 modes"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(network(pair(4.0, 0.25)))
    assert "\n" not in str(error.value)
