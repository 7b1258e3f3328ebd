"""Samplers: the diffusers schedulers by short names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, runtime_checkable

import diffusers
import numpy as np
import torch

from symbreak.networks.types import Scheduler
from symbreak.noise import flow_sigmas
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values

__all__ = ["LEAST_LEVEL", "SAMPLERS", "fixed_shift", "kind_of", "levels_scheduler", "realised_betas", "scheduler"]

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
    "flow-dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_flow_sigmas": True},
    ),
    "flow-unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
}
# Settings that belong to one sampler and must not leak into another through `like`.
_OWN = (
    "use_flow_sigmas",
    "algorithm_type",
    "solver_order",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
# Settings that decide the betas: who passes one asks for other betas than those of `like`.
_BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr"}
# Classes of diffusers whose steps do not know the prediction "sample".
_NO_SAMPLE = ("pndm", "euler-a", "kdpm2", "kdpm2-a")
LEAST_LEVEL, MOST_LEVEL = 0.005, 1e6  # between which single-precision betas tell levels apart
_SIGNAL = 2.0**-24  # alpha-bar that diffusers gives a last step of zero signal


@runtime_checkable
class Levels(Protocol):
    """What knows the levels at which it can be evaluated, as a `Denoiser` does."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma."""


def continuous(config: Mapping[str, object]) -> bool:
    """Whether a network's time is log(sigma) / 4, as in EulerDiscreteScheduler."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def kind_of(scheduler: Scheduler) -> str:
    """Which parametrization a scheduler's network has: "vp", "edm" or "flow"."""
    name = type(scheduler).__name__
    flow = name.startswith("FlowMatch") or flow_sigmas(scheduler)
    return "edm" if name.startswith("EDM") else "flow" if flow else "vp"


def shift_of(scheduler: Scheduler) -> str:
    """What a flow-matching scheduler calls its shift."""
    return "shift" if type(scheduler).__name__.startswith("FlowMatch") else "flow_shift"


def fixed_shift(scheduler: Scheduler, mu: float) -> Scheduler:
    """A flow-matching scheduler whose shift follows the size of a sample, with the shift of one size.

    Dynamic shifting with mu is a fixed shift of exp(mu), or of mu itself where it is linear.
    """
    linear = scheduler.config.get("time_shift_type") == "linear"
    shift = {shift_of(scheduler): float(mu) if linear else float(np.exp(mu)), "use_dynamic_shifting": False}
    return type(scheduler).from_config(dict(scheduler.config), **shift)


def check_is_scheduler(scheduler: object) -> None:
    """A sampler's name, or a pipeline, in a scheduler's place raises an error that says what to pass."""
    if isinstance(scheduler, str):
        raise InputError(
            f"the scheduler {scheduler!r} is a name; expected a scheduler of diffusers. Pass "
            f"sb.scheduler({scheduler!r}, like=...), with the network's own scheduler in like, as pipe.scheduler is."
        )
    if hasattr(scheduler, "scheduler") and not hasattr(scheduler, "sigma_range"):
        raise InputError(
            f"{type(scheduler).__name__} came in a scheduler's place, and has one. Pass its own, as pipe.scheduler."
        )


def levels_scheduler(low: float, high: float) -> Scheduler:
    """A DDPM scheduler of 1,000 levels from sigma ``low`` to ``high``, evenly in sigma^(1/7), which cuts no sample.

    Raises:
        InputError: for levels that single-precision betas do not tell apart.

    Source: the spacing of arXiv:2206.00364.
    """
    if not LEAST_LEVEL <= low < high <= MOST_LEVEL:
        raise InputError(
            f"levels from sigma {low:.3g} to {high:.3g} for a scheduler; expected some from {LEAST_LEVEL:g} to "
            f"{MOST_LEVEL:g}."
        )
    alpha_bar = 1 / (1 + np.linspace(low ** (1 / 7), high ** (1 / 7), 1000) ** 14)
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return diffusers.DDPMScheduler(trained_betas=betas.tolist(), clip_sample=False)


def scheduler(name: str, like: Scheduler | Levels | None = None, **settings: object) -> Scheduler:
    """A diffusers scheduler by our sampler name.

    Args:
        name: one of `SAMPLERS`.
        like: scheduler whose betas, as they are realised, and settings are taken over, whether they were written down
            or are its class's defaults; by default DDPM's linear betas (for EDM and flow samplers: the class's own
            defaults).
        **settings: further settings of the diffusers class, e.g. ``timestep_spacing="trailing"``.

    Raises:
        InputError: for an unknown name, a scheduler of another kind in ``like``, or a prediction or a time of its
            network that the sampler does not know.

    >>> type(scheduler("dpm++2m")).__name__
    'DPMSolverMultistepScheduler'
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}. Known: {', '.join(SAMPLERS)}.")
    class_name, changes = SAMPLERS[name]
    cls = getattr(diffusers, class_name)
    if like is None:
        betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        if name.startswith("flow-"):
            betas = {"prediction_type": "flow_prediction"} if "use_flow_sigmas" in changes else {}
        return cls(**({} if name.startswith("edm") else betas) | changes | settings)
    check_is_scheduler(like)
    if isinstance(like, Levels):
        low, high = max(1.001 * like.sigma_range[0], LEAST_LEVEL), min(like.sigma_range[1] / 1.001, MOST_LEVEL)
        if name.startswith("edm"):
            return cls(**{"sigma_min": low, "sigma_max": high} | changes | settings)
        like = levels_scheduler(low, high)
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
    # diffusers leaves out what it noted as defaults of another class, whose defaults need not be this one's.
    config = (
        {k: v for k, v in dict(like.config).items() if k not in (*_OWN, "_use_default_values")} | changes | settings
    )
    if kinds[0] == "flow":
        config |= {k: dict(like.config).get(shift_of(like), 1.0) for k in ("shift", "flow_shift")} | settings
        config["prediction_type"] = "flow_prediction"
        if config.get("use_dynamic_shifting"):
            raise InputError(
                f"{type(like).__name__} shifts its levels with the size of a sample, which is not known here. Take the "
                "scheduler of sb.denoiser(pipeline, prompt=...), or one with a fixed shift."
            )
    config["_class_name"] = type(like).__name__  # by which diffusers knows whose settings these are
    _check_known(name, class_name, config)
    if class_name != "DDPMScheduler" and str(config.get("variance_type")).startswith("learned"):
        del config["variance_type"]  # only DDPM steps know what to do with a learned variance
    if kinds[0] != "vp" or _BETAS & settings.keys():
        return cls.from_config(config)
    with suppress(NotImplementedError):  # sigmoid and laplace betas, which few classes know by name
        made = cls.from_config(config)
        if _same_betas(made, like):
            return made
    return cls.from_config(
        config | {"trained_betas": realised_betas(like), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    )


def _check_known(name: str, class_name: str, config: Mapping[str, object]) -> None:
    """A network that a sampler's steps do not know raises an error that names samplers which do."""
    if config.get("prediction_type") == "sample" and name in _NO_SAMPLE:
        raise InputError(
            f"the sampler {name} does not know networks that predict the sample; expected ddim, euler, heun or dpm++2m."
        )
    if continuous(config) and class_name != "EulerDiscreteScheduler":
        raise InputError(
            f"the network's time is log(sigma) / 4 (timestep_type 'continuous'), which {class_name} does not know. Use "
            "the sampler euler."
        )


def _same_betas(made: Scheduler, like: Scheduler) -> bool:
    """Whether two schedulers speak of the same noise; a last step without signal has only to be the noisiest."""
    a, b = (torch.as_tensor(s.alphas_cumprod, device="cpu").double().numpy() for s in (made, like))
    inner = len(a) == len(b) and np.allclose(a[:-1], b[:-1], rtol=1e-4, atol=1e-12)
    last = np.isclose(a[-1], b[-1], rtol=1e-4, atol=2 * _SIGNAL) if inner else False
    return bool(inner and last and a[-1] < a[-2])


def realised_betas(scheduler: Scheduler, last: int | None = None) -> list[float]:
    """The betas of steps 0 .. ``last`` as a scheduler uses them, after any rescaling, as plain floats.

    A last step without any signal gets as little of it as diffusers gives it, so that its sigma is finite.
    """
    alpha_bar, betas = (
        torch.as_tensor(v, device="cpu").double().numpy()[: None if last is None else last + 1]
        for v in (scheduler.alphas_cumprod, scheduler.betas)
    )
    if betas[-1] >= 1 or not np.allclose(np.cumprod(1 - betas), alpha_bar, rtol=1e-4, atol=1e-9):
        alpha_bar = np.append(alpha_bar[:-1], max(alpha_bar[-1], min(_SIGNAL, alpha_bar[-2] / 4)))
        betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return [float(b) for b in np.minimum(betas, 1 - 1e-7)]
