"""Fréchet distances between sets of images, in named features, with intervals.

A Fréchet distance of n samples is biased upward by a term that falls like 1/n, so a number is only
comparable at equal counts; the floor, real images against real images at the same counts, says how
low it can go, and `extrapolated` follows the line in 1/n to n = infinity. (Chong & Forsyth, arXiv:1911.07023.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import reduce

import numpy as np
import torch
from scipy.linalg import lapack

from symbreak.intervals import jackknife, mean_interval
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.run import renamed

__all__ = ["Distance", "distance", "extrapolated", "floor", "frechet_distance", "group_distance", "together"]


CONDITION = 1e-9  # reciprocal condition above which no eigenvalue is near rounding


@dataclass(frozen=True)
class Distance:
    """Fréchet distance of repeats of samples to one reference.

    Attributes:
        values: one distance a repeat.
        mean, low, high: their mean and 95 % Student-t interval (NaN for a single repeat).
        pooled: distance of all repeats' samples together (less biased, no interval).
        samples: images a repeat.
        reference: images in the reference.
        extractor: name of the features.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    pooled: float
    samples: int
    reference: int
    extractor: str

    def to_dict(self) -> dict[str, object]:
        """Plain values; an interval that does not exist is ``None``."""
        values: dict[str, object] = plain({**asdict(self), "repeats": len(self.values)})
        return values


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet (2-Wasserstein, squared) distance of the Gaussians with two sets of moments.

        |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

    The last trace is the sum of singular values of R_a^T R_b with any roots A = R_a R_a^T, which holds for
    rank-deficient covariances too.

    Raises:
        InputError: where the shapes differ, or a covariance has an eigenvalue below zero.

    Source: Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    if a.shape != b.shape:
        raise InputError(f"moments of shape {a.shape} and {b.shape} cannot be compared.")
    gap, roots = (a.mean - b.mean).reshape(-1), (_root(a), _root(b))
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum() if min(r.shape[1] for r in roots) else 0.0
    value = gap @ gap + torch.trace(a.cov) + torch.trace(b.cov) - 2 * cross
    return max(0.0, float(value))


def _root(moments: Moments) -> torch.Tensor:
    """R [d, r] with R R^T the covariance: Cholesky's where it is well conditioned, a tenth of an eigendecomposition."""
    cov = moments.cov.numpy()
    root, failed = lapack.dpotrf(cov, lower=1)
    if not failed and lapack.dpocon(root, np.abs(cov).sum(0).max(), uplo="L")[0] > CONDITION:
        return torch.from_numpy(root)
    values, vectors = moments.eigh
    # Below this an eigenvalue is rounding, and its root, half as many digits down, would not be.
    keep = values > moments.dim * torch.finfo(torch.float64).eps * values[0]
    return vectors[:, keep] * values[keep].sqrt()


@renamed(found="samples=...")
def distance(samples: torch.Tensor, reference: Moments, repeats: int, extractor: str) -> Distance:
    """Fréchet distance of features [N, F], cut into consecutive repeats of N // repeats rows.

    Raises:
        InputError: with fewer than 2 samples a repeat.
    """
    size = len(samples) // repeats if repeats > 0 else 0
    if size < 2:
        raise InputError(f"{len(samples)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    parts = [Moments.fit([part], parts=1) for part in samples[: size * repeats].split(size)]
    return group_distance(parts, reference, extractor)


def together(groups: list[Moments]) -> Moments:
    """Moments of all groups' rows."""
    return reduce(Moments.merge, groups)


def group_distance(groups: list[Moments], reference: Moments, extractor: str) -> Distance:
    """Fréchet distance of the moments of disjoint groups of samples; ``samples`` is the smallest group's count."""
    values = tuple(frechet_distance(m, reference) for m in groups)
    pooled = values[0] if len(groups) == 1 else frechet_distance(together(groups), reference)
    mean, low, high = mean_interval(np.array(values))
    return Distance(values, mean, low, high, pooled, min(m.count for m in groups), reference.count, extractor)


def extrapolated(groups: list[Moments], reference: Moments, pooled: float) -> Values:
    """The distance at infinitely many samples, by a line in 1/n, with an interval.

        F_inf = G F_n - (G - 1) mean_g F_(n without group g)

    The line goes through n, all samples, and n (1 - 1/G), each group left out in turn. Its pseudo-values
    G F_n - (G - 1) F_(without g) give the interval (Student t, G - 1 degrees of freedom). Only the samples' bias
    is removed; the reference keeps its count.

    Args:
        groups: moments of G >= 3 disjoint random groups of about equal size.
        reference: moments of the reference.
        pooled: distance of all groups together, F_n.

    Returns:
        ``value``, ``low``, ``high``; ``pooled_low``, ``pooled_high``, the interval of F_n from the same leave-one-out
        values, its bias left in; ``counts`` and ``distances`` of the two points of the line.

    Raises:
        InputError: for fewer than 3 groups.

    Source: Quenouille 1949, Tukey 1958; the line in 1/n is Chong & Forsyth's, arXiv:1911.07023.
    """
    size = len(groups)
    if size < 3:
        raise InputError(f"{size} groups of samples to extrapolate from; expected at least 3. Raise --repeats.")
    without = [groups[:g] + groups[g + 1 :] for g in range(size)]
    left_out = np.array([frechet_distance(together(rest), reference) for rest in without])
    value, low, high = mean_interval(size * pooled - (size - 1) * left_out)
    pooled_low, pooled_high = jackknife(pooled, left_out)
    count = sum(m.count for m in groups)
    return {
        "value": value,
        "low": low,
        "high": high,
        "pooled_low": max(0.0, pooled_low),
        "pooled_high": pooled_high,
        "counts": [count, count * (size - 1) / size],
        "distances": [pooled, float(left_out.mean())],
    }


def floor(
    real: torch.Tensor, reference: Moments, samples: int, repeats: int, extractor: str, whole: Moments | None = None
) -> Distance:
    """The distance of real images to the reference at the same counts: the level that nothing real beats.

    Args:
        real: features [N, F] of images that are not in the reference.
        samples: images a repeat; where ``real`` holds fewer, all of it is used and the counts say so.
        repeats: at most; only as many as fit without sharing images.
        whole: moments of all real images, where ``real`` are some of them.
    """
    size = min(samples, len(real))
    disjoint = min(repeats, len(real) // size)
    order = torch.randperm(len(real), generator=generator(7, 0))
    pooled = frechet_distance(Moments.fit([real], parts=1) if whole is None else whole, reference)
    # Repeats that share images are not independent: as many as fit without sharing, and no interval for one.
    result = distance(real[order[: size * disjoint]], reference, disjoint, extractor)
    return replace(result, pooled=pooled)
