"""What a noised state tells of the sample it came from, and the excess entropy of a data set.

With n samples in d dimensions and a = log n / d, the excess entropy density is the part of log n that the
noised state does not yet tell:

    f(sigma) = max(0, log n - I(x_0; x)) / d

    Gaussian, eigenvalues lambda_i     I = 1/2 sum_i log(1 + lambda_i / sigma^2)
    mixture                            I = sum_c w_c I_c + I(c; x), I(c; x) the class information
    any law                            I = E[log p(x | x_0) - log p(x)]
    data set (measured)                f^e = 1/d E log(1 + S), S the weight of all other points (`pairwise_weights`)

f^e is rounded upward near the collapse and never reaches zero: log n - d f^e is a lower bound of I that cannot pass
log n (InfoNCE). The same S gives an upper bound, log(n - 1) - E log S (leave-one-out), which does pass it. Both are
bounds in expectation, and the upper one falls to I as n grows: sums over random parts of the data, n/8 to n, say how
fast, and extrapolate it.

Sources: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491; bounds: Poole et al. 2019, arXiv:1905.06922;
general spectrum, class information, control variate and the extrapolation are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from symbreak.critical import Curve, Levels, curve, levels
from symbreak.intervals import jackknife
from symbreak.laws.class_posterior import posterior_average
from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.laws.pairwise_weights import PARTS, Overlaps, SharedPoints, overlaps
from symbreak.noise import generator
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Run, renamed

__all__ = [
    "Information",
    "Source",
    "bounds",
    "check_count",
    "excess_entropy",
    "extrapolated",
    "information",
    "left_out",
    "mutual_information",
]

Source: TypeAlias = Law | SharedPoints  # a law, a data set among them, or one whose points ranks share
Estimate = TypeVar("Estimate", float, np.ndarray)
POINTS = (Empirical, SharedPoints)  # data sets, on which things are measured
NORMAL = 1.959963984540054
GROUPS = 20  # of queries, left out in turn
FEW = 8 * PARTS  # points with which nothing is extrapolated
MISSED = 0.3  # of the extrapolation in n: at most what it missed of Gaussians in 8 to 32 dimensions


@dataclass(frozen=True, kw_only=True)
class Information(Curve):
    """I(x_0; x_sigma) in nats; exact or Monte Carlo for a law, extrapolated for a data set.

    Attributes:
        least, most: estimates of a lower and an upper bound (equal to the value for a law). For a data set of n
            points: InfoNCE, at most log n, and leave-one-out.
    """

    record = (*Curve.record, "least", "most")

    least: np.ndarray
    most: np.ndarray


@renamed()
def excess_entropy(
    law: Source,
    sigma: Levels,
    samples: int | None = None,
    queries: int = 1000,
    draws: int = 20000,
    seed: int = 0,
    run: Run | None = None,
) -> Curve:
    """The excess entropy density f of n samples of a law, or as measured on a data set, in nats a dimension.

    Args:
        law: a `Gaussian` (exact), a `Mixture` (exact but for the class information, which is a quadrature
            for two classes with one covariance and Monte Carlo otherwise), an `Empirical` or the `SharedPoints` of
            several processes (measured: f^e),
            or any law with ``log_prob`` (Monte Carlo).
        sigma: a level, or levels [G].
        samples: number n of training samples; for an `Empirical` it is its own.
        queries: noised samples that f^e is averaged over, at most one a point.
        draws: Monte Carlo draws where they are needed.
        seed: of queries and draws. All levels share them: errors of neighbouring levels are correlated.
        run: finished parts and progress of a measurement on a data set.

    Returns:
        A `Curve` with 95 % intervals, of no width where the value is exact; f^e's is conditional on the
        data set. For a single level its arrays have no axis.

    Raises:
        InputError: for sigma <= 0, fewer than 2 samples, or a number of samples that is not the data set's.

    Source: arXiv:2402.18491.

    >>> from symbreak.moments.one_pass import Moments
    >>> law = Gaussian(Moments(2, torch.zeros(2), torch.eye(2)))
    >>> round(float(excess_entropy(law, 1.0, samples=100).value), 6)              # (log 100 - log 2) / 2
    1.956012
    """
    grid, shape = levels(sigma)
    nats = math.log(check_count(law, samples))
    if isinstance(law, POINTS):
        weights = overlaps(law, grid, queries, seed, tails=False, run=run)
        value, low, high = _normal(np.logaddexp(0.0, weights.leave_one_out()) / law.dim)
    else:
        value, low, high = (np.maximum(0.0, nats - i) / law.dim for i in information(law, grid, draws, seed))
        low, high = high, low
    return curve(grid, shape, value, low, high, "excess entropy")


@renamed()
def mutual_information(
    law: Source, sigma: Levels, queries: int = 1000, draws: int = 20000, seed: int = 0, run: Run | None = None
) -> Information:
    """I(x_0; x_0 + sigma eps) in nats: what a state at a level tells of the sample it came from.

    Args:
        law: as for `excess_entropy`; for an `Empirical` the information of the law that its points were drawn from
            is estimated, not that of the points, which ends at log n.
        sigma: a level, or levels [G].
        queries, draws, seed, run: as for `excess_entropy`.

    Returns:
        An `Information` with 95 % intervals, and bounds; a data set's interval also holds three tenths of the way that
        it was extrapolated. A data set's estimate is trustworthy up to about log n;
        beyond it only ``most`` has a meaning. With fewer than 64 points it is ``most``, with no interval (NaN).

    Source: arXiv:2402.18491; bounds of a data set: arXiv:1905.06922; the extrapolation is derived.

    >>> law = Mixture.from_parameters(torch.zeros(1, 2), 3.0)
    >>> round(float(mutual_information(law, 1.0).value), 6)                                    # log(1 + 3 / 1)
    1.386294
    """
    grid, shape = levels(sigma)
    if not isinstance(law, POINTS):
        value, low, high = information(law, grid, draws, seed)
        least = most = value
    else:
        check_count(law, None)
        weights = overlaps(law, grid, queries, seed, run=run)
        least, most = bounds(weights)
        if len(law) < FEW:
            value, low, high = most, np.full_like(most, math.nan), np.full_like(most, math.nan)
        else:
            raw = extrapolated(weights)
            ends = [jackknife(float(v), rows) for v, rows in zip(raw, np.transpose(left_out(weights, extrapolated)))]
            half = np.hypot(raw - np.array(ends)[:, 0], MISSED * (most - raw))
            low, high = raw - half, raw + half
            # An estimate that its own bounds exclude knows no more than they do.
            lost = ~((raw >= least) & (raw <= most))
            value = np.clip(raw, least, most)
            low, high = np.where(lost, least, low), np.where(lost, most, high)
    mean = curve(grid, shape, value, low, high, "mutual information")
    return mean.extended(Information, least=least.reshape(shape), most=most.reshape(shape))


def check_count(law: Source, samples: int | None) -> int:
    """The number of training samples: a data set's own, or the one for a law.

    Raises:
        InputError: for less than 2 of them, none for a law, or another number than a data set has.
    """
    if isinstance(law, POINTS):
        if samples is not None and samples != len(law):
            raise InputError(f"samples is {samples}, but the data set holds {len(law)} points. Leave it out.")
        if len(law) < 2:
            raise InputError("a data set of one point has no excess entropy; expected at least 2 points.")
        return len(law)
    if samples is None:
        raise InputError("the number of training samples is missing. Pass samples=n.")
    if not (math.isfinite(samples) and samples >= 2):
        raise InputError(f"samples is {samples}; expected a number of training samples >= 2.")
    return samples


def information(law: Law, sigma: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _by_density(law: Law, sigma: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E[log p(x | x_0) - log p(x)] over draws; the noise's own term cancels most of the spread."""
    sums, block = np.zeros((2, len(sigma))), max(1, 2**23 // law.dim)
    for i in range(0, draws, block):
        g = generator(seed, i)
        clean = law.sample(min(block, draws - i), 0.0, g)
        z = torch.randn(clean.shape, generator=g, dtype=torch.float64)
        noise = -0.5 * (z * z).reshape(len(z), -1).sum(1)
        for j, s in enumerate(sigma):
            log_p = law.log_prob(clean + float(s) * z, float(s)).double()
            gain = noise - law.dim * math.log(math.sqrt(2 * math.pi) * float(s)) - log_p
            sums[:, j] += [float(gain.sum()), float((gain * gain).sum())]
    mean = sums[0] / draws
    half = NORMAL * np.sqrt(np.maximum(sums[1] / draws - mean**2, 0.0) / max(draws - 1, 1))
    return mean, mean - half, mean + half


def _normal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis, and its 95 % interval."""
    mean = values.mean(0)
    half = NORMAL * values.std(0, ddof=1) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def bounds(weights: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """Lower (InfoNCE) and upper (leave-one-out) bound of I at the levels, [G] each."""
    log_s = weights.leave_one_out()
    return (math.log(weights.count) - np.logaddexp(0.0, log_s).mean(0), math.log(weights.count - 1) - log_s.mean(0))


def extrapolated(weights: Overlaps) -> np.ndarray:
    """I [G], from leave-one-out bounds with n/8, n/4, n/2 and n points.

    Doubling n lowers the bound by steps whose ratio rho falls to 1/2 at large sigma and stays below 1: the rest is
    the geometric series. rho is smooth in log sigma, so neighbouring levels are fitted together.
    """
    n, parts = weights.count, weights.parts
    bound = []
    for m in (1, 2, 4, 8):
        groups = np.logaddexp.reduce(parts.reshape(len(parts), PARTS // m, m, -1), axis=2)
        bound.append(math.log((n - 1) * m / PARTS) - groups.mean((0, 1)))
    first, second, last = (a - b for a, b in pairwise(bound))
    u = np.log(weights.sigma)
    rho = np.empty_like(u)
    for i, v in enumerate(u):
        near = np.exp(-0.5 * ((u - v) / 0.3) ** 2)
        x = (first + second) * near
        columns = np.stack([x, x * (u - v)], axis=1) if len(u) > 2 else x[:, None]
        rho[i] = np.linalg.lstsq(columns, (second + last) * near, rcond=None)[0][0]
    rho = np.clip(rho, 0.3, 0.95)
    step = (last + second * rho + first * rho**2) / 3
    out: np.ndarray = bound[-1] - step * rho / (1 - rho)
    return out


def left_out(weights: Overlaps, estimate: Callable[[Overlaps], Estimate]) -> list[Estimate]:
    """An estimate with each of `GROUPS` groups of queries left out in turn."""
    group = np.arange(len(weights.parts)) % min(GROUPS, len(weights.parts))
    parts = (weights.parts[group != k] for k in range(int(group.max()) + 1))
    return [estimate(Overlaps(weights.sigma, p, weights.count)) for p in parts]
