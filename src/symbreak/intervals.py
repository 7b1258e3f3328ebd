"""Intervals of estimates: Student, jackknife, bootstrap. 95 % unless said otherwise."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

__all__ = ["bootstrap", "jackknife", "mean_interval", "percentiles", "resampled"]


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval over resamples [R, ...]; no interpolation, so that infinities are allowed."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0, method="inverted_cdf")
    return low, high


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval of independent repeats; the interval is NaN for a single one."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


def jackknife(estimate: float, leave_one_out: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an estimate from G leave-one-group-out values (Student t with G - 1 degrees)."""
    x = np.asarray(leave_one_out, dtype=np.float64)
    groups = len(x)
    if groups < 2:
        return math.nan, math.nan
    error = math.sqrt((groups - 1) / groups * float(((x - x.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + confidence / 2, groups - 1)) * error
    return estimate - half, estimate + half


def bootstrap(
    values: np.ndarray, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over the first axis of ``values`` [N]."""
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def resampled(values: np.ndarray, seed: int = 0, resamples: int = 1000) -> np.ndarray:
    """Bootstrap means [R, G] of G quantities of the same items: rows of ``values`` [G, N] are resampled together."""
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[1]
    rng, block = np.random.default_rng(seed), max(1, 2**22 // n)
    sizes = [min(block, resamples - i) for i in range(0, resamples, block)]
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), k) @ x.T for k in sizes]) / n
