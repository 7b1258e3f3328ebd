import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from symbreak.critical import CriticalTime
from symbreak.data.readers import images
from symbreak.intervals import entropy_interval
from symbreak.laws import Gaussian
from symbreak.laws.simple import Ball, PowerMap, WhiteNoise, diagonal, isotropic, power_coefficients
from symbreak.metrics import extractor, features
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run
from symbreak.studies import measure
from symbreak.studies.compare_starts import NOISED, candidate_starts, compare_starts
from symbreak.studies.measure import Comparison, Measure
from symbreak.studies.sensitivity import flat_range, knee, sensitivity
from tests.worlds import gaussian_moments

# Small enough that white noise carried down from .15 (standard deviation .46) is not cut to [-1, 1].
SPECTRUM = (6e-3, 3e-4, 2e-4, 1e-4)
LAW = Gaussian(gaussian_moments(eigenvalues=SPECTRUM, mean=0.05, seed=2))
LEVELS = (0.15, 0.5, 1.5, 6.0)
MEASURE = Measure(extractor("pixels"), samples=100, repeats=4, micro_batch=400)
TOP = {"samplers": ("dpm++2m-karras",), "calls": (20,), "levels": LEVELS, "measure": MEASURE}


@pytest.fixture(scope="module")
def world():
    """A Gaussian law as the network, data drawn from it."""
    base = scheduler("ddpm", clip_sample=False)
    pipe = SimpleNamespace(unet=as_unet(LAW, base), scheduler=base)
    parts = [LAW.sample(2000, 0.0, generator(s, 3)).clamp(-1, 1) for s in (1, 2)]
    train, held = (images(p, value_range=(-1, 1)) for p in parts)
    return train, held, pipe


@pytest.fixture(scope="module")
def record(world, tmp_path_factory):
    train, held, pipe = world
    marks = {
        "high": CriticalTime(NoiseLevel(50.0)),
        "mid": CriticalTime(NoiseLevel(0.7)),
        "none": CriticalTime(None, reason="nothing"),
    }
    starts = {"law": LAW, "white noise": WhiteNoise(train.shape)}
    return sensitivity(
        train, pipe, holdout=held, starts=starts, marks=marks, run=Run(tmp_path_factory.mktemp("s")), **TOP
    )


def from_white_noise(sigma):
    """Fréchet distance after the exact flow from white noise at sigma to a law's clean samples.

    A mode of variance L is carried with sqrt(L / (L + sigma^2)): its variance ends at L (1 + sigma^2) / (L + sigma^2),
    and its mean, which white noise lacks, misses by that factor.
    """
    lam, q = LAW.moments.eigh
    mu = (q.T @ LAW.moments.mean.reshape(-1)).numpy()
    lam = lam.numpy()
    carried = np.sqrt(lam / (lam + sigma**2))
    return float(((carried * mu) ** 2).sum() + ((np.sqrt(lam) - carried * math.sqrt(1 + sigma**2)) ** 2).sum())


def test_the_true_law_is_flat_and_white_noise_degrades_as_computed(record):
    (row,) = record.content["rows"]
    law, white = row["starts"]["law"], row["starts"]["white noise"]
    assert [round(c["sigma"], 2) for c in law["cells"]] == pytest.approx(LEVELS, rel=0.05)
    # From its own law every level gives the law: no level can be told from the best.
    assert law["flat"]["overlap"] == [law["cells"][0]["sigma"], law["cells"][-1]["sigma"]]
    assert law["knee"]["level"] is None
    assert "the lowest tried, on up no level is worse" in law["knee"]["reason"]
    floor = record.content["floor"]["pooled"]
    for cell in white["cells"]:
        # A spread of n = 400 samples has the relative error 1 / sqrt(2 n) = .035; a distance F of spreads s against
        # smaller ones moves by 2 sqrt(F) ds <= 2 sqrt(F) .035 (sqrt F + sqrt(tr C)): four of them, and a bias that
        # the floor (as much for 2,000 images) and its own n, tr C / n = 1.5e-5, bound.
        exact, trace = from_white_noise(cell["sigma"]), math.sqrt(sum(SPECTRUM))
        error = 4 * 2 * math.sqrt(exact) * 0.035 * (math.sqrt(exact) + trace) + 5 * (floor + 1.5e-5)
        assert abs(cell["distance"]["pooled"] - exact) < error, cell["sigma"]
        assert error < 0.6 * exact or cell["sigma"] > 1
    values = [c["distance"]["mean"] for c in white["cells"]]
    assert values == sorted(values, reverse=True)


def test_the_knee_of_white_noise_lies_where_the_closed_form_passes(record):
    (row,) = record.content["rows"]
    found = row["starts"]["white noise"]["knee"]
    # 100 images of the law itself score 2e-4; the exact curve is 45 times that at .5, and as much at 1.5.
    d = row["standard"]["distance"]["high"]
    assert [from_white_noise(s) > 10 * d for s in LEVELS] == [True, True, False, False]
    assert [from_white_noise(s) > d for s in LEVELS] == [True, True, False, False]
    assert (found["low"]["sigma"], found["level"]["sigma"]) == pytest.approx(LEVELS[1:3], rel=0.05)
    assert found["interval"] == "jackknife"
    assert row["starts"]["law"]["marks"] == {"high": "above", "mid": "inside", "none": None}


def test_an_interrupted_run_ends_with_the_same_record(record, world, tmp_path):
    train, held, pipe = world

    def stop(stage, done, total):
        assert stage == "images" or (stage, total) == ("cells", 9)
        if (stage, done) == ("cells", 4):
            raise KeyboardInterrupt

    args = {"holdout": held, "starts": {"law": LAW, "white noise": WhiteNoise(train.shape)}}
    with pytest.raises(KeyboardInterrupt):
        sensitivity(train, pipe, run=Run(tmp_path, progress=stop), **args, **TOP)
    (cells,) = tmp_path.glob("blocks-*/cells.json")
    assert len(json.loads(cells.read_text())["cells"]) >= 4
    found = sensitivity(train, pipe, run=Run(tmp_path), **args, **TOP)
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    kept, again = (
        [s["cells"] for r in x.content["rows"] for s in (r["standard"] | {"cells": None}, *r["starts"].values())]
        for x in (record, found)
    )
    assert json.dumps(kept, sort_keys=True) == json.dumps(again, sort_keys=True)


def test_starts_compared(world, tmp_path, monkeypatch):
    train, held, pipe = world
    looked_for = []
    real = measure.nearest_summary
    monkeypatch.setattr(measure, "nearest_summary", lambda x, *a: looked_for.append(x) or real(x, *a))
    read = []
    whole = type(held).shards
    monkeypatch.setattr(type(held), "shards", lambda self, *a: read.append(self.name) or whole(self, *a))
    moments = Moments.fit(train)
    starts = {"white noise": WhiteNoise(train.shape), "diagonal": diagonal(moments), "full": Gaussian(moments)}
    found = compare_starts(
        train, pipe, "dpm++2m-karras", (8,), [0.045], holdout=held, measure=MEASURE, starts=starts, run=Run(tmp_path)
    )
    rows = {r["start"]: r for r in found.content["rows"]}
    assert list(rows) == [*starts, NOISED]
    mean = {name: r["distance"]["mean"] for name, r in rows.items()}
    # the pixels of this world are correlated, so the diagonal misses what the full covariance has
    assert mean["white noise"] > mean["diagonal"] > rows["full"]["distance"]["high"]
    for name in ("full", NOISED):  # two ways to the same law
        assert rows[name]["distance"]["low"] < max(rows["full"]["distance"]["high"], mean[NOISED])
        assert rows[name]["recall"] > 0.5
    assert {r["calls"] for r in rows.values()} == {8}
    assert rows["full"]["entropy"] is None  # pixels do not classify
    assert found.content["real"]["images"] == 400
    # no training image is looked for among the training images, and of the held-out ones not all are read for that
    known = {one.numpy().tobytes() for one in train.tensor()}
    assert not any(one.numpy().tobytes() in known for x in looked_for for one in x)
    assert [len(x) for x in looked_for] == [400] * 5 + [measure.NEAREST]
    assert read == [train.name]


def test_the_measures_of_images_beside_the_distance_have_intervals():
    """The first 1,000 held-out images are all the same: what is compared with is a random part."""
    data, extract = images("digits"), extractor("digits-classifier")
    x, held = images("digits:held-out").tensor(), data.tensor()
    f = features(extract, held)
    real = torch.cat([f[:1].repeat(measure.NEIGHBOURS, 1), f, f, f])
    comparison = Comparison(None, extract, None, Shards.of(held), (), (), 1, 1, Run(), real)
    found = comparison.quality(x, features(extract, x))
    assert found["precision"] > 0.3
    for name in ("precision", "recall", "entropy", "nearest", "memorized"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
        assert found[f"{name}_low"] < found[f"{name}_high"]
    counts = np.bincount(extract.logits(x).argmax(1).numpy(), minlength=10)
    assert found["entropy"] == entropy_interval(counts)["value"]
    few = comparison.quality(x[:100], features(extract, x[:100]))
    assert few["entropy_low"] is None  # below 20 a class
    assert few["entropy"] > entropy_interval(np.bincount(extract.logits(x[:100]).argmax(1).numpy()))["plug_in"]
    other = comparison.quality(x[:100], features(extract, x[:100]), held[:100])
    assert (other["nearest"], other["memorized"]) == (0.0, 1.0)


def test_flat_range_and_knee_by_hand():
    sigma = np.array([1.0, 2.0, 4.0, 8.0])
    noise = np.array([-0.1, 0.0, 0.1])
    values = np.array([9.0, 5.0, 1.02, 1.0])[:, None] + noise
    # half-width at the bound of 12 pairs, t_2 = 10.89: .629; the paired differences have no spread at all
    assert flat_range(sigma, values) == {
        "best": 8.0,
        "overlap": [4.0, 8.0],
        "paired": [8.0, 8.0],
        "bound": pytest.approx(10.886, abs=0.001),
    }
    found = knee(sigma, values, 2.0 + noise)  # the shared noise cancels
    assert (found.low.sigma, found.sigma, found.high.sigma) == (2.0, 4.0, 4.0)
    # Of the repeats alone the differences have no spread; parts of the reference that speak against each other give it:
    # .1 (-1, 1, -1, 1) has V = (3 / 4) (4 / 100) = .03, and t_3 at 1 - .05 / 8 is 5.05: half-width .87.
    parts = np.zeros((4, 4))
    parts[2:] = 0.1 * np.array([-1, 1, -1, 1])
    open_above = knee(sigma, values, 1.5 + noise, parts, np.zeros(4))
    assert (open_above.low.sigma, open_above.sigma, open_above.high) == (2.0, 4.0, None)
    assert "open above" in open_above.reason
    assert flat_range(sigma, values, parts)["paired"] == [8.0, 8.0]  # shared by both levels, it cancels
    parts[2] *= -1
    assert flat_range(sigma, values, parts)["paired"] == [4.0, 8.0]
    assert knee(sigma, values, 10.0 + noise).level is None
    assert "no level is worse" in knee(sigma, values, 10.0 + noise).reason
    assert "the highest tried, it is worse" in knee(sigma, values, noise).reason
    assert flat_range(sigma, values[:, :1])["overlap"] is None
    with pytest.raises(InputError, match="rising levels"):
        flat_range(sigma[::-1], values)
    with pytest.raises(InputError, match="single repeat"):
        knee(sigma, values[:, :1], noise[:1])


@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_equal_levels_are_told_apart_in_at_most_five_of_a_hundred_experiments(repeats):
    rng, sigma, trials = np.random.default_rng(0), np.arange(1.0, 9.0), 400
    excluded = 0
    for _ in range(trials):
        shared = rng.standard_normal(repeats)  # the same seeds at all levels
        flat = flat_range(sigma, shared + rng.standard_normal((8, repeats)))
        excluded += flat["paired"] != [1.0, 8.0] or flat["overlap"] != [1.0, 8.0]
    # 400 trials: three standard errors above 5 % (44 % before, when the best was taken for known)
    assert excluded / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_power_coefficients_have_their_cumulants():
    x, weight = np.polynomial.hermite_e.hermegauss(20)
    weight = weight / weight.sum()
    for g1, g2 in ((0.0, 0.0), (0.5, 0.3), (-0.8, 1.5), (0.0, -1.0), (0.3, -0.6)):
        b, c, d = power_coefficients(g1, g2)
        y = b * x + c * (x * x - 1) + d * x**3
        moments = [float(weight @ y**k) for k in (1, 2, 3, 4)]  # exact: of degree 12 at most
        assert moments == pytest.approx([0.0, 1.0, g1, g2 + 3], abs=1e-6)
    b, c, d = power_coefficients(0.0, -1.9)  # out of reach: the variance is kept, the kurtosis is as low as it gets
    y = b * x + d * x**3
    assert float(weight @ y**2) == pytest.approx(1.0, abs=1e-9)
    assert float(weight @ y**4) < 3 - 1.0


def test_crude_starts_have_the_noised_mean_and_covariance():
    sigma, n = 0.045, 40000
    z = torch.randn(n, *LAW.shape, generator=generator(5, 5), dtype=torch.float64)
    mean = LAW.moments.mean.reshape(-1)
    skewed = PowerMap(LAW, [1.0, 0.0], [1.0, -0.8])
    for start, cov in (
        (Ball(LAW), LAW.moments.cov),
        (skewed, LAW.moments.cov),
        (Ball(isotropic(LAW.moments)), sum(SPECTRUM) / 4 * torch.eye(4, dtype=torch.float64)),
        (diagonal(LAW.moments), torch.diag(LAW.moments.cov.diagonal())),
    ):
        x = start.transport(z, sigma).flatten(1)
        wanted = cov + sigma**2 * torch.eye(4, dtype=torch.float64)
        # entries of a covariance of n draws have the error sqrt(2 / n) times the largest variance at most (excess
        # kurtosis 1 adds a fifth): 4.5 of them for 40 numbers
        worst = 4.5 * 1.2 * math.sqrt(2 / n) * float(wanted.diagonal().max())
        assert float((torch.cov(x.T) - wanted).abs().max()) < worst
        assert float((x.mean(0) - mean).abs().max()) < 4.5 * math.sqrt(float(wanted.diagonal().max()) / n)
    # uniform in the ball: (|w| / R)^d is uniform
    w = Ball(Gaussian(Moments(2, torch.zeros(3), 0.75 * torch.eye(3)))).transport(z.flatten(1)[:, :3], 0.5)
    assert stats.kstest((w.norm(dim=1).numpy() / math.sqrt(5)) ** 3, "uniform").pvalue > 1e-3
    # cumulants of the first mode shrink with r = L / (L + sigma^2)
    first = (skewed.transport(z, sigma).flatten(1) - mean).numpy() @ LAW.eigenvectors[:, 0].numpy()
    r = SPECTRUM[0] / (SPECTRUM[0] + sigma**2)
    assert stats.skew(first) == pytest.approx(r**1.5, abs=0.06)  # standard error about sqrt(6 / n) = .012, times 5
    assert stats.kurtosis(first) == pytest.approx(r**2, abs=0.25)  # sqrt(24 / n) = .024, more with tails: times 10


def test_the_learned_map_takes_its_moments_from_the_data(world):
    train = world[0]
    gaussian = Gaussian.fit(train)
    found = PowerMap.fit(train, gaussian, modes=2)
    y = (train.tensor().flatten(1).double() - gaussian.moments.mean.reshape(-1)) @ gaussian.eigenvectors[:, :2]
    assert found.skewness == pytest.approx(stats.skew(y.numpy()), abs=1e-9)
    assert found.kurtosis == pytest.approx(stats.kurtosis(y.numpy()), abs=1e-9)


def test_candidate_starts_of_the_digits():
    data = images("digits").subset(300)
    found = candidate_starts(data, clusters=5)
    assert next(iter(found)) == "white noise"
    assert list(found)[-2:] == ["class mixture", "cluster mixture"]
    noise = torch.randn(5, 1, 8, 8, generator=generator(1, 1))
    x = {name: law.transport(noise, 0.5) for name, law in found.items()}
    assert torch.equal(x["white noise"], math.sqrt(1.25) * noise)
    for a in x:
        for b in x:
            assert a == b or not torch.equal(x[a], x[b])


def test_bad_input(world):
    train, held, pipe = world
    args = {"holdout": held, "measure": MEASURE}
    with pytest.raises(InputError, match="at least 2 of each"):
        sensitivity(train, pipe, holdout=held, measure=replace(MEASURE, repeats=1))
    with pytest.raises(InputError, match=r"sensitivity\(measure=sb.Measure\(samples=...\)\)"):
        sensitivity(train, pipe, samples=5, **args)
    with pytest.raises(InputError, match="the network makes"):
        sensitivity(images("digits"), pipe, **args)
    with pytest.raises(InputError, match="cannot spend exactly 2"):
        sensitivity(train, pipe, samplers=("pndm",), calls=(2,), **args)
    with pytest.raises(InputError, match="2 skewnesses and 1 kurtoses"):
        PowerMap(LAW, [1.0, 0.0], [1.0])


def test_training_images_to_noise_are_drawn_without_replacement(monkeypatch):
    """As the floor draws: with replacement 8 of 8 would hold 5 or 6 different ones, and their spread is smaller."""
    monkeypatch.setattr(measure, "generate", lambda *_, clean, **__: clean)
    train = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 1, 2, 2)
    comparison = Comparison(None, MEASURE.extract, None, Shards.of(train.contiguous()), (), (), 1, 8, Run())
    noised = comparison.images(None, range(20), noised=True)[:, 0, 0, 0]
    assert [noised[i : i + 8].unique().numel() for i in (0, 8)] == [8, 8]
    assert noised[16:].unique().numel() == 4
