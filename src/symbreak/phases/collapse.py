"""Collapse: the noise level below which a reverse trajectory is bound to one training sample.

With n samples in d dimensions and a = log n / d, the excess entropy density is the part of log n that the
noised state does not yet tell:

    f(sigma) = max(0, log n - I(x_0; x)) / d        collapse: I(x_0; x) = log n

    Gaussian, eigenvalues lambda_i     I = 1/2 sum_i log(1 + lambda_i / sigma^2)
    mixture                            I = sum_c w_c I_c + I(c; x), I(c; x) the class information
    any law                            I = E[log p(x | x_0) - log p(x)]
    data set (measured)                f^e = 1/d E log sum_nu exp(-(|x - y_nu|^2 - |sigma z|^2) / (2 sigma^2))

In f^e, x = y_mu + sigma z is a noised sample of the data set itself; |sigma z|^2 is subtracted exactly (a
control variate: it lowers the standard error by up to a factor of fifty). f^e tends to a at large sigma and
is rounded upward near the collapse, so it has no zero: extrapolate from where f / a is above 0.4.

Source: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491; general spectrum, class information and
control variate are derived.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq, least_squares

from symbreak.critical import CriticalTime, Curve, curve, jackknife, levels
from symbreak.files import InputError
from symbreak.laws.classes import posterior_average
from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.mixture import Mixture
from symbreak.noise import NoiseLevel, generator

__all__ = ["collapse_time", "excess_entropy"]

SOURCE = "arXiv:2402.18491, I(x_0; x) = log n"
MEASURED = "arXiv:2402.18491, f^e extrapolated to zero"
QUERY_BLOCK, POINT_BLOCK = 250, 4000


def excess_entropy(
    law: Any,
    sigma: Any,
    samples: int | None = None,
    queries: int = 1000,
    draws: int = 20000,
    seed: int = 0,
) -> Curve:
    """The excess entropy density f of n samples of a law, or as measured on a data set, in nats a dimension.

    Args:
        law: a `Gaussian` (exact), a `Mixture` (exact but for the class information, which is a quadrature
            for two classes with one covariance and Monte Carlo otherwise), an `Empirical` (measured: f^e),
            or any law with ``log_prob`` (Monte Carlo).
        sigma: a level, or levels [G].
        samples: number n of training samples; for an `Empirical` it is its own.
        queries: noised samples that f^e is averaged over, at most one a point.
        draws: Monte Carlo draws where they are needed.
        seed: of queries and draws. All levels share them: errors of neighbouring levels are correlated.

    Returns:
        A `Curve` with 95 % intervals, of no width where the value is exact; f^e's is conditional on the
        data set. For a single level its arrays have no axis.

    Raises:
        InputError: for sigma <= 0, fewer than 2 samples, or a number of samples that is not the data set's.

    Source: arXiv:2402.18491.

    >>> from symbreak.moments import Moments
    >>> law = Gaussian(Moments(2, torch.zeros(2), torch.eye(2)))
    >>> round(float(excess_entropy(law, 1.0, samples=100).value), 6)              # (log 100 - log 2) / 2
    1.956012
    """
    grid, shape = levels(sigma)
    if isinstance(law, Empirical):
        _own_count(law, samples)
        values = _measured(law, grid, queries, seed)
        mean = values.mean(0)
        half = 1.959963984540054 * values.std(0, ddof=1) / math.sqrt(len(values))
        value, low, high = mean, mean - half, mean + half
    else:
        nats = math.log(_count(samples))
        told, less, more = _information(law, grid, draws, seed)
        value, low, high = (np.maximum(0.0, nats - i) / law.dim for i in (told, more, less))
    return curve(grid, shape, value, low, high, "excess entropy")


def collapse_time(
    law: Any, samples: int | None = None, queries: int = 1000, draws: int = 20000, seed: int = 0
) -> CriticalTime:
    """The collapse level of n samples of a law, or of a data set.

        sum_i log(1 + lambda_i / sigma^2) = 2 log n        (Gaussian; variance v: sigma^2 = v / (n^(2/d) - 1))

    Args:
        law: as for `excess_entropy`. For an `Empirical` f^e is measured and extrapolated to zero from where
            0.4 < f / a < 0.6, by the two-parameter curve a - r/2 log(1 + v / sigma^2): exact for one
            variance. With two resolved classes it reads about 0.1 too small in tau (1.23 against 1.334 at d = 256,
            n = 20,000; 0.10 to 0.14 at n = 2,000), and the interval does not hold this bias.
        samples: number n of training samples; for an `Empirical` it is its own.
        queries, draws, seed: as for `excess_entropy`.

    Returns:
        A `CriticalTime`; with a reason and no level where the state tells less than log n nats at every level
        (a law of fewer than n points). Its interval covers Monte Carlo errors only.

    Raises:
        InputError: for fewer than 2 samples, or a number of samples that is not the data set's.

    Source: arXiv:2402.18491.

    >>> law = Mixture.from_parameters(torch.zeros(1, 64), 1.0)
    >>> round(collapse_time(law, samples=1000).level.ou_time, 10)
    0.8195419927
    """
    if isinstance(law, Empirical):
        _own_count(law, samples)
        return _extrapolated(law, queries, seed)
    nats = math.log(_count(samples))
    size = _size(law)

    def gap(log_sigma: float, which: int = 0) -> float:
        return float(_information(law, np.array([math.exp(log_sigma)]), draws, seed)[which][0]) - nats

    low, high = math.log(1e-5 * size), math.log(1e3 * size)
    grid = np.linspace(high, low, 48)
    # Information rises as the noise falls: the first level where it passes log n is the only one.
    before = float(grid[0])
    for u in grid[1:]:
        if gap(float(u)) >= 0:
            break
        before = float(u)
    else:
        told = gap(low) + nats
        reason = f"the state tells {told:.4g} nats of x_0 at most, less than log n = {nats:.4g}: samples repeat"
        return CriticalTime(None, criterion="collapse", source=SOURCE, reason=reason)
    root = float(brentq(gap, float(u), before, xtol=1e-13, rtol=1e-14))
    value, below, above = _information(law, np.array([math.exp(root)]), draws, seed)
    low_end, high_end = None, None
    if above[0] > below[0]:
        h = 0.02
        slope = (gap(root + h) - gap(root - h)) / (2 * h)  # below zero
        low_end = NoiseLevel(math.exp(root + float(value[0] - below[0]) / slope))
        high_end = NoiseLevel(math.exp(root + float(value[0] - above[0]) / slope))
    return CriticalTime(NoiseLevel(math.exp(root)), low_end, high_end, criterion="collapse", source=SOURCE)


def _count(samples: int | None) -> float:
    if samples is None:
        raise InputError("the number of training samples is missing. Pass samples=n.")
    if not (math.isfinite(samples) and samples >= 2):
        raise InputError(f"samples is {samples}; expected a number of training samples >= 2.")
    return float(samples)


def _own_count(law: Empirical, samples: int | None) -> None:
    if samples is not None and samples != len(law):
        raise InputError(f"samples is {samples}, but the data set holds {len(law)} points. Leave it out.")
    if len(law) < 2:
        raise InputError("a data set of one point has no excess entropy; expected at least 2 points.")


def _size(law: Any) -> float:
    """A length of the law, for ranges only."""
    draws = law.sample(256, 0.0, generator(0, 256)).double().reshape(256, -1)
    return max(float((draws - draws.mean(0)).norm(dim=1).mean()), 1e-150)


def _information(law: Any, sigma: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """I(x_0; x) in nats at levels [G]: value and 95 % interval."""
    s2 = sigma[:, None] ** 2
    if isinstance(law, Gaussian):
        along = np.log1p(law.eigenvalues.numpy() / s2).sum(1)
        exact = 0.5 * (along + (law.dim - len(law.eigenvalues)) * np.log1p(law.floor / s2[:, 0]))
        return exact, exact.copy(), exact.copy()
    if isinstance(law, Mixture):
        w = law.weights.numpy()
        inside = np.zeros(len(sigma))
        for k in range(law.components):
            along = np.log1p(law.eigenvalues[k].numpy() / s2).sum(1)
            beyond = (law.dim - law.vectors.shape[2]) * np.log1p(float(law.floor[k]) / s2[:, 0])
            inside += w[k] * 0.5 * (along + beyond)
        entropy = -float((w[w > 0] * np.log(w[w > 0])).sum())
        if law.components == 1:
            return inside, inside.copy(), inside.copy()

        def uncertainty(log_p: torch.Tensor) -> torch.Tensor:
            return -(log_p.exp() * log_p).sum(-1)

        value, low, high = posterior_average(law, sigma, uncertainty, draws, seed)
        return inside + entropy - value, inside + entropy - high, inside + entropy - low
    return _by_density(law, sigma, draws, seed)


def _by_density(law: Any, sigma: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E[log p(x | x_0) - log p(x)] over draws; the noise's own term cancels most of the spread."""
    sums, block = np.zeros((2, len(sigma))), max(1, 2**23 // law.dim)
    for i in range(0, draws, block):
        g = generator(seed, i)
        clean = law.sample(min(block, draws - i), 0.0, g)
        z = torch.randn(clean.shape, generator=g, dtype=torch.float64)
        own = -0.5 * (z * z).reshape(len(z), -1).sum(1)
        for j, s in enumerate(sigma):
            log_p = law.log_prob(clean + float(s) * z, float(s)).double()
            told = own - law.dim * math.log(math.sqrt(2 * math.pi) * float(s)) - log_p
            sums[:, j] += [float(told.sum()), float((told * told).sum())]
    mean = sums[0] / draws
    half = 1.959963984540054 * np.sqrt(np.maximum(sums[1] / draws - mean**2, 0.0) / max(draws - 1, 1))
    return mean, mean - half, mean + half


def _measured(law: Empirical, sigma: np.ndarray, queries: int, seed: int) -> np.ndarray:
    """f^e of each query at levels [G], [Q, G].

    With x = y_mu + sigma z the exponents are -|y_mu - y_nu|^2 / (2 sigma^2) - z . (y_mu - y_nu) / sigma: two
    matrix products serve all levels, and no square of the noise appears.
    """
    if queries < 2:
        raise InputError(f"{queries} queries; expected at least 2.")
    n = len(law)
    y = law.points.reshape(n, -1)
    y = y - y.mean(0)  # distances by products lose digits on a common offset
    half = 0.5 * (y * y).sum(1)
    g = generator(seed, n)
    chosen = torch.randperm(n, generator=g)[: min(queries, n)]
    out = []
    for i in range(0, len(chosen), QUERY_BLOCK):
        mine = chosen[i : i + QUERY_BLOCK]
        rows = y[mine]
        z = torch.randn(rows.shape, generator=g, dtype=torch.float64)
        own = (z * rows).sum(1, keepdim=True)
        total = torch.full((len(sigma), len(mine)), -math.inf, dtype=torch.float64)
        for j in range(0, n, POINT_BLOCK):
            block = y[j : j + POINT_BLOCK]
            apart = (half[mine][:, None] + half[j : j + POINT_BLOCK] - rows @ block.T).clamp_min(0.0)
            pull = own - z @ block.T
            here = (mine >= j) & (mine < j + len(block))
            at = (here.nonzero()[:, 0], mine[here] - j)
            apart[at], pull[at] = 0.0, 0.0  # the sample itself: exactly zero
            for k, s in enumerate(sigma):
                exponent = apart.mul(-1.0 / float(s) ** 2).sub_(pull, alpha=1.0 / float(s))
                total[k] = torch.logaddexp(total[k], torch.logsumexp(exponent, dim=1))
        out.append(total.T / law.dim)
    return torch.cat(out).numpy()


def _extrapolated(law: Empirical, queries: int, seed: int) -> CriticalTime:
    """Zero of a two-parameter curve through the part of f^e that is not rounded."""

    def nothing(reason: str) -> CriticalTime:
        return CriticalTime(None, criterion="collapse", source=MEASURED, reason=reason)

    a = math.log(len(law)) / law.dim
    size = _size(law) / math.sqrt(law.dim)
    coarse = size * np.geomspace(300.0, 0.03, 50)
    rough = _measured(law, coarse, min(queries, 200), seed).mean(0) / a
    inside = np.flatnonzero((rough > 0.35) & (rough < 0.65))
    if not len(inside):
        return nothing("f^e / a does not pass through 0.35 .. 0.65 at any level")
    ends = coarse[max(inside[0] - 1, 0)], coarse[min(inside[-1] + 1, len(coarse) - 1)]
    sigma = np.geomspace(*ends, 24)
    f = _measured(law, sigma, queries, seed) / a
    use = (f.mean(0) > 0.4) & (f.mean(0) < 0.6)
    if use.sum() < 3:
        return nothing("f^e / a has too few levels between 0.4 and 0.6 to extrapolate")

    def zero(values: np.ndarray) -> float:
        """log sigma at which a fitted curve vanishes."""

        def miss(p: np.ndarray) -> np.ndarray:
            out: np.ndarray = 1.0 - math.exp(p[0]) * np.log1p(np.exp(p[1]) / sigma[use] ** 2) - values[use]
            return out

        start = np.array([math.log(0.5 / a), 2 * math.log(size)])
        r, v = np.exp(least_squares(miss, start, xtol=1e-12, ftol=1e-12, gtol=1e-12).x)
        return 0.5 * (math.log(v) - math.log(math.expm1(min(1.0 / r, 700.0))))

    groups = np.arange(len(f)) % 10
    best = zero(f.mean(0))
    low, high = jackknife(best, np.array([zero(f[groups != k].mean(0)) for k in range(10)]))
    level, below, above = (NoiseLevel(math.exp(u)) for u in (best, low, high))
    reason = "extrapolated from 0.4 < f / a < 0.6; the interval covers the choice of queries, not of the data"
    return CriticalTime(level, below, above, criterion="collapse", source=MEASURED, reason=reason)
