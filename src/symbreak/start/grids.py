"""Grids: the noise levels that a sampler visits, and what they cost in network evaluations."""

from __future__ import annotations

import math

import torch

from symbreak.networks.types import Scheduler
from symbreak.noise import NoiseLevel, flow_sigmas
from symbreak.runtime.files import InputError
from symbreak.start.cut_schedule import check_steps, takes
from symbreak.start.late_start import LateStart, standard_start

__all__ = ["grids", "late_sigmas", "standard_starts", "steps_for"]

SPACINGS = ("leading", "trailing", "linspace")
OTHER_GRIDS = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


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


def grids(scheduler: Scheduler) -> dict[str, Scheduler]:
    """The scheduler on its own grid and, where its class offers both, on the Karras and the uniform one."""
    config = dict(scheduler.config)
    if str(config.get("variance_type", "")).startswith("learned"):
        raise InputError(
            f"{type(scheduler).__name__} with the variance_type {config['variance_type']!r} cannot be tried without "
            "its network. Set variance_type='fixed_small' or use another sampler; at= with a level works."
        )
    others = any(config.get(name) for name in OTHER_GRIDS) or flow_sigmas(scheduler)
    if not takes(scheduler, "use_karras_sigmas") or others:
        return {"own": scheduler}
    other = not config.get("use_karras_sigmas")
    return {
        "own": scheduler,
        "Karras" if other else "uniform": type(scheduler).from_config(config, use_karras_sigmas=other),
    }


def standard_starts(scheduler: Scheduler, steps: int, skip: bool = False) -> dict[str, LateStart]:
    """The standard start by timestep spacing; ``"own"`` alone for a scheduler without spacings.

    Args:
        scheduler: any diffusers scheduler.
        steps: num_inference_steps.
        skip: leave out the spacings that do not fit these steps instead of raising an error.
    """
    starts = {}
    for spacing in SPACINGS if takes(scheduler, "timestep_spacing") else (None,):
        try:
            starts[spacing or "own"] = standard_start(scheduler, steps, spacing)
        except InputError:
            if not skip:
                raise
    return starts


def steps_for(scheduler: Scheduler, calls: int, name: str | None = None) -> int:
    """num_inference_steps that cost a number of network evaluations, counted on the scheduler itself.

    Args:
        scheduler: any diffusers scheduler.
        calls: network evaluations (NFE) an image, from the standard start.
        name: what an error calls the scheduler.

    Raises:
        InputError: where no number of steps costs them.
    """
    for steps in range(calls, 0, -1):
        if standard_start(scheduler, steps).calls == calls:
            return steps
    name = name or type(scheduler).__name__
    raise InputError(
        f"{name} cannot spend exactly {calls} network evaluations: too few for {name}, or between two of its step "
        "counts. Choose other calls."
    )
