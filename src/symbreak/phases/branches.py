"""Branches: trajectories that begin on the way of others, and what clones, U-turns and kicks read off their ends.

All trajectories of a block advance together in one batch that grows as sigma falls: the trunk runs once whatever
the number of levels, it is one of the two clones itself, and a clone leaves after the evaluation of the state that both
share. N steps and levels at steps k_j cost N + sum_j (N - 1 - k_j) network evaluations a pair.

A sampler is a Markov chain down the levels, so phi = E sum_c P(c | state at sigma)^2 for that chain, whatever its
network and its steps: it rises monotonically as sigma falls, from sum_c pi_c^2 to 1. A U-turn of data that the
network has learnt changes its class with probability 1 - phi. Crossings are therefore read from a monotone fit.

Source: derived; the experiments' own sources are in their files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, Levels, levels, passing, passing_interval
from symbreak.laws.law import Law, is_law
from symbreak.laws.mixture import Mixture
from symbreak.networks.denoiser import Denoiser, as_denoiser, ask, fingerprints
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.reverse_paths import descend, start_states
from symbreak.runtime.errors import InputError
from symbreak.runtime.files import digest
from symbreak.runtime.ranks import agreed
from symbreak.runtime.run import Arrays, Run

__all__ = ["Attributes", "Branches", "Classify", "Paths", "by_attribute", "class_shares", "side_of", "stacked"]

# Levels of a network that knows all of them, as EDM's sampler chooses (arXiv:2206.00364).
HIGHEST, LOWEST = 80.0, 0.002
PAIRS = 64  # trajectories of a block: a network's piece, and what an interrupted run loses at most
NUMBERS = 2**16  # numbers in the states of one evaluation
NAMED = "labels of "  # an attribute
ASKED = "the levels asked about"
STREAMS = {"clones": 1, "u_turns": 2, "opportunity": 3}

Classify = Callable[[torch.Tensor], torch.Tensor]
Attributes = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
Tell = Callable[[int], None]


@dataclass(frozen=True)
class Paths:
    """What is seldom changed about the trajectories of clones, U-turns and kicks.

    Attributes:
        sigma_start: where trunks start; by default the largest level for a law, which is sampled there exactly,
            and the top of its range for a denoiser, from pure noise (80 if it has no top).
        sigma_end: last level, where the posterior mean is the final image; by default 1 % of a law's standard
            deviation, or the bottom of the range (0.002 if that is 0).
        dtype: of the states; by default float64 for a law and float32 for a network.
        resamples: bootstrap resamples of the trajectories; one resampling serves all levels.
        turns: U-turns of each image at each level.
    """

    sigma_start: float | None = None
    sigma_end: float | None = None
    dtype: torch.dtype | None = None
    resamples: int = 1000
    turns: int = 1


class Branches:
    """Trunks of a law or denoiser, and the trajectories that begin on them at some levels.

    The grid is even in the network's own time where it has a schedule, else in log sigma; of its levels the nearest
    ones are moved to the requested ones, so that more of these take more steps only where they lie closer than the
    steps.

    Args:
        source: a law, or a denoiser.
        sigma: level, or levels [G], at which trajectories begin.
        steps: network evaluations on one way down.
        paths: `Paths`, or ``None``.
        step: of `descend`.
        shared: whether trajectories share the first evaluation with their trunk, as clones do.

    Attributes:
        s: the levels [G]; ``shape`` is the one they came in.
        grid: falling levels, and ``at`` [G] the places of s.
        cost: states denoised for a trunk and all that begins on it.
        end: the last level.

    Raises:
        InputError: for fewer than 2 steps or resamples, or levels outside the range.
    """

    def __init__(
        self,
        source: Law | Denoiser,
        sigma: Levels,
        steps: int,
        paths: Paths | None,
        step: str = "2m",
        shared: bool = False,
    ) -> None:
        self.source, self.denoiser = source, as_denoiser(source)
        self.paths, self.step, self.shared = paths or Paths(), step, shared
        self.s, self.shape = levels(sigma)
        if steps < 2 or self.paths.resamples < 2:
            raise InputError(f"{steps} steps and {self.paths.resamples} resamples; expected at least 2 of each.")
        numbers = math.prod(self.denoiser.shape)
        low, high = self.denoiser.sigma_range
        if is_law(source):
            start, end = (
                float(self.s.max()),
                0.01 * float(source.sample(256, 0.0, generator(0, 256)).double().std(0).mean()),
            )
            self.size = max(16, min(2000, 2**14 // numbers))  # all clones of a block stay in the cache
        else:
            start, end = high if high < math.inf else HIGHEST, low or LOWEST
            self.size = max(PAIRS, min(2000, 2**12 // numbers))
        start, self.end = self.paths.sigma_start or start, self.paths.sigma_end or end
        if not (low <= self.end < self.s.min() and self.s.max() <= start <= high):
            raise InputError(
                f"branch levels from {self.s.min():.4g} to {self.s.max():.4g}; expected them between the last level "
                f"{self.end:.4g} and the first, {start:.4g}, in the range {low:.4g} to {high:.4g}. Choose others or "
                "pass paths=Paths(sigma_start=..., sigma_end=...)."
            )
        self.dtype = self.paths.dtype or (torch.float64 if is_law(source) else torch.float32)
        self.rows = max(PAIRS, NUMBERS // numbers)
        self.grid = self._grid(start, steps)
        self.at = np.array([int(np.abs(np.log(self.grid / v)).argmin()) for v in self.s])
        self.cost = len(self.grid) + int((len(self.grid) - self.at - int(shared)).sum())

    def _grid(self, start: float, steps: int) -> np.ndarray:
        schedule = getattr(self.denoiser, "schedule", None)
        if schedule is None:
            grid = np.geomspace(start, self.end, steps)
        else:
            times = np.linspace(schedule.time(start), schedule.time(self.end), steps)
            grid = np.array([schedule.level(float(t)).sigma for t in times])
        grid[0], grid[-1] = start, self.end
        taken, extra = {0, steps - 1}, []
        for v in np.unique(self.s):
            distance = np.abs(np.log(grid / v))
            i = int(distance.argmin())
            if i not in taken:
                grid[i] = v
                taken.add(i)
            elif distance[i] > 1e-11:  # a level that is one up to rounding makes no step
                extra.append(v)
        return np.sort(np.append(grid, extra))[::-1].copy()

    def images(
        self, n: int, g: torch.Generator, tell: Tell, join: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Final images [1 + G, n, *S]: of n trunks, and of the n trajectories that begin at each of the G levels.

        Args:
            n: trunks.
            g: of their first states and the noise.
            tell: is given the number of states of each evaluation but the last.
            join: (j, trunks [n, *S]) -> states [n, *S] that begin at level j; by default clones of the trunks.
        """
        order = np.argsort(self.at, kind="stable")
        here = [[int(j) for j in order if self.at[j] == i] for i in range(len(self.grid))]
        begin = None if join is None else lambda i, trunks: [join(j, trunks) for j in here[i]]
        leave = [len(some) for some in here] if join is None else None
        x, rows = start_states(self.source, n, float(self.grid[0]), g, self.dtype), 0
        for level, states in descend(self.denoiser, x, [*self.grid, 0.0], g, self.step, begin, leave, self.rows):
            if rows and level:
                tell(rows)
            rows = len(states)
        images = states.reshape(1 + len(order), n, *x.shape[1:])
        return images[torch.from_numpy(np.append(0, 1 + np.argsort(order)))]

    def measure(
        self,
        run: Run | None,
        name: str,
        total: int,
        make: Callable[[np.ndarray, torch.Generator, Tell], Arrays],
        *settings: object,
        seeds: int,
    ) -> Arrays:
        """The arrays of all blocks of trajectories, joined along their second axis.

        Args:
            run: `Run`; its progress counts denoised states.
            name: of the experiment, which with the number of a block is the key of that block's generator.
            total: trajectories.
            make: (which trajectories, generator, tell) -> arrays.
            settings: tensors, plain values and functions of images that decide the arrays beside the trajectories.
            seeds: of the generators.
        """
        run = (run or Run()).named(name)
        everything, size = total * self.cost, self.size

        def block(first: int) -> Arrays:
            rows = np.arange(first, min(first + size, total))
            done = first * self.cost

            def tell(states: int) -> None:
                nonlocal done
                done += states
                run.tell(done, everything)

            return make(rows, generator(seeds, first // size, STREAMS[name]), tell)

        # A block that has ended, or was finished before, counts as all of its states.
        blocks = run.telling(lambda ended, _: run.tell(min(ended * size, total) * self.cost, everything))
        who = fingerprints(run, self.source)
        known = [self._known(v) if callable(v) else v for v in settings] if who else []
        path = (*who, self.grid.tolist(), self.at.tolist(), str(self.dtype), self.step, total, seeds)
        parts = blocks.parts(name, range(0, total, size), block, *path, *known)
        return {k: np.concatenate([part[k] for part in parts], axis=1) for k in parts[0]}

    def _known(self, function: Callable[[torch.Tensor], object]) -> str:
        """What tells one function of images from another: its name, and its answers to some denoised noise."""
        g, heights = generator(0, 98), np.geomspace(self.grid[0], self.grid[-1], 5)

        def answers() -> str:
            noise = (u * torch.randn(8, *self.denoiser.shape, generator=g) for u in heights)
            out = function(torch.cat([ask(self.denoiser, x, float(u)) for x, u in zip(noise, heights)]))
            if isinstance(out, Mapping):  # of attributes by name
                out = np.concatenate([np.asarray(v).reshape(len(v), -1) for v in out.values()], axis=1)
            values = out.detach().cpu().tolist() if isinstance(out, torch.Tensor) else np.asarray(out).tolist()
            return digest(getattr(function, "__qualname__", type(function).__name__), values)

        with torch.no_grad():
            return str(agreed(answers))

    def classifier(self, classify: Classify | None) -> Classify:
        """The function that was passed, or the likeliest class of a mixture.

        Raises:
            InputError: for a law or network without classes.
        """
        if classify is not None:
            return classify
        law = self.source
        if not isinstance(law, Mixture):
            raise InputError(
                f"{type(law).__name__} has no classes. Pass classify=, a function of final images (or to clones "
                "clusters=K)."
            )
        names = torch.arange(law.components) if law.classes is None else law.classes.unique()
        return lambda images: names[(law.responsibilities(images, self.end) @ law.membership).argmax(1)]

    def weights(self, n: int, seed: int) -> np.ndarray:
        """How often each of n trajectories counts: all once, then in every resample, [1 + R, n]."""
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=self.paths.resamples)
        return np.concatenate([np.ones((1, n)), drawn])

    def halfway(
        self, shares: np.ndarray, threshold: np.ndarray, classes: np.ndarray, what: str, criterion: str, source: str
    ) -> CriticalTime:
        """The level where shares that fall with sigma pass halfway, with the interval of their resamples.

        Args:
            shares: [1 + R, G], the estimate and its resamples.
            threshold: [1 + R].
            classes: those that were seen [K]; of one there is no level.
            what: the share in words.
            criterion, source: of the `CriticalTime`.
        """
        time = partial(CriticalTime, criterion=criterion, flow="sde", source=source)
        if len(classes) == 1:
            reason = f"all final images are of class {classes[0]}. Pass another classify, or to clones clusters=K."
            return time(None, reason=reason)
        passed = passing(self.s, _monotone(self.s, shares), threshold)
        point, others = float(passed[0]), passed[1:]
        if not 0 < point < math.inf:
            side, at = ("above", self.s.max()) if point > 0 else ("below", self.s.min())
            reason = f"{what} passes {threshold[0]:.3g}, halfway, {side} {ASKED} ({at:.4g})"
            beyond = min(4 * at, self.denoiser.sigma_range[1]) if point > 0 else max(at / 4, float(self.end))
            low, high = sorted((at, beyond))
            way = f"try levels from {low:.4g} to {high:.4g}" if low < high else "the range ends there"
            return time(None, reason=f"{reason}; {way}")
        reason = f"{what} at {threshold[0]:.3g}, halfway"
        for count, side in ((int((others == math.inf).sum()), "above"), (int((others == 0).sum()), "below")):
            if count:
                reason += f"; {count} of {len(others)} resamples pass {side} {ASKED}"
        first, last, _ = passing_interval(others)
        return time(NoiseLevel(point), first, last, reason=reason, interval="bootstrap")


def side_of(time: CriticalTime) -> str | None:
    """Of a time that has no level because it is outside those asked about: ``"above"`` or ``"below"`` them."""
    reason = "" if time.level is not None else time.reason or ""
    return next((side for side in ("above", "below") if f"{side} {ASKED}" in reason), None)


def _monotone(s: np.ndarray, falling: np.ndarray) -> np.ndarray:
    """Least-squares fits [R, G] that fall with sigma, of curves [R, G]: they pass a threshold once."""
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(s)
    out = np.empty(falling.shape)
    out[:, order] = [isotonic_regression(values, increasing=False) for values in falling[:, order]]
    return out


def stacked(said: list[np.ndarray | dict[str, np.ndarray]]) -> Arrays:
    """Classes of images one level after the other as arrays [1 + G, n]: ``labels``, or one an attribute."""
    arrays: Arrays = {}
    for name in said[0] if isinstance(said[0], dict) else [""]:
        each = [one[name] if isinstance(one, dict) else one for one in said]
        arrays[f"{NAMED}{name}" if name else "labels"] = np.stack(each)
    return arrays


def by_attribute(arrays: Arrays) -> dict[str, np.ndarray]:
    """The labels among arrays by the attribute's name, see `stacked`."""
    return {key.removeprefix(NAMED): labels for key, labels in arrays.items() if key.startswith(NAMED)}


def class_shares(labels: np.ndarray, classes: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares [K] of the classes among labels [n, m], and the sum of their squares in every resample [1 + R].

    Only products of different trajectories are counted, which makes the sum of squares unbiased.
    """
    each = np.stack([(labels == c).mean(1) for c in classes], axis=1)
    sums = w @ each
    same = (w * w) @ (each * each).sum(1)
    pairs = w.sum(1) ** 2 - (w * w).sum(1)
    return each.mean(0), ((sums * sums).sum(1) - same) / np.maximum(pairs, 1.0)
