"""Families of networks: how each is called, behind the one face that samplers and denoisers know.

    unet(state, t, return_dict=False, **condition)[0] -> epsilon, v, the sample, F or a velocity [B, *S]

`FAMILIES` is a table. A family says by which classes it is known, how it is called, and what its networks say of their
shape and classes. `adapted` puts a network behind the face; networks that have it already are left as they are
(docs/my-own-network.md: how to add one).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_1d import UNet1DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from symbreak.networks.types import Network
from symbreak.runtime.errors import InputError

__all__ = ["FAMILIES", "Adapted", "Family", "adapted", "family_of", "places", "sample_shape", "squares", "takes_sigma"]

Condition: TypeAlias = dict[str, Any]
Answer: TypeAlias = Network  # a tensor, or what holds one
Call: TypeAlias = Callable[[Network, torch.Tensor, torch.Tensor, Condition], Answer]
Shape: TypeAlias = Sequence[int] | None
TRAINED = 1000  # steps of the time of the networks below
CLASS_WORDS = ("class_labels", "y", "labels", "classes", "label")  # what networks call the classes they are told
EDM_RANGE = (0.002, 80.0)  # levels of EDM's samplers, for networks that do not say theirs


@dataclass(frozen=True)
class Family:
    """How the networks of one family are called.

    Attributes:
        call: (network, states [B, *S], times [B], condition) -> its answer, as a tensor or first of a tuple.
        known_by: names of classes.
        shape: network -> sample shape S, where it says so.
        classes: network -> number of labels and the null label, where it has classes.
        wants: what to pass where the shape cannot be read off.
        scheduler: our name of the scheduler it is trained with, where there is only one.
        sigma: whether it is a denoiser already, D(x, sigma) of VE states.
    """

    call: Call
    known_by: tuple[str, ...] = ()
    shape: Callable[[Network], Shape] = lambda network: None
    classes: Callable[[Network], tuple[int | None, int | None]] = lambda network: (None, None)
    wants: str = "(C, H, W)"
    scheduler: str | None = None
    sigma: bool = False


# How they are called.


def _as_unet(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    return network(x, t, **condition, return_dict=False)


def _transformer(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    """Whose second positional argument is the text; Sana's times are scaled by its config."""
    scale = getattr(network.config, "timestep_scale", None) or 1.0
    return network(hidden_states=x, timestep=scale * t, **condition, return_dict=False)


def squares(x: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] as tokens of 2 x 2 each, [B, H W / 4, 4 C]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def places(x: torch.Tensor) -> torch.Tensor:
    """Latents of a video [B, C, F, H, W], every place of every frame a token, [B, F H W, C]."""
    return x.flatten(2).transpose(1, 2)


def _packed(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    """Flux and its relatives: squares of 2 x 2 latents are tokens, the time runs from 0 to 1."""
    b, c, h, w = x.shape
    if "img_shapes" in inspect.signature(network.forward).parameters:  # Qwen-Image
        condition = {**condition, "img_shapes": [[(1, h // 2, w // 2)]] * b}
    else:
        grid = torch.zeros(h // 2, w // 2, 3, device=x.device, dtype=x.dtype)
        grid[..., 1] += torch.arange(h // 2, device=x.device)[:, None]
        grid[..., 2] += torch.arange(w // 2, device=x.device)[None]
        text = condition.get("encoder_hidden_states", x.new_zeros(1, 0, 1))
        ids = {"img_ids": grid.reshape(-1, 3), "txt_ids": x.new_zeros(text.shape[1], 3)}
        condition = {**ids, **{k: v for k, v in condition.items() if k != "img_ids"}}
    out = network(hidden_states=squares(x), timestep=t / TRAINED, **condition, return_dict=False)[0]
    return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _video_tokens(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    """LTX-Video: every place of every frame is a token."""
    b, c, f, h, w = x.shape
    sides = {"num_frames": f, "height": h, "width": w}
    out = network(hidden_states=places(x), timestep=t, **{**condition, **sides}, return_dict=False)[0]
    return out.transpose(1, 2).reshape(b, c, f, h, w)


def _plain(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    return network(x, t, **_renamed(network, condition))


def _time_first(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    """x_t = (1 - t) noise + t data, so that its velocity leads to the data."""
    return -network(1 - t / TRAINED, x, **_renamed(network, condition))


def _time_last(network: Network, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Answer:
    return -network(x, 1 - t / TRAINED, **_renamed(network, condition))


def _edm(network: Network, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Answer:
    """Classes are rows of one 1; no class is a row of zeros."""
    labels, count = condition.get("class_labels"), int(getattr(network, "label_dim", 0) or 0)
    if count and isinstance(labels, torch.Tensor) and labels.ndim == 1:
        rows = torch.eye(count + 1, count, device=x.device, dtype=x.dtype)[labels.long()]
        condition = {**condition, "class_labels": rows}
    return network(x, sigma, **condition)


def _k_diffusion(network: Network, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Answer:
    return network(x, sigma, **condition)


def _azula(network: Network, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Answer:
    """A state is alpha_t x, where sigma_t / alpha_t of its own schedule is the level; found by bisection."""
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(60):
        t = (low + high) / 2
        alpha, std = network.schedule(t)
        low, high = torch.where(std < sigma * alpha, t, low), torch.where(std < sigma * alpha, high, t)
    alpha = network.schedule(t)[0].reshape(-1, *[1] * (x.ndim - 1))
    out = network(alpha * x, t, **condition)
    return out if isinstance(out, torch.Tensor) else out.mean


def _renamed(network: Network, condition: Condition) -> Condition:
    """A condition whose classes are called as the network calls them."""
    takes = _arguments(network)
    word = next((w for w in CLASS_WORDS if w in takes), "class_labels")
    return {word if k == "class_labels" else k: v for k, v in condition.items()}


def _arguments(network: Network) -> list[str]:
    """Names of what a network takes."""
    try:
        return list(inspect.signature(getattr(network, "forward", network)).parameters)
    except (TypeError, ValueError):
        return []


# What they say of themselves.


def _config_shape(network: Network) -> Shape:
    config = network.config
    size, channels = _first(config, "sample_size"), _first(config, "in_channels")
    whole = getattr(config, "sample_shape", None)
    if whole is not None:
        return tuple(whole)
    if isinstance(network, UNet1DModel):
        return (channels, size)
    sides = (size, size) if isinstance(size, int) else size
    return (channels, *sides) if isinstance(sides, list | tuple) and len(sides) == 2 else None


def _said_shape(network: Network) -> Shape:
    return getattr(network.config, "sample_shape", None)


def _config_classes(network: Network) -> tuple[int | None, int | None]:
    return getattr(network.config, "num_class_embeds", None), getattr(network.config, "null_label", None)


def _dit_classes(network: Network) -> tuple[int | None, int | None]:
    """Its embedding has one row more than classes: the null class."""
    count = getattr(network.config, "num_embeds_ada_norm", None)
    return (None, None) if count is None or type(network).__name__ != "DiTTransformer2DModel" else (count + 1, count)


def _named_shape(network: Network) -> Shape:
    """guided-diffusion's in_channels and image_size, denoising-diffusion-pytorch's channels, EDM's img_..."""
    channels = _first(network, "img_channels", "in_channels", "channels")
    size = _first(network, "img_resolution", "image_size")
    sides = (size, size) if isinstance(size, int) else size
    return None if channels is None or sides is None else (channels, *sides)


def _named_classes(network: Network) -> tuple[int | None, int | None]:
    return _first(network, "num_class_embeds", "num_classes"), _first(network, "null_label")


def _edm_classes(network: Network) -> tuple[int | None, int | None]:
    count = int(getattr(network, "label_dim", 0) or 0)
    return (count + 1, count) if count else (None, None)


def _first(network: Network, *names: str) -> Any:
    return next((v for name in names if (v := getattr(network, name, None)) is not None), None)


FLOW = "flow-euler"
VIDEO = "(C, F, H, W)"
FAMILIES: dict[str, Family] = {
    "unet": Family(_as_unet, shape=_config_shape, classes=_config_classes),
    "video-unet": Family(
        _as_unet, ("UNet3DConditionModel", "UNetMotionModel", "I2VGenXLUNet"), _said_shape, _config_classes, VIDEO
    ),
    "transformer": Family(
        _transformer,
        ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"),
        _config_shape,
        _dit_classes,
    ),
    "video-transformer": Family(_transformer, ("WanTransformer3DModel",), _said_shape, wants=VIDEO),
    "packed": Family(
        _packed, ("FluxTransformer2DModel", "ChromaTransformer2DModel", "QwenImageTransformer2DModel"), _said_shape
    ),
    "packed-video": Family(_video_tokens, ("LTXVideoTransformer3DModel",), _said_shape, wants=VIDEO),
    # guided-diffusion, improved-diffusion, score_sde, denoising-diffusion-pytorch
    "plain": Family(_plain, shape=_named_shape, classes=_named_classes),
    # torchcfm, t = 1 data
    "time-first": Family(_time_first, shape=_named_shape, classes=_named_classes, scheduler=FLOW),
    # flow_matching, t = 1 data
    "time-last": Family(_time_last, shape=_named_shape, classes=_named_classes, scheduler=FLOW),
    "edm": Family(_edm, shape=_named_shape, classes=_edm_classes, sigma=True),
    "k-diffusion": Family(_k_diffusion, shape=_named_shape, classes=_named_classes, sigma=True),
    "azula": Family(_azula, sigma=True),
}
BY_CLASS = {name: key for key, family in FAMILIES.items() for name in family.known_by}


def family_of(network: Network, name: str | None = None, scheduled: bool = True) -> str:
    """The key in `FAMILIES` of a network.

    Args:
        network: a network of any family, or a function.
        name: said by the caller, who knows.
        scheduled: whether its scheduler is known; a function without one is taken for k-diffusion's.

    Raises:
        InputError: for a name that is no family, or a transformer of diffusers that has none.
    """
    if name is not None:
        if name not in FAMILIES:
            raise InputError(f"the family {name!r}; expected one of {', '.join(FAMILIES)}.")
        return name
    classes = [c.__name__ for c in type(network).__mro__]
    known = next((BY_CLASS[c] for c in classes if c in BY_CLASS), None)
    if known is not None:
        return known
    arguments = _arguments(network)
    if isinstance(network, ModelMixin) and arguments[:1] == ["hidden_states"]:
        raise InputError(
            f"{classes[0]} is called in a way of its own, which symbreak does not know. Known: {', '.join(BY_CLASS)}; "
            "or pass a function of (x, t): docs/my-own-network.md."
        )
    if hasattr(getattr(network, "config", None), "in_channels"):
        return "unet"
    if any(c.__module__.startswith("k_diffusion") for c in type(network).__mro__):
        return "k-diffusion"  # which has a sigma_data, too
    if _first(network, "sigma_data", "label_dim") is not None or hasattr(network, "img_resolution"):
        return "edm"
    if callable(getattr(network, "schedule", None)) and classes[0].endswith("Denoiser"):
        return "azula"
    if arguments[:1] == ["t"]:
        return "time-first"
    return "plain" if scheduled else "k-diffusion"


def takes_sigma(network: Network, scheduled: bool = True) -> bool:
    """Whether a network is a denoiser already, of VE states and sigma."""
    return callable(network) and FAMILIES[family_of(network, None, scheduled)].sigma


class Adapted(torch.nn.Module):
    """A network of any family with the face of a diffusers UNet; see `adapted`."""

    def __init__(self, network: Network, family: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.family, self.shape = network, family, tuple(int(n) for n in shape)
        count, null = FAMILIES[family].classes(network)
        sides = {"sample_size": self.shape[1:]} if len(self.shape) == 3 else {}
        self.config = FrozenDict(
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            sample_shape=self.shape,
            num_class_embeds=count,
            null_label=null,
            **sides,
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, return_dict: bool = True, **condition: object
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        t = torch.as_tensor(timestep, device=sample.device).to(sample.dtype).reshape(-1).expand(len(sample))
        out = FAMILIES[self.family].call(self.network, sample, t, condition)
        out = out[0] if isinstance(out, tuple | list) else getattr(out, "sample", out)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def adapted(network: Network, family: str | None = None, shape: Sequence[int] | None = None) -> Network:
    """A network of any family behind the face of a diffusers UNet; one that has it already as it is.

    Args:
        network: see `FAMILIES`.
        family: its family, where it cannot be told by its class.
        shape: sample shape S, where the network does not say it.

    Raises:
        InputError: for a network that cannot be called, of no known family, or that does not say its shape.
    """
    if isinstance(network, Adapted):
        return network if shape is None else Adapted(network.network, network.family, shape)
    if not callable(network):
        raise InputError(f"{type(network).__name__} is no network: it cannot be called.")
    key = family_of(network, family)
    if key == "unet" and shape is None:
        return network
    of = FAMILIES[key]
    whole = of.shape(network) if shape is None else shape
    if whole is None or not all(type(n) is int and n > 0 for n in whole):
        raise InputError(f"{_name(network)} does not say the shape of its samples. Pass shape={of.wants}.")
    return Adapted(network, key, whole)


def _name(network: Network) -> str:
    return str(getattr(network, "__name__", type(network).__name__))


def sample_shape(unet: Network) -> tuple[int, ...]:
    """The shape S of a network's samples: (C, H, W) of pictures.

    A network of other samples says it in its config: ``sample_shape``, or as diffusers' UNet1DModel does.

    Raises:
        InputError: where its config does not say it.
    """
    config: Network = getattr(unet, "config", None)
    if not hasattr(config, "in_channels"):
        raise InputError(
            f"{_name(unet)} is no network of diffusers: it has no config. Pass sb.denoiser(network, ...), which says "
            "its shape and levels, in its place."
        )
    whole = _config_shape(unet)
    if not whole or not all(type(n) is int and n > 0 for n in whole):
        raise InputError(
            f"the network's config says sample_size={getattr(config, 'sample_size', None)!r} and "
            f"in_channels={config.in_channels!r}; expected whole numbers above 0. Set them, as in "
            "unet.register_to_config(sample_size=32)."
        )
    return tuple(whole)


def placed(device: torch.device, condition: Mapping[str, object], rows: int) -> Condition:
    """A condition whose tensors lie where the network does; a single row of one stands for all rows."""
    return dict(_placed(device, condition, rows))


def _placed(device: torch.device, condition: Mapping[str, object], rows: int) -> Iterator[tuple[str, object]]:
    for name, value in condition.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            # Places of tokens are no rows, whatever their number.
            if value.ndim and len(value) == 1 and name not in ("txt_ids", "img_ids"):
                value = value.expand(rows, *value.shape[1:])
        elif isinstance(value, Mapping):
            value = placed(device, value, rows)
        yield name, value
