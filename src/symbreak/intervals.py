"""Intervals of estimates: Student, jackknife, bootstrap, shares, entropies. 95 % unless said otherwise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import betaincinv

from symbreak.runtime.errors import InputError

__all__ = ["balanced_share", "entropy_interval", "jackknife", "mean_interval", "percentiles", "proportion", "resampled"]

SKEWED = 30  # values from which a skewness can be estimated
DRAWS_A_CLASS = 20  # that an interval of an entropy needs


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval over resamples [R, ...]; no interpolation, so that infinities are allowed."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0, method="inverted_cdf")
    return low, high


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval of independent values; the interval is NaN for a single one.

    From `SKEWED` values on it also holds the interval that Hall's transformation corrects for their skewness: errors of
    images near a decision are rare and large, and Student's interval of 200 of them holds the right mean in 83 to 88 of
    100 sets.

    Source: Hall, J. R. Stat. Soc. B 54, 221 (1992).
    """
    x = np.asarray(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return mean, math.nan, math.nan
    t, error = float(stats.t.ppf(0.5 + confidence / 2, n - 1)), float(x.std(ddof=1)) / math.sqrt(n)
    ends = [mean - t * error, mean + t * error]
    a = float(stats.skew(x)) / math.sqrt(n) if n >= SKEWED and error > 1e-12 * abs(mean) else 0.0
    if abs(a) > 1e-6:  # Student's statistic T has the distribution of T + a T^2 / 3 + a^2 T^3 / 27 + a / 6
        ends += [mean - error * 3 / a * (float(np.cbrt(1 + a * (y - a / 6))) - 1) for y in (t, -t)]
    return mean, min(ends), max(ends)


def jackknife(estimate: float, *leave_one_out: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an estimate from leave-one-group-out values, NaN where a set has fewer than two groups.

        half = sqrt(sum_s t_s^2 V_s),   V_s = (G_s - 1) / G_s sum_g (x_sg - mean_g x_sg)^2

    V_s is the variance that the independent set s brings; t_s is Student's quantile for G_s - 1 degrees of freedom. For
    one set this is the usual interval, for several it covers at least the confidence.

    Args:
        estimate: from everything.
        leave_one_out: of every set the values [G_s] without each of its groups.
        confidence: nominal coverage.

    Source: Quenouille 1949, Tukey 1958; several sets after Banerjee, Calcutta Stat. Assoc. Bull. 10 (1960).
    """
    sets = [np.asarray(x, dtype=np.float64) for x in leave_one_out]
    if not sets or min(map(len, sets)) < 2:
        return math.nan, math.nan
    half = math.sqrt(
        sum(
            float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1) ** 2 * ((x - x.mean()) ** 2).sum() * (1 - 1 / len(x)))
            for x in sets
        )
    )
    return estimate - half, estimate + half


def resampled(values: np.ndarray, seed: int = 0, resamples: int = 1000) -> np.ndarray:
    """Bootstrap means [R, G] of G quantities of the same items: rows of ``values`` [G, N] are resampled together."""
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[1]
    rng, block = np.random.default_rng(seed), max(1, 2**22 // n)
    sizes = [min(block, resamples - i) for i in range(0, resamples, block)]
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), k) @ x.T for k in sizes]) / n


def proportion(count: float, of: float, confidence: float = 0.95) -> dict[str, float]:
    """A share with its Clopper-Pearson interval, which covers at least the confidence at every count.

    >>> share = proportion(0, 100)  # the upper end is 1 - 0.025 ** (1 / 100)
    >>> share["share"], share["low"], round(share["high"], 6)
    (0.0, 0.0, 0.036217)
    """
    tail = (1 - confidence) / 2
    low = 0.0 if count <= 0 else float(betaincinv(count, of - count + 1, tail))
    high = 1.0 if count >= of else float(betaincinv(count + 1, of - count, 1 - tail))
    return {"count": count, "of": of, "share": count / of, "low": low, "high": high}


def balanced_share(counts: ArrayLike, of: ArrayLike, confidence: float = 0.95) -> dict[str, float]:
    """Mean of the shares of K classes, rare ones counted as much as frequent ones, with an interval.

        low = mean_c p_c - sqrt(sum_c (p_c - low_c)^2) / K,     high likewise,     from the ends of `proportion`

    Args:
        counts, of: [K] of every class, with at least one in each.
        confidence: nominal coverage.

    Source: Zou & Donner, Stat. Med. 27, 1693 (2008), of Clopper-Pearson's ends.

    >>> share = balanced_share([90, 5], [100, 5])
    >>> share["value"], round(share["low"], 3), share["high"] < 1
    (0.95, 0.686, True)
    """
    ends = [proportion(float(a), float(b), confidence) for a, b in zip(np.asarray(counts), np.asarray(of), strict=True)]
    p, low, high = np.array([[e[k] for k in ("share", "low", "high")] for e in ends]).T
    below, above = (math.sqrt(((p - end) ** 2).sum()) / len(p) for end in (low, high))
    return {"value": float(p.mean()), "low": float(p.mean()) - below, "high": float(p.mean()) + above}


def entropy_interval(counts: ArrayLike, confidence: float = 0.95) -> dict[str, float]:
    """Entropy in bits of a law from counts of its classes, corrected for the count, with an interval.

        H = H_plug-in + (K - 1) / (2 N ln 2)        K classes that occur (Miller-Madow)
        Var = (sum p log2(p)^2 - H^2) / N + (K - 1) / (2 N^2 ln(2)^2)

    The first term of the variance is the delta method's; it vanishes where all classes are equally frequent, and the
    second, that of the chi-squared error there, takes its place. Below 20 draws a class,
    classes that never occurred and the skewness of the error spoil both: of 100 equal classes no interval from 200
    draws covered.

    Args:
        counts: [K] how often each class occurred.
        confidence: nominal coverage.

    Returns:
        ``value``, ``low``, ``high`` in bits, cut to 0 .. log2(len(counts)), and ``plug_in``. The ends are NaN for fewer
        than 20 draws a class, K = len(counts).

    Raises:
        InputError: where all counts are 0.

    >>> entropy_interval([50, 50])["plug_in"]
    1.0
    """
    n = np.asarray(counts, dtype=np.float64)
    total = n.sum()
    if not total > 0:
        raise InputError("no labels; the entropy of nothing is not defined.")
    share = n[n > 0] / total
    plug_in = float(-(share * np.log2(share)).sum())
    extra = len(share) - 1
    variance = max(0.0, float((share * np.log2(share) ** 2).sum()) - plug_in**2) / total
    variance += extra / (2 * total**2 * math.log(2) ** 2)
    most = math.log2(len(n))
    value = plug_in + extra / (2 * total * math.log(2))
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    low, value, high = (min(max(0.0, v), most) for v in (value - half, value, value + half))
    if total < DRAWS_A_CLASS * len(n):
        low = high = math.nan
    return {"value": value, "low": low, "high": high, "plug_in": plug_in}
