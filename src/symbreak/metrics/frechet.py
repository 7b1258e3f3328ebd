"""Fréchet distances between sets of images, in named features, with intervals.

A Fréchet distance of n samples is biased upward by a term that falls like 1/n, so a number is only
comparable at equal counts; the floor, real images against real images at the same counts, says how
low it can go, and `extrapolated` follows the line in 1/n to n = infinity. (Chong & Forsyth, arXiv:1911.07023.)

The reference is a sample, too. Intervals leave out each part of the samples and each part of the reference in turn.
Where the reference's moments have one part only, the intervals are those of the samples given this reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack

from symbreak.intervals import jackknife
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.run import renamed
from symbreak.runtime.shown import Shown

__all__ = ["Distance", "difference", "distance", "extrapolated", "floor", "frechet_distance", "group_distance", "ratio"]


Rooted = tuple[Moments, torch.Tensor]
CONDITION = 1e-9  # reciprocal condition above which no eigenvalue is near rounding


@dataclass(frozen=True)
class Distance(Shown):
    """Fréchet distance of repeats of samples to one reference.

    Attributes:
        values: one distance a repeat.
        mean, low, high: their mean and 95 % interval, a jackknife over the repeats and the parts of the reference (NaN
            for a single repeat).
        pooled: distance of all repeats' samples together (less biased, no interval).
        samples: images a repeat.
        reference: images in the reference.
        extractor: name of the features.
        reference_left_out: the mean without each part of the reference; none where it has one part, or for a single
            repeat. Two starts of the same seeds and reference differ by ``values``, and by these, see `difference`.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    pooled: float
    samples: int
    reference: int
    extractor: str
    reference_left_out: tuple[float, ...] = ()

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
    return _between((a, _root(a)), (b, _root(b)))


def _between(first: Rooted, second: Rooted) -> float:
    """The distance of moments that come with their roots."""
    (a, root_a), (b, root_b) = first, second
    gap, roots = (a.mean - b.mean).reshape(-1), (root_a, root_b)
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum() if min(r.shape[1] for r in roots) else 0.0
    value = gap @ gap + torch.trace(a.cov) + torch.trace(b.cov) - 2 * cross
    return max(0.0, float(value))


def _root(moments: Moments) -> torch.Tensor:
    """R [d, r] with R R^T the covariance: Cholesky's where it is well conditioned, a tenth of an eigendecomposition.

    Of fewer rows than dimensions, such as pixels of colour pictures, it is Cholesky's with pivots, which ends at their
    rank: a hundredth of an eigendecomposition.
    """
    cov = moments.cov.numpy()
    if moments.count <= moments.dim:
        root, pivots, rank, _ = lapack.dpstrf(cov.T, lower=1)
        below = np.zeros((moments.dim, rank))
        below[pivots - 1] = np.tril(root[:, :rank])
        rounding = moments.dim * np.finfo(np.float64).eps * max(0.0, float(cov.diagonal().max()))
        rest = cov.diagonal() - (below**2).sum(1)
        probe = np.random.default_rng(0).standard_normal(moments.dim)
        off = cov @ probe - below @ (below.T @ probe)  # where an eigenvalue is below zero the diagonal may say nothing
        if np.abs(rest).max() <= rounding and np.abs(off).max() <= moments.dim * rounding:
            return torch.from_numpy(below)
    root, failed = lapack.dpotrf(cov, lower=1)
    if not failed and lapack.dpocon(root, np.abs(cov).sum(0).max(), uplo="L")[0] > CONDITION:
        return torch.from_numpy(root)
    values, vectors = moments.eigh
    # Below this an eigenvalue is rounding, and its root, half as many digits down, would not be.
    keep = values > moments.dim * torch.finfo(torch.float64).eps * values[0]
    return vectors[:, keep] * values[keep].sqrt()


@renamed(found="samples=...")
def distance(samples: torch.Tensor, reference: Moments, repeats: int, extractor: str) -> Distance:
    """Fréchet distance of features [N, F] to a reference, cut into consecutive repeats of N // repeats rows.

    Raises:
        InputError: with fewer than 2 samples a repeat.
    """
    size = len(samples) // repeats if repeats > 0 else 0
    if size < 2:
        raise InputError(f"{len(samples)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    parts = [Moments.fit([part], parts=1) for part in samples[: size * repeats].split(size)]
    return group_distance(parts, reference, extractor)


def group_distance(groups: list[Moments], reference: Moments, extractor: str) -> Distance:
    """Fréchet distance of the moments of disjoint groups of samples; ``samples`` is the smallest group's count.

    Costs (groups + 1)(parts of the reference + 1) distances.
    """
    rooted, of_reference = [(m, _root(m)) for m in groups], (reference, _root(reference))
    values = np.array([_between(m, of_reference) for m in rooted])
    pooled = float(values[0]) if len(groups) == 1 else frechet_distance(Moments.joined(groups), reference)
    left_out: list[float] = []
    for rest in reference.without_each() if len(groups) > 1 else []:
        of_rest = (rest, _root(rest))
        left_out.append(float(np.mean([_between(m, of_rest) for m in rooted])))
    mean, low, high = mean_of_repeats(values, np.array(left_out))
    count = min(m.count for m in groups)
    of = reference.count
    return Distance(tuple(values.tolist()), mean, low, high, pooled, count, of, extractor, tuple(left_out))


def mean_of_repeats(
    values: np.ndarray, reference_left_out: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over repeats with a jackknife over repeats and, where it was left out, parts of the reference."""
    mean = float(values.mean())
    without = (values.sum() - values) / max(1, len(values) - 1)
    sets = [x for x in (without, reference_left_out) if len(x)]
    return mean, *jackknife(mean, *sets, confidence=confidence)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float]:
    """How much farther ``a`` is than ``b``, with a 95 % interval: both of the same seeds, against one reference.

    What the seeds and the reference have in common cancels, so that this is sharper than two intervals beside each
    other.

    Args:
        a, b: what `Distance.to_dict` gave of the same number of repeats.

    Raises:
        InputError: for unequal repeats or references.
    """
    if any(a[k] != b[k] for k in ("repeats", "samples", "reference", "extractor")):
        raise InputError(
            "distances of other repeats, counts or features; expected two of the same seeds and reference."
        )
    gap, left_out = (np.array(a[k]) - np.array(b[k]) for k in ("values", "reference_left_out"))
    return mean_of_repeats(gap, left_out)


def ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """How many times as far ``a`` is as ``b``, with a 95 % interval, of the same seeds and reference as `difference`.

    The jackknife is of the logarithm: an interval of a ratio is even there, and never reaches below 0.

    Args:
        a, b: what `Distance.to_dict` gave of the same number of repeats.

    Returns:
        The ratio of the means and its ends (NaN for a single repeat); ``None`` where a distance is 0.
    """
    gap = difference(a, b)
    values = [np.array(d["values"]) for d in (a, b)]
    without = [(v.sum() - v) / max(1, len(v) - 1) for v in values]
    sets = [tuple(without), tuple(np.array(d["reference_left_out"]) for d in (a, b))]
    if min(float(v.min(initial=math.inf)) for pair in sets for v in pair) <= 0 or not math.isfinite(gap[0]):
        return None
    value = math.log(values[0].mean() / values[1].mean())
    low, high = jackknife(value, *[np.log(x / y) for x, y in sets if len(x)])
    return math.exp(value), math.exp(low), math.exp(high)


def extrapolated(groups: list[Moments], reference: Moments, pooled: float) -> Values:
    """The distance of infinitely many samples to infinitely many images, by a plane in 1/n and 1/m, with an interval.

        F_inf = F + (G - 1) (F - mean_g F_g) + (B - 1) (F - mean_b F^b)

    F_g leaves out group g of the samples, F^b part b of the reference: F - F_g and F - F^b are the slopes in 1/n and
    1/m. The pseudo-values of both sets give the interval (`jackknife`). What is left is of order 1/n^2 and 1/m^2.

    Args:
        groups: moments of G >= 3 disjoint random groups of about equal size.
        reference: moments of the reference, in B parts; with one part (B = 1) its bias stays in, and the interval is
            that of the samples alone.
        pooled: distance of all groups together, F.

    Returns:
        ``value``, ``low``, ``high``; ``samples_only``, extrapolated in the samples' count alone; ``pooled_low``,
        ``pooled_high``, the interval of F from the same leave-one-out values, its bias left in; ``counts`` and
        ``distances`` of the two points of the line in 1/n; ``parts``, B.

    Raises:
        InputError: for fewer than 3 groups.

    Source: Quenouille 1949, Tukey 1958; the line in 1/n is Chong & Forsyth's, arXiv:1911.07023.
    """
    size = len(groups)
    if size < 3:
        raise InputError(f"{size} groups of samples to extrapolate from; expected at least 3. Raise --repeats.")
    whole = Moments.joined(groups)
    sets = [np.array([frechet_distance(rest, reference) for rest in whole.without_each()])]
    of_reference = [frechet_distance(whole, rest) for rest in reference.without_each()]
    if of_reference:
        sets.append(np.array(of_reference))
    steps = [(len(x) - 1) * (pooled - float(x.mean())) for x in sets]
    # The value moves with a group as its pseudo-values do: by as much as F does, to first order.
    low, high = jackknife(pooled + sum(steps), *sets)
    pooled_low, pooled_high = jackknife(pooled, *sets)
    return {
        "value": pooled + sum(steps),
        "low": low,
        "high": high,
        "samples_only": pooled + steps[0],
        "pooled_low": max(0.0, pooled_low),
        "pooled_high": pooled_high,
        "counts": [whole.count, whole.count * (size - 1) / size],
        "distances": [pooled, float(sets[0].mean())],
        "parts": max(1, len(of_reference)),
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
