"""What a training step learns: the noise of a state, or what a law does not know.

An objective draws the step's randomness from one generator, and computes the loss of its own rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler

from symbreak.laws.law import Law
from symbreak.networks.denoiser import Denoises
from symbreak.networks.families import as_unet
from symbreak.networks.residual import LawResidual, law_answer
from symbreak.networks.types import Network

__all__ = ["Batch", "Epsilon", "Objective", "Residual", "noising"]

DROPPED = 0.1  # share of the rows of a conditional network whose class is the null class


def noising() -> DDPMScheduler:
    """The noise levels of all training here: DDPM's thousand steps."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


@dataclass(frozen=True)
class Batch:
    """Images of a step.

    Attributes:
        clean: images [B, *S].
        index: their positions [B] in the training data.
        labels: their classes [B], for a conditional network.
        rows: of which this process computes the loss.
    """

    clean: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor | None
    rows: slice

    def condition(self, classes: int | None, g: torch.Generator) -> dict[str, torch.Tensor]:
        """The classes of this process's rows, a tenth of them the null class, which is the last one."""
        if classes is None or self.labels is None:
            return {}
        null = torch.rand(len(self.labels), generator=g) < DROPPED
        return {"class_labels": self.labels.masked_fill(null, classes - 1)[self.rows]}


class Objective(Protocol):
    """What is trained: a network, and the loss of a batch."""

    network: torch.nn.Module

    def loss(self, batch: Batch, g: torch.Generator, device: torch.device) -> Callable[[], torch.Tensor]:
        """Draws what the whole batch needs; a function of no argument then gives the loss of the own rows."""

    def unet(self) -> Network:
        """The trained network with the face that samplers know."""


class Epsilon:
    """Epsilon prediction, t uniform over the DDPM steps (Ho, Jain, Abbeel 2020, arXiv:2006.11239).

    Args:
        network: UNet2DModel.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.noising = network, noising()

    def loss(self, batch: Batch, g: torch.Generator, device: torch.device) -> Callable[[], torch.Tensor]:
        clean, rows = batch.clean, batch.rows
        t = torch.randint(0, 1000, (len(clean),), generator=g)
        noise = torch.randn(clean.shape, generator=g)
        noisy = self.noising.add_noise(clean, noise, t)
        condition = {k: v.to(device) for k, v in batch.condition(_classes(self.network), g).items()}

        def mean() -> torch.Tensor:
            answer = self.network(noisy[rows].to(device), t[rows].to(device), **condition).sample
            return torch.nn.functional.mse_loss(answer.float(), noise[rows].to(device))

        return mean

    def unet(self) -> Network:
        return self.network


class Residual:
    """What a law does not know, at levels that are uniform in log sigma below ``top``.

    Args:
        residual: law and network.
        folds: laws, the k-th fitted without the images whose position is k modulo their number: at an image's own
            law a network learns to correct what a law knows by heart.
        low: lowest level.
    """

    def __init__(self, residual: LawResidual, folds: Sequence[Law | Denoises], low: float) -> None:
        self.residual, self.folds, self.low = residual, list(folds), low
        self.network = residual.network

    def loss(self, batch: Batch, g: torch.Generator, device: torch.device) -> Callable[[], torch.Tensor]:
        clean, rows = batch.clean, batch.rows
        levels = self.levels(len(clean), g)
        noise = torch.randn(clean.shape, generator=g)
        condition = {k: v.to(device) for k, v in batch.condition(_classes(self.network), g).items()}
        sigma, clean = levels[rows].float().to(device), clean[rows].to(device)
        column = sigma.reshape(-1, *[1] * (clean.ndim - 1))
        x = clean + column * noise[rows].to(device)
        with torch.no_grad():
            base = self._base(x, sigma, batch.index[rows].to(device) % len(self.folds), condition.get("class_labels"))
            target = (clean - base) / self.residual.scale(sigma).reshape(column.shape)

        def mean() -> torch.Tensor:
            answer = self.residual.correction(x, sigma, base, **condition)
            return torch.nn.functional.mse_loss(answer.float(), target)

        return mean

    def levels(self, n: int, g: torch.Generator) -> torch.Tensor:
        """Levels [n] float64 of a batch."""
        return self.low * (self.residual.top / self.low) ** torch.rand(n, generator=g, dtype=torch.float64)

    def _base(
        self, x: torch.Tensor, sigma: torch.Tensor, fold: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        base = torch.empty_like(x)
        for k, law in enumerate(self.folds):
            mine = fold == k
            if bool(mine.any()):
                of = None if labels is None else labels[mine]
                base[mine] = law_answer(law, x[mine], sigma[mine], of, self.residual.fade)
        return base

    def unet(self) -> Network:
        return as_unet(self.residual, noising())


def _classes(network: Any) -> int | None:
    """Rows of a network's class embedding, the null class's among them."""
    return network.config.get("num_class_embeds") or None
