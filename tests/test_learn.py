"""Learned steps: fitted to fine trajectories, never worse on others, saved, used everywhere, refused where unfit."""

import copy

import numpy as np
import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.networks.denoiser import as_denoiser
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError, read_tensors, write_tensors
from symbreak.runtime.run import Run
from symbreak.start.fit import late_start
from symbreak.start.late_start import LateStart, standard_start, with_steps
from symbreak.start.learn import fine_levels, flow_ends, learn_steps
from symbreak.start.learned_steps import Learned
from symbreak.start.loading import load_pipeline
from symbreak.start.pipeline import LateStartPipeline
from symbreak.start.sample import _Images, decisive, generate, integrate
from tests.test_free_grid import Small
from tests.worlds import full_mixture, gaussian_law

ASK_ONCE = ["dpm++2m", "unipc", "euler", "flow-euler"]
SLOW = ["dpm++2s", "deis", "lms", "ddim", "flow-dpm++2m", "flow-unipc", "edm-euler", "edm-dpm++2m"]


def law_network():
    law = full_mixture(k=3, dim=4, seed=0)
    network = as_denoiser(law)
    network.sigma_range = (0.02, 80.0)
    return law, network


def settings(name):
    return {"clip_sample": False} if name == "ddim" else {}


def off(start, law, ends, noise):
    """Root mean square distance of a start's final samples to ends."""
    final = integrate(as_unet(law, start.full), start, noise, micro_batch=len(noise))
    return float((final - ends).flatten(1).square().sum(1).mean().sqrt())


@pytest.fixture(scope="module")
def flow():
    """Noise that nothing was learned from, and where the law's exact flow carries it."""
    law, _ = law_network()
    noise = torch.randn(200, 4, generator=generator(9))
    return noise, law.denoise(law.transport(noise.double(), 1e-2, steps=60), 1e-2)


@pytest.mark.parametrize("name", [*ASK_ONCE, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_learned_steps_end_nearer_to_the_flow(name, flow):
    """Against the law's exact flow, on other noise than what was learned from."""
    law, network = law_network()
    start = late_start(scheduler(name, **settings(name)), law, 3, at=NoiseLevel(3.0), check=False)
    learned = learn_steps(start, network, 32)
    noise, ends = flow
    assert off(learned, law, ends, noise) < 0.8 * off(start, law, ends, noise)
    assert learned.learned.distances[0] < learned.learned.distances[1]


def test_zeros_are_the_sampler_itself():
    law, _ = law_network()
    for name in ("dpm++2m", "euler", "flow-euler"):
        start = late_start(scheduler(name), law, 4, at=NoiseLevel(3.0), check=False)
        zeros = with_steps(start, Learned(((0.0, 0.0),) * 4, (1, 1), (0.0, 0.0), 0))
        unet = as_unet(law, start.full)
        assert torch.equal(*(generate(unet, s, range(5), micro_batch=5) for s in (start, zeros)))


def test_one_euler_step_is_learned_exactly():
    """Of one step from pure noise, one number: least squares in closed form."""
    law = gaussian_law()
    start = standard_start(scheduler("euler"), 1)
    network = as_denoiser(law)
    network.sigma_range = (0.005, 200.0)
    learned = learn_steps(start, network, 8)
    noise = torch.randn(8, 1, 2, 2, generator=generator(0, 25))
    x = start.ve(noise)
    ends = flow_ends(network, x, fine_levels(network, start.level.sigma))
    y = law.denoise(x.double(), start.level.sigma)
    e = (x - y)[2:].flatten()  # in units of sigma, as the scale of the last step
    expected = float(e @ (ends - y)[2:].flatten() / (e @ e))
    assert learned.learned.coefficients[0][0] == pytest.approx(expected, rel=1e-3)
    assert learned.learned.coefficients[0][1] == 0.0


def test_evaluations_are_counted(monkeypatch):
    law, network = law_network()
    start = late_start(scheduler("dpm++2m"), law, 3, at=NoiseLevel(3.0), check=False)

    class Counting:
        shape, sigma_range, count = network.shape, network.sigma_range, 0

        def __call__(self, x, sigma):
            self.count += len(x)
            return network(x, sigma)

    counting = Counting()
    learned = learn_steps(start, counting, 16)
    assert learned.learned.evaluations == counting.count
    assert f"cost {counting.count:,} network evaluations" in learned.explain()
    assert learned.to_dict()["learned"]["evaluations"] == counting.count
    assert learned.to_dict()["learned"]["trajectories"] == (12, 4)
    assert "3 learned steps" in repr(learned)
    again = learn_steps(start, network, 16)
    assert again.learned.coefficients == learned.learned.coefficients
    assert learn_steps(start, network, 16, seed=1).learned.coefficients != learned.learned.coefficients


def test_no_nearer_steps_are_left_out(monkeypatch):
    law, network = law_network()
    start = late_start(scheduler("dpm++2m"), law, 3, at=NoiseLevel(3.0), check=False)

    class Wrong:
        def __init__(self, x):
            self.x = x + 0.5  # of every coefficient

    monkeypatch.setattr("symbreak.start.learn.least_squares", lambda f, theta, *_, **__: Wrong(theta))
    same = learn_steps(start, network, 16)
    assert same.learned is None
    assert "the sampler's own steps stand" in same.explain()
    assert "network evaluations of one sample, once" in same.explain()
    assert same.scheduler is start.scheduler


def test_with_every_grid_saved_and_used(tmp_path):
    law, network = law_network()
    data = law.sample(64, 0.0, generator(2)).float()
    base = scheduler("dpm++2m")
    with_network = {"denoiser": network, "check": False, "learn": 8}
    for how in (
        {"at": NoiseLevel(3.0)},
        {"grid": [3.0, 1.0, 0.3]},
        {"at": "standard", "grid": "entropic", "data": data},
    ):
        start = late_start(base, law, 3, **{**with_network, **how})
        assert start.learned is not None
        back = LateStart.load(start.save(tmp_path / "start.safetensors"))
        assert (back.learned, back.grid) == (start.learned, start.grid)
        unet = as_unet(law, base)
        some = [generate(unet, s, [0, 3], micro_batch=2, clamp=False) for s in (start, back)]
        assert torch.equal(*some)
    tensors, metadata = read_tensors(tmp_path / "start.safetensors")
    assert metadata["version"] == "3"
    short = metadata | {"start": metadata["start"].replace('"steps": 3', '"steps": 2')}
    write_tensors(tmp_path / "short.safetensors", tensors, short)
    with pytest.raises(InputError, match=r"3 levels for 2 steps"):
        LateStart.load(tmp_path / "short.safetensors")


def test_identities_tell_learned_steps_apart(tmp_path):
    law, network = law_network()
    start = late_start(scheduler("dpm++2m"), law, 3, at=NoiseLevel(3.0), check=False)
    learned = learn_steps(start, network, 16)
    unet = as_unet(law, start.full)
    assert decisive(unet, start, 4)["identity"].get("learned") is None
    assert decisive(unet, learned, 4)["identity"]["learned"]
    keys = [_Images(unet, s, [0], 4).key(Run(tmp_path)) for s in (start, learned)]
    assert keys[0] != keys[1]


def test_pipelines_use_learned_steps():
    pipe = load_pipeline("digits")
    base, network = scheduler("dpm++2m", like=pipe.scheduler), denoiser(pipe.unet, pipe.scheduler)
    law = Gaussian.fit(images("digits"))
    start = late_start(base, law, 2, at=NoiseLevel(3.0), denoiser=network, check=False, learn=8)
    assert start.learned.distances[0] < start.learned.distances[1]
    ours = LateStartPipeline(pipe.unet, start.scheduler, start)
    seeds = [torch.Generator().manual_seed(s) for s in range(3)]
    x = ours(3, seeds, output_type="latent").images
    assert torch.equal(x.clamp(-1, 1), generate(pipe.unet, start, range(3)))


def test_other_pipelines_keep_learned_steps_and_their_number():
    law, network = law_network()
    start = learn_steps(late_start(scheduler("dpm++2m"), law, 3, at=NoiseLevel(3.0), check=False), network, 16)
    unet, noise = as_unet(law, start.full), torch.randn(2, 4, generator=generator(1))
    ready = start.fresh()

    def loop(count):
        ready.set_timesteps(count)
        state = start(noise)
        for t in ready.timesteps:
            state = ready.step(unet(state, t).sample, t, state).prev_sample
        return state

    whole = loop(3)
    ready.set_timesteps(3)
    t = ready.timesteps[0]
    ready.step(unet(start(noise), t).sample, t, start(noise))  # and left off
    assert torch.equal(loop(3), whole)
    with pytest.raises(InputError, match="for 4 times; the start's levels or steps were made for 3"):
        loop(4)
    on = late_start(scheduler("euler"), law, 3, at="standard", grid="free")
    other = on.fresh()
    other.set_timesteps(3)
    assert torch.equal(other.sigmas, on.scheduler.sigmas)
    copied = copy.deepcopy(ready)
    assert copied.step.scheduler is copied


def test_learned_steps_of_another_network_raise():
    law, base, net = gaussian_law(), scheduler("dpm++2m"), Small(1.0)
    start = late_start(base, law, 3, at=NoiseLevel(3.0), denoiser=denoiser(net, base), check=False, learn=8)
    assert start.learned.network == (3.0, 1.0)
    generate(net, start, [0], micro_batch=1)
    with pytest.raises(InputError, match="learned steps were made for a network of 3 weights") as caught:
        generate(Small(1.5), start, [0], micro_batch=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "how", "match"),
    [
        ("dpm++2m", {"denoiser": None}, "came without the network"),
        ("dpm++2m", {"learn": 1}, "learn=1; expected a whole number of trajectories, at least 2"),
        ("dpm++2m", {"learn": True}, "learn=True; expected a whole number"),
        ("dpm++2m", {"learn": 2.5}, "learn=2.5; expected a whole number"),
        ("dpm++2m", {"learn": 6}, "leaves 5 trajectories to fit the 7 coefficients of 4 steps on; .* learn=10 or more"),
        ("ddpm", {}, "DDPMScheduler draws noise"),
        ("sde-dpm++2m", {}, "DPMSolverMultistepScheduler draws noise"),
        ("euler-a", {}, "EulerAncestralDiscreteScheduler draws noise"),
        ("lcm", {}, "LCMScheduler draws noise"),
        ("heun", {}, "HeunDiscreteScheduler asks the network 7 times in 4 steps"),
        ("kdpm2", {}, "asks the network 7 times in 4 steps"),
        ("pndm", {}, "asks the network .* in 4 steps"),
    ],
)
def test_bad_input(name, how, match):
    law, network = law_network()
    how = {"denoiser": network, "learn": 32, "at": NoiseLevel(3.0), "check": False} | how
    with pytest.raises(InputError, match=match) as caught:
        late_start(scheduler(name), law, 4, **how)
    assert "\n" not in str(caught.value)


def test_classes_are_learned_with():
    """A network with classes is asked with the classes that come, and says so where none do."""
    law, network = law_network()
    asked = []

    class Classy:
        shape, sigma_range, num_class_embeds, condition = network.shape, network.sigma_range, 3, {}

        def bind(self, class_labels):
            asked.extend(class_labels.tolist())
            return network

        def __call__(self, x, sigma):
            return network(x, sigma)

    start = late_start(scheduler("euler"), law, 2, at=NoiseLevel(3.0), check=False)
    with pytest.raises(InputError, match="3 classes, but no labels came"):
        learn_steps(start, Classy(), 8)
    asked.clear()
    assert learn_steps(start, Classy(), 8, labels=np.array([0, 2])).learned.evaluations
    assert set(asked) == {0, 2}
