"""The data set itself as a law: N equal point masses y_j, under noise a mixture of N(y_j, sigma^2).

    D(x) = sum_j w_j y_j        w = softmax_j(-|x - y_j|^2 / (2 sigma^2))

This is attention with the data as keys and values (arXiv:2402.18491 calls it the empirical score).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch

from symbreak.files import InputError
from symbreak.laws.flow import Parameters, column, flatten, fresh, level, probability_flow, top_eigenvalue
from symbreak.moments import Moments

__all__ = ["Empirical"]


class Empirical:
    """The empirical law of a data set.

    Args:
        points: [N, *S], N >= 1.

    Raises:
        InputError: for points that are no batch, or hold NaN or infinity.

    >>> law = Empirical([[-1.0], [1.0]])
    >>> round(law.denoise(torch.tensor([[0.5]]), sigma=1.0).item(), 6)  # tanh(x / sigma^2)
    0.462117
    """

    def __init__(self, points: Any) -> None:
        data = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
        if data.ndim < 2 or data.numel() == 0:
            raise InputError(
                f"points of shape {tuple(data.shape)}; expected [N, *S] with at least one point."
            )
        if not bool(torch.isfinite(data).all()):
            raise InputError("the points hold NaN or infinity; expected finite numbers.")
        self.shape: tuple[int, ...] = tuple(data.shape[1:])
        flat = data.reshape(len(data), -1)
        self._centre = flat.mean(0)
        self.points = data
        centred = flat - self._centre
        self._parameters = Parameters(centred, 0.5 * (centred * centred).sum(1), self._centre)

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.points)

    def _covariance(self, v: torch.Tensor) -> torch.Tensor:
        centred = self._parameters.whole[0]
        return (v @ centred.T) @ centred / len(centred)

    @cached_property
    def _scales(self) -> tuple[float, float]:
        """Mean variance and top standard deviation of the points."""
        centred = self._parameters.whole[0]
        return float((centred**2).mean()), math.sqrt(top_eigenvalue(self._covariance, self.dim))

    @cached_property
    def moments(self) -> Moments:
        """Exact mean and covariance of the law (over N, not N - 1: the points are the law)."""
        centred = self._parameters.whole[0]
        return Moments(max(2, len(self)), self._centre.reshape(self.shape), centred.T @ centred / len(self))

    def _logits(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """-|x - y_j|^2 / (2 sigma^2) up to a constant of x, [B, N] float64."""
        y, half, centre = self._parameters.like(flat, torch.float64)
        return ((flat.double() - centre) @ y.T - half) / s2

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]; sigma a float or [B]."""
        flat, s2 = flatten(x, self.shape), column(level(sigma, x) ** 2)
        y, _, centre = self._parameters.like(flat, torch.float64)
        w = torch.softmax(self._logits(flat, s2), dim=1)
        return (w @ y + centre).to(x.dtype).reshape(x.shape)

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]."""
        s2 = column(level(sigma, x) ** 2).to(x.dtype)
        gap = flatten(self.denoise(x, sigma), self.shape) - flatten(x, self.shape)
        return (gap / s2).reshape(x.shape)

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats, float64."""
        flat, s = flatten(x, self.shape), level(sigma, x)
        centred = flat.double() - self._parameters.like(flat, torch.float64)[2]
        mass = torch.logsumexp(self._logits(flat, column(s * s)), dim=1) - math.log(len(self))
        return (
            mass
            - 0.5 * (centred * centred).sum(1) / (s * s)
            - self.dim * (s.log() + 0.5 * math.log(2 * math.pi))
        )

    def posterior_covariance(
        self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x."""
        if v.shape != x.shape:
            raise InputError(
                f"vectors of shape {tuple(v.shape)} for states of {tuple(x.shape)}; expected the same."
            )
        flat, s2 = flatten(x, self.shape), column(level(sigma, x) ** 2)
        y = self._parameters.like(flat, torch.float64)[0]
        w = torch.softmax(self._logits(flat, s2), dim=1)
        t = v.reshape(flat.shape).double() @ y.T
        wt = w * (t - (w * t).sum(1, keepdim=True))
        return (wt @ y).to(x.dtype).reshape(x.shape)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""
        g = fresh(generator)
        index = torch.randint(len(self), (n,), generator=g, device=g.device)
        noise = torch.randn(n, *self.shape, generator=g, dtype=torch.float64, device=g.device)
        return self.points.to(g.device)[index] + float(sigma) * noise

    def transport(
        self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None, steps: int = 48
    ) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

        Args:
            noise: [B, *S]; white noise, or VE states at ``sigma_from``.
            sigma: target level.
            sigma_from: level of the states given; ``None`` for pure noise (the limit of infinite sigma).
            steps: Runge-Kutta steps; the error falls with their fourth power.

        Returns:
            VE states [B, *S] at sigma.
        """
        flatten(noise, self.shape)
        variance, spread = self._scales
        mean = self._centre.reshape(self.shape)
        return probability_flow(self.denoise, noise, sigma, sigma_from, mean, variance, spread, steps)

    def __repr__(self) -> str:
        return f"Empirical({len(self):,} points, shape={self.shape})"
