"""Borders: diffusers networks and schedulers on one side, denoisers and laws on the other.

A network sees a state and its own time t and predicts epsilon, v or the sample; a denoiser sees the
VE state x = x_0 + sigma eps and gives E[x_0 | x]. With state = alpha x:

    epsilon: D = x - sigma eps        v: D = alpha state - std v        sample: D = output
    EDM: D = c_skip x + c_out F(c_in x, log(sigma) / 4)        flow matching: D = state - s v, s = std

(Salimans & Ho, arXiv:2202.00512; Karras et al., arXiv:2206.00364; Lipman et al., arXiv:2210.02747).
Between a network's discrete steps t is interpolated in log sigma and the network asked at fractional t.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from symbreak.networks.denoiser import Denoiser, as_denoiser
from symbreak.networks.samplers import kind_of
from symbreak.noise import NoiseLevel, schedule
from symbreak.runtime.files import InputError

__all__ = ["NetworkDenoiser", "SigmaDenoiser", "as_unet", "denoiser"]


class NetworkDenoiser:
    """A diffusers network as a `Denoiser`; see `denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, **condition: Any) -> None:
        self.unet, self.scheduler, self.condition = unet, scheduler, condition
        self.schedule = schedule(scheduler)
        self.kind = kind_of(scheduler)
        config = unet.config
        size = config.sample_size
        h, w = (size, size) if isinstance(size, int) else tuple(size)
        self.shape: tuple[int, ...] = (int(config.in_channels), int(h), int(w))
        self.prediction = "flow" if self.kind == "flow" else str(scheduler.config.prediction_type)
        known = ("epsilon", "v_prediction", "sample", "flow")
        if self.prediction not in known:
            raise InputError(f"prediction type {self.prediction!r}; expected one of {', '.join(known)}.")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Levels the network was trained on."""
        return self.schedule.sigma_range

    def bind(self, **condition: Any) -> NetworkDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        return NetworkDenoiser(self.unet, self.scheduler, **{**self.condition, **condition})

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"states of shape {tuple(x.shape)} for a network of {self.shape}. Resize the data.")
        sigmas = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        times = torch.tensor([self.schedule.time(float(s)) for s in sigmas], dtype=torch.float64)
        levels = [self.schedule.level(float(t)) for t in times]
        column = [-1] + [1] * (x.ndim - 1)
        like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        s = sigmas.to(**like).reshape(column)
        alpha = torch.tensor([v.alpha for v in levels], **like).reshape(column)
        state = self._inputs(alpha * x, s)
        t = times.to(**like).expand(len(x)) if len(times) == 1 else times.to(**like)
        if self.kind == "vp":
            # Where a step is meant exactly, the network is asked exactly there.
            t = torch.where((t - t.round()).abs() < 1e-6, t.round(), t)
        weight = next(iter(self.unet.parameters()), x)
        seen, given = state.to(weight), _at(weight.device, self.condition)
        out = self.unet(seen, t.to(weight), **given, return_dict=False)[0].to(x)
        out = out[:, : self.shape[0]]  # learned-variance networks append variance channels
        return self._denoised(out, x, alpha * x, alpha, s)

    def _inputs(self, state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.kind == "edm":
            return state / (sigma**2 + float(self.scheduler.config.sigma_data) ** 2).sqrt()
        return state

    def _denoised(
        self, out: torch.Tensor, x: torch.Tensor, state: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        if self.kind == "edm":
            skip, scale = _edm_coefficients(self.scheduler, sigma)
            return skip * x + scale * out
        if self.prediction == "flow":
            return state - alpha * sigma * out
        if self.prediction == "epsilon":
            return x - sigma * out
        if self.prediction == "v_prediction":
            return alpha * state - alpha * sigma * out
        return out


def _edm_coefficients(scheduler: Any, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out as diffusers' EDM schedulers use them."""
    data = float(scheduler.config.sigma_data)
    skip = data**2 / (sigma**2 + data**2)
    scale = sigma * data / (sigma**2 + data**2).sqrt()
    return skip, -scale if scheduler.config.prediction_type == "v_prediction" else scale


class SigmaDenoiser:
    """A network that is a denoiser already, as EDM's and k-diffusion's are; see `denoiser`."""

    def __init__(
        self, model: Any, shape: tuple[int, ...], sigma_range: tuple[float, float], condition: dict[str, Any]
    ) -> None:
        self.model, self.shape, self.sigma_range, self.condition = model, shape, sigma_range, condition

    def bind(self, **condition: Any) -> SigmaDenoiser:
        """The same denoiser with a condition fixed, e.g. ``bind(class_labels=y)``."""
        return SigmaDenoiser(self.model, self.shape, self.sigma_range, {**self.condition, **condition})

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"states of shape {tuple(x.shape)} for a network of {self.shape}. Resize the data.")
        s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1)
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
        out = self.model(x.to(weight), each.to(weight), **_at(weight.device, self.condition))
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(
                f"model(x, sigma) gave {came} for states of {tuple(x.shape)}; expected denoised states of the same "
                "shape. A diffusers network needs its scheduler: sb.denoiser(unet, scheduler)."
            )
        return out.to(x)


def _at(device: torch.device, condition: dict[str, Any]) -> dict[str, Any]:
    """A condition whose tensors lie where the network does."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in condition.items()}


@overload
def denoiser(unet: Any, scheduler: Any, **condition: Any) -> NetworkDenoiser: ...


@overload
def denoiser(
    unet: Any,
    scheduler: None = None,
    *,
    shape: tuple[int, ...] | None = None,
    sigma_range: tuple[float, float] | None = None,
    **condition: Any,
) -> SigmaDenoiser: ...


def denoiser(
    unet: Any,
    scheduler: Any = None,
    *,
    shape: tuple[int, ...] | None = None,
    sigma_range: tuple[float, float] | None = None,
    **condition: Any,
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

    def __init__(self, source: Denoiser, scheduler: Any) -> None:
        super().__init__()
        self.source, self.scheduler = source, scheduler
        self.kind = kind_of(scheduler)
        self.schedule = schedule(scheduler)
        shape = source.shape
        if len(shape) != 3:
            raise InputError(f"a law of shape {shape} cannot pose as a network; expected [C, H, W].")
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict(
            in_channels=shape[0], out_channels=shape[0], sample_size=tuple(shape[1:]), num_class_embeds=None
        )
        self.dtype = torch.float32

    def _level(self, t: float) -> NoiseLevel:
        # Samplers may ask a hair beyond the last step.
        level = self.schedule.level(min(max(t, self.schedule.t_min), self.schedule.t_max))
        if math.isinf(level.sigma):
            # Pure noise says nothing about x_0; a sigma of 1e6 says as little, and stays finite.
            return NoiseLevel(1e6, alpha=1 / (1 + 1e6) if self.kind == "flow" else None)  # type: ignore[arg-type]
        return level

    def forward(
        self, sample: torch.Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True, **_: Any
    ) -> Any:
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).tolist()
        known = {t: self._level(t) for t in set(times)}
        levels = [known[t] for t in times]
        column = [-1] + [1] * (sample.ndim - 1)
        sigma = torch.tensor([v.sigma for v in levels], dtype=torch.float64, device=sample.device).reshape(column)
        alpha = torch.tensor([v.alpha for v in levels], dtype=torch.float64, device=sample.device).reshape(column)
        state = sample.double()
        if self.kind == "edm":
            state = state * (sigma**2 + float(self.scheduler.config.sigma_data) ** 2).sqrt()
        x = state / alpha
        d = self.source(x, sigma.reshape(-1).expand(len(x)) if len(levels) == 1 else sigma.reshape(-1))
        prediction = "flow" if self.kind == "flow" else str(self.scheduler.config.prediction_type)
        if self.kind == "edm":
            skip, scale = _edm_coefficients(self.scheduler, sigma)
            out = (d - skip * x) / scale
        elif prediction == "flow":
            out = (state - d) / (alpha * sigma)
        elif prediction == "epsilon":
            out = (x - d) / sigma
        elif prediction == "v_prediction":
            out = (alpha * state - d) / (alpha * sigma)
        else:
            out = d
        out = out.to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def as_unet(law_or_denoiser: Any, scheduler: Any) -> torch.nn.Module:
    """A law (or denoiser) of shape [C, H, W] posing as the diffusers network that a scheduler expects.

    For tests and demonstrations: every sampler can be run with an exact denoiser in place of a network.
    It predicts what ``scheduler.config.prediction_type`` asks for; computed in float64.
    """
    return _Posing(as_denoiser(law_or_denoiser), scheduler)
