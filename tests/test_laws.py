"""The laws against each other, against finite differences, quadrature, mpmath, scipy and brute force."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from symbreak.data.readers import images
from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.laws.sphere import _bessel, bessel_ratio
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from tests import worlds

LAWS = {
    "gaussian": lambda: Gaussian(worlds.full_mixture().moments),
    "gaussian of rank 2": lambda: Gaussian(worlds.full_mixture().moments, rank=2),
    "full": worlds.full_mixture,
    "low rank": worlds.low_rank_mixture,
    "isotropic": worlds.isotropic_mixture,
    "empirical": worlds.cloud,
    "sphere": lambda: worlds.sphere(4, 1.5),
    "two points": lambda: worlds.sphere(1, 1.0),
}
SIGMAS = [0.2, 1.0, 5.0]


@pytest.fixture(params=list(LAWS))
def law(request):
    return LAWS[request.param]()


def draws(law, n: int, sigma: float, seed: int = 7) -> torch.Tensor:
    return law.sample(n, sigma, generator(seed))


def normal(*shape: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest relative distance over samples."""
    gap = torch.linalg.vector_norm((a.double() - b.double()).flatten(1), dim=1)
    return float((gap / torch.linalg.vector_norm(b.double().flatten(1), dim=1).clamp(min=1e-30)).max())


# Every law


@pytest.mark.parametrize("sigma", SIGMAS)
def test_posterior_mean_is_the_slope_of_the_log_density(law, sigma):
    """Central differences of step h: error about h^2 (third derivative / 6) + rounding 1e-15 |log p| / h."""
    x = draws(law, 6, sigma)
    h = 1e-4 * sigma
    grad = torch.zeros_like(x).flatten(1)
    for i in range(law.dim):
        step = torch.zeros(law.dim, dtype=torch.float64)
        step[i] = h
        step = step.reshape(law.shape)
        grad[:, i] = (law.log_prob(x + step, sigma) - law.log_prob(x - step, sigma)) / (2 * h)
    grad = grad.reshape(x.shape)
    # Third derivatives of a noised log density are at most of order (spread / sigma)^3 / sigma^3.
    torch.testing.assert_close(law.score(x, sigma), grad, rtol=1e-5, atol=1e-5 / sigma)
    torch.testing.assert_close(law.denoise(x, sigma), x + sigma**2 * law.score(x, sigma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_posterior_covariance_is_the_slope_of_the_posterior_mean(law, sigma):
    x, v = draws(law, 5, sigma), normal(5, *law.shape)
    exact = law.posterior_covariance(x, v, sigma)
    product = torch.func.jvp(lambda y: law.denoise(y, sigma), (x,), (v,))[1]
    torch.testing.assert_close(exact, sigma**2 * product, rtol=1e-9, atol=1e-10)
    one = x[:1]
    dense = torch.func.jacfwd(lambda y: law.denoise(y, sigma))(one).reshape(law.dim, law.dim)
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-10)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12
    by_rows = (sigma**2 * dense @ v[0].flatten()).reshape(law.shape)
    torch.testing.assert_close(by_rows, exact[0], rtol=1e-9, atol=1e-10)


def test_reverse_and_forward_derivatives_agree(law):
    x = draws(law, 3, 1.0).requires_grad_()
    law.log_prob(x, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, law.score(x.detach(), 1.0), rtol=1e-9, atol=1e-10)


def test_a_level_for_every_sample(law):
    sigma = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    x, v = draws(law, 3, 1.0), normal(3, *law.shape)
    for i, s in enumerate(sigma.tolist()):
        part = slice(i, i + 1)
        close = {"rtol": 1e-12, "atol": 1e-13}
        torch.testing.assert_close(law.denoise(x, sigma)[part], law.denoise(x[part], s), **close)
        torch.testing.assert_close(law.score(x, sigma)[part], law.score(x[part], s), **close)
        torch.testing.assert_close(law.log_prob(x, sigma)[part], law.log_prob(x[part], s), **close)
        own = law.posterior_covariance(x[part], v[part], s)
        torch.testing.assert_close(law.posterior_covariance(x, v, sigma)[part], own, **close)


def test_draws_have_the_moments(law):
    """Against 5 standard errors of every entry; 2 x 10^5 draws."""
    n, sigma = 200_000, 0.5
    x = draws(law, n, sigma).flatten(1)
    assert x.dtype == torch.float64
    m = law.moments
    cov = m.cov + sigma**2 * torch.eye(law.dim, dtype=torch.float64)
    error = (cov.diagonal() / n).sqrt()
    assert bool(((x.mean(0) - m.mean.flatten()).abs() < 5 * error).all())
    centred = x - m.mean.flatten()
    products = centred[:, :, None] * centred[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 5 * products.std(0) / math.sqrt(n)).all())


def test_draws_repeat_and_leave_the_global_generator_alone(law):
    before = torch.get_rng_state()
    assert torch.equal(draws(law, 5, 1.0, seed=3), draws(law, 5, 1.0, seed=3))
    assert not torch.equal(law.sample(64), law.sample(64))  # two points: equal by chance once in 2^64
    assert torch.equal(torch.get_rng_state(), before)


def test_density_integrates_to_one(law):
    """E_p[q / p] = 1 over draws of q's twin at a larger level, 5 standard errors."""
    n = 20_000
    m = law.moments
    cov = 1.5 * m.cov + 0.5 * torch.eye(law.dim, dtype=torch.float64)
    wide = Mixture.from_parameters(m.mean[None], cov[None])
    x = draws(wide, n, 0.7)
    ratio = (law.log_prob(x, 0.7) - wide.log_prob(x, 0.7)).exp()
    assert abs(float(ratio.mean()) - 1.0) < 5 * float(ratio.std()) / math.sqrt(n)
    assert float(ratio.std()) < 5  # the test would see nothing were the weights wild


@pytest.mark.parametrize("sigma", [1e-3, 1e-1, 1.0, 30.0, 1e3])
def test_float32_agrees_with_float64(law, sigma):
    """Inputs are rounded first, so only the computation differs: a few units of 6e-8, times d."""
    x = draws(law, 20, sigma).float()
    v = normal(20, *law.shape).float()
    low, high = law.denoise(x, sigma), law.denoise(x.double(), sigma)
    assert low.dtype == torch.float32
    scale = float(high.abs().max())
    torch.testing.assert_close(low.double(), high, rtol=0, atol=3e-6 * scale)
    own, exact = (law.posterior_covariance(x, v, sigma), law.posterior_covariance(x.double(), v.double(), sigma))
    # The differences D_k - D are formed in float32 from numbers of the data's size.
    torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=3e-6 * scale**2)
    gap = (law.log_prob(x, sigma) - law.log_prob(x.double(), sigma)).abs()
    # A Gaussian's squares are of float32 numbers: 6e-8 of |x| against sigma where modes have no spread.
    assert float(gap.max()) < 1e-5 * max(1.0, float(law.log_prob(x.double(), sigma).abs().max()))


def test_extreme_levels(law):
    """Far below the spread the state is returned, far above it the mean and Cov x / sigma^2."""
    m = law.moments
    clean = draws(law, 10, 0.0)
    torch.testing.assert_close(law.denoise(clean, 1e-3), clean, rtol=0, atol=1e-4)
    x = 1e3 * normal(10, *law.shape)
    gap = (x - m.mean).flatten(1)
    linear = m.mean + (gap @ m.cov / (1e6 + m.cov.diagonal().mean())).reshape(x.shape)
    # Next order: third and fourth cumulants, (spread / sigma)^2 z^2 ~ 1e-6 x (3 spread)^3.
    torch.testing.assert_close(law.denoise(x, 1e3), linear, rtol=0, atol=2e-4)


# The flow


def test_flow_of_one_component_is_the_gaussians_and_of_fourth_order():
    moments = worlds.full_mixture().moments
    law, exact = Mixture([moments]), Gaussian(moments)
    z = normal(30, *law.shape)
    x = exact.transport(z, 3.0)
    for start, source in ((z, None), (x, 3.0)):
        want = exact.transport(start, 0.05, source)
        errors = [float((law.transport(start, 0.05, source, steps=n) - want).abs().max()) for n in (24, 48, 96)]
        # Fourth order divides by 16; other orders show themselves as 8 or 32.
        assert 11 < errors[0] / errors[1] < 40, errors
        assert 11 < errors[1] / errors[2] < 26, errors
        assert errors[2] < 1e-7


@pytest.mark.parametrize("name", ["full", "low rank", "isotropic", "empirical", "sphere"])
def test_flow_converges_at_fourth_order(name):
    law = LAWS[name]()
    z = normal(20, *law.shape)
    fine = law.transport(z, 0.3, steps=128)
    coarse, half = ((law.transport(z, 0.3, steps=n) - fine).abs().mean() for n in (32, 64))
    assert 9 < float(coarse / half) < 30  # 16, give or take the next order
    assert float(half) < 3e-5


def test_flow_in_one_dimension_is_the_quantile_map():
    """In one dimension the flow keeps order, so z goes to the target's quantile at Phi(z)."""
    law = worlds.two_gaussians(4.0, 0.25, weights=(0.3, 0.7))
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    for sigma in (0.1, 1.0, 4.0):
        x = law.transport(z, sigma, steps=300)[:, 0].numpy()
        s = math.hypot(0.5, sigma)
        p = 0.3 * stats.norm.cdf(x, -2, s) + 0.7 * stats.norm.cdf(x, 2, s)
        np.testing.assert_allclose(p, stats.norm.cdf(z[:, 0]), atol=2e-7)


def test_flow_carries_white_noise_to_the_law(law):
    """Moments and mean log density of what arrives, within 5 standard errors of fresh draws."""
    n, sigma = 4000, 0.5
    x = law.transport(normal(n, *law.shape), sigma)
    fresh = draws(law, n, sigma)
    for f in (
        lambda y: law.log_prob(y, sigma),
        lambda y: y.flatten(1)[:, 0],
        lambda y: y.flatten(1).square().sum(1),
        lambda y: y.flatten(1).sum(1).abs(),
    ):
        a, b = f(x), f(fresh)
        assert abs(float(a.mean() - b.mean())) < 5 * math.sqrt(float(a.var() + b.var()) / n)


def test_flow_splits_into_the_classes():
    law = worlds.full_mixture()
    n = 3000
    x = law.transport(normal(n, *law.shape), 0.05)
    share = law.responsibilities(x, 0.05).mean(0)
    error = (law.weights * (1 - law.weights) / n).sqrt()
    assert bool(((share - law.weights).abs() < 5 * error).all())


def test_flow_of_a_sample_does_not_depend_on_its_neighbours(law):
    """Same steps for every sample; products over other batch sizes round differently, by 1e-15 a call."""
    z, steps = normal(7, *law.shape), 8  # few: nothing here hangs on the error of a step
    together = law.transport(z, 0.4, steps=steps)
    alone = torch.cat([law.transport(one, 0.4, steps=steps) for one in z.split(1)[:3]])
    torch.testing.assert_close(together[:3], alone, rtol=0, atol=1e-11)


def test_flow_can_go_back_up(law):
    steps = {} if isinstance(law, Gaussian) else {"steps": 60}
    x = law.transport(normal(5, *law.shape), 1.0, **steps)
    up = law.transport(x, 3.0, 1.0, **steps)
    again = law.transport(up, 1.0, 3.0, **steps)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-7)


# Laws that are each other


def same_law(a, b, sigmas=(0.1, 1.0, 10.0), tolerance: float = 1e-10):
    for sigma in sigmas:
        x, v = draws(b, 10, sigma), normal(10, *b.shape)
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(a.denoise(x, sigma), b.denoise(x, sigma), **close)
        torch.testing.assert_close(a.score(x, sigma), b.score(x, sigma), **close)
        torch.testing.assert_close(a.log_prob(x, sigma), b.log_prob(x, sigma), **close)
        torch.testing.assert_close(a.posterior_covariance(x, v, sigma), b.posterior_covariance(x, v, sigma), **close)
    z = normal(5, *b.shape)
    torch.testing.assert_close(a.transport(z, 0.5), b.transport(z, 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(a.moments.mean, b.moments.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.moments.cov, b.moments.cov, rtol=0, atol=1e-12)


def test_one_component_is_a_gaussian():
    moments = worlds.full_mixture().moments
    same_law(Mixture([moments]), Gaussian(moments))


def test_points_of_no_variance_are_the_data_set():
    cloud = worlds.cloud()
    same_law(Mixture.from_parameters(cloud.points, torch.zeros(len(cloud))), cloud)


def test_sphere_in_one_dimension_is_two_points():
    same_law(Sphere(1, 1.0), worlds.two_deltas())
    same_law(Sphere(1, 1.0), Empirical([[-1.0], [1.0]]))


def test_covariance_forms_agree():
    low = worlds.low_rank_mixture()
    d = low.dim
    eye = torch.eye(d, dtype=torch.float64)
    full = torch.stack(
        [q @ torch.diag(e - f) @ q.T + f * eye for q, e, f in zip(low.vectors, low.eigenvalues, low.floor)]
    )
    means = low.means.reshape(-1, *low.shape)
    same_law(Mixture.from_parameters(means, full), low, tolerance=1e-9)
    same_law(Mixture([Moments(2, m, c) for m, c in zip(means, full)]), low, tolerance=1e-9)
    iso = worlds.isotropic_mixture()
    eye = torch.eye(iso.dim, dtype=torch.float64)
    full = iso.floor[:, None, None] * eye
    same_law(Mixture.from_parameters(iso.means, full, iso.weights), iso, tolerance=1e-9)


def test_components_in_chunks_change_nothing(monkeypatch):
    law, low = worlds.full_mixture(5), worlds.low_rank_mixture(5)
    for one in (law, low):
        x, v = draws(one, 4, 1.0), normal(4, *one.shape)
        whole = one.denoise(x, 0.3), one.log_prob(x, 0.3), one.posterior_covariance(x, v, 0.3)
        monkeypatch.setattr("symbreak.laws.mixture.CHUNK", 1)
        for a, b in zip(whole, (one.denoise(x, 0.3), one.log_prob(x, 0.3), one.posterior_covariance(x, v, 0.3))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        monkeypatch.undo()


# Mixture


def test_mixture_density_by_scipy():
    law = worlds.full_mixture()
    x = draws(law, 8, 0.7)
    noise = 0.49 * np.eye(law.dim)
    each = np.stack(
        [
            stats.multivariate_normal(m, (q * e) @ q.T + noise).logpdf(x.numpy())
            for m, q, e in zip(law.means.numpy(), law.vectors.numpy(), law.eigenvalues.numpy())
        ],
        axis=1,
    )
    np.testing.assert_allclose(law.component_log_prob(x, 0.7), each, rtol=1e-11)
    whole = special.logsumexp(each + np.log(law.weights.numpy()), axis=1)
    np.testing.assert_allclose(law.log_prob(x, 0.7), whole, rtol=1e-11)
    np.testing.assert_allclose(law.responsibilities(x, 0.7).sum(1), 1.0, rtol=1e-14)


def test_mixture_posterior_mean_by_quadrature():
    law = worlds.two_gaussians(1.0, 0.25, weights=(0.3, 0.7))
    sigma, x = 0.8, 0.4

    def prior(y: float) -> float:
        return 0.3 * stats.norm.pdf(y, -1, 0.5) + 0.7 * stats.norm.pdf(y, 1, 0.5)

    mass, first, second = (
        integrate.quad(lambda y, k=k: y**k * prior(y) * stats.norm.pdf(x, y, sigma), -8, 8, epsabs=1e-13)[0]
        for k in range(3)
    )
    state, one = torch.tensor([[x]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert law.denoise(state, sigma).item() == pytest.approx(first / mass, rel=1e-10)
    assert law.log_prob(state, sigma).item() == pytest.approx(math.log(mass), rel=1e-10)
    variance = second / mass - (first / mass) ** 2
    assert law.posterior_covariance(state, one, sigma).item() == pytest.approx(variance, rel=1e-9)


def test_one_component_can_be_drawn():
    law = worlds.full_mixture()
    x, label = law.sample_labelled(30_000, 0.0, generator(5))
    counts = torch.bincount(label, minlength=3) / len(label)
    assert bool(((counts - law.weights).abs() < 5 * (law.weights * (1 - law.weights) / len(label)).sqrt()).all())
    for k in range(3):
        for own in (x[label == k], law.sample(5000, 0.0, generator(6), component=k)):
            error = (law.vectors[k].square() @ law.eigenvalues[k] / len(own)).sqrt()
            assert bool(((own.mean(0) - law.means[k]).abs() < 5 * error).all())


class Pixels:
    """The digits as 8-bit batches with labels, like `Images`."""

    def __init__(self) -> None:
        raw, self.labels = load_digits(return_X_y=True)
        self.raw = (raw * 15.9375).astype(np.uint8).reshape(-1, 1, 8, 8)
        self.labels = torch.from_numpy(self.labels)
        self.scale, self.offset, self.integer = 127.5, -127.5, True

    def blocks(self):
        yield from np.array_split(self.raw, 7)

    def __iter__(self):
        for block in self.blocks():
            yield torch.from_numpy((block.astype(np.float32) - 127.5) / 127.5)


def test_fit_by_labels_is_the_moments_of_every_class():
    data = Pixels()
    law = Mixture.fit(data, labels=True)
    x = torch.cat(list(data)).double()
    assert law.shape == (1, 8, 8)
    for k in range(10):
        own = x[data.labels == k].flatten(1)
        assert float(law.weights[k]) == pytest.approx(len(own) / len(x), rel=1e-12)
        torch.testing.assert_close(law.means[k], own.mean(0), rtol=0, atol=1e-7)  # the pixels were rounded
        q, e = law.vectors[k], law.eigenvalues[k]
        torch.testing.assert_close((q * e) @ q.T, own.T.cov(), rtol=0, atol=1e-6)
    # The whole data set's moments come back: between the classes and within, over n and n - 1.
    torch.testing.assert_close(law.moments.mean.flatten(), x.flatten(1).mean(0), rtol=0, atol=1e-7)
    gap = (law.moments.cov - x.flatten(1).T.cov()).abs().max()
    assert float(gap) < float(x.flatten(1).var(0).max()) * 10 / len(x)
    again = Mixture.fit(x, labels=data.labels)
    torch.testing.assert_close(again.means, law.means, rtol=0, atol=1e-7)


def test_fit_forms():
    data = Pixels()
    full = Mixture.fit(data, labels=True)
    low, iso = Mixture.fit(data, labels=True, rank=10), Mixture.fit(data, labels=True, kind="isotropic")
    trace = full.eigenvalues.sum(1)
    # Every form keeps each class's mean and total variance.
    torch.testing.assert_close(low.eigenvalues.sum(1) + 54 * low.floor, trace, rtol=1e-10, atol=0)
    torch.testing.assert_close(64 * iso.floor, trace, rtol=1e-10, atol=0)
    torch.testing.assert_close(low.eigenvalues, full.eigenvalues[:, :10], rtol=1e-10, atol=0)
    x = torch.cat(list(data)).double()
    scores = [float(law.log_prob(x, 0.3).mean()) for law in (full, low, iso)]
    assert scores[0] > scores[1] > scores[2]  # on the data themselves each restriction costs likelihood


@pytest.mark.parametrize("method", ["k-means", "em"])
def test_fit_by_clusters_finds_them(method):
    """Three clusters 12 apart with spread 1: recovered exactly, whatever the order."""
    g = generator(2)
    truth = torch.tensor([[0.0, 0, 0], [12.0, 0, 0], [0, 12.0, 0]])
    label = torch.arange(600) % 3
    x = truth[label] + torch.randn(600, 3, generator=g)
    law = Mixture.fit(iter(x.split(100)), components=3, method=method, seed=1)
    order = [int((law.means - t.double()).square().sum(1).argmin()) for t in truth]
    assert sorted(order) == [0, 1, 2]
    for k, own in enumerate(order):
        torch.testing.assert_close(law.means[own], x[label == k].double().mean(0), rtol=0, atol=1e-6)
    again = Mixture.fit(x, components=3, method=method, seed=1)
    torch.testing.assert_close(again.means, law.means, rtol=0, atol=1e-9)


# Empirical


def brute_force(points: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    points = points.double().flatten(1)
    log_w = torch.stack([-(one - points).square().sum(1) for one in x.double().flatten(1)]) / (2 * sigma**2)
    return (torch.softmax(log_w, 1) @ points).reshape(x.shape)


@functools.cache
def point_set(kind: str, n: int, d: int) -> torch.Tensor:
    g = generator(3)
    if kind == "white":
        return torch.randn(n, d, generator=g)
    if kind == "surface":  # 12 dimensions inside d, off centre, like images
        return torch.tanh(0.3 * torch.randn(n, 12, generator=g) @ torch.randn(12, d, generator=g)) + 0.5
    # near copies, 1e-3 apart in every pixel: many near ties at sigma about 0.03
    few = torch.randn(n // 50, d, generator=g)
    return few.repeat(50, 1) + 1e-3 * torch.randn(len(few) * 50, d, generator=g)


@functools.cache
def data_set(kind: str, n: int, d: int) -> Empirical:
    return Empirical(point_set(kind, n, d))


@pytest.mark.parametrize("kind", ["white", "surface", "copies"])
@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.3, 3.0, 10.0, 100.0])
def test_empirical_equals_brute_force(kind, sigma):
    """1e-5 relative at n = 5,000, d = 784 in float32, at all levels: states, near ties, far states."""
    points, law = point_set(kind, 5000, 784), data_set(kind, 5000, 784)
    g = generator(4)
    near = points[:5]
    ties = 0.5 * (points[:5] + points[100:105])
    far = 3.0 * torch.randn(2, 784, generator=g)
    x = torch.cat([near, ties, far])
    x = x + sigma * torch.randn(x.shape, generator=g)
    exact = brute_force(points, x, sigma)
    assert relative(law.denoise(x, sigma), exact) < 1e-5
    # float64 states: rounding 1e-16 |x|^2 / sigma^2 of a log weight, 1e-8 at the smallest level
    assert relative(law.denoise(x[::4].double(), sigma), exact[::4]) < 1e-7


def test_empirical_does_not_depend_on_its_memory():
    points = point_set("surface", 3000, 50)
    small, large = Empirical(points, memory=2**17), Empirical(points)
    for sigma in (0.05, 0.5, 5.0):
        x = points[:70] + sigma * torch.randn(70, 50, generator=generator(5))
        exact = brute_force(points, x, sigma)
        assert relative(small.denoise(x, sigma), exact) < 1e-6
        assert relative(large.denoise(x, sigma), exact) < 1e-6
        x = x.double()
        close = {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(small.denoise(x, sigma), large.denoise(x, sigma), **close)
        torch.testing.assert_close(small.log_prob(x, sigma), large.log_prob(x, sigma), **close)
        torch.testing.assert_close(small.participation(x, sigma), large.participation(x, sigma), **close)
        v = normal(70, 50)
        a, b = (law.posterior_covariance(x, v, sigma) for law in (small, large))
        torch.testing.assert_close(a, b, **close)
    torch.testing.assert_close(small.moments.cov, large.moments.cov, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and func is not torch.ops.aten.slice.Tensor:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes() if t.is_contiguous() else t.nbytes)
        return out


@pytest.mark.parametrize("sigma", [0.02, 0.5, 5.0])
def test_empirical_memory_is_bounded(sigma):
    """No tensor is larger than the memory given, though [B, N] would be twelve times that."""
    points = point_set("surface", 8_000, 16)
    memory = 2**20
    law = Empirical(points, memory=memory)
    x = points[:400] + sigma * torch.randn(400, 16, generator=generator(5))
    assert 12 * memory < 400 * 8_000 * 4
    own = law.denoise(x, sigma)  # the centred copy of the data is made once, outside the count
    with Largest() as seen:
        law.denoise(x, sigma)
    held = max(points.nbytes, 8_000 * 8)  # the data themselves and one number a point
    assert seen.bytes <= max(memory, held)
    assert relative(own, brute_force(points, x, sigma)) < 1e-6


def test_empirical_weights_and_participation():
    law = worlds.cloud()
    x = draws(law, 6, 1.0)
    w = law.posterior_weights(x, 1.0)
    torch.testing.assert_close((w @ law.points), law.denoise(x, 1.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.participation(x, 1.0), 1 / w.square().sum(1), rtol=1e-11, atol=0)
    assert float(law.participation(law.points[:1], 1e-3)) == pytest.approx(1.0, abs=1e-12)
    assert float(law.participation(x[:1], 1e4)) == pytest.approx(len(law), rel=1e-3)


# Sphere


@pytest.mark.parametrize("dim", [1, 2, 3, 10, 83, 1000, 10_000])
@pytest.mark.parametrize("z", [1e-3, 1.0, 30.0, 1e3, 1e6])
def test_bessel_ratio_by_mpmath(dim, z):
    """Value within 10 roundings; log I within 1e-13 of itself plus 1e-15 (it vanishes at z = 0)."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        nu, zz = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(z)
        i0, i1 = mpmath.besseli(nu, zz), mpmath.besseli(nu + 1, zz)
        ratio = float(i1 / i0)
        log_value = float(mpmath.log(mpmath.gamma(nu + 1)) + nu * mpmath.log(2 / zz) + mpmath.log(i0))
    own = float(bessel_ratio(dim / 2 - 1, torch.tensor(z, dtype=torch.float64)))
    assert own == pytest.approx(ratio, rel=3e-15)
    f = float(_bessel(dim / 2 - 1, torch.tensor(z, dtype=torch.float64) ** 2)[2])
    assert f == pytest.approx(log_value, rel=1e-13, abs=1e-14)


def test_bessel_ratio_by_scipy():
    z = np.geomspace(1e-2, 500, 40)
    for dim in (2, 3, 7, 40):
        nu = dim / 2 - 1
        np.testing.assert_allclose(
            bessel_ratio(nu, torch.from_numpy(z)), special.ive(nu + 1, z) / special.ive(nu, z), rtol=1e-12
        )


def test_sphere_is_smooth_at_its_centre():
    law = Sphere(5, 2.0)
    zero = torch.zeros(1, 5, dtype=torch.float64)
    for sigma in (1e-3, 1.0, 1e3):
        jacobian = torch.func.jacfwd(lambda y, s=sigma: law.denoise(y, s))(zero)[0, :, 0]
        # Cov(x_0 | x = 0) = r^2 / d in every direction.
        torch.testing.assert_close(jacobian * sigma**2, 0.8 * torch.eye(5, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        x = zero.clone().requires_grad_()
        law.log_prob(x, sigma).sum().backward()
        assert torch.equal(x.grad, zero)


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.3, 1.0, 100.0, 1e3])
def test_sphere_in_ten_thousand_dimensions(sigma):
    """Against the leading large-d form: tangent radius^2 2 / (d + sqrt(d^2 + 4 z^2)), accurate to 1 / d."""
    d = 10_000
    law = Sphere(d, 100.0)
    x = draws(law, 3, sigma)
    out = law.denoise(x, sigma)
    norm = torch.linalg.vector_norm(x, dim=1)
    z = 100.0 * norm / sigma**2
    want = 100.0 * 2 * z / (d + (d * d + 4 * z * z).sqrt())
    torch.testing.assert_close(torch.linalg.vector_norm(out, dim=1), want, rtol=1.5 / d, atol=0)
    torch.testing.assert_close(
        out / torch.linalg.vector_norm(out, dim=1)[:, None], x / norm[:, None], rtol=1e-9, atol=1e-12
    )
    assert relative(law.denoise(x.float(), sigma), law.denoise(x.float().double(), sigma)) < 2e-7
    assert relative(law.score(x.float(), sigma), law.score(x.float().double(), sigma)) < 2e-7


@pytest.mark.parametrize("sigma", [1e-3, 1e-1, 1.0, 30.0, 1e3])
def test_mixture_and_data_set_in_ten_thousand_dimensions(sigma):
    d, r = 10_000, 3
    g = generator(8)
    q = torch.linalg.qr(torch.randn(2, d, r, generator=g, dtype=torch.float64))[0]
    means = torch.randn(2, d, generator=g, dtype=torch.float64)
    for law in (
        Mixture.from_parameters(means, (q, 4.0 * torch.ones(2, r), 0.1 * torch.ones(2))),
        Mixture.from_parameters(means, [0.0, 0.2]),
        Empirical(means.float()),
    ):
        x = draws(law, 4, sigma).float()
        assert relative(law.denoise(x, sigma), law.denoise(x.double(), sigma)) < 1e-6
        log_p = law.log_prob(x, sigma)
        torch.testing.assert_close(log_p, law.log_prob(x.double(), sigma), rtol=1e-9, atol=0)
        # A state drawn from the law scores its own entropy, up to fluctuations of 8 sqrt(d / 2).
        if isinstance(law, Empirical):
            own = -0.5 * d * math.log(2 * math.pi * math.e * sigma**2) - math.log(2)
            assert float((log_p - own).abs().max()) < 8 * math.sqrt(d / 2) + 1


# Wrong input


def wrong(message: str):
    return pytest.raises(InputError, match=message)


@pytest.mark.parametrize("method", ["denoise", "score", "log_prob"])
def test_wrong_states(law, method):
    ask = getattr(law, method)
    x = draws(law, 3, 1.0)
    for sigma in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0, 1.0])):
        with wrong("expected a noise level > 0"):
            ask(x, sigma)
    with wrong("expected a number or"):
        ask(x, torch.ones(2))
    with wrong("this law needs"):
        ask(torch.zeros(3, *law.shape, 2, dtype=torch.float64), 1.0)
    with wrong("expected float32 or float64"):
        ask(torch.zeros(3, *law.shape, dtype=torch.int64), 1.0)


def test_wrong_vectors_and_flows(law):
    x = draws(law, 3, 1.0)
    with wrong("expected the same"):
        law.posterior_covariance(x, x[:2], 1.0)
    with wrong("> 0"):
        law.transport(x, 0.0)
    if not isinstance(law, Gaussian):
        with wrong("expected at least 1"):
            law.transport(x, 1.0, steps=0)
        with wrong("expected levels > 0"):
            law.transport(x, 1.0, -1.0)


def test_wrong_mixtures():
    means = torch.zeros(2, 3)
    with wrong("sum to 0.9"):
        Mixture.from_parameters(means, [1.0, 1.0], [0.5, 0.4])
    with wrong("a weight is -0.5"):
        Mixture.from_parameters(means, [1.0, 1.0], [1.5, -0.5])
    with wrong("3 weights for 2"):
        Mixture.from_parameters(means, [1.0, 1.0], [0.3, 0.3, 0.4])
    bad = torch.diag(torch.tensor([1.0, 1.0, -0.25])).repeat(2, 1, 1)
    with wrong(r"covariance 0 has the eigenvalue -0.25"):
        Mixture.from_parameters(means, bad)
    with wrong(r"the eigenvalue -0.25"):
        Mixture([Moments(2, torch.zeros(3), bad[0])])
    with wrong("the variance -1"):
        Mixture.from_parameters(means, [1.0, -1.0])
    with wrong("not symmetric"):
        Mixture.from_parameters(means, torch.ones(2, 3, 3).triu())
    with wrong(r"covariances of shape \(2, 4, 4\)"):
        Mixture.from_parameters(means, torch.zeros(2, 4, 4))
    with wrong("not orthonormal"):
        Mixture.from_parameters(means, (torch.ones(2, 3, 1), torch.ones(2, 1), torch.zeros(2)))
    with wrong("no components"):
        Mixture([])
    with wrong("expected one shape"):
        Mixture([Moments(2, torch.zeros(2), torch.eye(2)), Moments(2, torch.zeros(3), torch.eye(3))])
    with wrong("a mean holds NaN"):
        Mixture.from_parameters([[math.nan]], [1.0])
    with wrong("component 2 of a mixture of 2"):
        worlds.two_deltas().sample(3, component=2)


def test_wrong_fits():
    x = torch.randn(20, 3, generator=generator(0))
    with wrong("pass one of them"):
        Mixture.fit(x)
    with wrong("pass one of them"):
        Mixture.fit(x, labels=torch.zeros(20), components=2)
    with wrong("no labels"):
        Mixture.fit(x, labels=True)
    with wrong("one label a sample"):
        Mixture.fit(x, labels=torch.zeros(19, dtype=torch.int64))
    with wrong("one label a sample"):
        Mixture.fit(x, labels=torch.zeros(21, dtype=torch.int64))
    with wrong("class 7 has 1 sample"):
        Mixture.fit(x, labels=torch.tensor([7] + [1] * 19))
    with wrong("without a rank"):
        Mixture.fit(x, components=2, kind="low-rank")
    with wrong("unknown kind"):
        Mixture.fit(x, components=2, kind="diagonal")
    with wrong("at least two each"):
        Mixture.fit(x, components=15)


def test_wrong_data_sets_and_spheres():
    with wrong(r"expected \[N, \*S\]"):
        Empirical(torch.zeros(5))
    with wrong("NaN or infinity"):
        Empirical([[math.inf]])
    with wrong("integer >= 1"):
        Sphere(0, 1.0)
    with wrong("expected a number > 0"):
        Sphere(3, -1.0)


def test_fitted_on_a_real_data_set_by_labels_and_by_clusters():
    """The mixture's own moments are those of the data, and its classes are the data's."""
    digits = images("digits")
    whole = Moments.fit(digits)
    for law in (Mixture.fit(digits, labels=True), Mixture.fit(digits, components=10, seed=0)):
        # within-component covariances divide by n_k - 1, the whole by n - 1: a relative difference of K / n = 1 %
        torch.testing.assert_close(law.moments.cov, whole.cov, rtol=0.03, atol=0.01)
        torch.testing.assert_close(law.moments.mean, whole.mean, rtol=1e-6, atol=1e-6)
    by_label = Mixture.fit(digits, labels=True)
    guess = by_label.responsibilities(digits.tensor().double(), 0.3).argmax(1)
    assert (guess == digits.labels).double().mean() > 0.95


def test_classes_of_equal_samples_are_named_however_sums_are_rounded():
    points = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).repeat_interleave(50, 0)
    labels = torch.arange(10).repeat_interleave(50)
    for options in ({"labels": labels}, {"components": 10}):
        with pytest.raises(InputError, match="all 50 samples of class 0 are equal"):
            Mixture.fit(points, **options)
    near = points.double() + 1e6 + 1e-4 * torch.randn(500, 20, dtype=torch.float64)
    assert Mixture.fit(near, labels=labels).dim == 20
