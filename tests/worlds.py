"""Exact worlds that the tests stand on."""

from __future__ import annotations

import torch

from symbreak.laws import Gaussian
from symbreak.moments import Moments


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
