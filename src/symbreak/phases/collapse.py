"""Collapse: the noise level below which a reverse trajectory is bound to one training sample.

With n samples in d dimensions and a = log n / d, the excess entropy density is the part of log n that the
noised state does not yet tell:

    f(sigma) = max(0, log n - I(x_0; x)) / d        collapse: I(x_0; x) = log n

    Gaussian, eigenvalues lambda_i     I = 1/2 sum_i log(1 + lambda_i / sigma^2)
    mixture                            I = sum_c w_c I_c + I(c; x), I(c; x) the class information
    any law                            I = E[log p(x | x_0) - log p(x)]
    data set (measured)                f^e = 1/d E log(1 + S), S the weight of all other points (laws/overlaps.py)

f^e is rounded upward near the collapse and never reaches zero: log n - d f^e is a lower bound of I that cannot pass
log n (InfoNCE). The same S gives an upper bound, log(n - 1) - E log S (leave-one-out), which does pass it. Both are
bounds in expectation, and the upper one falls to I as n grows: sums over random parts of the data, n/8 to n, say how
fast, and extrapolate it. The collapse is read where that estimate passes log n.

Sources: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491; bounds: Poole et al. 2019, arXiv:1905.06922;
general spectrum, class information, control variate and the extrapolation are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from symbreak.critical import CriticalTime, Curve, crossing, curve, levels
from symbreak.intervals import jackknife
from symbreak.laws.class_posterior import posterior_average
from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.mixture import Mixture
from symbreak.laws.pairwise_weights import PARTS, Overlaps, SharedPoints, overlaps
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run, renamed

__all__ = [
    "Information",
    "Scaling",
    "collapse_scaling",
    "collapse_time",
    "excess_entropy",
    "mutual_information",
    "samples_needed",
]

SOURCE = "arXiv:2402.18491, I(x_0; x) = log n"
MEASURED = "arXiv:2402.18491, I(x_0; x) = log n; I from leave-one-out sums, arXiv:1905.06922, extrapolated in n"
POINTS = (Empirical, SharedPoints)  # data sets, on which things are measured
NORMAL = 1.959963984540054
GROUPS = 20  # of queries, left out in turn
FEW = 8 * PARTS  # points with which nothing is extrapolated


@dataclass(frozen=True)
class Information(Curve):
    """I(x_0; x_sigma) in nats; exact or Monte Carlo for a law, extrapolated for a data set.

    Attributes:
        least, most: estimates of a lower and an upper bound (equal to the value for a law). For a data set of n
            points: InfoNCE, at most log n, and leave-one-out.
    """

    least: np.ndarray = field(default_factory=lambda: np.zeros(()))
    most: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {**super().to_dict(), "least": self.least.tolist(), "most": self.most.tolist()}


@renamed()
def excess_entropy(
    law: Any,
    sigma: Any,
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
    if isinstance(law, POINTS):
        _own_count(law, samples)
        found = overlaps(law, grid, queries, seed, tails=False, run=run)
        value, low, high = _normal(np.logaddexp(0.0, found.leave_one_out()) / law.dim)
    else:
        nats = math.log(_count(samples))
        told, less, more = _information(law, grid, draws, seed)
        value, low, high = (np.maximum(0.0, nats - i) / law.dim for i in (told, more, less))
    return curve(grid, shape, value, low, high, "excess entropy")


@renamed()
def mutual_information(
    law: Any, sigma: Any, queries: int = 1000, draws: int = 20000, seed: int = 0, run: Run | None = None
) -> Information:
    """I(x_0; x_0 + sigma eps) in nats: what a state at a level tells of the sample it came from.

    Args:
        law: as for `excess_entropy`; for an `Empirical` the information of the law that its points were drawn from
            is estimated, not that of the points, which ends at log n.
        sigma: a level, or levels [G].
        queries, draws, seed, run: as for `excess_entropy`.

    Returns:
        An `Information` with 95 % intervals, and bounds. A data set's estimate is trustworthy up to about log n;
        beyond it only ``most`` has a meaning. With fewer than 64 points it is ``most``, with no interval (NaN).

    Source: arXiv:2402.18491; bounds of a data set: arXiv:1905.06922; the extrapolation is derived.

    >>> law = Mixture.from_parameters(torch.zeros(1, 2), 3.0)
    >>> round(float(mutual_information(law, 1.0).value), 6)                                    # log(1 + 3 / 1)
    1.386294
    """
    grid, shape = levels(sigma)
    name = "mutual information"
    if not isinstance(law, POINTS):
        value, low, high = (a.reshape(shape) for a in _information(law, grid, draws, seed))
        return Information(grid.reshape(shape), value, low, high, name, value, value)
    _own_count(law, None)
    found = overlaps(law, grid, queries, seed, run=run)
    least, most = _bounds(found)

    if len(law) < FEW:
        value, low, high = most, np.full_like(most, math.nan), np.full_like(most, math.nan)
    else:
        raw = _extrapolated(found)
        left_out = _left_out(found, _extrapolated)
        low, high = np.array([jackknife(float(v), rows) for v, rows in zip(raw, left_out.T)]).T
        # An estimate that its own bounds exclude knows no more than they do.
        lost = ~((raw >= least) & (raw <= most))
        value = np.clip(raw, least, most)
        low, high = np.where(lost, least, low), np.where(lost, most, high)
    low, high, value, least, most = (a.reshape(shape) for a in (low, high, value, least, most))
    return Information(grid.reshape(shape), value, low, high, name, least, most)


@renamed()
def samples_needed(
    law: Any, sigma: Any, queries: int = 1000, draws: int = 20000, seed: int = 0, run: Run | None = None
) -> Curve:
    """Training samples above which a level lies above the collapse, as log10 n: n = exp I(x_0; x_sigma).

    Args:
        law, sigma, queries, draws, seed, run: as for `mutual_information`.

    Returns:
        A `Curve` of log10 n. For a data set its interval reaches over both bounds of the information as well: above
        log10 of its own count the value is an extrapolation, and ``low`` and ``high`` say how little is known.

    Source: derived from arXiv:2402.18491, collapse at I = log n.

    >>> law = Mixture.from_parameters(torch.zeros(1, 64), 1.0)
    >>> level = collapse_time(law, samples=1000).sigma
    >>> round(float(samples_needed(law, level).value), 9)
    3.0
    """
    told = mutual_information(law, sigma, queries, draws, seed, run)
    low, high = told.low, told.high
    if isinstance(law, POINTS):
        low, high = np.fmin(low, told.least), np.fmax(high, told.most)  # NaN ends take the bounds
    ten = math.log(10.0)
    return Curve(told.sigma, told.value / ten, low / ten, high / ten, name="log10 of the samples needed")


@renamed()
def collapse_time(
    law: Any, samples: int | None = None, queries: int = 1000, draws: int = 20000, seed: int = 0, run: Run | None = None
) -> CriticalTime:
    """The collapse level of n samples of a law, or of a data set.

        sum_i log(1 + lambda_i / sigma^2) = 2 log n        (Gaussian; variance v: sigma^2 = v / (n^(2/d) - 1))

    Args:
        law: as for `excess_entropy`. For an `Empirical` it is where `mutual_information` passes log n.
        samples: number n of training samples; for an `Empirical` it is its own.
        queries, draws, seed, run: as for `excess_entropy`.

    Returns:
        A `CriticalTime`; with a reason and no level where the state tells less than log n nats at every level
        (a law of fewer than n points, a data set with copies). Its interval is a jackknife over queries for a data
        set; ``reason`` then says where the upper bound passes, which no estimate should lie above.

    Raises:
        InputError: for fewer than 2 samples (3 points of a data set), a number of samples that is not the data
            set's, or points that are all equal.

    Source: arXiv:2402.18491.

    >>> law = Mixture.from_parameters(torch.zeros(1, 64), 1.0)
    >>> round(collapse_time(law, samples=1000).level.ou_time, 10)
    0.8195419927
    """
    if isinstance(law, POINTS):
        _own_count(law, samples)
        if len(law) < 3:
            raise InputError(f"a data set of {len(law)} points; expected at least 3 to look for its collapse.")
        return _of_points(law, queries, seed, run or Run())
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


@dataclass(frozen=True)
class Scaling:
    """Collapse against a size of the data.

    Attributes:
        axis: ``"samples"``, ``"components"`` or ``"pixels"``.
        sizes: sizes, one a row.
        measured: collapse of the data set at each size.
        gaussian: that of a Gaussian with the same moments.
    """

    axis: str
    sizes: tuple[int, ...]
    measured: tuple[CriticalTime, ...]
    gaussian: tuple[CriticalTime, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {
            "axis": self.axis,
            "sizes": list(self.sizes),
            "measured": [c.to_dict() for c in self.measured],
            "gaussian": [c.to_dict() for c in self.gaussian],
        }


@renamed()
def collapse_scaling(
    law: Empirical, axis: str, sizes: Any, queries: int = 1000, seed: int = 0, run: Run | None = None
) -> Scaling:
    """The curse of dimensionality, measured: the collapse of a data set cut down in one size.

    Args:
        law: the data set, images [N, C, H, W] for ``"pixels"``.
        axis: ``"samples"``: random subsets of so many points, each within the next; ``"components"``: the leading
            principal components; ``"pixels"``: images averaged to this side length, which must divide their own.
        sizes: sizes [K].
        queries, seed: as for `collapse_time`.
        run: progress, in sizes.

    Raises:
        InputError: for another axis, or sizes that the data do not have.

    Source: arXiv:2402.18491, the collapse falls as log n / d.
    """
    sizes = [int(v) for v in sizes]
    if axis not in ("samples", "components", "pixels"):
        raise InputError(f"axis {axis!r}; expected 'samples', 'components' or 'pixels'.")
    side = law.shape[-1] if len(law.shape) == 3 else 0
    if axis == "pixels" and (side == 0 or law.shape[1] != side):
        raise InputError(f"points of shape {law.shape} are no square images. Use axis='components'.")
    least, most = {"samples": (3, len(law)), "components": (1, law.dim), "pixels": (1, side)}[axis]
    bad = [v for v in sizes if not least <= v <= most or (axis == "pixels" and side % v)]
    if bad or not sizes:
        divides = f" that divide {side}" if axis == "pixels" else ""
        raise InputError(f"sizes {bad or sizes} along {axis}; expected numbers from {least} to {most}{divides}.")
    order = torch.randperm(len(law), generator=generator(seed, len(law), 3))
    flat = law.points.reshape(len(law), -1)
    vectors = law.moments.eigh[1] if axis == "components" else None
    measured, gaussian = [], []
    for done, size in enumerate(sizes):
        if axis == "samples":
            small = Empirical(law.points[order[:size]], law.memory)
        elif vectors is not None:
            small = Empirical(torch.cat([p.double() @ vectors[:, :size] for p in flat.split(4096)]), law.memory)
        else:
            small = Empirical(torch.nn.functional.avg_pool2d(law.points, side // size), law.memory)
        measured.append(collapse_time(small, queries=queries, seed=seed))
        gaussian.append(collapse_time(Gaussian(small.moments), samples=len(small)))
        (run or Run()).named("collapse").tell(done + 1, len(sizes))
    return Scaling(axis, tuple(sizes), tuple(measured), tuple(gaussian))


def _count(samples: int | None) -> float:
    if samples is None:
        raise InputError("the number of training samples is missing. Pass samples=n.")
    if not (math.isfinite(samples) and samples >= 2):
        raise InputError(f"samples is {samples}; expected a number of training samples >= 2.")
    return float(samples)


def _own_count(law: Empirical | SharedPoints, samples: int | None) -> None:
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
    half = NORMAL * np.sqrt(np.maximum(sums[1] / draws - mean**2, 0.0) / max(draws - 1, 1))
    return mean, mean - half, mean + half


def _normal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis, and its 95 % interval."""
    mean = values.mean(0)
    half = NORMAL * values.std(0, ddof=1) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _bounds(found: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """Lower (InfoNCE) and upper (leave-one-out) bound of I at the levels, [G] each."""
    log_s = found.leave_one_out()
    return (math.log(found.count) - np.logaddexp(0.0, log_s).mean(0), math.log(found.count - 1) - log_s.mean(0))


def _extrapolated(found: Overlaps) -> np.ndarray:
    """I [G], from leave-one-out bounds with n/8, n/4, n/2 and n points.

    Doubling n lowers the bound by steps whose ratio rho falls to 1/2 at large sigma and stays below 1: the rest is
    the geometric series. rho is smooth in log sigma, so neighbouring levels are fitted together.
    """
    n, parts = found.count, found.parts
    bound = []
    for m in (1, 2, 4, 8):
        groups = np.logaddexp.reduce(parts.reshape(len(parts), PARTS // m, m, -1), axis=2)
        bound.append(math.log((n - 1) * m / PARTS) - groups.mean((0, 1)))
    first, second, last = (a - b for a, b in pairwise(bound))
    u = np.log(found.sigma)
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


def _left_out(found: Overlaps, estimate: Callable[[Overlaps], Any]) -> np.ndarray:
    """An estimate with each of `GROUPS` groups of queries left out in turn."""
    group = np.arange(len(found.parts)) % min(GROUPS, len(found.parts))
    parts = [found.parts[group != k] for k in range(int(group.max()) + 1)]
    return np.array([estimate(Overlaps(found.sigma, p, found.count)) for p in parts])


def _of_points(law: Empirical | SharedPoints, queries: int, seed: int, run: Run) -> CriticalTime:
    """Where the information of a data set's law passes log n."""
    n, size = len(law), _size(law) / math.sqrt(law.dim)
    nats = math.log(n)
    if size < 1e-100:
        raise InputError(f"all {n:,} points are equal: there is nothing to collapse to. Choose other data.")

    def nothing(reason: str) -> CriticalTime:
        return CriticalTime(None, criterion="collapse", source=MEASURED, reason=reason)

    for name, grid in (("wide", np.geomspace(300.0, 0.03, 50)), ("low", np.geomspace(0.03, 3e-4, 25))):
        wide = overlaps(law, size * grid, min(queries, 256), seed, name=name, run=run.telling(lambda *_: None))
        rough = crossing(wide.sigma, _bounds(wide)[1], nats)
        if rough is not None:
            break
    else:
        copies = float((wide.leave_one_out()[:, -1] > -1.0).mean())
        why = (
            f"{copies:.0%} of the points have a copy as near. Remove duplicates" if copies > 0.01 else "too few points"
        )
        ends = f"sigma {size * 3e-4:.3g} and {size * 300:.3g}"
        return nothing(f"the information does not pass log n = {nats:.4g} nats between {ends}: {why}")
    found = overlaps(law, rough * np.geomspace(1.25, 0.5, 24), queries, seed, name="near", run=run)

    def upper(some: Overlaps) -> float | None:
        return crossing(some.sigma, _bounds(some)[1], nats)

    def passes(some: Overlaps) -> float:
        at = crossing(some.sigma, _extrapolated(some), nats)
        return math.nan if at is None else math.log(at)

    top, best = upper(found), passes(found) if n >= FEW else math.nan
    if top is None:
        return nothing(f"the leave-one-out bound passes log n = {nats:.4g} nats at none of {len(found.sigma)} levels")
    if n < FEW or not math.isfinite(best):
        why = f"too few points ({n}) to extrapolate" if n < FEW else f"{n:,} points do not fix an extrapolation"
        reason = f"{why}: the leave-one-out bound, from above, with no interval"
        return CriticalTime(NoiseLevel(top), criterion="collapse", source=MEASURED, reason=reason)
    left_out = _left_out(found, passes)
    failed = int((~np.isfinite(left_out)).sum())
    interval = (math.nan, math.nan) if failed else jackknife(best, left_out)
    low, high = (NoiseLevel(math.exp(u)) if math.isfinite(u) else None for u in interval)
    without = f"; no interval, as {failed} of {len(left_out)} parts of the queries give no level" if failed else ""
    queried = f"{n:,} points, {len(found.parts):,} queries"
    reason = f"extrapolated in n from {queried}; the upper bound passes at {top:.4g}{without}"
    return CriticalTime(NoiseLevel(math.exp(best)), low, high, criterion="collapse", source=MEASURED, reason=reason)
