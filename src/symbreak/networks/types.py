"""What symbreak uses of the networks, schedulers and pipelines of diffusers.

Its classes differ in what their methods take and return. These protocols declare what all of them share; other
attributes can be used, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import torch

__all__ = ["Network", "Pipeline", "Scheduler"]


class _Configured(Protocol):
    """An object of diffusers; its ``config`` can be read by attribute and as a mapping."""

    @property
    def config(self) -> Any: ...

    def __getattr__(self, name: str, /) -> Any: ...


class _Network(_Configured, Protocol):
    """A diffusers network, or `as_unet`.

    ``unet(state, t, return_dict=False)[0]`` is epsilon, v, the sample, EDM's F or a velocity [B, C, H, W].
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


class _Scheduler(_Configured, Protocol):
    """A diffusers scheduler; ``step(out, t, state, return_dict=False)[0]`` is the next state [B, C, H, W]."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    set_timesteps: Any
    step: Any

    @classmethod
    def from_config(cls, config: Any, /, **settings: Any) -> Any: ...


class _Pipeline(_Configured, Protocol):
    """A diffusers pipeline of a network and a scheduler."""

    unet: Network
    scheduler: Scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


# For a type checker `diffusers.DDIMScheduler` and the like are stand-ins without any of this, which a Protocol alone
# would refuse; hence the Any. What the package itself asks of them is checked against the Protocol all the same.
Network: TypeAlias = _Network | Any
Scheduler: TypeAlias = _Scheduler | Any
Pipeline: TypeAlias = _Pipeline | Any
