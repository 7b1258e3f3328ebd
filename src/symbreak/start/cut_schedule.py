"""Cutting a schedule: a scheduler that begins at a level.

Beta-type schedules are cut by rebuilding the scheduler from its first t + 1 betas, so the network still
sees its own times; EDM schedulers by ``sigma_max``; flow matching with the shift undone first, Euler's in equal steps
down to 0. The level at which the scheduler then really begins is read back from it. Some classes can also be given all
of their levels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from symbreak.networks.samplers import check_is_scheduler, realised_betas
from symbreak.networks.types import Scheduler
from symbreak.noise import NoiseLevel, Schedule, flow_sigmas, schedule
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values

__all__ = [
    "SUPPORTED",
    "begins_at",
    "check_levels",
    "check_scheduler",
    "check_steps",
    "check_takes_levels",
    "cut_scheduler",
    "no_levels",
    "schedule_of",
    "scheduler_on",
    "takes",
    "timed",
    "visited",
]

# States of VE live in that frame, x = x_0 + sigma eps, those of the other beta-type schedulers in the VP frame. The
# level of the first step is the first entry of ``sigmas``, for STEPS that of the first timestep.
VE, SIGMAS, STEPS, EDM, FLOW = "VE", "sigmas", "steps", "EDM", "flow"
KINDS = {
    "EulerDiscreteScheduler": VE,
    "EulerAncestralDiscreteScheduler": VE,
    "HeunDiscreteScheduler": VE,
    "LMSDiscreteScheduler": VE,
    "KDPM2DiscreteScheduler": VE,
    "KDPM2AncestralDiscreteScheduler": VE,
    "DPMSolverMultistepScheduler": SIGMAS,
    "DPMSolverSinglestepScheduler": SIGMAS,
    "UniPCMultistepScheduler": SIGMAS,
    "DEISMultistepScheduler": SIGMAS,
    "DDPMScheduler": STEPS,
    "DDIMScheduler": STEPS,
    "PNDMScheduler": STEPS,
    "LCMScheduler": STEPS,
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
}
SUPPORTED = frozenset(KINDS)
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SECOND_ORDER = {"FlowMatchHeunDiscreteScheduler"}  # whose step to 0 is Euler's and had better be short
# These step from k to k - T // n whatever their grid says, so T has to be a multiple of n.
WHOLE_STRIDE = {"DDIMScheduler", "PNDMScheduler"}
# Classes whose set_timesteps takes the levels of all steps, and how: whole or fractional steps of the network, sigmas,
# or places between sigma_max and sigma_min. Those that are left with other levels step along them, but take none.
WHOLE, FRACTIONAL, PLACES, LEFT = "whole", "fractional", "places", "left"
GIVEN = {
    "DPMSolverMultistepScheduler": WHOLE,
    "DPMSolverSinglestepScheduler": WHOLE,
    "DDPMScheduler": WHOLE,
    "UniPCMultistepScheduler": LEFT,
    "DEISMultistepScheduler": LEFT,
    "HeunDiscreteScheduler": FRACTIONAL,
    "EulerDiscreteScheduler": SIGMAS,
    "EDMEulerScheduler": PLACES,
    "FlowMatchEulerDiscreteScheduler": FLOW,
}
OWN_LEVELS = {  # why others cannot
    "DDIMScheduler": "its steps are all of one length",
    "PNDMScheduler": "its steps are all of one length",
    "LCMScheduler": "it knows only the steps of its own coarse grid",
}
NOISE = 1 - 1e-6  # share of noise that diffusers takes for pure noise along flow matching's levels
SPACED = (*GRIDS, "use_lu_lambdas")  # which override levels that are given
INSTEAD = {
    "IPNDMScheduler": "it takes trained_betas as its time grid; use PNDMScheduler or DPMSolverMultistepScheduler"
}


def takes(scheduler: Scheduler, setting: str) -> bool:
    """Whether a scheduler's class has a setting."""
    return setting in inspect.signature(type(scheduler).__init__).parameters


def check_unclipped(scheduler: Scheduler, what: str) -> None:
    """A scheduler that cuts every predicted sample to the range of pixels raises an error, where samples are none."""
    for setting in ("clip_sample", "thresholding"):
        if takes(scheduler, setting) and scheduler.config.get(setting):
            name = type(scheduler).__name__
            raise InputError(
                f"{name} cuts every predicted sample to [-1, 1] ({setting}=True), which would spoil {what}. Pass "
                f"sb.scheduler(..., {setting}=False), or take a sampler that does not, such as dpm++2m."
            )


def check_scheduler(scheduler: Scheduler) -> None:
    """A scheduler that cannot be cut raises an error that names one that can."""
    check_is_scheduler(scheduler)
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        instead = INSTEAD.get(name, f"use one of {', '.join(sorted(SUPPORTED))}")
        raise InputError(f"{name} cannot be cut for a late start; {instead}.")
    if flow_sigmas(scheduler) and any(scheduler.config.get(grid) for grid in GRIDS):
        raise InputError(f"{name} with use_flow_sigmas and another grid, too, cannot be cut. Leave one of them out.")
    if getattr(scheduler, "config", {}).get("interpolation_type") == "log_linear":
        # diffusers tells the network the times of another grid than that of its sigmas.
        raise InputError(f"{name} with interpolation_type log_linear cannot be cut; use use_exponential_sigmas=True.")


def check_steps(steps: int) -> None:
    """A number of steps that is no whole number of at least 1 raises an error."""
    if int(steps) != steps or steps < 1:
        raise InputError(f"{steps!r} steps requested; expected a whole number of at least 1.")


def schedule_of(scheduler: Scheduler) -> Schedule:
    """The scheduler's own schedule; one that falls nowhere or stands still is one line of `InputError`."""
    try:
        return schedule(scheduler)
    except (TypeError, ValueError) as error:
        raise InputError(f"{type(scheduler).__name__} cannot be cut: {error}") from None


def timed(scheduler: Scheduler, steps: int) -> Scheduler:
    """The scheduler with its timesteps set, at the first of them.

    Raises:
        InputError: for steps that diffusers cannot make, or that are not finite.
    """
    return _given(scheduler, num_inference_steps=steps)


def _given(scheduler: Scheduler, **asked: object) -> Scheduler:
    """The scheduler at the first of the timesteps that diffusers makes of what was asked for."""
    name = type(scheduler).__name__
    if getattr(scheduler, "config", {}).get("use_dynamic_shifting"):
        raise InputError(f"{name} with dynamic shifting needs an image's size; pass a scheduler with a fixed shift.")
    steps = asked.get("num_inference_steps", "the given")
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # what is no number is said below
            scheduler.set_timesteps(**asked)
    except Exception as error:  # diffusers refuses in many ways
        what = " ".join(str(error).split())[:160]
        raise InputError(f"{name} cannot make {steps} steps here ({what}). Choose another number of steps.") from None
    levels = (scheduler.timesteps, getattr(scheduler, "sigmas", scheduler.timesteps))
    if not all(bool(torch.isfinite(torch.as_tensor(v).double()).all()) for v in levels):
        raise InputError(f"{name} makes levels that are no numbers of {steps} steps. Ask for more.")
    if hasattr(scheduler, "set_begin_index"):
        # Karras grids round times: of two equal ones diffusers takes the second for the first step's.
        scheduler.set_begin_index(0)
    return scheduler


def no_levels(scheduler: Scheduler) -> str:
    """Why a scheduler cannot be given the levels of its steps; nothing where it can."""
    name = type(scheduler).__name__
    if name not in GIVEN:
        return f"{name} takes no levels: {OWN_LEVELS.get(name, 'diffusers makes them itself')}"
    if scheduler.config.get("final_sigmas_type", "zero") != "zero":
        return f"{name} with final_sigmas_type {scheduler.config['final_sigmas_type']!r} takes no levels"
    return ""


def check_takes_levels(scheduler: Scheduler) -> None:
    """A scheduler that takes no levels raises an error that names samplers which do."""
    reason = no_levels(scheduler)
    if reason:
        raise InputError(f"{reason}. Use dpm++2m, dpm++2s, unipc, deis, heun, euler, ddpm, edm-euler or flow-euler.")


def check_levels(sigmas: Sequence[float], steps: int) -> tuple[float, ...]:
    """The levels of a grid as numbers.

    Raises:
        InputError: for another number than that of the steps, or levels that are not finite or do not fall.
    """
    try:
        levels = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError):
        raise InputError(
            f"grid={sigmas!r}; expected 'free', 'entropic', the grid of a start, or falling sigmas."
        ) from None
    if len(levels) != steps:
        raise InputError(
            f"a grid of {len(levels)} levels for {steps} steps. Pass steps={len(levels)}, or another grid."
        )
    if not all(s > 0 for s in levels) or any(a <= b for a, b in pairwise(levels)):
        shown = ", ".join(f"{s:.4g}" for s in levels)
        raise InputError(f"a grid of the levels {shown}; expected sigmas above 0, each below the one before.")
    return levels


def scheduler_on(scheduler: Scheduler, sigmas: Sequence[float], full: Schedule) -> Scheduler:
    """A ready scheduler whose steps begin at the given levels, or at the nearest that its network knows.

    Args:
        scheduler: one of diffusers; it is not changed.
        sigmas: falling levels, one a step; the last step goes down to 0.
        full: its schedule.

    Raises:
        InputError: for a scheduler that takes no levels, levels outside its schedule, or more than it tells apart.
    """
    check_takes_levels(scheduler)
    cls, kind, steps = type(scheduler), GIVEN[type(scheduler).__name__], len(sigmas)
    config, unspaced = dict(scheduler.config), {name: False for name in SPACED if takes(scheduler, name)}
    low, high = full.sigma_range
    if not (low * (1 - 1e-6) <= sigmas[-1] and sigmas[0] <= high * (1 + 1e-6)):
        raise InputError(
            f"a grid from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}; the schedule of {cls.__name__} runs from "
            f"{high:.4g} to {low:.4g}. Choose levels inside it."
        )
    times = [full.time(min(max(s, low), high)) for s in sigmas]
    flow = flow_sigmas(scheduler)
    if kind in (WHOLE, LEFT) and not flow:
        # Each its own step: those below make room for the ones above.
        whole = [round(t) for t in times]
        if whole[0] < steps - 1:
            raise InputError(f"{steps} steps are more than the {whole[0] + 1} levels from sigma {sigmas[0]:.4g} down.")
        for i in range(1, steps):
            whole[i] = max(min(whole[i], whole[i - 1] - 1), steps - 1 - i)
        times = [float(t) for t in whole]
    elif not all(np.all(np.diff(np.asarray(v, dtype=np.float32)) < 0) for v in (times, sigmas)):
        raise InputError(f"{steps} steps are more than the levels that {cls.__name__} can tell apart. Ask for fewer.")
    if kind == PLACES:
        ready = cls.from_config(config, sigma_max=sigmas[0], sigma_min=sigmas[-1], sigma_schedule="karras")
        rho = float(ready.config.rho)
        roots = torch.tensor(sigmas, dtype=torch.float64) ** (1 / rho)
        # Of one step any place does: it lies where sigma_max is.
        given = {"sigmas": (roots - roots[0]) / (roots[-1] - roots[0]) if steps > 1 else torch.zeros(1)}
        return _given(ready, num_inference_steps=steps, **given)
    ready = cls.from_config(config, **unspaced)
    if flow:
        _check_flow_sigmas(cls.__name__, config)
        part = [min(t / full.t_max, NOISE) for t in times]
        return _left(timed(ready, steps), part, torch.tensor(part, dtype=torch.float64) * full.t_max)
    if kind == LEFT:
        return _left(timed(ready, steps), [full.level(t).sigma for t in times], torch.tensor(times).long())
    if kind == SIGMAS:
        return _given(ready, sigmas=[*sigmas, 0.0])
    if kind == FLOW:
        _check_flow(cls.__name__, config)
        shift = float(config.get("shift") or 1.0)
        part = [t / full.t_max for t in times]
        return _given(ready, sigmas=[s / (shift - (shift - 1) * s) for s in part])
    return _given(ready, timesteps=[round(t) for t in times] if kind == WHOLE else times)


def visited(scheduler: Scheduler, full: Schedule) -> list[float]:
    """The levels sigma that the steps of a ready scheduler begin at, each once; infinite for pure noise."""
    kind = FLOW if flow_sigmas(scheduler) else KINDS.get(type(scheduler).__name__, STEPS)
    if kind == STEPS:
        levels = [full.level(float(t)).sigma for t in scheduler.timesteps]
    else:
        levels = [float(s) for s in scheduler.sigmas[:-1]]
        if kind == FLOW:
            levels = [math.inf if s >= 1 else s / (1 - s) for s in levels]
    return sorted({s for s in levels if s > 0}, reverse=True)


def begins_at(scheduler: Scheduler, full: Schedule, step: int = 0) -> NoiseLevel:
    """The level of a ready scheduler's first step, or of another that asks once, read back from the scheduler."""
    kind = FLOW if flow_sigmas(scheduler) else KINDS.get(type(scheduler).__name__, STEPS)
    if kind == STEPS:
        return full.level(float(scheduler.timesteps[step]))
    sigma = float(scheduler.sigmas[step])
    if kind == FLOW:  # s = sigma / (1 + sigma)
        return NoiseLevel(math.inf, alpha=0.0) if sigma >= 1 else NoiseLevel(sigma / (1 - sigma), alpha=1 - sigma)
    return NoiseLevel(sigma) if kind == SIGMAS else NoiseLevel(sigma, alpha=1.0)


def _left(ready: Scheduler, sigmas: Sequence[float], times: torch.Tensor) -> Scheduler:
    """A timed scheduler that is left with other levels, in its own sigmas, and other times, one a step."""
    # Where its last step leads is its own: not all know a level of 0.
    ready.sigmas = torch.cat([torch.tensor(sigmas, dtype=torch.float64).to(ready.sigmas), ready.sigmas[-1:]])
    # Whole ones are rounded along flow matching's levels.
    ready.timesteps = times.float() if times.is_floating_point() else times
    return ready


def _check_flow_sigmas(name: str, config: Values) -> None:
    if config.get("use_dynamic_shifting") or config.get("shift_terminal"):
        raise InputError(f"{name} with a dynamic shift or a shifted terminal cannot be cut. Pass a fixed shift.")


def _cut_flow_sigmas(scheduler: Scheduler, level: NoiseLevel, steps: int) -> Scheduler:
    """DPM-Solver's kind along flow matching's levels, in equal steps of the unshifted level down to 0."""
    cls, config = type(scheduler), dict(scheduler.config)
    _check_flow_sigmas(cls.__name__, config)
    shift, s = float(config.get("flow_shift") or 1.0), level.sigma / (1 + level.sigma)
    plain = s / (shift - (shift - 1) * s) * torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    levels = shift * plain / (1 + (shift - 1) * plain)
    return _left(timed(cls.from_config(config), steps), levels.tolist(), levels * config["num_train_timesteps"])


def _check_flow(name: str, config: Values) -> None:
    if config.get("use_dynamic_shifting") or config.get("invert_sigmas") or config.get("shift_terminal"):
        raise InputError(
            f"{name} with dynamic shifting, inverted sigmas or a shifted terminal cannot be cut; pass a scheduler with "
            "a fixed shift."
        )


def cut_scheduler(scheduler: Scheduler, level: NoiseLevel, steps: int, full: Schedule) -> Scheduler:
    """A ready scheduler whose first level is ``level`` or the nearest that it can offer.

    Raises:
        InputError: for a scheduler that cannot be cut, or more steps than the cut schedule has.
    """
    cls, name, config = type(scheduler), type(scheduler).__name__, dict(scheduler.config)
    if flow_sigmas(scheduler):
        return _cut_flow_sigmas(scheduler, level, steps)
    if KINDS[name] == EDM:
        return timed(cls.from_config(config, sigma_max=level.sigma), steps)
    if KINDS[name] == FLOW:
        _check_flow(name, config)
        shorter = cls.from_config(config)
        s, shift = level.sigma / (1 + level.sigma), float(config.get("shift") or 1.0)
        # set_timesteps runs from sigma_max down and applies the shift: hand it the unshifted start.
        shorter.sigma_max = s / (shift - (shift - 1) * s)
        if name not in SECOND_ORDER and not any(config.get(grid) for grid in GRIDS):
            # Its own grid ends at 1 / T and steps from there to 0: an evaluation for nothing. So all steps are equal.
            shorter.sigma_min = shorter.sigma_max / steps
        return timed(shorter, steps)
    if full.steps is None:  # the network's time is log(sigma) / 4
        if not any(config.get(grid) for grid in GRIDS):
            raise InputError(f"{name} with continuous times is cut on a grid of sigmas. Set use_karras_sigmas=True.")
        return timed(cls.from_config(config, sigma_max=level.sigma), steps)
    t = full.step(level)
    if name in WHOLE_STRIDE:
        t = max(1, round((t + 1) / steps)) * steps - 1
        while t > full.t_max:
            t -= steps
    if steps > t + 1:
        raise InputError(
            f"{steps} steps do not fit below step {t} of the schedule, which has {t + 1}. Ask for fewer steps or start "
            "at a noisier level."
        )
    changes: Values = {}
    grid = int(config.get("original_inference_steps") or 0)
    if grid:
        # A consistency model knows only the steps of its own coarse grid: cut at one of them.
        stride = max(1, int(full.t_max + 1) // grid)
        grid = max(1, round((t + 1) / stride))
        t = grid * stride - 1
        changes["original_inference_steps"] = grid
        if steps > grid:
            raise InputError(
                f"{steps} steps do not fit the {grid} steps of {name}'s own grid below step {t}. Ask for fewer steps "
                "or start at a noisier level."
            )
    changes |= {"trained_betas": realised_betas(scheduler, t), "num_train_timesteps": t + 1}
    # The cut betas end at the level: a sigma_max of one's own would begin elsewhere.
    for setting, value in (("timestep_spacing", "trailing"), ("rescale_betas_zero_snr", False), ("sigma_max", None)):
        if takes(scheduler, setting):
            changes[setting] = value
    return timed(cls.from_config(config, **changes), steps)
