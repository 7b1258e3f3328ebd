"""What a number claims: right values of awkward inputs, and intervals that say what they are."""

import itertools
import math

import numpy as np
import pytest
import torch

from symbreak.laws import Gaussian, Mixture, PrincipalMixture, Sphere
from symbreak.moments.one_pass import Moments, grouped
from symbreak.noise import generator
from symbreak.phases.beyond_gaussian import fitting_error, non_gaussianity, refitting_error
from symbreak.phases.class_entropy import class_entropy, class_entropy_bound
from symbreak.phases.cloning import clones
from symbreak.phases.speciation import cloning_probability, cloning_time, ladder, speciation_time
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Run


def two_of_two() -> Mixture:
    """Two classes of two components each: the classes are 16 apart, the components of one class 2."""
    means = torch.tensor([[8.0, 1.0], [8.0, -1.0], [-8.0, 1.0], [-8.0, -1.0]], dtype=torch.float64)
    law = Mixture.from_parameters(means, 0.05)
    law.classes = torch.tensor([0, 0, 1, 1])
    return law


# --- classes of several components ----------------------------------------------------------------


def test_classes_of_several_components_are_told_apart_as_classes():
    """Along the first axis two Gaussians at +-8 of variance .05; the second axis says nothing of the class."""
    law, pair = two_of_two(), Mixture.from_parameters([[8.0], [-8.0]], 0.05)
    assert cloning_time(pair).sigma == pytest.approx(8.67, abs=0.005)
    # 20,000 draws: .5 % in sigma; the components by themselves give 1.74.
    time = cloning_time(law)
    assert time.sigma == pytest.approx(cloning_time(pair).sigma, rel=0.015)
    assert time.low.sigma < cloning_time(pair).sigma < time.high.sigma
    phi = cloning_probability(law, [3.0, 1e4])
    assert phi.value == pytest.approx([float(cloning_probability(pair, 3.0).value), 0.5], abs=0.002)
    assert phi.value[0] == pytest.approx(0.994, abs=0.002)
    free = speciation_time(law, "free-entropy")
    assert len(free.classes) == 2
    assert free.sigma == pytest.approx(math.sqrt(64 - 0.05), rel=0.05)
    entropy = class_entropy(law, [0.1, 8.0])
    assert entropy.total == pytest.approx(math.log(2))
    assert entropy.value[1] == pytest.approx(float(class_entropy(pair, 8.0).value), abs=0.01)


def test_clones_of_a_mixture_are_told_apart_by_its_classes():
    law = two_of_two()
    law.classes = torch.tensor([7, 7, 3, 3])  # numbers of the data's classes
    pairs = clones(law, [2.0, 8.0, 40.0], pairs=400, steps=20)
    assert pairs.classes.tolist() == [3, 7]
    assert pairs.floor == pytest.approx(0.5, abs=0.02)  # .25 if components counted
    assert pairs.curve.value[0] > 0.98


def test_components_of_one_class_have_nothing_to_decide():
    law = two_of_two()
    law.classes = torch.zeros(4, dtype=torch.int64)
    assert float(cloning_probability(law, 1.0).value) == pytest.approx(1.0, abs=1e-12)
    assert cloning_time(law).level is None
    assert "does not pass" in cloning_time(law).reason
    for ask in (lambda: class_entropy(law, 1.0), lambda: speciation_time(law, "free-entropy")):
        with pytest.raises(InputError, match="class"):
            ask()


# --- eigenvalues of few samples -------------------------------------------------------------------


def gaussian(n: int, variances, seed: int) -> Moments:
    v = torch.as_tensor(variances, dtype=torch.float64)
    return Moments.fit([torch.randn(n, len(v), generator=generator(seed), dtype=torch.float64) * v.sqrt()])


def spiked(top: float, rest: float, d: int = 64) -> np.ndarray:
    return np.append(top, np.full(d - 1, rest))


@pytest.mark.parametrize(("n", "variance"), [(60, 0.5), (1000, 0.8), (30, 0.3)])
def test_noise_has_no_spectral_level(n, variance):
    """Isotropic data of a variance below 1: no mode is ever above the noise, whatever the largest of 64 looks like."""
    for seed in range(5):
        time = speciation_time(gaussian(n, np.full(64, variance), seed))
        assert time.level is None
        assert "Marchenko-Pastur" in time.reason
    assert all(c.level is None for c in ladder(gaussian(n, np.full(64, variance), 9), 5))


def test_an_eigenvalue_under_the_edge_has_bounds():
    """Isotropic data of variance 2: the level is 1, the largest sample eigenvalue says 2.6."""
    time = speciation_time(gaussian(60, np.full(64, 2.0), 0))
    assert time.interval == "bound"
    assert time.sigma == pytest.approx(1.0, abs=0.1)
    assert time.low.sigma < 1.0 < time.high.sigma
    clear = speciation_time(gaussian(400, spiked(10, 0.5), 0))
    assert clear.interval == "jackknife"
    assert clear.reason is None


def test_exact_moments_are_taken_as_they_are():
    assert speciation_time(Moments(60, np.zeros(64), np.diag(spiked(5, 0.5)))).sigma == pytest.approx(2.0)
    assert speciation_time(Sphere(50, radius=50**0.5)).level is None  # the top eigenvalue is 1 up to rounding
    assert "at most 1" in speciation_time(Sphere(50, radius=50**0.5)).reason


def test_a_sketch_knows_how_many_samples_it_had():
    """4,000 eigenvalues of 1 from 300 samples: sample eigenvalues up to 21, the one of 60 at 74."""
    x = torch.randn(300, 4000, generator=generator(0))
    x[:, 0] *= 60**0.5
    modes = Moments.fit(x, rank=8, passes=4).population(2)  # two passes leave the first Ritz value a fifth low
    assert modes.hidden.tolist() == [False, True]
    assert modes.values[0] == pytest.approx(60, rel=0.25)  # two errors of an eigenvalue of 300 samples, 8 % each
    assert modes.values[1] == pytest.approx(1.0, rel=0.02)


def test_samples_are_known_as_samples_whatever_is_made_of_them(tmp_path):
    """30 rows of 400 variances .8, whose largest sample eigenvalue is 18: no way shows it as a mode."""
    x = 0.8**0.5 * torch.randn(30, 400, generator=generator(0))
    full, one = Moments.fit([x]), Moments.fit([x], parts=1)
    whole, some = Moments.fit([x], rank=40), Moments.fit([x], rank=10)
    ways = {
        "parts": full,
        "one part": one,
        "sketch": some,
        "sketch of the whole range": whole,
        "truncated": full.truncate(10),
        "truncated sketch": whole.truncate(10),
        "law of low rank": Gaussian(full, rank=10).moments,
        "merged": Moments.fit([x[:15]]).merge(Moments.fit([x[15:]], parts=1)),
        "grouped": grouped([x], np.zeros(30, int))[0],
        "joined": Moments.joined(grouped([x], np.arange(30) % 2)),
        "without a part": full.without_each()[0],
        "little memory": Moments.fit([x], run=Run(memory=9_500_000)),
        "low frequencies": Gaussian.low_frequency([x.reshape(30, 20, 20)], 4).moments,
    }
    assert len(ways["little memory"]._parts) == 1
    ways |= {f"{name}, from a file": Moments.load(m.save(tmp_path / name)) for name, m in ways.items()}
    for name, m in ways.items():
        modes = m.population(3)
        assert m.sampled, name
        assert modes.hidden.all(), name
        assert modes.values[0] == pytest.approx(0.8, rel=0.05), name
        assert speciation_time(m).level is None, name
    exact = Moments(30, full.mean, full.cov)
    for m in (exact, exact.truncate(10), exact.merge(exact), Mixture([full, one]).moments):
        assert not m.sampled
        assert not Moments.load(m.save(tmp_path / "exact")).sampled
        assert m.population(1).values[0] > 17


def test_files_that_do_not_say_it_are_of_samples_where_they_hold_a_trace(tmp_path):
    x = torch.randn(30, 40, generator=generator(0))
    old = {}
    for name, m in {
        "parts": Moments.fit([x]),
        "one part": Moments.fit([x], parts=1),
        "sketch": Moments.fit([x], rank=5),
        "sketch of the whole range": Moments.fit([x], rank=30),
    }.items():
        tensors, about = m.tensors()
        old[name] = Moments.from_tensors("old", tensors, {k: v for k, v in about.items() if k != "sampled"}).sampled
    assert old == {"parts": True, "one part": False, "sketch": True, "sketch of the whole range": False}


def test_eigenvalues_of_few_samples_are_numbers():
    for n, d, options in itertools.product((2, 3, 5), (1, 3, 300), ({}, {"parts": 1}, {"rank": 1}, {"rank": 20})):
        x = torch.randn(n, d, generator=generator(n, d))
        assert np.isfinite(Moments.fit([x], **options).population(10).values).all()


def test_a_record_names_how_an_interval_was_made():
    law, moments = two_of_two(), gaussian(400, spiked(10, 0.5), 1)
    pair = Mixture.from_parameters([[8.0], [-8.0]], 0.05)
    kinds = {
        "jackknife": speciation_time(moments, "signal-to-noise"),
        "draws only": cloning_time(law, samples=500),
        "exact": cloning_time(pair),
        "bootstrap": clones(pair, [4.0, 8.0, 16.0], pairs=50, steps=10).crossing,
    }
    assert {k: t.to_dict()["interval"] for k, t in kinds.items()} == {k: k for k in kinds}
    assert speciation_time(law, "free-entropy").interval == "draws only"
    assert speciation_time(pair, "free-entropy").interval == "exact"
    assert speciation_time(Sphere(3)).interval == ""  # no level, no interval


# --- numbers that were chosen ---------------------------------------------------------------------


def test_draws_of_one_image_stay_in_one_fold():
    """Of 40 images in 30 dimensions, five draws each: folds by row chose the weakest penalty and gave .56 nats more."""
    law = Mixture.from_parameters(torch.stack([torch.ones(30), -torch.ones(30)]) * 0.25, 1.0)

    def labelled(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(n) % 2
        x = torch.randn(n, 30, generator=generator(seed), dtype=torch.float64) + 0.25 * (1 - 2 * y[:, None].double())
        return x, y

    (x, y), (fit, z) = labelled(1000, 1), labelled(40, 2)
    exact = float(class_entropy(law, 0.3).value)
    one, five = (float(class_entropy_bound(law, 0.3, x, y, fit, z, lambda v: v, draws=draws).value) for draws in (1, 5))
    assert exact < five < one + 0.03


def worse_above(law: Mixture, at: float):
    """A network that is the law's denoiser below a level, and is off by 3 above."""

    class Network:
        shape, sigma_range = law.shape, (0.0, math.inf)

        def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
            return law.denoise(x, sigma) + (0.0 if sigma < at else 3.0)

    return Network()


def test_nats_of_a_network_that_is_bad_at_high_noise():
    """The integral may end anywhere: the bound of a network that is bad above sigma 4 is that of one that is not."""
    law = Mixture.from_parameters([[-3.0], [3.0]], 0.01)
    one = Mixture.from_parameters([[0.0]], 9.01)
    data = law.sample(1000, 0.0, generator(5))
    good = non_gaussianity(law, one, data, [0.3])
    bad = non_gaussianity(worse_above(law, 4.0), one, data, [0.3])
    # Above sigma 4 there is a hundredth of a nat; the integral to the top loses 9 / (2 16) = .28.
    assert bad.value == pytest.approx(good.value, abs=0.05)
    assert bad.losses.images == 1000
    assert bad.time(0.5).sigma == pytest.approx(good.time(0.5).sigma, rel=0.03)
    assert non_gaussianity(worse_above(law, 1e-9), one, data, [5.0]).value[0] < 0  # worse everywhere: said by the sign


def equal_classes(k: int, r: float) -> Mixture:
    return Mixture.from_parameters(r * torch.eye(k, 2 * k, dtype=torch.float64), 1.0)


def test_the_first_of_equal_classes_is_no_lucky_one():
    """Ten classes that differ by their names only, 300 draws each: the largest level of a class is 10 % too large."""
    right = 3.25  # of 40,000 draws a class, mean of the ten: standard error .02
    times = [speciation_time(equal_classes(10, 6.0), "free-entropy", samples=3000, seed=seed) for seed in range(3)]
    assert np.mean([t.sigma for t in times]) == pytest.approx(right, rel=0.12)  # two errors: 10 % each / sqrt(3)
    for t in times:
        assert t.low.sigma < right < t.high.sigma
        assert "classes" in t.reason


@pytest.mark.parametrize("steps", [10, 40])
def test_few_steps_of_clones_are_in_the_interval(steps):
    """+-4, variance 1: few steps read the crossing high; the bootstrap alone left it out, and said nothing."""
    law = Mixture.from_parameters([[-4.0], [4.0]], 1.0)
    right, found = cloning_time(law).sigma, 0
    for seed in range(3):
        time = clones(law, np.geomspace(1, 16, 9), pairs=800, steps=steps, seeds=seed).crossing
        assert "steps there are a factor" in time.reason
        found += time.low.sigma < right < time.high.sigma
    assert found >= 2


def test_fitting_a_gaussian_costs_nats():
    """Unit variance, d = 64, n = 898: what refits cost by the exact divergence of Gaussians."""
    costs = []
    for seed in range(5):
        m = gaussian(898, np.ones(64), seed)
        fitted, s2 = m.cov + 1.6**2 * torch.eye(64), 1 + 1.6**2
        mean = float((m.mean**2).sum() / s2)
        ratio = torch.linalg.eigvalsh(fitted) / s2
        costs.append(0.5 * (float((1 / ratio - 1 + ratio.log()).sum()) + mean))
    assert fitting_error(np.ones(64), 898, np.array([1.6]))[0] == pytest.approx(np.mean(costs), rel=0.1)
    assert np.mean(costs) == pytest.approx(0.1, abs=0.02)


def fitted_law(kind, n, dim, seed):
    """A truth of one or four Gaussians, and the law that n draws of it are fitted with."""
    means = 3 * math.sqrt(8 / dim) * np.random.default_rng(0).standard_normal((4, dim))
    truth = Mixture.from_parameters(
        *((np.zeros((1, dim)), 1.0) if kind == "gaussian" else (means, 1.0, [0.4, 0.3, 0.2, 0.1]))
    )
    x, labels = truth.sample_labelled(n, 0.0, generator(seed, 1))
    if kind == "gaussian":
        return truth, Gaussian.fit(x)
    groups = {"labels": labels.numpy()} if kind == "classes" else {"components": 4}
    return truth, PrincipalMixture.fit(x, **groups)


def passes_a_tenth(kind, n, dim, seed, law=None):
    """Whether 0.1 nat is passed with the law's own fitting error, and without it."""
    truth, fitted = fitted_law(kind, n, dim, seed)
    images, sigma = truth.sample(256, 0.0, generator(seed, 2)), np.geomspace(0.3, 40, 20)
    bound = non_gaussianity(truth, law or fitted, images, sigma)
    fitting = refitting_error(law or fitted, n, bound.losses.sigma, seed)
    return bound.time(), bound.time(fitting=fitting)


def test_data_of_the_law_itself_do_not_depart_from_it():
    """Four Gaussians, an exact network, a mixture fitted to 400: .1 nat at sigma 1.1 was the fit's own error."""
    with_it, without = passes_a_tenth("classes", 400, 16, 0)
    assert with_it.sigma > 1
    assert without.level is None
    assert "fitting the law alone costs" in without.reason


def test_a_departure_stays_without_the_fitting_error():
    """The same four Gaussians against one: they are told apart from it, at nearly the same level."""
    truth, _ = fitted_law("classes", 400, 16, 0)
    one = Gaussian.fit(truth.sample(400, 0.0, generator(0, 1)))
    with_it, without = passes_a_tenth("classes", 400, 16, 0, one)
    assert with_it.sigma == pytest.approx(without.sigma, rel=0.1)
    assert without.low.sigma < without.sigma < without.high.sigma
