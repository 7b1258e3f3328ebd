"""Covariances that are diagonalised once, so that any noise level is cheap.

    C = Q L Q^T + f (1 - Q Q^T)        g(C) y = Q g(L) Q^T y + g(f) (y - Q Q^T y)

L [r] are the variances along the orthonormal columns of Q [d, r], f (the floor) is the variance of every other
direction: r = d is a dense covariance, r = 0 an isotropic one. What a law needs at C + sigma^2 are such functions,
`shrink`, `solve`, `root`, `posterior`; its density needs the quadratic form and the determinant as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import scipy.linalg
import torch

from symbreak.runtime.files import InputError

__all__ = [
    "Covariance",
    "Gain",
    "Parameters",
    "eigendecomposed",
    "posterior",
    "root",
    "shrink",
    "solve",
    "symmetric",
    "variance",
]

PANEL = 2**24  # numbers of Q converted at a time where the states have more digits than Q

Gain = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (variances, sigma^2) -> g


def variance(v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """g of C itself."""
    return v


def shrink(v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """g of C (C + sigma^2)^-1: posterior mean, the Wiener filter."""
    return v / (v + s2)


def solve(v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """g of (C + sigma^2)^-1."""
    return 1.0 / (v + s2)


def root(v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """g of the symmetric root of C + sigma^2."""
    return (v + s2).sqrt()


def posterior(v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """g of the posterior covariance, sigma^2 C (C + sigma^2)^-1."""
    return v * s2 / (v + s2)


class Parameters:
    """Tensors that are converted once for every dtype and device."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.whole = tensors
        self._cache: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, ...]] = {}

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """The tensors on the device of x, in its dtype or in ``dtype``."""
        dtype = x.dtype if dtype is None else dtype
        key = (dtype, x.device)
        if key in self._cache:
            return self._cache[key]
        with torch.inference_mode(False):
            converted = tuple(p.to(x.device, dtype) for p in self.whole)
        # Inside torch.func transforms a conversion is wrapped for that transform; such a tensor must not outlive it.
        if not any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in converted):
            self._cache[key] = converted
        return converted


class Covariance:
    """One covariance, or a stack of K of the same rank.

    Args:
        vectors: Q [d, r] or [K, d, r], orthonormal in columns.
        values: variances along them [r] or [K, r].
        floor: variance in the other d - r directions, [] or [K].

    >>> c = Covariance(torch.eye(3, 1), torch.tensor([3.0]), torch.tensor(1.0))
    >>> c.apply(shrink, torch.tensor(1.0), torch.tensor([[4.0, 2.0, 0.0]])).tolist()
    [[3.0, 1.0, 0.0]]
    """

    def __init__(self, vectors: torch.Tensor, values: torch.Tensor, floor: torch.Tensor) -> None:
        self.vectors, self.values, self.floor = vectors, values, floor
        self.dim, self.rank = vectors.shape[-2:]
        self._axes, self._variances = Parameters(vectors), Parameters(values, floor)

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> Covariance:
        """On the device of x, with Q in its dtype, or in ``dtype``; but not in float64 where Q has fewer digits.

        A wider copy of a large Q could fill the memory: it is converted a panel at a time.
        """
        (vectors,) = self._axes.like(x, torch.float32 if (dtype or x.dtype) == torch.float32 else self.vectors.dtype)
        return Covariance(vectors, *self._variances.like(x, torch.float64))

    def __getitem__(self, part: slice | int) -> Covariance:
        return Covariance(self.vectors[part], self.values[part], self.floor[part])

    def _panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Q in a dtype, some of its rows at a time where they have to be converted."""
        size = self.dim if self.vectors.dtype == dtype else max(1, PANEL // max(1, self.rank))
        for a in range(0, self.dim, size):
            yield slice(a, a + size), self.vectors[..., a : a + size, :].to(dtype)

    def coordinates(self, y: torch.Tensor) -> torch.Tensor:
        """Q^T y of rows y [..., B, d]: [..., B, r]."""
        return sum((y[..., c] @ q for c, q in self._panels(y.dtype)), y.new_zeros(()))

    def _factors(self, gain: Gain, s2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """g(L) [..., 1 or B, r] and g(f) [..., 1 or B, 1]."""
        return gain(self.values[..., None, :], s2), gain(self.floor[..., None, None], s2)

    def apply(
        self,
        gain: Gain,
        s2: torch.Tensor,
        y: torch.Tensor,
        z: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """g(C) y.

        Args:
            gain: g, a function of variances and sigma^2.
            s2: sigma^2, [] or [B, 1], float64.
            y: rows [..., B, d].
            z: their `coordinates`, where they are known.
            dtype: of the result and its product with Q; by default that of y.
        """
        dtype = dtype or y.dtype
        z = self.coordinates(y) if z is None else z
        inside, outside = self._factors(gain, s2)
        if self.rank == self.dim:
            z = (inside.to(z.dtype) * z).to(dtype)
            return _joined([z @ q.mT for _, q in self._panels(dtype)])
        z, outside = ((inside - outside).to(z.dtype) * z).to(dtype), outside.to(y.dtype)
        return _joined([(outside * y[..., c]).to(dtype) + z @ q.mT for c, q in self._panels(dtype)])

    def log_density(self, y: torch.Tensor, s2: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """log density of N(0, C + sigma^2) at rows y [..., B, d] float64: [..., B] nats; arguments as of `apply`."""
        z = self.coordinates(y) if z is None else z
        inside, outside = self._factors(torch.add, s2)
        quadratic, log_det = (z * z / inside).sum(-1), inside.log().sum(-1)
        if self.rank < self.dim:
            if self.vectors.dtype == y.dtype:
                # Squares of what is left: a difference of squares would lose digits where the floor is small.
                rest = (y - z @ self.vectors.mT).square().sum(-1)
            else:  # of rounded vectors, the quadratic form whose slope is `solve`
                rest = y.square().sum(-1) - z.square().sum(-1)
            quadratic = quadratic + rest / outside[..., 0]
            log_det = log_det + (self.dim - self.rank) * outside[..., 0].log()
        return -0.5 * (quadratic + log_det + self.dim * math.log(2 * math.pi))

    def dense(self, gain: Gain = variance, s2: torch.Tensor | float = 0.0) -> torch.Tensor:
        """g(C) itself, [..., d, d] float64."""
        inside, outside = self._factors(gain, torch.as_tensor(s2, dtype=torch.float64))
        q = self.vectors.double()
        out = (q * (inside - outside)) @ q.mT
        out.diagonal(dim1=-2, dim2=-1).add_(outside[..., 0])
        return out

    def trace(self) -> torch.Tensor:
        """Total variance, [] or [K]."""
        return self.values.sum(-1) + (self.dim - self.rank) * self.floor


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def symmetric(c: np.ndarray, name: str) -> np.ndarray:
    """(c + c^T) / 2 of a covariance [d, d].

    Raises:
        InputError: for NaN, infinity, or a matrix that is not symmetric but for rounding.
    """
    if not np.isfinite(c).all():
        raise InputError(f"{name} holds NaN or infinity; expected finite numbers.")
    if not np.allclose(c, c.T, rtol=1e-8, atol=1e-10 * max(1e-300, float(np.abs(c).max()))):
        raise InputError(f"{name} is not symmetric. Pass (cov + cov.T) / 2 if the difference is rounding.")
    return 0.5 * (c + c.T)


def eigendecomposed(c: np.ndarray, name: str, driver: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d], falling and cut at 0, and eigenvectors [d, d] in columns, of a symmetric matrix.

    Raises:
        InputError: where an eigenvalue lies below zero by more than rounding.
    """
    driver = driver if len(c) > 1 else None  # scipy 1.12's evd fails for a single number
    values, vectors = scipy.linalg.eigh(c, driver=driver)
    if values[0] < -1e-9 * max(abs(values[-1]), 1e-300) * math.sqrt(len(values)):
        raise InputError(f"{name} has the eigenvalue {values[0]:.3g}; expected a positive semidefinite matrix.")
    return torch.from_numpy(np.maximum(values[::-1], 0.0).copy()), torch.from_numpy(vectors[:, ::-1].copy())
