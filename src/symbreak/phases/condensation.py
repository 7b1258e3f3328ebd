"""Condensation: when a reverse trajectory falls onto one training sample, watched as it runs.

At every level sigma a trajectory's state x (VE) has a nearest training point, and the posterior of the data set

    w_j(x) = softmax_j(-|x - y_j|^2 / (2 sigma^2)),        participation 1 / sum_j w_j^2, from n down to 1

The nearest of the points alpha y_j to x_VP = alpha x is the nearest y_j to x. A perfect score of the data set ends
on a training point: below the collapse the nearest point no longer changes and the participation is 1. A network that
generalizes keeps several points in play down to much smaller noise, or for ever. So does the share of pairs of clones
that end at one training sample, phi_C: `clones` with `nearest_of` as its classes.

Sources: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491 (last change of the nearest point, phi_C,
participation as condensation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Result, mean_curve
from symbreak.intervals import percentiles
from symbreak.laws.empirical import Empirical
from symbreak.laws.law import Law
from symbreak.laws.nearest_neighbours import neighbours
from symbreak.networks.denoiser import Denoiser, as_denoiser, fingerprints
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.reverse_paths import descend, start_states
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["Condensation", "nearest_flips", "nearest_of"]

SOURCE = "arXiv:2402.18491, last change of the nearest training point"
BLOCK = 64  # trajectories


@dataclass(frozen=True)
class Condensation(Result):
    """Trajectories on their way to a training sample.

    Attributes:
        settled: share of trajectories whose nearest training point is already the final one, at the levels; with
            95 % intervals.
        participation: mean of log10 of the number of training points that share the posterior, likewise.
        last: median over trajectories of the level of the last change, with a bootstrap interval.
        levels: of the last change, one a trajectory [N].
        nearest: index of the nearest training point [G, N].
        ratio: final images' distance to the nearest over that to the second nearest training point [N].
        ends: final images [N, *S] float32.
        calls: states given to the denoiser.
    """

    record = ("settled", "participation", "last", "trajectories", "median_ratio", "calls")

    settled: Curve
    participation: Curve
    last: CriticalTime
    levels: np.ndarray
    nearest: np.ndarray
    ratio: np.ndarray
    ends: np.ndarray
    calls: int

    @property
    def trajectories(self) -> int:
        """Number of trajectories N."""
        return len(self.levels)

    @property
    def median_ratio(self) -> float:
        """Median of the ratios."""
        return float(np.median(self.ratio))


def nearest_of(points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """images [B, *S] -> index [B] of the nearest of the points [N, *S]: the classes of phi_C, for `clones`."""
    return lambda images: neighbours(images, points, 1)[1][:, 0]


@renamed()
def nearest_flips(
    law_or_denoiser: Law | Denoiser,
    data: Empirical,
    trajectories: int = 128,
    steps: int = 60,
    sigma_start: float | None = None,
    sigma_end: float | None = None,
    seeds: int = 0,
    run: Run | None = None,
) -> Condensation:
    """Run reverse trajectories and watch the nearest training point and the participation.

    Args:
        law_or_denoiser: a law (its own states at the first level), or a denoiser (pure noise).
        data: the training points.
        trajectories: N.
        steps: G levels, even in log sigma; the denoiser is evaluated once at each.
        sigma_start, sigma_end: first and last level; by default the denoiser's own ends, or for a law 30 times and a
            hundredth of the spread of the data.
        seeds: every block of 64 trajectories draws from a generator keyed by this and its number.
        run: a finished part for every 64 trajectories, and progress in these.

    Returns:
        A `Condensation`. Its ``last`` has no level where the nearest point of most trajectories still changes at the
        last step.

    Raises:
        InputError: for another shape than the denoiser's, fewer than 3 points, too few trajectories or steps.

    Source: arXiv:2402.18491.
    """
    d = as_denoiser(law_or_denoiser)
    if tuple(d.shape) != tuple(data.shape):
        raise InputError(f"training points of shape {data.shape} for a network of {tuple(d.shape)}; expected one.")
    if len(data) < 3 or trajectories < 2 or steps < 4:
        raise InputError(
            f"{len(data)} training points, {trajectories} trajectories, {steps} steps; expected at least 3, 2 and 4."
        )
    spread = math.sqrt(2 * float(data._half.mean()) / data.dim)
    low, high = d.sigma_range
    start = sigma_start or (high if high < math.inf else 30 * spread)
    end = sigma_end or max(low, 0.01 * spread)
    if not low <= end < start <= high:
        raise InputError(f"levels from {start:.4g} to {end:.4g}; the network knows {high:.4g} to {low:.4g}.")
    grid = np.geomspace(start, end, steps)

    def block(i: int) -> Arrays:
        g = generator(seeds, 53, i)
        n = min(BLOCK, trajectories - i * BLOCK)
        x = start_states(law_or_denoiser, n, start, g, torch.float32)
        watched = np.zeros((2, steps, n))
        for j, (sigma, image) in enumerate(descend(d, x, [*grid, 0.0], g)):
            if sigma:
                watched[0, j] = neighbours(image, data.points, 1)[1][:, 0]
                watched[1, j] = data.participation(image, sigma).log10()
        apart = neighbours(image, data.points, 2)[0]
        ratio = (apart[:, 0] / apart[:, 1].clamp_min(1e-300)).numpy()
        return {"watched": watched, "ratio": ratio, "ends": image.numpy()}

    run = run or Run()
    settings = (*fingerprints(run, law_or_denoiser), data.points, trajectories, steps, start, end, seeds)
    parts = run.parts("condensation", range(math.ceil(trajectories / BLOCK)), block, *settings)
    watched = np.concatenate([p["watched"] for p in parts], axis=2)
    nearest = watched[0].astype(np.int64)
    settled = np.cumprod((nearest == nearest[-1])[::-1], axis=0)[::-1].astype(float)
    # The first level of the unbroken run of the final point; the last change lies between it and the one before.
    first = settled.argmax(0)
    levels = np.where(first > 0, np.sqrt(grid[first] * grid[np.maximum(first - 1, 0)]), grid[0])
    return Condensation(
        mean_curve(grid, settled, "share that has settled"),
        mean_curve(grid, watched[1], "log10 of the participation"),
        _last(levels, first, grid, seeds),
        levels,
        nearest,
        np.concatenate([p["ratio"] for p in parts]),
        np.concatenate([p["ends"] for p in parts]),
        steps * trajectories,
    )


def _last(levels: np.ndarray, first: np.ndarray, grid: np.ndarray, seed: int) -> CriticalTime:
    """The median level of the last change, with its bootstrap interval."""
    criterion = "last change of the nearest"
    if np.median(first) >= len(grid) - 1:
        reason = f"the nearest training point of most trajectories still changes at sigma {grid[-1]:.3g}"
        return CriticalTime(None, criterion=criterion, flow="sde", source=SOURCE, reason=reason)
    rows = np.random.default_rng(seed).integers(0, len(levels), (1000, len(levels)))
    ends = percentiles(np.median(levels[rows], axis=1))
    middle, low, high = (NoiseLevel(float(v)) for v in (np.median(levels), *ends))
    return CriticalTime(middle, low, high, criterion=criterion, flow="sde", source=SOURCE, interval="bootstrap")
