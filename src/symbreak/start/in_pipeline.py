"""A start inside other people's pipelines: a scheduler that stays cut, and what a pipeline's own call needs.

Pipelines set their scheduler's timesteps themselves. Most ask for a number of steps, which the cut scheduler answers
with its own levels. Some pass levels of their own, which would put it back to the top without a word: such a call
raises an error, unless it has the arguments of `pipeline_arguments`, after which the start's levels stand.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

import torch

from symbreak.networks.adapters import places, squares
from symbreak.networks.samplers import kind_of, shift_of
from symbreak.networks.types import Pipeline, Scheduler
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values

__all__ = ["hold", "pipeline_arguments"]

SAME = 1e-3  # share of the first time by which float32 and rounding may move it
# What pipelines call the sides of a latent's cell, in pixels and in frames.
SPACE = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


class _Held:
    """``set_timesteps`` of a scheduler that has to begin where a start does.

    Attributes:
        ours: whether the start's levels replace as many others; else others raise an error.
        fixed: whether levels or steps were made for their number, and another raises an error.
    """

    fixed = False

    def __init__(self, scheduler: Scheduler) -> None:
        # Of DPM-Solver's kind along flow matching's levels diffusers has no setting that cuts them.
        self.scheduler, self.ours = scheduler, kind_of(scheduler) == "flow" and shift_of(scheduler) == "flow_shift"
        levels = {k: getattr(scheduler, k, None) for k in ("timesteps", "sigmas")}
        self.levels = {k: v.clone() for k, v in levels.items() if isinstance(v, torch.Tensor)}
        self.original: Callable[..., None] = type(scheduler).set_timesteps
        functools.update_wrapper(self, MethodType(self.original, scheduler))

    def __call__(self, *args: object, **kwargs: object) -> None:
        scheduler, times = self.scheduler, self.levels["timesteps"]
        self.original(scheduler, *args, **kwargs)
        if hasattr(scheduler.step, "restart"):  # of learned steps, which count
            scheduler.step.restart()
        name, count = type(scheduler).__name__, len(scheduler.timesteps)
        if self.fixed and count != len(times):
            raise InputError(
                f"a pipeline asked {name} for {count} times; the start's levels or steps were made for {len(times)}. "
                "Call it as pipe(..., **start.arguments(pipe, noise))."
            )
        if (self.ours or self.fixed) and count == len(times):
            for name, value in self.levels.items():
                setattr(scheduler, name, value.to(getattr(scheduler, name).device))
        first, start = float(scheduler.timesteps[0]), float(times[0])
        if abs(first - start) > SAME * abs(start):
            raise InputError(
                f"a pipeline put {name} back to the time {first:.6g}, the start begins at "
                f"{start:.6g}. Call it as pipe(..., **start.arguments(pipe, noise))."
            )


def hold(scheduler: Scheduler, fixed: bool = False) -> Scheduler:
    """A ready scheduler that begins at its first time, whoever sets its timesteps, or raises an error.

    Args:
        scheduler: changed, and returned.
        fixed: whether its levels or steps were made for their number.
    """
    if not isinstance(scheduler.__dict__.get("set_timesteps"), _Held):
        scheduler.set_timesteps = _Held(scheduler)
    scheduler.set_timesteps.fixed |= fixed
    return scheduler


def pipeline_arguments(scheduler: Scheduler, steps: int, pipe: Pipeline, latents: torch.Tensor) -> Values:
    """What the own call of a pipeline needs to begin at the first step of a ready scheduler.

    Args:
        scheduler: of a start.
        steps: its num_inference_steps.
        pipe: a pipeline of diffusers whose scheduler it is, in a copy.
        latents: the state of the first step [B, *S], over ``init_noise_sigma``.

    Raises:
        InputError: for another scheduler, and a pipeline that takes no latents.
    """
    name, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    held = getattr(getattr(pipe, "scheduler", None), "set_timesteps", None)
    theirs = held.levels if isinstance(held, _Held) else {}
    ours = hold(scheduler).set_timesteps.levels
    if theirs.keys() != ours.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
        raise InputError(f"the scheduler of {name} is not the start's. Set pipe.scheduler = start.fresh() first.")
    for needed in ("latents", "num_inference_steps"):
        if needed not in takes:
            raise InputError(f"{name} takes no {needed}, so that it cannot start late. Use sb.LateStartPipeline.")
    pipe.scheduler.set_timesteps.ours = True  # for pipelines that pass levels of their own, and take none
    arguments: Values = {"latents": _packed(pipe, latents), "num_inference_steps": steps}
    sides: Values = {}
    if latents.ndim >= 4:
        space, time = (next((int(v) for k in names if (v := getattr(pipe, k, None))), 1) for names in (SPACE, TIME))
        sides = {"height": latents.shape[-2] * space, "width": latents.shape[-1] * space}
        sides |= {"num_frames": (latents.shape[2] - 1) * time + 1} if latents.ndim == 5 else {}
    if "sigmas" in takes and type(scheduler).__name__.startswith("FlowMatch"):
        # Many make their own from 1 down where none come. The scheduler shifts what it is handed.
        shift, levels = float(scheduler.config.get("shift") or 1.0), ours["sigmas"][:-1].double()
        sides["sigmas"] = (levels / (shift - (shift - 1) * levels)).tolist()
    return arguments | {k: v for k, v in sides.items() if k in takes}


def _packed(pipe: Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a pipeline takes them: some as tokens, of squares of 2 x 2 or of every place of a video."""
    channels = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "in_channels", None)
    if not hasattr(pipe, "_pack_latents"):
        return latents
    if latents.ndim == 5 and channels == latents.shape[1]:
        return places(latents)
    return squares(latents) if latents.ndim == 4 and channels == 4 * latents.shape[1] else latents
