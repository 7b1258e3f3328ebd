"""What a sampler's steps cost: the cost B of docs/choosing-a-start.md, without a network evaluation.

The real scheduler takes its steps with a law in the network's place, from states of that law's exact flow, and its
final states are compared with the end of the flow. What a grid costs is thereby a smooth function of its levels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from symbreak.laws import Gaussian
from symbreak.laws.law import Law
from symbreak.networks.families import as_unet
from symbreak.networks.types import Network
from symbreak.noise import generator
from symbreak.start.late_start import LateStart
from symbreak.start.sample import StepError, run_sampler

__all__ = ["END", "STATES", "SamplerCost", "many"]

STATES = 192  # states for the sampler's cost
MOST, WORK = 4096, 2**19  # and for finding a grid, where numbers times a law's components allow it
NUMBERS = 2**26  # but no more numbers than this in one batch of states
STOCHASTIC = 2.0  # squared error of paths over squared distance of moments, measured for deterministic samplers
END = 0.02  # where exact flows end, as a share of the lowest start level
FLOW_STEPS = 6  # between two levels that are tried


def many(world: Law) -> int:
    """States for finding a grid: as many as are cheap, for a grid of many levels fits itself to few."""
    components = len(getattr(getattr(world, "inner", world), "weights", (0,)))
    return min(MOST, max(STATES, WORK // (math.prod(world.shape) * components)))


class SamplerCost:
    """The world in which samplers are tried: a law, states of its exact flow, and where they end.

    Args:
        world: the law in the network's place.
        gaussian: the Gaussian whose modes a stochastic sampler's moments are compared in.
        levels: start levels whose states are wanted.
        lowest: lowest start level; flows end at `END` times that.
        seed: of the noise.
        states: their number.
    """

    def __init__(
        self,
        world: Law,
        gaussian: Gaussian,
        levels: Iterable[float],
        lowest: float,
        seed: int = 0,
        states: int = STATES,
    ) -> None:
        self.world, self.gaussian, self.seed, self.end = world, gaussian, seed, END * lowest
        self.count = int(min(states, max(16, NUMBERS // max(1, gaussian.dim))))
        shape = (self.count, *gaussian.shape)
        self.noise = torch.randn(shape, generator=generator(seed, 22), dtype=torch.float64)
        # In closed form for a Gaussian; others take their Runge-Kutta steps.
        self._more = {} if isinstance(world, Gaussian) else {"steps": FLOW_STEPS}
        self.states: dict[float, torch.Tensor] = {}
        self._drifts: dict[float, torch.Tensor] = {}
        x, before = self.noise, None
        for s in sorted({*levels, self.end}, reverse=True):
            x = self._flow(x, s, before)
            self.states[s], before = x, s
        self.truth = world.denoise(self.states[self.end], self.end)

    def _flow(self, x: torch.Tensor, sigma: float, before: float | None) -> torch.Tensor:
        transport: Callable[..., torch.Tensor] = self.world.transport
        return transport(x, sigma, before, **self._more)

    def unet(self, start: LateStart) -> Network:
        """The law with the face of the network that a start's scheduler expects."""
        return as_unet(self.world, start.full)

    def state(self, sigma: float) -> torch.Tensor:
        """States of the exact flow at a level, walked from the next higher one that is known; kept."""
        if sigma not in self.states:
            above = min((s for s in self.states if s > sigma), default=None)
            self.states[sigma] = self._flow(self.noise if above is None else self.states[above], sigma, above)
        return self.states[sigma]

    def near(self, sigma: float, rows: slice) -> torch.Tensor:
        """States at a level between known ones, by a cubic in log sigma through the flow's states and slopes."""
        known = sorted(s for s in self.states if s > self.end)
        if sigma in self.states or not known[0] < sigma < known[-1]:
            return self.state(sigma)[rows]
        i = int(np.searchsorted(known, sigma))
        a, b = known[i - 1], known[i]
        for s in (a, b):
            if s not in self._drifts:  # dx / dlog sigma = x - D(x, sigma)
                self._drifts[s] = self.states[s] - self.world.denoise(self.states[s], s)
        h = math.log(b / a)
        t = math.log(sigma / a) / h
        values = (self.states[a], self.states[b], h * self._drifts[a], h * self._drifts[b])
        weights = (1 - 3 * t**2 + 2 * t**3, 3 * t**2 - 2 * t**3, t - 2 * t**2 + t**3, t**3 - t**2)
        return torch.stack([w * v[rows] for w, v in zip(weights, values)]).sum(0)

    def is_stochastic(self, start: LateStart) -> bool:
        """Whether the start's sampler draws noise."""
        if "generator" not in inspect.signature(start.scheduler.step).parameters:
            return False
        unet, state = self.unet(start), self.noise[:2]
        return not torch.equal(_run(start, unet, state, self.seed), _run(start, unet, state, self.seed + 1))

    def final(self, start: LateStart, state: torch.Tensor, unet: Network | None = None) -> torch.Tensor:
        """Final states of the scheduler's steps from a state, in the scheduler's frame; NaN where it has none."""
        return _run(start, self.unet(start) if unet is None else unet, state, self.seed)

    def error(self, start: LateStart, random: bool, unet: Network | None = None) -> float:
        """Squared error of a sampler's final states against the exact flow, a state, summed over pixels.

        Args:
            start: a late start, from the flow's states at its level, or the standard one, from white noise.
            random: whether the sampler draws noise: its paths are then not the flow's, and their law is compared.
            unet: of `unet`, where it is known.
        """
        state = start(self.noise) if start.law is None else start.state(self.state(start.level.sigma))
        final = self.final(start, state, unet)
        if random:
            return STOCHASTIC * _moments_gap(final, self.truth, self.gaussian)
        return float(((final - self.truth) ** 2).flatten(1).sum(1).mean())


def _run(start: LateStart, unet: Network, state: torch.Tensor, seed: int) -> torch.Tensor:
    """Final states of the real scheduler with a law in the network's place."""
    with torch.inference_mode():
        try:
            state = run_sampler(start, state, lambda x, t: unet(x, t, return_dict=False)[0], generator(seed, 23))
        except StepError:
            return torch.full_like(state, math.nan)  # more steps than diffusers can make: this start is none
    return state.clone()


def _moments_gap(a: torch.Tensor, b: torch.Tensor, gaussian: Gaussian) -> float:
    """Squared Wasserstein distance of the Gaussians of two paired samples, mode by mode, less what chance adds.

    Of M pairs with correlation rho a difference of means has the variance Var(a - b) / M by chance, one of standard
    deviations s^2 (1 - rho^2) / M.
    """
    vectors = gaussian.eigenvectors.to(a.dtype)
    u, v = a.flatten(1) @ vectors, b.flatten(1) @ vectors
    du, dv, n = u.std(0), v.std(0), len(u)
    gap = (u.mean(0) - v.mean(0)) ** 2 + (du - dv) ** 2
    covariance = ((u - u.mean(0)) * (v - v.mean(0))).sum(0) / (n - 1)
    chance = (u - v).var(0) + (du * dv - covariance**2 / (du * dv).clamp_min(1e-30)).clamp_min(0)
    return float((gap - chance / n).sum().clamp_min(0))  # NaN stays NaN
