"""The information of a class and the window of guidance against exact mixtures, which also pose as networks."""

import json
import math

import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.laws import PrincipalMixture
from symbreak.networks.guidance import without_condition
from symbreak.networks.residual import law_answer
from symbreak.noise import generator
from symbreak.phases.class_entropy import class_entropy
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import plain
from symbreak.runtime.run import Run


def classy(law):
    law.classes = torch.arange(law.components)
    return law


LAWS = {
    "unequal weights": classy(sb.Mixture.from_parameters([[-1.0, 0.0], [1.0, 0.5]], 0.05, [0.7, 0.3])),
    "three classes": classy(sb.Mixture.from_parameters([[-2.0, 0.0], [2.0, 0.5], [0.0, 3.0]], 0.3, [0.5, 0.3, 0.2])),
    "covariance only": classy(sb.Mixture.from_parameters(torch.zeros(2, 16).double(), [1.0, 9.0])),
}
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


class Conditional(torch.nn.Module):
    """An exact mixture as a class-conditional network whose last class is the null class."""

    sigma_range = (0.0, math.inf)

    def __init__(self, law, null=True, gain=1.0):
        super().__init__()
        self.law, self.shape, self.gain = law, tuple(law.shape), gain
        self.num_class_embeds = len(law.classes) + 1
        if null:
            self.null_label = len(law.classes)

    def forward(self, x, sigma, class_labels=None):
        s = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).expand(len(x))
        free = law_answer(self.law, x, s)
        return free + self.gain * (law_answer(self.law, x, s, class_labels) - free)


def draws(law, n, seed=4):
    return law.sample_labelled(n, generator=generator(seed))


def exact(law, sigma, samples=100_000):
    entropy = class_entropy(law, sigma, samples)
    return entropy.total - entropy.value


@each_law
def test_an_exact_mixture_and_the_network_it_poses_as(law):
    x, y = draws(law, 2000)
    info = condition_information(law, x, y)
    curve = exact(law, info.sigma, 20_000)
    # 95 % intervals, whose levels share the images: not all of some thirty hold, but none is far off.
    half = (info.high - info.low) / 2 + 1e-4
    assert (np.abs(info.value - curve) < 2 * half).all()
    assert (np.abs(info.by_losses.value - curve) < 2 * (info.by_losses.high - info.by_losses.low) / 2 + 2e-3).all()
    assert info.limit["low"] < math.fsum(-w * math.log(w) for w in law.class_weights.tolist()) < info.limit["high"]
    assert info.total == pytest.approx(class_entropy(law, 1.0).total, abs=0.02)  # 2,000 draws of the classes
    assert (np.diff(info.value) <= 2e-3).all()  # an integral of squares, but for the wiggles of its spline
    assert info.notes == ()
    few = slice(0, 128)  # every path through a network's batches of 64
    same = condition_information(Conditional(law), x[few], y[few], [0.5, 2.0])
    np.testing.assert_allclose(same.value, condition_information(law, x[few], y[few], [0.5, 2.0]).value, rtol=1e-9)


@pytest.mark.slow
@each_law
def test_within_one_per_cent(law):
    x, y = draws(law, 20_000)
    info = condition_information(law, x, y, draws=16)
    curve = exact(law, info.sigma, 400_000)
    decided = curve > 0.1 * info.total
    assert np.abs(info.value / curve - 1)[decided].max() < 0.01
    assert np.abs(info.value - curve).max() < 0.01 * info.total


def test_a_diffusers_network_seen_through_its_scheduler():
    law = classy(sb.Mixture.from_parameters(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.05))
    base = sb.scheduler("ddpm")
    network = sb.as_unet(Conditional(law), base)
    assert (network.config.num_class_embeds, network.config.null_label) == (3, 2)
    x, y = draws(law, 128)
    sigma = [0.3, 1.0, 3.0]
    info = condition_information(sb.denoiser(network, base), x, y, sigma)
    # Between DDPM's steps its time is interpolated, and back again.
    np.testing.assert_allclose(info.value, condition_information(law, x, y, sigma).value, rtol=1e-6)
    blind = sb.denoiser(sb.as_unet(Conditional(law, null=False), base), base)
    with pytest.raises(InputError, match=r"does not say which of its classes is the null class.* null=2"):
        condition_information(blind, x, y, sigma)
    named = condition_information(blind, x, y, sigma, null=2)
    np.testing.assert_array_equal(named.value, info.value)


def test_the_window_and_its_record():
    law = LAWS["unequal weights"]
    info = condition_information(law, *draws(law, 2000))
    window = guidance_window(info)
    low, high = window.levels
    curve = exact(law, [low, high], 20_000) / class_entropy(law, 1.0).total
    np.testing.assert_allclose(curve, [0.9, 0.1], atol=0.02)
    assert window.low.low.sigma < low < window.low.high.sigma < window.high.low.sigma < high < window.high.high.sigma
    assert guidance_window(info, (0.2, 0.8)).levels[0] > low
    guide = sb.guided(law.given(0), law, 2.0, window.levels)
    assert [guide.evaluations(s) for s in (0.9 * low, 1.1 * low, 1.1 * high)] == [1, 2, 1]
    record = json.loads(json.dumps(plain(info.to_dict()), allow_nan=False))
    assert record["limit"]["value"] == record["value"][0]
    assert json.loads(json.dumps(plain(window.to_dict())))["high"]["level"]["sigma"] == high
    cut = condition_information(law, *draws(law, 500), np.geomspace(0.1, 1.0, 8))
    assert float(np.max(cut.grid)) > 5  # levels above the ones asked for carry the integral


def test_a_network_that_is_unsure_or_in_error_is_named():
    law = LAWS["unequal weights"]
    x, y = draws(law, 500)
    shy, wild = (condition_information(Conditional(law, gain=g), x, y) for g in (0.5, 2.0))
    for info, said in ((shy, ("off by -7", "unsure")), (wild, ("off by +3", "by error"))):
        assert all(text in info.notes[0] for text in said)
    # |D_u + 2 (D_c - D_u) - D_u|^2 is four times as large; the losses lose by it.
    assert wild.limit["value"] / shy.limit["value"] == pytest.approx(16)
    assert wild.by_losses.value[0] < 0.5 * wild.limit["value"]
    windows = [guidance_window(info).levels for info in (condition_information(law, x, y), shy, wild)]
    assert windows[0] == pytest.approx(windows[1], rel=0.02)  # shares of its own limit
    # Four times the information: the shares are of H[c], and not of what the errors add up to.
    curve = exact(law, list(windows[2]), 20_000) / class_entropy(law, 1.0).total
    np.testing.assert_allclose(4 * curve, [0.9, 0.1], rtol=0.15)
    assert guidance_window(wild).low.criterion == "class information at 0.9 of H[c]"
    short = Conditional(law)
    short.sigma_range = (0.02, 1.2)
    info = condition_information(short, x, y)
    assert "of the class information lies above the highest level, sigma 1.2" in info.notes[0]
    short.sigma_range = (100.0, 200.0)
    with pytest.raises(InputError, match="not in its range"):
        condition_information(short, x, y)


def test_a_principal_mixture_and_going_on(tmp_path):
    y = torch.arange(2).repeat(100)
    x = torch.zeros(200, 1, 2, 2).double()
    x[:, 0, 0, 0] = 2.0 * y - 1
    x += 0.05 * torch.randn(x.shape, generator=generator(11), dtype=torch.float64)
    law = PrincipalMixture.fit(x, labels=y, leading=1)
    sigma = [0.3, 1.0, 3.0]
    info = condition_information(law, x, y, sigma)
    for _ in range(2):  # computed, then read
        assert np.array_equal(condition_information(law, x, y, sigma, run=Run(tmp_path)).value, info.value)
    # Two narrow clumps at +-1: ln 2 less the entropy of two points.
    wanted = math.log(2) - class_entropy(law, sigma).value
    assert (np.abs(info.value - wanted) < info.high - info.low).all()


BLIND = sb.denoiser(lambda x, s: x, shape=(2,), sigma_range=(0.01, 50.0))
BAD = {
    "no labels": ({"labels": None}, "no labels came"),
    "too few": ({"labels": [0, 1]}, "labels of shape .2,. for 32 images"),
    "outside": ({"labels": [0, 7] * 16}, r"the class 7, but the network knows 0 to 2"),
    "negative": ({"labels": [0, -1] * 16}, r"the class -1, but the network knows 0 to 2"),
    "null": ({"labels": [0, 2] * 16}, "some labels are 2, the null class"),
    "one": ({"labels": [1] * 32}, "all images are of the class 1"),
    "no such null": ({"null": 3}, "the null class 3; expected a label of the network, from 0 to 2"),
    "half a null": ({"null": 0.5}, "the null class 0.5"),
    "law's null": ({"denoiser": LAWS["unequal weights"], "null": 2}, "came for a law"),
    "law's classes": ({"denoiser": LAWS["unequal weights"], "labels": [0, 5] * 16}, r"the law's classes are \[0, 1\]"),
    "no classes": ({"denoiser": sb.Mixture.from_parameters([[0.0, 0.0]], 1.0)}, "Mixture has no classes"),
    "no conditions": ({"denoiser": BLIND, "null": 2}, "cannot take states of shape .32, 2. with class_labels"),
    "says no null": ({"denoiser": BLIND}, "does not say which of its classes is the null class"),
    "NaN": ({"data": torch.full((32, 2), math.nan)}, "NaN or infinity"),
    "levels": ({"sigma": [0.0, 1.0]}, "expected finite noise levels > 0"),
    "draws": ({"draws": 0}, "0 noise draws"),
    "equal": ({"data": torch.ones(32, 2)}, "all images are equal"),
    "says nothing": ({"denoiser": Conditional(LAWS["unequal weights"], gain=0.0)}, "its condition says nothing"),
    "gives NaN": ({"denoiser": Conditional(LAWS["unequal weights"], gain=math.nan)}, "NaN or infinity at sigma"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
def test_bad_input(change, match):
    x, y = draws(LAWS["unequal weights"], 32)
    arguments = {"denoiser": Conditional(LAWS["unequal weights"]), "data": x, "labels": y, **change}
    with pytest.raises(InputError, match=match):
        condition_information(**arguments)


def test_bad_shares_and_a_network_without_a_null_class():
    law = LAWS["unequal weights"]
    info = condition_information(law, *draws(law, 64), [0.5, 2.0])
    for shares in ((0.9, 0.1), (0.0, 0.5), (0.5, math.nan)):
        with pytest.raises(InputError, match="between the shares"):
            guidance_window(info, shares)
    with pytest.raises(InputError, match="network without classes"):
        without_condition(sb.denoiser(sb.load_pipeline("digits").unet, sb.scheduler("ddpm")))


# a single condition, such as a prompt


def log_ratio(law, component, sigma, n=40_000):
    """E[log p(x_sigma | c) - log p(x_sigma)] by draws of the component, from the densities themselves."""
    x = component.sample(n, generator=generator(11))
    x = x + sigma * torch.randn(x.shape, generator=generator(12), dtype=x.dtype)
    return float((component.log_prob(x, sigma) - law.log_prob(x, sigma)).mean())


@each_law
def test_what_a_single_condition_tells_is_the_log_ratio_of_the_two_laws(law):
    k = len(law.classes) - 1
    component, whole = law.given(k), -math.log(float(law.class_weights[k]))
    # Where covariances differ a few samples have much of it: 3,000 give 5 %, in their own interval's words.
    near = (0.06 if law.shape == (16,) else 0.02) * whole
    x = component.sample(3000, generator=generator(5))
    info = condition_information(component, x, without=law)
    assert info.limit["low"] < whole < info.limit["high"]
    assert info.limit["value"] == pytest.approx(whole, abs=near)
    assert info.by_losses.value[0] == pytest.approx(whole, abs=near)
    assert (info.name, math.isinf(info.total), info.notes) == ("condition information", True, ())
    for i in (len(info.sigma) // 3, len(info.sigma) // 2, 2 * len(info.sigma) // 3):
        wanted = log_ratio(law, component, float(info.sigma[i]))
        assert info.value[i] == pytest.approx(wanted, abs=near)
    window = guidance_window(info)
    assert window.low.criterion == "class information at 0.9 of its limit"
    for level, left in ((window.low, 0.9), (window.high, 0.1)):
        assert log_ratio(law, component, level.sigma) == pytest.approx(left * whole, abs=near)
    json.dumps(plain(info.to_dict()), allow_nan=False)


def test_single_conditions_make_up_the_classes():
    """The classes' shares of D(p(x | c) || p(x)) are I(c; x), on the same noise up to the draws."""
    law = LAWS["three classes"]
    x, y = draws(law, 3000)
    whole = condition_information(law, x, y, [0.3, 1.0, 3.0])
    each = [condition_information(law.given(k), x[y == k], sigma=[0.3, 1.0, 3.0], without=law) for k in range(3)]
    added = sum(float((y == k).double().mean()) * each[k].value for k in range(3))
    assert added == pytest.approx(whole.value, rel=0.05)
    assert ((whole.low < added) & (added < whole.high)).all()  # each class has noise of its own


def test_bad_input_of_a_single_condition():
    law = LAWS["three classes"]
    x, y = draws(law, 100)
    for more, line in [
        ({"labels": y, "without": law}, "labels or a null class came with an unconditional denoiser"),
        ({"without": sb.Gaussian.fit(sb.samples(torch.randn(20, 3)))}, "expected one shape"),
        ({"without": law}, "answers the same with the condition as without"),
    ]:
        with pytest.raises(InputError, match=line):
            condition_information(law, x, **more)
