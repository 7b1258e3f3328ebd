import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from symbreak.data.readers import images
from symbreak.metrics import distance, extractor, features, floor
from symbreak.metrics.feature_rows import accuracy, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import difference, frechet_distance
from symbreak.metrics.memorization import apart, groups, nearest, nearest_in, nearest_summary
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError
from symbreak.studies.evaluate import default_extractor, evaluate


def test_the_bundled_classifier_is_as_accurate_as_it_says():
    extract = extractor("digits-classifier")
    held_out = images("digits:held-out")
    hits = (extract.logits(held_out.tensor()).argmax(1) == held_out.labels).double().mean()
    assert float(hits) == pytest.approx(extract.accuracy, abs=1e-3)
    assert extract.accuracy > 0.96
    assert extract.name == "digits-classifier"


def test_features_do_not_depend_on_the_batch():
    extract = extractor("digits-classifier")
    x = images("digits").tensor()[:300]
    whole = features(extract, [x])
    assert whole.shape == (300, 64)
    assert torch.equal(features(extract, x.split(7)), whole)


def test_fewer_rows_than_dimensions_need_no_eigendecomposition():
    """Pixels of 64 colour pictures: minutes of one core went into eigendecompositions of 3,072 dimensions."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(200, 200, generator=g) * torch.arange(1, 201) ** -1.0
    rows = torch.randn(90, 200, generator=g) @ mix.T
    rows[5:15], rows[:, 7] = rows[5], 1.0  # of a rank below their number
    few, many = Moments.fit([rows]), Moments.fit([torch.randn(1500, 200, generator=g) @ mix.T])
    value = frechet_distance(few, many)
    assert "eigh" not in few.__dict__
    values, vectors = few.eigh
    half = vectors * values.sqrt()
    cross = torch.linalg.eigvalsh(half.T @ many.cov @ half).clamp(min=0).sqrt().sum()
    gap = (few.mean - many.mean).square().sum()
    # the eigenvalues of no row, up to rounding, have roots of half the digits
    assert value == pytest.approx(float(gap + few.cov.trace() + many.cov.trace() - 2 * cross), rel=1e-6)


def test_distance_is_the_frechet_distance_of_each_repeat():
    g = torch.Generator().manual_seed(0)
    x, real = torch.randn(40, 3, generator=g, dtype=torch.float64), torch.randn(50, 3, generator=g, dtype=torch.float64)
    reference = Moments.fit([real])
    found = distance(x, reference, 4, "random")
    by_hand = [frechet_distance(Moments.fit([x[i : i + 10]]), reference) for i in (0, 10, 20, 30)]
    assert found.values == pytest.approx(by_hand)
    assert found.mean == pytest.approx(np.mean(by_hand))
    assert found.low < found.mean < found.high
    assert (found.samples, found.reference, found.extractor) == (10, 50, "random")
    single = distance(x, reference, 1, "random").to_dict()
    assert (single["low"], single["high"]) == (None, None)
    with pytest.raises(InputError, match="at least 2 samples a repeat"):
        distance(x[:5], reference, 4, "random")


def test_the_floor_falls_with_the_count_and_is_beaten_by_no_other_set():
    extract = extractor("digits-classifier")
    real, held_out = features(extract, images("digits")), features(extract, images("digits:held-out"))
    reference = Moments.fit([held_out])
    few, many = floor(real, reference, 100, 5, "c"), floor(real, reference, 400, 5, "c")
    assert few.mean > many.mean > many.pooled
    assert (len(few.values), len(many.values)) == (5, 2)  # as many as fit without sharing images
    whole = floor(real, reference, 5000, 5, "c").to_dict()
    assert (whole["samples"], whole["repeats"], whole["low"]) == (898, 1, None)
    blurred = features(extract, [torch.nn.functional.avg_pool2d(images("digits").tensor(), 3, 1, 1)])
    assert distance(blurred, reference, 2, "c").mean > 3 * many.mean


def test_evaluate_says_who_copies():
    train, held_out = images("digits"), images("digits:held-out")
    copies = evaluate((train.tensor()[:200] + 0.01).clamp(-1, 1), train, held_out)
    assert copies["neighbours"]["samples"]["memorized"] > 0.95
    assert copies["neighbours"]["held_out"]["memorized"] < 0.02
    assert copies["distance"]["extractor"] == "digits-classifier"
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    far = evaluate(noise, train, held_out)
    assert far["distance"]["mean"] > 5 * copies["distance"]["mean"]
    assert far["neighbours"]["samples"]["memorized"] == 0


def test_the_training_images_themselves_are_memorized():
    """Without held-out images half of them stand for those, but copies are looked for among all."""
    digits = images("digits:all")
    found = evaluate(digits.tensor(), digits, features="pixels")
    assert found["neighbours"]["samples"]["memorized"] == 1.0
    assert found["neighbours"]["samples"]["searched"] == len(digits)
    assert found["neighbours"]["held_out"]["memorized"] < 0.02
    assert found["neighbours"]["held_out"]["searched"] == 898  # without those that stand for held-out ones
    assert "No held-out images came: 899 of the 1,797 training images stand for them" in " ".join(found["notes"])


@pytest.mark.parametrize("copies", [2, 9])  # more than the eight neighbours that are asked first
def test_copies_of_repeated_images_are_memorized(copies):
    once = images("digits").tensor()[:200]
    train = images(once.repeat(copies, 1, 1, 1))
    noise = torch.randn(once.shape, generator=torch.Generator().manual_seed(0))
    near = nearest_summary((once + 0.01 * noise).float(), train, images("digits:held-out").tensor()[:100])
    assert near["samples"]["memorized"] == 1.0
    assert near["samples"]["different"] == 200
    assert near["held_out"]["memorized"] < 0.05
    # near duplicates, too, each a little different; from nine on they are each other's eighth neighbours, see `groups`
    g = torch.Generator().manual_seed(1)
    train = torch.cat([once + 0.005 * torch.randn(once.shape, generator=g) for _ in range(min(8, copies))]).float()
    assert nearest_summary((once + 0.01 * noise).float(), train, None)["samples"]["memorized"] == 1.0


def test_duplicates_are_the_audits():
    """d1/d2 by the neighbours of a sample, and by the groups that an audit forms of all training images."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(300, 3, generator=g)
    train = torch.cat([x, x[:50], x[:100] + 1e-3 * torch.randn(100, 3, generator=g)])
    samples = torch.cat([x[:60] + 1e-2 * torch.randn(60, 3, generator=g), torch.randn(60, 3, generator=g)])
    different = torch.cat([x, train[350:]])
    wanted, _ = apart(samples, different, groups(different)[0])
    torch.testing.assert_close(nearest_in(samples, train), wanted)
    with pytest.raises(InputError, match="all equal"):
        nearest_in(samples, x[:1].expand(5, 3))


def test_the_reference_is_a_sample_too():
    """The interval of the mean holds the repeats' variance and the reference's; a difference holds neither twice."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 4, generator=g).double() + 0.5, torch.randn(200, 4, generator=g).double()
    reference = Moments.fit([y])
    d, alone = distance(x, reference, 5, "a"), distance(x, Moments.fit([y], parts=1), 5, "a")
    assert d.mean == pytest.approx(alone.mean, rel=1e-12)
    assert not alone.reference_left_out
    left = [distance(x, rest, 5, "a").mean for rest in reference.without_each()]
    assert d.reference_left_out == pytest.approx(left, rel=1e-12)
    halves = [(one.high - one.low) / 2 for one in (d, alone)]
    parts = np.array(left)
    error = 2.3646 * math.sqrt(7 / 8 * ((parts - parts.mean()) ** 2).sum())  # Student's quantile at 7 degrees
    assert halves[0] == pytest.approx(math.hypot(halves[1], error), rel=1e-4)
    farther = distance(x + 0.05, reference, 5, "a")
    gap, low, high = difference(farther.to_dict(), d.to_dict())
    assert gap == pytest.approx(farther.mean - d.mean)
    assert 0 < low < gap < high
    assert high - low < (d.high - d.low) / 2
    with pytest.raises(InputError, match="same seeds"):
        difference(d.to_dict(), distance(x, reference, 4, "a").to_dict())


def test_nearest_neighbours_by_brute_force():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 2, 3, generator=g), torch.randn(20, 2, 3, generator=g)
    d, index = nearest(x, y, block=7)
    full = (x[:, None] - y[None]).double().flatten(2).norm(dim=2)
    torch.testing.assert_close(d, full.sort(1).values[:, :2])
    assert torch.equal(index, full.argmin(1))
    with pytest.raises(InputError, match="equal sizes"):
        nearest(x, y[:1])
    assert nearest_summary(x, y, None)["held_out"] is None


def test_a_classifier_is_trained_saved_and_loaded(tmp_path):
    x = torch.full((80, 1, 5, 5), -1.0)
    x[40:, :, 2] = 1.0
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "a.npz", images=x.clamp(-1, 1).numpy(), labels=np.arange(80) // 40)
    data = images(tmp_path / "a.npz")
    model = train_classifier(data, held_out=data, epochs=8)
    assert model.accuracy > 0.95
    again = train_classifier(data, epochs=8)
    assert torch.equal(model.head.weight, again.head.weight)
    back = load_classifier(save_classifier(model, tmp_path / "c.safetensors", "mine"))
    assert torch.equal(back(x), model(x))
    assert extractor(str(tmp_path / "c.safetensors")).name == "mine"
    with pytest.raises(InputError, match="which needs"):
        back(torch.zeros(1, 1, 6, 6))
    with pytest.raises(InputError, match="no labels"):
        train_classifier(images(np.zeros((3, 4, 4))))


def test_accuracy_matches_classes_by_name(tmp_path):
    model, held_out = extractor("digits-classifier"), images("digits:held-out")
    right = accuracy(model, held_out)
    assert right == pytest.approx(model.accuracy, abs=5e-5)  # written with four digits
    # The same images, their classes in another order.
    names = held_out.classes[::-1]
    turned = held_out.numbered(names)
    assert turned.labels.tolist() == (9 - held_out.labels).tolist()
    assert accuracy(model, turned) == right
    # One wrong label of 899.
    labels = held_out.labels.clone()
    hit = int((model.logits(held_out.tensor()).argmax(1) == labels).nonzero()[0])
    labels[hit] = (labels[hit] + 1) % 10
    assert accuracy(model, replace(held_out, labels=labels)) == pytest.approx(right - 1 / 899, abs=1e-12)
    for wrong, match in (
        (replace(held_out, labels=None), "has no labels"),
        (replace(held_out, classes=("ten", *held_out.classes[1:])), "a class 'ten' that the data do not have"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            accuracy(model, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a class 'ten'"):
        train_classifier(images("digits"), held_out=wrong, epochs=10**6)  # before any work


def mean_and_max(x):
    return torch.stack([x.flatten(1).mean(1), x.flatten(1).amax(1)], 1)


def nonsense(x):
    return x.sum()


def not_a_number(x):
    return torch.full((len(x), 2), math.nan)


def test_own_extractors_and_bad_ones():
    own = extractor(f"{__name__}:mean_and_max")
    assert features(own, [torch.zeros(3, 1, 2, 2)]).shape == (3, 2)
    for name, match in (
        ("magic", "unknown extractor"),
        ("no.such.module:f", "cannot be imported"),
        (f"{__name__}:absent", "cannot be imported"),
        ("classifier", "labelled data"),
        ("absent.safetensors", "does not exist"),
    ):
        with pytest.raises(InputError, match=match):
            extractor(name)
    with pytest.raises(InputError, match=r"expected a tensor \[B, F\]"):
        features(extractor(f"{__name__}:nonsense"), [torch.zeros(3, 1, 2, 2)])
    with pytest.raises(InputError, match="NaN or infinity"):
        features(extractor(f"{__name__}:not_a_number"), [torch.zeros(3, 1, 2, 2)])
    with pytest.raises(InputError, match="too many"):
        features(extractor("pixels"), [torch.zeros(2, 3, 64, 64)])
    assert default_extractor(images("digits")) == "digits-classifier"
    with pytest.raises(InputError, match="Resize"):
        evaluate(torch.zeros(20, 1, 9, 9), images("digits"), images("digits:held-out"))
