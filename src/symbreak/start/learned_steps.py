"""Learned steps: a scheduler whose multistep update has coefficients of its own, besides those of its sampler.

A deterministic sampler that asks the network once a step goes from a state x_i to y_i, whatever its rule. The noise
that this step takes away is a direction, and the learned update adds shares of this and of the last one to y_i:

    e_i = (alpha' x_i - alpha y_i) / (alpha' std - alpha std')
    x_(i+1) = y_i + alpha' s_i (a_i e_i + b_i e_(i-1))                 s_i = sigma', of the last step sigma

with alpha and std = alpha sigma of the level that the step begins at, alpha', std' and sigma' of the one that it
reaches. All a = b = 0 is the sampler itself. Steps of Euler's kind become the linear multistep updates of S4S in the
noise prediction. `symbreak.start.learn` fits the coefficients.

Source: Tong et al. 2025, arXiv:2502.17423 (S4S).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from symbreak.networks.types import Scheduler
from symbreak.noise import NoiseLevel, Schedule
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values
from symbreak.start.cut_schedule import begins_at

__all__ = ["Learned", "Mark", "check_mark", "mark", "teach"]

Mark = tuple[float, float]  # what tells a network from others: count and root mean square of its weights


def mark(weights: Iterable[torch.Tensor]) -> Mark | None:
    """Count and root mean square of a network's weights, which survive other precisions; ``None`` without any."""
    sizes, squares = 0, 0.0
    for w in {id(w): w for w in weights}.values():
        sizes, squares = sizes + w.numel(), squares + float(w.detach().float().square().sum(dtype=torch.float64))
    return (float(sizes), math.sqrt(squares / sizes)) if sizes else None


def check_mark(made_for: Mark | None, weights: Iterable[torch.Tensor], what: str) -> None:
    """A network with other weights than the one that something was made for raises an error."""
    other = None if made_for is None else mark(weights)
    if made_for is None or other is None:
        return
    if other[0] != made_for[0] or not math.isclose(other[1], made_for[1], rel_tol=1e-3):
        raise InputError(
            f"the {what} made for a network of {made_for[0]:,.0f} weights of mean square {made_for[1] ** 2:.4g}; this "
            f"one has {other[0]:,.0f} of {other[1] ** 2:.4g}. Fit a start for it."
        )


@dataclass(frozen=True)
class Learned:
    """Coefficients of a sampler's steps, fitted to a network's own fine trajectories.

    Attributes:
        coefficients: (a, b) of every step; all 0 is the sampler itself.
        trajectories: how many they were fitted on, and on how many others they were compared with the sampler.
        distances: root mean square distance of final samples to the ends of those others, with the coefficients and
            without, in the network's units, summed over a sample.
        evaluations: network evaluations of one sample that were spent, once.
        network: what tells the network from others (`mark`); ``None`` fits any.
    """

    coefficients: tuple[tuple[float, float], ...]
    trajectories: tuple[int, int]
    distances: tuple[float, float]
    evaluations: int
    network: Mark | None = None

    @property
    def sentence(self) -> str:
        """What was learned, and what it cost."""
        near, far = self.distances
        return (
            f"Steps learned from {self.trajectories[0]} of the network's own fine trajectories: final samples end "
            f"{near:.3g} from those of {self.trajectories[1]} others, with the sampler's own steps {far:.3g}. This "
            f"cost {self.evaluations:,} network evaluations of one sample, once."
        )

    def check(self, weights: Iterable[torch.Tensor]) -> None:
        """A network with other weights than the one whose trajectories were learned from raises an error."""
        check_mark(self.network, weights, "learned steps were")

    def to_dict(self) -> Values:
        """Plain values, for records and files."""
        return {name: getattr(self, name) for name in ("coefficients", "trajectories", "distances", "evaluations")}

    @classmethod
    def of(cls, saved: Values, steps: int) -> Learned:
        """What `to_dict` gave, with the network's mark, for a number of steps."""
        pairs = tuple((float(a), float(b)) for a, b in saved["coefficients"])
        if len(pairs) != steps or not all(map(math.isfinite, sum(pairs, ()))):
            raise InputError(f"coefficients of {len(pairs)} learned steps came for {steps} steps. Fit the start again.")
        fitted, others = map(int, saved["trajectories"])
        near, far = map(float, saved["distances"])
        whose = saved["network"] and (float(saved["network"][0]), float(saved["network"][1]))
        return cls(pairs, (fitted, others), (near, far), int(saved["evaluations"]), whose)


class _Steps:
    """``step`` of a ready scheduler, with coefficients of its own.

    Args:
        scheduler: whose steps they are.
        levels: that its steps begin at, in the frame of its states.
        coefficients: (a, b) of every step, numbers or columns beside the states.
    """

    def __init__(
        self, scheduler: Scheduler, levels: Sequence[NoiseLevel], coefficients: Sequence[Sequence[float | torch.Tensor]]
    ) -> None:
        self.scheduler, self.original = scheduler, type(scheduler).step
        self.levels, self.coefficients = [*levels, NoiseLevel(0.0, alpha=1.0)], coefficients
        self.restart()

    def restart(self) -> None:
        """The next step is the first one."""
        self.i, self.before = 0, torch.zeros(())

    def __call__(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        **more: object,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        if self.i == len(self.coefficients):
            self.restart()
        here, there = self.levels[self.i : self.i + 2]
        y = self.original(self.scheduler, model_output, timestep, sample, return_dict=False, **more)[0]
        exact = torch.promote_types(y.dtype, torch.float32)
        direction = (there.alpha * sample.to(exact) - here.alpha * y.to(exact)) / (
            there.alpha * here.std - here.alpha * there.std
        )
        scale = there.std if there.sigma else here.sigma
        a, b = self.coefficients[self.i]
        state = (y.to(exact) + scale * (a * direction + b * self.before)).to(y.dtype)
        self.i, self.before = self.i + 1, direction
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


def teach(scheduler: Scheduler, full: Schedule, coefficients: Sequence[Sequence[float | torch.Tensor]]) -> Scheduler:
    """Give a ready scheduler, which asks once a step, steps with coefficients of their own.

    Args:
        scheduler: changed, and returned.
        full: its schedule before it was cut.
        coefficients: (a, b) of every step; columns [B, 1, ...] give every state its own.
    """
    levels = [begins_at(scheduler, full, i) for i in range(len(scheduler.timesteps))]
    scheduler.step = _Steps(scheduler, levels, coefficients)
    return scheduler
