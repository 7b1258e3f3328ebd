"""Samplers: the diffusers schedulers by short names."""

from __future__ import annotations

import diffusers

from symbreak.networks.types import Scheduler
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values

__all__ = ["SAMPLERS", "kind_of", "scheduler"]

# Our sampler names -> diffusers class and the settings that make it that sampler.
SAMPLERS: dict[str, tuple[str, Values]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "sde-dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "edm-euler": ("EDMEulerScheduler", {}),
    "edm-dpm++2m": ("EDMDPMSolverMultistepScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
# Settings that belong to one sampler and must not leak into another through `like`.
_OWN = ("algorithm_type", "solver_order", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def kind_of(scheduler: Scheduler) -> str:
    """Which parametrization a scheduler's network has: "vp", "edm" or "flow"."""
    name = type(scheduler).__name__
    return "edm" if name.startswith("EDM") else "flow" if name.startswith("FlowMatch") else "vp"


def scheduler(name: str, like: Scheduler | None = None, **settings: object) -> Scheduler:
    """A diffusers scheduler by our sampler name.

    Args:
        name: one of `SAMPLERS`.
        like: scheduler whose betas, prediction type and clipping are taken over; by default
            DDPM's linear betas (for EDM and flow samplers: the class's own defaults).
        **settings: further settings of the diffusers class, e.g. ``timestep_spacing="trailing"``.

    Raises:
        InputError: for an unknown name or a scheduler of another kind in ``like``.

    >>> type(scheduler("dpm++2m")).__name__
    'DPMSolverMultistepScheduler'
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}. Known: {', '.join(SAMPLERS)}.")
    class_name, changes = SAMPLERS[name]
    cls = getattr(diffusers, class_name)
    if like is None:
        if name.startswith(("edm", "flow")):
            return cls(**changes, **settings)
        like = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if not hasattr(like, "alphas_cumprod") and kind_of(like) == "vp":
        raise InputError(
            f"{type(like).__name__} is none of the schedulers symbreak knows: it needs alphas_cumprod, or an EDM or "
            "flow-matching class."
        )
    kinds = kind_of(like), "edm" if name.startswith("edm") else "flow" if name.startswith("flow") else "vp"
    if kinds[0] != kinds[1]:
        raise InputError(
            f"the sampler {name} is of the kind {kinds[1]}, the network's scheduler {type(like).__name__} of the kind "
            f"{kinds[0]}. Choose a sampler of the same kind."
        )
    config = {k: v for k, v in dict(like.config).items() if k not in _OWN}
    return cls.from_config(config, **changes, **settings)
