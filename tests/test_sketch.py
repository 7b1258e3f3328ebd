"""Low-rank moments against dense covariances; certificates against divergences computed in full."""

import functools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian, Mixture
from symbreak.moments import low_rank as sketch
from symbreak.moments.low_rank import LowRankMoments, truncation_bound
from symbreak.moments.one_pass import Moments
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.collapse import collapse_time
from symbreak.phases.speciation import speciation_time
from symbreak.runtime.files import InputError
from symbreak.start.fit import late_start

DATA = Path(os.environ.get("SYMBREAK_DATA") or "/nonexistent")


def batches(x, size=64):
    return [x[i : i + size] for i in range(0, len(x), size)]


@functools.cache
def power_law(n=500, d=300, exponent=1.5, seed=0):
    """Rows with eigenvalues 4 i^-exponent in a random basis, and a mean much larger than the spread."""
    g = generator(seed, n, d)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    scale = 2.0 * torch.arange(1, d + 1, dtype=torch.float64) ** (-0.5 * exponent)
    return 50.0 + (torch.randn(n, d, generator=g, dtype=torch.float64) * scale) @ q.T


@functools.cache
def cifar():
    if not (DATA / "cifar10-test.parquet").is_file():
        pytest.skip("SYMBREAK_DATA holds no cifar10-test.parquet")
    rows = []
    for batch in images(DATA / "cifar10-test.parquet"):
        rows.append(batch)
        if sum(map(len, rows)) >= 1500:
            break
    return torch.cat(rows)[:1500]


@functools.cache
def digits():
    return images("digits").tensor()


def divergence(data: Moments, law: Gaussian, sigma: float) -> float:
    """KL(N(mu, C + sigma^2) || law) in full: both covariances formed."""
    noise = sigma**2 * torch.eye(data.dim, dtype=torch.float64)
    a, b = data.cov + noise, law.moments.cov + noise
    trace = torch.trace(torch.linalg.solve(b, a))
    return 0.5 * float(trace - data.dim + torch.logdet(b) - torch.logdet(a))


def relative(found, wanted):
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


# The sketch


def test_sums_are_exact_and_ritz_pairs_are_what_they_say():
    x = power_law()
    whole, found = Moments.fit([x]), Moments.fit(batches(x), rank=30)
    c, q, values = whole.cov, found.vectors.double(), found.eigenvalues
    assert found.vectors.dtype == torch.float32
    assert found.count == len(x)
    assert relative(found.mean, whole.mean) < 1e-14
    # float64 sums around a pilot mean: no digits go to the mean of 50
    assert relative(found.variances, c.diagonal()) < 1e-12
    assert found.trace == pytest.approx(float(torch.trace(c)), rel=1e-12)
    # float32 vectors: entries round to 6e-8 of themselves
    torch.testing.assert_close(q.T @ q, torch.eye(30).double(), rtol=0, atol=1e-6)
    top = float(values[0])
    torch.testing.assert_close(q.T @ c @ q, torch.diag(values), rtol=0, atol=1e-6 * top)
    exact = torch.linalg.vector_norm(c @ q - q * values, dim=0)
    torch.testing.assert_close(found.residuals, exact, rtol=1e-3, atol=1e-6 * top)
    assert found.remainder == pytest.approx(float(torch.trace(c)) - float(values.sum()), rel=1e-12)


def test_ritz_values_are_below_the_eigenvalues_and_sharpen_with_the_passes():
    x = power_law()
    exact = Moments.fit([x]).eigh[0].numpy()[:30]
    gaps = [1 - Moments.fit(batches(x), rank=30, passes=p).eigenvalues.numpy() / exact for p in (2, 3, 4)]
    assert min(g.min() for g in gaps) > -1e-6  # Cauchy interlacing, but for float32
    # Every power divides the error by about (lambda_i / lambda_41)^2, 1.6 at the last pair.
    assert gaps[0][-1] > 1.5 * gaps[1][-1] > 2.25 * gaps[2][-1] > 0
    assert gaps[0][0] < 0.01


@pytest.mark.parametrize("sizes", [1, 37, 1000])
def test_batches_only_group(sizes):
    x = power_law()
    one, other = Moments.fit(batches(x), rank=12), Moments.fit(batches(x.flip(0), sizes), rank=12)
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-5, atol=0)
    assert one.largest_dropped == pytest.approx(other.largest_dropped, rel=1e-4)
    torch.testing.assert_close(one.variances, other.variances, rtol=1e-12, atol=0)


def test_blocks_smaller_than_the_data(monkeypatch):
    """As at three million pixels: blocks of 7 rows, panels of 50, columns in thirds."""
    x = power_law()
    one = Moments.fit(batches(x), rank=12)
    for name, value in (("BLOCK", 7 * 300), ("PANEL", 50), ("COLUMNS", 100), ("CACHED", 640)):
        monkeypatch.setattr(sketch, name, value)
    other = Moments.fit(batches(x), rank=12)
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.variances, other.variances, rtol=1e-12, atol=0)
    assert one.largest_dropped == pytest.approx(other.largest_dropped, rel=1e-4)


@pytest.mark.parametrize("passes", [2, 3])
def test_bounds_of_what_was_dropped_hold_and_are_useful(passes):
    """They fail once in a million fits; S is inflated 3.5 times at 50 vectors, l by sqrt(S) / l at most."""
    x = power_law()
    c = Moments.fit([x]).cov
    for seed in range(20):
        found = Moments.fit(batches(x), rank=10, passes=passes, seed=seed)
        q = found.vectors.double()
        p = torch.eye(300).double() - q @ q.T
        dropped = torch.linalg.eigvalsh(p @ c @ p)
        top, squares = float(dropped[-1]), float((dropped**2).sum())
        assert top <= found.largest_dropped <= 2.0 * math.sqrt(squares)
        # the mean over 50 vectors strays by sqrt(2 / 50) where one mode has all the weight
        assert 2.0 * squares <= found.squares_dropped <= 5.0 * squares
        assert found.failure == 1e-6


def test_the_bounds_fail_as_rarely_as_they_say():
    """One dropped mode, where both inequalities are equalities: |M w| = l |N(0, 1)|."""
    k, failure = 6, 0.01
    theta, inflate = sketch._factors(k, failure)
    w = torch.randn(200_000, k, generator=generator(5), dtype=torch.float64).abs()
    missed = float((theta * w.amax(1) < 1).double().mean())
    assert missed == pytest.approx(failure, abs=5 * math.sqrt(failure / 200_000))
    chernoff = float((inflate * (w**2).mean(1) < 1).double().mean())
    assert 0 < chernoff < failure


def test_nothing_is_dropped_where_the_rank_suffices():
    x = power_law(n=20)
    exact = Moments.fit([x]).eigh[0]
    for rank in (19, 30, 400):
        found = Moments.fit(batches(x, 6), rank=rank)
        assert found.rank == 19
        assert (found.remainder, found.largest_dropped, found.failure, found.floor) == (0.0, 0.0, 0.0, 0.0)
        torch.testing.assert_close(found.eigenvalues, exact[:19], rtol=1e-4, atol=1e-6 * float(exact[0]))
        assert Gaussian(found).certificate(0.1).nats == 0.0
    small = digits().flatten(1)
    every = Moments.fit(batches(small), rank=64)
    assert (every.rank, every.remainder) == (64, 0.0)
    torch.testing.assert_close(every.cov, Moments.fit([small]).cov, rtol=0, atol=1e-6)
    # Nearly all: the sketch holds every direction, so what is dropped is known and not bounded.
    near = Moments.fit(batches(x, 6), rank=12)
    assert near.failure == 0.0
    assert near.largest_dropped == pytest.approx(float(exact[12]), rel=1e-4)
    assert near.squares_dropped == pytest.approx(float((exact[12:] ** 2).sum()), rel=1e-4)


def test_truncating_full_and_low_rank_moments():
    x = power_law()
    full = Moments.fit([x])
    exact = full.truncate(20)
    values = full.eigh[0]
    assert exact.largest_dropped == pytest.approx(float(values[20]))
    assert exact.remainder == pytest.approx(float(values[20:].sum()))
    again = exact.truncate(5)
    assert again.largest_dropped == pytest.approx(float(values[5]), rel=1e-12)
    assert again.squares_dropped == pytest.approx(float((values[5:] ** 2).sum()), rel=1e-12)
    sketched = Moments.fit(batches(x), rank=40).truncate(10)
    q = sketched.vectors.double()
    p = torch.eye(300).double() - q @ q.T
    dropped = torch.linalg.eigvalsh(p @ full.cov @ p)
    assert float(dropped[-1]) <= sketched.largest_dropped
    assert float((dropped**2).sum()) <= sketched.squares_dropped <= 2 * float((dropped**2).sum())


def test_save_and_load(tmp_path):
    found = Moments.fit(batches(power_law().reshape(500, 3, 10, 10)), rank=7)
    back = Moments.load(found.save(tmp_path / "m.safetensors"))
    assert isinstance(back, LowRankMoments)
    for name in ("mean", "variances", "vectors", "eigenvalues", "residuals"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert back.certificate(1.0) == found.certificate(1.0)
    assert (back.shape, back.count) == ((3, 10, 10), 500)
    full = Moments.fit([power_law()])
    assert isinstance(Moments.load(full.save(tmp_path / "f.safetensors")), Moments)
    with pytest.raises(InputError, match="no low-rank moments"):
        LowRankMoments.load(tmp_path / "f.safetensors")


class Changing:
    """Other samples in every walk, as random augmentation gives."""

    def __init__(self, more=0):
        self.walks, self.more = 0, more

    def __iter__(self):
        self.walks += 1
        g = generator(self.walks)
        return iter([torch.randn(50 + self.more * self.walks, 80, generator=g)])


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        (iter([torch.randn(4, 3, generator=generator(0))]), {}, "walked only once"),
        ([], {}, "no batches"),
        ([torch.ones(9, 3)], {}, "all 9 samples are equal"),
        ([torch.zeros(4)], {}, "expected"),
        ([torch.eye(4, 3), torch.eye(4, 2)], {}, "first batches"),
        ([torch.eye(1, 3)], {}, "1 sample came"),
        ([torch.zeros(2, 3), torch.tensor([[0.0, float("nan"), 1.0]])], {}, "sample 2 holds NaN"),
        ([torch.eye(9, 3)], {"rank": 0}, "rank is 0"),
        ([torch.eye(9, 3)], {"passes": 1}, "at least 2"),
        ([torch.eye(9, 3)], {"parts": 4}, "no parts"),
        (Changing(), {}, "total variance was"),
        (Changing(3), {}, "same samples"),
    ],
)
def test_bad_input(data, options, match):
    with pytest.raises(InputError, match=match) as error:
        Moments.fit(data, **{"rank": 2, **options})
    assert "\n" not in str(error.value)


def test_refusals():
    found = Moments.fit(batches(power_law()), rank=3)
    with pytest.raises(InputError, match="cannot be merged"):
        found.merge(found)
    wide = LowRankMoments(5, torch.zeros(20_001), torch.ones(20_001), torch.eye(20_001, 1), [2.0], [0.0], 1, 1, 0)
    with pytest.raises(InputError, match="at most 20,000"):
        _ = wide.cov
    with pytest.raises(InputError, match="do not fit together"):
        LowRankMoments(5, torch.zeros(4), torch.ones(4), torch.eye(3, 1), [2.0], [0.0], 1, 1, 0)
    with pytest.raises(InputError, match="> 0"):
        truncation_bound(1.0, 1.0, 0.0)
    with pytest.raises(InputError, match="modes="):
        truncation_bound(1.0, 1.0, 1.0, floor=0.1)
    with pytest.raises(InputError, match="size is 0"):
        Gaussian.low_frequency([digits()], 0)
    with pytest.raises(InputError, match="smaller size"):
        Gaussian.low_frequency([torch.ones(2, 3, 128, 128)], 100)
    with pytest.raises(InputError, match="need images"):
        Gaussian.low_frequency([digits().flatten(1)], 2)


# The certificate


def test_the_bound_is_exact_for_equal_modes_and_the_issues_without_a_floor():
    for sigma in (0.1, 1.0, 7.0):
        x = 0.5 / sigma**2
        each = 0.5 * (x - math.log1p(x))
        assert truncation_bound(4 * 0.5, 0.5, sigma) == pytest.approx(4 * each, rel=1e-12)
        # the floor equals every mode: nothing is lost
        assert truncation_bound(4 * 0.5, 0.5, sigma, floor=0.5, modes=4) == pytest.approx(0, abs=1e-12)
        # a wrong floor costs its own divergence
        y = (0.5 - 0.2) / (0.2 + sigma**2)
        assert truncation_bound(2.0, 0.5, sigma, 0.2, 4) == pytest.approx(2 * (y - math.log1p(y)), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_for_any_directions_and_any_spectrum(seed):
    """Directions that are no eigenvectors at all: the cross block counts, and l and S are those of the complement."""
    g, d, r = generator(seed, 9), 24, 6
    a = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.rand(d, generator=g, dtype=torch.float64) ** 3
    c = a @ a.T
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    _, turn = torch.linalg.eigh(q[:, :r].T @ c @ q[:, :r])
    q[:, :r] = q[:, :r] @ turn.flip(1)
    blocks = q.T @ c @ q
    values, rest = blocks.diagonal()[:r], torch.linalg.eigvalsh(blocks[r:, r:])
    low = LowRankMoments(
        99, torch.zeros(d), c.diagonal(), q[:, :r], values, torch.linalg.vector_norm(blocks[:r, r:], dim=1),
        float(rest[-1]), float((rest**2).sum()), 0.0,
    )  # fmt: skip
    data = Moments(99, torch.zeros(d), c)
    for sigma in (0.05, 0.3, 1.0, 5.0, 50.0):
        for floor in (None, 0.0, 0.3 * float(rest[-1])):
            law = Gaussian(low, floor=floor)
            b = law.eigenvalues - law.floor
            cov = (q[:, :r] * b) @ q[:, :r].T + (law.floor + sigma**2) * torch.eye(d)
            exact = c + sigma**2 * torch.eye(d)
            kl = 0.5 * float(torch.trace(torch.linalg.solve(cov, exact)) - d + torch.logdet(cov) - torch.logdet(exact))
            assert law.certificate(sigma).nats >= kl * (1 - 1e-9) - 1e-12
    assert divergence(data, Gaussian(low), 1e3) == pytest.approx(low.certificate(1e3).nats, rel=1e-2, abs=1e-12)


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize(
    ("world", "rank"), [("power law", 10), ("power law", 40), ("digits", 8), ("cifar", 30), ("cifar", 100)]
)
def test_certificate_against_the_full_divergence(world, rank, passes):
    """Above the divergence, and within a few times it: S is inflated 3.5 times, and floor and S nearly cancel."""
    x = {"power law": power_law, "digits": digits, "cifar": cifar}[world]()
    x = x.flatten(1)
    law = Gaussian(Moments.fit(batches(x, 500), rank=rank, passes=passes))
    assert law.rank == rank
    full = spectrum_of(world)
    for sigma in (0.1, 1.0, 5.0):
        # Ritz values make the trace term exactly d: the divergence is a difference of log determinants.
        kept = torch.log1p(law.eigenvalues / sigma**2).sum() + (law.dim - rank) * math.log1p(law.floor / sigma**2)
        exact = 0.5 * float(kept - torch.log1p(full / sigma**2).sum())
        bound = law.certificate(sigma).nats
        assert exact <= bound <= 6.0 * exact, (sigma, exact, bound)
        plain = truncation_bound(law.moments.remainder, law.moments.largest_dropped, sigma)
        assert bound < plain


@functools.cache
def spectrum_of(world):
    """Eigenvalues of the empirical covariance by the smaller of its two Gram matrices."""
    x = {"power law": power_law, "digits": digits, "cifar": cifar}[world]().flatten(1).double()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram / (len(x) - 1)).clamp(min=0)


def test_log_determinants_are_the_divergence():
    full, law = Moments.fit([digits()]), Gaussian(Moments.fit(batches(digits()), rank=12))
    kept = torch.log1p(law.eigenvalues).sum() + (64 - 12) * math.log1p(law.floor)
    exact = 0.5 * float(kept - torch.log1p(full.eigh[0]).sum())
    assert divergence(full, law, 1.0) == pytest.approx(exact, rel=1e-5)


def test_exact_truncation_is_certified_to_its_eigenvalues():
    full = Moments.fit([digits()])
    values = full.eigh[0]
    for rank, sigma in ((4, 1.0), (20, 0.3), (63, 2.0)):
        law = Gaussian(full, rank=rank)
        exact = divergence(full, law, sigma)
        bound = law.certificate(sigma)
        assert exact * (1 - 1e-6) - 1e-12 <= bound.nats <= 2.5 * exact + 1e-12
        assert bound.failure == 0.0
        assert bound.remainder == pytest.approx(float(values[rank:].sum()), rel=1e-9, abs=1e-12)
    assert Gaussian(full).certificate(1.0).nats == 0.0
    assert Gaussian(full, rank=64).certificate(1.0).modes == 0
    # the default floor is the best one
    nats = [Gaussian(full, rank=8, floor=f).certificate(0.5).nats for f in (0.5, 1.0, 2.0) * np.array(law_floor(full))]
    assert nats[1] < min(nats[0], nats[2])


def law_floor(full):
    return Gaussian(full, rank=8).floor


def test_mixture_certificate_is_the_components_average():
    data = images("digits")
    low, full = Mixture.fit(data, labels=True, rank=5), Mixture.fit(data, labels=True)
    found = low.certificate(0.7)
    exact = 0.0
    for k in range(full.components):
        own = full.vectors[k] * full.eigenvalues[k] @ full.vectors[k].T
        component = Gaussian(Moments(99, full.means[k].reshape(1, 8, 8), own))
        exact += float(full.weights[k]) * divergence(component.moments, Gaussian(component.moments, rank=5), 0.7)
    assert exact <= found.nats <= 2.5 * exact
    # Monte Carlo: KL between the mixtures is below the average of the components'
    x = full.sample(4000, 0.7, generator(3))
    gap = full.log_prob(x, 0.7) - low.log_prob(x, 0.7)
    assert float(gap.mean()) < found.nats + 4 * float(gap.std()) / math.sqrt(len(x))
    assert full.certificate(0.7) is None


# The law


@pytest.fixture(params=["exact", "sketch"])
def low_and_dense(request):
    """A law of rank 9 and the same law with its covariance written out, at shape [1, 8, 8]."""
    full = Moments.fit([digits()])
    moments = full.truncate(9) if request.param == "exact" else Moments.fit(batches(digits()), rank=9)
    law = Gaussian(moments)
    cov = moments.cov
    return law, Gaussian(Moments(moments.count, moments.mean, 0.5 * (cov + cov.T)))


def test_low_rank_law_is_the_dense_one(low_and_dense, monkeypatch):
    from symbreak.laws import gaussian
    from symbreak.moments import covariance

    law, dense = low_and_dense
    # vectors rounded to float32 are orthonormal to 1e-7; 1e-5 where they are multiplied by 1 / sigma^2
    close = {"rtol": 1e-5, "atol": 1e-5} if law.eigenvectors.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    x = 0.5 * torch.randn(6, 1, 8, 8, generator=generator(4), dtype=torch.float64)
    for chunk, panel in ((2**26, 2**24), (2 * 64, 9 * 20)):
        monkeypatch.setattr(gaussian, "CHUNK", chunk)
        monkeypatch.setattr(covariance, "PANEL", panel)
        for sigma in (0.3, 2.0, torch.linspace(0.2, 3, 6)):
            torch.testing.assert_close(law.denoise(x, sigma), dense.denoise(x, sigma), **close)
            torch.testing.assert_close(law.score(x, sigma), dense.score(x, sigma), **close)
            torch.testing.assert_close(law.log_prob(x, sigma), dense.log_prob(x, sigma), **close)
            found, wanted = (w.posterior_covariance(x, x.flip(0), sigma) for w in (law, dense))
            torch.testing.assert_close(found, wanted, **close)
        torch.testing.assert_close(law.transport(x, 0.7), dense.transport(x, 0.7), **close)
        torch.testing.assert_close(law.transport(x, 0.7, 5.0), dense.transport(x, 0.7, 5.0), **close)
        draws = [w.sample(6, 0.4, generator(8)) for w in (law, dense)]
        torch.testing.assert_close(*draws, **close)
        single = law.transport(x.float(), 0.7)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), dense.transport(x, 0.7), rtol=1e-5, atol=1e-5)


def test_low_rank_law_is_differentiable(low_and_dense):
    law, _ = low_and_dense
    x = torch.randn(3, 1, 8, 8, generator=generator(4), dtype=torch.float64)
    v = torch.randn(3, 1, 8, 8, generator=generator(5), dtype=torch.float64)
    slope = torch.func.jvp(lambda y: law.denoise(y, 0.8), (x,), (v,))[1]
    torch.testing.assert_close(0.64 * slope, law.posterior_covariance(x, v, 0.8))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x, 0.8).sum(), x)
    torch.testing.assert_close(gradient, law.score(x, 0.8))
    rows = torch.func.vmap(lambda y: law.denoise(y[None], 0.8)[0])(x.detach())
    torch.testing.assert_close(rows, law.denoise(x.detach(), 0.8))


def test_large_vectors_are_not_copied_to_float64():
    law = Gaussian(Moments.fit(batches(digits()), rank=9))
    x = torch.randn(2, 1, 8, 8, generator=generator(4))
    law.transport(x, 1.0), law.log_prob(x, 1.0), law.denoise(x.double(), 1.0), law.sample(2, 0.0, generator(1))
    copies = [t for converted in law.covariance._axes._cache.values() for t in converted]
    assert all(t.dtype == torch.float32 and t.data_ptr() == law.eigenvectors.data_ptr() for t in copies)


def test_diagnose_and_late_start_take_a_low_rank_law():
    full = Moments.fit([digits()])
    law, exact = Gaussian.fit(batches(digits()), rank=30), Gaussian(full)
    assert speciation_time(law).sigma == pytest.approx(speciation_time(exact).sigma, rel=1e-3)
    assert np.isnan(law.moments.spectrum(3).low).all()
    low, dense = Gaussian(full, rank=30), Gaussian(Moments(99, full.mean, full.truncate(30).cov))
    assert collapse_time(low, samples=1000).level.sigma == pytest.approx(
        collapse_time(dense, samples=1000).level.sigma, rel=1e-9
    )
    start = late_start(scheduler("dpm++2m"), law, 5, at=NoiseLevel(2.0))
    assert law.certificate(start.level.sigma).sentence() in start.explain()
    whole = late_start(scheduler("dpm++2m"), exact, 5, at=NoiseLevel(2.0))
    assert "truncation" not in whole.explain()


# Low frequencies


def test_low_frequencies_of_everything_are_the_full_gaussian():
    full = Gaussian(Moments.fit([digits()]))
    z = torch.randn(5, 1, 8, 8, generator=generator(2))
    for size in (8, 99):
        law = Gaussian.low_frequency(iter(batches(digits())), size)
        assert (law.rank, law.floor) == (64, 0.0)
        torch.testing.assert_close(law.transport(z, 0.5), full.transport(z, 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 12, 20), (10, 14)])
def test_low_frequencies_against_a_transform_of_every_image(shape):
    """Latents, images that are not square, and grey images without a channel axis."""
    import scipy.fft

    g = generator(1, *shape)
    mix = torch.linspace(1, 0.1, shape[-1]) * torch.linspace(1.5, 0.2, shape[-2])[:, None]
    white = torch.randn(300, *shape, generator=g, dtype=torch.float64)
    if len(shape) == 3:
        white = white + 0.7 * white.roll(1, 1)  # channels that belong together
    x = torch.from_numpy(scipy.fft.idctn((white * mix).numpy(), axes=(-2, -1), norm="ortho")) + 3.0
    law = Gaussian.low_frequency(batches(x), 3)
    low = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")[..., :3, :3].reshape(300, -1)
    cov = np.cov(low, rowvar=False)
    exact = np.linalg.eigvalsh(cov)[::-1]
    assert relative(law.eigenvalues, exact) < 1e-6
    d = math.prod(shape)
    total = float(x.flatten(1).var(0).sum())
    assert law.floor == pytest.approx((total - np.trace(cov)) / (d - len(exact)), rel=1e-5)
    # the law's covariance of those coefficients is the sample's, of any other one the floor
    basis = torch.from_numpy(scipy.fft.dctn(law.moments.cov.reshape(d, *shape).numpy(), axes=(-2, -1), norm="ortho"))
    again = scipy.fft.dctn(basis.reshape(d, d).T.reshape(d, *shape).numpy(), axes=(-2, -1), norm="ortho")
    again = again.reshape(*shape, *shape)
    corner = again[:3, :3, :3, :3] if len(shape) == 2 else again[:, :3, :3, :, :3, :3]
    np.testing.assert_allclose(corner.reshape(len(exact), -1), cov, atol=1e-5 * exact[0])
    last = again[(*[-1] * len(shape), *[-1] * len(shape))]
    assert last == pytest.approx(law.floor, rel=1e-4)
    kl = divergence(Moments.fit([x]), law, 1.0)
    assert kl <= law.certificate(1.0).nats <= 6 * kl
