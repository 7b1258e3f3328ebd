"""The noise level at which a flow's symmetry breaks: its central fixed point loses stability, or other wells appear.

A fixed point D(x*) = kappa x* is unstable where the top eigenvalue of Cov(x_0 | x*) / sigma^2 exceeds kappa; kappa of
every flow and frame stands in `symbreak.phases.fixed_point_search`. The VP criteria depend on the data's scale and can
fire where nothing breaks; the VE one never fires for a log-concave law.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693; the general criterion is derived for this package.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime
from symbreak.laws.law import Law
from symbreak.networks.denoiser import Denoiser
from symbreak.phases.fixed_point_search import (
    SOURCE,
    Point,
    System,
    Track,
    central_point,
    fold_between,
    level_at,
    loss_of_stability,
    march,
    pieces,
    wells_at,
)
from symbreak.runtime.files import InputError

__all__ = ["bifurcation"]


def bifurcation(
    law_or_denoiser: Law | Denoiser,
    flow: str = "sde",
    frame: str = "vp",
    x0: torch.Tensor | None = None,
    criterion: str = "centre",
    starts: torch.Tensor | None = None,
    low: float | None = None,
) -> CriticalTime:
    """The noise level at which the flow's symmetry breaks.

        centre:  top eigenvalue of Cov(x_0 | x*) / sigma^2 = kappa   (module docstring), at the central
                 fixed point x*, continued from high noise down
        wells:   the highest level at which another stable fixed point exists

    With two symmetric classes both agree (a pitchfork). With three or more the transition is of first
    order: the new wells appear at more noise than the centre destabilises at. Data without a symmetry
    have no crossing at the centre, which then simply becomes one of the wells: ask for the wells.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        flow: ``"sde"`` (reverse SDE) or ``"ode"`` (probability flow).
        frame: ``"vp"`` or ``"ve"``. Quote sde/vp to compare with the paper; use VE to claim that
            something breaks, since VP fires for a single Gaussian of variance above 2 too.
        x0: a guess of the clean state E[x_0 | x*], [*S] of the central fixed point; by default the mean.
        criterion: ``"centre"`` or ``"wells"``.
        starts: clean samples [n, *S] to look for wells from; by default draws of the law.
        low: the sigma down to which is looked; by default 1e-3, or less. Wells are expensive to look for in many
            dimensions where the noise is small.

    Returns:
        A `CriticalTime` with flow and frame; without a level, and with a reason, where nothing crosses.
        For a denoiser the reason states its Jacobian's asymmetry.

    Raises:
        InputError: for an unknown flow, frame or criterion, an ``x0`` or ``starts`` of another shape, or a ``low`` that
            does not lie below where the search begins.

    Source: arXiv:2305.19693; general criterion and wells derived for this package.

    >>> from symbreak.laws.gaussian import Gaussian
    >>> from symbreak.moments.one_pass import Moments
    >>> wide = Gaussian(Moments(2, [0.0], [[9.0]]))
    >>> bifurcation(wide, flow="sde", frame="ve").level is None
    True
    >>> round(bifurcation(wide, flow="sde", frame="vp").level.alpha_bar, 9)      # the trap: 1 / (v - 1)
    0.125
    """
    if criterion not in ("centre", "wells"):
        raise InputError(f"unknown criterion {criterion!r}. Pass criterion='centre' or 'wells'.")
    system = System(law_or_denoiser, flow, frame, x0)
    if low is not None:
        if not 0 < low < system.high:
            raise InputError(
                f"low={low:g}; expected a sigma above 0 and below {system.high:.4g}, where the search starts."
            )
        system.low = max(system.low, low)
    name = "bifurcation" if criterion == "centre" else "wells"
    answer = partial(CriticalTime, criterion=name, flow=flow, frame=frame, source=SOURCE)
    rows = system.starts(starts) if criterion == "wells" else system.centre[None]
    first, _ = central_point(system, math.log(system.high))
    if first is None:
        where = f"sigma = {system.high:.4g}, where the search starts"
        return answer(None, reason=f"no fixed point was found at {where}. Pass x0=")
    lam, reason = _highest_fold(system, first, rows) if criterion == "wells" else _crossing(system, first)
    return answer(None if lam is None else level_at(lam, frame), reason=reason)


def _crossing(system: System, first: np.ndarray) -> tuple[float | None, str | None]:
    """log sigma at which the central fixed point first loses its stability, from high noise down, and a reason."""
    threshold = max(1e-11, 3 * system.noise)
    low, high = math.log(system.low), math.log(system.high)
    before: Point | None = None
    value, highest, reached = math.nan, -math.inf, system.high
    for p in march(system, first, high, -1, low, high):
        last, value = value, system.excess(p.w, p.lam)
        highest = max(highest, value)
        if before is not None and p.tl >= 0:
            reason = "the central fixed point ends here in a fold (saddle-node), stable until then"
            return fold_between(system, before, p).lam, reason
        if before is not None and last <= threshold < value:
            track, lam = Track(system, {before.lam: before.w, p.lam: p.w}), before.lam
            # Between the ends of the step the branch may touch zero within rounding: take the end then.
            if last < 0:
                lam, _ = loss_of_stability(track, p.lam, lam, {lam: last, p.lam: value})
            asymmetry = system.asymmetry(track.points[lam], lam)
            return lam, None if system.is_law else f"the network's Jacobian is asymmetric by {asymmetry:.1%}"
        before, reached = p, math.exp(p.lam)
    span = f"from sigma = {system.high:.4g} down to {reached:.4g}"
    if highest <= threshold:
        return None, f"the central fixed point stays stable {span}"
    if value > threshold:
        return None, f"the central fixed point is unstable at every level {span}: there is no crossing"
    return None, f"the central fixed point is unstable at high noise and only gains stability {span}"


def _highest_fold(system: System, first: np.ndarray, starts: np.ndarray) -> tuple[float | None, str | None]:
    """log sigma of the highest fold of the stable branches that are not the central one, and a reason."""
    low, high = math.log(system.low), math.log(system.high)
    central = next(pieces(system, march(system, first, high, -1, low, high)))
    best, after = -math.inf, 0
    traced: list[np.ndarray] = []  # wells of the level before: their branches are known
    for lam in np.arange(high, low, -math.log(1.2)).tolist():
        centre = central.at(lam) if lam in central else None
        settled = system.settle(np.stack(traced), lam, 20) if traced else ()
        traced = [w for x in settled if (w := system.newton(x, lam)) is not None]
        wells = wells_at(system, starts, lam, traced if centre is None else [centre, *traced])
        # The most stable ones were born first.
        for x in sorted(wells, key=lambda w: system.excess(w, lam))[:4]:
            up = next(pieces(system, march(system, x, lam, 1, low, high)))
            if up.fold is not None:
                best = max(best, up.fold)
            elif max(up.points) > high - 1e-6:
                return None, f"several fixed points are stable at every level up to sigma = {system.high:.4g}"
        traced += wells
        # Wells just below their birth have small basins that the starts can miss: look a few levels further.
        after += math.isfinite(best)
        if after >= 3:
            break
    if math.isfinite(best):
        return best, None
    return None, (
        f"no stable fixed point apart from the central one was found from sigma = {system.high:.4g} down to "
        f"{system.low:.4g}, from {len(starts)} starts"
    )
