"""What is asked of diffusers' networks, schedulers and pipelines, whose own classes a type checker does not see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Network", "Pipeline", "Scheduler"]


class Network(Protocol):
    """A diffusers network, or `as_unet`; its ``config`` can be read by attribute and as a mapping."""

    @property
    def config(self) -> Any: ...

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, /, **condition: object) -> Sequence[torch.Tensor]:
        """With ``return_dict=False``: (epsilon, v, sample, EDM's F or a velocity [B, C, H, W],)."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...


class Scheduler(Protocol):
    """A diffusers scheduler."""

    timesteps: torch.Tensor
    # Of some classes only:
    sigmas: torch.Tensor
    sigma_max: float
    init_noise_sigma: float
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor

    @property
    def config(self) -> Any: ...

    @classmethod
    def from_config(cls, config: Mapping[str, object], **settings: object) -> Scheduler: ...

    def set_timesteps(self, num_inference_steps: int, /) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor, /) -> torch.Tensor: ...

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, /, **settings: object
    ) -> Sequence[torch.Tensor]:
        """With ``return_dict=False``: (the next state [B, C, H, W], ...)."""

    def to_json_string(self) -> str: ...


class Pipeline(Protocol):
    """A diffusers pipeline of a network and a scheduler."""

    unet: Network
    scheduler: Scheduler
