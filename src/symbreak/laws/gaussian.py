"""The Gaussian law N(mu, Sigma) under noise: everything in closed form.

With Sigma = Q L Q^T and x = x_0 + sigma eps, every map below acts on modes, y = Q^T (x - mu):

    denoise  y -> L / (L + sigma^2) y            law of x: N(mu, Q (L + sigma^2) Q^T)
    probability flow  y(sigma) = sqrt((L + sigma^2) / (L + sigma_from^2)) y(sigma_from)

(Wang & Vastola, arXiv:2412.09726, for the flow).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from symbreak.files import InputError
from symbreak.laws.flow import Parameters, column, flatten, fresh, level
from symbreak.moments import Moments

__all__ = ["Gaussian"]


class Gaussian:
    """The Gaussian with given moments.

    Args:
        moments: `Moments` of the data, of any sample shape [*S].

    >>> law = Gaussian(Moments(2, [0.0], [[3.0]]))
    >>> law.denoise(torch.tensor([[4.0]]), sigma=1.0).item()
    3.0
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.shape: tuple[int, ...] = moments.shape
        self.eigenvalues, self.eigenvectors = moments.eigh
        self.floor = 0.0  # variance of what no eigenvector spans
        self._whole = Parameters(moments.mean.reshape(-1), self.eigenvalues, self.eigenvectors)

    @classmethod
    def fit(cls, batches: Iterable[torch.Tensor]) -> Gaussian:
        """The Gaussian with the moments of a stream of batches [B, *S]."""
        return cls(Moments.fit(batches))

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return self.moments.dim

    def _parameters(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """mean [d], eigenvalues [d], eigenvectors [d, d] in the dtype and on the device of x."""
        return self._whole.like(x)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        return flatten(x, self.shape)

    def _map(self, x: torch.Tensor, factor: torch.Tensor, centred: bool = False) -> torch.Tensor:
        """mu + Q factor Q^T (x - mu); ``centred`` leaves mu out on both sides."""
        mean, _, q = self._parameters(x)
        flat = self._flat(x)
        y = ((flat if centred else flat - mean) @ q) * factor.to(x.dtype)
        out = y @ q.T
        return (out if centred else out + mean).reshape(x.shape)

    def _variance(self, x: torch.Tensor, sigma: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues [d] and sigma^2, [] or [B, 1], both float64 on the device of x."""
        return self._whole.like(x, torch.float64)[1], column(level(sigma, x) ** 2)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""
        g = fresh(generator)
        z = torch.randn(n, *self.shape, generator=g, dtype=torch.float64, device=g.device)
        mean, values, _ = self._parameters(z)
        return self._map(z, (values + float(sigma) ** 2).sqrt(), centred=True) + mean.reshape(self.shape)

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]; sigma a float or [B]."""
        values, s2 = self._variance(x, sigma)
        return self._map(x, values / (values + s2))

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]."""
        values, s2 = self._variance(x, sigma)
        centred = self._flat(x) - self._parameters(x)[0]
        return self._map(centred.reshape(x.shape), -1.0 / (values + s2), centred=True)

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats."""
        values, s2 = self._variance(x, sigma)
        # Float64: where modes have no spread, rounding of y counts against sigma.
        mean, _, q = self._whole.like(x, torch.float64)
        y = (self._flat(x).double() - mean) @ q
        total = values + s2
        return -0.5 * ((y * y / total).sum(-1) + total.log().sum(-1) + self.moments.dim * math.log(2 * math.pi))

    def posterior_covariance(self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x; the same at every x."""
        if v.shape != x.shape:
            raise InputError(f"vectors of shape {tuple(v.shape)} for states of {tuple(x.shape)}; expected the same.")
        values, s2 = self._variance(x, sigma)
        return self._map(v.to(x.dtype), values * s2 / (values + s2), centred=True)

    def transport(self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

            mu + Q sqrt(L + sigma^2) Q^T z                                   from pure noise z ~ N(0, I)
            mu + Q sqrt((L + sigma^2) / (L + sigma_from^2)) Q^T (x - mu)      from a state x at sigma_from

        Args:
            noise: [B, *S]; white noise, or VE states at ``sigma_from``.
            sigma: target level.
            sigma_from: level of the states given; ``None`` for pure noise (the limit of infinite sigma).

        Returns:
            VE states [B, *S] at sigma. From white noise their law is exactly that of x_0 + sigma eps.
        """
        values, s2 = self._variance(noise, sigma)
        if sigma_from is None:
            mean = self._parameters(noise)[0].reshape(self.shape)
            return self._map(noise, (values + s2).sqrt(), centred=True) + mean
        return self._map(noise, ((values + s2) / (values + float(sigma_from) ** 2)).sqrt())

    def __repr__(self) -> str:
        return f"Gaussian(shape={self.shape}, top eigenvalue {float(self.eigenvalues[0]):.4g})"
