"""Exact worlds for tests: laws for which nearly everything is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.start import choose


def two_deltas(distance: float = 1.0, dim: int = 1) -> Mixture:
    """Two points at +-distance on the first axis."""
    mean = torch.zeros(2, dim, dtype=torch.float64)
    mean[0, 0], mean[1, 0] = -distance, distance
    return Mixture.from_parameters(mean, [0.0, 0.0])


def two_gaussians(
    squared_mean: float, variance: float, dim: int = 1, weights: tuple[float, float] = (0.5, 0.5)
) -> Mixture:
    """N(+-m, variance) with |m|^2 = squared_mean, m along the diagonal."""
    m = torch.full((dim,), math.sqrt(squared_mean / dim), dtype=torch.float64)
    return Mixture.from_parameters(torch.stack([-m, m]), [variance, variance], weights)


def simplex_points(k: int) -> torch.Tensor:
    """K unit vectors in R^K that sum to zero, with equal distances, [K, K]."""
    points = torch.eye(k, dtype=torch.float64) - 1.0 / k
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


def simplex(k: int) -> Empirical:
    """K symmetric points of norm 1."""
    return Empirical(simplex_points(k))


def sphere(dim: int, radius: float = 1.0) -> Sphere:
    """The uniform law on a sphere."""
    return Sphere(dim, radius)


def _covariances(k: int, dim: int, seed: int) -> torch.Tensor:
    a = torch.randn(k, dim, dim, generator=generator(seed, 1), dtype=torch.float64)
    return 0.3 * a @ a.mT / dim + 0.05 * torch.eye(dim, dtype=torch.float64)


def full_mixture(k: int = 3, dim: int = 4, seed: int = 0) -> Mixture:
    """Means apart, full covariances, unequal weights."""
    means = 1.5 * torch.randn(k, dim, generator=generator(seed, 0), dtype=torch.float64)
    weights = torch.arange(1.0, k + 1.0, dtype=torch.float64)
    return Mixture.from_parameters(means, _covariances(k, dim, seed), weights / weights.sum())


def low_rank_mixture(k: int = 3, dim: int = 6, rank: int = 2, seed: int = 0) -> Mixture:
    """Low-rank components, the first without any spread outside its plane; sample shape [2, dim / 2]."""
    g = generator(seed, 2)
    means = torch.randn(k, 2, dim // 2, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(k, dim, dim, generator=g, dtype=torch.float64))[0][:, :, :rank]
    values = 0.5 + torch.rand(k, rank, generator=g, dtype=torch.float64)
    return Mixture.from_parameters(means, (q, values, 0.1 * torch.arange(k, dtype=torch.float64)))


def isotropic_mixture(k: int = 4, dim: int = 5, seed: int = 0) -> Mixture:
    """Isotropic components, the first a point, one of weight 0."""
    means = torch.randn(k, dim, generator=generator(seed, 3), dtype=torch.float64)
    weights = torch.ones(k, dtype=torch.float64) / (k - 1)
    weights[-1] = 0.0
    return Mixture.from_parameters(means, 0.2 * torch.arange(k, dtype=torch.float64), weights)


def cloud(n: int = 40, dim: int = 3, seed: int = 0) -> Empirical:
    """A small data set away from the origin."""
    return Empirical(2.0 + torch.randn(n, dim, generator=generator(seed, 4), dtype=torch.float64))


def gaussian_moments(eigenvalues=(4.0, 1.0, 0.5, 0.25), shape=(1, 2, 2), seed=1, mean=0.3) -> Moments:
    """Moments with a known spectrum in a random basis and a mean that is not zero."""
    d = len(eigenvalues)
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    mu = mean * torch.randn(shape, generator=g, dtype=torch.float64)
    return Moments(1000, mu, (q * values) @ q.T)


def gaussian_law(**kwargs) -> Gaussian:
    """The Gaussian law of `gaussian_moments`."""
    return Gaussian(gaussian_moments(**kwargs))


@contextmanager
def small_choice() -> Iterator[None]:
    """Within it a start is chosen among few levels, by few states: for tests that are not about the choice."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEVELS", 4), ("LOSSES", 8), ("STATES", 32)):
            patch.setattr(choose, name, value)
        yield
