"""Stability of the generative flow: potentials, fixed points and bifurcations.

Every flow and frame has a drift proportional to D(x, sigma) - kappa x, with D the denoiser and x the
VE state (a state of the VP frame is alpha x), q = alpha-bar, per unit beta in VP:

    VP, reverse SDE        x/2 + score        kappa = (1 + q) / 2      gain = 1 / (1 - q)
    VP, probability flow   x/2 + score/2      kappa = q                gain = 1 / (2 (1 - q))
    VE, both flows         score              kappa = 1                gain = 1 / sigma^2

A fixed point solves D(x) = kappa x; the drift's Jacobian there is gain (J - kappa), J = Cov(x_0 | x) /
sigma^2, so it is unstable where the top eigenvalue of J exceeds kappa. The VP criteria depend on the
data's scale and can fire where nothing breaks; the VE one never fires for a log-concave law.
Branches are followed by pseudo-arclength continuation, which passes through folds.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693; the general criterion is derived for this package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime, levels
from symbreak.networks.denoiser import as_denoiser, ask
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.fixed_points import (
    CentralBranch,
    Point,
    System,
    central_point,
    checked_flow,
    distinct,
    fold_between,
    level_at,
    loss_of_stability,
    march,
    polished,
    rates,
)
from symbreak.runtime.files import InputError

__all__ = ["Branch", "FixedPoints", "Potential", "bifurcation", "drift", "fixed_points", "potential"]

SOURCE = "arXiv:2305.19693, stability of the drift's fixed points"


@dataclass(frozen=True)
class Potential:
    """The potential along a path.

    Attributes:
        path: states [P, *S] in the frame named.
        position: arc length along the path [P], zero at its first point.
        value: u [P], zero at the first point, per unit beta (VP) or per unit of sigma^2 (VE).
        error: estimated quadrature error of each value [P].
        sigma, flow, frame: where, and of which flow.
    """

    path: torch.Tensor
    position: np.ndarray
    value: np.ndarray
    error: np.ndarray
    sigma: float
    flow: str
    frame: str


@dataclass(frozen=True)
class Branch:
    """One branch of fixed points, single-valued in sigma.

    Attributes:
        sigma: levels [G].
        points: states [G, *S] in the frame named; NaN at levels where the branch does not exist.
        eigenvalue: top eigenvalue (real part) of the drift's Jacobian [G]; above zero is unstable.
        central: whether it is the branch that continues the single fixed point of high noise.
        fold: sigma at which the branch is born or ends in a fold (saddle-node or, under a symmetry,
            pitchfork), ``None`` where it has none in the range.
    """

    sigma: np.ndarray
    points: torch.Tensor
    eigenvalue: np.ndarray
    central: bool
    fold: float | None

    @property
    def exists(self) -> np.ndarray:
        """Whether there is a point at each level [G]."""
        return np.isfinite(self.eigenvalue)

    @property
    def stable(self) -> np.ndarray:
        """Whether the point at each level exists and is stable [G]; neutral ones (on a ring) count."""
        return self.exists & (np.nan_to_num(self.eigenvalue, nan=1.0) <= 1e-9)


@dataclass(frozen=True)
class FixedPoints:
    """All branches of fixed points that were found on a grid of levels; the central one comes first."""

    sigma: np.ndarray
    branches: tuple[Branch, ...]
    flow: str
    frame: str

    def at(self, i: int) -> tuple[torch.Tensor, np.ndarray]:
        """Points [K, *S] and top eigenvalues [K] at the i-th level."""
        here = [b for b in self.branches if b.exists[i]]
        shape = self.branches[0].points.shape[1:]
        points = torch.stack([b.points[i] for b in here]) if here else torch.zeros(0, *shape, dtype=torch.float64)
        return points, np.array([b.eigenvalue[i] for b in here])


def drift(law_or_denoiser: Any, x: torch.Tensor, sigma: float, flow: str = "sde", frame: str = "vp") -> torch.Tensor:
    """The generative drift at states x of the frame named, [B, *S].

        VP: x/2 + score (sde), x/2 + score/2 (ode), per unit beta        VE: score, per unit of sigma^2 (sde)
                                                                         or of sigma^2 / 2 (ode)

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        x: states [B, *S].
        sigma: noise level, noise over signal.
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.

    Raises:
        InputError: for states of another shape, sigma <= 0, or an unknown flow or frame.

    Source: arXiv:2305.19693 (VP, reverse SDE).
    """
    checked_flow(flow, frame)
    s = float(levels(sigma)[0][0])
    d = as_denoiser(law_or_denoiser)
    if tuple(x.shape[1:]) != tuple(d.shape):
        raise InputError(f"states of shape {tuple(x.shape)}; expected [B, {', '.join(map(str, d.shape))}].")
    kappa, gain = rates(flow, frame, s)
    alpha = NoiseLevel(s).alpha if frame == "vp" else 1.0
    ve = x / alpha
    mean = d(ve, s) if hasattr(law_or_denoiser, "denoise") else ask(d, ve, s)
    return alpha * gain * (mean - kappa * ve)


def potential(
    law_or_denoiser: Any,
    path: torch.Tensor,
    sigma: float,
    flow: str = "sde",
    frame: str = "vp",
    tolerance: float | None = None,
) -> Potential:
    """The potential along a path: minus the line integral of the drift.

        u(path_k) = - integral of drift . dx from path_0 to path_k, along straight segments

    For a law it is the reverse SDE's u(x) = -|x|^2 / 4 - log p(x) up to a constant (VP, per unit
    beta), whatever the path. A network's drift need not be a gradient: its u belongs to the path.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        path: states [P, *S] in the frame named, P >= 1.
        sigma: noise level.
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        tolerance: segments are halved until their error is below this share of the largest |u|; by
            default 1e-10 for a law and 1e-5 for a denoiser (networks compute in float32).

    Returns:
        A `Potential`, zero at the first point.

    Raises:
        InputError: for an empty path, a path of another shape, or sigma <= 0.

    Source: arXiv:2305.19693.

    >>> from symbreak.laws.gaussian import Gaussian
    >>> from symbreak.moments.one_pass import Moments
    >>> u = potential(Gaussian(Moments(2, [0.0], [[1.0]])), torch.tensor([[0.0], [2.0]]), 1.0)
    >>> [round(float(v), 9) for v in u.value]                  # unit variance: x^2 / 4
    [0.0, 1.0]
    """
    checked_flow(flow, frame)
    s = float(levels(sigma)[0][0])
    shape = tuple(as_denoiser(law_or_denoiser).shape)
    states = torch.as_tensor(path)
    states = states if states.is_floating_point() else states.double()
    if states.ndim == 0 or len(states) == 0:
        raise InputError("the path is empty; expected states [P, *S] with at least one point.")
    if tuple(states.shape[1:]) != shape:
        raise InputError(f"a path of shape {tuple(states.shape)}; expected [P, {', '.join(map(str, shape))}].")
    if not bool(torch.isfinite(states).all()):
        raise InputError("the path holds NaN or infinity; expected finite states.")
    states = states.double()
    if tolerance is None:
        tolerance = 1e-10 if hasattr(law_or_denoiser, "denoise") else 1e-5
    nodes, weights = np.polynomial.legendre.leggauss(4)
    t = torch.as_tensor(0.5 * (nodes + 1.0), device=states.device)
    w = torch.as_tensor(0.5 * weights, device=states.device)

    @torch.no_grad()
    def rule(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """-integral of drift . dx over segments a -> b, [M]."""
        out = []
        block = max(1, 4096 // len(t))
        for i in range(0, len(a), block):
            x, dx = a[i : i + block], (b - a)[i : i + block]
            column = [1, -1] + [1] * len(shape)
            at = x[:, None] + t.reshape(column) * dx[:, None]
            force = drift(law_or_denoiser, at.reshape(-1, *shape), s, flow, frame).double().reshape(at.shape)
            power = (force * dx[:, None]).reshape(*at.shape[:2], -1).sum(-1)
            out.append(-(power * w).sum(-1))
        return torch.cat(out)

    a, b = states[:-1], states[1:]
    owner = torch.arange(len(a), device=states.device)
    value = torch.zeros(len(a), dtype=torch.float64, device=states.device)
    error = torch.zeros_like(value)
    whole = rule(a, b) if len(a) else value
    largest = 0.0
    for depth in range(16):
        if not len(a):
            break
        middle = 0.5 * (a + b)
        left, right = rule(a, middle), rule(middle, b)
        gap = (left + right - whole).abs()
        if depth == 0:
            largest = max(float((left + right).abs().sum()), 1e-300)
        # Each original segment may spend an equal share of the tolerance.
        fine = (gap <= tolerance * largest / len(value)) | (depth == 15)
        value.index_add_(0, owner[fine], (left + right)[fine])
        error.index_add_(0, owner[fine], gap[fine])
        a, b = torch.cat([a[~fine], middle[~fine]]), torch.cat([middle[~fine], b[~fine]])
        whole, owner = torch.cat([left[~fine], right[~fine]]), torch.cat([owner[~fine], owner[~fine]])
    length = (states[1:] - states[:-1]).flatten(1).norm(dim=1)
    along, u, doubt = (np.concatenate([[0.0], v.cumsum(0).cpu().numpy()]) for v in (length, value, error))
    return Potential(states, along, u, doubt, s, flow, frame)


def _starts(system: System, starts: torch.Tensor | None, n: int = 64) -> np.ndarray:
    """Clean samples [n, d] from which to look for wells."""
    if starts is None:
        if not system.is_law:
            raise InputError("a denoiser has no samples to look for wells from. Pass starts=, e.g. 64 clean samples.")
        draws = system.source.sample(n, 0.0, generator(0, n))
    else:
        draws = torch.as_tensor(starts)
        if draws.ndim == 0 or len(draws) == 0 or tuple(draws.shape[1:]) != system.shape:
            raise InputError(
                f"starts of shape {tuple(draws.shape)}; expected clean samples [n, *S], S = {system.shape}."
            )
    return draws.detach().double().cpu().numpy().reshape(len(draws), -1)


def _wells_at(
    system: System, starts: np.ndarray, lam: float, known: list[np.ndarray], most: int = 24
) -> list[np.ndarray]:
    """Stable fixed points at a level, reached from the starts and not among those known."""
    found: list[np.ndarray] = []
    rings = 0
    ends = system.settle(starts, lam)
    for x in distinct(ends, 1e-2 * system.scale, known)[:most]:
        y = system.newton(x, lam)
        if y is not None and distinct(y[None], 1e-4 * system.scale, known + found):
            excess = system.excess(y, lam)
            ring = abs(excess) < max(1e-9, 100 * system.noise)
            # A ring of fixed points, neutral along itself: one of its points is enough.
            if (not ring and excess < 0) or (ring and not rings):
                found.append(y)
            rings += ring
            if rings > 2:
                break
    return found


def bifurcation(
    law_or_denoiser: Any,
    flow: str = "sde",
    frame: str = "vp",
    x0: torch.Tensor | None = None,
    criterion: str = "centre",
    starts: torch.Tensor | None = None,
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
        x0: a guess of the clean state E[x_0 | x*] [*S] of the central fixed point; by default the mean.
        criterion: ``"centre"`` or ``"wells"``.
        starts: clean samples [n, *S] to look for wells from; by default draws of the law.

    Returns:
        A `CriticalTime` with flow and frame; without a level, and with a reason, where nothing crosses.
        For a denoiser the reason states its Jacobian's asymmetry.

    Raises:
        InputError: for an unknown flow, frame or criterion, or an ``x0`` or ``starts`` of another shape.

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
    about: dict[str, Any] = {
        "criterion": "bifurcation" if criterion == "centre" else "wells",
        "flow": flow,
        "frame": frame,
        "source": SOURCE,
    }
    first = central_point(system, system.high)
    if first is None:
        reason = f"no fixed point was found at sigma = {system.high:.4g}, where the search starts. Pass x0="
        return CriticalTime(None, reason=reason, **about)
    if criterion == "wells":
        return _wells(system, first, _starts(system, starts), about)
    return _centre_crossing(system, first, about)


def _centre_crossing(system: System, first: np.ndarray, about: dict[str, Any]) -> CriticalTime:
    """The first level, from high noise down, at which the central fixed point loses its stability."""
    threshold = max(1e-11, 3 * system.noise)
    low, high = math.log(system.low), math.log(system.high)
    before: Point | None = None
    value, highest = math.nan, -math.inf

    def limits(x: np.ndarray, lam: float) -> str | None:
        return None if system.is_law else f"the network's Jacobian is asymmetric by {system.asymmetry(x, lam):.1%}"

    for p in march(system, first, high, -1, low, high):
        last, value = value, system.excess(p.x, p.lam)
        highest = max(highest, value)
        if before is not None and p.tl >= 0:
            fold = fold_between(system, before, p)
            reason = "the central fixed point ends here in a fold (saddle-node), stable until then"
            return CriticalTime(level_at(fold.lam, system.frame), reason=reason, **about)
        if before is not None and last <= threshold < value:
            # Between the ends of the step the branch may touch zero within rounding: take the end then.
            start = system.excess(before.x, before.lam)
            lam, x = loss_of_stability(system, before, p) if start < 0 else (before.lam, before.x)
            return CriticalTime(level_at(lam, system.frame), reason=limits(x, lam), **about)
        before = p
    reached = math.exp(before.lam) if before is not None else system.high
    span = f"from sigma = {system.high:.4g} down to {reached:.4g}"
    if highest <= threshold:
        reason = f"the central fixed point stays stable {span}"
    elif value > threshold:
        reason = f"the central fixed point is unstable at every level {span}: there is no crossing"
    else:
        reason = f"the central fixed point is unstable at high noise and only gains stability {span}"
    return CriticalTime(None, reason=reason, **about)


def _wells(system: System, first: np.ndarray, starts: np.ndarray, about: dict[str, Any]) -> CriticalTime:
    """The highest fold of the stable branches that are not the central one."""
    low, high = math.log(system.low), math.log(system.high)
    central = CentralBranch(system, first, high, low)
    best: float | None = None
    after = 0
    traced: list[np.ndarray] = []  # wells of the level before: their branches are known
    for lam in np.arange(high, low, -math.log(1.2)):
        lam = float(lam)
        centre = central.at(lam)
        settled = system.settle(np.stack(traced), lam, 20) if traced else np.zeros((0, system.dim))
        followed = [system.newton(x, lam) for x in settled]
        traced = [x for x in followed if x is not None]
        wells = _wells_at(system, starts, lam, traced if centre is None else [centre, *traced])
        # The most stable ones were born first.
        wells.sort(key=lambda x: system.excess(x, lam))
        for x in wells[:4]:
            before: Point | None = None
            for p in march(system, x, lam, 1, low, high):
                if before is not None and p.tl <= 0:
                    fold = fold_between(system, before, p).lam
                    best = fold if best is None else max(best, fold)
                    break
                before = p
            if before is not None and before.tl > 0 and before.lam > high - 1e-6:
                reason = f"several fixed points are stable at every level up to sigma = {system.high:.4g}"
                return CriticalTime(None, reason=reason, **about)
        traced += wells
        # Wells just below their birth have small basins that the starts can miss: look a few levels further.
        after += best is not None
        if after >= 3:
            break
    if best is None:
        reason = (
            f"no stable fixed point apart from the central one was found from sigma = {system.high:.4g} "
            f"down to {system.low:.4g}, from {len(starts)} starts"
        )
        return CriticalTime(None, reason=reason, **about)
    return CriticalTime(level_at(best, system.frame), **about)


def fixed_points(
    law_or_denoiser: Any,
    sigma: float | np.ndarray | torch.Tensor,
    flow: str = "sde",
    frame: str = "vp",
    starts: torch.Tensor | None = None,
    x0: torch.Tensor | None = None,
) -> FixedPoints:
    """The fixed points of a flow on a grid of levels: all branches that are found, with their stability.

    The central branch is continued from high noise. Others are looked for at up to 16 levels of the grid,
    from clean samples (which settle in the wells) and from the middles between points already found
    (which lead to saddles); each is followed in both directions by arclength, through its folds.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a level, or levels [G].
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        starts: clean samples [n, *S] to look from; by default draws of the law.
        x0: a guess of the clean state E[x_0 | x*] [*S] of the central fixed point.

    Returns:
        `FixedPoints`; points are states of the frame named. The search is by sampling: a branch whose
        basin no start meets is not found.

    Raises:
        InputError: for sigma <= 0, an unknown flow or frame, or ``starts`` of another shape.

    Source: arXiv:2305.19693.
    """
    checked_flow(flow, frame)
    plain = sigma.detach().cpu() if isinstance(sigma, torch.Tensor) else sigma
    grid = np.atleast_1d(np.asarray(plain, dtype=np.float64))
    if grid.ndim != 1 or len(grid) == 0:
        raise InputError("sigma is empty; expected a level or levels [G].")
    for s in grid:
        levels(s)
    system = System(law_or_denoiser, flow, frame, x0)
    seeds = _starts(system, starts) if starts is not None or system.is_law else system.centre[None]
    lams = np.log(grid)
    low, high = float(lams.min()), float(lams.max())
    top = max(high, math.log(system.high)) if system.is_law else math.log(system.high)

    pieces: list[tuple[np.ndarray, np.ndarray, bool, float | None]] = []  # lams rising, points, central, fold

    def keep(points: list[Point], central: bool) -> None:
        """Cut a march into pieces that are single-valued in lam, folds at their ends."""
        piece: list[tuple[float, np.ndarray]] = []
        born: float | None = None
        for i, p in enumerate(points):
            if i and (points[i - 1].tl > 0) != (p.tl > 0):
                fold = fold_between(system, points[i - 1], p)
                piece.append((fold.lam, fold.x))
                add(piece, central, fold.lam)
                piece, born, central = [(fold.lam, fold.x)], fold.lam, False
            piece.append((p.lam, p.x))
        add(piece, central, born)

    def add(piece: list[tuple[float, np.ndarray]], central: bool, fold: float | None) -> None:
        ordered = sorted(piece, key=lambda item: item[0])
        pieces.append((np.array([a for a, _ in ordered]), np.stack([b for _, b in ordered]), central, fold))

    def known(lam: float) -> list[np.ndarray]:
        here = [polished(system, a, b, lam) for a, b, _, _ in pieces if a[0] - 1e-9 <= lam <= a[-1] + 1e-9]
        return [x for x in here if x is not None]

    first = central_point(system, math.exp(top))
    if first is not None:
        keep(list(march(system, first, top, -1, low, top)), True)
    anchors = np.unique(lams)[:: max(1, math.ceil(len(np.unique(lams)) / 16))]
    for lam in anchors:
        lam = float(lam)
        near = known(lam)
        found = _wells_at(system, seeds, lam, near)
        everything = (near + found)[:8]
        middles = [0.5 * (a + b) for i, a in enumerate(everything) for b in everything[:i]]
        for x in middles:
            y = system.newton(x, lam)
            if y is not None and distinct(y[None], 1e-4 * system.scale, near + found):
                found.append(y)
        for x in found:
            if not distinct(x[None], 1e-4 * system.scale, known(lam)):
                continue  # a branch followed meanwhile passes here
            up = list(march(system, x, lam, 1, low, high, 0.1)) if high > lam else []
            down = list(march(system, x, lam, -1, low, high, 0.1)) if lam > low else []
            if high == low:
                pieces.append((np.array([lam]), x[None], False, None))
                continue
            backwards = [Point(p.x, p.lam, -p.tx, -p.tl) for p in down[:0:-1]]
            keep(backwards + (up or [Point(x, lam, -down[0].tx, -down[0].tl)]), False)
    branches = []
    alphas = np.array([NoiseLevel(float(s)).alpha if frame == "vp" else 1.0 for s in grid])
    for piece_lams, xs, central, fold in sorted(pieces, key=lambda piece: not piece[2]):
        points = np.full((len(grid), system.dim), math.nan)
        values = np.full(len(grid), math.nan)
        for i, lam in enumerate(lams):
            if piece_lams[0] - 1e-12 <= lam <= piece_lams[-1] + 1e-12:
                at = polished(system, piece_lams, xs, float(lam))
                if at is not None:
                    kappa, gain = rates(flow, frame, math.exp(lam))
                    points[i] = alphas[i] * at / kappa
                    values[i] = gain * kappa * system.excess(at, float(lam))
        if np.isfinite(values).any():
            shaped = torch.from_numpy(points.reshape(len(grid), *system.shape))
            branches.append(Branch(grid, shaped, values, central, None if fold is None else math.exp(fold)))
    return FixedPoints(grid, tuple(branches), flow, frame)
