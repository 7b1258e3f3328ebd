"""The drift of a generative flow, its potential along a path, and the potential along arcs between two trajectories.

At high noise the potential has one well, below the symmetry breaking several; kappa and gain of every flow's drift
stand in `symbreak.phases.fixed_point_search`.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from symbreak.critical import CriticalTime, Levels, levels
from symbreak.laws.class_posterior import class_of
from symbreak.laws.law import Law, is_law
from symbreak.networks.denoiser import Denoiser, as_denoiser, ask, fingerprints
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.fixed_point_search import System, checked_flow, level_at, rates
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run, renamed
from symbreak.runtime.shown import Shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "Arc",
    "Potential",
    "Wells",
    "arc_potential",
    "drift",
    "levels_within",
    "plain_fields",
    "potential",
    "trajectories",
]

STEPS = 40  # of the probability flow
ARC = "arXiv:2305.19693, potential along an arc between two trajectories"


@dataclass(frozen=True)
class Potential(Shown):
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
class Wells(Shown):
    """Which minima of a potential count as wells.

    Attributes:
        depth: a minimum counts from this depth on, in the units of u. The stationary density of the reverse SDE is
            exp(-2 u): 0.01 is two per cent of it. It is at least ten quadrature errors.
        tolerance: of the line integral, relative; by default 1e-8 for a law and 1e-4 for a denoiser.
    """

    depth: float = 0.01
    tolerance: float | None = None


@dataclass(frozen=True)
class Arc(Shown):
    """The potential along arcs between two trajectories, level by level, in the order in which the levels came.

    Attributes:
        sigma: levels [G].
        angle: a [P] from -0.2 pi to 0.7 pi; the trajectories are at 0 and pi / 2.
        value: u [G, P] in nats per unit beta (VP) or per unit of sigma^2 (VE), zero at each lowest point.
        error: estimated quadrature error [G].
        wells: minima inside the arc that lie deeper than ``threshold`` below the pass to a lower one [G].
        depth: of the double well [G]: how deep the second minimum lies below the pass; 0 where there is none.
        threshold: depth from which a minimum counts.
        states: of the two trajectories [G, 2, *S] in the frame named.
        ends: their final images [2, *S].
        seeds: of their noise, ``None`` where the noise was passed.
        critical: where one well becomes two (criterion ``"arc"``), bracketed by two levels.
        flow, frame: of which flow.
    """

    sigma: np.ndarray
    angle: np.ndarray
    value: np.ndarray
    error: np.ndarray
    wells: np.ndarray
    depth: np.ndarray
    threshold: float
    states: torch.Tensor
    ends: torch.Tensor
    seeds: tuple[int, int] | None
    critical: CriticalTime
    flow: str
    frame: str

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records; the images stay here."""
        return plain_fields(self, "states", "ends")


def plain_fields(answer: DataclassInstance, *without: str) -> dict[str, object]:
    """The fields of a dataclass as plain values, for records."""

    def plain(value: object) -> object:
        if hasattr(value, "to_dict"):
            return value.to_dict()
        return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value

    return {f.name: plain(getattr(answer, f.name)) for f in fields(answer) if f.name not in without}


def levels_within(denoiser: Denoiser, sigma: Levels) -> np.ndarray:
    """Levels [G] inside the range of a denoiser.

    Raises:
        InputError: for levels outside it.
    """
    s, _ = levels(sigma)
    low, high = denoiser.sigma_range
    if not (low * (1 - 1e-9) <= s.min() and s.max() <= high * (1 + 1e-9)):
        raise InputError(
            f"levels from {s.min():.4g} to {s.max():.4g}; the denoiser knows {low:.4g} to {high:.4g}. Pass levels in "
            "that range."
        )
    return s


def drift(
    law_or_denoiser: Law | Denoiser, x: torch.Tensor, sigma: float, flow: str = "sde", frame: str = "vp"
) -> torch.Tensor:
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
    mean = d(ve, s) if is_law(law_or_denoiser) else ask(d, ve, s)
    return alpha * gain * (mean - kappa * ve)


def potential(
    law_or_denoiser: Law | Denoiser,
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
    if states.ndim == 0 or len(states) == 0:
        raise InputError("the path is empty; expected states [P, *S] with at least one point.")
    if tuple(states.shape[1:]) != shape:
        raise InputError(f"a path of shape {tuple(states.shape)}; expected [P, {', '.join(map(str, shape))}].")
    states = states.double()
    if not bool(torch.isfinite(states).all()):
        raise InputError("the path holds NaN or infinity; expected finite states.")
    if tolerance is None:
        tolerance = 1e-10 if is_law(law_or_denoiser) else 1e-5
    force = partial(drift, law_or_denoiser, sigma=s, flow=flow, frame=frame)
    value, error = _integrals(force, states[:-1], states[1:], tolerance)
    length = (states[1:] - states[:-1]).flatten(1).norm(dim=1)
    along, u, doubt = (np.concatenate([[0.0], v.cumsum(0).cpu().numpy()]) for v in (length, value, error))
    return Potential(states, along, u, doubt, s, flow, frame)


@torch.no_grad()
def _integrals(
    force: Callable[[torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-integral of force . dx over segments a -> b and its error, [M] each, by halving them as far as they need it."""
    nodes, weights = (torch.as_tensor(0.5 * v, device=a.device) for v in np.polynomial.legendre.leggauss(4))
    nodes = (nodes + 0.5).reshape(-1, *[1] * (a.ndim - 1))

    def rule(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sums = []
        for begin, dx in zip(a.split(1024), (b - a).split(1024), strict=True):
            at = begin[:, None] + nodes * dx[:, None]
            power = force(at.flatten(0, 1)).double().reshape(at.shape) * dx[:, None]
            sums.append(-(power.flatten(2).sum(-1) * weights).sum(-1))
        return torch.cat(sums)

    owner = torch.arange(len(a), device=a.device)
    value, error = a.new_zeros(2, len(a))
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
    return value, error


def trajectories(
    law_or_denoiser: Law | Denoiser,
    seeds: Sequence[int] | torch.Tensor,
    high: float,
    low: float,
    at: Sequence[float] | np.ndarray = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability flow from white noise: VE states at falling levels [G, n, *S], and the final images [n, *S].

    dx / dlog sigma = x - D by the second-order multistep rule of DPM-Solver++ (arXiv:2211.01095).

    Args:
        law_or_denoiser: whose flow.
        seeds: of the noise of each trajectory, as `symbreak.generate` draws it; or that noise [n, *S].
        high, low: the levels between which it runs.
        at: levels [G] whose states are wanted.
    """
    denoiser = as_denoiser(law_or_denoiser)
    if isinstance(seeds, torch.Tensor):
        x = high * seeds.double()
    else:
        x = high * torch.stack([torch.randn(denoiser.shape, generator=generator(i, 0)) for i in seeds]).double()
    wanted = np.clip(np.asarray(at, dtype=np.float64), low, high)
    grid = np.unique(np.concatenate([np.geomspace(low, high, STEPS), wanted]))[::-1].tolist()
    states: dict[float, torch.Tensor] = {}
    before: tuple[torch.Tensor, float] | None = None
    with torch.no_grad():
        for s, below in pairwise(grid):
            states[s] = x
            mean, step = ask(denoiser, x, s), math.log(s / below)
            towards = mean if before is None else mean + 0.5 * step / before[1] * (mean - before[0])
            x = towards + (below / s) * (x - towards)
            before = mean, step
        states[grid[-1]] = x
        ends = ask(denoiser, x, grid[-1])
    return torch.stack([states[s] for s in wanted.tolist()]) if len(wanted) else x[:0], ends


@renamed(
    seeds="candidates=range(first, first + 16)", depth="wells=Wells(depth=...)", tolerance="wells=Wells(tolerance=...)"
)
def arc_potential(
    denoiser_or_law: Law | Denoiser,
    sigma: Levels,
    pair: tuple[int, int] | torch.Tensor | None = None,
    points: int = 61,
    flow: str = "sde",
    frame: str = "vp",
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    candidates: int | Sequence[int] = 16,
    wells: Wells | None = None,
    run: Run | None = None,
) -> Arc:
    """The potential along an arc between two trajectories, by level: one well at high noise, two below.

        x(a) = cos(a) x_1 + sin(a) x_2,  a from -0.2 pi to 0.7 pi;  u = - integral of drift . dx along it

    x_1, x_2 are the states, at that level, of two trajectories of the probability flow from white noise.

    Args:
        denoiser_or_law: a denoiser d(x, sigma), or a law.
        sigma: levels [G].
        pair: the seeds of the two trajectories, or their white noise [2, *S]; by default the two of the candidates
            whose final images are farthest apart (among those of different class, with ``classify``).
        points: P along the arc.
        flow, frame: of the drift.
        classify: images [n, *S] -> class [n].
        candidates: trajectories to choose from: how many, or the seeds of their noise.
        wells: which minima count, `Wells`.
        run: where finished parts are kept, and whom to tell.

    Returns:
        An `Arc`; its critical time is the geometric mean of the two levels between which the second well appears,
        which are its interval.

    Raises:
        InputError: for levels outside the network's, an unknown flow or frame, fewer than 3 points or 2 candidates, a
            ``pair`` of another shape, or a classifier that gives no class for each image.

    Source: arXiv:2305.19693.
    """
    run, wells = run or Run(), wells or Wells()
    checked_flow(flow, frame)
    denoiser = as_denoiser(denoiser_or_law)
    s = levels_within(denoiser, sigma)
    seeds = range(candidates) if isinstance(candidates, int) else candidates
    if points < 3 or len(seeds) < 2:
        raise InputError(f"{points} points and {len(seeds)} candidates; expected at least 3 and 2.")
    falling = np.argsort(-s, kind="stable")
    ordered = s[falling]
    source = fingerprints(run, denoiser_or_law)
    states, ends, numbers = _pair(System(denoiser_or_law, flow, frame), ordered, pair, seeds, classify, run, source)
    if frame == "vp":
        alphas = torch.tensor([NoiseLevel(u).alpha for u in ordered.tolist()], dtype=torch.float64)
        states *= alphas.reshape(-1, *[1] * (states.ndim - 1))
    angle = np.linspace(-0.2 * math.pi, 0.7 * math.pi, points)
    cos, sin = (torch.from_numpy(f(angle)).reshape(-1, *[1] * len(denoiser.shape)) for f in (np.cos, np.sin))
    tolerance = wells.tolerance or (1e-8 if is_law(denoiser_or_law) else 1e-4)

    def along(i: int) -> Arrays:
        path = cos * states[i, 0] + sin * states[i, 1]
        u = potential(denoiser_or_law, path, float(ordered[i]), flow, frame, tolerance)
        return {"value": u.value - u.value.min(), "error": np.array(u.error.max())}

    made = run.parts("arc", range(len(s)), along, *source, flow, frame, states, points, tolerance)
    value, error = np.stack([m["value"] for m in made]), np.array([float(m["error"]) for m in made])
    depths = [_depths(u) for u in value]
    count = np.array([(d > max(wells.depth, 10 * e)).sum() for d, e in zip(depths, error, strict=True)])
    second = np.array([d[1] if len(d) > 1 else 0.0 for d in depths])
    back = np.argsort(falling, kind="stable")
    return Arc(
        sigma=s,
        angle=angle,
        value=value[back],
        error=error[back],
        wells=count[back],
        depth=second[back],
        threshold=wells.depth,
        states=states[torch.from_numpy(back)],
        ends=ends,
        seeds=numbers,
        critical=_two_wells(ordered, count, flow, frame),
        flow=flow,
        frame=frame,
    )


def _pair(
    system: System,
    ordered: np.ndarray,
    pair: tuple[int, int] | torch.Tensor | None,
    candidates: Sequence[int],
    classify: Callable[[torch.Tensor], torch.Tensor] | None,
    run: Run,
    source: list[str],
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """VE states [G, 2, *S], final images [2, *S] and seeds of the two trajectories."""
    seeds = candidates if pair is None else pair
    if isinstance(seeds, torch.Tensor):
        if tuple(seeds.shape) != (2, *system.shape):
            raise InputError(f"a pair of shape {tuple(seeds.shape)}; expected white noise [2, *S], S = {system.shape}.")
    else:
        seeds = [int(i) for i in seeds]
        if min(seeds) < 0 or (pair is not None and len(seeds) != 2):
            raise InputError(f"a pair of seeds {seeds}; expected two whole numbers of at least 0.")
    high, low = max(system.high, float(ordered[0])), min(system.low, float(ordered[-1]))

    def make() -> Arrays:
        states, ends = trajectories(system.source, seeds, high, low, ordered)
        return {"states": states.numpy(), "ends": ends.numpy()}

    made = run.part("arc-trajectories", make, *source, ordered.tolist(), seeds)
    ends = torch.from_numpy(made["ends"])
    apart = torch.cdist(ends.flatten(1), ends.flatten(1)).numpy()
    couples = list(combinations(range(len(ends)), 2))
    if classify is not None and pair is None:
        classes = class_of(classify, ends)
        couples = [(i, j) for i, j in couples if classes[i] != classes[j]] or couples
    i, j = max(couples, key=lambda c: apart[c])
    states = torch.from_numpy(made["states"])[:, [i, j]]
    return states, ends[[i, j]].double(), None if isinstance(seeds, torch.Tensor) else (seeds[i], seeds[j])


def _depths(u: np.ndarray) -> np.ndarray:
    """Depths of the minima inside a curve, falling: up to the lower pass to a deeper one, infinite for the deepest."""
    depths = []
    for i in range(1, len(u) - 1):
        if not u[i - 1] > u[i] <= u[i + 1]:
            continue
        left, right = u[i::-1], u[i:]
        # Of two equally deep ones the left one counts as deeper.
        lower = np.flatnonzero(left[1:] <= u[i]) + 1, np.flatnonzero(right < u[i])
        passes = [float(side[: at[0]].max()) for side, at in zip((left, right), lower, strict=True) if len(at)]
        depths.append(min(passes, default=math.inf) - u[i])
    return np.sort(np.array(depths))[::-1]


def _two_wells(ordered: np.ndarray, wells: np.ndarray, flow: str, frame: str) -> CriticalTime:
    """The level at which one well becomes two, going down the levels."""
    answer = partial(CriticalTime, criterion="arc", flow=flow, frame=frame, source=ARC)
    if not (wells >= 2).any():
        return answer(None, reason=f"one well at most at every level down to sigma = {ordered[-1]:.4g}; try lower ones")
    first = int(np.argmax(wells >= 2))
    if first == 0:
        reason = f"two wells or more at the highest level already, sigma = {ordered[0]:.4g}; try higher ones"
        return answer(None, reason=reason)
    low, high = math.log(ordered[first]), math.log(ordered[first - 1])
    middle, *ends = (level_at(lam, frame) for lam in (0.5 * (low + high), low, high))
    return answer(middle, *ends, reason="between two of the levels given, along one arc", interval="bracket")
