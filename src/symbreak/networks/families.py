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
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_1d import UNet1DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from symbreak.networks.denoiser import Denoiser, Denoises, as_denoiser, network_of, null_label, open_classes
from symbreak.networks.samplers import kind_of
from symbreak.networks.types import Network, Scheduler
from symbreak.noise import NoiseLevel, schedule, sigma_of
from symbreak.runtime.files import InputError

__all__ = ["NetworkDenoiser", "SigmaDenoiser", "as_unet", "denoiser", "denoises", "is_picture", "posing"]


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


def sample_shape(unet: Network) -> tuple[int, ...]:
    """The shape S of a network's samples: (C, H, W) of pictures.

    A network of other samples says it in its config: ``sample_shape``, or as diffusers' UNet1DModel does.

    Raises:
        InputError: where its config does not say it.
    """
    config: Any = getattr(unet, "config", None)
    if not hasattr(config, "in_channels"):
        raise InputError(
            f"{type(unet).__name__} is no network of diffusers: it has no config. A network that is a denoiser "
            "already, as EDM's, is taken as sb.denoiser(network), with its shape and sigma_range."
        )
    whole = getattr(config, "sample_shape", None)
    size, channels = getattr(config, "sample_size", None), config.in_channels
    if whole is None and isinstance(unet, UNet1DModel):
        whole = [channels, size]
    if whole is None:
        sides: Any = (size, size) if isinstance(size, int) else size
        whole = [channels, *sides] if isinstance(sides, list | tuple) and len(sides) == 2 else []
    if not whole or not all(type(n) is int and n > 0 for n in whole):
        raise InputError(
            f"the network's config says sample_size={size!r} and in_channels={channels!r}; expected whole numbers "
            "above 0. Set them, as in unet.register_to_config(sample_size=32)."
        )
    return tuple(whole)


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
        out = unet(x.to(weight), t.to(weight.device), **_at(weight.device, condition, len(x)), return_dict=False)[0]
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(f"the network cannot take states of shape {tuple(x.shape)}: {what}") from error
    return out.to(x)


class NetworkDenoiser:
    """A diffusers network as a `Denoiser`; see `denoiser`."""

    def __init__(self, unet: Network, scheduler: Scheduler, **condition: object) -> None:
        self.unet, self.scheduler, self.condition = unet, scheduler, condition
        self.says = Parametrization(scheduler)
        self.schedule, self.prediction = self.says.schedule, self.says.prediction
        self.shape: tuple[int, ...] = sample_shape(unet)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Levels the network was trained on."""
        return self.schedule.sigma_range

    def bind(self, **condition: object) -> NetworkDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        return NetworkDenoiser(self.unet, self.scheduler, **{**self.condition, **condition})

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
    ) -> None:
        self.model, self.shape, self.sigma_range, self.condition = model, shape, sigma_range, condition

    def bind(self, **condition: object) -> SigmaDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        return SigmaDenoiser(self.model, self.shape, self.sigma_range, {**self.condition, **condition})

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
        try:
            out = self.model(x.to(weight), each.to(weight), **_at(weight.device, self.condition, len(x)))
        except TypeError as error:  # a condition that it does not know
            what = " ".join(str(error).split())[:160]
            raise InputError(f"the network cannot take states of shape {tuple(x.shape)}: {what}") from error
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(
                f"model(x, sigma) gave {came} for states of {tuple(x.shape)}; expected denoised states of the same "
                "shape. A diffusers network needs its scheduler: sb.denoiser(unet, scheduler)."
            )
        return out.to(x)


def _at(device: torch.device, condition: Mapping[str, object], rows: int) -> dict[str, Any]:
    """A condition whose tensors lie where the network does; a single row of one stands for all rows."""
    placed: dict[str, Any] = {}
    for name, value in condition.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            value = value.expand(rows, *value.shape[1:]) if value.ndim and len(value) == 1 else value
        elif isinstance(value, Mapping):
            value = _at(device, value, rows)
        placed[name] = value
    return placed


def denoiser(
    unet: Any,
    scheduler: Scheduler | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    sigma_range: tuple[float, float] | None = None,
    **condition: object,
) -> NetworkDenoiser | SigmaDenoiser:
    """A network as d(x, sigma) -> E[x_0 | x].

    Args:
        unet: a diffusers network, ``unet(state, t, return_dict=False)[0]`` -> epsilon, v, sample, EDM's F or a
            velocity, as the scheduler's config says; learned variance channels are dropped. Without a
            scheduler: EDM's ``net(x, sigma, class_labels)`` or k-diffusion's ``model(x, sigma)``, which take
            VE states [B, *S] and sigma [B] and give denoised states.
        scheduler: diffusers scheduler it was trained with; ``None`` for EDM and k-diffusion.
        shape: sample shape S, without a scheduler; by default EDM's ``img_channels`` and ``img_resolution``.
        sigma_range: levels it knows, without a scheduler; by default its ``sigma_min`` and ``sigma_max``.
        **condition: passed on to every call, e.g. ``class_labels``.

    Returns:
        A `Denoiser`; outside its ``sigma_range`` it raises ValueError.

    Raises:
        InputError: where shape or range can neither be read off nor were given.

    Source: EDM, arXiv:2206.00364; k-diffusion's contract is the same.
    """
    if scheduler is not None:
        if shape is not None or sigma_range is not None:
            raise InputError("shape and sigma_range came with a scheduler, which says both. Leave them out.")
        return NetworkDenoiser(unet, scheduler, **condition)
    if shape is None:
        channels, size = getattr(unet, "img_channels", None), getattr(unet, "img_resolution", None)
        if channels is None or size is None:
            raise InputError(
                f"{type(unet).__name__} does not say its shape (no img_channels and img_resolution). Pass "
                "shape=(C, H, W); for a diffusers network pass its scheduler."
            )
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    if sigma_range is None:
        ends = getattr(unet, "sigma_min", None), getattr(unet, "sigma_max", None)
        if ends[0] is None or ends[1] is None:
            raise InputError(
                f"{type(unet).__name__} does not say its levels (no sigma_min and sigma_max). Pass sigma_range=(a, b)."
            )
        sigma_range = float(ends[0]), float(ends[1])
    low, high = float(sigma_range[0]), float(sigma_range[1])
    if not 0 <= low < high:
        raise InputError(f"a sigma_range from {low:g} to {high:g}; expected 0 <= low < high.")
    return SigmaDenoiser(unet, tuple(int(n) for n in shape), (low, high), condition)


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
    return as_unet(model, scheduler) if isinstance(model, Denoises | Denoiser) else model


def denoises(model: Network | Denoises | Denoiser, scheduler: Scheduler) -> Denoiser:
    """The denoiser of a diffusers network with a scheduler; a law's own, or the denoiser itself."""
    return as_denoiser(model) if isinstance(model, Denoises | Denoiser) else denoiser(model, scheduler)


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of a shape are taken for pictures in [-1, 1]: grey or in colour."""
    return len(shape) == 3 and shape[0] in (1, 3)
