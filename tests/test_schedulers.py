"""Every supported diffusers scheduler, after a late start, gives back the mean and covariance of an exact Gaussian."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.samplers import SAMPLERS, scheduler
from symbreak.noise import NoiseLevel, schedule
from symbreak.runtime.files import InputError
from symbreak.start.cut_schedule import SUPPORTED
from symbreak.start.fit import fit_start, late_start
from symbreak.start.late_start import LateStart, standard_start
from tests.worlds import gaussian_law

STOCHASTIC = {"ddpm", "sde-dpm++2m", "euler-a", "kdpm2-a", "lcm"}
FIRST_ORDER = {"ddpm", "ddim", "euler", "euler-a", "edm-euler", "flow-euler"}
STEPS = 100


def exact(name, **settings):
    """A scheduler that changes nothing but noise: clipping is for pixels, not for a Gaussian."""
    s = scheduler(name)
    off = {k: False for k in ("clip_sample", "thresholding") if k in s.config}
    return type(s).from_config(s.config, **off, **settings)


def run(unet, start: LateStart, state, generator=None):
    s = start.fresh()
    scales = hasattr(s, "scale_model_input")
    for t in s.timesteps:
        out = unet(s.scale_model_input(state, t) if scales else state, t, return_dict=False)[0]
        extra = {} if generator is None else {"generator": generator}
        state = s.step(out, t, state, return_dict=False, **extra)[0]
    return state.double().flatten(1)


class Consistency:
    """The Gaussian's flow to zero noise in place of its posterior mean: what LCM's network has learned."""

    def __init__(self, law):
        self.law, self.shape, self.sigma_range = law, law.shape, (0.0, float("inf"))

    def __call__(self, x, sigma):
        s = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        flat = self.law._map(x.flatten(1), lambda v, s2: (v / (v + s2)).sqrt(), s * s)
        return flat.reshape(x.shape)


def recovered(name, law, start, unet):
    """Mean and covariance of the sampler's output: exactly, or from 40,000 samples for stochastic ones."""
    d = law.moments.dim
    if name in STOCHASTIC:
        g = torch.Generator().manual_seed(5)
        noise = torch.randn(40_000, *law.shape, generator=g)
        m = Moments.fit([run(unet, start, start(noise), g)])
        return m.mean.reshape(-1), m.cov
    # A deterministic sampler is affine here: its action on a basis gives its law without sampling error.
    basis = torch.cat([torch.zeros(1, d), 30 * torch.eye(d)]).reshape(-1, *law.shape)
    out = run(unet, start, start(basis))
    linear = (out[1:] - out[0]).T / 30
    return out[0], linear @ linear.T


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigma", [0.8, 3.0, 12.0])
def test_mean_and_covariance_come_back(name, sigma):
    law = gaussian_law()
    base = exact(name)
    steps = 8 if name == "lcm" else STEPS
    start = late_start(base, law, steps, at=NoiseLevel(sigma), check=False)
    unet = as_unet(Consistency(law) if name == "lcm" else law, base)
    mean, cov = recovered(name, law, start, unet)
    # Discretization at 100 steps (first-order samplers err by about 1/n, slower from high noise), float32
    # schedules, and for stochastic samplers 40,000 draws (0.7 % on a variance, 2.1 % at three errors).
    tolerance = (0.07 if name in FIRST_ORDER else 0.02) + (0.03 if name in STOCHASTIC else 0.0)
    scale = float(law.eigenvalues[0])
    assert float((cov - law.moments.cov).abs().max()) < tolerance * scale
    assert float((mean - law.moments.mean.reshape(-1)).abs().max()) < 0.5 * tolerance * scale**0.5


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - STOCHASTIC))
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    sigma=st.floats(0.4, 20), top=st.floats(0.5, 30), prediction=st.sampled_from(["epsilon", "v_prediction", "sample"])
)
def test_any_level_spectrum_and_prediction(name, sigma, top, prediction):
    law = gaussian_law(eigenvalues=(top, 1.0, 0.5, 0.25))
    kinds = {} if name.startswith("flow") else {"prediction_type": prediction}
    if name.startswith("edm") and prediction == "sample":
        kinds = {}  # EDM preconditioning has no sample prediction
    base = exact(name, **kinds)
    start = late_start(base, law, STEPS // 2, at=NoiseLevel(sigma), check=False)
    try:
        _, cov = recovered(name, law, start, as_unet(law, base))
    except NotImplementedError:
        reject()  # Heun and KDPM2 themselves know no sample prediction
    # PNDM's multistep formula starts at first order, which shows from very high noise.
    tolerance = 0.1 if name in FIRST_ORDER | {"pndm"} else 0.03
    assert float((cov - law.moments.cov).abs().max()) < tolerance * max(1.0, top)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_level_is_the_one_the_scheduler_begins_at(name):
    """One noised point mass: if the level read back were wrong, the first state would have the wrong spread."""
    law = gaussian_law()
    base = exact(name)
    start = late_start(base, law, 5, at=NoiseLevel(3.0))
    full = schedule(base)
    assert start.level.sigma == pytest.approx(3.0, rel=0.05)
    # What the network is told at the first call is the level of the state it sees (Karras grids round t).
    told = full.level(float(start.scheduler.timesteps[0]))
    assert told.sigma == pytest.approx(start.level.sigma, rel=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_counted_not_steps(name):
    law = gaussian_law()
    base = exact(name)
    start = late_start(base, law, 7, at=NoiseLevel(3.0))
    calls = 0
    inner = as_unet(law, base)

    class Counting(torch.nn.Module):
        def forward(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            return inner(*args, **kwargs)

    generator = torch.Generator().manual_seed(0) if name in STOCHASTIC else None
    run(Counting(), start, start(torch.zeros(2, *law.shape)), generator)
    assert calls == start.calls
    assert start.calls == {"pndm": 8, "heun": 13, "kdpm2": 13, "kdpm2-a": 13, "flow-heun": 13}.get(name, 7)


def test_every_supported_class_is_tested():
    assert {class_name for class_name, _ in SAMPLERS.values()} == SUPPORTED


def test_a_late_start_has_less_discretization_error():
    """In a Gaussian world, where the law is exact, a late start with few calls is always better."""
    spectrum = tuple(100.0 / k**1.5 for k in range(1, 17))
    law = Gaussian(gaussian_law(eigenvalues=spectrum, shape=(1, 4, 4)).moments)
    errors = {}
    for name, spacing in (("dpm++2m", "trailing"), ("dpm++2m-karras", "trailing")):
        base = exact(name, timestep_spacing=spacing)
        for kind in ("standard", "late"):
            start = standard_start(base, 5) if kind == "standard" else late_start(base, law, 5, at=400, check=False)
            _, cov = recovered(name, law, start, as_unet(law, base))
            values = torch.linalg.eigvalsh(cov).clamp_min(0)
            errors[name, kind] = float(((values.sqrt() - law.eigenvalues.flip(0).sqrt()) ** 2).sum())
    assert errors["dpm++2m", "late"] < errors["dpm++2m", "standard"]
    assert errors["dpm++2m-karras", "late"] < errors["dpm++2m-karras", "standard"]


@pytest.mark.parametrize(
    ("cls", "mend"),
    [("IPNDMScheduler", "PNDMScheduler"), ("DDIMInverseScheduler", "use one of"), ("RePaintScheduler", "use one of")],
)
def test_unsupported_schedulers_are_refused_with_the_mend(cls, mend):
    with pytest.raises(InputError, match=f"{cls} cannot be cut.*{mend}"):
        late_start(getattr(diffusers, cls)(), gaussian_law(), 5, at=400)


@pytest.mark.parametrize(
    "call",
    [
        lambda name: late_start(name, gaussian_law(), 3),
        lambda name: fit_start(None, as_unet(gaussian_law(), scheduler("ddim")), name),
        lambda name: standard_start(name, 3),
        lambda name: denoiser(as_unet(gaussian_law(), scheduler("ddim")), name),
        lambda name: scheduler("ddim", like=name),
    ],
)
def test_a_name_or_a_pipeline_in_a_schedulers_place(call):
    with pytest.raises(InputError, match=r"'dpm\+\+2m' is a name; .* Pass sb.scheduler\('dpm\+\+2m', like="):
        call("dpm++2m")
    with pytest.raises(InputError, match="SimpleNamespace came in a scheduler's place, and has one"):
        call(SimpleNamespace(scheduler=scheduler("ddim")))


def test_pure_noise_has_no_late_start_but_a_standard_one():
    law = gaussian_law()
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    for base, top in ((zero, 999), (diffusers.FlowMatchEulerDiscreteScheduler(), 1000)):
        with pytest.raises(InputError, match="finite level"):
            late_start(base, law, 5, at=top)
    base = diffusers.FlowMatchEulerDiscreteScheduler()
    _, cov = recovered("flow-euler", law, standard_start(base, 100), as_unet(law, base))
    assert float((cov - law.moments.cov).abs().max()) < 0.1 * 4


def test_zero_snr_and_flow_settings():
    law = gaussian_law()
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    start = late_start(zero, law, 100, at=NoiseLevel(3.0))
    assert float(start.scheduler.alphas_cumprod[10]) == pytest.approx(float(zero.alphas_cumprod[10]), rel=1e-4)
    _, cov = recovered("ddim", law, start, as_unet(law, zero))
    assert float((cov - law.moments.cov).abs().max()) < 0.07 * 4
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    start = late_start(shifted, law, 100, at=NoiseLevel(3.0))
    assert start.level.sigma == pytest.approx(3.0, rel=1e-4)
    _, cov = recovered("flow-euler", law, start, as_unet(law, shifted))
    assert float((cov - law.moments.cov).abs().max()) < 0.1 * 4
    with pytest.raises(InputError, match="fixed shift"):
        late_start(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), law, 5, at=NoiseLevel(3.0))
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert late_start(flow, law, 5, at=NoiseLevel(3.0)).level.sigma == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_cut_flow_wastes_no_evaluation_on_its_last_step(shift):
    """Equal steps down to 0; the class's own grid, which ends at 1 / T, is up to three times as far from the law."""
    law = gaussian_law()
    base = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    def distance(start):
        _, cov = recovered("flow-euler", law, start, as_unet(law, base))
        values = torch.linalg.eigvalsh(cov).clamp_min(0).sqrt() - law.eigenvalues.flip(0).sqrt()
        return float(values.square().sum())

    for steps, least in ((2, 3.5), (3, 2.0), (4, 1.6), (5, 1.4)):
        start = late_start(base, law, steps, at=NoiseLevel(1.0), check=False)
        s = start.scheduler.sigmas.double()
        equal = s / (shift - (shift - 1) * s)  # the shift undone
        torch.testing.assert_close(equal, float(equal[0]) * torch.linspace(1, 0, steps + 1, dtype=s.dtype))
        own = start.fresh()
        own.sigma_min = base.sigma_min
        own.set_timesteps(steps)
        own.set_begin_index(0)
        assert float(own.sigmas[-2]) < 0.01
        assert distance(dataclasses.replace(start, scheduler=own)) > least * distance(start)
        again = start.fresh()
        again.set_timesteps(steps)  # as pipelines do
        assert torch.equal(again.sigmas, start.scheduler.sigmas)
    for other in (
        diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_karras_sigmas=True),
    ):  # a last step of Euler spoils a second-order sampler; other grids have their own ends
        assert float(late_start(other, law, 4, at=NoiseLevel(1.0), check=False).scheduler.sigmas[-2]) < 0.01


def test_the_cut_scheduler_survives_set_timesteps_and_save(tmp_path):
    """Pipelines call set_timesteps again, and users save: the cut must live in the config."""
    law = gaussian_law()
    for name in SAMPLERS:
        if name.startswith("flow"):
            continue
        start = late_start(exact(name), law, 6, at=NoiseLevel(3.0))
        start.scheduler.save_pretrained(tmp_path / name)
        back = type(start.scheduler).from_pretrained(tmp_path / name)
        back.set_timesteps(6)
        assert torch.allclose(back.timesteps.double(), start.scheduler.timesteps.double()), name


NETWORKS = {
    "defaults": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "v": {"prediction_type": "v_prediction"},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
}
BETA_SAMPLERS = sorted(name for name in SAMPLERS if not name.startswith(("edm", "flow")))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", BETA_SAMPLERS)
def test_the_betas_of_the_network_in_memory_and_from_disk(name, kind, tmp_path):
    """diffusers drops the settings it noted as defaults: every sampler then has its own class's betas instead."""
    like = diffusers.DDPMScheduler(num_train_timesteps=1000, clip_sample=False, **NETWORKS[kind])
    like.save_pretrained(tmp_path)
    made = scheduler(name, like=like)
    assert dict(made.config) | NOTED == dict(scheduler(name, like=type(like).from_pretrained(tmp_path)).config) | NOTED
    # a last step of no signal has 2^-24, or less where the one before it has less
    torch.testing.assert_close(made.alphas_cumprod, like.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert bool((made.alphas_cumprod.diff() < 0).all())
    if name in STOCHASTIC or kind == "laplace":  # whose steps are too coarse at low noise for a number
        return
    law = gaussian_law()
    start = late_start(made, law, STEPS, at=NoiseLevel(3.0), check=False)
    _, cov = recovered(name, law, start, as_unet(law, like))
    tolerance = 0.07 if name in FIRST_ORDER else 0.02  # as above
    assert float((cov - law.moments.cov).abs().max()) < tolerance * float(law.eigenvalues[0])


NOTED = dict.fromkeys(("_use_default_values", "_class_name", "_diffusers_version"))


def test_a_scheduler_without_a_network_has_its_classs_own_settings():
    assert scheduler("dpm++2m").config.timestep_spacing == "linspace"
    assert scheduler("heun", beta_start=1e-3).betas[0] == pytest.approx(1e-3)
    like = diffusers.DDPMScheduler()
    assert scheduler("dpm++2m", like=like).config.timestep_spacing == like.config.timestep_spacing == "leading"
    assert scheduler("heun", like=like, beta_start=1e-3).betas[0] == pytest.approx(1e-3)  # who asks gets other betas


@pytest.mark.parametrize("name", ["dpm++2m", "unipc", "euler", "euler-a"])
def test_zero_signal_that_falls_below_diffuserss_own_floor(name):
    """Linear betas leave the step before the last one 4e-9 of signal, less than the 6e-8 diffusers gives the last."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_schedule": "linear"}
    like = diffusers.DDIMScheduler(clip_sample=False, **settings)
    full = schedule(scheduler(name, like=like))
    assert full.sigma_range[1] > full.level(998).sigma > 1e4
    theirs = getattr(diffusers, SAMPLERS[name][0])(**settings)
    assert schedule(theirs).sigma_range[1] == float("inf")
    assert scheduler("ddim", like=theirs).alphas_cumprod[998] == pytest.approx(float(like.alphas_cumprod[998]))


@pytest.mark.parametrize("name", ["dpm++2m-karras", "unipc-karras"])
@pytest.mark.parametrize("steps", [3, 6, 7, 20])
def test_karras_grids_that_round_two_steps_to_one_time(name, steps):
    law = gaussian_law()
    like = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    start = standard_start(scheduler(name, like=like), steps)
    state = run(as_unet(law, like), start, start(torch.zeros(2, *law.shape)))
    assert bool(torch.isfinite(state).all())


CONTINUOUS = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}


def test_networks_of_continuous_time():
    law = gaussian_law()
    base = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **CONTINUOUS)
    full = schedule(base)
    assert full.sigma_range == pytest.approx((0.002, 700.0))
    assert full.time(5.0) == pytest.approx(0.402359, abs=1e-6)  # log(5) / 4
    unet = as_unet(law, base)
    x = 3 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(denoiser(unet, base)(x, 5.0), law.denoise(x, 5.0), rtol=1e-6, atol=1e-6)
    start = late_start(base, law, STEPS, at=NoiseLevel(3.0), check=False)
    assert start.level.sigma == pytest.approx(3.0)
    _, cov = recovered("euler", law, start, unet)
    assert float((cov - law.moments.cov).abs().max()) < 0.07 * 4
    assert schedule(scheduler("euler", like=base)).sigma_range == pytest.approx((0.002, 700.0))
    with pytest.raises(InputError, match="Use the sampler euler"):
        scheduler("dpm++2m", like=base)
    with pytest.raises(InputError, match="use_karras_sigmas=True"):
        late_start(diffusers.EulerDiscreteScheduler(**CONTINUOUS), law, 5, at=NoiseLevel(1.5), check=False)


@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("top", [14.6, 80.0])
def test_a_sigma_max_in_the_config_does_not_move_the_cut(grid, top):
    law = gaussian_law()
    base = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", sigma_max=top, **{grid: True})
    start = late_start(base, law, 50, at=NoiseLevel(1.5), check=False)
    assert start.level.sigma == pytest.approx(1.5, rel=0.01)
    assert float(start.scheduler.sigmas[0]) == pytest.approx(1.5, rel=0.01)
    _, cov = recovered("euler", law, start, as_unet(law, base))
    assert float((cov - law.moments.cov).abs().max()) < 0.1 * 4
    assert late_start(base, law, 2, at=1, check=False).level.sigma == pytest.approx(schedule(base).level(1).sigma)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a division by zero: the line says it
def test_grids_that_cannot_be_made_are_one_line():
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(InputError, match="Ask for more"):
        standard_start(flow(shift_terminal=0.02), 1)
    with pytest.raises(InputError, match="fixed shift"):
        standard_start(flow(use_dynamic_shifting=True), 5)
    with pytest.raises(InputError, match="log_linear"):
        late_start(diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"), gaussian_law(), 5, at=400)
    like = diffusers.DDPMScheduler(prediction_type="sample")
    for name in ("pndm", "euler-a", "kdpm2", "kdpm2-a"):
        with pytest.raises(InputError, match="predict the sample; expected ddim"):
            scheduler(name, like=like)
    with pytest.raises(ValueError, match="alpha-bar falling"):
        schedule(diffusers.DDPMScheduler(trained_betas=[1e-4, float("nan"), 1e-2]))
