"""Kicks: a trajectory is kicked at sigma and continues with the same noise. How far does the kick carry?

Kicked trajectories take plain steps, as one that has just begun has no past to extrapolate from.

Source: derived; the window of opportunity belongs to the symmetry breaking of arXiv:2305.19693.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Levels, Result, mean_curve
from symbreak.intervals import percentiles
from symbreak.laws.class_posterior import class_of
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.networks.denoiser import Denoiser
from symbreak.noise import NoiseLevel
from symbreak.phases.branches import Branches, Classify, Paths, Tell
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["Opportunity", "opportunity"]

SOURCE = "largest change of the final image per unit of kick (derived; arXiv:2305.19693)"


@dataclass(frozen=True)
class Opportunity(Result):
    """The window of opportunity.

    Attributes:
        change: mean distance of the final images per unit of kick, in VP units, with Student's intervals.
        classes: share of kicks that change the class, with Clopper-Pearson's; ``None`` without classes.
        peak, class_peak: levels at which they are largest, with bootstrap intervals.
        size: kick over the norm of the state.
        calls: states given to the denoiser.
    """

    record = ("change", "classes", "peak", "class_peak", "size", "calls")

    change: Curve
    classes: Curve | None
    peak: CriticalTime
    class_peak: CriticalTime | None
    size: float
    calls: int


@renamed(**dict.fromkeys(("sigma_start", "sigma_end", "dtype", "resamples"), "paths=sb.Paths(...)"))
def opportunity(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    classify: Classify | None = None,
    samples: int = 200,
    steps: int = 40,
    size: float = 0.1,
    flow: str = "sde",
    seeds: int = 0,
    paths: Paths | None = None,
    run: Run | None = None,
) -> Opportunity:
    """The window of opportunity: the levels at which a kick to a trajectory carries furthest.

        x -> x + size |x| u, u a random direction;   change = |F(x + size |x| u) - F(x)| / (size alpha |x|)

    F is the way down to the final image: the reverse SDE, kicked and unkicked trajectory sharing their noise, or
    the probability flow. The kick is measured on the VP state alpha x. For one Gaussian of variance v

        SDE: change = v sqrt(1 + sigma^2) / (v + sigma^2)        ODE: sqrt(v (1 + sigma^2) / (v + sigma^2))

    Under the SDE an early kick is forgotten; the peak lies where the VP drift turns from contracting to
    expanding, sigma^2 = v - 2 for v > 2. Under the flow nothing is forgotten, and a peak is not to be expected.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: level, or levels [G], at which trajectories are kicked.
        classify: as for `clones`; without it, and for a law that is no `Mixture`, there is no class curve.
        samples: number of trajectories.
        size: kick over the norm of the state. Small kicks give the derivative of F and change few classes.
        flow: ``"sde"`` or ``"ode"``.
        steps, seeds, paths, run: as for `clones`; the bootstrap resamples trajectories.

    Returns:
        `Opportunity`. A peak is the top of the parabola through the largest mean and its neighbours in log sigma,
        its interval that of the resamples' peaks; with a reason and no level where the largest mean is at an end. Of
        class changes it needs about 10 trajectories that change at the peak.

    Raises:
        InputError: for a size that is not positive, an unknown flow, or as `clones`.

    Source: derived; the window belongs to the symmetry breaking of arXiv:2305.19693.
    """
    if samples < 2 or not 0 < size < math.inf:
        raise InputError(f"{samples} samples and a size of {size:g}; expected at least 2 samples and a size > 0.")
    if flow not in ("sde", "ode"):
        raise InputError(f"flow {flow!r}; expected sde or ode.")
    branches = Branches(law_or_denoiser, sigma, steps, paths, flow)
    s, w = branches.s, branches.weights(samples, seeds)
    known = classify is not None or isinstance(law_or_denoiser, Mixture)
    judge = branches.classifier(classify) if known else None
    alpha = 1 / np.sqrt(1 + s * s)

    def make(rows: np.ndarray, g: torch.Generator, tell: Tell) -> Arrays:
        norm = np.zeros((len(s), len(rows)))

        def join(j: int, trunks: torch.Tensor) -> torch.Tensor:
            way = torch.randn(trunks.shape, generator=g, dtype=trunks.dtype).flatten(1)
            kick = size * torch.linalg.vector_norm(trunks.flatten(1), dim=1)
            norm[j] = kick.double().numpy() * alpha[j]
            return trunks + (way * (kick / torch.linalg.vector_norm(way, dim=1))[:, None]).reshape(trunks.shape)

        ends = branches.images(len(rows), g, tell, join).double()
        moved = torch.linalg.vector_norm((ends[1:] - ends[0]).flatten(2), dim=2)
        labels = np.stack([class_of(judge, some) for some in ends] if judge else [np.zeros(len(rows), np.int64)])
        return {"change": moved.numpy() / norm, "labels": labels}

    arrays = branches.measure(run, "opportunity", samples, make, judge, size, seeds=seeds)
    change, labels = arrays["change"], arrays["labels"]
    classes = labels[1:] != labels[0] if known else None
    return Opportunity(
        change=mean_curve(s, change, "change of the final image per unit of kick", shape=branches.shape),
        classes=None if classes is None else mean_curve(s, classes, "class change by kicks", shape=branches.shape),
        peak=_peak(s, w @ change.T, "opportunity", flow),
        class_peak=None if classes is None else _peak(s, w @ classes.T, "opportunity, class", flow),
        size=float(size),
        calls=samples * branches.cost,
    )


def _peak(s: np.ndarray, sums: np.ndarray, criterion: str, flow: str) -> CriticalTime:
    """The level where sums [1 + R, G] are largest: row 0, with the interval of the other rows."""
    time = partial(CriticalTime, criterion=criterion, flow=flow, frame="vp", source=SOURCE)
    order = np.argsort(s)
    u, v = np.log(s[order]), sums[:, order]
    if np.ptp(v[0]) == 0:
        return time(None, reason="the kicks carry equally far at every level; pass more levels")
    top = v.argmax(1)
    if top[0] in (0, len(u) - 1):
        end, way = (s.min(), "lower") if top[0] == 0 else (s.max(), "higher")
        reason = f"the kicks carry furthest at the end of the levels, {end:.4g}; try {way} levels, if there are any"
        inside = int((~np.isin(top[1:], (0, len(u) - 1))).sum())
        if inside > 0.025 * (len(top) - 1):  # no more is known than of a peak inside
            reason += f", or more samples: in {inside} of {len(top) - 1} resamples they do at a level inside"
        return time(None, reason=reason)
    i = np.clip(top, 1, len(u) - 2)
    rows = np.arange(len(v))
    (a, b, c), (fa, fb, fc) = (u[i - 1], u[i], u[i + 1]), (v[rows, i - 1], v[rows, i], v[rows, i + 1])
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    flat = left == right
    at = np.where(flat, b, b - 0.5 * ((b - a) * left - (b - c) * right) / np.where(flat, 1.0, left - right))
    at = np.where(top == i, at, u[top])  # a resample that is largest at an end
    low, high = percentiles(at[1:])
    ends = int((top[1:] != i[1:]).sum())
    note = f"{ends} of {len(at) - 1} resamples are largest at an end of the levels" if ends else None
    level, below, above = (NoiseLevel(math.exp(float(q))) for q in (at[0], low, high))
    return time(level, below, above, reason=note, interval="bootstrap")
