"""The stability of a trained network's flow: its centre followed down from high noise, and where other wells appear.

At high noise a flow has one fixed point D(x*) = kappa x* (`symbreak.phases.fixed_point_search` has kappa for every flow
and frame). Going down, one of three things happens to it:

    it loses stability      the top eigenvalue of J = dD/dx at x* passes kappa: classes that mirror each other
    it ends in a fold       it meets an unstable point and both vanish
    it turns into a well    data without a symmetry: nothing crosses, and other wells appear beside it

At high noise x* lies far inside the shell |x| ~ sigma sqrt(d) on which a network was trained: there it extrapolates,
and its fixed point can be far from the data's mean.

So two levels are given: where the centre loses stability, and where a second stable fixed point exists. A network's J
need not be symmetric: eigenvalues are of J itself, and the asymmetry is stated.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693 (stability); the rest is derived for this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime, Levels
from symbreak.laws.law import Law
from symbreak.networks.denoiser import Denoiser, as_denoiser, fingerprints
from symbreak.noise import NoiseLevel
from symbreak.phases.fixed_point_search import (
    SOURCE,
    System,
    Track,
    central_point,
    checked_flow,
    distinct,
    follow,
    level_at,
    loss_of_stability,
)
from symbreak.phases.potentials import levels_within, plain_fields, trajectories
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run, renamed
from symbreak.runtime.shown import Shown

__all__ = ["Stability", "network_stability", "stability_times"]

FOLD = 0.8  # top eigenvalue over threshold from which a branch that ends did so in a fold, where it is 1


@dataclass(frozen=True)
class Stability(Shown):
    """The central fixed point of a flow, level by level, in the order in which the levels came.

    Attributes:
        sigma: levels [G].
        states: the fixed point [G, *S] in the frame named; NaN where it was lost.
        eigenvalues: real parts of the leading eigenvalues of J = dD/dx there [G, k], falling.
        threshold: kappa [G]: the point is unstable where the top eigenvalue is larger.
        asymmetry: \\|J - J^T\\| / \\|J + J^T\\| [G], Frobenius.
        directions: their unit eigenvectors as images [G, k, *S], largest entry positive.
        wells: stable fixed points that were found at each level [G]: a lower bound; 0 where none were looked for.
        critical: where stability is lost first, going down (criterion ``"bifurcation"``).
        splitting: the highest level at which a second stable fixed point was found (criterion ``"wells"``).
        jumps: levels just above those where the branch ended or could not be followed, falling.
        flow, frame: of which flow.
        reason: where the point was lost or jumped; ``None`` where it was followed throughout.
    """

    sigma: np.ndarray
    states: torch.Tensor
    eigenvalues: np.ndarray
    threshold: np.ndarray
    asymmetry: np.ndarray
    directions: torch.Tensor
    wells: np.ndarray
    critical: CriticalTime
    splitting: CriticalTime
    jumps: tuple[float, ...]
    flow: str
    frame: str
    reason: str | None

    @property
    def margin(self) -> np.ndarray:
        """Top eigenvalue less the threshold [G]: above zero is unstable."""
        return self.eigenvalues[:, 0] - self.threshold

    @property
    def direction(self) -> torch.Tensor:
        """The unstable direction [*S]: leading eigenvector at the highest unstable level, else at the largest
        margin over its threshold."""
        relative = np.nan_to_num(self.margin / self.threshold, nan=-math.inf)
        unstable = np.flatnonzero(relative > 0)
        where = unstable[np.argmax(self.sigma[unstable])] if len(unstable) else int(np.argmax(relative))
        return self.directions[int(where), 0]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records; the images stay here."""
        return {**plain_fields(self, "states", "directions"), "margin": self.margin.tolist()}


@dataclass
class _Descent:
    """The centre's way down: a part a level, the highest first.

    Attributes:
        system: the flow's equation.
        lams: log sigma [G], falling.
        start: lam and w of the highest point found.
        parts: arrays of `_at` for each level.
        part: makes a finished part of this search.
        answer: makes a `CriticalTime` of this flow and frame.
    """

    system: System
    lams: list[float]
    start: Arrays
    parts: list[Arrays]
    part: Callable[[str, Callable[[], Arrays]], Arrays]
    answer: Callable[..., CriticalTime]

    def all(self, name: str) -> np.ndarray:
        """An array of every level [G, ...]."""
        return np.stack([part[name] for part in self.parts])

    @property
    def span(self) -> str:
        return f"from sigma = {math.exp(self.lams[0]):.4g} down to {math.exp(self.lams[-1]):.4g}"


@renamed()
def network_stability(
    denoiser_or_law: Law | Denoiser,
    sigma: Levels,
    flow: str = "sde",
    frame: str = "ve",
    x0: torch.Tensor | None = None,
    directions: int = 1,
    seed: int = 0,
    starts: torch.Tensor | None = None,
    wells: bool = True,
    run: Run | None = None,
) -> Stability:
    """The central fixed point of a network's flow, followed down from high noise, and its stability.

        D(x*) = kappa x*;  unstable where the top eigenvalue (real part) of dD/dx at x* exceeds kappa

    The point is followed from the highest level of the network at which it is found, in steps of at most 1.25 in
    sigma. Eigenvalues come from all columns of the Jacobian up to d = 256 (laws 1,024), above by Arnoldi from
    forward-mode products. Other stable points are looked for at the lowest level, from clean samples, and followed up
    until they vanish.

    Args:
        denoiser_or_law: a denoiser d(x, sigma), or a law.
        sigma: levels [G].
        flow: ``"sde"`` (reverse SDE) or ``"ode"`` (probability flow); alike in VE.
        frame: ``"ve"`` or ``"vp"``. VP criteria depend on the data's scale and can fire where nothing breaks.
        x0: a guess of the clean state E[x_0 | x*], [*S] at high noise; by default zero (a law's mean).
        directions: leading eigenvalues and directions to keep, k.
        seed: of the trajectories whose ends look for wells, and of the spread in the interval.
        starts: clean samples [n, *S] to look for wells from; by default the ends of 16 trajectories of the
            probability flow.
        wells: look for other stable points too, about half of the time.
        run: where finished parts are kept, and whom to tell.

    Returns:
        A `Stability`. The interval of ``critical`` is numerical: the tolerance of the root finding and the spread of
        the top eigenvalue over three starting points around the fixed point, divided by its slope; of ``splitting``:
        the two levels between which the second stable point appears.

    Raises:
        InputError: for levels outside the network's, an unknown flow or frame, or ``x0`` or ``starts`` of another
            shape.

    Source: arXiv:2305.19693; general criterion derived for this package.
    """
    if int(directions) != directions or directions < 1:
        raise InputError(f"{directions} directions; expected a whole number of at least 1.")
    run = (run or Run()).named("stability")
    checked_flow(flow, frame)
    denoiser = as_denoiser(denoiser_or_law)
    s = levels_within(denoiser, sigma)
    system = System(denoiser_or_law, flow, frame, x0)
    rows = None if starts is None else system.starts(starts)
    k = min(int(directions), system.dim)
    falling = np.argsort(-s, kind="stable")
    lams = np.log(s[falling]).tolist()
    steps, total = count(1), (2 if wells else 1) * (len(lams) + 1)
    decides = [*fingerprints(run, denoiser_or_law), torch.from_numpy(system.centre), lams, k, seed]
    decides += [None if rows is None else torch.from_numpy(rows)]

    def part(key: str, make: Callable[[], Arrays]) -> Arrays:
        return run.part(f"stability/{flow}-{frame}/{key}", make, *decides)

    start = part("start", lambda: _start(system, lams[0]))
    down = _Descent(system, lams, start, [], part, partial(CriticalTime, flow=flow, frame=frame, source=SOURCE))
    w, lam = start["w"], float(start["lam"])
    for i, to in enumerate(lams):
        down.parts.append(part(str(i), partial(_at, system, w, lam, to, k)))
        w, lam = down.parts[-1]["w"], to
        run.tell(next(steps), total)
    critical = _critical(down, seed)
    run.tell(next(steps), total)
    counts, splitting = np.zeros(len(lams), dtype=np.int64), down.answer(None, reason="not looked for")
    if wells:
        if rows is None:
            rows = part("ends", lambda: {"ends": _ends(system, seed)})["ends"]
        counts, splitting = _splitting(down, rows, lambda: run.tell(next(steps), total))
    if critical.sigma and splitting.low and critical.sigma < splitting.low.sigma:
        also = f"{critical.reason}; other wells exist from sigma = {splitting.low.sigma:.4g} down already"
        critical = replace(critical, reason=also)
    back = np.argsort(falling, kind="stable")
    kappas = np.array([system.kappa(lam) for lam in lams])[back]
    alphas = np.array([NoiseLevel(u).alpha if frame == "vp" else 1.0 for u in s.tolist()])
    states = down.all("w")[back] * (alphas / kappas)[:, None]
    return Stability(
        sigma=s,
        states=torch.from_numpy(states.reshape(len(s), *system.shape)),
        eigenvalues=kappas[:, None] * down.all("values")[back],
        threshold=kappas,
        asymmetry=down.all("asymmetry")[back],
        directions=torch.from_numpy(down.all("vectors")[back].reshape(len(s), k, *system.shape)),
        wells=counts[back],
        critical=critical,
        splitting=splitting,
        jumps=tuple(math.exp(j) for j in down.all("jumped") if not math.isnan(j)),
        flow=flow,
        frame=frame,
        reason=_history(down),
    )


def stability_times(
    denoiser_or_law: Law | Denoiser,
    sigma: Levels,
    pairs: Sequence[tuple[str, str]] = (("sde", "ve"), ("sde", "vp"), ("ode", "vp")),
    **settings: Any,
) -> list[CriticalTime]:
    """`network_stability` for several flows and frames: the level where the centre loses stability in each.

    Both flows of the VE frame share their fixed points and are computed once.

    Args:
        denoiser_or_law, sigma: as there.
        pairs: (flow, frame).
        **settings: passed on to `network_stability`; ``wells`` is off.

    Returns:
        One `CriticalTime` a pair.
    """
    known: dict[tuple[str, str], CriticalTime] = {}
    for flow, frame in pairs:
        checked_flow(flow, frame)
        same = ("sde" if frame == "ve" else flow, frame)
        if same not in known:
            known[same] = network_stability(denoiser_or_law, sigma, *same, **{"wells": False, **settings}).critical
    return [replace(known["sde" if frame == "ve" else flow, frame], flow=flow) for flow, frame in pairs]


def _start(system: System, top: float) -> Arrays:
    """The central fixed point at the highest level at which it is found, NaN where it is nowhere."""
    w, lam = central_point(system, top)
    return {"w": np.full(system.dim, math.nan) if w is None else w, "lam": np.array(lam)}


def _at(system: System, w: np.ndarray, lam: float, to: float, k: int) -> Arrays:
    """The fixed point at a level, followed from the one above, with its leading eigenvalues over kappa."""
    new, brink = follow(system, w, lam, to) if np.isfinite(w).all() else (None, None)
    if new is None:
        lost, values, vectors = np.full(system.dim, math.nan), np.full(k, math.nan), np.full((k, system.dim), math.nan)
    else:
        lost, (values, vectors) = new, system.leading(new, to, k)
    return {
        "w": lost,
        "values": values,
        "vectors": vectors,
        "asymmetry": np.array(math.nan if new is None else system.asymmetry(new, to)),
        "jumped": np.array(math.nan if brink is None else brink[1]),
        "brink": np.array(math.nan if brink is None else 1.0 + system.excess(*brink)),
    }


def _history(down: _Descent) -> str | None:
    """Where the point was lost or jumped, in one line."""
    if not np.isfinite(down.start["w"]).all():
        return f"no fixed point was found at sigma = {math.exp(down.lams[0]):.4g} or above. Pass x0= or lower levels."
    said = []
    fell = [f"{math.exp(j):.4g}" for j in down.all("jumped") if not math.isnan(j)]
    if not np.isfinite(down.parts[-1]["w"]).all():
        said.append(f"the fixed point is lost below sigma = {fell.pop()}")
    if fell:
        said.append(f"it fell to another point at sigma = {', '.join(fell)}")
    if float(down.start["lam"]) < math.log(down.system.high) - 1e-9:
        said.append(f"there is no fixed point to be found above sigma = {math.exp(float(down.start['lam'])):.4g}")
    return "; ".join(said) or None


def _critical(down: _Descent, seed: int) -> CriticalTime:
    """Where the centre first loses stability, going down the levels."""
    system, lams, frame = down.system, down.lams, down.system.frame
    answer = partial(down.answer, criterion="bifurcation")
    excess = down.all("values")[:, 0] - 1.0
    threshold = max(1e-11, 3 * system.noise)
    if not np.isfinite(excess).any():
        return answer(None, reason=f"no fixed point was found {down.span}. Try other levels or pass x0=")
    stable = False
    for i, value in enumerate(excess):
        jumped, brink = float(down.parts[i]["jumped"]), float(down.parts[i]["brink"])
        if not math.isnan(jumped) and (stable or i == 0):
            if brink < FOLD:
                reason = (
                    f"the central fixed point cannot be followed below sigma = {math.exp(jumped):.4g}, where it is "
                    f"stable (top eigenvalue {brink:.2f} of the threshold). Try more levels or pass x0="
                )
                return answer(None, reason=reason)
            reason = (
                f"the central fixed point ends here in a fold (top eigenvalue {brink:.2f} of the threshold just "
                "above); the interval is of two levels"
            )
            above = lams[i - 1] if i else float(down.start["lam"])
            return answer(
                *(level_at(lam, frame) for lam in (jumped, lams[i], above)), reason=reason, interval="bracket"
            )
        if stable and value > threshold:
            made = down.part("critical", partial(_refined, down, i, seed))
            lam, half = float(made["lam"]), float(made["half"])
            reason = "the interval is numerical: root finding and spread over starting points"
            if not system.is_law:
                asymmetry = float(np.max(down.all("asymmetry")[i - 1 : i + 1]))
                reason += f"; the network's Jacobian is asymmetric by {asymmetry:.1%}"
            return answer(
                *(level_at(v, frame) for v in (lam, lam - half, lam + half)), reason=reason, interval="bracket"
            )
        stable = stable or value <= threshold
    if not stable:
        known = np.exp(lams)[np.isfinite(excess)]
        reason = (
            f"the central fixed point is unstable at every level where it is found, from sigma = {known[0]:.4g} "
            f"down to {known[-1]:.4g}: there is no crossing; try higher levels, or another flow or frame"
        )
        return answer(None, reason=reason)
    worst = int(np.nanargmax(excess))
    reason = (
        f"the central fixed point stays stable {down.span}: its top eigenvalue reaches {1 + excess[worst]:.2f} of the "
        f"threshold at sigma = {math.exp(lams[worst]):.4g}. Where the wells split says more, or try lower levels"
    )
    return answer(None, reason=reason)


def _refined(down: _Descent, below: int, seed: int) -> Arrays:
    """log sigma at which the top eigenvalue crosses between a level and the one above, and half its interval."""
    system, ends = down.system, (down.lams[below], down.lams[below - 1])
    values = dict(zip(ends, (float(down.parts[i]["values"][0]) - 1.0 for i in (below, below - 1)), strict=True))
    if values[ends[0]] * values[ends[1]] >= 0:
        return {"lam": np.array(0.5 * sum(ends)), "half": np.array(0.5 * (ends[1] - ends[0]))}
    track = Track(system, {lam: down.parts[i]["w"] for lam, i in zip(ends, (below, below - 1), strict=True)})
    lam, seen = loss_of_stability(track, *ends, values)
    doubt = 1e-13 if system.exact else 1e-4
    left = max((other for other in seen if other < lam - 10 * doubt), default=ends[0])
    right = min((other for other in seen if other > lam + 10 * doubt), default=ends[1])
    slope = (seen[right] - seen[left]) / (right - left)
    rng = np.random.default_rng([seed, 31])
    around = [seen[lam]]
    for _ in range(2):
        v = rng.standard_normal(system.dim)
        nearby = track.points[lam] + 1e-2 * system.scale * v / np.linalg.norm(v)
        w = system.newton(nearby, lam, within=0.5 * system.scale)
        if w is not None:
            around.append(system.excess(w, lam))
    return {"lam": np.array(lam), "half": np.array(doubt + (max(around) - min(around)) / max(abs(slope), 1e-12))}


def _ends(system: System, seed: int) -> np.ndarray:
    """Clean states at the ends of 16 trajectories [16, d]."""
    ends = trajectories(system.source, range(seed, seed + 16), system.high, system.low)[1]
    return ends.double().numpy().reshape(16, -1)


def _splitting(down: _Descent, starts: np.ndarray, tell: Callable[[], None]) -> tuple[np.ndarray, CriticalTime]:
    """Stable fixed points at each falling level, and the highest level with two of them."""
    system, lams = down.system, down.lams
    answer = partial(down.answer, criterion="wells")
    counts, rows, followed = np.zeros(len(lams), dtype=np.int64), starts, {}
    for i in reversed(range(len(lams))):
        centre = [down.parts[i]["w"]] if down.parts[i]["values"][0] <= 1.0 else []
        made = down.part(f"wells/{i}", partial(_settled, system, rows, centre, lams[i]))
        rows, counts[i] = made["rows"], int(made["count"])
        followed[i] = rows
        tell()
    several = np.flatnonzero(counts >= 2)
    tell()
    if not len(several):
        reason = f"no second stable fixed point was found {down.span}, from {len(starts)} starts; try lower levels"
        return counts, answer(None, reason=reason)
    below = int(several[0])
    if below == 0:
        top = f"{math.exp(lams[0]):.4g}"
        reason = f"several fixed points are stable at every level up to sigma = {top}; try higher ones"
        return counts, answer(None, reason=reason)
    made = down.part("splitting", partial(_bracket, system, followed[below], lams[below], lams[below - 1]))
    low, high = float(made["low"]), float(made["high"])
    reason = (
        f"the highest level found, from {len(starts)} starts: others may reach higher; the interval brackets this one"
    )
    return counts, answer(
        *(level_at(v, system.frame) for v in (0.5 * (low + high), low, high)), reason=reason, interval="bracket"
    )


def _settled(system: System, rows: np.ndarray, centre: list[np.ndarray], lam: float) -> Arrays:
    """Rows followed to a level, and how many distinct stable points they have settled at, with the centre.

    `symbreak.phases.fixed_point_search.wells_at` for networks: each row that stands still costs no eigenvalue, and two
    points that Newton confirms decide.
    """
    far = 0.1 * system.scale
    rows = np.concatenate([rows, *(w[None] for w in distinct(centre, far, list(rows)))])
    for _ in range(10):
        before = rows
        rows = system.settle(rows, lam, 10, 1.0 if system.exact else 0.5)
        if len(rows) != len(before) or not len(rows):
            continue
        rows = np.stack(distinct(rows, 1e-2 * system.scale))
        if len(rows) == len(before) and np.linalg.norm(rows - before, axis=1).max() < 1e-3 * system.scale:
            break
    stable: list[np.ndarray] = []
    residuals = np.linalg.norm(np.stack([system.residual(w, lam) for w in rows]), axis=1) if len(rows) else np.empty(0)
    check, tried = system.dense or system.exact, 0
    for i in np.argsort(residuals, kind="stable"):
        still = residuals[i] <= 1e-2 * system.scale
        if residuals[i] > 0.3 * system.scale:
            break
        if len(stable) >= 2:
            stable += distinct([rows[i]] if still else [], far, stable)
        elif tried < 6 and distinct([rows[i]], far, stable):
            tried += 1
            w = system.newton(rows[i], lam, within=0.5 * system.scale)
            # The iteration leaves unstable points, so that a point it stands still at is stable: eigenvalues of a
            # large network would cost more than all the rest.
            if w is not None and (system.excess(w, lam) <= max(1e-9, 3 * system.noise) if check else still):
                stable += distinct([w], far, stable)
    return {"rows": rows, "count": np.array(len(stable))}


def _bracket(system: System, rows: np.ndarray, low: float, high: float) -> Arrays:
    """log sigma between which the second stable point appears, to 2 %."""
    while high - low > 0.02:
        middle = 0.5 * (low + high)
        made = _settled(system, rows, [], middle)
        if int(made["count"]) >= 2:
            low, rows = middle, made["rows"]
        else:
            high = middle
    return {"low": np.array(low), "high": np.array(high)}
