"""Information read off denoising losses, against quadrature and closed forms; laws also pose as networks."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, trapezoid
from scipy.optimize import brentq
from scipy.stats import norm

import symbreak as sb
from symbreak.intervals import resampled
from symbreak.laws import Gaussian, Mixture, PrincipalMixture
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.phases.beyond_gaussian import added_to_law, divergence_bound, non_gaussianity
from symbreak.phases.class_entropy import class_entropy, class_entropy_bound
from symbreak.phases.losses import (
    Losses,
    conditional_entropy,
    entropic_levels,
    entropy_rate,
    integral_above,
    loss_curve,
)
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import plain
from symbreak.runtime.run import Run

RATES = {0.5: 0.5487792, 1.0: 0.4495995, 2.0: 0.0994932}
ENTROPIES = {0.5: 0.0604270, 1.0: 0.3563164, 2.0: 0.5817257}
NATS = {0.5: 0.1719987625, 1.0: 0.0097427699, 2.0: 0.0001502935}


def points(*at, weights=None, variance=0.0) -> Mixture:
    """Points or narrow Gaussians on a line, of sample shape [1, 1, 1]."""
    return Mixture.from_parameters(torch.tensor(at, dtype=torch.float64).reshape(-1, 1, 1, 1), variance, weights)


def as_network(law):
    """A law posing as a diffusers network, seen through the network's adapter."""
    base = sb.scheduler("ddpm")
    return sb.denoiser(sb.as_unet(law, base), base)


def mmse(u: float) -> float:
    """Of the points +-1, by quadrature: E[1 - tanh((1 + u z) / u^2)]."""
    return quad(lambda z: norm.pdf(z) * (1 - math.tanh(1 / u**2 + z / u)), -12, 12, epsabs=1e-14, limit=200)[0]


def exact_losses(sigma) -> Losses:
    """Two images without noise in their losses: expectations for the points +-1 and their Gaussian."""
    own = np.repeat([[mmse(u)] for u in sigma], 2, axis=1)
    law = np.repeat((sigma**2 / (1 + sigma**2))[:, None], 2, axis=1)
    return Losses(sigma, own, {"g": law}, {"g": law - own}, own, own, own)


def within(curve, exact: dict[float, float], errors: float = 4.0):
    """Measured values lie within some standard errors of exact ones; 4 of them are missed once in 16,000."""
    for s, wanted in exact.items():
        i = int(np.flatnonzero(np.isclose(curve.sigma, s))[0])
        assert curve.value[i] == pytest.approx(wanted, abs=errors * (curve.high[i] - curve.low[i]) / 3.92)


# --- losses and entropies -------------------------------------------------------------------------


def test_entropy_rate_and_entropy_of_two_points():
    law = points(-1.0, 1.0)
    grid = np.unique([*np.geomspace(0.12, 2.0, 18), *RATES])
    losses = loss_curve(law, law.sample(40_000, 0.0, generator(1)), grid)
    rate, entropy = entropy_rate(losses), conditional_entropy(losses)
    within(rate, RATES)
    within(entropy, ENTROPIES)
    assert (rate.high - rate.low)[rate.sigma >= 0.5].max() < 0.07
    scaled = entropy_rate(losses, rescaled=True)
    np.testing.assert_allclose(scaled.value, rate.value * rate.sigma, rtol=1e-12)
    assert {c.name for c in (rate, scaled)} == {"entropy rate", "rescaled entropy rate"}
    np.testing.assert_allclose(conditional_entropy(losses, 0.25).value, entropy.value + 0.25, rtol=1e-12)


def test_exact_losses_integrate_to_the_entropy():
    # Steps of 0.15 in log sigma: the cubic spline errs by its fourth power, 5e-4, times a share of the value.
    sigma = np.unique([*np.exp(np.arange(math.log(0.15), math.log(2), 0.15)), *ENTROPIES])
    found = conditional_entropy(exact_losses(sigma))
    for s, wanted in ENTROPIES.items():
        assert found.value[sigma == s] == pytest.approx(wanted, abs=3e-4)


def test_a_law_that_poses_as_a_network_has_the_law_s_losses():
    law, grid = points(-1.0, 1.0), [0.5, 1.0, 2.0]
    data = law.sample(200, 0.0, generator(2))
    a, b = loss_curve(law, data, grid), loss_curve(as_network(law), data, grid, {"law": law})
    np.testing.assert_allclose(a.network, b.network, atol=1e-9)  # float64; the network's own parametrization
    assert np.abs(b.difference("law").value).max() < 1e-9
    assert b.apart["law"].max() < 1e-17
    np.testing.assert_array_equal(a.network, b.laws["law"])
    json.dumps(plain(b.to_dict()), allow_nan=False)


def test_losses_of_a_gaussian_and_of_the_state():
    m = Moments(1000, torch.zeros(1, 2, 2), torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.25], dtype=torch.float64)))
    law = Gaussian(m)
    data = law.sample(4000, 0.0, generator(3))
    losses = loss_curve(law, data, [0.5, 2.0], through=lambda r, u: u * r)
    lam = law.eigenvalues.numpy()
    within(losses.mmse, {s: float((lam * s * s / (lam + s * s)).sum()) for s in (0.5, 2.0)})
    # |eps|^2 of 4 dimensions: mean 4, standard error sqrt(8 / 4000).
    np.testing.assert_allclose(losses.state.mean(1) / losses.sigma**2, 4.0, atol=4 * math.sqrt(8 / 4000))
    # The answers spread as lambda^2 / (lambda + sigma^2); 4 standard errors are 9 %.
    np.testing.assert_allclose(losses.spread.mean(1), [(lam**2 / (lam + s * s)).sum() for s in losses.sigma], rtol=0.09)
    np.testing.assert_allclose(losses.through[None], losses.network * losses.sigma[:, None] ** 2, rtol=1e-12)


def test_more_draws_narrow_the_interval():
    law = points(-1.0, 1.0)
    data = law.sample(500, 0.0, generator(4))
    one, four = (loss_curve(law, data, [1.0], draws=n).mmse for n in (1, 4))
    # Both points are alike, so all the spread is the noise's: half the width, within what 500 images tell (10 %).
    assert float((four.high - four.low)[0] / (one.high - one.low)[0]) == pytest.approx(0.5, rel=0.15)


def test_classes_are_given_to_laws_with_classes():
    law = points(-3.0, 3.0, variance=0.04)
    law.classes = torch.tensor([0, 1])
    y = torch.arange(2).repeat(1000)
    data = law.means[y].reshape(-1, 1, 1, 1) + 0.2 * torch.randn(2000, 1, 1, 1, generator=generator(5)).double()
    s = 3.0
    within(loss_curve(law, data, [s], labels=y).mmse, {s: 0.04 * s * s / (0.04 + s * s)})
    assert loss_curve(law, data, [s]).mmse.value[0] > 2  # not knowing the class


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    law = points(-1.0, 1.0)
    data, grid = law.sample(100, 0.0, generator(6)), np.geomspace(0.2, 2, 5)
    seen = []

    def stop(_, done, total):
        if done == 2:
            raise KeyboardInterrupt

    whole = loss_curve(law, data, grid, {"law": law}, run=Run(progress=lambda *at: seen.append(at)))
    with pytest.raises(KeyboardInterrupt):
        loss_curve(law, data, grid, {"law": law}, run=Run(tmp_path, progress=stop))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    again = loss_curve(law, data, grid, {"law": law}, run=Run(tmp_path))
    np.testing.assert_array_equal(whole.network, again.network)
    assert seen == [("loss", j, 5) for j in range(1, 6)]
    # In the same folder other images, laws, noise or levels never meet these parts.
    for arguments in ((data + 1, grid), (data, 2 * grid)):
        np.testing.assert_array_equal(
            loss_curve(law, *arguments, run=Run(tmp_path)).network, loss_curve(law, *arguments).network
        )
    other = loss_curve(law, data, grid, {"law": Gaussian(law.moments)}, seed=1, run=Run(tmp_path))
    assert not np.array_equal(other.laws["law"], again.laws["law"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 20


def test_entropic_levels_of_a_gaussian():
    """MMSE / sigma^2 = lambda / (lambda + sigma^2): its integral is sqrt(lambda) arctan(sigma / sqrt(lambda))."""
    sigma = np.geomspace(0.05, 20, 25)
    own = np.repeat((4 * sigma**2 / (4 + sigma**2))[:, None], 2, axis=1)
    found = entropic_levels(Losses(sigma, own, {}, {}, own, own, own), 7)
    wanted = 2 * np.tan(np.linspace(math.atan(10), math.atan(0.025), 7))
    # Straight lines between 16 points of every step of 0.25: errors of 0.016^2 / 8, and the spline's.
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    assert found[0] == 20
    assert found[-1] == 0.05


def test_the_integral_is_that_of_a_spline():
    sigma = np.array([0.3, 0.5, 0.9, 1.1, 2.0, 4.0])
    u = np.log(sigma)
    exact = (u[-1] ** 4 - u**4) / 4
    np.testing.assert_allclose(integral_above(u**3, sigma), exact, atol=1e-12)  # a cubic is its own spline
    straight = integral_above(np.stack([u**3, u], 1), sigma, order=1)
    np.testing.assert_allclose(straight[:, 1], (u[-1] ** 2 - u**2) / 2, atol=1e-12)
    assert straight[0, 0] == pytest.approx(trapezoid(u**3, u), abs=1e-12)
    assert integral_above(np.ones((1, 3)), np.ones(1)).tolist() == [[0.0, 0.0, 0.0]]


def test_resampled_means():
    x = np.stack([np.arange(100.0), np.ones(100)])
    found = resampled(x, seed=1, resamples=2000)
    np.testing.assert_allclose(found[:, 1], 1.0, rtol=1e-12)
    # Standard deviation of a mean of 100 of 0..99: 28.87 / 10; of 2,000 such, 1.6 % of it by chance, 5 of them.
    assert found[:, 0].std() == pytest.approx(28.866 / 10, rel=0.08)
    assert found[:, 0].mean() == pytest.approx(49.5, abs=5 * 2.887 / math.sqrt(2000))


# --- non-Gaussianity ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.1, 0.25])
def test_non_gaussianity_of_exact_losses(step):
    """The integral is the divergence of two points from their Gaussian, within the quadrature error it states."""
    grid = np.unique([*np.exp(np.arange(math.log(0.5), math.log(20), step)), 1.0, 2.0, 20.0])
    found = divergence_bound(exact_losses(grid), "g", list(NATS))
    for i, wanted in enumerate(NATS.values()):
        # Nothing is left above sigma = 20: the divergence falls with its eighth power there.
        assert abs(found.value[i] - wanted) <= found.quadrature[i]
    assert found.quadrature[0] < (2e-4 if step == 0.1 else 6e-3)
    np.testing.assert_allclose(found.indicator, found.value, rtol=1e-12)  # E|D_p - D_q|^2 = LMMSE - MMSE


def test_non_gaussianity_of_two_points():
    law = points(-1.0, 1.0)
    gaussian = Gaussian(law.moments)
    data = law.sample(2000, 0.0, generator(7))
    found = non_gaussianity(as_network(law), gaussian, data, list(NATS))
    for i, wanted in enumerate(NATS.values()):
        spread = (found.high[i] - found.low[i]) / 3.92
        assert found.value[i] == pytest.approx(wanted, abs=4 * spread + found.quadrature[i])
        # The distance has far less noise than the difference of losses: 10 % for 2,000 images.
        assert found.indicator[i] == pytest.approx(wanted, rel=0.1, abs=found.quadrature[i])
    assert found.losses.sigma[-1] == pytest.approx(20.0, rel=1e-2)
    one = non_gaussianity(law, gaussian, data, 0.5)
    assert one.value.shape == ()
    assert float(one.value) == pytest.approx(0.172, abs=0.02)  # 4 standard errors
    json.dumps(plain(found.to_dict()), allow_nan=False)


def test_a_law_with_another_mean():
    """q = N(delta, 1) against p = N(0, 1): KL = delta^2 / (2 (1 + sigma^2)), which is not yet zero at the top."""
    p, q = (Gaussian(Moments(1000, torch.full((1, 1, 1), m), torch.ones(1, 1))) for m in (0.0, 0.8))
    found = non_gaussianity(p, q, p.sample(4000, 0.0, generator(8)), [0.5, 2.0], top=30.0)
    for i, s in enumerate((0.5, 2.0)):
        wanted = 0.32 / (1 + s * s) - 0.32 / (1 + 30.0**2)
        assert found.value[i] == pytest.approx(wanted, abs=(found.high[i] - found.low[i]) + found.quadrature[i])
        assert found.indicator[i] == pytest.approx(wanted, abs=1e-3)  # D_p - D_q is the same at every x


def test_a_network_worse_than_the_law_is_below_zero():
    p, q = (Gaussian(Moments(1000, torch.full((1, 1, 1), m), torch.ones(1, 1))) for m in (0.0, 0.8))
    found = non_gaussianity(q, p, p.sample(1000, 0.0, generator(9)), np.geomspace(0.3, 3, 4))
    assert found.high.max() < 0
    time = found.time()
    assert time.level is None
    assert "the range to try is" in time.reason


def divergence(law: Mixture, sigma: float) -> float:
    """KL of a noised mixture on a line from the Gaussian of its moments, by quadrature."""
    m, v = float(law.moments.mean), float(law.moments.cov) + sigma**2
    s = np.sqrt(law.floor.numpy() + sigma**2)
    means, w = law.means[:, 0].numpy(), law.weights.numpy()

    def integrand(x):
        p = float((w * norm.pdf(x, means, s)).sum())
        return p * (math.log(p) - norm.logpdf(x, m, math.sqrt(v))) if p > 0 else 0.0

    ends = means.min() - 12 * s.max(), means.max() + 12 * s.max()
    return quad(integrand, *ends, epsabs=1e-11, limit=400, points=means)[0]


def uneven() -> Mixture:
    """Three classes of unequal weights."""
    return points(-1.5, 0.0, 2.0, weights=[0.5, 0.3, 0.2], variance=0.05)


def test_the_level_of_a_tenth_of_a_nat():
    law = points(-1.0, 1.0)
    exact = brentq(lambda s: divergence(points(-1.0, 1.0, variance=1e-6), s) - 0.1, 0.4, 1.0)
    time = divergence_bound(exact_losses(np.geomspace(0.4, 20, 18)), "g").time()
    assert time.sigma == pytest.approx(exact, rel=2e-3)  # the spline, steps of 0.23
    data = law.sample(2000, 0.0, generator(10))
    found = non_gaussianity(law, Gaussian(law.moments), data, 0.4)
    level = found.time()
    assert level.low.sigma < exact < level.high.sigma  # this seed is one of the 95
    assert level.high.sigma - level.low.sigma < 0.1
    assert level.criterion == "non-Gaussianity of 0.1 nat"
    assert found.time(0.2).sigma < level.sigma
    above = non_gaussianity(law, Gaussian(law.moments), data, 1.5).time()
    assert above.level is None
    assert "the range to try is below 1.5" in above.reason


# --- class entropy --------------------------------------------------------------------------------


def test_class_entropy_of_two_points_is_their_entropy():
    found = class_entropy(points(-1.0, 1.0), list(ENTROPIES))
    np.testing.assert_allclose(found.value, list(ENTROPIES.values()), atol=5e-8)  # seven published digits
    np.testing.assert_allclose(found.bits.value, found.value / math.log(2), rtol=1e-15)
    assert found.total == pytest.approx(math.log(2), abs=1e-15)
    half = found.time()
    again = class_entropy(points(-1.0, 1.0), half.sigma)
    assert float(again.value) == pytest.approx(0.5 * math.log(2), abs=1e-10)
    assert half.low is None  # exact
    beyond = class_entropy(points(-1.0, 1.0), [2.0, 3.0]).time()
    assert beyond.level is None
    assert "below 2" in beyond.reason
    json.dumps(plain(found.to_dict()), allow_nan=False)


def test_class_entropy_of_three_classes_against_quadrature():
    law = uneven()
    found = class_entropy(law, [0.3, 1.0, 2.0], samples=40_000)
    w, m = law.weights.numpy(), law.means[:, 0].numpy()

    def exact(s):
        width = math.sqrt(0.05 + s * s)

        def integrand(x):
            joint = w * norm.pdf(x, m, width)
            p = joint / joint.sum()
            return -joint.sum() * float((p * np.log(np.maximum(p, 1e-300))).sum())

        return quad(integrand, -1.5 - 12 * width, 2 + 12 * width, limit=400)[0]

    within(found, {s: exact(s) for s in (0.3, 1.0, 2.0)})
    half = found.time()
    wanted = brentq(lambda s: exact(s) - 0.5 * found.total, 0.3, 2.0)
    assert abs(half.sigma - wanted) < 2 * (half.high.sigma - half.low.sigma)
    assert half.low.sigma < half.sigma < half.high.sigma


def test_components_of_one_class_are_put_together():
    law = points(-1.0, -1.0, 1.0, weights=[0.2, 0.3, 0.5])
    law.classes = torch.tensor([4, 4, 9])
    # As two classes of equal weight; 20,000 draws.
    within(class_entropy(law, list(ENTROPIES)), ENTROPIES)
    law.classes = torch.tensor([4, 4, 4])
    with pytest.raises(InputError, match="single class"):
        class_entropy(law, 1.0)


def test_class_entropy_of_a_principal_mixture():
    y = torch.arange(2).repeat(300)
    x = torch.zeros(600, 1, 2, 2).double()
    x[:, 0, 0, 0] = 2.0 * y - 1
    x += 0.05 * torch.randn(x.shape, generator=generator(11), dtype=torch.float64)
    law = PrincipalMixture.fit(x, labels=y, leading=1)
    # Narrow clumps at +-1; the fit's means and variances move the entropy by a per cent.
    np.testing.assert_allclose(class_entropy(law, [1.0, 2.0]).value, [0.3563, 0.5817], rtol=0.02)


def triangle() -> Mixture:
    """Three points of unequal weights in a plane, [1, 1, 2]: the log odds are the logs of D's barycentric weights."""
    at = torch.tensor([[0.0, 1.0], [-0.9, -0.5], [0.9, -0.5]], dtype=torch.float64)
    return Mixture.from_parameters(at.reshape(3, 1, 1, 2), 0.0, [0.5, 0.3, 0.2])


def barycentric(d: torch.Tensor) -> torch.Tensor:
    corners = torch.cat([triangle().means, torch.ones(3, 1).double()], 1)
    flat = torch.cat([d.flatten(1).double(), torch.ones(len(d), 1).double()], 1)
    return (flat @ torch.linalg.inv(corners)).clamp_min(1e-6).log()


def labelled(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.multinomial(triangle().weights, n, replacement=True, generator=generator(seed))
    return triangle().means[y].reshape(-1, 1, 1, 2), y


def bound(network, sigma, seed, features=barycentric, fit=2000, held=500):
    x, y = labelled(fit + held, seed)
    return class_entropy_bound(network, sigma, x[fit:], y[fit:], x[:fit], y[:fit], features, seed=seed)


def test_a_classifier_bounds_the_class_entropy():
    sigma, network = np.array([0.4, 0.7, 1.0, 1.6]), as_network(triangle())
    exact = class_entropy(triangle(), sigma, samples=60_000)
    tight = bound(network, sigma, 12, held=2000)
    # The features are sufficient; 8 coefficients fitted to 2,000 images cost 8 / 4,000 nats on others.
    within(tight, dict(zip(sigma, exact.value + 0.002)))
    # Principal coordinates of D are not log odds: the bound is looser where classes are told apart.
    loose = bound(network, sigma, 12, features=None, held=2000)
    assert (loose.value > exact.value - 0.03).all()  # two standard errors
    assert loose.value[1] < 1.3 * exact.value[1]
    assert tight.total == pytest.approx(exact.total, abs=0.03)
    half = tight.time()
    assert half.low.sigma < half.sigma < half.high.sigma
    assert half.source.startswith("derived")
    json.dumps(plain(tight.to_dict()), allow_nan=False)


def test_class_entropy_goes_on_with_the_same_bits(tmp_path):
    x, y = labelled(120, 13)
    arguments = (triangle(), [0.5, 1.0], x[60:], y[60:], x[:60], y[:60])
    whole = class_entropy_bound(*arguments)
    for _ in range(2):
        again = class_entropy_bound(*arguments, run=Run(tmp_path))
        assert len(list(tmp_path.rglob("class-entropy*.safetensors"))) == 2
        np.testing.assert_array_equal(whole.scores, again.scores)


# --- wrong input ----------------------------------------------------------------------------------


class Broken:
    shape, sigma_range = (1, 1, 1), (0.01, 100.0)

    def __call__(self, x, sigma):
        return x * math.nan


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: loss_curve(points(0.0, 1.0), x[..., :0], 1.0), "expected one shape"),
        (lambda x: loss_curve(points(0.0, 1.0), x[:1], 1.0), "1 images; expected at least 2"),
        (lambda x: loss_curve(points(0.0, 1.0), "digits", 1.0), r"sb\.images"),
        (lambda x: loss_curve(points(0.0, 1.0), x * math.nan, 1.0), "images hold NaN"),
        (lambda x: loss_curve(Broken(), x, 1.0), "answers NaN"),
        (lambda x: loss_curve(Broken(), x, 1.0, labels=[0] * 40), "takes no condition"),
        (lambda x: loss_curve(as_network(points(0.0, 1.0)), x, 1e-4), "the network knows"),
        (lambda x: loss_curve(points(0.0, 1.0), x, 1.0, labels=[1, 2]), "labels of shape .2,. for 40 images"),
        (lambda x: loss_curve(points(0.0, 1.0), x, 1.0, {"q": triangle()}), "the law 'q'"),
        (lambda x: loss_curve(points(0.0, 1.0), x, 1.0, draws=0), "0 noise draws"),
        (lambda x: loss_curve(points(0.0, 1.0), x, 1.0).law("q"), "no losses of 'q'"),
        (lambda x: non_gaussianity(points(0.0, 1.0), points(0.0), x, 2.0, top=1.0), "expected it to rise"),
        (lambda x: divergence_bound(exact_losses(np.array([1.0, 2.0])), "g", 3.0), "the losses run from 1 to 2"),
        (lambda x: entropic_levels(exact_losses(np.array([1.0])), 3), "at least 2"),
        (lambda x: class_entropy(Gaussian(points(0.0, 1.0).moments), 1.0), "has no classes"),
        (lambda x: class_entropy(points(0.0, 1.0), 1.0, images=x), "class_entropy_bound"),
        (lambda x: class_entropy_bound(Broken(), 1.0, x, [0] * 40, x, [0] * 40), "a single class"),
        (lambda x: class_entropy_bound(Broken(), 1.0, x, [0] * 40, x, [0] * 39), "fit_labels of shape .39,. for 40"),
        (lambda x: class_entropy_bound(Broken(), 1.0, x, [0] * 40, x, [0] * 39 + [1]), "class 1 has 1 images"),
        (lambda x: class_entropy_bound(Broken(), 1.0, x, [0] * 39 + [7], x, [0, 1] * 20), "class 7"),
        (lambda x: class_entropy_bound(Broken(), 1.0, x, [0, 1] * 20, x, [0, 1] * 20), "features gave NaN"),
        (
            lambda x: class_entropy_bound(points(0.0, 1.0), 1.0, x, [0, 1] * 20, x, [0, 1] * 20, lambda d: d[:3]),
            r"expected \[32, F\]",
        ),
    ],
)
def test_wrong_input_is_one_line(call, match):
    with pytest.raises(InputError, match=match) as caught:
        call(points(0.0, 1.0).sample(40, 0.0, generator(0)))
    assert "\n" not in str(caught.value)


# --- what a network adds to the law that it is the residual of ------------------------------------


def residual(truth, law, below=0.0, lowest=0.25, top=2.0):
    """A law, and a network that knows all that the law does not know of the truth, but nothing below a level."""
    table = torch.tensor([[lowest, 20.0], [0.1, 0.1]], dtype=torch.float64)
    d = sb.LawResidual(law, lambda x, s: x, error=table, top=top)

    def perfect(x, s):
        column = s.reshape(-1, *[1] * (x.ndim - 1))
        raw = x * (column**2 + d.size).sqrt()
        wrong = 0.3 * torch.sin(30 * raw)
        gap = torch.where(column < below, wrong, truth.denoise(raw, s) - law.denoise(raw, s))
        return gap / d.scale(s).reshape(column.shape)

    d.network = perfect
    return d


def unit_gaussian():
    return Gaussian(Moments(1000, torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.float64)))


def test_a_perfect_network_adds_the_divergence_and_what_is_left_of_the_variance():
    truth, law = points(-1.0, 1.0), unit_gaussian()
    found = added_to_law(residual(truth, law), truth.sample(8000, 0.0, generator(5)), 21)
    np.testing.assert_allclose(found.nats.sigma[[0, 10, 20]], [0.5, 1.0, 2.0])
    within(found.nats, {s: nats - NATS[2.0] for s, nats in NATS.items() if s < 2})
    assert found.nats.value[-1] == 0
    # D_p = tanh(x / u^2), whose square has the mean 1 - MMSE; the law leaves LMMSE - MMSE of it, u^2 / (1 + u^2) less.
    exact = {u: 1 - (u**2 / (1 + u**2) - mmse(u)) / (1 - mmse(u)) for u in (0.5, 1.0, 2.0)}
    within(found.share, exact)
    assert max(found.share.high - found.share.low) < 0.03
    # The score's square is E|D_p - x|^2 / u^4, and E|D_p - x|^2 = u^2 - MMSE.
    within(found.score, {u: 1 - (u**2 / (1 + u**2) - mmse(u)) / (u**2 - mmse(u)) for u in exact})
    within(found.gain, {u: u**2 / (1 + u**2) - mmse(u) for u in exact})
    fine = np.geomspace(0.5, 2.0, 200)
    own = np.array([mmse(u) for u in fine])
    left, whole = (trapezoid(v, np.log(fine)) for v in (fine**2 / (1 + fine**2) - own, 1 - own))
    assert found.whole[1] < 1 - left / whole < found.whole[2]
    assert found.whole[2] - found.whole[1] < 0.01
    assert found.net == (found.nats.value[0], found.nats.low[0], found.nats.high[0])
    # nine tenths are reached where KL(p_sigma || q_sigma) is a tenth of the whole: between .5 and 1, where it is 1/17
    low, high = found.between
    assert 0.5 < low < 0.55 < 0.75 < high < 1
    assert "most of them (80 %) between" in found.sentence
    assert found.sentence.startswith(f"The law explains {found.whole[0]:.1%} [")
    values = json.loads(json.dumps(plain(found.to_dict()), allow_nan=False))
    assert {"law", "sum", "gain", "share", "score", "nats", "whole", "net", "between", "sentence"} <= set(values)
    np.testing.assert_allclose(np.subtract(values["law"]["value"], values["sum"]["value"]), values["gain"]["value"])


def test_a_network_adds_the_divergence_of_log_densities():
    g = torch.Generator().manual_seed(0)
    truth = Mixture.from_parameters(torch.randn(3, 4, generator=g, dtype=torch.float64), 0.1)
    law = Mixture.from_parameters(torch.randn(2, 4, generator=g, dtype=torch.float64), 0.6)  # no moments in common
    found = added_to_law(residual(truth, law, lowest=0.1), truth.sample(2000, 0.0, g), 12)

    def divergence(sigma):
        x = truth.sample(40_000, sigma, g)
        values = (truth.log_prob(x, sigma) - law.log_prob(x, sigma)).numpy()
        return values.mean(), values.std() / len(values) ** 0.5

    (low, a), (top, b) = divergence(0.2), divergence(2.0)
    error = math.hypot((found.net[2] - found.net[1]) / 3.92, a, b)
    assert found.net[0] == pytest.approx(low - top, abs=4 * error)
    assert error < 0.03 * found.net[0]


def test_a_network_that_adds_nothing():
    truth, law = points(-1.0, 1.0), unit_gaussian()
    d = residual(truth, law)
    d.network = lambda x, s: torch.zeros_like(x)
    found = added_to_law(d, truth.sample(500, 0.0, generator(6)))
    assert np.abs(found.share.value - 1).max() < 1e-12
    assert np.abs(found.score.value - 1).max() < 1e-12
    assert found.net[1] <= 0 <= found.net[2]
    assert np.abs(found.nats.value).max() < 1e-12
    assert found.between is found.lost is None
    assert "the network adds nothing beyond the interval: 0 [0, 0] nats." in found.sentence
    d.network = lambda x, s: torch.sin(50 * x)
    worse = added_to_law(d, truth.sample(500, 0.0, generator(6)))
    assert worse.net[2] < 0
    assert worse.share.value.max() < 1
    assert worse.between is worse.lost is None
    assert "the network is worse than the law: -" in worse.sentence


def test_what_a_network_is_added_to_where_the_law_fades_or_has_classes():
    truth = points(-1.0, 1.0)
    images = truth.sample(300, 0.0, generator(9))
    d = sb.LawResidual(unit_gaussian(), lambda x, s: torch.zeros_like(x), top=2.0, fade=0.5)
    found = added_to_law(d, images)
    assert np.abs(found.nats.value).max() < 1e-12
    g = generator(10)
    y = torch.arange(200) % 2
    some = 0.3 * torch.randn(200, 1, 2, 2, generator=g) + (y - 0.5).reshape(-1, 1, 1, 1)
    law = PrincipalMixture.fit(some, labels=y)
    d = sb.LawResidual(law, lambda x, s, class_labels: 0.1 * torch.ones_like(x), top=1.0)
    of_classes = added_to_law(d, some, 4, labels=y)
    own = loss_curve(law, some, of_classes.nats.sigma, labels=y)
    np.testing.assert_allclose(of_classes.losses.of("law"), own.network, rtol=1e-4)
    shift = d.scale(torch.tensor(of_classes.nats.sigma)).numpy() * 0.1
    np.testing.assert_allclose(of_classes.losses.apart["law"].mean(1), 4 * shift**2, rtol=1e-3)


def test_what_a_network_loses_at_low_noise_is_said():
    truth, law = Mixture.from_parameters(torch.tensor([[-1.0], [1.0]]).reshape(2, 1, 1, 1), 0.02), unit_gaussian()
    found = added_to_law(residual(truth, law, below=0.3, lowest=0.05), truth.sample(2000, 0.0, generator(7)))
    assert 0.25 < found.lowest < 0.35
    assert found.lost[2] < 0 < found.net[1]
    assert found.lost[0] == pytest.approx(found.nats.value[0] - found.net[0])
    assert f"nats above sigma {found.lowest:.3g}" in found.sentence
    assert "below it is worse than the law and loses" in found.sentence


def test_a_residual_without_a_top_and_what_it_cannot_say():
    truth, law = points(-1.0, 1.0), unit_gaussian()
    images = truth.sample(500, 0.0, generator(8))
    endless = added_to_law(residual(truth, law, top=math.inf), images)
    assert endless.nats.sigma[-1] == pytest.approx(20, rel=0.05)  # twenty standard deviations
    assert np.diff(np.log(endless.nats.sigma)).max() <= 0.3
    with pytest.raises(InputError, match="3 levels; expected at least 4"):
        added_to_law(residual(truth, law), images, 3)
    with pytest.raises(InputError, match=r"to the residual's top, 0\.4;"):
        added_to_law(residual(truth, law, lowest=0.25, top=0.4), images)
    with pytest.raises(InputError, match="expected one shape"):
        added_to_law(residual(truth, law), torch.zeros(50, 1, 2, 2))
