"""Reverse paths: a denoiser walked down from noise to an image, the one way of doing so for every experiment.

    reverse SDE, step "sde"    x' = D + (sigma'/sigma)^2 (x - D) + sigma' sqrt(1 - sigma'^2 / sigma^2) z
    the same, step "2m"        with D extrapolated to the middle of the step: second order, one evaluation a step
    probability flow, "ode"    x' = D + (sigma'/sigma) (x - D)

The first is exact for a constant D: the posterior of x' given x and x_0 = D.

Sources: Ho, Jain, Abbeel 2020, arXiv:2006.11239 (the ancestral step with its smaller variance); Lu et al. 2022,
arXiv:2211.01095 (SDE-DPM-Solver++ 2M); Song, Meng, Ermon 2020, arXiv:2010.02502 (DDIM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from symbreak.critical import Levels, levels
from symbreak.laws.law import Law, is_law
from symbreak.networks.denoiser import CHUNK, Denoiser, ask, fingerprints
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run

__all__ = ["descend", "grid_through", "reverse_states", "start_states"]


@torch.no_grad()
def descend(
    denoiser: Denoiser,
    x: torch.Tensor,
    grid: Sequence[float] | np.ndarray,
    g: torch.Generator,
    step: str = "sde",
    begin: Callable[[int, torch.Tensor], list[torch.Tensor]] | None = None,
    leave: Sequence[int] | None = None,
    rows: int = CHUNK,
) -> Iterator[tuple[float, torch.Tensor]]:
    """Walk down the levels of a grid: (sigma, states [B, *S]) at each of them.

    Args:
        denoiser: evaluated once at every level but the last.
        x: VE states [n, *S] at the first level, the trunks.
        grid: falling levels [G]. At a last level of 0 the states are the final images, the posterior mean.
        g: of the noise, one draw a step.
        step: ``"sde"``, ``"2m"`` or ``"ode"`` (module docstring). "sde" draws one noise for a trunk and all that
            begins on it, "2m" one for every state.
        begin: (i, trunks [n, *S]) -> states, n at a time, that begin at level i.
        leave: at every level how many copies of each trunk part from it [G], after the evaluation that they share.
        rows: states of one evaluation.

    Raises:
        InputError: for final images that hold NaN or infinity.
    """
    n, before = len(x), x[:0]
    for i, sigma in enumerate(map(float, grid)):
        if begin is not None and sigma:
            x = torch.cat([x, *begin(i, x[:n])])
        yield sigma, x
        if i + 1 == len(grid):
            return
        below, mean = float(grid[i + 1]), ask(denoiser, x, sigma, rows=rows)
        if below == 0:
            if not bool(torch.isfinite(mean).all()):
                raise InputError("final images hold NaN or infinity. Check the network, or pass a smaller sigma_start.")
            x = mean
            continue
        ahead = mean
        if step == "2m" and i:
            # D where the step is half done, going on as it came; states that have just begun have no past.
            old, far = len(before), min(1.0, 0.5 * math.log(sigma / below) / math.log(float(grid[i - 1]) / sigma))
            ahead = torch.cat([mean[:old] + far * (mean[:old] - before), mean[old:]])
        if leave is not None:
            x, mean, ahead = (torch.cat([a] + [a[:n]] * leave[i]) for a in (x, mean, ahead))
        before = mean
        if step == "ode":
            x = torch.lerp(mean, x, below / sigma)
            continue
        fresh, ratio = len(x) if step == "2m" else n, (below / sigma) ** 2
        noise = torch.randn(fresh, *x.shape[1:], generator=g, dtype=x.dtype)
        noise = torch.cat([noise] * (len(x) // fresh))
        x = torch.lerp(ahead, x, ratio).add_(noise, alpha=below * math.sqrt(1 - ratio))


def start_states(source: Law | Denoiser, n: int, sigma: float, g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """n VE states [n, *S] at the level of a start: a law's own, or pure noise for a denoiser."""
    if is_law(source):
        return source.sample(n, sigma, g).to(dtype)
    return sigma * torch.randn(n, *source.shape, generator=g, dtype=dtype)


def grid_through(denoiser: Denoiser, s: np.ndarray, top: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Falling levels, even in log sigma from the top to the lowest of s [G] and all of s among them; the places of s.

    Raises:
        InputError: for levels outside the denoiser's range or above the top, or no step.
    """
    low, high = denoiser.sigma_range
    slack = 1 + 1e-9
    if steps < 1 or s.min() < low / slack or s.max() > top * slack or top > high * slack:
        raise InputError(
            f"{steps} steps from sigma {top:.4g} to levels {s.min():.4g} .. {s.max():.4g}; expected at least one "
            f"step, and levels in the range {low:.4g} to {high:.4g} and not above the start."
        )
    grid = np.unique(np.concatenate([np.geomspace(min(s.min(), top), top, steps + 1)[1:-1], [top], s]))[::-1]
    grid = grid[np.append(True, grid[1:] < grid[:-1] * (1 - 1e-12))]  # levels that are one up to rounding make no step
    return grid, np.abs(np.log(grid[:, None] / s)).argmin(0)


def reverse_states(
    denoiser: Denoiser,
    sigma: Levels,
    paths: int = 500,
    steps: int = 60,
    seed: int = 0,
    sigma_start: float | None = None,
    run: Run | None = None,
) -> dict[float, torch.Tensor]:
    """States of a network's own reverse trajectories at some levels: its x_t, not the data's.

    Reverse SDE from white noise at the top, on levels even in log sigma, those of ``sigma`` among them.

    Args:
        denoiser: a `Denoiser`.
        sigma: a level or levels [G] inside its range.
        paths: trajectories.
        steps: steps from the top to the lowest level, one network evaluation a path each.
        seed: of the noise.
        sigma_start: where the trajectories begin, by default the top of the range.
        run: folder, progress in steps.

    Returns:
        {sigma: VE states [paths, *S]}.

    Raises:
        InputError: for levels outside the range, or no path or step.

    Source: arXiv:2006.11239 (the ancestral step).
    """
    run = (run or Run()).named("reverse trajectories")
    s = np.unique(levels(sigma)[0])
    top = float(denoiser.sigma_range[1] if sigma_start is None else sigma_start)
    if paths < 1:
        raise InputError(f"{paths} paths; expected at least one.")
    grid, at = grid_through(denoiser, s, top, steps)

    def make() -> Arrays:
        g = generator(seed, 53)
        out = np.zeros((len(s), paths, *denoiser.shape), dtype=np.float32)
        start = start_states(denoiser, paths, top, g, torch.float32)
        for j, (_, x) in enumerate(descend(denoiser, start, grid, g)):
            out[at == j] = x.numpy()
            run.tell(j + 1, len(grid))
        return {"states": out}

    with torch.inference_mode():
        settings = (*fingerprints(run, denoiser), grid.tolist(), at.tolist(), paths, seed)
        states = run.part("states", make, *settings)["states"]
    return {float(u): torch.from_numpy(np.array(state)) for u, state in zip(s, states)}
