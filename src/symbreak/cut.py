"""Cutting a schedule: a scheduler that begins at a level, and the state that its first step expects.

Beta-type schedules are cut by rebuilding the scheduler from its first t + 1 betas, so the network still
sees its own times; EDM schedulers by ``sigma_max``; flow matching with the shift undone first. What the
scheduler made of it is read back, and the start is built at the level where it really begins.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from symbreak.files import InputError
from symbreak.noise import NoiseLevel, Schedule, schedule

__all__ = ["SUPPORTED", "LateStart", "check_scheduler", "check_steps", "cut", "standard_start"]

# States of these live in the VE frame, x = x_0 + sigma eps; of the other beta-type ones in the VP frame.
_VE_STATE = {
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}
_SIGMAS_VP = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
}
_STEPS_VP = {"DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler"}
_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
SUPPORTED = _VE_STATE | _SIGMAS_VP | _STEPS_VP | _EDM | _FLOW
# These step from k to k - T // n whatever their grid says, so T has to be a multiple of n.
_WHOLE_STRIDE = {"DDIMScheduler", "PNDMScheduler"}
_MENDS = {"IPNDMScheduler": "it takes trained_betas as its time grid; use PNDMScheduler or DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class LateStart:
    """A ready scheduler and the state that its first step expects.

    Attributes:
        scheduler: cut, timesteps set, never stepped; `fresh` gives copies to step with.
        level: the level where it begins, in the frame of the scheduler's states.
        law: the law the start is drawn from; ``None`` is the standard start from white noise.
        steps: num_inference_steps.
        asked: the level asked for; ``level`` is what the scheduler offers.
        full: the scheduler before it was cut.
        notes: one line each on what was rounded or is outside the theory.
        choice: why it was chosen, where ``at="auto"`` did.
    """

    scheduler: Any
    level: NoiseLevel
    law: Any | None
    steps: int
    asked: NoiseLevel
    full: Any
    notes: tuple[str, ...] = field(default=())
    choice: Any | None = None

    @property
    def calls(self) -> int:
        """Network calls (NFE) a sample costs: one an entry of the scheduler's timesteps."""
        return len(self.scheduler.timesteps)

    def fresh(self) -> Any:
        """A scheduler at its first step, independent of every other."""
        return copy.deepcopy(self.scheduler)

    def __call__(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """White noise [B, *S] -> the state that ``scheduler.step`` expects first, deterministically.

        Args:
            noise: [B, *S].
            labels: class [B] of every sample, for class-conditional networks; a law without classes is the
                same for all of them.
        """
        if self.law is None:
            return noise * self._noise_scale()
        given = {} if labels is None or getattr(self.law, "classes", None) is None else {"labels": labels}
        return self.state(self.law.transport(noise, self.level.sigma, **given))

    def state(self, x: torch.Tensor) -> torch.Tensor:
        """A VE state x = x_0 + sigma eps at the start level, in the scheduler's own frame."""
        return self.level.alpha * x

    def latents(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The start for pipelines that take ``latents=`` and multiply them by ``init_noise_sigma``."""
        return self(noise, labels) / self._noise_scale()

    def _noise_scale(self) -> float:
        # Flow-matching schedulers have no init_noise_sigma: their pipelines start from the noise itself.
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def explain(self) -> str:
        """Where it starts, what it costs, what to know; after ``at="auto"`` the two curves and their minimum."""
        law = "white noise" if self.law is None else repr(self.law)
        head = (
            f"{type(self.scheduler).__name__}, {self.steps} steps, {self.calls} network calls, from {law} at "
            f"sigma {self.level.sigma:.4g} (OU time {self.level.ou_time:.4g})."
        )
        certificate = getattr(self.law, "certificate", lambda sigma: None)(self.level.sigma)
        low_rank = (certificate.sentence(),) if certificate is not None and certificate.modes else ()
        text = " ".join((head, *low_rank, *self.notes))
        return text if self.choice is None else f"{text}\n{self.choice.table()}"


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot be cut, by name and with the mend."""
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        mend = _MENDS.get(name, f"use one of {', '.join(sorted(SUPPORTED))}")
        raise InputError(f"{name} cannot be cut for a late start; {mend}.")
    if getattr(scheduler, "config", {}).get("use_flow_sigmas"):
        raise InputError(f"{name} with use_flow_sigmas cannot be cut; use FlowMatchEulerDiscreteScheduler.")


def check_steps(steps: int) -> None:
    """Refuse a number of steps that is no whole number of at least 1."""
    if int(steps) != steps or steps < 1:
        raise InputError(f"{steps} steps asked for; expected a whole number of at least 1.")


def _set(scheduler: Any, steps: int) -> Any:
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"{type(scheduler).__name__} cannot make {steps} steps here ({what}). Ask for fewer."
        ) from None
    return scheduler


def _begins_at(scheduler: Any, full: Schedule) -> NoiseLevel:
    """The level of a ready scheduler's first step, read back from the scheduler itself."""
    name = type(scheduler).__name__
    if name in _FLOW:
        s = float(scheduler.sigmas[0])
        return NoiseLevel(math.inf, alpha=0.0) if s >= 1 else NoiseLevel(s / (1 - s), alpha=1 - s)
    if name in _EDM or name in _VE_STATE:
        return NoiseLevel(float(scheduler.sigmas[0]), alpha=1.0)
    if name in _SIGMAS_VP:
        return NoiseLevel(float(scheduler.sigmas[0]))
    return full.level(float(scheduler.timesteps[0]))


def _cut_betas(scheduler: Any, t: int) -> list[float]:
    """The first t + 1 betas of the realised schedule (after any zero-SNR rescaling), as plain floats."""
    alpha_bar = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)[: t + 1]
    betas = np.asarray(scheduler.betas, dtype=np.float64)[: t + 1]
    if betas[-1] >= 1 or not np.allclose(np.cumprod(1 - betas), alpha_bar, rtol=1e-4, atol=1e-9):
        betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return [float(b) for b in np.minimum(betas, 1 - 1e-7)]


def _cut(scheduler: Any, level: NoiseLevel, steps: int, full: Schedule) -> Any:
    """A ready scheduler whose first level is ``level`` or the nearest that it can offer."""
    cls, name, config = type(scheduler), type(scheduler).__name__, dict(scheduler.config)
    if name in _EDM:
        return _set(cls.from_config(config, sigma_max=level.sigma), steps)
    if name in _FLOW:
        if config.get("use_dynamic_shifting") or config.get("invert_sigmas") or config.get("shift_terminal"):
            raise InputError(
                f"{name} with dynamic shifting, inverted sigmas or a shifted terminal cannot be cut; pass a scheduler "
                "with a fixed shift."
            )
        shorter = cls.from_config(config)
        s, shift = level.sigma / (1 + level.sigma), float(config.get("shift") or 1.0)
        # set_timesteps runs from sigma_max down and applies the shift: hand it the unshifted start.
        shorter.sigma_max = s / (shift - (shift - 1) * s)
        return _set(shorter, steps)
    t = full.step(level)
    if name in _WHOLE_STRIDE:
        t = max(1, round((t + 1) / steps)) * steps - 1
        while t > full.t_max:
            t -= steps
    if steps > t + 1:
        raise InputError(
            f"{steps} steps do not fit below step {t} of the schedule, which has {t + 1}. Ask for fewer steps or start "
            "at a noisier level."
        )
    signature = inspect.signature(cls.__init__).parameters
    grid = int(config.get("original_inference_steps") or 0)
    if grid:
        # A consistency model knows only the steps of its own coarse grid: cut at one of them.
        stride = max(1, int(full.t_max + 1) // grid)
        grid = max(1, round((t + 1) / stride))
        t = grid * stride - 1
        if steps > grid:
            raise InputError(
                f"{steps} steps do not fit the {grid} steps of {name}'s own grid below step {t}. Ask for fewer steps "
                "or start at a noisier level."
            )
    changes: dict[str, Any] = {"trained_betas": _cut_betas(scheduler, t), "num_train_timesteps": t + 1}
    if "timestep_spacing" in signature:
        changes["timestep_spacing"] = "trailing"
    if grid:
        changes["original_inference_steps"] = grid
    if "rescale_betas_zero_snr" in signature:
        changes["rescale_betas_zero_snr"] = False
    return _set(cls.from_config(config, **changes), steps)


def cut(scheduler: Any, law: Any, steps: int, level: NoiseLevel) -> LateStart:
    """A late start at a level, or at the nearest that the scheduler can offer (its ``notes`` then say so).

    Raises:
        InputError: for a scheduler that cannot be cut, or more steps than the cut schedule has.
    """
    check_scheduler(scheduler)
    check_steps(steps)
    full = schedule(scheduler)
    ready = _cut(scheduler, level, int(steps), full)
    begins = _begins_at(ready, full)
    notes: tuple[str, ...] = ()
    if abs(math.log(begins.sigma / level.sigma)) > 0.02:
        name = type(scheduler).__name__
        notes = (f"The grid of {name} begins at sigma {begins.sigma:.4g} instead of {level.sigma:.4g}.",)
    return LateStart(ready, begins, law, int(steps), level, scheduler, notes)


def standard_start(scheduler: Any, steps: int, spacing: str | None = None) -> LateStart:
    """The usual start from white noise at the top of the schedule, with the face of a late one.

    Args:
        scheduler: any diffusers scheduler; it is not changed.
        steps: num_inference_steps.
        spacing: ``"leading"``, ``"linspace"`` or ``"trailing"``; ``None`` keeps the scheduler's own.
    """
    check_steps(steps)
    cls = type(scheduler)
    takes = "timestep_spacing" in inspect.signature(cls.__init__).parameters
    if spacing is not None and not takes:
        raise InputError(f"{cls.__name__} has no timestep_spacing. Leave spacing out.")
    config = dict(scheduler.config) | ({} if spacing is None else {"timestep_spacing": spacing})
    ready = _set(cls.from_config(config), int(steps))
    if type(ready).__name__ in SUPPORTED:
        level = _begins_at(ready, schedule(scheduler))
    else:
        level = schedule(scheduler).level(float(ready.timesteps[0]))
    return LateStart(ready, level, None, int(steps), level, scheduler if spacing is None else cls.from_config(config))
