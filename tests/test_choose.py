import json
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers.configuration_utils import FrozenDict

from symbreak.data.readers import images
from symbreak.laws import Gaussian, Mixture, PrincipalMixture
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import as_denoiser
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import SAMPLERS, scheduler
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.start.choose import loss_gaps
from symbreak.start.fit import candidate_laws, fit_start, late_start
from symbreak.start.late_start import LateStartWarning
from symbreak.start.loading import load_pipeline
from symbreak.start.sample import generate
from tests.worlds import gaussian_law, small_choice, two_deltas

SHAPE = (1, 2, 2)


def clumps(distance=3.0, spread=0.2):
    """Two narrow clumps far apart, and the Gaussian with their moments."""
    mean = torch.zeros(2, *SHAPE, dtype=torch.float64)
    mean[0, 0, 0, 0], mean[1, 0, 0, 0] = -distance, distance
    law = Mixture.from_parameters(mean, [spread**2, spread**2])
    return law, Gaussian(law.moments)


def test_the_gap_is_the_divergence_where_it_is_known():
    law = two_deltas()
    n = 20_000
    data = law.sample(n, 0.0, generator(1))
    sigma = np.geomspace(0.5, 60.0, 60)
    gaussian = Gaussian(law.moments)
    gap = loss_gaps(as_denoiser(law), [gaussian, law], data, sigma, gaussian)
    # KL of the noised two deltas from the Gaussian of their moments, by quadrature.
    for s, kl in ((0.5, 0.1719987625), (1.0, 0.0097427699)):
        # Five standard errors, and 1 % for the trapezoid in log sigma.
        assert gap[0].at("nats", s) == pytest.approx(kl, abs=5 * gap[0].at("error", s) + 0.01 * kl)
    assert np.abs(gap[1].nats).max() == 0
    assert np.abs(gap[1].cost).max() == 0
    # Errors at u reach the end of a Gaussian's flow by a factor C / (C + u^2) in square.
    flow = gap[0].sigma
    mmse = np.array([float((data - law.denoise(data + u * _eps(data), u)).square().mean()) for u in flow])
    weight = 1.0 / (1.0 + flow**2)
    excess = (flow**2 / (1 + flow**2) - mmse) * weight
    by_hand = scipy.integrate.trapezoid(excess, np.log(flow))
    assert gap[0].cost[0] == pytest.approx(float(by_hand), abs=0.003)  # LMMSE in closed form instead of sampled


def _eps(data):
    return torch.randn(data.shape, generator=generator(0, 21), dtype=data.dtype)


def test_an_exact_law_starts_as_late_as_pays():
    law, gaussian = clumps()
    data = law.sample(256, 0.0, generator(2)).float()
    start = late_start(scheduler("dpm++2m"), [gaussian, law], 3, denoiser=law, data=data, check=False)
    choice = start.choice
    assert start.law is law
    assert choice.chosen.law == 1
    assert abs(choice.chosen.law_cost) < 1e-9
    assert abs(choice.nats[0]) < 1e-9
    # With an exact law later is always better: the lowest level that was tried, or one as good.
    assert choice.chosen.cost < 0.05 * choice.standard.cost
    assert choice.chosen.level.sigma < 1.0
    assert "Squared error" in start.explain()
    assert "<- least" in start.explain()


def test_one_gaussian_is_kept_above_the_symmetry_breaking():
    law, gaussian = clumps()
    data = law.sample(256, 0.0, generator(2)).float()
    start = late_start(scheduler("dpm++2m"), gaussian, 10, denoiser=law, data=data, check=False)
    late = [c for c in start.choice.candidates if c.law == 0]
    by_level = {round(c.level.sigma, 3): c.law_cost for c in late}
    costs = [by_level[s] for s in sorted(by_level)]
    # The later, the dearer; far above the separation nothing is left but the noise of 256 images.
    assert all(a > b - 0.01 for a, b in pairwise(costs))
    # Below the separation of 3 one Gaussian fills the gap between the clumps: the order of its squared width.
    assert costs[0] > 0.5
    assert start.law is gaussian
    assert start.level.sigma > 2.0


def test_a_wrong_law_loses_to_the_standard_start():
    law, gaussian = clumps()
    shifted = Gaussian(Moments(100, gaussian.moments.mean + 1.0, gaussian.moments.cov))
    data = law.sample(256, 0.0, generator(2)).float()
    start = late_start(scheduler("dpm++2m-karras"), shifted, 60, denoiser=law, data=data, check=False)
    assert start.law is None
    assert start.choice.chosen.law is None
    assert start.level.sigma > 50
    assert "standard start" in start.explain()
    noise = torch.randn(4, *SHAPE, generator=generator(3))
    assert torch.equal(start(noise), noise)


def test_only_losses_are_asked_of_the_network():
    law, gaussian = clumps()
    seen = []

    class Counting:
        shape = SHAPE
        sigma_range = (0.01, 150.0)

        def __call__(self, x, sigma):
            seen.append((len(x), float(sigma)))
            return law.denoise(x, sigma)

    data = law.sample(100, 0.0, generator(2)).float()
    a = late_start(scheduler("dpm++2m"), gaussian, 5, denoiser=Counting(), data=data, check=False)
    levels = {s for _, s in seen}
    # Every image once a level, nothing twice, and no level that depends on what the network said.
    assert sum(n for n, _ in seen) == 100 * len(levels)
    assert len(levels) == 20
    b = late_start(scheduler("dpm++2m"), gaussian, 5, denoiser=Counting(), data=data, check=False)
    assert a.choice == b.choice


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_can_choose(name):
    law = gaussian_law()
    clips = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    settings = {"original_inference_steps": 20} if name == "lcm" else clips
    base = scheduler(name, **settings)
    network = as_denoiser(law)
    network.sigma_range = (0.02, 80.0)
    data = law.sample(64, 0.0, generator(2)).float()
    with small_choice():  # the lowest and the highest level are the same
        start = late_start(base, law, 4, denoiser=network, data=data, check=False)
    usual = start.choice.standard
    # The network's law is the start's law: starting late only takes work away, and the latest start is good.
    assert start.law is law
    late = [c for c in start.choice.candidates if c.law == 0]
    assert min(late, key=lambda c: c.level.sigma).cost < 0.5 * usual.cost
    assert 0 < start.level.sigma < usual.level.sigma
    assert math.isfinite(usual.cost)
    assert usual.cost > 0


def test_signatures_warn():
    """One broad Gaussian mode, and 31 that are two points each: fine structure that one Gaussian misses."""
    g, n, width = generator(5), 256, 0.2
    x0 = torch.cat([torch.randn(n, 1, generator=g), width * (2.0 * torch.randint(0, 2, (n, 31), generator=g) - 1)], 1)

    class Product:
        shape = (1, 4, 8)

        def denoise(self, x, sigma):
            flat, s2 = x.flatten(1), float(sigma) ** 2
            fine = width * torch.tanh(width * flat[:, 1:] / s2)
            return torch.cat([flat[:, :1] / (1 + s2), fine], 1).reshape(x.shape)

    variances = torch.diag(torch.tensor([1.0] + [width**2] * 31))
    law = Gaussian(Moments(1000, torch.zeros(1, 4, 8), variances))
    with pytest.warns(LateStartWarning, match="nats from the data"):
        start = late_start(scheduler("dpm++2m"), law, 1, denoiser=Product(), data=x0.reshape(n, 1, 4, 8))
    # Each mode costs the divergence of two points from their Gaussian, at sigma over width.
    assert start.choice.nats[0] > 1.0
    assert start.choice.signatures
    assert all(s in start.explain() for s in start.choice.signatures)


def test_without_a_network_it_is_the_spectral_level():
    law = gaussian_law()
    assert (
        late_start(scheduler("dpm++2m"), law, 5).level
        == late_start(scheduler("dpm++2m"), law, 5, at="speciation").level
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": torch.zeros(64, 1, 3, 3)}, "expected one shape"),
        ({"data": torch.zeros(4, *SHAPE)}, "at least 16"),
        ({"data": []}, "no images"),
        ({"data": 40 * torch.randn(64, *SHAPE, generator=generator(0))}, "another range"),
        ({"data": "digits"}, r"sb\.images"),
        ({"data": None}, "without data="),
        ({"labels": [0] * 64}, "network without classes"),
        ({"denoiser": object()}, "neither a law"),
        ({"law": []}, "no law"),
        ({"denoiser": None, "data": None}, "2 laws came"),
    ],
)
def test_bad_input(change, match):
    law, gaussian = clumps()
    data = law.sample(64, 0.0, generator(2)).float()
    given = {"law": [gaussian, law], "denoiser": law, "data": data, **change}
    with pytest.raises(InputError, match=match) as caught:
        late_start(scheduler("dpm++2m"), given.pop("law"), 5, **given)
    assert "\n" not in str(caught.value)


class Conditional(torch.nn.Module):
    """A class-conditional network: each class has a law of its own."""

    def __init__(self, laws, base):
        super().__init__()
        self.nets = torch.nn.ModuleList(as_unet(law, base) for law in laws)
        settings = dict(self.nets[0].config) | {"num_class_embeds": len(laws)}
        self.config, self.dtype = FrozenDict(settings), torch.float32

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        outs = torch.stack([net(sample, timestep, return_dict=False)[0] for net in self.nets])
        out = outs[class_labels, torch.arange(len(sample))]
        return (out,)


def test_a_class_conditional_network_gets_class_starts(tmp_path):
    base = scheduler("ddim", clip_sample=False)
    means = torch.zeros(2, *SHAPE)
    means[0, 0, 0, 0], means[1, 0, 0, 0] = -0.6, 0.6
    own = [Mixture.from_parameters(m[None], [0.01]) for m in means]
    unet = Conditional(own, base)
    y = torch.arange(2).repeat(400)
    x = means[y] + 0.1 * torch.randn(800, *SHAPE, generator=generator(3))
    data = images_of(tmp_path, x.clamp(-1, 1), y)
    start = fit_start(data, unet, base, 3, check=False)
    law = start.law
    assert law.classes.tolist() == [0, 1]
    # The class of a state is known at once, so the start costs nothing at a level where both classes overlap.
    assert start.choice.chosen.law_cost < 0.01
    wanted = torch.tensor([0, 1]).repeat(32)
    found = generate(unet, start, range(64), labels=wanted, clamp=False)
    assert torch.equal((found[:, 0, 0, 0] > 0).long(), wanted)
    assert float((found - means[wanted]).square().mean()) < 0.02  # the spread of a class is 0.01
    with pytest.raises(InputError, match="have no labels"):
        fit_start(images_of(tmp_path, x.clamp(-1, 1)), unet, base, 3)


def images_of(folder, x, y=None):
    """Images from arrays, through the loader."""
    arrays = {"images": x.numpy()} | ({} if y is None else {"labels": y.numpy()})
    np.savez(folder / "data.npz", **arrays)
    low, high = float(x.min()), float(x.max())
    assert low >= -1
    assert high <= 1
    return images(str(folder / "data.npz"), value_range=(-1.0, 1.0))


def test_labels_of_a_class_conditional_network(tmp_path):
    base = scheduler("ddim", clip_sample=False)
    x = 0.1 * torch.randn(200, *SHAPE, generator=generator(3))
    unet = Conditional([Mixture.from_parameters(torch.zeros(1, *SHAPE), [0.01])] * 2, base)
    with pytest.raises(InputError, match="labels from 0 to 2; the network knows 0 to 1"):
        fit_start(images_of(tmp_path, x.clamp(-1, 1), torch.arange(200) % 3), unet, base, 3)
    law = Gaussian.fit([x])
    with pytest.raises(InputError, match="has 2 classes, but no labels"):
        late_start(base, law, 3, denoiser=denoiser(unet, base), data=x)
    with pytest.raises(InputError, match="3 labels for 200 images"):
        late_start(base, law, 3, denoiser=denoiser(unet, base), data=x, labels=[0, 1, 0])
    one = PrincipalMixture.fit(x, labels=torch.zeros(200))
    with pytest.raises(InputError, match="no component for it"):
        late_start(base, one, 3, denoiser=denoiser(unet, base), data=x, labels=torch.arange(200) % 2)


@pytest.mark.parametrize("scale", [255.0, 8.0])
def test_data_outside_the_network_s_range_are_refused(scale):
    pipe = load_pipeline("digits")
    x = scale * images("digits").tensor()
    base = scheduler("dpm++2m", like=pipe.scheduler)
    with pytest.raises(InputError, match="network's range"):
        late_start(base, Gaussian.fit([x]), 3, denoiser=denoiser(pipe.unet, pipe.scheduler), data=x[:64])


@pytest.mark.parametrize(
    ("name", "steps"),
    [("ddim", 1001), ("ddpm", 1001), ("lcm", 60), pytest.param("unipc", 2000, marks=pytest.mark.slow)],
)
def test_more_steps_than_there_are(name, steps):
    law, gaussian = clumps()
    data = law.sample(64, 0.0, generator(2)).float()
    with pytest.raises(InputError) as caught:
        late_start(scheduler(name), gaussian, steps, denoiser=law, data=data)
    assert "\n" not in str(caught.value)


def test_schedulers_that_cannot_be_tried():
    law, gaussian = clumps()
    data = law.sample(64, 0.0, generator(2)).float()
    with pytest.raises(InputError, match="learned_range"):
        late_start(scheduler("ddpm", variance_type="learned_range"), gaussian, 3, denoiser=law, data=data)


def test_what_was_chosen_is_plain():
    law, gaussian = clumps()
    data = law.sample(64, 0.0, generator(2)).float()
    start = late_start(scheduler("flow-euler"), gaussian, 3, denoiser=law, data=data, check=False)
    choice, found = start.choice, start.choice.to_dict()
    # Strict JSON and back: tuples would return as lists, and NaN or infinity are refused.
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    # Flow matching begins at pure noise, whose infinite sigma is a string.
    standard = [c for c in found["candidates"] if c["law"] is None]
    starts = {(c["level"]["sigma"], c["level"]["log_snr"], c["level"]["alpha"], c["law_cost"]) for c in standard}
    assert starts == {("inf", "-inf", 0.0, 0.0)}
    assert min(c["sampler_cost"] for c in standard) == choice.standard.cost
    # What was chosen is the cheapest of all that is listed.
    assert len(found["candidates"]) == len(choice.candidates)
    assert found["chosen"] == min(found["candidates"], key=lambda c: c["law_cost"] + c["sampler_cost"])
    assert (found["chosen"]["law"], found["chosen"]["level"]["sigma"]) == (0, choice.chosen.level.sigma)
    assert found["nats"] == list(choice.nats)
    assert (found["images"], found["states"]) == (64, choice.states)


def test_fit_start_keeps_images_back_and_checks_shapes(tmp_path):
    pipe = load_pipeline("digits")
    with pytest.raises(InputError, match="1 x 2 x 2, the network works on 1 x 8 x 8"):
        fit_start(images_of(tmp_path, torch.rand(40, *SHAPE, generator=generator(1))), pipe.unet, scheduler("ddim"))
    data = images("digits")
    laws = candidate_laws(data, clusters=5)
    assert [type(law) for law in laws] == [Gaussian, PrincipalMixture, PrincipalMixture]
    assert laws[1].classes.tolist() == list(range(10))
    assert laws[2].inner.components == 5
    start = fit_start(data, pipe.unet, scheduler("dpm++2m", like=pipe.scheduler), 3, clusters=5, check=False)
    assert start.choice.images == 180  # a fifth of 898, kept back from the fit
    assert start.law is None or start.law.gaussian.moments.count == 718
