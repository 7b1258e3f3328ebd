"""Learning a sampler's steps from the network: Gauss-Newton on the distance of final samples to fine trajectories.

The network's own probability flow is walked once on a fine grid, from states that the start gives. The coefficients of
`symbreak.start.learned_steps` are then fitted so that the few steps end where the many do, and compared with the
sampler's own steps on other trajectories: where they are no nearer, they are left out.

Source: Tong et al. 2025, arXiv:2502.17423 (S4S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import least_squares

from symbreak.laws.class_posterior import Labels
from symbreak.networks.denoiser import CHUNK, Denoiser, Denoises, as_denoiser, ask
from symbreak.networks.families import as_unet
from symbreak.noise import generator, schedule
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import agreed
from symbreak.runtime.run import Run
from symbreak.start.grids import late_sigmas
from symbreak.start.late_start import LateStart, with_steps
from symbreak.start.learned_steps import Learned, mark, teach
from symbreak.start.sample import StepError, check_labels, evaluated, precision, run_sampler

__all__ = ["check_learnable", "fine_levels", "flow_ends", "learn_steps"]

FINE = 40  # levels of the fine trajectories
ROUNDS = 6  # Gauss-Newton steps
STEP = 0.01  # of the differences that stand for slopes
OTHERS = 4  # one trajectory in so many is compared on, not fitted on
LOWEST = 2e-3  # the least level of fine trajectories, of networks that know all
FAR = 1e3  # highest level of fine trajectories: above it states are pure noise
KNOWN = (
    "dpm++2m, dpm++2s, unipc, deis, lms, ddim, euler, edm-euler, edm-dpm++2m, flow-euler, flow-dpm++2m or flow-unipc"
)


def check_learnable(start: LateStart, n: object) -> int:
    """How many trajectories steps are learned from; samplers whose steps cannot be learned raise an error."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"learn={n!r}; expected a whole number of trajectories, at least 2.")
    name, wanted, left = type(start.scheduler).__name__, 2 * start.steps - 1, n - max(1, n // OTHERS)
    if start.calls != start.steps:
        raise InputError(
            f"{name} asks the network {start.calls} times in {start.steps} steps; steps can be learned of samplers "
            f"that ask once a step: {KNOWN}. Leave learn out, or take one of them."
        )
    if left < wanted:
        raise InputError(
            f"learn={n} leaves {left} trajectories to fit the {wanted} coefficients of {start.steps} steps on; "
            f"expected at least {wanted}. Pass learn={math.ceil(wanted * OTHERS / (OTHERS - 1))} or more."
        )
    state = torch.ones(1, 1, 2, 2)
    ends = [run_sampler(start, state, lambda x, t: torch.zeros_like(x), generator(0, 23, seed)) for seed in (1, 2)]
    if not torch.equal(*ends):
        raise InputError(
            f"{name} draws noise, so that no trajectory is its aim; steps can be learned of {KNOWN}. Leave learn out, "
            "or take one of them."
        )
    return n


def fine_levels(denoiser: Denoiser, sigma: float) -> list[float]:
    """The levels of the network's fine trajectories from a level down, by Karras; the network is asked at all."""
    low, high = denoiser.sigma_range
    # Rounding may not lead out of the range.
    grid = late_sigmas(min(sigma, high * (1 - 1e-4)), FINE, max(low, LOWEST) * (1 + 1e-4))
    return [float(s) for s in grid[:-1]]


@torch.no_grad()
def flow_ends(
    denoiser: Denoiser, x: torch.Tensor, levels: Sequence[float], labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Where the network's probability flow carries VE states [n, *S] down given levels: Heun's steps, then D.

    Args:
        denoiser: the network, asked twice a step, and once at the end.
        x: VE states [n, *S] at the first level.
        levels: falling sigmas.
        labels: class [n] of every state, for a class-conditional network.
    """
    for a, b in pairwise(levels):
        slope = (x - ask(denoiser, x, a, labels)) / a
        ahead = x + (b - a) * slope
        x = x + (b - a) * (slope + (ahead - ask(denoiser, ahead, b, labels)) / b) / 2
    return ask(denoiser, x, levels[-1], labels)


def learn_steps(
    start: LateStart,
    denoiser: Denoises | Denoiser,
    n: int,
    labels: Labels | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> LateStart:
    """A start whose sampler's steps have coefficients learned from the network's own fine trajectories.

    Args:
        start: late or standard, of a deterministic sampler that asks once a step, on any grid.
        denoiser: the network as a `Denoiser`, or a law.
        n: trajectories; a quarter of them is not fitted on, but compared on.
        labels: classes to learn with [M], for a class-conditional network, drawn from by the seed.
        seed: of the noise.
        run: its progress counts Gauss-Newton steps.

    Returns:
        The start with ``learned``; where the coefficients are no nearer on the other trajectories, the start as it
        was, with a note that says so and what it cost.

    Raises:
        InputError: for samplers that draw noise or ask more than once a step, and too few trajectories.

    Source: S4S, arXiv:2502.17423.
    """
    network, n = as_denoiser(denoiser), check_learnable(start, n)
    saved: Values = agreed(lambda: _fitted(_Task(start, network, n, labels, seed), (run or Run()).named("learning")))
    learned = Learned.of({**saved, "network": mark(as_unet(network, start.full).parameters())}, start.steps)
    near, far = learned.distances
    if near < far:
        return with_steps(start, learned)
    return replace(start, notes=(*start.notes, f"{learned.sentence} So the sampler's own steps stand."))


class _Task:
    """States to learn from, where the network's flow carries them, and the few steps with any coefficients."""

    def __init__(self, start: LateStart, network: Denoiser, n: int, labels: Labels | None, seed: int) -> None:
        self.start, self.network, self.unet = start, network, as_unet(network, start.full)
        self.full, self.spent = schedule(start.full), 0
        self.free = np.ones((start.steps, 2), dtype=bool)
        self.free[0, 1] = False  # nothing comes before the first step
        g = generator(seed, 25)
        noise = torch.randn(n, *network.shape, generator=g).to(self.unet.device, precision(self.unet))
        if labels is not None:
            classes = torch.as_tensor(labels).reshape(-1)
            labels = classes[torch.randint(len(classes), (n,), generator=g)]
        y = check_labels(self.unet, labels, n)
        self.labels = None if y is None else y.to(noise.device)
        self.states = start(noise, self.labels)
        levels = fine_levels(network, min(start.level.sigma, FAR))
        if start.level.sigma > levels[0] * 1.001:  # pure noise, or nearly: this level says as little
            x = levels[0] * noise
            x = x + ask(network, x, levels[0], self.labels)
            self.spent += n * self._each(levels[0])
        else:
            x = start.ve(noise, self.labels)
        self.ends = flow_ends(network, x, levels, self.labels)
        self.spent += n * sum(self._each(s) * (2 - (s in (levels[0], levels[-1]))) for s in levels)
        self.spent += n * self._each(levels[-1])

    def _each(self, sigma: float) -> int:
        """Network evaluations of one answer: two where guidance asks twice."""
        count: int = getattr(self.network, "evaluations", lambda _: 1)(sigma)
        return count

    def off(self, pairs: np.ndarray, rows: slice) -> np.ndarray:
        """Final samples less the ends of the fine trajectories [P, n * numbers], of several coefficients [P, steps, 2].

        They run beside each other: as long as the coefficients are those of the first, the network is asked once.
        """
        x, ends = self.states[rows], self.ends[rows]
        n, many, ones = len(x), len(pairs), [1] * (x.ndim - 1)
        table = torch.as_tensor(np.repeat(pairs, n, axis=0), dtype=x.dtype, device=x.device)
        columns = [[table[:, i, k].reshape(-1, *ones) for k in (0, 1)] for i in range(self.start.steps)]
        start = replace(self.start, scheduler=teach(self.start.fresh(), self.full, columns))
        apart = (pairs != pairs[:1]).any(2)
        step = iter(range(self.start.steps))
        labels = None if self.labels is None else self.labels[rows]

        def network(seen: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            i = next(step)
            alike = ~apart[:, :i].any(1)
            asked = np.flatnonzero(~alike | (np.arange(many) == 0))
            states = seen.reshape(many, n, *seen.shape[1:])[asked].flatten(0, 1)
            y = None if labels is None else labels.repeat(len(asked))
            answers = [
                evaluated(self.unet, states[j : j + CHUNK], t, None if y is None else y[j : j + CHUNK], {})
                for j in range(0, len(states), CHUNK)
            ]
            self.spent += len(states) * self.unet.evaluations(float(t))
            out = torch.cat(answers).reshape(len(asked), n, *seen.shape[1:])
            place = np.where(alike, 0, np.searchsorted(asked, np.arange(many)))
            return out[place].flatten(0, 1)

        try:
            with torch.inference_mode():
                final = run_sampler(start, x.repeat(many, *ones), network)
        except StepError:  # coefficients that lead to infinity
            return np.full((many, x.numel()), FAR)
        off: np.ndarray = (final.reshape(many, *x.shape) - ends).flatten(1).double().cpu().numpy() / math.sqrt(n)
        return off


def _fitted(task: _Task, run: Run) -> Values:
    """What was learned, as plain values of `Learned`."""
    count, looks = max(1, len(task.states) // OTHERS), 0
    others, fit = slice(0, count), slice(count, None)

    def pairs(theta: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(theta), *task.free.shape))
        whole[:, task.free] = theta
        return whole

    def residuals(theta: np.ndarray) -> np.ndarray:
        nonlocal looks
        run.tell(looks, ROUNDS)
        looks += 1
        return task.off(pairs(theta[None]), fit)[0]

    def slopes(theta: np.ndarray) -> np.ndarray:
        off = task.off(pairs(np.stack([theta, *(theta + STEP * one for one in np.eye(len(theta)))])), fit)
        return ((off[1:] - off[0]) / STEP).T

    best = least_squares(residuals, np.zeros(int(task.free.sum())), slopes, x_scale="jac", max_nfev=ROUNDS).x
    run.tell(ROUNDS, ROUNDS)
    near, far = (float(np.linalg.norm(off)) for off in task.off(pairs(np.stack([best, 0 * best])), others))
    return {
        "coefficients": pairs(best[None])[0].tolist(),
        "trajectories": [len(task.states) - count, count],
        "distances": [near, far],
        "evaluations": task.spent,
    }
