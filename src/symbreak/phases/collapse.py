"""Collapse: the noise level below which a reverse trajectory is bound to one training sample.

    I(x_0; x) = log n                                              (`symbreak.phases.information`)

For a data set the information is an estimate of its law's, extrapolated in n, and the collapse where that passes log n.

Source: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Levels, Result, crossing, root_time
from symbreak.intervals import jackknife
from symbreak.laws.empirical import Empirical
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.pairwise_weights import Overlaps, SharedPoints, overlaps
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.information import (
    FEW,
    MISSED,
    POINTS,
    Source,
    bounds,
    check_count,
    extrapolated,
    information,
    left_out,
    mutual_information,
)
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Run, renamed

__all__ = ["Scaling", "collapse_scaling", "collapse_time", "samples_needed"]

SOURCE = "arXiv:2402.18491, I(x_0; x) = log n"
MEASURED = "arXiv:2402.18491, I(x_0; x) = log n; I from leave-one-out sums, arXiv:1905.06922, extrapolated in n"


@renamed()
def samples_needed(
    law: Source, sigma: Levels, queries: int = 1000, draws: int = 20000, seed: int = 0, run: Run | None = None
) -> Curve:
    """Training samples above which a level lies above the collapse, as log10 n: n = exp I(x_0; x_sigma).

    Args:
        law, sigma, queries, draws, seed, run: as for `mutual_information`.

    Returns:
        A `Curve` of log10 n. For a data set its interval reaches over both bounds of the information as well: above
        log10 of its own count the value is an extrapolation, and ``low`` and ``high`` say how little is known.

    Source: derived from arXiv:2402.18491, collapse at I = log n.

    >>> from symbreak.laws.mixture import Mixture
    >>> law = Mixture.from_parameters(torch.zeros(1, 64), 1.0)
    >>> level = collapse_time(law, samples=1000).sigma
    >>> round(float(samples_needed(law, level).value), 9)
    3.0
    """
    nats = mutual_information(law, sigma, queries, draws, seed, run)
    if isinstance(law, POINTS):  # NaN ends take the bounds
        nats = replace(nats, low=np.fmin(nats.low, nats.least), high=np.fmax(nats.high, nats.most))
    return nats.map(lambda v: v / math.log(10.0), "log10 of the samples needed")


@renamed()
def collapse_time(
    law: Source,
    samples: int | None = None,
    queries: int = 1000,
    draws: int = 20000,
    seed: int = 0,
    run: Run | None = None,
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
        set, and three tenths of the way that it was extrapolated; ``reason`` then says where the upper bound passes,
        which no estimate should lie above.

    Raises:
        InputError: for fewer than 2 samples (3 points of a data set), a number of samples that is not the data
            set's, or points that are all equal.

    Source: arXiv:2402.18491.

    >>> from symbreak.laws.mixture import Mixture
    >>> law = Mixture.from_parameters(torch.zeros(1, 64), 1.0)
    >>> round(collapse_time(law, samples=1000).level.ou_time, 10)
    0.8195419927
    """
    nats = math.log(check_count(law, samples))
    if isinstance(law, POINTS):
        if len(law) < 3:
            raise InputError(f"a data set of {len(law)} points; expected at least 3 to look for its collapse.")
        return _of_points(law, queries, seed, run or Run())
    average = partial(information, law, draws=draws, seed=seed)
    # Information rises as the noise falls: the first level where it passes log n is the only one.
    grid = np.linspace(math.log(1e3 * _size(law)), math.log(1e-5 * _size(law)), 48)
    at = bisect_left(range(1, len(grid)), True, key=lambda i: average(np.exp([grid[i]]))[0][0] >= nats) + 1
    if at < len(grid):
        bracket = (float(grid[at]), float(grid[at - 1]))
        return root_time(average, nats, bracket, criterion="collapse", source=SOURCE)
    value = average(np.exp([grid[-1]]))[0][0]
    reason = f"the state tells {value:.4g} nats of x_0 at most, less than log n = {nats:.4g}: samples repeat"
    return CriticalTime(None, criterion="collapse", source=SOURCE, reason=reason)


@dataclass(frozen=True)
class Scaling(Result):
    """Collapse against a size of the data.

    Attributes:
        axis: ``"samples"``, ``"components"`` or ``"pixels"``.
        sizes: sizes, one a row.
        measured: collapse of the data set at each size.
        gaussian: that of a Gaussian with the same moments.
    """

    record = ("axis", "sizes", "measured", "gaussian")

    axis: str
    sizes: tuple[int, ...]
    measured: tuple[CriticalTime, ...]
    gaussian: tuple[CriticalTime, ...]


@renamed()
def collapse_scaling(
    law: Empirical, axis: str, sizes: Iterable[int], queries: int = 1000, seed: int = 0, run: Run | None = None
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


def _size(law: Source) -> float:
    """A length of the law, for ranges only."""
    draws = law.sample(256, 0.0, generator(0, 256)).double().reshape(256, -1)
    return max(float((draws - draws.mean(0)).norm(dim=1).mean()), 1e-150)


def _of_points(law: Empirical | SharedPoints, queries: int, seed: int, run: Run) -> CriticalTime:
    """Where the information of a data set's law passes log n."""
    n, size = len(law), _size(law) / math.sqrt(law.dim)
    nats = math.log(n)
    if size < 1e-100:
        raise InputError(f"all {n:,} points are equal: there is nothing to collapse to. Choose other data.")

    time = partial(CriticalTime, criterion="collapse", source=MEASURED)
    for name, grid in (("wide", np.geomspace(300.0, 0.03, 50)), ("low", np.geomspace(0.03, 3e-4, 25))):
        wide = overlaps(law, size * grid, min(queries, 256), seed, name=name, run=run.telling(lambda *_: None))
        rough = crossing(wide.sigma, bounds(wide)[1], nats)
        if rough is not None:
            break
    else:
        copies = float((wide.leave_one_out()[:, -1] > -1.0).mean())
        why = (
            f"{copies:.0%} of the points have a copy as near. Remove duplicates" if copies > 0.01 else "too few points"
        )
        ends = f"sigma {size * 3e-4:.3g} and {size * 300:.3g}"
        return time(None, reason=f"the information does not pass log n = {nats:.4g} nats between {ends}: {why}")
    near = overlaps(law, rough * np.geomspace(1.25, 0.5, 24), queries, seed, name="near", run=run)

    def passes(some: Overlaps) -> float:
        at = crossing(some.sigma, extrapolated(some), nats)
        return math.nan if at is None else math.log(at)

    top, best = crossing(near.sigma, bounds(near)[1], nats), passes(near) if n >= FEW else math.nan
    if top is None:
        reason = f"the leave-one-out bound passes log n = {nats:.4g} nats at none of {len(near.sigma)} levels"
        return time(None, reason=reason)
    if n < FEW or not math.isfinite(best):
        why = f"too few points ({n}) to extrapolate" if n < FEW else f"{n:,} points do not fix an extrapolation"
        reason = f"{why}: the leave-one-out bound, from above, with no interval"
        return time(NoiseLevel(top), reason=reason)
    others = np.array(left_out(near, passes))
    failed = int((~np.isfinite(others)).sum())
    low_end = math.nan if failed else jackknife(best, others)[0]
    # What the extrapolation itself misses: up to three tenths of its way, Gaussians of 8 to 32 dimensions.
    half = math.hypot(best - low_end, MISSED * (math.log(top) - best))
    interval = [best - half, best + half]
    low, high = (NoiseLevel(math.exp(u)) if math.isfinite(u) else None for u in interval)
    without = f"; no interval, as {failed} of {len(others)} parts of the queries give no level" if failed else ""
    queried = f"{n:,} points, {len(near.parts):,} queries"
    reason = f"extrapolated in n from {queried}; the upper bound passes at {top:.4g}{without}"
    return time(NoiseLevel(math.exp(best)), low, high, reason=reason, interval="" if failed else "jackknife")
