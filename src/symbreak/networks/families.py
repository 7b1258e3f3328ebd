"""Borders: diffusers networks and schedulers on one side, denoisers and laws on the other.

A network sees a state and its own time t and predicts epsilon, v or the sample; a denoiser sees the
VE state x = x_0 + sigma eps and gives E[x_0 | x]. With state = alpha x:

    epsilon: D = x - sigma eps        v: D = alpha state - std v        sample: D = output
    EDM: D = c_skip x + c_out F(c_in x, log(sigma) / 4)        flow matching: D = state - s v, s = std

(Salimans & Ho, arXiv:2202.00512; Karras et al., arXiv:2206.00364; Lipman et al., arXiv:2210.02747).
Between a network's discrete steps t is interpolated in log sigma and the network evaluated at fractional t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput

from symbreak.networks.adapters import (
    EDM_RANGE,
    FAMILIES,
    Adapted,
    adapted,
    family_of,
    placed,
    sample_shape,
    takes_sigma,
)
from symbreak.networks.denoiser import Denoiser, Denoises, as_denoiser, in_words, network_of, null_label, open_classes
from symbreak.networks.own_call import of_pipeline
from symbreak.networks.samplers import check_is_scheduler, kind_of
from symbreak.networks.samplers import scheduler as named_scheduler
from symbreak.networks.types import Network, Scheduler
from symbreak.noise import NoiseLevel, schedule, sigma_of
from symbreak.runtime.files import InputError

__all__ = [
    "NetworkDenoiser",
    "SigmaDenoiser",
    "as_unet",
    "denoiser",
    "denoises",
    "is_picture",
    "posing",
    "sample_shape",
]

NEAR = 3.0  # times below its lowest level a network is still asked at that level
# How libraries say that they cannot take what came.
REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
    NotImplementedError,
)


class Parametrization:
    """What a scheduler's network sees, alpha x (EDM's divided by a scale), and predicts: D = skip x + scale out."""

    def __init__(self, scheduler: Scheduler) -> None:
        config = scheduler.config
        self.schedule, self.kind = schedule(scheduler), kind_of(scheduler)
        self.prediction = "flow" if self.kind == "flow" else str(config.prediction_type)
        self.data = float(config.sigma_data) if self.kind == "edm" else 1.0
        known = ("epsilon", "v_prediction", "sample", "flow")
        if self.prediction not in known:
            raise InputError(f"prediction type {self.prediction!r}; expected one of {', '.join(known)}.")

    def divisor(self, sigma: torch.Tensor) -> torch.Tensor | float:
        """By which the state is divided before the network sees it."""
        return (sigma**2 + self.data**2).sqrt() if self.kind == "edm" else 1.0

    def coefficients(
        self, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """skip and scale of a level."""
        if self.kind == "edm":  # as diffusers' EDM schedulers use them
            total = sigma**2 + self.data**2
            scale = sigma * self.data / total.sqrt()
            return self.data**2 / total, -scale if self.prediction == "v_prediction" else scale
        table: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {
            "epsilon": (1.0, -sigma),
            "v_prediction": (alpha**2, -alpha * sigma),
            "sample": (0.0, 1.0),
            "flow": (alpha, -alpha * sigma),
        }
        return table[self.prediction]


def _columns(levels: Sequence[NoiseLevel], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of levels as columns beside x, in its dtype."""
    column = [-1] + [1] * (x.ndim - 1)
    alpha, sigma = (
        torch.tensor(values, dtype=x.dtype, device=x.device).reshape(column)
        for values in ([v.alpha for v in levels], [v.sigma for v in levels])
    )
    return alpha, sigma


def answer(unet: Network, x: torch.Tensor, t: torch.Tensor, condition: Mapping[str, object]) -> torch.Tensor:
    """What a network makes of its states [B, *S] at times [B], in its own precision, answered in the dtype of x.

    Args:
        unet: the network.
        x: states [B, *S] as the network sees them.
        t: times [B].
        condition: of the network; one row of a condition stands for every state.

    Raises:
        InputError: for states or a condition that the network cannot take.
    """
    weight = next(iter(unet.parameters()), x)
    try:
        out = unet(x.to(weight), t.to(weight.device), **placed(weight.device, condition, len(x)), return_dict=False)[0]
    except (InputError, torch.OutOfMemoryError):
        raise
    except REFUSALS as error:
        raise InputError(_cannot_take(x, condition, error)) from error
    if not isinstance(out, torch.Tensor) or out.ndim != x.ndim or out.shape[2:] != x.shape[2:] or len(out) != len(x):
        came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise InputError(f"the network gave {came} for states of {tuple(x.shape)}; expected the same shape.")
    if out.shape[1] not in (x.shape[1], 2 * x.shape[1]):  # the second half says how wide, as of learned variances
        raise InputError(
            f"the network gave {out.shape[1]} channels for states of {x.shape[1]}; expected as many, or twice as many."
        )
    return out.to(x)


def _cannot_take(x: torch.Tensor, condition: Mapping[str, object], error: Exception) -> str:
    """Why a network could not be called, in one line."""
    names = ", ".join(condition) or "no condition"
    what = " ".join(str(error).split())[:160] or type(error).__name__
    return f"the network cannot take states of shape {tuple(x.shape)} with {names}: {what}"


class NetworkDenoiser:
    """A diffusers network as a `Denoiser`; see `denoiser`."""

    def __init__(self, unet: Network, scheduler: Scheduler, **condition: object) -> None:
        self.unet, self.scheduler, self.condition = adapted(unet), scheduler, condition
        self.says = Parametrization(scheduler)
        self.schedule, self.prediction = self.says.schedule, self.says.prediction
        self.shape: tuple[int, ...] = sample_shape(self.unet)

    def __repr__(self) -> str:
        network = self.unet.network if isinstance(self.unet, Adapted) else self.unet
        return in_words(self, f"{type(network).__name__}, predicts {self.prediction}", self.condition)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Levels the network was trained on."""
        return self.schedule.sigma_range

    def bind(self, **condition: object) -> NetworkDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        out = copy(self)  # its schedule stands: it cannot be read inside a derivative
        out.condition = {**self.condition, **condition}
        return out

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        _check_shape(x, self.shape)
        sigmas = torch.as_tensor(sigma_of(sigma), dtype=torch.float64).reshape(-1)
        known = {s: self.schedule.time(s) for s in set(sigmas.tolist())}  # a batch has one level, or few
        times = torch.tensor([known[s] for s in sigmas.tolist()], dtype=torch.float64)
        levels = {t: self.schedule.level(t) for t in known.values()}
        alpha, _ = _columns([levels[t] for t in times.tolist()], x)
        s = sigmas.to(x).reshape(alpha.shape)  # as it came: time and back rounds
        t = times.to(x).expand(len(x)) if len(times) == 1 else times.to(x)
        if self.says.kind == "vp":
            # Where a step is meant exactly, the network is evaluated exactly there.
            t = torch.where((t - t.round()).abs() < 1e-6, t.round(), t)
        weight = next(iter(self.unet.parameters()), x)
        out = answer(self.unet, alpha * x / self.says.divisor(s), t.to(weight), self.condition)
        skip, scale = self.says.coefficients(alpha, s)
        return skip * x + scale * out[:, : self.shape[0]]  # learned-variance networks append variance channels


def _check_shape(x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise InputError(f"states of shape {tuple(x.shape)} for a network of {shape}. Resize the data.")


class SigmaDenoiser:
    """A network that is a denoiser already, as EDM's and k-diffusion's are; see `denoiser`."""

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        shape: tuple[int, ...],
        sigma_range: tuple[float, float],
        condition: dict[str, object],
        family: str = "k-diffusion",
    ) -> None:
        self.model, self.shape, self.sigma_range, self.condition = model, shape, sigma_range, condition
        self.family = family
        self.num_class_embeds, self.null_label = FAMILIES[family].classes(model)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        return in_words(self, f"{name}, {self.family}", self.condition)

    def bind(self, **condition: object) -> SigmaDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        return SigmaDenoiser(self.model, self.shape, self.sigma_range, {**self.condition, **condition}, self.family)

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        _check_shape(x, self.shape)
        s = torch.as_tensor(sigma_of(sigma), dtype=torch.float64, device=x.device).reshape(-1)
        low, high = self.sigma_range
        # Their own grids are float32: the ends of the range may differ by its rounding.
        if not (s.numel() and low * (1 - 1e-6) <= float(s.min()) and float(s.max()) <= high * (1 + 1e-6)):
            raise ValueError(
                f"sigma from {float(s.min()):.6g} to {float(s.max()):.6g} is outside the network's {low:.6g} to "
                f"{high:.6g}. Choose a level in that range."
            )
        weights = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
        weight = next(iter(weights), x)
        each = s.clamp(low, high).expand(len(x)) if len(s) == 1 else s.clamp(low, high)
        call, condition = FAMILIES[self.family].call, placed(weight.device, self.condition, len(x))
        try:
            out = call(self.model, x.to(weight), each.to(weight), condition)
        except (InputError, torch.OutOfMemoryError):
            raise
        except REFUSALS as error:
            raise InputError(_cannot_take(x, self.condition, error)) from error
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(
                f"model(x, sigma) gave {came} for states of {tuple(x.shape)}; expected denoised states of the same "
                "shape. A diffusers network needs its scheduler: sb.denoiser(unet, scheduler)."
            )
        return out.to(x)


def denoiser(
    unet: Network,
    scheduler: Scheduler | None = None,
    *,
    family: str | None = None,
    shape: tuple[int, ...] | None = None,
    sigma_range: tuple[float, float] | None = None,
    **condition: object,
) -> NetworkDenoiser | SigmaDenoiser:
    """A network of any family as d(x, sigma) -> E[x_0 | x].

    Args:
        unet: a network of diffusers, a UNet or a transformer, or a function ``net(x, t)``, which predict epsilon, v,
            the sample, EDM's F or a velocity, as the scheduler's config says; learned variance channels are dropped.
            ``net(t, x)`` with data at t = 1, as torchcfm's. Without a scheduler also EDM's
            ``net(x, sigma, class_labels)``, k-diffusion's ``model(x, sigma)`` and azula's denoisers. Or a pipeline of
            diffusers: its network and scheduler, told what the pipeline's own call would tell it.
        scheduler: diffusers scheduler it was trained with; none for networks that take sigma.
        family: one of `FAMILIES`, such as ``"time-last"``, where neither class nor arguments say it.
        shape: sample shape S, where the network does not say it, as in (16, 128, 128).
        sigma_range: levels it knows, of a network that takes sigma; by default its ``sigma_min`` and ``sigma_max``.
        **condition: passed on to every call, such as ``class_labels``; of a pipeline ``prompt`` and whatever else its
            call takes; ``prompt=None`` is what its own guidance leads away from. One row of a condition stands for all
            samples.

    Returns:
        A `Denoiser`; outside its ``sigma_range`` it raises ValueError.

    Raises:
        InputError: where shape or range can neither be read off nor were given, for a transformer of no known family,
            and where a pipeline's call cannot be made.

    Source: EDM, arXiv:2206.00364; k-diffusion's contract is the same.
    """
    if isinstance(unet, DiffusionPipeline):
        if scheduler is not None or family is not None:
            raise InputError("a pipeline came with a scheduler or a family of its own. Leave them out.")
        network, scheduler, condition = of_pipeline(unet, shape, condition)
        return NetworkDenoiser(network, scheduler, **condition)
    check_is_scheduler(scheduler)
    key = None if isinstance(unet, Adapted) else family_of(unet, family, scheduler is not None)
    if key is None or not FAMILIES[key].sigma:
        of = FAMILIES[unet.family if key is None else key]
        if scheduler is None and of.scheduler is not None:
            scheduler = named_scheduler(of.scheduler)
        if scheduler is None:
            raise InputError(
                f"{type(unet).__name__} came without the scheduler it was trained with: it needs its scheduler. Pass "
                "sb.denoiser(network, scheduler)."
            )
        if sigma_range is not None:
            raise InputError("sigma_range came with a scheduler, which says the levels. Leave it out.")
        return NetworkDenoiser(adapted(unet, key, shape), scheduler, **condition)
    whole = FAMILIES[key].shape(unet) if shape is None else shape
    if whole is None:
        raise InputError(
            f"{type(unet).__name__} does not say its shape (no img_channels and img_resolution). Pass "
            "shape=(C, H, W); for a diffusers network pass its scheduler."
        )
    low, high = _sigma_range(unet, key) if sigma_range is None else map(float, sigma_range)
    if not 0 <= low < high:
        raise InputError(f"a sigma_range from {low:g} to {high:g}; expected 0 <= low < high.")
    return SigmaDenoiser(unet, tuple(int(n) for n in whole), (low, high), condition, key)


def _sigma_range(network: Network, family: str) -> tuple[float, float]:
    """The levels that a network says it knows."""
    ends = getattr(network, "sigma_min", None), getattr(network, "sigma_max", None)
    if ends[0] is not None and ends[1] is not None:
        return float(ends[0]), float(ends[1])
    if family == "edm":  # EDM2's networks do not say theirs
        return EDM_RANGE
    if family == "azula":
        alpha, std = (v.double() for v in network.schedule(torch.tensor([0.0, 1.0])))
        low, high = (std / alpha).tolist()
        return low, high
    raise InputError(
        f"{type(network).__name__} does not say its levels (no sigma_min and sigma_max). Pass sigma_range=(a, b)."
    )


class _Posing(torch.nn.Module):
    """A law or denoiser with the face of a diffusers UNet."""

    def __init__(self, source: Denoiser, scheduler: Scheduler) -> None:
        super().__init__()
        self.source, self.says = source, Parametrization(scheduler)
        self.network = network_of(source)  # whose weights say where states lie, and in which precision
        shape = tuple(source.shape)
        self.config = FrozenDict(
            in_channels=shape[0],
            out_channels=shape[0],
            num_class_embeds=open_classes(source),
            null_label=null_label(source),
            **({"sample_size": shape[1:]} if len(shape) == 3 else {"sample_shape": shape}),
        )
        self.dtype = torch.float32

    def __repr__(self) -> str:
        return f"as_unet({self.source!r})"

    @property
    def device(self) -> torch.device:
        """Where its weights lie, if it has any."""
        weight = next(self.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    def _level(self, t: float) -> NoiseLevel:
        times = self.says.schedule
        level = times.level(min(max(t, times.t_min), times.t_max))  # samplers may go a hair beyond the last step
        if math.isinf(level.sigma):
            # Pure noise says nothing about x_0; a sigma of 1e6 says as little, and stays finite.
            return NoiseLevel(1e6, alpha=1 / (1 + 1e6)) if self.says.kind == "flow" else NoiseLevel(1e6)
        return level

    @property
    def guidance(self) -> dict[str, object] | None:
        """Scale and window of its guidance, where it has some."""
        return getattr(self.source, "guidance", None)

    @property
    def unconditional(self) -> Denoiser | None:
        """The denoiser that its guidance leads away from, where it has some."""
        return getattr(self.source, "unconditional", None)

    def evaluations(self, t: float) -> int:
        """Network evaluations (NFE) at a time: two where guidance asks with a condition and without."""
        count: int = getattr(self.source, "evaluations", lambda _: 1)(self._level(t).sigma)
        return count

    def forward(
        self,
        sample: torch.Tensor,
        timestep: float | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        **_: object,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).tolist()
        known = {t: self._level(t) for t in set(times)}
        state = sample.double()
        alpha, sigma = _columns([known[t] for t in times], state)
        x = state * self.says.divisor(sigma) / alpha
        source: Any = self.source
        each = sigma.reshape(-1).expand(len(x)) if len(times) == 1 else sigma.reshape(-1)
        # A grid may end a little below what a network knows, 0.01 of DDPM below k-diffusion's 0.02: asked at its lowest
        # level there. Farther below it would blur, and says that it is asked outside its range.
        low = float(getattr(source, "sigma_range", (0.0,))[0])
        each = torch.where((each < low) & (each > low / NEAR), torch.full_like(each, low), each)
        if not self.config.num_class_embeds or class_labels is None:
            d = source(x, each)
        elif hasattr(source, "bind"):
            d = source.bind(class_labels=class_labels)(x, each)
        else:
            d = source(x, each, class_labels=class_labels)
        skip, scale = self.says.coefficients(alpha, sigma)
        out = ((d - skip * x) / scale).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def as_unet(law_or_denoiser: Denoises | Denoiser, scheduler: Scheduler) -> Network:
    """A law or a denoiser, of samples of any shape, posing as the diffusers network that a scheduler expects.

    Every sampler can be run with a denoiser ``model(x, sigma)``, or an exact law, in place of a network. It predicts
    what ``scheduler.config.prediction_type`` asks for; computed in float64.
    """
    return _Posing(as_denoiser(law_or_denoiser), scheduler)


def posing(model: Network | Denoises | Denoiser, scheduler: Scheduler) -> Network:
    """A diffusers network as it is; a law or a denoiser as one that the scheduler expects."""
    if isinstance(model, Denoises | Denoiser):
        return as_unet(model, scheduler)
    return as_unet(denoiser(model), scheduler) if takes_sigma(model) else adapted(model)


def denoises(model: Network | Denoises | Denoiser, scheduler: Scheduler) -> Denoiser:
    """The denoiser of a diffusers network with a scheduler; a law's own, or the denoiser itself."""
    return as_denoiser(model) if isinstance(model, Denoises | Denoiser) else denoiser(model, scheduler)


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of a shape are taken for pictures in [-1, 1]: grey or in colour."""
    return len(shape) == 3 and shape[0] in (1, 3)
