"""Borders: diffusers networks and schedulers on one side, denoisers and laws on the other.

A network sees a state and its own time t and predicts epsilon, v or the sample; a denoiser sees the
VE state x = x_0 + sigma eps and gives E[x_0 | x]. With state = alpha x:

    epsilon: D = x - sigma eps        v: D = alpha state - std v        sample: D = output
    EDM: D = c_skip x + c_out F(c_in x, log(sigma) / 4)        flow matching: D = state - s v, s = std

(Salimans & Ho, arXiv:2202.00512; Karras et al., arXiv:2206.00364; Lipman et al., arXiv:2210.02747).
Between a network's discrete steps t is interpolated in log sigma and the network asked at fractional t.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, overload

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from symbreak.networks.denoiser import Denoiser, as_denoiser
from symbreak.noise import NoiseLevel, schedule
from symbreak.runtime.files import InputError

__all__ = [
    "SAMPLERS",
    "Latents",
    "NetworkDenoiser",
    "SigmaDenoiser",
    "as_unet",
    "denoiser",
    "encode",
    "load_pipeline",
    "scheduler",
    "usable",
]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Our sampler names -> diffusers class and the settings that make it that sampler.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
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


def _kind(scheduler: Any) -> str:
    """Which parametrization a scheduler's network has: "vp", "edm" or "flow"."""
    name = type(scheduler).__name__
    return "edm" if name.startswith("EDM") else "flow" if name.startswith("FlowMatch") else "vp"


def scheduler(name: str, like: Any = None, **settings: Any) -> Any:
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
    class_name, own = SAMPLERS[name]
    cls = getattr(diffusers, class_name)
    if like is None:
        if name.startswith(("edm", "flow")):
            return cls(**own, **settings)
        like = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if not hasattr(like, "alphas_cumprod") and _kind(like) == "vp":
        raise InputError(
            f"{type(like).__name__} is none of the schedulers symbreak knows: it needs alphas_cumprod, or an EDM or "
            "flow-matching class."
        )
    kinds = _kind(like), "edm" if name.startswith("edm") else "flow" if name.startswith("flow") else "vp"
    if kinds[0] != kinds[1]:
        raise InputError(
            f"the sampler {name} is of the kind {kinds[1]}, the network's scheduler {type(like).__name__} of the kind "
            f"{kinds[0]}. Choose a sampler of the same kind."
        )
    config = {k: v for k, v in dict(like.config).items() if k not in _OWN}
    return cls.from_config(config, **own, **settings)


def load_pipeline(
    source: str | Path, *, device: str | torch.device | None = None, precision: str = "fp32", compiled: bool = False
) -> Any:
    """A diffusers pipeline with ``.unet`` and ``.scheduler``.

    Args:
        source: ``"digits"`` (the bundled network), a diffusers folder or a hub id. Only
            safetensors weights are read; nothing is unpickled and no remote code runs.
        device: where the network runs, such as ``"cuda"``; by default where it was loaded, the CPU.
        precision: ``"fp32"``, or ``"bf16"`` / ``"fp16"``: the network's calls under autocast. States, schedulers and
            laws keep their own precision.
        compiled: whether the network goes through ``torch.compile``.

    Raises:
        InputError: where there is no such pipeline, device or precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}; expected {', '.join(PRECISIONS)}.")
    pipe = _loaded(source)
    if device is not None:
        pipe.to(usable(device))
    if PRECISIONS[precision] is not None:
        kind = next(iter(pipe.unet.parameters())).device.type
        pipe.unet.forward = torch.autocast(kind, PRECISIONS[precision])(pipe.unet.forward)
    if compiled:
        pipe.unet.compile()
    return pipe


def usable(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        InputError: for one that is not there.
    """
    try:
        there = torch.device(device)
        torch.zeros(1, device=there)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device} here ({str(error).splitlines()[0][:80]}). Pass cpu.") from None
    return there


def _loaded(source: str | Path) -> Any:
    if str(source) == "digits":
        source = str(resources.files("symbreak") / "weights" / "digits")
    path = Path(source).expanduser()
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"{source} is no diffusers pipeline: it has no model_index.json. Save one with save_pretrained."
            )
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{index} is not JSON. Save the pipeline again with save_pretrained.") from None
        if isinstance(parts, dict) and parts.get("_class_name") == "LateStartPipeline":
            raise InputError(f"{source} holds a late start. Load it with sb.LateStartPipeline.from_pretrained.")
        if not isinstance(parts, dict) or not {"unet", "scheduler"} <= set(parts):
            raise InputError(f"{source} has no unet and scheduler; symbreak samples pipelines that have both.")
    elif str(source).count("/") != 1 or path.parent.exists():
        raise InputError(f"{source} does not exist. Pass digits, a diffusers folder or a hub id owner/name.")
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()  # two components need no bar between our own lines
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), use_safetensors=True)
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source} cannot be loaded as a diffusers pipeline ({type(error).__name__}: {what})."
        ) from None
    finally:
        if bars:
            diffusers.utils.logging.enable_progress_bar()
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise InputError(f"{source} has no unet and scheduler; symbreak samples pipelines that have both.")
    try:
        schedule(pipe.scheduler)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scheduler of {source} cannot be used: {error}") from None
    pipe.unet.eval()
    return pipe


def refuse_conditional(pipe: Any, source: str) -> None:
    """The command line and studies have no conditions to give: one clear line instead of a crash inside."""
    config = pipe.unet.config
    if config.get("num_class_embeds") or config.get("class_embed_type") or config.get("cross_attention_dim"):
        raise InputError(
            f"the network of {source} needs a condition (class or text). Use sb.generate(..., labels=...) or "
            "start.latents(noise) with its own pipeline."
        )


def weights_hash(unet: torch.nn.Module) -> str:
    """SHA-256 of all weights, first 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class NetworkDenoiser:
    """A diffusers network as a `Denoiser`; see `denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, **condition: Any) -> None:
        self.unet, self.scheduler, self.condition = unet, scheduler, condition
        self.schedule = schedule(scheduler)
        self.kind = _kind(scheduler)
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


class Latents:
    """The latents of images as a stream that can be walked again and again; see `encode`."""

    def __init__(self, vae: Any, data: Any, batch: int, sample: bool, seed: int) -> None:
        self.vae, self.data, self.batch, self.sample, self.seed = vae, data, batch, sample, seed
        self.labels = getattr(data, "labels", None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for images in _regroup(self.data, self.batch):
            yield self._encode(images, generator)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        channels = getattr(self.vae.config, "in_channels", None)
        if images.ndim != 4 or (channels is not None and images.shape[1] != channels):
            raise InputError(
                f"images of shape {tuple(images.shape)} for an autoencoder of {channels} channels; expected "
                f"[B, {channels}, H, W]."
            )
        if not float(images.abs().max()) <= 1 + 1e-3:
            raise InputError(
                f"images from {float(images.min()):g} to {float(images.max()):g}; an autoencoder takes [-1, 1]."
            )
        n = len(images)
        # One fixed size of every call, so that a latent does not depend on its neighbours.
        padded = torch.cat([images, images[:1].expand(self.batch - n, *images.shape[1:])])
        weight = next(iter(self.vae.parameters()), padded)
        out = self.vae.encode(padded.to(weight.device, weight.dtype))
        law = getattr(out, "latent_dist", None)
        z = (out.latents if law is None else law.mean)[:n].float().cpu()
        if self.sample:
            if law is None:
                raise InputError(f"{type(self.vae).__name__} has no latent law to draw from. Leave sample out.")
            z = z + law.std[:n].float().cpu() * torch.randn(z.shape, generator=generator)
        return _scaled(z, self.vae.config)


def _regroup(data: Any, batch: int) -> Iterator[torch.Tensor]:
    """Batches of any sizes as batches of one size, the last one smaller."""
    waiting: list[torch.Tensor] = []
    held = 0
    for some in data:
        waiting.append(torch.as_tensor(some).float())
        held += len(some)
        if held >= batch:
            whole = torch.cat(waiting)
            full = held - held % batch
            yield from whole[:full].split(batch)
            waiting, held = [whole[full:]], held - full
    if held:
        yield torch.cat(waiting)


def _scaled(z: torch.Tensor, config: Any) -> torch.Tensor:
    """Raw latents -> those that the diffusion network sees."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        column = [1, -1] + [1] * (z.ndim - 2)
        z = (z - torch.tensor(mean).reshape(column)) / torch.tensor(std).reshape(column)
    shift, scale = getattr(config, "shift_factor", None), getattr(config, "scaling_factor", None)
    return (z - (0.0 if shift is None else shift)) * (1.0 if scale is None else scale)


def encode(vae: Any, data: Any, batch: int = 16, sample: bool = False, seed: int = 0) -> Latents:
    """Images as the latents that a latent diffusion network sees, e.g. to fit a start there.

        z = (mean of q(z | x) - shift_factor) scaling_factor

    Args:
        vae: a diffusers autoencoder, such as ``pipe.vae``.
        data: `Images`, a tensor [N, C, H, W] or batches of them that can be walked again, in [-1, 1].
        batch: fixed size of every call of the autoencoder; the last one is padded.
        sample: draw from q(z | x), as training does, instead of taking its mean.
        seed: of these draws.

    Returns:
        An iterable of batches [B, c, h, w], float32, made as it is walked; it carries the data's ``labels``.

    Raises:
        InputError: for data that can be walked only once, are not in [-1, 1] or do not have the autoencoder's
            channels.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch}; expected at least 1.")
    if isinstance(data, torch.Tensor):
        data = [data]
    elif iter(data) is data:
        raise InputError(
            "the images come from a generator, which can be walked once. Pass a list, a tensor or sb.images."
        )
    return Latents(vae, data, int(batch), sample, seed)


class _Posing(torch.nn.Module):
    """A law or denoiser with the face of a diffusers UNet."""

    def __init__(self, source: Denoiser, scheduler: Any) -> None:
        super().__init__()
        self.source, self.scheduler = source, scheduler
        self.kind = _kind(scheduler)
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
