"""Clones, U-turns and kicks against exact mixtures, which pose as networks."""

import math

import numpy as np
import pytest
import torch

from symbreak.critical import CriticalTime, passing
from symbreak.laws import Empirical, Mixture
from symbreak.networks.denoiser import as_denoiser
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.phases import branches, kicks
from symbreak.phases.branches import Paths
from symbreak.phases.cloning import _with_steps, clones, clones_by_attribute
from symbreak.phases.kicks import opportunity
from symbreak.phases.speciation import cloning_probability, cloning_time
from symbreak.phases.turns import u_turns, u_turns_by_attribute
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run


def mixture(means, variances, weights=None) -> Mixture:
    """Of shape [1, 1, d]."""
    m = torch.tensor(means, dtype=torch.float64)
    return Mixture.from_parameters(m.reshape(len(m), 1, 1, -1), variances, weights)


WORLDS = {
    "equal": mixture([[-4.0], [4.0]], 1.0),
    "unequal": mixture([[-4.0], [4.0]], 1.0, [0.2, 0.8]),
    "three": mixture([[0.0, 0.0], [8.0, 0.0], [0.0, 12.0]], [0.5, 1.0, 1.0], [0.5, 0.3, 0.2]),
}


def network(law):
    """The law through the same door as a trained network: epsilon at the steps of DDPM's schedule, float32."""
    own = scheduler("ddpm")
    return denoiser(as_unet(law, own), own)


def component(law):
    return lambda images: law.responsibilities(images, 0.01).argmax(1)


# --- clones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_phi_of_mixtures_posing_as_networks(name):
    law = WORLDS[name]
    sigma = [0.7, 2.5, 4.0, 6.0, 12.0]
    phi = cloning_probability(law, sigma, samples=100_000).value
    found = clones(network(law), sigma, component(law), pairs=1500, steps=80, seeds=1)
    # Standard error of 1,500 pairs; 80 steps move phi by up to 2 % of sigma times its slope, .35 a unit of log sigma.
    assert (np.abs(found.curve.value - phi) < 3.5 * np.sqrt(phi * (1 - phi) / 1500) + 0.008).all()
    exact = law.weights.numpy()
    # Every pair gives six images of one law, some of them all but copies: at least 1,500 independent ones.
    assert (np.abs(found.priors - exact) < 4 * np.sqrt(exact * (1 - exact) / 1500)).all()
    assert found.floor_low <= float((exact**2).sum()) + 0.002
    assert found.floor_high >= float((exact**2).sum()) - 0.002
    off = math.log(found.crossing.sigma / cloning_time(law, samples=50_000).sigma)
    spread = math.log(found.crossing.high.sigma / found.crossing.low.sigma) / 3.92
    assert abs(off) < 3.5 * spread + 0.03  # the 2 %, and 1 % of a straight line between 4 and 6
    assert (found.crossing.criterion, found.crossing.flow) == ("cloning", "sde")
    np.testing.assert_allclose(found.curve.value, found.agree.mean(0))


def test_intervals_are_as_wide_as_repetitions_scatter():
    """Over 30 repetitions the spread of phi and of the crossing is that of their intervals, +-13 % (1 / sqrt 60)."""
    law, sigma = WORLDS["unequal"], [1.5, 3.0, 4.5, 7.0, 11.0]
    runs = [clones(law, sigma, pairs=200, seeds=i, paths=Paths(resamples=200)) for i in range(30)]
    for values, width in (
        (np.array([r.curve.value for r in runs]), np.mean([r.curve.high - r.curve.low for r in runs], axis=0)),
        (
            np.log([[r.crossing.sigma] for r in runs]),
            np.mean([[math.log(r.crossing.high.sigma / r.crossing.low.sigma)] for r in runs], axis=0),
        ),
    ):
        ratio = width / (2 * 1.96 * values.std(0, ddof=1))
        assert (np.abs(np.log(ratio)) < 0.45).all()  # 3.5 standard errors of a spread from 30 values


def test_the_floor_counts_different_pairs_only():
    labels = np.array([[0, 1, 1], [2, 2, 0], [1, 1, 1], [0, 0, 2]])
    w = np.array([[1.0, 1, 1, 1], [2.0, 0, 1, 1]])
    priors, floor = branches.class_shares(labels, np.arange(3), w)
    each = np.stack([(labels == c).mean(1) for c in range(3)], axis=1)
    np.testing.assert_allclose(priors, each.mean(0))
    for weights, value in zip(w, floor):
        top = sum(weights[i] * weights[j] * each[i] @ each[j] for i in range(4) for j in range(4) if i != j)
        assert value == pytest.approx(top / sum(weights[i] * weights[j] for i in range(4) for j in range(4) if i != j))


def test_a_noisy_tail_does_not_move_the_crossing():
    """The monotone fit ignores a bump near the floor that crosses once more; outside the levels it says which side."""
    s = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    curves = np.array([[0.9, 0.8, 0.4, 0.3, 0.62], [0.9, 0.8, 0.7, 0.7, 0.65], [0.5, 0.4, 0.4, 0.4, 0.3]])
    with np.errstate(divide="ignore"):
        found = np.log(passing(s, branches._monotone(s, curves), np.full(3, 0.6)))
    # 0.4, 0.3, 0.62 fit by their mean 0.44: from 0.8 at 2 to 0.44 at 4.
    assert found[0] == pytest.approx(math.log(2) + math.log(2) * 0.2 / 0.36)
    assert found[1] == math.inf
    assert found[2] == -math.inf


@pytest.mark.parametrize("sigma", [15.0, 7.95, 4.05, 3.95, 1.5])
def test_the_lower_end_holds_half_a_step_of_the_grid_beside_a_level_put_in(sigma):
    time = CriticalTime(NoiseLevel(sigma), NoiseLevel(0.9 * sigma), NoiseLevel(1.1 * sigma))
    for grid in (
        [16.0, 8.0, 7.9, 4.1, 4.0, 2.0, 1.0],
        [16.0, 8.0, 4.0, 2.0, 1.0],
        [16.0, 8.0, 7.9, 4.1, 4.0, 3.9, 1.95, 1],
    ):
        found = _with_steps(time, np.array(grid))
        assert found.low.sigma == pytest.approx(0.9 * sigma / 2**0.5, rel=0.03)
        assert found.high == time.high


def test_no_crossing_says_which_levels_to_try():
    law = WORLDS["equal"]
    true = cloning_time(law).sigma
    low = clones(network(law), [0.8, 1.2], component(law), pairs=200).crossing
    assert low.level is None
    assert "above the levels asked about (1.2); try levels from 1.2 to 4.8" in low.reason
    assert 1.2 < true < 4.8
    high = clones(network(law), [12.0, 16.0], component(law), pairs=200).crossing
    assert high.level is None
    assert "below the levels asked about (12); try levels from 3 to 12" in high.reason
    one = clones(network(law), [2.0, 8.0], lambda images: torch.zeros(len(images)), pairs=20)
    assert one.crossing.level is None
    assert "all final images are of class 0" in one.crossing.reason
    assert one.floor == 1.0
    # The point is inside, part of the resamples is not: that end of the interval is open.
    near = clones(network(law), [1.0, true], component(law), pairs=100, seeds=3)
    assert (near.crossing.high is None) or near.crossing.level is None
    assert "above the levels" in near.crossing.reason


def test_clusters_are_classes_that_lie_apart():
    law = mixture([[0.0, 0, 0], [9.0, 0, 0], [0.0, 9.0, 0]], 0.3, [0.5, 0.3, 0.2])
    sigma = [1.0, 3.0, 6.0, 20.0]
    named = clones(network(law), sigma, component(law), pairs=200)
    found = clones(network(law), sigma, clusters=3, pairs=200)
    np.testing.assert_array_equal(found.agree, named.agree)
    np.testing.assert_allclose(np.sort(found.priors), np.sort(named.priors))
    np.testing.assert_array_equal(found.ends, named.ends)
    assert found.crossing == named.crossing
    assert found.to_dict()["crossing"] == named.crossing.to_dict()


def test_calls_are_counted_and_shared():
    law, sigma, told = WORLDS["equal"], np.array([9.0, 1.0, 4.0]), []
    d, asked = network(law), []

    class Counted:
        shape, sigma_range, schedule = d.shape, d.sigma_range, d.schedule

        def __call__(self, x, s):
            asked.append((s, len(x)))
            return d(x, s)

    found = clones(Counted(), sigma, component(law), pairs=30, steps=20, run=Run(progress=lambda _, *a: told.append(a)))
    assert len(asked) == 20  # the levels asked about replace steps
    assert sum(n for _, n in asked) == found.calls
    grid = [s for s, _ in asked]
    at = [grid.index(v) for v in sigma]
    assert found.calls == 30 * (20 + sum(19 - i for i in at))
    assert told[-1] == (found.calls, found.calls)
    assert [b - a for a, b in zip([0, *[t[0] for t in told]], [t[0] for t in told])] == [n for _, n in asked]
    # Batches only grow, by the clones of each level, once that level has been asked about.
    rows = [n // 30 for _, n in asked]
    assert rows == [1 + sum(i < j for i in at) for j in range(20)]


def test_scores_count_by_the_largest():
    law = WORLDS["three"]
    codes = clones(network(law), [2.0, 5.0], component(law), pairs=64)
    scores = clones(network(law), [2.0, 5.0], lambda x: law.responsibilities(x, 0.01).log(), pairs=64)
    np.testing.assert_array_equal(codes.agree, scores.agree)


def image_world():
    """Two classes of 8 x 8 images: three blocks of 64 make 150 trajectories."""
    m = torch.randn(2, 1, 8, 8, generator=generator(5, 5), dtype=torch.float64)
    return Mixture.from_parameters(m, 0.05, [0.4, 0.6])


@pytest.mark.parametrize("experiment", ["clones", "clusters", "u_turns", "opportunity"])
def test_interrupted_runs_go_on_with_the_same_bits(experiment, tmp_path):
    law = image_world()
    d, sigma = network(law), [0.5, 2.0, 6.0]

    def measured(run=None, seeds=4):
        about = {"steps": 8, "seeds": seeds, "run": run}
        if experiment == "clones":
            return clones(d, sigma, component(law), pairs=150, **about)
        if experiment == "clusters":
            return clones(d, sigma, clusters=2, pairs=150, **about)
        if experiment == "u_turns":
            x = law.sample(75, 0.0, generator(1, 1))
            return u_turns(d, x, sigma, component(law), paths=Paths(turns=2), **about)
        return opportunity(d, sigma, component(law), samples=150, **about)

    def stop(_, done, total):
        if done > 130 / 150 * total:  # in the third block of 64, 64 and 22
            raise KeyboardInterrupt

    whole = measured()
    with pytest.raises(KeyboardInterrupt):
        measured(Run(tmp_path, progress=stop))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    told = []
    resumed = measured(Run(tmp_path, progress=lambda _, *a: told.append(a)))
    assert [round(150 * a / b) for a, b in told[:2]] == [64, 128]  # what was there counts as done
    measured(Run(tmp_path), seeds=5)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6  # other settings are other parts
    assert told[-1][0] == told[-1][1] == whole.calls
    for key, value in vars(whole).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(resumed, key), value)
    assert resumed.to_dict() == whole.to_dict()


# --- U-turns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unequal", "three"])
def test_u_turns_of_the_networks_own_data(name):
    """Class change 1 - phi; none at small sigma, 1 - sum pi^2 at large; features: 0 and 1."""
    law = WORLDS[name]
    x = law.sample(1500, 0.0, generator(2, 2))
    sigma = [0.05, 2.5, 5.0, 100.0]
    found = u_turns(network(law), x, sigma, component(law), steps=80, seeds=2)
    change = 1 - cloning_probability(law, sigma, samples=100_000).value
    # Standard error of 1,500 images, and what 80 steps move (as for clones).
    assert (np.abs(found.classes.value - change) < 3.5 * np.sqrt(change * (1 - change) / 1500) + 0.008).all()
    assert found.classes.value[0] == 0.0
    limit = 1 - float((law.weights**2).sum())
    assert found.limit == pytest.approx(limit, abs=4 * math.sqrt(0.25 / 1500))
    assert found.features.value[0] < 2 * 0.05**2  # twice the noise's variance over twice the data's, both per axis
    assert found.features.value[-1] == pytest.approx(1.0, abs=4 / math.sqrt(1500) * 1.5)  # relative spread about 1.4
    assert found.crossing.low.sigma < cloning_time(law, samples=50_000).sigma < found.crossing.high.sigma
    assert found.crossing.criterion == "u-turn"


def test_labels_features_and_turns():
    law = WORLDS["unequal"]
    x, y = law.sample_labelled(60, 0.0, generator(3, 3))
    other = u_turns(network(law), x, [0.05, 3.0], component(law), labels=1 - y, paths=Paths(turns=3), steps=20)
    own = u_turns(network(law), x, [0.05, 3.0], component(law), labels=y, paths=Paths(turns=3), steps=20)
    np.testing.assert_allclose(own.changed + other.changed, 1.0)  # two classes: wrong labels turn the curve over
    assert set(np.unique(np.round(3 * own.changed))) <= {0.0, 1.0, 2.0, 3.0}
    doubled = u_turns(
        network(law), x, [0.05, 3.0], component(law), features=lambda v: 7 * v, paths=Paths(turns=3), steps=20
    )
    np.testing.assert_allclose(doubled.distance, own.distance, rtol=1e-3)  # float32 features, small differences


# --- kicks ----------------------------------------------------------------------------------------


def test_kicks_against_the_exact_flow():
    """In one dimension the flow is known from `transport`; a kick up or down, averaged over the law's own states."""
    law, size = mixture([[-0.95], [0.95]], 0.1), 0.05
    sigma = np.array([0.02, 0.2, 0.5, 0.8, 1.4, 3.0, 15.0])
    found = opportunity(law, sigma, samples=1500, steps=150, size=size, flow="ode", paths=Paths(sigma_end=0.002))
    for i, s in enumerate(sigma):
        x = law.sample(4000, float(s), generator(6, i))
        stack = torch.cat([x, x * (1 + size), x * (1 - size)])
        ends = as_denoiser(law)(law.transport(stack, 0.002, sigma_from=float(s)), 0.002).reshape(3, -1)
        kick = size * x.abs().reshape(-1) * NoiseLevel(float(s)).alpha
        exact = ((ends[1:] - ends[0]).abs() / kick).numpy().ravel()
        error = math.hypot(exact.std() / math.sqrt(4000), float(found.change.high[i] - found.change.low[i]) / 3.92)
        # 150 DDIM steps over log(15 / .002) are .06 each: first order, about 3 %.
        assert abs(found.change.value[i] - exact.mean()) < 3.5 * error + 0.03 * exact.mean()
    # Inside a class the flow is that of one Gaussian: sqrt(v (1 + s^2) / (v + s^2)), about 1 at the smallest level.
    assert found.change.value[0] == pytest.approx(1.0, abs=0.02)
    # Nothing is forgotten: what pure noise carries, any level above the split carries.
    np.testing.assert_allclose(found.change.value[-2:], found.change.value[-3], rtol=0.05)


def test_kicks_are_forgotten_early_and_carried_where_the_classes_part():
    law = mixture([[-4.0], [4.0]], 1.0)
    sigma = np.array([0.05, 0.5, 2.0, 3.5, 5.0, 7.5, 12.0, 60.0, 120.0])
    found = opportunity(law, sigma, samples=2000, steps=150, size=0.05, paths=Paths(sigma_end=0.01))
    # Far above the split the law is one Gaussian of variance 17, whose kicks shrink by known factors.
    shrunk = [math.sqrt(1 + s * s) / (17 + s * s) for s in sigma[-2:]]
    assert found.change.value[-1] / found.change.value[-2] == pytest.approx(shrunk[1] / shrunk[0], rel=0.15)
    # Inside a class it is one Gaussian of variance 1.
    assert found.change.value[0] == pytest.approx(1 / math.sqrt(1 + 0.05**2), rel=0.01)
    # Where the classes part kicks are carried further than at either end: beyond both intervals.
    assert found.change.low.max() > found.change.high[[0, -1]].max()
    vp = math.sqrt(2 * 16 - 1)  # the VP-SDE drift at the centre expands below this level: q = 1 / (2 M) for s2 = 1
    assert found.peak.low.sigma < 1.5 * vp
    assert found.peak.high.sigma > vp / 1.5
    assert (found.peak.flow, found.peak.frame) == ("sde", "vp")
    assert found.classes.value[0] == 0.0
    assert found.class_peak.low.sigma <= found.class_peak.sigma <= found.class_peak.high.sigma


def test_one_gaussian_has_a_closed_form():
    """SDE: v sqrt(1 + s^2) / (v + s^2) for any steps, largest at s^2 = v - 2; ODE: sqrt(v (1 + s^2) / (v + s^2))."""
    law, v = mixture([[1.0]], 10.0), 10.0
    sigma = np.geomspace(0.3, 30, 13)
    found = opportunity(law, sigma, samples=50, steps=30, size=0.3)
    np.testing.assert_allclose(found.change.value, v * np.sqrt(1 + sigma**2) / (v + sigma**2), rtol=1e-10)
    # Three points of a curve that is no parabola, .38 apart in log sigma.
    assert found.peak.sigma == pytest.approx(math.sqrt(v - 2), rel=0.05)
    assert found.peak.low.sigma == pytest.approx(found.peak.high.sigma)  # every trajectory says the same
    flow = opportunity(law, sigma, samples=50, steps=2000, paths=Paths(sigma_end=1e-3), flow="ode")
    exact = np.sqrt(v * (1 + sigma**2) / (v + sigma**2))
    np.testing.assert_allclose(flow.change.value, exact, rtol=0.004)  # half a step of log sigma, .005, at first order
    assert flow.peak.level is None
    assert "end of the levels, 30; try higher" in flow.peak.reason


def test_a_parabola_has_its_own_peak():
    s = np.geomspace(0.5, 8, 7)
    sums = np.stack([3 - (np.log(s) - c) ** 2 for c in (0.8, 0.5, 1.1)])
    found = kicks._peak(s, sums, "opportunity", "sde")
    assert found.sigma == pytest.approx(math.exp(0.8))
    assert (found.low.sigma, found.high.sigma) == pytest.approx((math.exp(0.5), math.exp(1.1)))


def test_kicks_without_classes():
    points = Empirical(torch.randn(30, 2, generator=generator(8, 8), dtype=torch.float64))
    found = opportunity(points, [0.3, 1.0, 4.0], samples=20, steps=20)
    assert found.classes is None
    assert found.class_peak is None


# --- bad input ------------------------------------------------------------------------------------

D = network(WORLDS["equal"])
X = torch.randn(6, 1, 1, 1, generator=generator(9, 9))


def nan(images):
    return torch.full((len(images),), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clones(D, [1.0, 2.0], nan, pairs=4), "classify gave NaN or infinity for 4 of 4 images"),
        (lambda: clones(D, [1.0], lambda x: torch.zeros(3), pairs=4), r"classify gave the shape \(3,\) for 4 images"),
        (lambda: clones(D, [1.0], lambda x: torch.zeros(4, 1), pairs=4), r"the shape \(4, 1\) for 4 images"),
        (lambda: clones(D, [1.0], lambda x: torch.full((4,), 0.5), pairs=4), r"classify gave fractions \(0.5\)"),
        (lambda: clones(D, [1.0], lambda x: ["a"] * 4, pairs=4), "expected integer classes"),
        (lambda: clones(D, [1.0]), "has no classes. Pass classify="),
        (lambda: clones(D, [1.0], component, clusters=2), "pass one of them"),
        (lambda: clones(D, [1.0], clusters=1), "1 clusters of 300 final images"),
        (lambda: clones(D, [1.0], component, pairs=1), "1 pairs"),
        (lambda: clones(D, [1.0], component, steps=1), "1 steps"),
        (lambda: clones(D, [1e3], component), "branch levels from 1000 to 1000"),
        (lambda: clones(D, [1.0], component, paths=Paths(sigma_start=500.0)), "in the range 0.01 to 157.4"),
        (lambda: clones(D, [-1.0], component), "sigma is -1"),
        (lambda: clones(D, [1.0], component, paths=Paths(resamples=1)), "1 resamples"),
        (lambda: u_turns(D, torch.zeros(5, 1, 8, 8), 1.0, component), r"images of shape \(1, 8, 8\) for a network"),
        (lambda: u_turns(D, X, 1.0, nan), "classify gave NaN"),
        (lambda: u_turns(D, X * math.nan, 1.0, nan), "the images hold NaN"),
        (lambda: u_turns(D, X, 1.0, component(WORLDS["equal"]), labels=[0, 1]), r"labels of shape \(2,\) for 6"),
        (lambda: u_turns(D, X, 1.0, component(WORLDS["equal"]), labels=[0.5] * 6), "labels of float64"),
        (lambda: u_turns(D, X[:1], 1.0, component(WORLDS["equal"])), "1 images; expected at least 2"),
        (lambda: u_turns(D, 0 * X, 1.0, component(WORLDS["equal"])), "all images have the same features"),
        (lambda: u_turns(D, X, 1.0, component(WORLDS["equal"]), features=lambda x: x[:2]), "features gave the shape"),
        (lambda: u_turns(D, X, 1.0), "has no classes"),
        (lambda: opportunity(D, 1.0, size=0.0), "a size of 0"),
        (lambda: clones(D, [1.0], component, sigma_start=1.0), r"now clones\(paths=sb.Paths"),
        (lambda: u_turns(D, X, 1.0, component, turns=2), r"u_turns\(turns=...\) is now u_turns\(paths=sb.Paths"),
        (lambda: opportunity(D, 1.0, keep=print), r"opportunity\(keep=...\) is now opportunity\(run=sb.Run"),
        (lambda: opportunity(D, 1.0, flow="pde"), "flow 'pde'"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_network_that_breaks_is_named():
    class Broken:
        shape, sigma_range = (1,), (0.01, 50.0)

        def __call__(self, x, s):
            return x * math.nan

    with pytest.raises(InputError, match="final images hold NaN"):
        clones(Broken(), 1.0, component, pairs=4)


def test_one_set_of_trajectories_serves_all_attributes():
    """A mixture of four Gaussians is two attributes: 8 apart and 3 apart. Each is what its own experiment gives."""
    law = mixture([[x, y] for x in (-4.0, 4.0) for y in (-1.5, 1.5)], 1.0)
    judges = {"wide": lambda x: (x[..., 0].flatten() > 0).long(), "near": lambda x: (x[..., 1].flatten() > 0).long()}

    def both(x):
        return {name: judge(x) for name, judge in judges.items()}

    options = {"steps": 20, "seeds": 3}
    sigma, images = [0.5, 1.0, 2.0, 4.0, 8.0], law.sample(200, 0.0, generator(5, 1)).float()
    pairs = clones_by_attribute(law, sigma, both, 300, **options)
    turns = u_turns_by_attribute(law, images, sigma, both, **options)
    for name, judge in judges.items():
        one, turned = clones(law, sigma, judge, 300, **options), u_turns(law, images, sigma, judge, **options)
        assert (pairs[name].agree == one.agree).all()
        assert pairs[name].crossing == one.crossing
        assert turns[name].crossing == turned.crossing
        np.testing.assert_array_equal(turns[name].distance, turned.distance)
    assert pairs["wide"].crossing.sigma > pairs["near"].crossing.sigma


def test_attributes_of_an_interrupted_run_are_found_again(tmp_path):
    """The parts of other classifiers are not taken for these."""
    law, calls = network(WORLDS["equal"]), []

    def judge(sign):
        def both(x):
            calls.append(len(x))
            return {"large": (sign * x.flatten() > 0).long(), "name: / odd": (x.flatten() > 2).long()}

        return both

    first, second, other = (
        clones_by_attribute(law, [2.0, 4.0], judge(sign), 60, 10, run=Run(tmp_path)) for sign in (1, 1, -1)
    )
    assert set(first) == {"large", "name: / odd"}
    assert (first["large"].agree == second["large"].agree).all()
    assert (first["large"].labels == 1 - other["large"].labels).all()
