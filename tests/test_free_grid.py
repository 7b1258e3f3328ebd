"""Free grids: levels of all steps found on the sampler's cost, given, saved, and refused where they do not fit."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from symbreak.laws import Gaussian, Mixture
from symbreak.networks.denoiser import as_denoiser
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import SAMPLERS, scheduler
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.losses import loss_curve
from symbreak.runtime.files import InputError
from symbreak.start.cut_schedule import no_levels, visited
from symbreak.start.fit import late_start
from symbreak.start.free_grid import entropic
from symbreak.start.late_start import Grid, LateStart, LateStartWarning, on_grid
from symbreak.start.sample import generate
from symbreak.start.sampler_cost import SamplerCost
from tests.worlds import full_mixture, gaussian_law

TAKE_LEVELS = {
    "dpm++2m",
    "dpm++2m-karras",
    "sde-dpm++2m",
    "dpm++2s",
    "ddpm",
    "heun",
    "euler",
    "edm-euler",
    "flow-euler",
    "unipc",
    "unipc-karras",
    "deis",
    "flow-dpm++2m",
    "flow-unipc",
}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_levels_are_taken_or_the_reason_is_named(name):
    base, levels = scheduler(name, **({"clip_sample": False} if name == "ddpm" else {})), (3.0, 1.0, 0.2)
    if name not in TAKE_LEVELS:
        assert type(base).__name__ in no_levels(base)
        with pytest.raises(InputError, match=r"takes no levels.*Use dpm"):
            on_grid(base, gaussian_law(), Grid("given", levels))
        return
    start = on_grid(base, gaussian_law(), Grid("given", levels))
    # Whole steps of the network: near 0.2 they lie 2 % apart.
    assert visited(start.scheduler, schedule(base)) == pytest.approx(levels, rel=0.012)
    assert start.level.sigma == pytest.approx(3.0, rel=0.012)
    assert start.calls == (5 if name == "heun" else 3)
    # What is sampled is what the law says, less what three steps lose: more the lower a sampler's order.
    law = gaussian_law()
    x = generate(as_unet(law, base), start, range(200), micro_batch=200, clamp=False)
    share = float(x.var(0).sum() / law.eigenvalues.sum())
    assert (0.65 if name.startswith(("dpm", "heun", "unipc", "deis")) else 0.2) < share < 1.35
    assert float((x.mean(0) - law.moments.mean).abs().max()) < 0.5


@pytest.mark.parametrize("name", ["dpm++2m", "heun", "euler", "edm-euler", "flow-euler", "ddpm"])
def test_a_free_grid_is_never_dearer_than_the_three(name):
    law = gaussian_law()
    base = scheduler(name, **({"clip_sample": False} if name == "ddpm" else {}))
    network = as_denoiser(law)
    network.sigma_range = (0.02, 80.0)
    data = law.sample(64, 0.0, generator(2)).float()
    start = late_start(base, law, 3, denoiser=network, data=data, check=False, grid="free")
    assert start.choice.chosen.cost == min(c.cost for c in start.choice.candidates)
    standard = late_start(base, law, 3, "standard", network, data, check=False, grid="free")
    assert standard.law is None
    assert all(c.law is None for c in standard.choice.candidates)
    assert standard.grid.name == "free"
    assert len(standard.grid.sigmas) == 3
    assert all(a > b for a, b in pairwise(standard.grid.sigmas))
    assert standard.choice.chosen.cost < 0.9 * min(c.cost for c in standard.choice.candidates if c.grid != "free")


def test_a_free_standard_grid_says_where_the_network_is_worse_than_the_law():
    law = gaussian_law()
    data = law.sample(128, 0.0, generator(2)).float()

    class Far(type(law)):
        """The law, far off in every direction at high noise: a network that is not yet trained."""

        def denoise(self, x, sigma):
            return super().denoise(x, sigma) + 4.0 * (float(sigma) > 3)

    for posing, warned in ((law, False), (Far(law.moments), True)):
        network = as_denoiser(posing)
        network.sigma_range = (0.02, 80.0)
        start = late_start(scheduler("dpm++2m"), law, 3, "standard", network, data, check=False, grid="free")
        notes = [n for n in start.choice.signatures if "nats worse than the law" in n]
        assert bool(notes) == warned
    assert notes[0].startswith("The free grid was found with a law in the network's place, but above sigma")
    with pytest.warns(LateStartWarning, match="nats worse than the law"):
        late_start(scheduler("dpm++2m"), law, 3, "standard", network, data, grid="free")


def test_without_a_network_the_law_stands_in_its_place():
    law = gaussian_law()
    start = late_start(scheduler("dpm++2m"), law, 4, at=NoiseLevel(3.0), grid="free")
    assert start.level.sigma == pytest.approx(3.0, rel=0.02)
    assert start.grid.sigmas[0] == 3.0
    assert "by grid: free" in start.explain()
    for name in ("free: ", "Karras: ", "uniform: "):
        assert name in start.explain()
    white = late_start(scheduler("dpm++2m"), law, 4, at="standard", grid="free")
    assert white.law is None
    assert white.level.sigma > 10
    kept = late_start(scheduler("ddim"), law, 4, at=NoiseLevel(3.0), grid="free")
    assert kept.grid is None
    assert "DDIMScheduler takes no levels" in kept.explain()


def test_samplers_without_levels_keep_the_three_grids_and_say_so():
    law = gaussian_law()
    data = law.sample(64, 0.0, generator(2)).float()
    start = late_start(scheduler("lms"), law, 3, denoiser=law, data=data, check=False, grid="free")
    assert start.grid is None
    assert "LMSDiscreteScheduler takes no levels" in start.explain()
    assert {c.grid for c in start.choice.candidates if c.law is not None} == {"own", "Karras"}


def test_the_entropic_grid_has_equal_steps_of_the_rescaled_entropy():
    law = Mixture.from_parameters([[-1.0], [1.0]], 0.0)
    data = law.sample(4000, 0.0, generator(0))
    losses = loss_curve(law, data, np.geomspace(0.02, 60.0, 40))
    levels = entropic(losses, 3.0, 4)
    assert levels[0] == 3.0
    u = np.geomspace(1e-3, 3.0, 4000)
    z = np.linspace(-8, 8, 801)
    weight = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    mmse = np.array([trapezoid((1 - np.tanh((1 + s * z) / s**2) ** 2) * weight, z) for s in u])
    total = np.concatenate([[0.0], np.cumsum(np.diff(u) * (mmse / u**2)[:-1])])
    entropy = np.interp([*levels[::-1]], u, total)
    # 4,000 images: a level's loss is known to 3 %.
    assert np.diff([0.0, *entropy]) == pytest.approx(total[-1] / 4, rel=0.05)


def test_an_entropic_start_says_what_it_cost():
    law = gaussian_law()
    network = as_denoiser(law)
    network.sigma_range = (0.02, 80.0)
    data = law.sample(64, 0.0, generator(2)).float()
    start = late_start(scheduler("dpm++2m"), law, 3, denoiser=network, data=data, check=False, grid="entropic")
    assert start.grid.name == "entropic"
    assert start.grid.evaluations == 24 * 64
    assert "The grid cost 1,536 network evaluations" in start.explain()


def test_a_grid_is_saved_with_its_start(tmp_path):
    law = gaussian_law()
    for name, at in (("dpm++2m", NoiseLevel(3.0)), ("euler", NoiseLevel(3.0)), ("flow-euler", "standard")):
        start = late_start(scheduler(name), law, 3, at=at, grid="free")
        back = LateStart.load(start.save(tmp_path / "start.safetensors"))
        assert back.grid == start.grid
        assert torch.equal(back.scheduler.timesteps, start.scheduler.timesteps)
        assert torch.equal(back.scheduler.sigmas, start.scheduler.sigmas)
        unet = as_unet(law, scheduler(name))
        images = [generate(unet, s, [0, 3], micro_batch=2, clamp=False) for s in (start, back)]
        assert torch.equal(*images)
        again = late_start(scheduler(name), law, 3, at="standard" if at == "standard" else "auto", grid=start.grid)
        assert torch.equal(again.scheduler.sigmas, start.scheduler.sigmas)


class Small(torch.nn.Module):
    """A network with weights."""

    def __init__(self, scale):
        super().__init__()
        self.weight = torch.nn.Parameter(scale * torch.ones(3))
        self.net = as_unet(gaussian_law(), scheduler("dpm++2m"))
        self.config, self.dtype = self.net.config, torch.float32

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def test_a_grid_of_another_network_raises():
    law, base, net = gaussian_law(), scheduler("dpm++2m"), Small(1.0)
    data = law.sample(64, 0.0, generator(2)).float()
    start = late_start(base, law, 3, denoiser=denoiser(net, base), data=data, check=False, grid="free")
    assert start.grid.network == (3.0, 1.0)
    generate(net, start, [0], micro_batch=1)
    net.half()  # another precision is the same network
    start.grid.check(net.parameters())
    with pytest.raises(InputError, match="made for a network of 3 weights"):
        generate(Small(1.5), start, [0], micro_batch=1)
    with pytest.raises(InputError, match="made for a network of 3 weights"):
        late_start(base, law, 3, denoiser=denoiser(Small(1.5), base), grid=start.grid)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"grid": "fre"}, "grid='fre'; expected 'free'"),
        ({"grid": [3.0, 1.0]}, "a grid of 2 levels for 3 steps"),
        ({"grid": Grid("free", (3.0, 1.0))}, "a grid of 2 levels for 3 steps"),
        ({"grid": [3.0, 1.0, 1.0]}, "the levels 3, 1, 1; expected .* each below"),
        ({"grid": [3.0, 1.0, -1.0]}, "expected .* above 0"),
        ({"grid": [3.0, 1.0, "x"]}, "expected 'free'"),
        ({"grid": [3000.0, 1.0, 0.5]}, "the schedule of DPMSolverMultistepScheduler runs from"),
        ({"grid": [3.0, 1.0, 0.5], "at": 400}, "at=400 came with a grid"),
        ({"grid": [3.0, 1.0, 0.5], "law": [gaussian_law(), gaussian_law()]}, "2 laws came with a grid"),
        ({"grid": "entropic"}, "measured on a network"),
        ({"at": "standard"}, "chooses a grid, but none was named"),
        ({"grid": [0.0125, 0.0115, 0.0105]}, "3 steps are more than the"),
        ({"grid": [3.0, 1.0, 0.5], "scheduler": "ddim"}, "DDIMScheduler takes no levels"),
    ],
)
def test_bad_input(given, match):
    base, law = scheduler(given.pop("scheduler", "dpm++2m")), given.pop("law", gaussian_law())
    with pytest.raises(InputError, match=match) as caught:
        late_start(base, law, 3, **given)
    assert "\n" not in str(caught.value)


def test_more_steps_than_levels():
    with pytest.raises(InputError, match="more than the"):
        on_grid(scheduler("dpm++2m"), gaussian_law(), Grid("given", tuple(np.geomspace(0.02, 0.0101, 12))))
    with pytest.raises(InputError, match="tell apart"):
        on_grid(scheduler("edm-euler"), gaussian_law(), Grid("given", (1.0, 1.0 - 1e-9)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_free_grid_is_the_best_of_a_full_scan(seed):
    """Exact mixtures as networks: true error of the free 3-level grid within 3 % of a brute-force scan's best."""
    law = full_mixture(k=3, dim=4, seed=seed)
    base, top = scheduler("dpm++2m"), 3.0
    start = late_start(base, law, 3, at=NoiseLevel(top), grid="free", check=False)
    # The true error on other states than those that the grid was found on.
    fresh = SamplerCost(law, Gaussian(law.moments), [top], 0.2, seed=7, states=2000)

    def error(levels):
        return fresh.error(on_grid(base, law, Grid("given", (top, *levels))), random=False)

    scan = np.geomspace(2.8, 0.03, 40)
    best = min(error(pair) for pair in itertools.combinations(scan, 2))
    assert error(start.grid.sigmas[1:]) <= 1.03 * best
