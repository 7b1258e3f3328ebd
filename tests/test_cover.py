"""How often the intervals of all public numbers hold the right value, in worlds where it is known.

One walk: every study names worlds, draws each of them 100 times, and says of every number in a trial its value and
interval, or whether it held by itself. The right value is exact, by quadrature, or of many more draws; where a study
names none it is the mean of the trials, the expectation at these counts. At least 90 of 100 trials must hold it, fewer
where `SHORT` says why. ``pytest -m slow -rP tests/test_cover.py`` prints the counts for docs/uncertainty.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from symbreak.data.labels import Classes
from symbreak.intervals import entropy_interval, proportion
from symbreak.laws import Empirical, Gaussian, Mixture
from symbreak.metrics import distance, memorization
from symbreak.metrics.attributes import _accuracy
from symbreak.metrics.coverage import density_coverage, precision_recall, vendi_score
from symbreak.metrics.frechet import difference, extrapolated, frechet_distance, group_distance, ratio
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.memorization import nearer_to_train, nearest_summary
from symbreak.metrics.two_sample import classifier_test, sliced_wasserstein
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator, schedule
from symbreak.phases.beyond_gaussian import added_to_law, divergence_bound, non_gaussianity
from symbreak.phases.class_entropy import class_entropy, class_entropy_bound
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.phases.cloning import clone_agreement, clones
from symbreak.phases.collapse import collapse_time, samples_needed
from symbreak.phases.condensation import nearest_flips
from symbreak.phases.information import mutual_information
from symbreak.phases.kicks import opportunity
from symbreak.phases.losses import conditional_entropy, entropy_rate, loss_curve
from symbreak.phases.mechanism import linear_share, reversion
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.phases.turns import u_turns
from symbreak.studies import attributes
from symbreak.studies.sensitivity import flat_range, knee
from tests import test_class_information, test_clones, test_losses
from tests.test_intervals import gaussian, passes_a_tenth, spiked
from tests.worlds import gaussian_law

Interval = tuple[float | None, float | None, float | None]  # value, low, high; an end that is missing is open
Trial = Callable[[int], Mapping[str, Interval | bool]]
Right = Mapping[str, float]

# At least so many of 100, where 90 cannot be had.
SHORT = {
    # The bootstrap's percentiles are not corrected for skewness as means are.
    ("level of non-Gaussianity", "heavy tails"): 85,
    # The jackknife is over queries: that 280 of 400 points fell into the first class, or 290, is not in it.
    ("information", "two classes"): 85,
    ("samples needed", "two classes"): 85,
    # One path in a thousand changes its class there, and moves far: 200 paths do not see it.
    ("change by kicks at 1", "equal, 200 paths"): 70,
    # One path in hundreds has two points in play there, which 128 seldom see: the mean is 1e-4, the upper end, too.
    ("participation at 0.019", "their Gaussian, 128 paths"): 30,
    # Skewed errors: 40 images are too few to correct for it, and the tails at 10 are those of a ratio near 1.
    ("all", "unequal, 40 images"): 80,
    ("share of the Gaussian's map at 10", "equal, 200 images"): 85,
    ("correlation with the start at 3", "unequal, 256 paths"): 85,
    # Clopper-Pearson's is of the classifiers that were trained, not of those of other halves.
    ("told apart, logistic", "a shift of .5, 200 and 200"): 85,
}
STUDIES = []


def study(worlds: Mapping[str, tuple] | Iterable[str], trials: int = 100):
    """Adds a function of a world's values (or of its name) -> trial, right values, for each of the worlds."""

    def add(make):
        for world in worlds:
            values = worlds[world] if isinstance(worlds, dict) else (world,)
            name = f"{make.__name__}, {world}".replace("_", " ")
            STUDIES.append(pytest.param(world, partial(make, *values), trials, id=name))
        return make

    return add


def holds(said: Interval | bool, right: float | None) -> bool:
    if isinstance(said, bool | np.bool_):
        return bool(said)
    _, low, high = said
    assert right is not None
    return (low is None or low <= right + 1e-12) and (high is None or right <= high + 1e-12)


def walk(make: Callable[[], tuple[Trial, Right]], trials: int) -> dict[str, int]:
    """Of how many trials each number's interval holds its right value."""
    trial, right = make()
    with np.errstate(all="ignore"):
        rows = [trial(seed) for seed in range(trials)]
    counts = {}
    for name in rows[0]:
        said = [row[name] for row in rows]
        values = [s[0] for s in said if not isinstance(s, bool | np.bool_) and s[0] is not None]
        truth = right.get(name, float(np.mean(values)) if values else None)
        counts[name] = sum(holds(s, truth) for s in said)
    return counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "make", "trials"), STUDIES)
def test_cover(world, make, trials):
    counts = walk(make, trials)
    needed = {name: SHORT.get((name, world), SHORT.get(("all", world), 90)) * trials / 100 for name in counts}
    for name, count in counts.items():
        print(f"| {name} | {world} | {count} of {trials} | {needed[name]:g} |")  # noqa: T201
    assert not {name: count for name, count in counts.items() if count < needed[name]}


def ends(values, key="value"):
    return values[key], values.get(f"{key}_low", values.get("low")), values.get(f"{key}_high", values.get("high"))


def of_curve(curve, i=0):
    return tuple(float(np.atleast_1d(v)[i]) for v in (curve.value, curve.low, curve.high))


def of_time(time):
    """A level with its interval, or that there is none, which holds nothing."""
    return time.level is not None and tuple(None if t is None else t.sigma for t in (time.level, time.low, time.high))


# --- laws -----------------------------------------------------------------------------------------


def pair(weights=(0.5, 0.5), at=4.0, d=1) -> Mixture:
    """Two classes of variance 1 at +-``at`` on the first axis."""
    means = torch.zeros(2, d, dtype=torch.float64)
    means[:, 0] = torch.tensor([-at, at])
    return Mixture.from_parameters(means, 1.0, weights=list(weights))


def heavy(d=4) -> Mixture:
    """Two variances at one mean: tails that no Gaussian has."""
    return Mixture.from_parameters(torch.zeros(2, d, dtype=torch.float64), [0.5, 6.0], weights=[0.9, 0.1])


LAWS = {"equal": pair(), "unequal": pair((0.85, 0.15)), "heavy tails": heavy()}


# --- moments and free entropy ---------------------------------------------------------------------


@study(
    {
        "d = 64, one mode of 10 in .5, n = 30": (30, spiked(10, 0.5)),
        "the same, n = 60": (60, spiked(10, 0.5)),
        "d = 64, one mode of 2 in .5, n = 200": (200, spiked(2, 0.5)),
        "spectrum k^-1.5, n = 60": (60, 200 * np.arange(1, 65) ** -1.5),
        "spectrum k^-1.5, n = 2,000": (2000, 200 * np.arange(1, 65) ** -1.5),
        "variance 2, under the edge, n = 60": (60, np.full(64, 2.0)),
        "d = 3, n = 40": (40, [4.0, 2.0, 1.0]),
    }
)
def spectral(n, variances):
    criteria = {"spectral level": ("spectral", 1), "signal-to-noise level": ("signal-to-noise", 0)}

    def trial(seed):
        moments = gaussian(n, variances, seed)
        return {name: of_time(speciation_time(moments, criterion)) for name, (criterion, _) in criteria.items()}

    return trial, {name: math.sqrt(max(variances) - less) for name, (_, less) in criteria.items()}


@study({"ten equal classes": (np.full(10, 6.0), 3.25), "ten of radii 5 .. 6": (np.linspace(5, 6, 10), 3.15)})
def free_entropy(radii, right):
    """500 draws a class; the right values are of 40,000."""
    means = torch.zeros(10, 20, dtype=torch.float64)
    means[range(10), range(10)] = torch.from_numpy(radii)
    law = Mixture.from_parameters(means, 1.0)
    name = "free entropy, first class"
    return lambda seed: {name: of_time(speciation_time(law, "free-entropy", samples=5000, seed=seed))}, {name: right}


# --- denoising losses ------------------------------------------------------------------------------


@study(list(LAWS))
def losses(world):
    """Of an exact network and the data's Gaussian; the right values are of 100,000 images.

    Of 200 images with heavy tails, 20 in the rare component, the intervals of the nats hold 88 and 89 of 100.
    """
    law, n, sigma = LAWS[world], 600 if world == "heavy tails" else 200, np.geomspace(0.3, 20, 16)
    one = Gaussian(law.moments)
    measured = {
        "denoising loss": lambda x: x.mmse,
        "loss less a law's": lambda x: x.difference("Gaussian"),
        "entropy rate": entropy_rate,
        "conditional entropy": conditional_entropy,
        "nats from a Gaussian": lambda x: divergence_bound(x, "Gaussian"),
    }

    def numbers(count, seed):
        x = loss_curve(law, law.sample(count, 0.0, generator(5, count, seed)), sigma, {"Gaussian": one}, seed=seed)
        out = {"level of non-Gaussianity": of_time(divergence_bound(x, "Gaussian").time(0.05))}
        for name, of in measured.items():
            for i in (0, 6, 12) if name != "conditional entropy" else (6, 12):  # zero at the lowest level by definition
                out[f"{name} at {sigma[i]:.2g}"] = of_curve(of(x), i)
        return out

    many = numbers(100_000, 0)
    right = {name: said[0] for name, said in many.items() if said}

    def trial(seed):  # without the level where 100,000 images have none
        return {name: said for name, said in numbers(n, 1 + seed).items() if name in right}

    return trial, right


@study(["unequal classes"])
def departure(_):
    law = LAWS["unequal"]

    def curve(n, *key):
        return of_curve(non_gaussianity(law, Gaussian(law.moments), law.sample(n, 0.0, generator(*key)), [2.0]))

    name = "non-Gaussianity at 2"
    return lambda seed: {name: curve(300, 9, seed)}, {name: curve(40_000, 1)[0]}


@study(["three classes as a network"])
def tenth_of_a_nat(_):
    law, name = test_losses.uneven(), "level of 0.1 nat"
    exact = brentq(lambda s: test_losses.divergence(law, s) - 0.1, 0.3, 2.0)
    network, one = test_losses.as_network(law), Gaussian(law.moments)

    def trial(seed):
        data = law.sample(400, 0.0, generator(100, seed))
        return {name: of_time(non_gaussianity(network, one, data, 0.3 * exact, seed=seed).time(seed=seed))}

    return trial, {name: exact}


@study(
    {
        "one Gaussian, d = 64, n = 898": ("gaussian", 898, 64),
        "one Gaussian, d = 64, n = 200": ("gaussian", 200, 64),
        "four classes, d = 16, n = 400": ("classes", 400, 16),
        "four clusters, d = 16, n = 400": ("clusters", 400, 16),
    },
    trials=40,
)
def data_of_the_law(*world):
    """No level in data of the law itself; without the cost of fitting there would always be one."""

    def trial(seed):
        raw, corrected = passes_a_tenth(*world, seed)
        return {"level where fitting counts": raw.level is not None, "no level beyond fitting": corrected.level is None}

    return trial, {}


@study(["two points, 256 images"])
def added(_):
    """By a perfect network to one Gaussian; the right values are of 40,000 images."""
    truth, law = test_losses.points(-1.0, 1.0), test_losses.unit_gaussian()
    network = test_losses.residual(truth, law)

    def numbers(n, seed):
        a = added_to_law(network, truth.sample(n, 0.0, generator(12, n, seed)), 21, seed=seed)
        shares = {"share that the law explains": a.whole, "at 1": of_curve(a.share, 10)}
        return {"nats that a network adds": a.net, **shares, "of the score at 1": of_curve(a.score, 10)}

    return lambda seed: numbers(256, seed), {name: said[0] for name, said in numbers(40_000, 999).items()}


# --- clones, U-turns -------------------------------------------------------------------------------


@study(
    {
        "10 steps": (LAWS["equal"], 10, 1000, np.geomspace(1, 16, 9)),
        "20 steps": (LAWS["equal"], 20, 1000, np.geomspace(1, 16, 9)),
        "40 steps": (LAWS["equal"], 40, 1000, np.geomspace(1, 16, 9)),
        "unequal classes": (LAWS["unequal"], 40, 400, np.geomspace(0.7, 16, 9)),
    }
)
def crossing_of_clones(law, steps, pairs, sigma):
    name = "cloning of a network"
    right = cloning_time(law, samples=400_000).sigma
    return lambda seed: {name: of_time(clones(law, sigma, pairs=pairs, steps=steps, seeds=seed).crossing)}, {
        name: right
    }


@study(list(test_clones.WORLDS))
def clones_of_a_network(world):
    """The same through the door of a trained network: epsilon at the steps of DDPM's schedule, float32."""
    law, name = test_clones.WORLDS[world], "cloning of a network, 60 steps"
    exact = cloning_time(law, samples=400_000)
    assert exact.low is None or math.log(exact.high.sigma / exact.low.sigma) < 0.003
    d, classify, sigma = test_clones.network(law), test_clones.component(law), exact.sigma * np.geomspace(0.25, 4, 10)

    def trial(seed):
        return {name: of_time(clones(d, sigma, classify, pairs=300, steps=60, seeds=seed).crossing)}

    return trial, {name: exact.sigma}


@study(["equal"])
def agreement(world):
    law, name = LAWS[world], "agreement of clones at 3"
    right = {name: float(cloning_probability(law, 3.0).value)}
    return lambda seed: {name: of_curve(clone_agreement(law, [3.0], pairs=200, steps=100, seeds=seed))}, right


@study(["equal", "unequal"])
def turns(world):
    """Of an exact network 1 - phi of the images return as another class."""
    law, sigma = LAWS[world], np.geomspace(0.7, 16, 9)
    at = float(cloning_probability(law, float(sigma[4]), samples=400_000).value)
    right = {"crossing of U-turns": cloning_time(law, samples=400_000).sigma, "class change of U-turns": 1 - at}

    def trial(seed):
        t = u_turns(law, law.sample(400, 0.0, generator(6, seed)), sigma, steps=100, seeds=seed)
        curves = {"class change of U-turns": of_curve(t.classes, 4), "feature change": of_curve(t.features, 4)}
        return {"crossing of U-turns": of_time(t.crossing), **curves}

    return trial, right


# --- classes of a law and of a network -------------------------------------------------------------


@study(["unequal", "heavy tails"])
def classes_of_a_law(world):
    """Draws only: the law is taken for true."""
    law, curves = LAWS[world], {"class entropy of a law": class_entropy, "cloning probability": cloning_probability}
    right = {name: float(of(law, 1.5, samples=400_000, seed=999).value) for name, of in curves.items()}
    level = cloning_time(law, samples=400_000, seed=999).sigma

    def trial(seed):
        out = {name: of_curve(of(law, [1.5], samples=400, seed=seed)) for name, of in curves.items()}
        return out | ({} if level is None else {"cloning of a law": of_time(cloning_time(law, samples=400, seed=seed))})

    return trial, right | {"cloning of a law": level}


@study(["d = 6"])
def bound_of_the_class_entropy(_):
    """A classifier that is fitted to few images is above the law's entropy: its interval ends above it, too."""
    law, name = pair(d=6), "class entropy of images, a bound"

    def trial(seed):
        x, z = (law.sample(300, 0.0, generator(7, seed, i)) for i in range(2))
        labels = [(v[:, 0] > 0).long() for v in (x, z)]
        c = class_entropy_bound(law, [3.0], x, labels[0], z, labels[1], lambda v: v, seed=seed)
        return {name: (None, None, float(c.high[0]))}

    return trial, {name: float(class_entropy(law, 3.0, samples=400_000).value)}


@study(["three points as a network"])
def half_of_the_class_entropy(_):
    law, name = test_losses.triangle(), "level of half the class entropy"
    exact = class_entropy(law, [0.3, 1.5], samples=2_000_000).time().sigma
    network, sigma = test_losses.as_network(law), np.geomspace(0.4, 1.0, 6)
    return lambda seed: {name: of_time(test_losses.bound(network, sigma, 200 + seed, fit=1000).time())}, {name: exact}


@study(list(test_class_information.LAWS), trials=200)
def class_information(world):
    """At three levels, its limit, and both ends of the window: 93 to 95 of 100 in 300 sets of images."""
    law, at, fine = test_class_information.LAWS[world], np.array([0.5, 1.0, 3.0]), np.geomspace(0.05, 30, 400)
    exact, total = test_class_information.exact, class_entropy(test_class_information.LAWS[world], 1.0).total
    curve = exact(law, fine, 200_000)
    level = {k: float(np.exp(np.interp(-k * total, -curve, np.log(fine)))) for k in (0.9, 0.1)}
    names = [f"class information at {s:g}" for s in at]
    right = dict(zip(names, exact(law, at, 400_000).tolist()))
    right |= {"its limit": total, "window of guidance, low": level[0.9], "window of guidance, high": level[0.1]}

    def trial(seed):
        x, y = test_class_information.draws(law, 600, seed)
        info = condition_information(law, x, y, np.append(at, 0.05), seed=seed)
        window = guidance_window(info, resamples=200)
        out = {name: of_curve(info, i) for i, name in enumerate(names)} | {"its limit": ends(info.limit)}
        return out | {f"window of guidance, {end}": of_time(getattr(window, end)) for end in ("low", "high")}

    return trial, right


# --- collapse --------------------------------------------------------------------------------------

CLOUDS = {
    "Gaussian": (lambda: Mixture.from_parameters(torch.zeros(1, 8, dtype=torch.float64), 1.0), 400),
    "few points": (lambda: Mixture.from_parameters(torch.zeros(1, 4, dtype=torch.float64), 1.0), 80),
    "two classes": (lambda: pair((0.7, 0.3), at=3.0, d=8), 400),
    "heavy tails": (lambda: heavy(8), 400),
}


@study(CLOUDS)
def collapse(make, n):
    law = make()
    level = collapse_time(law, samples=n, draws=200_000).sigma
    nats = float(mutual_information(law, 2 * level, draws=200_000).value)

    def trial(seed):
        x = Empirical(law.sample(n, 0.0, generator(8, seed)))
        return {
            "collapse of points": of_time(collapse_time(x, seed=seed)),
            "information": of_curve(mutual_information(x, [2 * level], seed=seed)),
            "samples needed": of_curve(samples_needed(x, [2 * level], seed=seed)),
        }

    return trial, {"collapse of points": level, "information": nats, "samples needed": nats / math.log(10)}


# --- measures of samples ----------------------------------------------------------------------------


def spectrum(d, power):
    return torch.arange(1, d + 1, dtype=torch.float64) ** -power


def draw(g, n, d, *, power=0.0, shift=0.0, scale=1.0, tail=None):
    """Rows of a Gaussian, or of Student's law with ``tail`` degrees of freedom, at the same covariance."""
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if tail:
        heavy = torch.randn(n, tail, generator=g, dtype=torch.float64).square().sum(1, keepdim=True) / (tail - 2)
        x = x / heavy.sqrt()
    return x * scale * spectrum(d, power) + shift


def torch_of(seed):
    return torch.Generator().manual_seed(seed)


# dimension, power of the spectrum, samples a repeat, repeats, reference images, degrees of freedom
@study(
    {
        "digits-like": (64, 0.5, 200, 5, 599, None),
        "many samples": (64, 0.5, 1000, 5, 599, None),
        "flat spectrum": (64, 0.0, 200, 5, 599, None),
        "n near d": (64, 0.0, 80, 5, 100, None),
        "small": (8, 1.0, 20, 5, 40, None),
        "unequal counts": (8, 1.0, 20, 5, 400, None),
        "heavy tails": (8, 1.0, 100, 5, 200, 6),
    }
)
def distances(d, power, n, repeats, m, tail):
    def trial(seed):
        g = torch_of(seed)
        x = draw(g, n * repeats, d, power=power, shift=0.1, scale=math.sqrt(1.3), tail=tail)
        reference = Moments.fit([draw(g, m, d, power=power, tail=tail)])
        near = x - 0.05 + 0.05 * draw(g, len(x), d)
        groups = [Moments.fit([part], parts=1) for part in x.split(n)]
        whole = group_distance(groups, reference, "w")
        beyond = {**extrapolated(groups, reference, whole.pooled), "pooled": whole.pooled}
        both = [distance(z, reference, repeats, "w").to_dict() for z in (x, near)]
        return {
            "distance": (whole.mean, whole.low, whole.high),
            "pooled": ends(beyond, "pooled"),
            "extrapolated": (beyond["value"], beyond["low"], beyond["high"]),
            "difference": difference(*both),
            "ratio": ratio(*both),
        }

    cov = torch.diag(spectrum(d, power) ** 2)
    law = Moments(10**9, torch.full((d,), 0.1), 1.3 * cov), Moments(10**9, torch.zeros(d), cov)
    return trial, {"extrapolated": frechet_distance(*law)}


# samples, real images, dimension, shift, degrees of freedom
@study(
    {
        "2,000 against 200": (2000, 200, 4, 0.2, None),
        "200 against 200": (200, 200, 8, 0.5, None),
        "100 against 100": (100, 100, 2, 1.0, None),
        "heavy tails": (300, 300, 4, 0.0, 6),
    }
)
def two_sets(n, m, d, shift, tail):
    def trial(seed):
        g = torch_of(seed)
        x, y = draw(g, n, d, shift=shift, tail=tail), draw(g, m, d, tail=tail)
        both, dense = precision_recall(x, y), density_coverage(x, y)
        out = {name: ends(both, name) for name in ("precision", "recall")}
        out |= {name: ends(dense, name) for name in ("density", "coverage")}
        return {"kernel distance": ends(kid(x, y, subsets=0)), **out}

    return trial, {}


@study(
    {
        f"n = {n}, d = {d}" + ", heavy tails" * bool(tail): (n, d, tail)
        for n, d, tail in ((200, 8, None), (50, 2, None), (20, 8, None), (500, 32, None), (100, 4, 3))
    }
)
def vendi(n, d, tail):
    return lambda seed: {"Vendi": ends(vendi_score(draw(torch_of(seed), n, d, tail=tail)))}, {}


@study(
    {
        f"{k} classes of k^-{power}, n = {n}": (k, n, power)
        for k, n, power in ((10, 200, 0.0), (10, 200, 1.5), (10, 1000, 0.5), (2, 80, 1.5), (100, 2000, 1.5))
    }
)
def entropy(classes, n, power):
    p = spectrum(classes, power).numpy()
    p /= p.sum()

    def trial(seed):
        return {"entropy of classes": ends(entropy_interval(np.random.default_rng(seed).multinomial(n, p)))}

    return trial, {"entropy of classes": -(p * np.log2(p)).sum()}


@study({f"{p} of {n}": (n, p) for n, p in ((10, 0.018), (50, 0.02), (1000, 0.001), (20, 0.5))})
def shares(n, p):
    name = "share of a class"
    return lambda seed: {name: ends(proportion(np.random.default_rng(seed).binomial(n, p), n), "share")}, {name: p}


@study({f"{share} of {n}": (n, share) for n, share in ((50, 0.02), (300, 0.3))})
def copies(n, share):
    """Of a fixed training set: samples are copies with a probability, else new."""
    train = draw(torch_of(1000), 100, 8)

    def trial(seed):
        g = torch_of(seed)
        copied = torch.rand(n, generator=g) < share
        near = train[torch.randint(100, (n,), generator=g)] + 0.01 * draw(g, n, 8)
        found = nearest_summary(torch.where(copied[:, None], near, draw(g, n, 8)), train, None)["samples"]
        return {"memorized share": ends(found, "memorized")}

    return trial, {}


@study(
    {
        f"{n} samples, {m} a side, {share} copies, d = {d}": (n, m, share, d)
        for n, m, share, d in ((500, 200, 0.3, 4), (100, 500, 0.5, 4), (20, 20, 0.0, 1), (1000, 20, 0.0, 2))
    }
)
def nearer(n, m, share, d):
    def trial(seed):
        g = torch_of(seed)
        train, others, new = draw(g, m, d), draw(g, m, d), draw(g, n, d)
        copied = torch.rand(n, generator=g) < share
        x = torch.where(copied[:, None], train[torch.randint(m, (n,), generator=g)] + 0.05 * draw(g, n, d), new)
        near = [torch.cdist(x, z).min(1) for z in (train, others)]
        with mock.patch.object(memorization, "PERMUTATIONS", 99):  # the p-value is another test's
            found = nearer_to_train(*((z.values, z.indices) for z in near), m)
        return {"nearer to training images": ends(found, "share")}

    return trial, {}


@study({f"{g} levels, {r} repeats": (g, r) for g, r in ((8, 5), (9, 3), (9, 5), (8, 10))})
def flat_ranges(levels, repeats):
    """It holds the best level of a curve, and of equal levels all."""
    sigma = np.arange(1.0, levels + 1)

    def one(seed, bend):
        rng = np.random.default_rng(seed)
        curve = bend * np.abs(np.arange(levels) - levels // 2)
        spread = 1 + curve  # farther, and more so
        noise = rng.standard_normal(repeats) + spread[:, None] * rng.standard_normal((levels, repeats))
        return flat_range(sigma, curve[:, None] + noise)["paired"]

    def trial(seed):
        equal = one(seed, 0.0) == [1.0, levels]
        return {"flat range, the best level": (None, *one(seed, 0.3)), "flat range, equal levels": equal}

    return trial, {"flat range, the best level": 1.0 + levels // 2}


# --- kicks, the mechanism, condensation -------------------------------------------------------------


@study(
    {
        "equal, 200 paths": (LAWS["equal"], 200),
        "equal, 1,000 paths": (LAWS["equal"], 1000),
        "unequal, 1,000 paths": (LAWS["unequal"], 1000),
        "heavy tails, 400 paths": (LAWS["heavy tails"], 400),
    }
)
def kicks(law, paths):
    """Of the way down in 40 steps; the right values are of 100,000 paths."""
    sigma = np.geomspace(0.7, 16, 9)

    def numbers(samples, seed):
        o = opportunity(law, sigma, samples=samples, seeds=seed)
        # At an end of the levels there is none, which is right where it says that resamples disagree.
        peaks = {"window of opportunity": o.peak, "of class changes": o.class_peak}
        out = {name: of_time(t) or "resamples" in t.reason for name, t in peaks.items()}
        for i in (1, 4, 7):
            out[f"change by kicks at {sigma[i]:.2g}"] = of_curve(o.change, i)
            out[f"class change by kicks at {sigma[i]:.2g}"] = of_curve(o.classes, i)
        return out

    many = numbers(100_000, 999)
    right = {name: said[0] for name, said in many.items() if isinstance(said, tuple)}

    def trial(seed):
        return {name: said for name, said in numbers(paths, seed).items() if name in right}

    return trial, right


@study(
    {
        "Gaussian, 256 paths": (gaussian_law(), 256),
        "Gaussian, 64 paths": (gaussian_law(), 64),
        "unequal, 256 paths": (LAWS["unequal"], 256),
        "heavy tails, 256 paths": (LAWS["heavy tails"], 256),
    }
)
def correlation_with_the_start(law, paths):
    """Exact under exact dynamics; down in 40 steps."""
    sigma, start, total, dim = [0.3, 1.0, 3.0, 10.0], 20.0, law.moments.trace, law.moments.dim
    half = math.sqrt((total / dim + start**2) / 4 - total / dim)
    names = [f"correlation with the start at {s:g}" for s in sigma]

    def trial(seed):
        r = reversion(law, sigma, paths=paths, sigma_start=start, seeds=seed)
        return {name: of_curve(r, i) for i, name in enumerate(names)} | {"its half": of_time(r.time())}

    rho = [math.sqrt((total + dim * s**2) / (total + dim * start**2)) for s in sigma]
    return trial, dict(zip(names, rho)) | {"its half": half}


@study(
    {
        "equal, 200 images": (LAWS["equal"], 200),
        "unequal, 200 images": (LAWS["unequal"], 200),
        "unequal, 40 images": (LAWS["unequal"], 40),
        "heavy tails, 600 images": (LAWS["heavy tails"], 600),
    }
)
def shares_of_a_linear_map(law, n):
    """By the law's Gaussian: of 30,000 images. By a map fitted to four fifths of n: expected."""
    sigma, one = [0.5, 1.0, 3.0, 10.0], Gaussian(law.moments)

    def numbers(count, seed):
        share = linear_share(law, law.sample(count, 0.0, generator(11, count, seed)), sigma, gaussian=one, seed=seed)
        return {
            f"share of {name} at {s:g}": of_curve(curve, i)
            for name, curve in (("a linear map", share), ("the Gaussian's map", share.gaussian))
            for i, s in enumerate(sigma)
        }

    many = numbers(30_000, 999)
    return lambda seed: numbers(n, seed), {k: said[0] for k, said in many.items() if "Gaussian" in k}


def cloud(n, d):
    return Empirical(torch.randn(n, d, generator=generator(3), dtype=torch.float64))


@study(
    {
        "its own points, 128 paths": (cloud(100, 8), cloud(100, 8), 128),
        "its own points, 32 paths": (cloud(50, 4), cloud(50, 4), 32),
        "their Gaussian, 128 paths": (Mixture.from_parameters(torch.zeros(1, 8).double(), 1.0), cloud(100, 8), 128),
    }
)
def condensation(law, data, paths):
    """Of the way down in 60 steps; the right values are of 3,200 paths."""
    many = nearest_flips(law, data, trajectories=3200, seeds=999)
    at = [int(np.argmin(np.abs(many.settled.value - share))) for share in (0.02, 0.5, 0.97)]

    def numbers(c):
        out = {"last change of the nearest": of_time(c.last)} if many.last.level else {}
        for i in at:
            out[f"share settled at {c.settled.sigma[i]:.2g}"] = of_curve(c.settled, i)
            out[f"participation at {c.settled.sigma[i]:.2g}"] = of_curve(c.participation, i)
        return out

    right = {name: said[0] for name, said in numbers(many).items()}
    return lambda seed: numbers(nearest_flips(law, data, trajectories=paths, seeds=seed)), right


# --- attributes -------------------------------------------------------------------------------------


@study(
    {
        f"n = {n}, {share} of them, d = {d}": (n, share, d)
        for n, share, d in ((400, 0.5, 16), (600, 0.1, 8), (200, 0.3, 4))
    }
)
def levels_of_an_attribute(n, share, d):
    """Two Gaussians of one covariance; right is what n images say in the mean."""

    def trial(seed):
        rng = np.random.default_rng(seed)
        codes = (rng.random(n) < share).astype(np.int64)
        x = torch.from_numpy(rng.standard_normal((n, d)))
        x[:, 0] += 4.0 * torch.from_numpy(codes)
        classes = Classes(codes, ("no", "yes"))
        row = attributes._row("a", classes, attributes._measured(x, classes, seed), schedule("ddpm-linear"))
        said = {"level of an attribute": row, "its free entropy": row["free_entropy"]}
        out = {
            k: v["level"] is not None and tuple(v[e] and v[e]["sigma"] for e in ("level", "low", "high"))
            for k, v in said.items()
        }
        return out | {"accuracy of an attribute's laws": ends(row["balanced_accuracy"])}

    return trial, {}


@study(
    {
        f"{a} of {n}, {b} of {m}": (n, a, m, b)
        for n, a, m, b in ((150, 0.9, 50, 0.7), (60, 0.98, 60, 0.95), (100, 0.95, 8, 0.8))
    }
)
def accuracy_of_a_classifier(n, a, m, b):
    """Of classes of n and m held-out images, of which a and b are read right."""

    def trial(seed):
        rng = np.random.default_rng(seed)
        codes = np.repeat([0, 1], (n, m))
        said = np.where(rng.random(n + m) < np.repeat([a, b], (n, m)), codes, 1 - codes)
        return {"balanced accuracy": ends(_accuracy(said, codes))}

    return trial, {"balanced accuracy": (a + b) / 2}


# --- two samples ------------------------------------------------------------------------------------


@study(
    {
        "equal laws, 100 and 100": (100, 100, 4, 0.0, None),
        "equal laws, 300 and 100": (300, 100, 16, 0.0, None),
        "a shift of .5, 200 and 200": (200, 200, 4, 0.5, None),
        "heavy tails, 200 and 200": (200, 200, 4, 0.3, 6),
    }
)
def two_sample_tests(n, m, d, shift, tail):
    """Right is the expectation at these counts, classifiers of training halves included; equal laws: a half."""

    def trial(seed):
        g = torch_of(seed)
        x, y = draw(g, n, d, shift=shift, tail=tail), draw(g, m, d, tail=tail)
        said, out = classifier_test(x, y, seed=seed), {"sliced Wasserstein": ends(sliced_wasserstein(x, y, seed=seed))}
        for name in ("logistic", "knn"):
            out[f"told apart, {name}"] = ends(said[name], "share")
            if not shift:
                out[f"p value above .05, {name}"] = said[name]["p_value"] > 0.05
        return out

    return trial, {} if shift else {"told apart, logistic": 0.5, "told apart, knn": 0.5}


@study(
    {
        "5 repeats of 100, 200 images": (5, 100, 200),
        "3 repeats of 50, 100 images": (3, 50, 100),
        "10 repeats of 100, 100 images": (10, 100, 100),
    }
)
def knees(repeats, n, m):
    """Starts whose samples are too wide, by less the higher; the standard start's lie between two of them."""
    wide, standard, sigma = np.array([1.6, 1.45, 1.3, 1.2, 1.1, 1.05, 1.0, 1.0]), 1.15, np.arange(1.0, 9.0)

    def trial(seed):
        g = torch_of(seed)
        x, reference = draw(g, n * repeats, 4), Moments.fit([draw(g, m, 4)])
        own = [0.1 * draw(g, n * repeats, 4) for _ in range(9)]
        scales = [*wide, standard]
        cells = [distance(s * (x + more), reference, repeats, "w") for s, more in zip(scales, own)]
        values, left_out = (np.array([getattr(c, k) for c in cells]) for k in ("values", "reference_left_out"))
        time = knee(sigma, values[:8], values[8], left_out[:8], left_out[8])
        flat = flat_range(sigma, values[:8], left_out[:8])
        lowest = "the lowest tried" in (time.reason or "")
        return {"knee": of_time(time) or lowest, "flat range of distances": (None, *flat["paired"])}

    best = 8.0
    return trial, {"knee": 4.5, "flat range of distances": best}
