"""Kernel distance of features: the unbiased squared maximum mean discrepancy of a cubic kernel.

    k(x, y) = (x . y / F + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

In Inception features this is KID. It has no bias at any count (values slightly below 0 are right), but it
costs the square of the counts, so it takes a bounded number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from symbreak.intervals import jackknife
from symbreak.noise import generator
from symbreak.runtime.files import InputError

__all__ = ["kid"]

DEGREE = 3
SUBSETS, SUBSET_SIZE = 100, 1000
BLOCKS = 10
TILE = 1024


def kid(
    found: torch.Tensor,
    real: torch.Tensor,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> dict[str, Any]:
    """Squared maximum mean discrepancy of features [N, F] and real ones [M, F].

    ``value`` is the estimate from all rows; its interval is a jackknife that leaves one of ``blocks`` random blocks of
    both sets out at a time. ``subsets_mean`` and ``subsets_std`` are the customary numbers, of random subsets of
    ``subset_size`` rows (or of all, where there are fewer); the subsets overlap, so their spread is no standard error.

    Args:
        found, real: features, at least 2 rows a block; kernels are formed in tiles of 1,024 x 1,024.
        subsets: how many subsets; 0 leaves them out.
        subset_size: rows of a subset of each set.
        blocks: at least 2.
        seed: of blocks and subsets.

    Raises:
        InputError: for too few rows or unequal features.

    Source: Binkowski et al., arXiv:1801.01401; subsets as in torch-fidelity.
    """
    x, y = found.double(), real.double()
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)}; expected [N, F] and [M, F].")
    blocks = min(blocks, len(x) // 2, len(y) // 2)
    if blocks < 2:
        raise InputError(f"{len(x)} samples and {len(y)} real images; expected at least 4 of each.")
    parts = [
        [z[i] for i in torch.randperm(len(z), generator=generator(seed, 17, side)).tensor_split(blocks)]
        for side, z in enumerate((x, y))
    ]
    # Sums of the kernel over every pair of blocks: any block can then be left out of both sets.
    xx, yy = (_within(p) for p in parts)
    xy = np.array([[_kernel_sum(a, b) for b in parts[1]] for a in parts[0]])
    counts = np.array([[len(p) for p in side] for side in parts], dtype=np.float64)
    value = _mmd(xx, yy, xy, counts)
    left_out = np.array([_mmd(*_without(xx, yy, xy, counts, b)) for b in range(blocks)])
    low, high = jackknife(value, left_out)
    size = min(subset_size, len(x), len(y))
    draws = np.array([_subset(x, y, size, seed, i) for i in range(subsets)])
    return {
        "value": value,
        "low": low,
        "high": high,
        "blocks": blocks,
        "subsets": subsets,
        "subset_size": size,
        "subsets_mean": float(draws.mean()) if subsets else None,
        "subsets_std": float(draws.std()) if subsets else None,
        "kernel": f"(x.y / {x.shape[1]} + 1)^{DEGREE}",
        "samples": len(x),
        "reference": len(y),
    }


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** DEGREE


def _kernel_sum(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(sum(_kernel(p, q).sum() for p in a.split(TILE) for q in b.split(TILE)))


def _within(parts: list[torch.Tensor]) -> np.ndarray:
    """Sums over pairs of blocks of one set, without the pairs of a row with itself."""
    n = len(parts)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(i, n):
            out[i, j] = out[j, i] = _kernel_sum(parts[i], parts[j])
        out[i, i] -= float(((parts[i].square().sum(1) / parts[i].shape[1] + 1) ** DEGREE).sum())
    return out


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, counts: np.ndarray) -> float:
    n, m = counts.sum(1)
    return float(xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m))


def _without(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, counts: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(len(xx)) != block
    grid = np.ix_(keep, keep)
    return xx[grid], yy[grid], xy[grid], counts[:, keep]


def _subset(x: torch.Tensor, y: torch.Tensor, size: int, seed: int, index: int) -> float:
    a, b = (z[torch.randperm(len(z), generator=generator(seed, 18, index, i + 1))[:size]] for i, z in enumerate((x, y)))
    one = np.array([[float(size)], [float(size)]])
    return _mmd(_within([a]), _within([b]), np.array([[_kernel_sum(a, b)]]), one)
