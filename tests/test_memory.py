"""The memory that is allowed is kept: growth of the resident set of a forked child, beside one batch of images."""

import multiprocessing
import resource

import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.laws.nearest_neighbours import neighbours
from symbreak.laws.pairwise_weights import SharedPoints, overlaps
from symbreak.metrics.memorization import nearest, nearest_in
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.rows import Shards
from symbreak.studies.ask_network import watched
from symbreak.studies.diagnosis import Diagnosis, Effort

FORK = multiprocessing.get_context("fork")
BATCH = 48 * 2**20  # a batch of images takes 32 MiB of float32, and its bytes


def child(function, arguments, told):
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(*arguments)
    told.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def growth(function, *arguments):
    """Bytes by which the resident set grows at most while function(*arguments) runs."""
    began = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        told = FORK.Queue()
        process = FORK.Process(target=child, args=(function, arguments, told))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        return told.get()
    finally:
        torch.set_num_threads(began)


class Stream:
    """Images [n, 1, side, side] that are made when they are read and never held."""

    def __init__(self, n, side):
        self.n, self.side = n, side

    def __iter__(self):
        for i in range(0, self.n, 1000):
            yield torch.randn(min(1000, self.n - i), 1, self.side, self.side, generator=generator(1, i))


def fit(n, memory):
    moments = sb.Moments.fit(Stream(n, 32), run=sb.Run(memory=memory))
    assert moments.eigh[0].shape == (1024,)
    assert np.isfinite(moments.spectrum(3).low).all() == (len(moments._parts) > 1)


def test_moments_keep_to_the_memory_and_do_not_grow_with_the_samples():
    allowed = 96 * 2**20  # 12 matrices of 1,024 x 1,024
    short, long = growth(fit, 2000, allowed), growth(fit, 12_000, allowed)
    assert max(short, long) < allowed + BATCH  # 10,000 images more are 40 MiB
    assert growth(fit, 2000, None) > short  # eight parts


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="a sketch takes"):
        sb.Moments.fit(Stream(100, 32), rank=5, run=sb.Run(memory=2**30))
    with pytest.raises(InputError, match=r"0\.0419 GB of memory for samples of 1,024 elements.*rank="):
        sb.Moments.fit(Stream(100, 32), run=sb.Run(memory=40 * 2**20))


def search(law):
    overlaps(law, np.array([2.0]), 100)


def test_overlaps_and_the_empirical_law_keep_to_the_memory():
    points = torch.randn(40_000, 784, generator=generator(2))
    whole = 4 * points.numel()  # 120 MiB
    small, large = (sb.Empirical(points, memory=m * 2**20) for m in (8, 128))
    x = torch.randn(50, 784, generator=generator(3))
    for run, of in ((search, (small, large)), (None, (small.denoise, large.denoise))):
        tight, wide = (growth(search, one) if run else growth(one, x, 1.0) for one in of)
        # Beside 8 MiB: what the libraries allocate for themselves, 10 to 50 MiB; and a copy of the points.
        assert tight < 0.6 * whole
        assert wide > tight + 0.4 * whole
    torch.testing.assert_close(small.denoise(x, 1.0), large.denoise(x, 1.0), rtol=1e-5, atol=1e-6)


def shards(n, memory):
    stream = Stream(n, 28)
    return Shards((block.numpy() for block in stream), [0, n], memory)


def asks(n, memory):
    rows = shards(n, memory)
    neighbours(rows.take(np.arange(100)), rows, 3, run=sb.Run(memory=memory))
    overlaps(SharedPoints(rows, memory), np.array([2.0]), 100)


def test_rows_in_a_file_keep_to_the_memory():
    whole = 4 * 784 * 40_000  # 120 MiB
    tight, wide = growth(asks, 40_000, 8 * 2**20), growth(asks, 40_000, 2**28)
    # Beside 8 MiB and blocks of images: what the libraries allocate for themselves.
    assert tight < 0.6 * whole
    assert wide > tight + 0.6 * whole
    few, some = (shards(300, m) for m in (1000, 2**20))
    for ask in (
        lambda r: neighbours(r, None, 2, run=sb.Run(memory=2**20)),
        lambda r: neighbours(torch.zeros(5, 1, 28, 28), r),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ask(few), ask(some)))


def test_nearest_of_a_stream_is_nearest_of_all(tmp_path):
    x = torch.rand(3000, 1, 12, 12, generator=generator(4)).numpy()
    np.save(tmp_path / "x.npy", x)
    data = sb.images(tmp_path / "x.npy", batch_size=250)
    samples = torch.rand(40, 1, 12, 12, generator=generator(5)) * 2 - 1
    exact, _ = nearest(samples, data.tensor())
    for memory in (2**20, 2**22, 2**30):
        assert torch.equal(nearest_in(samples, data, sb.Run(memory=memory)), exact)
    # One run may ask for several sets of samples: none is taken for another.
    run = sb.Run(tmp_path / "run")
    for some in (samples, samples.flip(0)):
        assert torch.equal(nearest_in(some, data, run), exact if some is samples else exact.flip(0))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_diagnosis_takes_the_images_that_fit():
    x = sb.images("digits").tensor()
    data, effort = sb.images(torch.cat([x, 0.9 * x])), Effort(queries=50, points=100)
    # Without a network all images count, in a file where they do not fit.
    assert data.shards(sb.Run(memory=2**20).share(1 / 3))._file is not None
    tight, wide = (sb.diagnose(data, effort=effort, run=sb.Run(memory=m)).content["criteria"] for m in (2**20, None))
    row = {"name": "collapse", "of": "data"}
    sigma = [next(c for c in each if row.items() <= c.items())["level"]["sigma"] for each in (tight, wide)]
    assert sigma[0] == pytest.approx(sigma[1], rel=1e-5)


def test_trajectories_are_watched_with_the_images_that_fit():
    x = sb.images("digits").tensor()
    data = sb.images(torch.cat([x, 0.9 * x]))
    tight, wide = (
        Diagnosis(data, data, data, Effort(), 0, sb.Run(memory=m), sb.schedule("ddpm-linear")) for m in (2**20, None)
    )
    law = watched(tight)
    assert len(law) == 2**20 // 3 // (4 * 64)
    assert f"watched with {len(law):,} of the {len(data):,} images" in tight.notes[0]
    assert len(watched(wide)) == len(data)
    assert wide.notes == []


def measure(samples, train, held, memory):
    noise = torch.rand(len(samples), 1, 8, 8, generator=generator(6)) * 2 - 1
    subset, run = sb.Subset(rows=len(samples)), sb.Run(memory=memory)
    sb.evaluate(noise, train, held, features="pixels", subset=subset, run=run, cache=False)


@pytest.mark.slow
def test_an_evaluation_keeps_to_the_memory():
    x = torch.rand(14_000, 1, 8, 8, generator=generator(7)).numpy()
    train, held = sb.images(x[:7000], value_range=(-1, 1)), sb.images(x[7000:], value_range=(-1, 1))
    measure(x[:200], train.rows(0, 200), held.rows(0, 200), None)  # what libraries take on first use
    wide, tight = growth(measure, x[:7000], train, held, None), growth(measure, x[:7000], train, held, 24 * 2**20)
    assert tight < (24 + 60) * 2**20  # and what libraries allocate for themselves
    assert wide > 1.5 * tight


def test_an_evaluation_holds_the_rows_that_fit():
    train, held = sb.images("digits"), sb.images("digits:held-out")
    samples = train.tensor()[:400]
    full = sb.evaluate(samples, train, held, features="pixels", cache=False)
    tight = 39 * 8 * 64**2 + (64 * 64 + 32 * 1024) * 150  # moments in 5 repeats, 150 rows
    some = sb.evaluate(samples, train, held, features="pixels", run=sb.Run(memory=tight), cache=False)
    assert any("at most 150 images" in note for note in some["notes"])
    assert some["distance"] == full["distance"]
    assert some["precision_recall"]["samples"] == 150 < full["precision_recall"]["samples"]
    with pytest.raises(InputError, match=r"64 features in 5 repeats.*fewer --repeats"):
        sb.evaluate(samples, train, held, features="pixels", run=sb.Run(memory=2**20), cache=False)
