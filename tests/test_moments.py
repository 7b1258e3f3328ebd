import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from symbreak.data.readers import images
from symbreak.metrics.frechet import frechet_distance
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError
from tests.worlds import gaussian_moments


def reference(x):
    flat = x.reshape(len(x), -1).astype(np.longdouble)
    mean = flat.mean(0)
    centred = flat - mean
    return mean.astype(float), (centred.T @ centred / (len(x) - 1)).astype(float)


def relative(found, wanted):
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float64, st.tuples(st.integers(2, 60), st.integers(1, 6)), elements=st.floats(-1, 1, width=32)),
    shift=st.sampled_from([0.0, 1.0, 1e4]),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_agrees_with_numpy_whatever_the_batches_and_the_mean(x, shift, cuts):
    x = x + np.random.default_rng(0).uniform(0.5, 1, x.shape[1]) * np.arange(len(x))[:, None] / len(x) + shift
    mean, cov = reference(x)
    edges = np.cumsum(cuts)
    m = Moments.fit([torch.from_numpy(part) for part in np.split(x, edges[edges < len(x)]) if len(part)])
    assert m.count == len(x)
    assert relative(m.mean.numpy(), mean) < 1e-12
    # a mean of 1e4 spreads: input rounding alone is 1e4 * 1e-16, squared away by the pilot mean
    assert relative(m.cov.numpy(), cov) < 1e-10


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 30), min_size=3, max_size=3), seed=st.integers(0, 1000))
def test_merge_is_exact_and_associative(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, 3)) + 100 * rng.normal() for n in sizes]
    a, b, c = (Moments.fit([p]) for p in parts)
    whole = Moments.fit([np.concatenate(parts)])
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    for m in (left, right, c.merge(a).merge(b)):
        assert m.count == whole.count
        np.testing.assert_allclose(m.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(m.cov, whole.cov, rtol=1e-10)


def test_eight_bit_images_take_the_exact_way():
    digits = images("digits")
    exact, general = Moments.fit(digits), Moments.fit(iter(digits))
    mean, cov = reference(digits.tensor().double().numpy())
    assert relative(exact.cov.numpy(), cov) < 1e-13  # integers: only the final scaling rounds
    assert relative(general.cov.numpy(), cov) < 1e-12
    np.testing.assert_allclose(exact.mean.reshape(-1), mean, rtol=1e-14, atol=1e-15)


def test_exact_way_with_extreme_pixels_and_several_blocks():
    rng = np.random.default_rng(3)
    raw = rng.choice(np.array([0, 255], np.uint8), size=(5000, 4, 4))
    found = Moments.fit(images(raw))
    _, cov = reference(raw.astype(float)[:, None] / 127.5 - 1)
    assert relative(found.cov.numpy(), cov) < 1e-13


def test_spectrum_intervals_cover_the_truth():
    truth = gaussian_moments((4.0, 1.0, 0.5, 0.25))
    q, values = truth.eigh[1], truth.eigh[0]
    hits = 0
    for seed in range(100):
        z = torch.randn(800, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        s = Moments.fit([z * values.sqrt() @ q.T]).spectrum(1)
        hits += bool(s.low[0] <= 4.0 <= s.high[0])
    # nominal 95; the leading sample eigenvalue is biased upward by about 1/n, so a little less is right
    assert 88 <= hits <= 100


def test_intervals_do_not_depend_on_the_order_of_the_data():
    digits = images("digits")
    x, y = digits.tensor(), digits.labels
    by_class = x[y.argsort(stable=True)]
    width = [np.log(s.high[0] / s.low[0]) for s in (Moments.fit([x]).spectrum(1), Moments.fit([by_class]).spectrum(1))]
    # dealing contiguous thirds of sorted data to the parts would widen the interval many times
    assert 0.3 < width[0] / width[1] < 3


def test_lanczos_and_dense_spectra_agree():
    rng = np.random.default_rng(0)
    m = Moments.fit([rng.normal(size=(600, 300)) * np.linspace(3, 0.1, 300)])
    few = m.spectrum(3).values
    np.testing.assert_allclose(few, m.eigh[0][:3], rtol=1e-10)


def test_save_and_load(tmp_path):
    m = Moments.fit(images("digits"))
    back = Moments.load(m.save(tmp_path / "m.safetensors"))
    assert torch.equal(back.mean, m.mean)
    np.testing.assert_allclose(back.cov, m.cov, rtol=1e-14)
    np.testing.assert_allclose(back.spectrum(3).low, m.spectrum(3).low, rtol=1e-10)
    assert back.shape == (1, 8, 8)


def test_two_samples_have_moments_but_no_interval():
    for d in (3, 300):
        x = torch.randn(2, d, generator=torch.Generator().manual_seed(0))
        s = Moments.fit([x]).spectrum(1)
        assert s.values[0] == pytest.approx(float(((x[0] - x[1]) ** 2).sum()) / 2, rel=1e-6)
        assert np.isnan(s.low[0])
    with pytest.raises(InputError, match="at most 20,000"):
        Moments.fit([torch.zeros(2, 20_001)])


def test_rank_deficient_data():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    values = Moments.fit([x]).eigh[0]
    assert int((values > 1e-10).sum()) == 4
    assert float(values.min()) >= 0


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no batches"),
        ([torch.zeros(1, 3)], "1 sample came"),
        ([torch.ones(9, 3)], "all 9 samples are equal"),
        ([torch.zeros(4)], "expected"),
        ([torch.randn(4, 3), torch.randn(4, 2)], "first batches"),
        ([torch.tensor([[1.0], [float("nan")]])], "sample 1 holds NaN"),
    ],
)
def test_bad_batches(batches, match):
    with pytest.raises(InputError, match=match):
        Moments.fit(batches)


def test_bad_parameters(tmp_path):
    with pytest.raises(InputError, match="expected"):
        Moments(10, [0.0, 0.0], [[1.0]])
    with pytest.raises(InputError, match="not symmetric"):
        Moments(10, [0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(InputError, match="eigenvalue -1"):
        _ = Moments(10, [0.0, 0.0], [[1.0, 0.0], [0.0, -1.0]]).eigh
    (tmp_path / "x").write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(InputError, match="no safetensors file"):
        Moments.load(tmp_path / "x")
    with pytest.raises(InputError, match="does not exist"):
        Moments.load(tmp_path / "y")


# Fréchet distance


def scipy_frechet(a, b):
    gap = (a.mean - b.mean).numpy().reshape(-1)
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
    return gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root).real


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_frechet_agrees_with_scipys_matrix_root(condition):
    spectrum = tuple(np.geomspace(1, 1 / condition, 8))
    a = gaussian_moments(spectrum, shape=(8,), seed=1)
    b = gaussian_moments(spectrum[::-1], shape=(8,), seed=2, mean=1.0)
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-8)


def test_frechet_of_commuting_gaussians_is_elementary():
    a = Moments(9, [0.0, 0.0], [[4.0, 0.0], [0.0, 0.0]])  # rank deficient
    b = Moments(9, [3.0, 0.0], [[1.0, 0.0], [0.0, 9.0]])
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + 9, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="cannot be compared"):
        frechet_distance(a, gaussian_moments())


@pytest.mark.parametrize("exact", [False, True])
def test_peak_memory_does_not_grow_with_n(exact):
    import tracemalloc

    class Stream:
        integer, scale, offset = exact, 127.5, -127.5

        def __init__(self, n):
            self.n = n

        def blocks(self):
            rng = np.random.default_rng(0)
            for _ in range(self.n):
                yield rng.integers(0, 256, (500, 64), dtype=np.uint8)

        def __iter__(self):
            return (b.astype(np.float64) for b in self.blocks())

    peaks = []
    for n in (20, 80):
        tracemalloc.start()
        Moments.fit(Stream(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # the rows are 4 times as many; buffers and sums are the same
    assert peaks[1] < 1.2 * peaks[0]


def test_one_array_is_one_batch():
    x = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
    for alone in (x, x.numpy()):
        m = Moments.fit(alone)
        assert m.shape == (2, 3)
        assert torch.equal(m.cov, Moments.fit([x]).cov)
