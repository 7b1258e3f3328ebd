"""The landscape of a trained network: its centre followed down from high noise, and the potential along an arc.

At high noise a flow has one fixed point D(x*) = kappa x* (`symbreak.phases.bifurcation` has kappa for every flow
and frame). Going down, one of three things happens to it:

    it loses stability      the top eigenvalue of J = dD/dx at x* passes kappa: classes that mirror each other
    it ends in a fold       it meets an unstable point and both vanish
    it turns into a well    data without a symmetry: nothing crosses, and other wells appear beside it

At high noise x* lies far inside the shell |x| ~ sigma sqrt(d) on which a network was trained: there it extrapolates,
and its fixed point can be far from the data's mean.

So two levels are given: where the centre loses stability, and where a second stable fixed point exists. A network's J
need not be symmetric: eigenvalues are of J itself, and the asymmetry is stated.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693 (stability, potential on an arc); the rest is derived for this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from symbreak.critical import CriticalTime, levels
from symbreak.laws.class_posterior import class_of
from symbreak.networks.denoiser import as_denoiser, ask
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.bifurcation import SOURCE, potential
from symbreak.phases.fixed_points import System, central_point, checked_flow, distinct, follow, level_at, rates
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Keep, Progress, unkept

__all__ = ["Arc", "Stability", "arc_potential", "network_stability", "stability_times"]

DENSE = 256  # above it, eigenvalues of a network's Jacobian by products: cheaper than all its columns
FOLD = 0.8  # top eigenvalue over threshold from which a branch that ends did so in a fold, where it is 1
STEPS = 40  # of the probability flow
ARC = "arXiv:2305.19693, potential along an arc between two trajectories"


@dataclass(frozen=True)
class Stability:
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
        return {
            "sigma": self.sigma.tolist(),
            "eigenvalues": self.eigenvalues.tolist(),
            "threshold": self.threshold.tolist(),
            "margin": self.margin.tolist(),
            "asymmetry": self.asymmetry.tolist(),
            "wells": self.wells.tolist(),
            "critical": self.critical.to_dict(),
            "splitting": self.splitting.to_dict(),
            "jumps": list(self.jumps),
            "flow": self.flow,
            "frame": self.frame,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Arc:
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
        seeds: of their noise, ``None`` where the noise was given.
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
        return {
            "sigma": self.sigma.tolist(),
            "angle": self.angle.tolist(),
            "value": self.value.tolist(),
            "error": self.error.tolist(),
            "wells": self.wells.tolist(),
            "depth": self.depth.tolist(),
            "threshold": self.threshold,
            "seeds": None if self.seeds is None else list(self.seeds),
            "critical": self.critical.to_dict(),
            "flow": self.flow,
            "frame": self.frame,
        }


def _asked(denoiser: Any, sigma: Any) -> np.ndarray:
    s, _ = levels(sigma)
    low, high = denoiser.sigma_range
    if not (low * (1 - 1e-9) <= s.min() and s.max() <= high * (1 + 1e-9)):
        raise InputError(
            f"levels from {s.min():.4g} to {s.max():.4g}; the denoiser knows {low:.4g} to {high:.4g}. Pass levels in "
            "that range."
        )
    return s


def network_stability(
    denoiser_or_law: Any,
    sigma: float | np.ndarray | torch.Tensor,
    flow: str = "sde",
    frame: str = "ve",
    x0: torch.Tensor | None = None,
    directions: int = 1,
    seed: int = 0,
    starts: torch.Tensor | None = None,
    wells: bool = True,
    progress: Progress | None = None,
    keep: Keep | None = None,
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
        x0: a guess of the clean state E[x_0 | x*] [*S] at high noise; by default zero (a law's mean).
        directions: leading eigenvalues and directions to keep, k.
        seed: of the trajectories whose ends look for wells, and of the spread in the interval.
        starts: clean samples [n, *S] to look for wells from; by default the ends of 16 trajectories of the
            probability flow.
        wells: look for other stable points too, about half of the time.
        progress: called with (blocks done, of how many).
        keep: ``keep(key, make)`` gives stored arrays of a block, or stores those that make() gives.

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
        raise InputError(f"{directions} directions asked for; expected a whole number of at least 1.")
    keep = keep or unkept
    checked_flow(flow, frame)
    denoiser = as_denoiser(denoiser_or_law)
    given = _asked(denoiser, sigma)
    is_law = hasattr(denoiser_or_law, "denoise")
    system = System(denoiser_or_law, flow, frame, x0, **({} if is_law else {"dense": DENSE}))
    k = min(int(directions), system.dim)
    falling = np.argsort(-given, kind="stable")
    lams = np.log(given[falling])
    name, total, done = f"stability/{flow}-{frame}", (2 if wells else 1) * (len(lams) + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    start = keep(f"{name}/start", lambda: _first(system, float(lams[0])))
    w, lam = start["w"], float(start["lam"])
    found: list[Arrays] = []
    for i, to in enumerate(lams):
        block = keep(f"{name}/{i}", lambda w=w, lam=lam, to=float(to): _at(system, w, lam, to, k))  # type: ignore[misc]
        found.append(block)
        w, lam = block["w"], float(to)
        advance()
    values = np.stack([b["values"] for b in found])
    jumps = [float(b["jumped"]) for b in found]
    about: dict[str, Any] = {"flow": flow, "frame": frame, "source": SOURCE}
    critical = _critical(system, start, lams, found, seed, keep, name, about)
    advance()
    counts, splitting = np.zeros(len(lams), dtype=np.int64), CriticalTime(None, reason="not looked for", **about)
    if wells:
        counts, splitting = _splitting(system, denoiser_or_law, lams, found, starts, seed, keep, name, about, advance)

    if critical.sigma and splitting.low and critical.sigma < splitting.low.sigma:
        also = f"{critical.reason}; other wells exist from sigma = {splitting.low.sigma:.4g} down already"
        critical = replace(critical, reason=also)

    back = np.argsort(falling, kind="stable")
    alphas = np.array([NoiseLevel(float(s)).alpha if frame == "vp" else 1.0 for s in given])
    kappas = np.array([rates(flow, frame, float(s))[0] for s in given])
    states = np.stack([b["w"] for b in found])[back] * (alphas / kappas)[:, None]
    vectors = np.stack([b["vectors"] for b in found])[back]
    return Stability(
        given,
        torch.from_numpy(states.reshape(len(given), *system.shape)),
        values[back],
        kappas,
        np.array([float(b["asymmetry"]) for b in found])[back],
        torch.from_numpy(vectors.reshape(len(given), k, *system.shape)),
        counts[back],
        critical,
        splitting,
        tuple(math.exp(j) for j in jumps if not math.isnan(j)),
        flow,
        frame,
        _history(system, start, lams, found, jumps),
    )


def stability_times(
    denoiser_or_law: Any,
    sigma: float | np.ndarray | torch.Tensor,
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
    out = []
    for flow, frame in pairs:
        checked_flow(flow, frame)
        same = ("sde", frame) if frame == "ve" else (flow, frame)
        if same not in known:
            known[same] = network_stability(denoiser_or_law, sigma, *same, **{"wells": False, **settings}).critical
        out.append(replace(known[same], flow=flow))
    return out


def _first(system: System, top: float) -> Arrays:
    """The central fixed point at the highest level at which it is found, NaN where it is nowhere."""
    lam = math.log(system.high)
    w = central_point(system, system.high) if system.exact else None
    while w is None and lam > top:
        w = system.contract(system.centre, lam)
        lam = lam if w is not None else max(lam - math.log(1.25), top)
    if w is None:
        w = central_point(system, math.exp(top))
    return {"w": np.full(system.dim, math.nan) if w is None else w, "lam": np.array(lam)}


def _at(system: System, w: np.ndarray, lam: float, to: float, k: int) -> Arrays:
    """The fixed point at a level, followed from the one above, with its leading eigenvalues."""
    new, brink = follow(system, w, lam, to) if np.isfinite(w).all() else (None, None)
    if new is None:
        nowhere = np.full(system.dim, math.nan)
        values, vectors, asymmetry = np.full(k, math.nan), np.full((k, system.dim), math.nan), math.nan
    else:
        nowhere, (values, vectors) = new, system.leading(new, to, k)
        asymmetry = 0.0 if system.is_law else system.asymmetry(new, to)
    return {
        "w": nowhere,
        "values": values,
        "vectors": vectors,
        "asymmetry": np.array(asymmetry),
        "jumped": np.array(math.nan if brink is None else brink[1]),
        "brink": np.array(math.nan if brink is None else system.top(*brink)),
    }


def _history(system: System, start: Arrays, lams: np.ndarray, found: list[Arrays], jumps: list[float]) -> str | None:
    """Where the point was lost or jumped, in one line."""
    if not np.isfinite(start["w"]).all():
        return f"no fixed point was found at sigma = {math.exp(lams[0]):.4g} or above. Pass x0= or lower levels."
    said = []
    fell = [f"{math.exp(j):.4g}" for j in jumps if not math.isnan(j)]
    lost = not np.isfinite(found[-1]["w"]).all()
    if lost:
        said.append(f"the fixed point is lost below sigma = {fell[-1]}")
    if fell[: len(fell) - lost]:
        said.append(f"it fell to another point at sigma = {', '.join(fell[: len(fell) - lost])}")
    if float(start["lam"]) < math.log(system.high) - 1e-9:
        said.append(f"there is no fixed point to be found above sigma = {math.exp(float(start['lam'])):.4g}")
    return "; ".join(said) or None


def _critical(
    system: System,
    start: Arrays,
    lams: np.ndarray,
    found: list[Arrays],
    seed: int,
    keep: Keep,
    name: str,
    about: dict[str, Any],
) -> CriticalTime:
    """Where the centre first loses stability, going down the levels."""
    about = {"criterion": "bifurcation", **about}
    kappas = np.array([system.kappa(float(lam)) for lam in lams])
    excess = np.array([float(b["values"][0]) for b in found]) / kappas - 1.0
    threshold = max(1e-11, 3 * system.noise)
    span = f"from sigma = {math.exp(lams[0]):.4g} down to {math.exp(lams[-1]):.4g}"
    if not np.isfinite(excess).any():
        return CriticalTime(None, reason=f"no fixed point was found {span}. Try other levels or pass x0=", **about)
    stable = False
    for i, value in enumerate(excess):
        jumped = float(found[i]["jumped"])
        if not math.isnan(jumped) and (stable or i == 0):
            brink = float(found[i]["brink"])
            if brink < FOLD:
                reason = (
                    f"the central fixed point cannot be followed below sigma = {math.exp(jumped):.4g}, where it is "
                    f"stable (top eigenvalue {brink:.2f} of the threshold). Try more levels or pass x0="
                )
                return CriticalTime(None, reason=reason, **about)
            above = lams[i - 1] if i else float(start["lam"])
            reason = (
                f"the central fixed point ends here in a fold (top eigenvalue {brink:.2f} of the threshold just "
                "above); the interval is of two levels"
            )
            ends = level_at(float(lams[i]), system.frame), level_at(float(above), system.frame)
            return CriticalTime(level_at(jumped, system.frame), *ends, reason=reason, **about)
        if stable and value > threshold:
            got = keep(f"{name}/critical", lambda i=i: _refined(system, lams, found, i, seed))  # type: ignore[misc]
            lam, half = float(got["lam"]), float(got["half"])
            asymmetry = max(float(found[i - 1]["asymmetry"]), float(found[i]["asymmetry"]))
            reason = "the interval is numerical: root finding and spread over starting points"
            if not system.is_law:
                reason += f"; the network's Jacobian is asymmetric by {asymmetry:.1%}"
            level = level_at(lam, system.frame)
            return CriticalTime(
                level, level_at(lam - half, system.frame), level_at(lam + half, system.frame), reason=reason, **about
            )
        stable = stable or value <= threshold
    if not stable:
        known = np.exp(lams[np.isfinite(excess)])
        reason = (
            f"the central fixed point is unstable at every level where it is found, from sigma = {known[0]:.4g} "
            f"down to {known[-1]:.4g}: there is no crossing; try higher levels, or another flow or frame"
        )
        return CriticalTime(None, reason=reason, **about)
    worst = int(np.nanargmax(excess))
    reason = (
        f"the central fixed point stays stable {span}: its top eigenvalue reaches {1 + excess[worst]:.2f} of the "
        f"threshold at sigma = {math.exp(lams[worst]):.4g}. Where the wells split says more, or try lower levels"
    )
    return CriticalTime(None, reason=reason, **about)


def _refined(system: System, lams: np.ndarray, found: list[Arrays], below: int, seed: int) -> Arrays:
    """log sigma at which the top eigenvalue crosses between a level and the one above, and half its interval."""
    above = below - 1
    seen = {float(lams[i]): system.excess(found[i]["w"], float(lams[i])) for i in (above, below)}
    held = {float(lams[i]): found[i]["w"] for i in (above, below)}

    def excess(lam: float) -> float:
        if lam not in seen:
            near = min((h for h in held if h >= lam), key=lambda h: h - lam)
            w, _ = follow(system, held[near], near, lam)
            held[lam] = held[near] if w is None else w
            seen[lam] = system.excess(held[lam], lam)
        return seen[lam]

    # A float32 network knows its top eigenvalue to about 1e-5 at best, and each value costs seconds.
    xtol = 1e-13 if system.exact else 1e-4
    a, b = float(lams[below]), float(lams[above])
    if seen[a] * seen[b] >= 0:
        return {"lam": np.array(0.5 * (a + b)), "half": np.array(0.5 * (b - a))}
    lam = float(brentq(excess, a, b, xtol=xtol, rtol=8.9e-16))
    excess(lam)
    left = max((key for key in seen if key < lam - 10 * xtol), default=a)
    right = min((key for key in seen if key > lam + 10 * xtol), default=b)
    slope = (seen[right] - seen[left]) / (right - left)
    rng = np.random.default_rng([seed, 31])
    around = [seen[lam]]
    for _ in range(2):
        v = rng.standard_normal(system.dim)
        moved = system.near(held[lam] + 1e-2 * system.scale * v / np.linalg.norm(v), lam)
        if moved is not None:
            around.append(system.excess(moved, lam))
    half = xtol + (max(around) - min(around)) / max(abs(slope), 1e-12)
    return {"lam": np.array(lam), "half": np.array(half)}


def _splitting(
    system: System,
    source: Any,
    lams: np.ndarray,
    found: list[Arrays],
    starts: torch.Tensor | None,
    seed: int,
    keep: Keep,
    name: str,
    about: dict[str, Any],
    advance: Callable[[], None],
) -> tuple[np.ndarray, CriticalTime]:
    """Stable fixed points at each falling level, and the highest level with two of them."""
    about = {"criterion": "wells", **about}
    if starts is None:
        ends = keep(f"{name}/ends", lambda: {"ends": _ends(system, source, seed)})["ends"]
    else:
        draws = torch.as_tensor(starts)
        if draws.ndim == 0 or len(draws) == 0 or tuple(draws.shape[1:]) != system.shape:
            raise InputError(f"starts of shape {tuple(draws.shape)}; expected clean samples [n, *S], S={system.shape}.")
        ends = draws.detach().double().cpu().numpy().reshape(len(draws), -1)
    counts = np.zeros(len(lams), dtype=np.int64)
    rows = ends
    held: dict[int, np.ndarray] = {}
    for i in range(len(lams) - 1, -1, -1):
        stable = found[i]["values"][0] <= system.kappa(float(lams[i]))
        centre = found[i]["w"] if stable else np.full(system.dim, math.nan)
        block = keep(f"{name}/wells/{i}", lambda i=i, rows=rows, c=centre: _wells(system, rows, c, float(lams[i])))  # type: ignore[misc]
        rows, counts[i] = block["rows"], int(block["count"])
        held[i] = rows
        advance()
    several = np.flatnonzero(counts >= 2)
    span = f"from sigma = {math.exp(lams[0]):.4g} down to {math.exp(lams[-1]):.4g}"
    advance()
    if not len(several):
        reason = f"no second stable fixed point was found {span}, from {len(ends)} starts; try lower levels"
        return counts, CriticalTime(None, reason=reason, **about)
    if several[0] == 0:
        reason = (
            f"several fixed points are stable at every level up to sigma = {math.exp(lams[0]):.4g}; try higher ones"
        )
        return counts, CriticalTime(None, reason=reason, **about)
    below = int(several[0])
    got = keep(f"{name}/splitting", lambda: _bracket(system, held[below], float(lams[below]), float(lams[below - 1])))
    low, high = float(got["low"]), float(got["high"])
    reason = (
        f"the highest level found, from {len(ends)} starts: others may reach higher; the interval brackets this one"
    )
    ends_of = level_at(low, system.frame), level_at(high, system.frame)
    return counts, CriticalTime(level_at(0.5 * (low + high), system.frame), *ends_of, reason=reason, **about)


def _ends(system: System, source: Any, seed: int) -> np.ndarray:
    """Clean states at the ends of 16 trajectories [16, d]."""
    noise = torch.stack([_noise(seed + i, system.shape) for i in range(16)])
    return _flow(source, noise, system.high, np.empty(0), system.low)[1].double().numpy().reshape(16, -1)


def _wells(system: System, rows: np.ndarray, centre: np.ndarray, lam: float, iterations: int = 100) -> Arrays:
    """Rows followed to a level, and how many distinct stable points they have settled at, with the centre."""
    if np.isfinite(centre).all() and not any(np.linalg.norm(r - centre) < 0.1 * system.scale for r in rows):
        rows = np.concatenate([rows, centre[None]])
    for _ in range(iterations // 10):
        before = rows
        rows = system.settle(rows, lam, 10, 1.0 if system.exact else 0.5)
        if len(rows) != len(before) or not len(rows):
            continue
        rows = np.stack(distinct(rows, 1e-2 * system.scale))
        if len(rows) == len(before) and np.linalg.norm(rows - before, axis=1).max() < 1e-3 * system.scale:
            break
    stable: list[np.ndarray] = []
    residuals = np.array([np.linalg.norm(system.residual(row, lam)) for row in rows])
    check = system.dense or system.exact
    tried = 0
    for i in np.argsort(residuals, kind="stable"):
        row = rows[i]
        if residuals[i] > 0.3 * system.scale:
            break
        # Two that Newton confirms decide; the others count where the iteration stands still.
        if len(stable) < 2:
            if tried == 6 or not distinct(row[None], 0.1 * system.scale, stable):
                continue
            tried += 1
            point = system.near(row, lam)
            # The iteration leaves unstable points, so that a point it stands still at is stable: eigenvalues of a
            # large network would cost more than all the rest.
            unstable = system.excess(point, lam) > max(1e-9, 3 * system.noise) if check and point is not None else False
            if point is None or unstable or (not check and residuals[i] > 1e-2 * system.scale):
                continue
        else:
            point = row
            if residuals[i] > 1e-2 * system.scale:
                continue
        if distinct(point[None], 0.1 * system.scale, stable):
            stable.append(point)
    return {"rows": rows, "count": np.array(len(stable))}


def _bracket(system: System, rows: np.ndarray, low: float, high: float) -> Arrays:
    """log sigma between which the second stable point appears, to 2 %."""
    nowhere = np.full(system.dim, math.nan)
    while high - low > 0.02:
        middle = 0.5 * (low + high)
        block = _wells(system, rows, nowhere, middle)
        if int(block["count"]) >= 2:
            low, rows = middle, block["rows"]
        else:
            high = middle
    return {"low": np.array(low), "high": np.array(high)}


def _noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """White noise of a seed [*S], as `symbreak.generate` draws it."""
    return torch.randn(shape, generator=generator(seed, 0))


def _flow(
    source: Any, noise: torch.Tensor, high: float, at: np.ndarray, low: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability flow from white noise: VE states at falling levels [G, n, *S], and the final images [n, *S].

    dx / dlog sigma = x - D by the second-order multistep rule of DPM-Solver++ (arXiv:2211.01095).
    """
    denoiser = as_denoiser(source)
    grid = np.unique(np.concatenate([np.geomspace(low, high, STEPS), np.clip(at, low, high)]))[::-1]
    x = high * noise.double()
    states: dict[float, torch.Tensor] = {}
    before: tuple[torch.Tensor, float] | None = None
    with torch.no_grad():
        for s, below in pairwise(grid):
            states[float(s)] = x
            mean = ask(denoiser, x, float(s))
            step = math.log(s / below)
            towards = mean if before is None else mean + 0.5 * step / before[1] * (mean - before[0])
            x = towards + (below / s) * (x - towards)
            before = (mean, step)
        states[float(grid[-1])] = x
        ends = ask(denoiser, x, float(grid[-1]))
    wanted = [states[float(np.clip(s, low, high))] for s in at]
    return torch.stack(wanted) if wanted else x.new_zeros(0, *x.shape), ends


def arc_potential(
    denoiser_or_law: Any,
    sigma: float | np.ndarray | torch.Tensor,
    pair: tuple[int, int] | torch.Tensor | None = None,
    seeds: int = 0,
    points: int = 61,
    flow: str = "sde",
    frame: str = "vp",
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    candidates: int = 16,
    depth: float = 0.01,
    tolerance: float | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Arc:
    """The potential along an arc between two trajectories, by level: one well at high noise, two below.

        x(a) = cos(a) x_1 + sin(a) x_2,  a from -0.2 pi to 0.7 pi;  u = - integral of drift . dx along it

    x_1, x_2 are the states, at that level, of two trajectories of the probability flow from white noise.

    Args:
        denoiser_or_law: a denoiser d(x, sigma), or a law.
        sigma: levels [G].
        pair: the seeds of the two trajectories, or their white noise [2, *S]; by default the two of the candidates
            whose final images are farthest apart (among those of different class, with ``classify``).
        seeds: first seed of the candidates.
        points: P along the arc.
        flow, frame: of the drift.
        classify: images [n, *S] -> class [n].
        candidates: trajectories to choose from.
        depth: a minimum counts as a well from this depth on, in the units of u. The stationary density of the reverse
            SDE is exp(-2 u): 0.01 is two per cent of it. At least ten quadrature errors are asked for.
        tolerance: of the line integral, relative; by default 1e-8 for a law and 1e-4 for a denoiser.
        progress: called with (blocks done, of how many).
        keep: ``keep(key, make)`` gives stored arrays of a block, or stores those that make() gives.

    Returns:
        An `Arc`; its critical time is the geometric mean of the two levels between which the second well appears,
        which are its interval.

    Raises:
        InputError: for levels outside the network's, an unknown flow or frame, fewer than 3 points or 2 candidates, a
            ``pair`` of another shape, or a classifier that gives no class for each image.

    Source: arXiv:2305.19693.
    """
    keep = keep or unkept
    checked_flow(flow, frame)
    denoiser = as_denoiser(denoiser_or_law)
    shape = tuple(denoiser.shape)
    given = _asked(denoiser, sigma)
    if points < 3 or candidates < 2:
        raise InputError(f"{points} points and {candidates} candidates; expected at least 3 and 2.")
    falling = np.argsort(-given, kind="stable")
    ordered = given[falling]
    total = len(ordered) + 1
    trajectories = keep("arc/flow", lambda: _pair(denoiser_or_law, ordered, pair, seeds, candidates, classify))
    if progress is not None:
        progress(1, total)
    states = torch.from_numpy(trajectories["states"].copy())
    angle = np.linspace(-0.2 * math.pi, 0.7 * math.pi, points)
    is_law = hasattr(denoiser_or_law, "denoise")
    relative = tolerance if tolerance is not None else 1e-8 if is_law else 1e-4
    value, error = np.zeros((len(ordered), points)), np.zeros(len(ordered))
    wells, deep = np.zeros(len(ordered), dtype=np.int64), np.zeros(len(ordered))
    for i, s in enumerate(ordered):
        alpha = NoiseLevel(float(s)).alpha if frame == "vp" else 1.0
        states[i] *= alpha

        def along(i: int = i, s: float = float(s)) -> Arrays:
            cos, sin = (torch.from_numpy(f(angle)).reshape(-1, *[1] * len(shape)) for f in (np.cos, np.sin))
            u = potential(denoiser_or_law, cos * states[i, 0] + sin * states[i, 1], s, flow, frame, relative)
            return {"value": u.value - u.value.min(), "error": np.array(u.error.max())}

        block = keep(f"arc/{flow}-{frame}/{i}", along)
        value[i], error[i] = block["value"], float(block["error"])
        depths = _depths(value[i])
        wells[i] = int((depths > max(depth, 10 * error[i])).sum())
        deep[i] = depths[1] if len(depths) > 1 else 0.0
        if progress is not None:
            progress(i + 2, total)
    back = np.argsort(falling, kind="stable")
    chosen = trajectories["seeds"]
    return Arc(
        given,
        angle,
        value[back],
        error[back],
        wells[back],
        deep[back],
        depth,
        states[torch.from_numpy(back)],
        torch.from_numpy(trajectories["ends"]),
        (int(chosen[0]), int(chosen[1])) if len(chosen) else None,
        _two_wells(ordered, wells, flow, frame),
        flow,
        frame,
    )


def _pair(
    source: Any,
    ordered: np.ndarray,
    pair: tuple[int, int] | torch.Tensor | None,
    seeds: int,
    candidates: int,
    classify: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Arrays:
    """VE states [G, 2, *S], final images [2, *S] and seeds of the two trajectories."""
    system = System(source, "sde", "ve")
    numbers: list[int] = []
    if isinstance(pair, torch.Tensor):
        noise = pair
        if tuple(noise.shape) != (2, *system.shape):
            raise InputError(f"a pair of shape {tuple(noise.shape)}; expected white noise [2, *S], S = {system.shape}.")
    else:
        numbers = list(range(seeds, seeds + candidates)) if pair is None else [int(i) for i in pair]
        if len(numbers) < 2 or min(numbers) < 0 or (pair is not None and len(numbers) != 2):
            raise InputError(f"a pair of seeds {numbers}; expected two whole numbers of at least 0.")
        noise = torch.stack([_noise(i, system.shape) for i in numbers])
    low, high = min(system.low, float(ordered[-1])), max(system.high, float(ordered[0]))
    states, ends = _flow(source, noise, high, ordered, low)
    apart = torch.cdist(ends.flatten(1), ends.flatten(1)).numpy()
    couples = list(combinations(range(len(ends)), 2))
    if classify is not None and pair is None:
        classes = class_of(classify, ends)
        couples = [(i, j) for i, j in couples if classes[i] != classes[j]] or couples
    i, j = max(couples, key=lambda c: apart[c])
    return {
        "states": states[:, [i, j]].numpy(),
        "ends": ends[[i, j]].double().numpy(),
        "seeds": np.array([numbers[i], numbers[j]] if numbers else [], dtype=np.int64),
    }


def _depths(u: np.ndarray) -> np.ndarray:
    """Depths of the minima inside a curve, falling: up to the lower pass to a deeper one, infinite for the deepest."""
    inner = [i for i in range(1, len(u) - 1) if u[i] < u[i - 1] and u[i] <= u[i + 1]]
    depths = []
    for i in inner:
        left, right = u[i::-1], u[i:]
        # Of two equally deep ones the left one counts as deeper.
        lower = np.flatnonzero(left[1:] <= u[i]) + 1, np.flatnonzero(right < u[i])
        passes = [float(side[: at[0]].max()) for side, at in zip((left, right), lower, strict=True) if len(at)]
        depths.append(min(passes, default=math.inf) - u[i])
    return np.sort(np.array(depths))[::-1]


def _two_wells(ordered: np.ndarray, wells: np.ndarray, flow: str, frame: str) -> CriticalTime:
    """The level at which one well becomes two, going down the levels."""
    about: dict[str, Any] = {"criterion": "arc", "flow": flow, "frame": frame, "source": ARC}
    several = np.flatnonzero(wells >= 2)
    if not len(several):
        reason = f"one well at most at every level down to sigma = {ordered[-1]:.4g}; try lower ones"
        return CriticalTime(None, reason=reason, **about)
    if several[0] == 0:
        reason = f"two wells or more at the highest level already, sigma = {ordered[0]:.4g}; try higher ones"
        return CriticalTime(None, reason=reason, **about)
    low, high = math.log(ordered[several[0]]), math.log(ordered[several[0] - 1])
    ends = level_at(low, frame), level_at(high, frame)
    reason = "between two of the levels given, along one arc"
    return CriticalTime(level_at(0.5 * (low + high), frame), *ends, reason=reason, **about)
