"""Cutting a schedule: a scheduler that begins at a level, and the state that its first step expects.

Beta-type schedules are cut by rebuilding the scheduler from its first t + 1 betas, so the network still
sees its own times; EDM schedulers by ``sigma_max``; flow matching with the shift undone first. What the
scheduler made of it is read back, and the start is built at the level where it really begins.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from symbreak.laws.saving import law_from_tensors, law_tensors
from symbreak.networks.denoiser import Denoiser, LawDenoiser, as_denoiser
from symbreak.noise import NoiseLevel, Schedule, schedule
from symbreak.runtime.files import InputError, read_tensors, write_tensors

__all__ = [
    "SUPPORTED",
    "LateStart",
    "check_same_network",
    "check_scheduler",
    "check_steps",
    "cut",
    "late_sigmas",
    "schedule_of",
    "standard_start",
    "standard_starts",
    "steps_for",
]

SPACINGS = ("leading", "linspace", "trailing")
FORMAT, VERSION = "symbreak.start", "1"
LAW = "law."  # prefix of the law's tensors and metadata in the file of a start

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
        return self.state(self.ve(noise, labels))

    def ve(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The start as a VE state x = x_0 + sigma eps at ``level.sigma``, for EDM and k-diffusion samplers.

        Args:
            noise: [B, *S].
            labels: class [B] of every sample, as in a call.

        Raises:
            InputError: where the start is pure noise without any signal (sigma infinite).
        """
        if self.law is None:
            if self.level.alpha == 0:
                raise InputError("this start is pure noise, sigma infinite, and has no VE state. Start below the top.")
            return self(noise) / self.level.alpha
        given = {} if labels is None or getattr(self.law, "classes", None) is None else {"labels": labels}
        x: torch.Tensor = self.law.transport(noise, self.level.sigma, **given)
        return x

    def state(self, x: torch.Tensor) -> torch.Tensor:
        """A VE state x = x_0 + sigma eps at the start level, in the scheduler's own frame."""
        return self.level.alpha * x

    def latents(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The start for pipelines that take ``latents=`` and multiply them by ``init_noise_sigma``."""
        return self(noise, labels) / self._noise_scale()

    def denoiser(self, network: Any) -> Denoiser:
        """The law's posterior mean above the start level, the network's at and below it.

            D(x, sigma) = D_law(x, sigma)       sigma > level.sigma        (no network call)
                          D_network(x, sigma)   sigma <= level.sigma

        For samplers of one's own that begin at any level, however noisy. A standard start has no law: its
        denoiser is the network itself.

        Args:
            network: a `Denoiser`, such as ``sb.denoiser(unet, scheduler)``, with its condition bound.

        Returns:
            A `Denoiser`; the upper end of its ``sigma_range`` is infinite.

        Raises:
            InputError: where the shapes of law and network differ.
        """
        below = as_denoiser(network)
        if self.law is None:
            return below
        if tuple(below.shape) != tuple(self.law.shape):
            raise InputError(
                f"the start's law has the shape {tuple(self.law.shape)}, the network {tuple(below.shape)}. Fit it on "
                "such data."
            )
        return _Hybrid(LawDenoiser(self.law), below, self.level.sigma)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the law, and as JSON the uncut scheduler, the level asked for and the steps.

        Of a ``choice`` its sentence is kept, in ``notes``, not its curves.

        Raises:
            InputError: for a law that is neither a Gaussian nor a mixture, or a scheduler not of diffusers.
        """
        name = type(self.full).__name__
        if getattr(diffusers, name, None) is not type(self.full):
            raise InputError(f"a start with the scheduler {name} cannot be saved: diffusers has no such class.")
        # Timesteps and level are not needed to cut again, but to see that it was cut to the same.
        tensors = {
            "asked": torch.tensor([self.asked.sigma, self.asked.alpha], dtype=torch.float64),
            "level": torch.tensor([self.level.sigma, self.level.alpha], dtype=torch.float64),
            "timesteps": torch.as_tensor(self.scheduler.timesteps).double(),
        }
        about: dict[str, Any] = {
            "scheduler": json.loads(self.full.to_json_string()),
            "class": name,
            "steps": self.steps,
            "notes": list(self.notes),
            "law": self.law is not None,
        }
        metadata = {"format": FORMAT, "version": VERSION, "start": json.dumps(about, sort_keys=True)}
        if self.law is not None:
            law, head = law_tensors(self.law)
            tensors |= {LAW + key: value for key, value in law.items()}
            metadata |= {LAW + key: text for key, text in head.items()}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> LateStart:
        """Read what `save` wrote and cut the scheduler again: the same timesteps, level and bits.

        Raises:
            InputError: for a file that is missing, of another format or a newer version, or broken, and where
                this version of diffusers cuts the scheduler to other timesteps than the file says.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path} holds no start (format {metadata.get('format')}). Expected one of LateStart.save."
            )
        if metadata.get("version") != VERSION:
            raise InputError(
                f"{path} is a start saved by a newer symbreak (start version {metadata.get('version')}, this one reads "
                f"{VERSION}). Update it."
            )
        try:
            about = json.loads(metadata["start"])
            config, name, steps = about["scheduler"], str(about["class"]), about["steps"]
            notes, has_law = tuple(map(str, about["notes"])), bool(about["law"])
            asked, level, timesteps = (tensors[key] for key in ("asked", "level", "timesteps"))
            asked_level = NoiseLevel(*asked.tolist())
            check_steps(steps)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{path} holds a broken start ({str(error)[:80]}). Save it again.") from None
        kind: Any = getattr(diffusers, name, None)
        known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        if not known:
            raise InputError(f"{path} names the scheduler {name}, which diffusers does not have. Update diffusers.")
        try:
            full = kind.from_config(config)
        except Exception as error:
            what = " ".join(str(error).split())[:80]
            raise InputError(f"the scheduler {name} of {path} cannot be made ({what}). Save the start again.") from None
        try:
            if has_law:
                parts = {key.removeprefix(LAW): t for key, t in tensors.items() if key.startswith(LAW)}
                head = {key.removeprefix(LAW): text for key, text in metadata.items() if key.startswith(LAW)}
                found = cut(full, law_from_tensors(parts, head, path), steps, asked_level)
            else:
                found = standard_start(full, steps)
        except InputError:
            raise
        except Exception as error:  # diffusers meets settings that do not fit each other in many ways
            raise InputError(f"{path} holds a broken start ({str(error)[:80]}). Save it again.") from None
        again = torch.as_tensor(found.scheduler.timesteps).double()
        there = torch.tensor([found.level.sigma, found.level.alpha], dtype=torch.float64)
        # Another machine's logarithm may differ in the last digits; another rule of diffusers differs in the first.
        same = all(
            a.shape == b.shape and torch.allclose(a, b.double()) for a, b in ((again, timesteps), (there, level))
        )
        if not same:
            raise InputError(
                f"{path}: this diffusers {diffusers.__version__} gives {name} other timesteps than the start was saved "
                f"with (diffusers {config.get('_diffusers_version')}). Use that version, or make the start again."
            )
        return replace(found, asked=asked_level, notes=notes)

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


class _Hybrid:
    """A law's denoiser above a level and a network's at and below it; see `LateStart.denoiser`."""

    def __init__(self, above: Denoiser, below: Denoiser, sigma: float) -> None:
        self.above, self.below, self.sigma = above, below, sigma
        self.shape: tuple[int, ...] = tuple(below.shape)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """From the network's lower end to infinity."""
        return float(self.below.sigma_range[0]), math.inf

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1)
        # A grid kept in float32 may begin a hair above the level that it was made of.
        inside = s <= self.sigma * (1 + 1e-6)
        if bool(inside.all()):
            return self.below(x, s.clamp(max=self.sigma) if s.numel() > 1 else min(float(s), self.sigma))
        if not bool(inside.any()):
            return self.above(x, sigma)
        out = torch.empty_like(x)
        out[inside] = self.below(x[inside], s[inside].clamp(max=self.sigma))
        out[~inside] = self.above(x[~inside], s[~inside])
        return out


def late_sigmas(level: LateStart | NoiseLevel | float, steps: int, sigma_min: float, rho: float = 7.0) -> torch.Tensor:
    """The Karras grid from a start level down, for samplers ``sample(model, x, sigmas)`` of EDM and k-diffusion.

        sigma_i = (sigma_0^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_0^(1/rho)))^rho,   then 0

    Args:
        level: where it begins: a start, a level, or sigma itself.
        steps: intervals of the grid, the last one down to 0.
        sigma_min: last level above 0.
        rho: 7 puts more steps at low noise, 1 is an even grid.

    Returns:
        sigmas [steps + 1], float64, falling; the first is exactly the start's.

    Raises:
        InputError: for a level that is not finite, or a ``sigma_min`` that does not lie below it.

    Source: Karras et al. 2022, arXiv:2206.00364, equation 5.

    >>> late_sigmas(3.0, steps=3, sigma_min=0.03).tolist()[::3]
    [3.0, 0.0]
    """
    check_steps(steps)
    if isinstance(level, LateStart):
        level = level.level
    top = level.sigma if isinstance(level, NoiseLevel) else float(level)
    if not 0 < top < math.inf:
        raise InputError(f"a grid from sigma {top:g}; expected a finite level above 0.")
    if not (0 < sigma_min <= top and rho > 0):
        raise InputError(
            f"a grid from sigma {top:g} to {sigma_min:g} with rho {rho:g}; expected 0 < sigma_min <= {top:g} and "
            "rho > 0."
        )
    ramp = torch.linspace(0, 1, int(steps), dtype=torch.float64)
    ends = top ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = torch.cat([(ends[0] + ramp * (ends[1] - ends[0])) ** rho, torch.zeros(1, dtype=torch.float64)])
    sigmas[0] = top
    return sigmas


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot be cut, by name and with the mend."""
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        mend = _MENDS.get(name, f"use one of {', '.join(sorted(SUPPORTED))}")
        raise InputError(f"{name} cannot be cut for a late start; {mend}.")
    if getattr(scheduler, "config", {}).get("use_flow_sigmas"):
        raise InputError(f"{name} with use_flow_sigmas cannot be cut; use FlowMatchEulerDiscreteScheduler.")


def schedule_of(scheduler: Any) -> Schedule:
    """The scheduler's own schedule; one that falls nowhere or stands still is one line of `InputError`."""
    try:
        return schedule(scheduler)
    except (TypeError, ValueError) as error:
        raise InputError(f"{type(scheduler).__name__} cannot be cut: {error}") from None


def check_same_network(start: LateStart, scheduler: Any, name: Any) -> None:
    """Refuse a start whose scheduler speaks of other noise, or of another prediction, than a network's own."""
    own, other = schedule_of(start.full), schedule_of(scheduler)
    kinds = [str(s.config.get("prediction_type", "flow")) for s in (start.full, scheduler)]
    times = np.linspace(max(own.t_min, other.t_min), min(own.t_max, other.t_max), 8)
    same = (own.t_min, own.t_max) == (other.t_min, other.t_max) and kinds[0] == kinds[1]
    if not same or not np.allclose([own.level(t).alpha_bar for t in times], [other.level(t).alpha_bar for t in times]):
        raise InputError(
            f"{name} is a start for networks with the prediction {kinds[0]} over sigma {own.sigma_range[0]:.3g} to "
            f"{own.sigma_range[1]:.3g}; this network predicts {kinds[1]} over {other.sigma_range[0]:.3g} to "
            f"{other.sigma_range[1]:.3g}. Fit a start for it."
        )


def check_steps(steps: int) -> None:
    """Refuse a number of steps that is no whole number of at least 1."""
    if int(steps) != steps or steps < 1:
        raise InputError(f"{steps} steps asked for; expected a whole number of at least 1.")


def _set(scheduler: Any, steps: int) -> Any:
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # diffusers refuses in many ways
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
    alpha_bar, betas = (
        torch.as_tensor(v, device="cpu").double().numpy()[: t + 1] for v in (scheduler.alphas_cumprod, scheduler.betas)
    )
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
    full = schedule_of(scheduler)
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


def standard_starts(scheduler: Any, steps: int) -> dict[str, LateStart]:
    """The standard start by timestep spacing; ``"own"`` alone for a scheduler without spacings."""
    if "timestep_spacing" not in inspect.signature(type(scheduler).__init__).parameters:
        return {"own": standard_start(scheduler, steps)}
    return {spacing: standard_start(scheduler, steps, spacing) for spacing in SPACINGS}


def steps_for(scheduler: Any, calls: int, name: str | None = None) -> int:
    """num_inference_steps that cost a number of network calls, asked of the scheduler itself.

    Args:
        scheduler: any diffusers scheduler.
        calls: network calls an image, from the standard start.
        name: what an error calls the scheduler.

    Raises:
        InputError: where no number of steps costs them.
    """
    for steps in range(calls, 0, -1):
        if standard_start(scheduler, steps).calls == calls:
            return steps
    name = name or type(scheduler).__name__
    raise InputError(
        f"{name} cannot spend exactly {calls} network calls: too few for {name}, or between two of its step counts. "
        "Choose other calls."
    )
