"""Kernel distance of features: the unbiased squared maximum mean discrepancy of a cubic kernel.

    k(x, y) = (x . y / F + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

In Inception features this is KID. It has no bias at any count (values slightly below 0 are right), but it
costs the square of the counts, so it takes a bounded number of rows.
"""

from __future__ import annotations

import numpy as np
import torch

from symbreak.intervals import jackknife
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import renamed

__all__ = ["kid", "rows_for_blocks"]

DEGREE = 3
SUBSETS, SUBSET_SIZE = 100, 1000
BLOCKS = 10
TILE = 1024
FEW = 40  # rows below which the interval covers less than 90 % of skewed worlds


def rows_for_blocks(samples: torch.Tensor, real: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both sets as float64 rows [N, F] and [M, F], and how many blocks of at least 2 rows both of them have.

    Raises:
        InputError: for too few rows or unequal features.
    """
    x, y = samples.double(), real.double()
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)}; expected [N, F] and [M, F].")
    blocks = min(blocks, len(x) // 2, len(y) // 2)
    if blocks < 2:
        raise InputError(f"{len(x)} samples and {len(y)} real ones; expected at least 4 of each.")
    return x, y, blocks


@renamed(found="samples=...")
def kid(
    samples: torch.Tensor,
    real: torch.Tensor,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> Values:
    """Squared maximum mean discrepancy of features [N, F] and real ones [M, F].

    ``value`` is the estimate from all rows; its interval is a jackknife that leaves one of ``blocks`` random blocks of
    both sets out at a time (``None``, with the ``reason``, below 40 rows of either). ``subsets_mean`` and
    ``subsets_std`` are the customary numbers, of random subsets of ``subset_size`` rows (or of all, where there are
    fewer); the subsets overlap, so their spread is no standard error.

    Args:
        samples, real: features, at least 2 rows a block; kernels are formed once, in tiles of 1,024 x 1,024.
        subsets: how many subsets; 0 leaves them out.
        subset_size: rows of a subset of each set.
        blocks: at least 2.
        seed: of blocks and subsets.

    Raises:
        InputError: for too few rows or unequal features.

    Source: Binkowski et al., arXiv:1801.01401; subsets as in torch-fidelity.
    """
    x, y, blocks = rows_for_blocks(samples, real, blocks)
    size = min(subset_size, len(x), len(y))
    marks, counts = [], []
    for side, z in enumerate((x, y)):
        parts = torch.randperm(len(z), generator=generator(seed, 17, side)).tensor_split(blocks)
        mark = torch.zeros(len(z), blocks + subsets, dtype=torch.float64)  # which blocks and subsets a row belongs to
        for b, part in enumerate(parts):
            mark[part, b] = 1
        for i in range(subsets):
            mark[torch.randperm(len(z), generator=generator(seed, 18, i, side + 1))[:size], blocks + i] = 1
        marks.append(mark)
        counts.append([len(p) for p in parts])
    # Sums of the kernel over every pair of blocks: any block can then be left out of both sets.
    (xx, of_x), (yy, of_y), (xy, of_xy) = (
        _sums(a, b, p, q, blocks)
        for a, b, p, q in ((x, x, marks[0], marks[0]), (y, y, marks[1], marks[1]), (x, y, *marks))
    )
    n = np.array(counts, dtype=np.float64)
    value = _mmd(xx, yy, xy, n)
    left_out = np.array([_mmd(*_without(xx, yy, xy, n, b)) for b in range(blocks)])
    ends: Values = dict(zip(("low", "high"), jackknife(value, left_out)))
    if min(len(x), len(y)) < FEW:
        said = f"{len(x)} samples and {len(y)} real images; an interval needs {FEW} of each: the kernel is cubic."
        ends = {"low": None, "high": None, "reason": said}
    draws = (of_x + of_y) / (size * (size - 1)) - 2 * of_xy / size**2
    return {
        "value": value,
        **ends,
        "blocks": blocks,
        "subsets": subsets,
        "subset_size": size,
        "subsets_mean": float(draws.mean()) if subsets else None,
        "subsets_std": float(draws.std()) if subsets else None,
        "kernel": f"(x.y / {x.shape[1]} + 1)^{DEGREE}",
        "samples": len(x),
        "reference": len(y),
    }


def _sums(
    a: torch.Tensor, b: torch.Tensor, mark_a: torch.Tensor, mark_b: torch.Tensor, blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel over all pairs of blocks [B, B], and over each subset's pairs [S]; none of a row with itself.

    Every kernel is formed once: a subset's sum is m_a^T K m_b of the indicators m of its rows.
    """
    same, one = a is b, torch.ones(1, dtype=torch.float64)
    pairs, subsets = torch.zeros(blocks, blocks, dtype=torch.float64), torch.zeros(mark_a.shape[1] - blocks).double()
    for i in range(0, len(a), TILE):
        left = mark_a[i : i + TILE]
        for j in range(i if same else 0, len(b), TILE):
            kernel = torch.addmm(one, a[i : i + TILE], b[j : j + TILE].T, alpha=1 / a.shape[1]).pow_(DEGREE)
            right = kernel @ mark_b[j : j + TILE]
            block, subset = left[:, :blocks].T @ right[:, :blocks], (left[:, blocks:] * right[:, blocks:]).sum(0)
            mirrored = same and j > i
            pairs += block + block.T if mirrored else block
            subsets += 2 * subset if mirrored else subset
    if same:
        itself = mark_a.T @ (a.square().sum(1) / a.shape[1] + 1) ** DEGREE
        pairs.diagonal().sub_(itself[:blocks])
        subsets -= itself[blocks:]
    return pairs.numpy(), subsets.numpy()


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, counts: np.ndarray) -> float:
    n, m = counts.sum(1)
    return float(xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m))


def _without(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, counts: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    keep = np.arange(len(xx)) != block
    grid = np.ix_(keep, keep)
    return xx[grid], yy[grid], xy[grid], counts[:, keep]
