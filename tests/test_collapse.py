"""Excess entropy and collapse, against closed forms, brute force and Monte Carlo."""

import math

import numpy as np
import pytest
import torch

from symbreak.laws import Empirical, Gaussian, Mixture, Sphere, pairwise_weights
from symbreak.laws.pairwise_weights import overlaps
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.phases.collapse import collapse_scaling, collapse_time, samples_needed
from symbreak.phases.information import excess_entropy, mutual_information
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import over_ranks
from symbreak.runtime.run import Run


def isotropic(d: int, v: float = 1.0) -> Mixture:
    return Mixture.from_parameters(torch.zeros(1, d), v)


def pair(d: int) -> Mixture:
    return Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)


# --- collapse time --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "tau"),
    [(20000, 256, 1.2987896868), (20000, 1024, 1.9775467186), (20000, 4096, 2.6670744412), (1000, 64, 0.8195419927)],
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


# --- overlaps of a data set's points --------------------------------------------------------------


def brute_force(points, sigma, queries, seed=0):
    """log sum over all points of exp(-(|x - y|^2 - |sigma z|^2) / (2 sigma^2)), one query and level at a time."""
    y = points.reshape(len(points), -1).double()
    chosen = torch.randperm(len(y), generator=generator(seed, len(y), 1))[:queries]
    out = []
    for i in range(0, queries, 256):
        mine = chosen[i : i + 256]
        noise = torch.randn(len(mine), y.shape[1], generator=generator(seed, len(y), 2, i // 256)).double()
        for mu, z in zip(mine, noise):
            apart = [((y[mu] + s * z - y) ** 2).sum(1) - ((s * z) ** 2).sum() for s in sigma]
            out.append([float(torch.logsumexp(-a / (2 * s * s), 0)) for a, s in zip(apart, sigma)])
    return np.array(out)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_excess_entropy_against_brute_force_in_float64(offset):
    """1e-6 a dimension at n = 2,000, in float32 products and in float64 ones, where small levels need them."""
    points = (pair(64).sample(2000, 0.0, generator(1)) + offset).float()
    sigma = np.geomspace(0.02, 20, 9)
    exact = brute_force(points, sigma, 300).mean(0) / 64
    found = excess_entropy(Empirical(points), sigma, queries=300)
    np.testing.assert_allclose(found.value, exact, atol=1e-6, rtol=0)


def test_near_copies_need_float64():
    """Copies 0.01 apart at sigma 0.01, points 16 from their mean: float32 products alone would be off by far more."""
    y = 2 * torch.randn(1000, 64, generator=generator(2), dtype=torch.float64)
    points = torch.cat([y, y + 0.01 / 8 * torch.randn(1000, 64, generator=generator(3), dtype=torch.float64)])
    sigma = np.array([0.003, 0.01, 0.03])
    found = excess_entropy(Empirical(points), sigma, queries=300)
    np.testing.assert_allclose(found.value, brute_force(points, sigma, 300).mean(0) / 64, atol=1e-6, rtol=0)
    assert found.value[1] > 0.1 * math.log(2) / 64  # a copy within the noise


def test_memory_and_interruptions_leave_the_result(monkeypatch, tmp_path):
    points = torch.randn(3000, 40, generator=generator(4))
    sigma = np.array([0.5, 1.0, 2.0])
    whole = overlaps(Empirical(points), sigma, 600)
    least = overlaps(Empirical(points, memory=2**16), sigma, 600)  # no copy of the points, blocks of 64
    # Sums in other blocks: the rounding of float32 exponents, less than EXACT d = 2e-5 nats each.
    np.testing.assert_allclose(least.leave_one_out(), whole.leave_one_out(), atol=2e-5, rtol=0)
    calls = []

    def interrupted(*arguments, block=pairwise_weights._block):
        calls.append(arguments)
        if len(calls) == 5:  # two a part: float32 levels and float64 ones
            raise KeyboardInterrupt
        return block(*arguments)

    monkeypatch.setattr(pairwise_weights, "_block", interrupted)
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        overlaps(Empirical(points), sigma, 600, run=run)
    stored = sorted(p.stem for p in tmp_path.rglob("*.safetensors"))
    assert [k.split("-")[0] + k[-2:] for k in stored] == ["overlaps-0", "overlaps-1"]
    other = excess_entropy(Empirical(points), 3.0, queries=600, run=run)  # other levels are other parts
    assert float(other.value) == float(excess_entropy(Empirical(points), 3.0, queries=600).value)
    calls.clear()
    again = overlaps(Empirical(points), sigma, 600, run=run)
    assert len(calls) == 2  # the third part only
    np.testing.assert_array_equal(again.parts, whole.parts)


@pytest.mark.parametrize("sigma", [2.0, 1.0, 0.3])
def test_the_upper_bound_far_below_the_cut(sigma):
    """log S of minus hundreds, in float32 and float64: the bound is that of brute force, and above the truth."""
    points = torch.randn(200, 400, generator=generator(6))
    found = mutual_information(Empirical(points), sigma, queries=100)
    log_all = brute_force(points, [sigma], 100)[:, 0]
    y = points.double()
    chosen = torch.randperm(200, generator=generator(0, 200, 1))[:100]
    z = torch.randn(100, 400, generator=generator(0, 200, 2, 0)).double()
    exponents = -(((y[chosen] + sigma * z)[:, None] - y).square().sum(2) - (sigma * z).square().sum(1)[:, None])
    exponents = exponents / (2 * sigma**2)
    exponents[torch.arange(100), chosen] = -math.inf
    exact = math.log(199) - float(torch.logsumexp(exponents, 1).mean())
    assert float(found.most) == pytest.approx(exact, rel=1e-6)
    assert float(found.most) > 200 * math.log1p(1 / sigma**2)
    assert float(found.least) == pytest.approx(math.log(200) - float(log_all.mean()), abs=1e-5)
    assert float(found.high - found.low) > 1.0  # what is not known is not printed as known


def test_a_handful_of_points():
    for n in (3, 5, 7, 20):
        law = Empirical(torch.randn(n, 16, generator=generator(7)))
        found = collapse_time(law)
        assert found.low is None
        assert "too few points" in found.reason
        told = mutual_information(law, [0.5, 5.0])
        np.testing.assert_array_equal(told.value, told.most)
        assert np.isnan(told.low).all()


def test_points_of_unequal_spread():
    """950 points in 20 of 1,000 dimensions, 50 in all: some queries' sums are e^-100 where the mean passes log n."""
    y = torch.zeros(1000, 1000)
    y[:, :20] = torch.randn(1000, 20, generator=generator(8))
    y[950:] = torch.randn(50, 1000, generator=generator(9))
    found = collapse_time(Empirical(y), queries=1000)
    sigma = (
        float(found.reason.split("passes at ")[1].split(";")[0].split(":")[0])
        if "passes at" in found.reason
        else found.sigma
    )
    most = mutual_information(Empirical(y), sigma, queries=1000).most
    assert float(most) == pytest.approx(math.log(1000), rel=0.05)
    assert sigma > 2.0  # cut sums gave 1.7


def _rank(rank, file, points, sigma, out):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    with over_ranks():
        found = overlaps(Empirical(points), sigma, 700)
    np.save(f"{out}-{rank}.npy", found.parts)
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    import torch.multiprocessing as mp

    points, sigma = torch.randn(800, 12, generator=generator(5)), np.array([0.3, 1.0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = overlaps(Empirical(points), sigma, 700).parts
    finally:
        torch.set_num_threads(threads)
    mp.start_processes(
        _rank, (str(tmp_path / "meet"), points, sigma, str(tmp_path / "parts")), nprocs=2, start_method="fork"
    )
    for rank in (0, 1):
        np.testing.assert_array_equal(np.load(tmp_path / f"parts-{rank}.npy"), alone)


# --- information and collapse of a data set -------------------------------------------------------


def test_bounds_hold_the_information_of_the_law():
    d, n = 64, 2000
    law = isotropic(d)
    sigma = math.sqrt(1 / math.expm1(2 * math.log(n) / d)) * np.array([0.9, 1.2, 1.6, 2.5])
    found = mutual_information(Empirical(law.sample(n, 0.0, generator(8))), sigma)
    exact = mutual_information(law, sigma).value
    np.testing.assert_allclose(exact, 0.5 * d * np.log1p(1 / sigma**2), rtol=1e-12)
    assert (found.least[:2] < exact[:2]).all()
    assert (found.most[:2] > exact[:2]).all()
    assert found.least.max() < math.log(n)
    # At the collapse and above it the estimate is within its interval, widened by half for the draw of the data.
    half = (found.high - found.low) / 2
    assert (np.abs(found.value - exact)[1:] < 1.5 * half[1:] + 0.05).all()
    need = samples_needed(Empirical(law.sample(n, 0.0, generator(8))), sigma)
    assert (need.low[:2] < exact[:2] / math.log(10)).all()
    assert (need.high[:2] > exact[:2] / math.log(10)).all()


@pytest.mark.parametrize(
    ("d", "tau"),
    [
        (256, 1.33373),
        pytest.param(1024, 2.01349, marks=pytest.mark.slow),
        pytest.param(4096, 2.70327, marks=pytest.mark.slow),
    ],
)
def test_the_collapse_of_20000_points_of_two_gaussians(d, tau):
    """The interval holds the finite-n value, and is narrow: extrapolating f^e to zero was off by 0.1."""
    found = collapse_time(Empirical(pair(d).sample(20000, 0.0, generator(3)).float()), seed=1)
    assert found.low.ou_time < tau < found.high.ou_time
    assert found.high.ou_time - found.low.ou_time < 0.06


@pytest.mark.parametrize(("sets", "least"), [(8, 6), pytest.param(30, 25, marks=pytest.mark.slow)])
def test_coverage_of_the_collapse(sets, least):
    """95 % intervals hold the exact value of 8 data sets at least 6 times, of 30 at least 25 (P of fewer: < 1 %)."""
    d, n = 16, 1500
    exact = collapse_time(isotropic(d), samples=n).sigma
    hits, misses = 0, []
    for seed in range(sets):
        data = Empirical(isotropic(d).sample(n, 0.0, generator(9, seed)))
        found = collapse_time(data, queries=500, seed=seed)
        hits += found.low.sigma < exact < found.high.sigma
        misses.append(math.log(found.sigma / exact))
    assert hits >= least
    # Their mean is off by less than what is left of the old bias of 0.1 and three standard errors.
    assert abs(np.mean(misses)) < 0.02 + 3 * np.std(misses) / math.sqrt(sets)


def test_copies_hide_the_collapse_and_are_named():
    y = torch.randn(300, 20, generator=generator(10))
    found = collapse_time(Empirical(torch.cat([y, y])))
    assert found.level is None
    assert "100% of the points have a copy" in found.reason
    few = collapse_time(Empirical(y[:40]))
    assert few.low is None
    assert "too few points (40)" in few.reason


def test_the_curse_of_dimensionality():
    """More samples: earlier is impossible, the collapse comes at less noise; more dimensions: at more noise."""
    law = Empirical(isotropic(32).sample(4000, 0.0, generator(11)))
    n = collapse_scaling(law, "samples", [500, 4000], queries=500)
    exact = [collapse_time(isotropic(32), samples=v).sigma for v in (500, 4000)]
    for found, gaussian, truth in zip(n.measured, n.gaussian, exact):
        assert found.low.sigma < truth < found.high.sigma
        assert gaussian.sigma == pytest.approx(truth, rel=0.03)  # moments of 500 points in 32 dimensions
    d = collapse_scaling(law, "components", [8, 32], queries=500)
    assert d.measured[0].high.sigma < d.measured[1].low.sigma
    # All components: the data themselves, turned, so with other noise.
    assert d.measured[1].low.sigma < n.measured[1].sigma < d.measured[1].high.sigma
    images = Empirical(torch.randn(500, 1, 4, 4, generator=generator(12)))
    pixels = collapse_scaling(images, "pixels", [2, 4], queries=200)
    # Means of 4 independent pixels: a quarter of the variance in 4 dimensions.
    truth = collapse_time(isotropic(4, 0.25), samples=500).sigma
    assert pixels.measured[0].low.sigma < truth < pixels.measured[0].high.sigma
    assert set(pixels.to_dict()) == {"axis", "sizes", "measured", "gaussian"}


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
        (lambda: collapse_time(Empirical([[1.0], [2.0]])), "2 points; expected at least 3"),
        (lambda: collapse_time(Empirical([[1.0], [1.0], [1.0]])), "all 3 points are equal"),
        (lambda: excess_entropy(Empirical([[1.0], [2.0], [4.0]]), []), "sigma of shape"),
        (lambda: collapse_scaling(Empirical([[1.0], [2.0], [4.0]]), "time", [2]), "axis 'time'"),
        (lambda: collapse_scaling(Empirical([[1.0], [2.0], [4.0]]), "samples", [2]), "from 3 to 3"),
        (lambda: collapse_scaling(Empirical([[1.0], [2.0], [4.0]]), "pixels", [1]), "no square images"),
        (lambda: collapse_scaling(Empirical(torch.randn(9, 1, 4, 4)), "pixels", [3]), "that divide 4"),
        (lambda: collapse_time(pair(4), samples=math.inf), "samples is inf"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
