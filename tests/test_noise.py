import math

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbreak.noise import NoiseLevel, generator, schedule

SIGMAS = st.floats(1e-3, 1e3)


@given(SIGMAS)
def test_views_round_trip(sigma):
    level = NoiseLevel(sigma)
    for back in (
        NoiseLevel.from_ou_time(level.ou_time),
        NoiseLevel.from_alpha_bar(level.alpha_bar),
        NoiseLevel.from_log_snr(level.log_snr),
    ):
        # 1 - alpha-bar cancels at small sigma: relative rounding 1e-16 / sigma^2
        assert back.sigma == pytest.approx(sigma, rel=1e-9)
    assert level.alpha**2 + level.std**2 == pytest.approx(1, rel=1e-12)
    assert level.is_vp
    assert level.ou_time == pytest.approx(-0.5 * math.log(level.alpha_bar), rel=1e-6, abs=1e-12)


def test_ddpm_linear_has_the_published_values():
    s = schedule("ddpm-linear")
    assert s.level(999).alpha_bar == pytest.approx(4.035829765e-5, rel=1e-9)
    for k, tau in {100: 0.05539, 250: 0.32560, 500: 1.27683, 750: 2.85689, 999: 5.05886}.items():
        assert s.level(k).ou_time == pytest.approx(tau, abs=6e-6)  # published to five digits


@pytest.mark.parametrize(("lam", "step"), [(7.66, 446), (16.72, 526), (3.05, 329), (60.52, 635)])
def test_first_step_beyond_a_spectral_time(lam, step):
    assert schedule("ddpm-linear").step(NoiseLevel(math.sqrt(lam - 1))) == step


@given(t=st.floats(0, 999))
def test_time_inverts_level(t):
    for s in (schedule("ddpm-linear"), schedule("cosine")):
        assert s.time(s.level(t)) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "ou",
        "edm",
    ],
)
def test_every_kind_of_schedule_round_trips(scheduler):
    s = schedule(scheduler)
    for sigma in (0.05, 1.0, 20.0):
        level = s.level(s.time(sigma))
        assert level.sigma == pytest.approx(sigma, rel=1e-6)


def test_frames():
    assert schedule(diffusers.EDMEulerScheduler()).level(0.25 * math.log(2.0)).alpha == 1.0
    flow = schedule(diffusers.FlowMatchEulerDiscreteScheduler()).level(750.0)
    assert (flow.alpha, flow.std) == pytest.approx((0.25, 0.75))
    assert schedule("ddpm-linear").level(400).is_vp


def test_cosine_is_diffusers_cosine():
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = schedule("cosine")
    for k in (0, 300, 700, 990):
        assert ours.level(k).alpha_bar == pytest.approx(float(theirs[k]), rel=2e-5)  # theirs is float32


def test_zero_snr_schedules_end_in_pure_noise():
    s = schedule(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    assert s.level(999).sigma == math.inf
    assert s.level(999).std == 1.0
    for t in (500.0, 998.5):
        assert s.time(s.level(t)) == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize("sigma", [-1.0, math.nan])
def test_impossible_levels_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        NoiseLevel(sigma)


def test_outside_the_schedule():
    s = schedule("ddpm-linear")
    with pytest.raises(ValueError, match="0 to 999"):
        s.level(1000)
    with pytest.raises(ValueError, match="outside the schedule"):
        s.time(1e4)
    with pytest.raises(ValueError, match="unknown schedule"):
        schedule("nope")
    with pytest.raises(TypeError, match="alphas_cumprod"):
        schedule(3)
    with pytest.raises(ValueError, match="continuous"):
        schedule("ou").step(1.0)


def test_generators_are_keyed_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    draws = {tuple(torch.randn(3, generator=generator(*key)).tolist()) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(draws) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_a_seed_below_zero_is_one_line():
    with pytest.raises(ValueError, match="a seed of -1; expected a whole number of at least 0"):
        generator(-1, 31)
