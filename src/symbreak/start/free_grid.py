"""Free grids: the levels of all steps found together, on the sampler's cost, without a network evaluation.

A grid of n falling levels is its first level and n - 1 log-gaps log(sigma_i / sigma_(i+1)), whose logarithms are free
numbers. The sampler's cost is a sum of squares (`SamplerCost`), so Gauss-Newton steps find its least value; the cost
of the law is one square more. Samplers that draw noise have no such sum and are searched by Nelder-Mead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares, minimize

from symbreak.laws.law import Transports
from symbreak.networks.types import Scheduler
from symbreak.phases.losses import Losses, between, integral_above
from symbreak.runtime.files import InputError
from symbreak.start.late_start import Grid, on_grid
from symbreak.start.sampler_cost import SamplerCost

__all__ = ["Search", "entropic"]

ROWS = 64  # states that a search looks at first; its last steps look at all
STEP = 0.04  # of the differences that stand for slopes: wider than a whole step of a network's time
ITERATIONS, LAST = 12, 4  # Gauss-Newton steps on some states, and on all
TRIES = 40  # evaluations of Nelder-Mead a level
GAPS = 0.02, 8.0  # least and largest log-gap
FAR = 1e3  # what a grid that cannot be made costs, a number


@dataclass(frozen=True)
class Search:
    """Looks for the grid of the least cost.

    Attributes:
        cost: the world that samplers are tried in.
        scheduler: a diffusers scheduler that takes levels.
        law: the law to start from; ``None`` is white noise.
        law_cost: cost of the law at a start level.
        first: least and largest first level; one of them twice where the first level is given.
        lowest: the lowest level that a step may begin at.
        random: whether the sampler draws noise.
    """

    cost: SamplerCost
    scheduler: Scheduler
    law: Transports | None
    law_cost: Callable[[float], float]
    first: tuple[float, float]
    lowest: float
    random: bool

    def levels(self, theta: np.ndarray) -> tuple[float, ...]:
        """The grid that free numbers stand for."""
        theta = np.asarray(theta, dtype=float)
        given = self.first[0] == self.first[1]
        top = self.first[0] if given else math.exp(min(max(theta[0], math.log(self.first[0])), math.log(self.first[1])))
        gaps = theta if given else theta[1:]
        if math.isinf(top):  # nothing lies a gap below pure noise: the second level stands for itself
            below = math.exp(theta[0]), theta[1:]
            return (top, *self._down(*below))
        return self._down(top, gaps)

    def _down(self, top: float, gaps: np.ndarray) -> tuple[float, ...]:
        fall = np.concatenate([[0.0], np.cumsum(np.clip(np.exp(gaps), *GAPS))])
        room = math.log(top / self.lowest)
        if fall[-1] > room:
            fall *= room / fall[-1]
        return tuple(float(s) for s in top * np.exp(-fall))

    def theta(self, levels: Sequence[float]) -> np.ndarray:
        """The free numbers of a grid."""
        logs = np.log(np.asarray(levels, dtype=float))
        if math.isinf(levels[0]):
            return np.concatenate([logs[1:2], np.log(-np.diff(logs[1:]))])
        gaps = np.log(np.clip(-np.diff(logs), *GAPS))
        return gaps if self.first[0] == self.first[1] else np.concatenate([logs[:1], gaps])

    def residuals(self, levels: Sequence[float], rows: slice) -> np.ndarray:
        """Numbers whose sum of squares is the cost of a grid on some states, apart from a constant."""
        truth = self.cost.truth[rows]
        try:
            start = on_grid(self.scheduler, self.law, Grid("free", tuple(levels)))
        except InputError:  # more steps than the network has levels here
            return np.full(truth.numel() + 1, FAR)
        at = start.level.sigma
        state = start(self.cost.noise[rows]) if self.law is None else start.state(self.cost.near(at, rows))
        off = torch.nan_to_num(self.cost.final(start, state) - truth, nan=FAR).flatten() / math.sqrt(len(truth))
        least = self.law_cost(self.first[0]), self.law_cost(self.first[1])
        more = max(0.0, self.law_cost(at) - min(0.0, *least) + 1e-9) if self.law is not None else 0.0
        return np.append(off.numpy(), math.sqrt(more))

    def _slopes(self, theta: np.ndarray, rows: slice) -> np.ndarray:
        here = self.residuals(self.levels(theta), rows)
        columns = []
        for i in range(len(theta)):
            moved = theta.copy()
            moved[i] += STEP
            columns.append((self.residuals(self.levels(moved), rows) - here) / STEP)
        return np.stack(columns, axis=1)

    def _sum(self, theta: np.ndarray) -> float:
        """What Nelder-Mead looks at: the cost on all states."""
        try:
            start = on_grid(self.scheduler, self.law, Grid("free", self.levels(theta)))
        except InputError:
            return FAR
        value = self.cost.error(start, self.random) + (0.0 if self.law is None else self.law_cost(start.level.sigma))
        return value if math.isfinite(value) else FAR

    def run(self, begin: Sequence[float]) -> tuple[float, ...]:
        """The levels of the grid of the least cost that is found from a grid."""
        theta = self.theta(begin)
        if not len(theta):
            return tuple(begin)
        if self.random:
            simplex = np.stack([theta, *(theta + 0.3 * one for one in np.eye(len(theta)))])
            options = {"maxfev": TRIES * len(theta), "initial_simplex": simplex, "xatol": 0.01, "fatol": 1e-4}
            return self.levels(minimize(self._sum, theta, method="Nelder-Mead", options=options).x)
        for count, tries in ((ROWS, ITERATIONS), (self.cost.count, LAST)):
            rows = slice(0, count)
            theta = least_squares(
                lambda v, rows: self.residuals(self.levels(v), rows),
                theta,
                self._slopes,
                max_nfev=tries,
                ftol=1e-3,
                xtol=1e-3,
                args=(rows,),
            ).x
        return self.levels(theta)


def entropic(losses: Losses, top: float, steps: int) -> tuple[float, ...]:
    """The entropic grid from a level down: equal steps of the integral of MMSE / sigma^2 from the level to 0.

    Below the lowest measured level, where MMSE / sigma^2 no longer changes, the integrand is constant.

    Args:
        losses: a network's denoising losses at levels from the lowest that it knows to above ``top``.
        top: the first level; an infinite one stands for the highest measured.
        steps: number of levels.

    Source: Stancevic, Handke, Ambrogioni, arXiv:2504.13612.
    """
    sigma = losses.sigma
    fine = between(sigma)
    rate = losses.network.mean(1) / sigma  # per unit of log sigma
    above = integral_above(rate, sigma, order=1, at=fine)
    entropy = rate[0] + above[0] - above  # from 0 up to every level
    high = float(np.interp(min(math.log(top), math.log(fine[-1])), np.log(fine), entropy))
    wanted = high * np.arange(steps, 0, -1) / steps
    inside = np.exp(np.interp(wanted, entropy, np.log(fine)))
    levels = np.where(wanted < entropy[0], sigma[0] * wanted / max(entropy[0], 1e-300), inside)
    return (top, *(float(s) for s in levels[1:]))
