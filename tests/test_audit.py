import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from symbreak.cli.commands import main
from symbreak.data.readers import images
from symbreak.intervals import proportion
from symbreak.laws import Empirical, Gaussian
from symbreak.laws import nearest_neighbours as neighbours_module
from symbreak.laws.nearest_neighbours import neighbours
from symbreak.metrics import memorization, transformed
from symbreak.metrics.memorization import apart, groups, nearer_to_train
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet
from symbreak.networks.samplers import scheduler
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.runtime.files import InputError
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run
from symbreak.start import sample
from symbreak.start.loading import load_pipeline
from symbreak.studies.audit import Sampling, audit


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute(x, y, k):
    """By differences in float64; of equal distances the lower index first."""
    d = torch.stack([(y.double() - row.double()).square().sum(1).sqrt() for row in x])
    found = d.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


# --- neighbours -----------------------------------------------------------------------------------


def worlds():
    g = rng(1)
    grid = torch.randint(0, 3, (500, 4), generator=g).float()  # 81 places for 500 points: ties everywhere
    shell = torch.randn(300, 30, generator=g)
    shell = shell / shell.norm(dim=1, keepdim=True) * (1 + 1e-6 * torch.randn(300, 1, generator=g))
    return {
        "normal": (torch.randn(200, 50, generator=g), torch.randn(3000, 50, generator=g)),
        "far from the origin": (torch.randn(50, 20, generator=g) + 1e4, torch.randn(400, 20, generator=g) + 1e4),
        "ties": (grid[:60] + 0.0, grid),
        "all at one distance": (torch.zeros(3, 30), shell),
        "tight beside a far point": (
            1e-4 * torch.randn(40, 10, generator=g),
            torch.cat([1e-4 * torch.randn(300, 10, generator=g), torch.full((1, 10), 1e3)]),
        ),
        "tiny float64": (
            1e-30 * torch.randn(20, 8, generator=g, dtype=torch.float64),
            1e-30 * torch.randn(100, 8, generator=g, dtype=torch.float64),
        ),
        "mixed types": (torch.randn(20, 8, generator=g), torch.randn(100, 8, generator=g, dtype=torch.float64) + 1e5),
    }


@pytest.mark.parametrize("name", list(worlds()))
def test_neighbours_are_those_of_exact_differences(name):
    x, y = worlds()[name]
    for k in (1, 2, 8):
        d, j = neighbours(x, y, k)
        want_d, want_j = brute(x, y, k)
        # The same sums of squares, at most in another order.
        torch.testing.assert_close(d, want_d, rtol=1e-13, atol=0)
        assert torch.equal(j, want_j)
        for options in ({"block": 1}, {"block": 7, "run": Run(memory=2**20)}, {"run": Run(memory=2**32)}):
            again = neighbours(x, y, k, **options)
            assert torch.equal(again[0], d)
            assert torch.equal(again[1], j)


def test_float32_products_alone_would_be_wrong():
    """Off centre by 50, |y|^2 - 2 x.y is rounded at 1e-3, the squared distances are 1e-7."""
    x, y = worlds()["tight beside a far point"]
    naive = ((y - 50).square().sum(1) - 2 * (x - 50) @ (y - 50).T).argmin(1)
    found = neighbours(x, y, 1)[1][:, 0]
    assert torch.equal(found, brute(x, y, 1)[1][:, 0])
    assert (naive != found).float().mean() > 0.5


def test_nobody_is_its_own_neighbour():
    x = torch.randn(300, 5, generator=rng())
    x[17] = x[230]
    d, j = neighbours(x, None, 3, block=64)
    full = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    assert torch.equal(j[:, 0], full.argmin(1))
    assert (j[17, 0], j[230, 0], d[17, 0]) == (230, 17, 0)
    torch.testing.assert_close(d, full.sort(1).values[:, :3], rtol=1e-13, atol=0)
    with pytest.raises(InputError, match="at least 3 training images"):
        neighbours(x[:2], None, 2)
    with pytest.raises(InputError, match="NaN"):
        neighbours(x, torch.full((4, 5), torch.nan))
    with pytest.raises(InputError, match="1 MiB"):
        neighbours(x, x, run=Run(memory=10))


def test_finished_parts_are_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(neighbours_module, "QUERIES", 100)
    x, seen = torch.randn(250, 4, generator=rng()), []
    run = Run(tmp_path, progress=lambda *a: seen.append(a))
    first = neighbours(x, x, run=run)
    parts = [p.stem for p in tmp_path.rglob("*.safetensors")]
    assert sorted(parts) == ["neighbours-0-100", "neighbours-100-200", "neighbours-200-250"]
    assert seen[-1] == ("neighbours", 250, 250)
    monkeypatch.setattr(neighbours_module.Search, "ask", None)
    assert all(torch.equal(a, b) for a, b in zip(first, neighbours(x, x, run=run)))


@pytest.mark.parametrize(("held", "points"), [(2**30, None), (0, None), (0, 23), (2**30, 1)])
def test_neighbours_among_shards_are_those_among_all(monkeypatch, held, points):
    """In memory or in a file, all at once or so many points at a time."""
    monkeypatch.setattr(neighbours_module, "QUERIES", 50)
    for name, (x, y) in worlds().items():
        if points is not None:  # a few dozen blocks a world show what thousands would
            x, y = x[: 10 * points], y[: 30 * points]
        queries, rows = (Shards([t.numpy()], [0, len(t)], held) for t in (x, y))
        k = min(5, len(y) - 1)
        want = neighbours(x, y, k), neighbours(y, None, k)
        with monkeypatch.context() as patch:
            if points is not None:
                patch.setattr(Shards, "row_bytes", 2**20 // (4 * points))
            found = (
                neighbours(queries, rows, k, run=Run(memory=2**20)),
                neighbours(rows, None, k, run=Run(memory=2**20)),
            )
        assert all(torch.equal(a, b) for f, w in zip(found, want) for a, b in zip(f, w)), name


def test_neighbours_of_another_class():
    g = rng(9)
    x, y = torch.randn(40, 6, generator=g), torch.randn(300, 6, generator=g)
    own, classes = torch.arange(40) % 3, torch.randint(0, 3, (300,), generator=g)
    gap = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    want = gap.masked_fill(own[:, None] == classes[None], torch.inf).topk(4, largest=False)
    for points in (y, Shards.of(y)):
        d, j = neighbours(x, points, 4, classes=(own, classes))
        torch.testing.assert_close(d, want.values, rtol=1e-13, atol=0)
        assert torch.equal(j, want.indices)
    d, j = neighbours(x[:1], y, 2, classes=(torch.zeros(1, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)))
    assert torch.isinf(d).all()  # all points are of its class


def test_finished_parts_among_shards_do_not_depend_on_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(neighbours_module, "QUERIES", 100)
    rows = Shards.of(torch.randn(250, 4, generator=rng()))
    first = neighbours(rows, None, 3, run=Run(tmp_path))
    parts = [p.stem for p in tmp_path.rglob("*.safetensors")]
    assert sorted(parts) == ["neighbours-0-100", "neighbours-100-200", "neighbours-200-250"]
    monkeypatch.setattr(neighbours_module.Search, "ask", None)
    assert all(torch.equal(a, b) for a, b in zip(first, neighbours(rows, None, 3, run=Run(tmp_path, 2**20))))


# --- duplicates -----------------------------------------------------------------------------------


def test_near_duplicates_are_found_however_many_and_however_often():
    g = rng(2)
    x = torch.randn(200, 20, generator=g)
    twice = torch.cat([x, x + 1e-3 * torch.randn(x.shape, generator=g)])  # the first neighbour has no scale left
    group, radius, scale = groups(twice)
    assert np.array_equal(group, np.tile(np.arange(200), 2))
    assert 1e-3 * 20**0.5 * 2 < radius < 0.15 * scale
    crowd = torch.cat([x, x[:1] + 1e-3 * torch.randn(60, 20, generator=g)])  # more than the eight neighbours looked at
    group, _, _ = groups(crowd)
    assert np.array_equal(group, np.concatenate([np.arange(200), np.zeros(60, int)]))
    for factor in (1e-6, 1e6):  # scale-free
        assert np.array_equal(groups(factor * crowd)[0], group)
    assert groups(x)[0].max() == 199
    assert groups(twice, near=0.0)[0].max() == 399


def test_every_pair_within_the_radius_is_found():
    """A crowd on a line with steps just below the radius: one chain, in any order of the rows."""
    g = rng(3)
    far = 100 * torch.randn(80, 2, generator=g)
    _, radius, _ = groups(far)
    line = torch.zeros(40, 2)
    line[:, 0] = 0.9 * radius * torch.arange(40) / 3 + 1000
    points = torch.cat([far, line])[torch.randperm(120, generator=g)]
    group, radius, _ = groups(points)
    d = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    same = torch.from_numpy(group[:, None] == group[None])
    assert bool(same[d <= radius].all())
    assert np.bincount(group).max() == 40


def test_a_copy_of_a_duplicated_image_is_still_caught():
    g = rng(4)
    x = torch.randn(100, 20, generator=g)
    y = torch.cat([x, x[:30] + 1e-4 * torch.randn(30, 20, generator=g), x[40:41].expand(20, 20) * (1 + 1e-6)])
    y[-19:] += 1e-5 * torch.randn(19, 20, generator=g)
    group, _, _ = groups(y)
    copies = x[:50] + 1e-4 * torch.randn(50, 20, generator=g)
    d, j = neighbours(copies, y, 2)
    assert ((d[:, 0] / d[:, 1]) < 1 / 3).sum() < 22  # the 31 duplicated ones are missed by the plain ratio
    d, j = apart(copies, y, group)
    assert bool((d[:, 0] / d[:, 1] < 1e-2).all())
    assert np.array_equal(group[j[:, 0]], np.arange(50))
    assert (group[j[:, 1]] != group[j[:, 0]]).all()
    # The second is the nearest of all other groups.
    for row in (0, 40, 45):
        rest = torch.from_numpy(np.flatnonzero(group != row))
        assert d[row, 1] == pytest.approx(float(brute(copies[row : row + 1], y[rest], 1)[0]))


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 50), (3, 50), (50, 50)])
def test_intervals_are_clopper_and_pearsons(k, n):
    found, want = proportion(k, n), binomtest(k, n).proportion_ci(0.95, "exact")
    assert (found["low"], found["high"]) == pytest.approx((want.low, want.high), abs=1e-12)


def test_the_permutation_law_by_enumeration():
    """Five samples on 3 + 3 references, two of them on one: all 20 halves."""
    near, far = torch.tensor([1.0, 1, 1, 1, 2]), torch.tensor([2.0, 2, 2, 1, 1])
    train, held = torch.tensor([0, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 0, 1])
    found = nearer_to_train((near, train), (far, held), 3)
    weight = [2.0, 1.0, 0.5, 0.5, 1.0, 0.0]
    assert (found["count"], found["ties"]) == (3.5, 1)
    assert found["effective"] == pytest.approx(25 / sum(w * w for w in weight))
    sums = [sum(weight[i] for i in half) for half in itertools.combinations(range(6), 3)]
    exact = np.mean([s >= 3.5 for s in sums])
    # 99,999 draws: five standard errors.
    assert found["p_value"] == pytest.approx(exact, abs=5 * (exact * (1 - exact) / 1e5) ** 0.5)


def test_without_copying_the_test_keeps_its_level(monkeypatch):
    """2,000 samples on 2 x 20 references: a binomial test would take the hubs for evidence."""
    monkeypatch.setattr(memorization, "PERMUTATIONS", 999)
    small, binomial, covered = 0, 0, 0
    for trial in range(120):
        g = rng(trial)
        x, y, z = (torch.randn(n, 6, generator=g) for n in (2000, 20, 20))
        a, b = (tuple(t[:, 0] for t in neighbours(x, r, 1)) for r in (y, z))
        found = nearer_to_train(a, b, 20, seed=trial)
        small += found["p_value"] < 0.05
        binomial += binomtest(int(found["count"]), 2000, alternative="greater").pvalue < 0.05
        covered += found["low"] <= 0.5 <= found["high"]
    # Six of 120 expected; four standard errors of 2.4.
    assert small <= 15
    assert binomial > 30
    assert covered >= 104


# --- audit ----------------------------------------------------------------------------------------


def test_the_other_half_of_the_digits_is_not_memorized():
    train, held = images("digits"), images("digits:held-out")
    content = audit(train, held.tensor()[:400]).content
    assert content["duplicates"]["exact"]["groups"] == content["duplicates"]["near"]["groups"] == 0
    found = content["memorized"]["samples"]
    assert (found["count"], found["exact"], found["low"]) == (0, 0, 0.0)
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / 400))
    # These samples are held-out images themselves: all nearer to those, but for the one that was thinned out.
    assert content["comparison"]["references"] == 898
    assert content["comparison"]["count"] <= 1
    assert content["verdict"]["kind"] == "none"
    # Fresh real images lie on either side equally often.
    first, second = held.split(0.5)
    compared = audit(train, first, holdout=second).content["comparison"]
    assert compared["references"] == len(second)
    assert compared["low"] < 0.5 < compared["high"]
    assert compared["p_value"] > 0.01


def planted(copies, noise=0.0):
    """Held-out digits of which the first are training images."""
    x = images("digits:held-out").tensor()[:200].clone()
    own = images("digits").tensor()[:copies]
    x[:copies] = (own + noise * torch.randn(own.shape, generator=rng(5))).clamp(-1, 1)
    return x


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_k_planted_copies_of_n_give_k_of_n(noise):
    """Noise of .02 moves an image by at most .02 * (8 + 4): a seventh of the least distance of two digits, .94."""
    content = audit(images("digits"), planted(37, noise)).content
    found = content["memorized"]["samples"]
    assert (found["count"], found["of"], found["share"]) == (37, 200, 37 / 200)
    assert found["low"] < 37 / 200 < found["high"]
    assert found["exact"] == (37 if noise == 0 else 0)
    assert content["verdict"]["kind"] == "copies"
    assert [p["memorized"] for p in content["pairs"]] == [True] * 24
    assert all(p["index"][0] == p["index"][1] for p in content["pairs"])
    ratios = [p["ratio"] for p in content["pairs"]]
    assert ratios == sorted(ratios)
    edges = content["histograms"]["ratio"]["edges"]
    assert sum(content["histograms"]["ratio"]["samples"]) == 200
    assert edges[0] == 0
    assert edges[-1] == 1


def duplicated():
    """300 digits, of which 20 come twice, one 12 times, and 10 once more with a little noise."""
    x = images("digits").tensor()[:300]
    noisy = ((x[50:60] + 0.01 * torch.randn(10, 1, 8, 8, generator=rng(6))).clamp(-1, 1) + 1) / 2
    raw = torch.cat([(x + 1) / 2, (x[:20] + 1) / 2, (x[30:31] + 1).expand(11, 1, 8, 8) / 2, noisy])
    return images((255 * raw).round().to(torch.uint8).numpy())


def test_all_planted_duplicates_are_found_and_hide_no_copy():
    data = duplicated()
    twins = audit(data).content["duplicates"]
    exact = {k: twins["exact"][k] for k in ("groups", "images", "spare", "largest")}
    assert exact == {"groups": 21, "images": 52, "spare": 31, "largest": 12}
    near = {k: twins["near"][k] for k in ("groups", "images", "spare", "largest")}
    assert near == {"groups": 10, "images": 20, "spare": 10, "largest": 2}
    assert (twins["different"], twins["deduplicated"]) == (310, 300)
    assert twins["exact"]["listed"][0]["index"] == [30, *range(320, 331)]
    assert {tuple(g["index"]) for g in twins["near"]["listed"]} == {(50 + i, 331 + i) for i in range(10)}
    # 60 copies: of duplicated, near-duplicated and single images.
    content = audit(data, data.tensor()[:60] * 0.999).content
    assert content["memorized"]["samples"]["count"] == 60


def test_a_law_that_memorizes_is_caught_and_one_that_does_not_is_not():
    """The data set itself in a network's place gives its points back; a Gaussian has none to give."""
    data = images("digits").subset(100)
    base = scheduler("ddim", like=load_pipeline("digits").scheduler)
    for law, share, kind in ((Empirical(data.tensor()), 1.0, "copies"), (Gaussian(Moments.fit(data)), 0.0, None)):
        pipe = SimpleNamespace(unet=as_unet(law, base), scheduler=base)
        content = audit(data, model=pipe, sampling=Sampling(60, steps=30)).content
        assert content["memorized"]["samples"]["share"] == share
        assert content["held_out"]["count"] == 899
        if kind is not None:
            assert content["verdict"]["kind"] == kind
            assert content["comparison"]["p_value"] < 1e-4


@pytest.mark.parametrize("change", ["flip", "shift", "paler", "all"])
def test_copies_with_changes_are_found(change):
    train, held = images("digits"), images("digits:held-out").tensor()
    x = train.tensor()[::3]
    if change in ("flip", "all"):
        x = x.flip(-1)
    if change in ("shift", "all"):
        x = torch.nn.functional.pad(x, (2, 0, 0, 2), value=-1.0)[..., 2:, :-2]  # two to the right, two up
    if change in ("paler", "all"):
        x = 0.9 * x + 0.1
    mixed = torch.cat([x, held[::3][: len(x)]])
    record = audit(train, mixed, holdout=images("digits:held-out").take(np.arange(1, 899, 3), "others"))
    assert record.content["verdict"]["kind"] == "copies"
    changed = record.content["transformed"]
    # all copies but the few whose shift left the figure behind; of images nobody copied hardly any
    assert 0.45 < changed["samples"]["share"] < 0.56
    assert changed["held_out"]["share"] < 0.05
    right = [one["index"][1] == 3 * one["index"][0] for one in changed["samples"]["listed"]]
    assert np.mean(right) > 0.95


@pytest.mark.parametrize("near", [0.1, 0.0])
def test_paler_copies_are_found_beside_a_paler_twin_of_every_training_image(near):
    """At mean 0 and norm 1 an image and its twin are one point: they are no second nearest of each other."""
    x, held = images("digits").tensor()[:200], images("digits:held-out").tensor()
    twins = images(((torch.cat([x, 0.9 * x + 0.05]) + 1) / 2).numpy())
    mixed = torch.cat([0.8 * x[:20] + 0.1, held[:80]])
    content = audit(
        twins, mixed, holdout=images("digits:held-out").take(np.arange(100, 300), "others"), near=near
    ).content
    changed = content["transformed"]
    assert {one["index"][0] for one in changed["samples"]["listed"]} == set(range(20))
    assert all(one["index"][1] % 200 == one["index"][0] for one in changed["samples"]["listed"])
    assert changed["held_out"]["count"] == 0
    assert content["duplicates"]["deduplicated"] == 400  # of the images as they are they are two
    assert content["verdict"]["kind"] == "copies"


def test_the_search_for_changed_copies_is_made_once_and_its_progress_rises(monkeypatch):
    """Samples and held-out images, flipped and not, are one search for each of 25 shifts."""
    asked, told = [], []
    real = transformed.apart
    monkeypatch.setattr(transformed, "apart", lambda q, *a: asked.append(len(q)) or real(q, *a))
    run = Run(progress=lambda stage, done, total: told.append((done, total)) if stage == "transformed" else None)
    held = images("digits:held-out")
    both = audit(images("digits").subset(100), held.tensor()[:30].flip(-1), holdout=held.subset(50), run=run).content
    assert asked == [2 * (30 + 50)] * 25
    done, total = zip(*told)
    assert list(done) == sorted(done)
    assert set(total) == {100 + 25 * 160}
    assert done[-1] == total[-1]
    alone = audit(images("digits").subset(100), held.subset(50), holdout=held.subset(50)).content["transformed"]
    assert both["transformed"]["held_out"] == alone["samples"] == alone["held_out"]


def test_training_images_of_one_pattern_have_no_changed_copies(tmp_path):
    """Flat images: what is left without brightness and contrast is nothing."""
    grey = np.arange(20, 140, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    record = audit(images(grey[::2]), images(grey[1:60:4]), holdout=images(grey[1::2]))
    assert record.content["transformed"] == {"samples": None, "held_out": None}
    assert "the same up to brightness" in record.content["notes"][-1]
    write_report(record, tmp_path / "report.html")


def test_held_out_images_that_are_not_held_out_are_named():
    data, held = images("digits").subset(100), images("digits:held-out").tensor()[:30]
    leaky = images(((torch.cat([data.tensor()[:7], held]) + 1) / 2).numpy())
    content = audit(data, held, holdout=leaky).content
    assert content["memorized"]["held_out"]["exact"] == 7
    assert content["comparison"]["references"] == 30
    assert "7 of 37 held-out images equal" in content["notes"][0]
    few = audit(data, held, holdout=images(((held[:5] + 1) / 2).numpy())).content
    assert few["comparison"] is None
    assert "fewer than 10" in few["notes"][0]


def directions(x):
    """Features that know no contrast."""
    rows = (x + 1).flatten(1)
    return rows / rows.norm(dim=1, keepdim=True)


def test_neighbours_in_features():
    data = images("digits")
    pale = planted(40)
    pale[:40] = 0.7 * (pale[:40] + 1) - 1  # far in pixels: .3 |x + 1| is about a digit's own nearest distance
    pixels = audit(data, pale).content["memorized"]["samples"]
    assert pixels["count"] < 10
    content = audit(data, pale, features=f"{__name__}:directions").content
    assert content["features"].endswith("directions")
    assert content["memorized"]["samples"]["count"] == 40
    assert content["memorized"]["samples"]["exact"] == 0
    exact = audit(data, planted(40), features="digits-classifier").content["memorized"]["samples"]
    assert exact["exact"] == 40
    assert exact["count"] >= 40


def test_an_interrupted_audit_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "BLOCK", 64)
    data, pipe = images("digits").subset(200), load_pipeline("digits")
    options = {"model": pipe, "sampling": Sampling(70, steps=3)}
    whole = audit(data, **options)

    def stop(stage, done, total):
        if (stage, done) == ("samples", 64):  # before the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(data, run=Run(tmp_path, progress=stop), **options)
    real, made = sample.integrate, []
    monkeypatch.setattr(sample, "integrate", lambda u, b, z, *a, **k: made.append(len(z)) or real(u, b, z, *a, **k))
    again = audit(data, run=Run(tmp_path, 2**21), **options)
    assert made == [6]
    assert again.content == whole.content
    assert again.settings == whole.settings
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert Record.load(tmp_path).content == json.loads(json.dumps(whole.to_dict()["content"]))
    other = audit(data, seed=1, **options).content  # another subset of the references
    assert other["memorized"] == whole.content["memorized"]
    assert other["comparison"]["count"] != whole.content["comparison"]["count"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": images("digits").subset(2)}, "at least 3"),
        ({"train": images(np.full((5, 8, 8), 7, np.uint8))}, "all 5 images"),
        ({"samples": torch.zeros(5, 1, 9, 9)}, "Resize"),
        ({"samples": torch.zeros(0, 1, 8, 8)}, "0 samples"),
        ({"samples": torch.full((5, 1, 8, 8), 200.0)}, r"look like \[0, 255\]"),
        ({"samples": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"samples": torch.full((5, 1, 8, 8), torch.nan)}, "5 of 5 samples hold NaN"),
        ({"threshold": 0.0}, "between 0 and 1"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"threshold": torch.nan}, "between 0 and 1"),
        ({"near": -1.0}, "0 <= near"),
        ({"seed": -1}, "at least 0"),
        ({"samples": torch.zeros(5, 1, 8, 8), "model": 1}, "together"),
        ({"features": "magic"}, "unknown extractor"),
        ({"holdout": images(np.zeros((5, 9, 9), np.uint8))}, "Resize"),
        ({"features": f"{__name__}:constant"}, "are the same"),
    ],
)
def test_bad_input_is_one_line(change, said):
    with pytest.raises(InputError, match=said) as error:
        audit(**{"train": images("digits"), **change})
    assert "\n" not in str(error.value)


def constant(x):
    return torch.ones(len(x), 3)


# --- command line and report ----------------------------------------------------------------------


def symbreak(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def save(x, folder, name):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(x):
        Image.fromarray(((image[0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(folder / name.format(i))


def test_the_command_and_its_report(capsys, tmp_path):
    x = images("digits").tensor()[:80]
    save(torch.cat([x, x[:3]]), tmp_path / "train", "<i>{}.png")
    save(x[:6], tmp_path / "made", "<b>{}.png")
    argv = ("audit", "--data", tmp_path / "train", "--samples", tmp_path / "made", "--holdout", "digits:held-out")
    code, out, _ = symbreak(capsys, *argv, "--out", tmp_path / "out", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["kind"] == "audit"
    assert record["content"]["memorized"]["samples"]["exact"] == 6
    assert record["content"]["duplicates"]["exact"]["spare"] == 3
    html = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;0.png" in html
    assert "&lt;i&gt;0.png" in html
    assert "<b>0.png" not in html
    assert "<i>" not in html
    assert not re.search(r"(src|href)=.(https?:|//)", html)
    assert html.count("<svg") == 3  # two histograms and a comparison
    saved = json.loads((tmp_path / "out" / "record.json").read_text())
    assert saved["content"] == record["content"]
    code, out, _ = symbreak(capsys, "report", tmp_path / "out", "--out", tmp_path / "again.html")
    assert (code, (tmp_path / "again.html").read_text()) == (0, html)
    code, out, _ = symbreak(capsys, *argv, "--limit", 50)
    assert code == 0
    assert "It copies" in " ".join(out.split())
    code, out, _ = symbreak(capsys, "audit", "--data", "digits", "--limit", 60, "--json")
    assert json.loads(out)["content"]["memorized"]["samples"] is None


def test_a_damaged_record_is_one_line(tmp_path):
    record = audit(images("digits").subset(20))
    del record.content["verdict"]
    with pytest.raises(InputError, match="lacks 'verdict'"):
        write_report(record, tmp_path / "r.html")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--samples", "EMPTY"), "holds no images"),
        (("--samples", "absent"), "does not exist"),
        (("--samples", "EMPTY", "--model", "digits"), "together"),
        (("--threshold", "1.5"), "between 0 and 1"),
        (("--count", 5), "Add --model"),
        (("--model", "digits", "--count", 5, "--seeds", "0-4"), "came together"),
        (("--model", "digits", "--count", 0), "at least one"),
        (("--model", "absent/there/x"), "does not exist"),
        (("--limit", 2), "at least 3"),
        (("--memory", 0), "1 MiB"),
        (("--features", "magic"), "unknown extractor"),
    ],
)
def test_bad_commands_are_one_line(capsys, tmp_path, argv, said):
    (tmp_path / "empty").mkdir()
    argv = [tmp_path / "empty" if a == "EMPTY" else a for a in argv]
    code, out, err = symbreak(capsys, "audit", "--data", "digits", *argv, "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o" / "record.json").exists()


def test_samples_have_a_range_of_their_own(tmp_path, capsys):
    x = images("digits", limit=60).tensor().numpy()
    np.save(tmp_path / "train.npy", x)
    np.save(tmp_path / "wide.npy", 2 * x)
    given = ["audit", "--data", str(tmp_path / "train.npy"), "--samples", str(tmp_path / "wide.npy"), "--json"]
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    assert "(of samples: --samples-range)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*given, "--samples-range=-2,2"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["content"]["memorized"]["samples"]["share"] == 1.0
