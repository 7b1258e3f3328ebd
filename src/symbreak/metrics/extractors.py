"""What turns images into features: the base class of all extractors, and plain functions in its place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from symbreak.runtime.files import InputError
from symbreak.runtime.identity import Identity, fixed_images, module_of, of_callable, weights_hash
from symbreak.runtime.ranks import usable

__all__ = ["BATCH", "Extractor", "FromFunction", "Function", "device_of"]

BATCH = 256  # fixed and padded, so that an image's features do not depend on its neighbours
Function = Callable[[torch.Tensor], torch.Tensor]


class Extractor(ABC):
    """Turns images into features.

    Attributes:
        name: printed beside every number.
        batch: images a call.
        resize: what happens to an image before.
        identity: what cached statistics rest on; ``None``: the hash of its weights, where it is a network.
        accuracy: share of held-out images that a classifier gets right, NaN where unknown.
    """

    name: str
    batch: int = BATCH
    resize: str = "none"
    identity: str | None = None
    accuracy: float = math.nan

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, F] of images [B, C, H, W] in [-1, 1]."""

    @staticmethod
    def of(function: Extractor | Function) -> Extractor:
        """An extractor as it is, any other function as one under its own name."""
        return function if isinstance(function, Extractor) else FromFunction(function)

    @property
    def device(self) -> torch.device:
        """Where it wants its images."""
        return device_of(self)

    def on(self, device: str | torch.device | None) -> Extractor:
        """This extractor with its network on a device; ``None`` leaves it where it is.

        Raises:
            InputError: for a device that is not there.
        """
        network, there = module_of(self), None if device is None else usable(device)
        if network is not None and there is not None:
            network.to(there)
        return self

    def to_dict(self) -> dict[str, str | float | None]:
        """Name, resize, identity (``None`` where the weights are not known) and accuracy, as plain values.

        A function may hold anything: what decides its features is `decides`.
        """
        inner = getattr(self, "function", self)
        identity = weights_hash(inner) if self.identity is None and isinstance(inner, nn.Module) else self.identity
        accuracy = None if math.isnan(self.accuracy) else self.accuracy
        return {"name": self.name, "resize": self.resize, "identity": identity, "held_out_accuracy": accuracy}

    def decides(self, shape: tuple[int, ...]) -> Identity | None:
        """What decides the features of images [C, H, W]: weights, resize, code, and answers to fixed images.

        ``None`` where two calls do not answer the same: then nothing it made may be used again.
        """
        decided = of_callable(self, fixed_images(shape), self.device)
        return None if decided is None else {**decided, "resize": self.resize, "identity": self.identity}

    def sketch(self, shape: tuple[int, ...]) -> list[float]:
        """Features of fixed images, clean and noised, on a few random axes: equal everywhere but for rounding."""
        x = fixed_images(shape)
        g = torch.Generator().manual_seed(99)
        noise = torch.randn(x.shape, generator=g)
        with torch.inference_mode():
            f = torch.cat([self((x + s * noise).to(self.device)).double().cpu() for s in (0.0, 0.3, 1.0)])
        axes = torch.randn(f.shape[1], 4, generator=g, dtype=torch.float64) / math.sqrt(f.shape[1])
        return [float(f"{v:.9g}") for v in (f @ axes).flatten().tolist()]


class FromFunction(Extractor):
    """A function as an extractor; ``name``, ``batch``, ``resize``, ``identity`` are its own where it has them.

    Args:
        function: images [B, C, H, W] in [-1, 1] -> features [B, F].
        name: by default its own.
    """

    def __init__(self, function: Function, name: str | None = None) -> None:
        self.function = function
        self.resize = getattr(function, "resize", "none" if name is None and hasattr(function, "name") else "its own")
        self.name = name or str(getattr(function, "name", None) or getattr(function, "__name__", "a callable"))
        self.batch = getattr(function, "batch", BATCH)
        self.identity = getattr(function, "identity", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.function(x)
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(x):
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(f"the extractor {self.name} gave {came} for {len(x)} images; expected a tensor [B, F].")
        return out


def device_of(function: object) -> torch.device:
    """Where an extractor, a classifier or a method of one wants its images."""
    network = module_of(function)
    weight = None if network is None else next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device
