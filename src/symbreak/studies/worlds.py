"""Worlds where everything is known: one law, its potential, fixed points, trajectories and critical times.

    two-deltas   the points +-1                          pitchfork at alpha = sqrt(sqrt(2) - 1) (VP SDE)
    sphere       uniform on the unit sphere of R^3       a ring of fixed points opens around the centre
    mixture      three Gaussians on a triangle           first order: wells appear before the centre goes
    digits       one Gaussian a class of 8 x 8 digits    no symmetry: one well after another is born

States are drawn in the VP frame, alpha x, whatever frame their stability is judged in. Trajectories take the
posterior step x' = D + (sigma'/sigma)^2 (x - D) + sigma' sqrt(1 - sigma'^2/sigma^2) z, the reverse SDE with D
held over a step. For two-deltas a small network can be trained on the same data and laid over the law.

Sources: arXiv:2305.19693 (potential, fixed points), arXiv:2402.18491 (speciation, collapse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from symbreak.critical import CriticalTime
from symbreak.data.readers import images
from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.laws.law import Law
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, as_denoiser
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.bifurcations import bifurcation
from symbreak.phases.collapse import collapse_time
from symbreak.phases.fixed_point_search import FixedPoints, fixed_points
from symbreak.phases.potentials import potential
from symbreak.phases.reverse_paths import descend
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values, versions
from symbreak.runtime.run import Run, renamed
from symbreak.studies.point_network import train_point_network

__all__ = ["WORLDS", "check_world", "draw_world", "explore_world"]

FLOW = "sde"  # in which potential and fixed points are drawn
TRAJECTORIES = 60
STARTS = 8  # samples of an empirical law from which fixed points are looked for
LARGEST, DIRECTIONS = 256, 16  # dimensions of a law, and of points; the search of fixed points takes minutes in more
SUBSTEPS = 3  # posterior steps between two levels that are drawn
Points = Law | Denoiser


@dataclass(frozen=True)
class World:
    """A law and how to look at it: along a straight line through the origin, or along an arc.

    Attributes:
        title, lead, notes: of its page.
        law: what flows and is diagnosed.
        moments: of the data, for the spectral criteria.
        levels: highest and lowest sigma and their number.
        axis: unit vector [d] that states are projected on; ``middle`` [d] projects to zero.
        axis_name, path_name: of the coordinate of states, and of the path that the potential is drawn on.
        starts: clean samples [n, *S] to look for fixed points from.
        ends: clean states [n, *S] -> integer labels, the colours of trajectories; ``end_names`` name them.
        classes: the same data as a mixture, one component a class, where there are classes.
        samples: number of training samples for the collapse; 0 where the question has no sense.
        reach, points: of the line, VP states from -reach to reach; or of an arc its VE states [points, *S] and
            their positions.
        frame: of potential and fixed points.
        stability: flows and frames that the central fixed point of the law is followed in.
        extra: further criteria, named.
    """

    title: str
    lead: str
    law: Law
    moments: Moments
    levels: tuple[float, float, int]
    axis: torch.Tensor
    axis_name: str
    path_name: str
    starts: torch.Tensor
    ends: Callable[[torch.Tensor], torch.Tensor]
    end_names: tuple[str, ...]
    classes: Mixture | None = None
    samples: int = 0
    reach: float = 1.6
    points: int = 121
    arc: tuple[np.ndarray, torch.Tensor] | None = None
    middle: torch.Tensor | None = None
    frame: str = "vp"
    stability: tuple[tuple[str, str], ...] = (("sde", "vp"), ("ode", "vp"), ("sde", "ve"), ("ode", "ve"))
    extra: tuple[tuple[str, Callable[[], CriticalTime]], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sigma(self) -> np.ndarray:
        """Falling levels that are drawn."""
        return np.geomspace(*self.levels)

    @property
    def position(self) -> np.ndarray:
        """What the abscissa of the potential shows."""
        return np.linspace(-self.reach, self.reach, self.points) if self.arc is None else self.arc[0]

    def path(self, sigma: float) -> torch.Tensor:
        """VE states on the path of the potential."""
        if self.arc is not None:
            return self.arc[1]
        line = torch.from_numpy(self.position)[:, None] * self.axis / NoiseLevel(sigma).alpha
        return (line if self.middle is None else self.middle + line).reshape(-1, *self.law.shape)

    def project(self, states: torch.Tensor, alpha: float) -> np.ndarray:
        """VP coordinate of VE states [N, *S] along the axis, zero at its middle."""
        flat = states.reshape(len(states), -1).double()
        flat = flat if self.middle is None else flat - self.middle
        return np.asarray(alpha * (flat @ self.axis).numpy())


def _unit(dim: int) -> torch.Tensor:
    return torch.eye(dim, dtype=torch.float64)[0]


def _two_deltas() -> World:
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return World(
        title="Two points, +1 and -1",
        lead="The data are two numbers. At high noise the generative drift has one well, at zero; on the way "
        "down the well splits, and each trajectory has to choose.",
        law=Empirical(points),
        classes=Mixture.from_parameters(points, 0.0),
        moments=Moments(2, torch.zeros(1), torch.ones(1, 1)),
        levels=(8.0, 0.15, 81),
        axis=_unit(1),
        axis_name="state, VP frame",
        path_name="state x, VP frame",
        starts=points,
        ends=lambda x: (x[:, 0] > 0).long(),
        end_names=("ends at -1", "ends at +1"),
    )


def _sphere() -> World:
    law = Sphere(3, 1.0)
    return World(
        title="The unit sphere of R^3",
        lead="Data uniform on a sphere have a continuous symmetry. Below the critical level the centre is "
        "unstable and a whole sphere of fixed points, all equivalent, takes its place; the figures cut it "
        "along one axis.",
        law=law,
        moments=law.moments,
        samples=1000,
        levels=(4.0, 0.1, 73),
        axis=_unit(3),
        axis_name="first coordinate of the state, VP frame",
        path_name="state along the first axis, VP frame",
        starts=_unit(3)[None],  # every other point of the ring is this one turned
        ends=lambda x: (x[:, 0] > 0).long(),
        end_names=("ends at a negative first coordinate", "ends at a positive first coordinate"),
        notes=("Fixed points of the ring are neutral along it; they count as stable.",),
    )


def _mixture() -> World:
    angle = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    law = Mixture.from_parameters(2.0 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.1)
    name = "state along the axis through class 0, VP frame"
    return World(
        title="Three Gaussians on a triangle",
        lead="Means at distance 2 from the centre, variance 0.1. With three symmetric classes the transition "
        "is of first order: the wells of the classes appear (in folds, each with a saddle) while the centre "
        "is still stable, which loses its stability only later.",
        law=law,
        classes=law,
        moments=law.moments,
        samples=1000,
        levels=(10.0, 0.2, 81),
        axis=_unit(2),
        axis_name=name,
        path_name=name,
        reach=2.6,
        points=157,
        starts=law.means,
        ends=lambda x: law.responsibilities(x, 0.05).argmax(1),
        end_names=("class 0", "class 1", "class 2"),
        notes=("Classes 1 and 2 lie on top of each other in this projection, and so do their branches.",),
    )


def _digits() -> World:
    data = images("digits")
    if data.labels is None:  # the bundled digits have labels
        raise InputError("digits came without labels; expected one a picture.")
    x = data.tensor().double()
    x = x - x.mean(0)
    law = Mixture.fit(x, labels=data.labels)
    moments = Moments.fit([x])
    gaussian = Gaussian(moments)
    means = law.means
    gaps = torch.cdist(means, means)
    a, b = divmod(int(gaps.argmax()), law.components)
    axis = (means[b] - means[a]) / gaps[a, b]
    angle = torch.linspace(-0.2 * math.pi, 0.7 * math.pi, 109, dtype=torch.float64)
    arc = (angle.cos()[:, None] * means[a] + angle.sin()[:, None] * means[b]).reshape(-1, *law.shape)
    n = len(x)
    return World(
        title="8 x 8 digits, one Gaussian a class",
        lead=f"{n} digits in [-1, 1] with their mean removed, as a mixture of ten full Gaussians. There is "
        "no symmetry to break: the central fixed point is followed into one of the wells without a crossing, "
        "and the wells of the other classes are born one after another. The potential is drawn between "
        f"classes {a} and {b}.",
        law=law,
        classes=law,
        moments=moments,
        samples=n,
        levels=(6.0, 0.5, 33),
        axis=axis,
        axis_name=f"state between the means of {a} and {b}, VP frame",
        arc=(angle.numpy() / math.pi, arc),
        path_name=f"angle a / pi on the arc cos(a) m_{a} + sin(a) m_{b} through two class means",
        starts=means.reshape(-1, *law.shape),
        ends=lambda x: law.responsibilities(x, 0.1).argmax(1),
        end_names=tuple(f"ends as {k}" for k in range(law.components)),
        middle=0.5 * (means[a] + means[b]),
        frame="ve",
        # Off centre the VP-SDE branch runs on for minutes without a crossing; the note says what VP sees.
        stability=(("ode", "vp"), ("sde", "ve"), ("ode", "ve")),
        extra=(
            ("bifurcation, one Gaussian", lambda: bifurcation(gaussian, "sde", "vp")),
            ("bifurcation, one Gaussian", lambda: bifurcation(gaussian, "sde", "ve")),
            ("collapse, one Gaussian", lambda: collapse_time(gaussian, samples=n)),
            ("collapse, measured", lambda: collapse_time(Empirical(x))),
        ),
        notes=(
            "The VP criterion fires for a single Gaussian of variance above 2, where nothing breaks: the row "
            "of one Gaussian shows it.",
        ),
    )


WORLDS = {"two-deltas": _two_deltas, "sphere": _sphere, "mixture": _mixture, "digits": _digits}


def _in_leading(law: Empirical) -> tuple[Empirical, tuple[str, ...]]:
    """Points in their leading principal directions, where they have more dimensions than a world, and a note on that.

    The marginal of a noised law in some directions is its marginal there, noised: nothing else is left out.
    """
    if law.dim <= DIRECTIONS:
        return law, ()
    points = law.points.reshape(len(law), -1).double()
    points = points - points.mean(0)
    _, values, directions = torch.linalg.svd(points, full_matrices=False)
    share = float(values[:DIRECTIONS].square().sum() / values.square().sum().clamp_min(1e-300))
    said = f"The points of {law.dim:,} dimensions are shown in their {DIRECTIONS} leading principal directions, with "
    return Empirical(points @ directions[:DIRECTIONS].T), (f"{said}{share:.1%} of the variance.",)


def _own(law: Law) -> World:
    """A law of one's own, looked at along its leading mode."""
    notes: tuple[str, ...] = ()
    if isinstance(law, Empirical):
        law, notes = _in_leading(law)
    moments: Moments = law.moments  # type: ignore[attr-defined]
    axis = moments.leading_vectors(1)[:, 0]
    top = math.sqrt(max(float(moments.spectrum(1).values[0]), 0.0))
    if top < 1e-6:
        raise InputError(f"{law!r} has no spread; a world needs data that differ.")
    name = "state along the leading mode, VP frame"
    middle = moments.mean.reshape(-1).double()
    lead = "A law of one's own. Potential, fixed points and trajectories are along the leading mode, through the mean."
    extra: tuple[tuple[str, Callable[[], CriticalTime]], ...] = ()
    if isinstance(law, Empirical):
        lead += f" The law is the samples themselves, {len(law):,} equal points: each is a well at low noise."
        start = law.points[:: math.ceil(len(law) / STARTS)]
        extra = (("collapse, measured", lambda: collapse_time(law)),) if len(law) > 2 else ()
    else:
        start = law.means if isinstance(law, Mixture) else middle + top * axis
    return World(
        title=repr(law),
        lead=lead,
        law=law,
        classes=law if isinstance(law, Mixture) else None,
        moments=moments,
        samples=0 if isinstance(law, Empirical) else 1000,
        levels=(6.0 * top, 0.15 * top, 61),
        axis=axis,
        axis_name=name,
        path_name=name,
        reach=2.0 * top,
        frame="ve",
        starts=start.reshape(-1, *law.shape).double(),
        ends=lambda x: ((x.reshape(len(x), -1).double() - middle) @ axis > 0).long(),
        end_names=("ends on the negative side", "ends on the positive side"),
        middle=middle,
        stability=(("sde", "ve"), ("ode", "ve")),
        extra=extra,
        notes=notes,
    )


def check_world(name: str | Law, train: bool = False, seed: int = 0) -> None:
    """Raise an error, before any work, that names what `explore_world` cannot do.

    Raises:
        InputError: for an unknown world, a network for a world that has none, or a seed below zero.
    """
    if isinstance(name, Law) and not isinstance(name, Mixture | Gaussian | Sphere | Empirical):
        kind = type(name).__name__
        raise InputError(f"a world of {kind}; expected a Gaussian, a Mixture, a Sphere or an Empirical law.")
    if isinstance(name, Law) and not isinstance(name, Empirical) and name.dim > LARGEST:
        raise InputError(f"{type(name).__name__} law of {name.dim:,} dimensions; a world of it has at most {LARGEST}.")
    if isinstance(name, str) and name not in WORLDS:
        raise InputError(f"unknown world {name!r}. Known: {', '.join(WORLDS)}.")
    if train and name != "two-deltas":
        raise InputError(f"no network is trained for the world {name}; --train goes with two-deltas.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected an integer >= 0.")


@renamed()
def explore_world(name: str | Law, train: bool = False, seed: int = 0, *, run: Run | None = None) -> Record:
    """Everything that the page of a world shows, as plain values.

    Args:
        name: one of `WORLDS`; or a law of one's own, a `Gaussian`, `Mixture`, `Sphere` or
            `Empirical`, whose points are shown in 16 principal directions where they have more.
        train: also train a small network on the same data (two-deltas only) and put it through the same
            functions.
        seed: of trajectories and of the network.
        run: its progress names the stages.

    Returns:
        A `Record` of kind ``"world"``: ``potential``, ``branches``, ``trajectories``, ``critical``,
        ``cloning`` and ``network``. Coordinates are VP states projected on one axis.

    Raises:
        InputError: for an unknown world, or a network for a world that has none.
    """
    check_world(name, train, seed)
    settings = {"world": name if isinstance(name, str) else repr(name), "train": train, "seed": seed}
    run = (run or Run()).identified({"kind": "world", **settings})
    with _stage(run, "law"):
        world = WORLDS[name]() if isinstance(name, str) else _own(name)
        levels = _levels(world)
    drawn, points = _portrait(world, world.law, levels, seed, run)
    critical = _critical(world, points, run)
    content: Values = {
        "name": name if isinstance(name, str) else "own",
        "title": world.title,
        "lead": world.lead,
        "notes": list(world.notes),
        "flow": FLOW,
        "frame": world.frame,
        "sigma": _short(world.sigma, 12),
        "axis": world.axis_name,
        "path": world.path_name,
        "straight": world.arc is None,
        "position": _short(world.position),
        "branch_sigma": _short(levels, 12),
        # Where the slider's levels are among those of the branches.
        "branch_index": [int(np.flatnonzero(levels == s)[0]) for s in world.sigma],
        **drawn,
        "critical": critical,
        "cloning": None,
        "network": None,
    }
    if world.classes is not None:
        with _stage(run, "cloning"):
            content["cloning"] = cloning_probability(world.classes, world.sigma, samples=4000).to_dict()
    if train:
        content["network"] = _network(world, levels, critical, seed, run)
    return Record("world", settings, content, versions(torch.get_num_threads()), run.timings)


@contextmanager
def _stage(run: Run, name: str) -> Iterator[Run]:
    """The run under a stage of that name, which is reported as it begins."""
    with run.timed(name) as part:
        part.tell(0, 1)
        yield part


def _short(values: ArrayLike, digits: int = 7) -> list:
    """Numbers with as many digits as a figure can show; NaN becomes None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [_short(row, digits) for row in array]
    return [None if math.isnan(v) else float(f"{v:.{digits}g}") for v in array]


def _portrait(
    world: World, source: Points, levels: np.ndarray, seed: int, run: Run, of: str = ""
) -> tuple[Values, FixedPoints]:
    """Potential, fixed points and reverse trajectories of the law or of a network; the fixed points themselves."""
    with _stage(run, f"{of}potential"):
        heights = []
        for s in map(float, world.sigma):
            states = world.path(s) * (NoiseLevel(s).alpha if world.frame == "vp" else 1.0)
            u = potential(source, states, s, FLOW, world.frame, tolerance=1e-7).value
            heights.append(_short(u - u.min()))
    with _stage(run, f"{of}fixed points"):
        points = fixed_points(source, levels, FLOW, world.frame, starts=world.starts)
        branches = _branches(world, points)
    with _stage(run, f"{of}trajectories"):
        paths = _trajectories(world, source, seed)
    return {"potential": heights, "branches": branches, "trajectories": paths}, points


def _levels(world: World) -> np.ndarray:
    """The world's levels and more of them right below the first fold, where branches are steep."""
    if world.arc is not None:
        return world.sigma
    centre = bifurcation(world.law, FLOW, world.frame)
    wells = bifurcation(world.law, FLOW, world.frame, criterion="wells", starts=world.starts)
    # Nearer to a pitchfork than 1e-3 its branches are one point up to rounding, and are found twice.
    below = 1.0 - np.array([1e-3, 3e-3, 1e-2, 2e-2, 4e-2])
    more = [c.sigma * below for c in (centre, wells) if c.sigma is not None]
    return np.unique(np.concatenate([world.sigma, *more]))[::-1]


def _branches(world: World, points: FixedPoints) -> list[Values]:
    """Fixed points against sigma: coordinate, stability, and whether the point lies on the path."""
    alpha = np.array([NoiseLevel(float(s)).alpha for s in points.sigma])
    out = []
    for branch in points.branches:
        ve = branch.points / (torch.from_numpy(alpha if world.frame == "vp" else np.ones_like(alpha))).reshape(
            -1, *[1] * (branch.points.ndim - 1)
        )
        along = world.project(ve, 1.0) * alpha
        flat = ve.reshape(len(ve), -1) - (0.0 if world.middle is None else world.middle)
        off = torch.linalg.vector_norm(flat - (flat @ world.axis)[:, None] * world.axis, dim=1).numpy()
        here = branch.exists
        value: Values = {
            "central": branch.central,
            "fold": branch.fold,
            "x": _short(along),
            "eigenvalue": _short(branch.eigenvalue),
            "stable": [bool(v) for v in branch.stable],
            "on_path": [bool(world.arc is None and h and o < 1e-6) for h, o in zip(here, off)],
        }
        if world.classes is not None and world.arc is not None and branch.stable.any():
            # Which class a well belongs to, at the lowest level where it exists.
            i = int(np.flatnonzero(branch.stable)[-1])
            value["class"] = int(world.ends(ve[i : i + 1])[0])
        out.append(value)
        if branch.continuum:
            # Of a ring of fixed points the axis shows two: the one that was followed and its opposite.
            out.append({**value, "x": _short(-along)})
    return out


@torch.no_grad()
def _trajectories(world: World, source: Points, seed: int) -> Values:
    """Reverse trajectories from the noised law at the highest level, projected, with where they end."""
    d, g = as_denoiser(source), generator(seed, 3)
    x = world.law.sample(TRAJECTORIES, float(world.sigma[0]), g)
    count = len(world.sigma)
    fine = np.exp(np.interp(np.arange((count - 1) * SUBSTEPS + 1) / SUBSTEPS, np.arange(count), np.log(world.sigma)))
    rows = []
    for i, (s, states) in enumerate(descend(d, x, [*fine, 0.0], g)):
        if s and i % SUBSTEPS == 0:
            rows.append(world.project(states, NoiseLevel(s).alpha))
    return {"x": _short(np.stack(rows).T, 5), "end": world.ends(states).tolist(), "names": list(world.end_names)}


def _critical(world: World, points: FixedPoints, run: Run) -> list[Values]:
    """Critical times of every criterion that the world has."""
    rows: list[tuple[str, Callable[[], CriticalTime]]] = [
        ("bifurcation", partial(bifurcation, world.law, flow, frame)) for flow, frame in world.stability
    ]
    rows.append(("new wells", lambda: _first_wells(world, points)))
    rows += [(c, partial(speciation_time, world.moments, c)) for c in ("spectral", "signal-to-noise")]
    if world.classes is not None:
        draws = 50_000 if world.classes.dim < 10 else 5000
        rows.append(("free-entropy", partial(speciation_time, world.classes, "free-entropy", samples=draws)))
        rows.append(("cloning", partial(cloning_time, world.classes, world.sigma, samples=4000)))
    if world.samples:
        law = world.law if world.classes is None else world.classes
        rows.append(("collapse", partial(collapse_time, law, world.samples, draws=4000)))
    out = []
    for name, find in (*rows, *world.extra):
        with _stage(run, "critical times"):
            value = _row(name, find())
        if name.startswith("collapse") and world.samples:
            value["note"] = f"{world.samples} samples" + (f"; {value['note']}" if value["note"] else "")
        out.append(value)
    return out


def _first_wells(world: World, points: FixedPoints) -> CriticalTime:
    """The highest fold in which a stable branch is born, among the branches already followed."""
    folds = [b.fold for b in points.branches if not b.central and b.fold is not None and b.stable.any()]
    about: Values = {"criterion": "wells", "flow": FLOW, "frame": world.frame}
    about["source"] = "arXiv:2305.19693, folds of the drift's fixed points"
    if not folds:
        reason = "no stable fixed point apart from the central one was found"
        return CriticalTime(None, reason=reason, **about)
    vp = NoiseLevel(max(folds))
    return CriticalTime(vp if world.frame == "vp" else NoiseLevel(vp.sigma, alpha=1.0), **about)


def _row(name: str, critical: CriticalTime) -> Values:
    """A line of the table: a critical time with what to call it."""
    value = critical.to_dict()
    if critical.level is not None:
        # Whatever frame the criterion lives in, its level is quoted by the VP scale too.
        value["alpha_vp"] = math.sqrt(critical.level.alpha_bar)
        linear = schedule("ddpm-linear")
        low, high = linear.sigma_range
        inside = low <= critical.level.sigma <= high
        value["ddpm_step"] = linear.step(critical.level) if inside else None
    else:
        value["alpha_vp"], value["ddpm_step"] = None, None
    if critical.criterion == "spectral":
        value["frame"] = "vp"  # Lambda exp(-2 tau) = 1 compares with the unit noise of the VP process
    classes = getattr(critical, "classes", ())
    levels = sorted((c.sigma for c in classes if c.sigma is not None), reverse=True)
    note = critical.reason or ""
    if len({f"{v:.4g}" for v in levels}) > 1:
        note = f"the first of {len(levels)} classes; the last at sigma {levels[-1]:.4g}"
    return {**value, "name": name, "note": note, "network": False}


def _network(world: World, levels: np.ndarray, critical: list[Values], seed: int, run: Run) -> Values:
    """A network trained on the same points, put through the functions that the law was put through."""
    with _stage(run, "network") as part:
        network, settings = train_point_network(world.starts, seed, run=part)
    drawn, _ = _portrait(world, network, levels, seed, run, "network: ")
    with _stage(run, "network: critical times"):
        rows = [
            {**_row(name, bifurcation(network, FLOW, frame, criterion=criterion, starts=world.starts)), "network": True}
            for frame in ("vp", "ve")
            for name, criterion in (("bifurcation", "centre"), ("new wells", "wells"))
        ]
    exact = next(r for r in critical if r["name"] == "bifurcation" and (r["flow"], r["frame"]) == (FLOW, "vp"))
    # A network is never exactly odd, and the centre of an imperfect pitchfork may become a well without a
    # crossing: what is compared is the level at which the potential splits.
    measured = rows[1]
    alpha = measured["alpha_vp"]
    return {
        "training": settings,
        **drawn,
        "critical": rows,
        "alpha": alpha,
        "alpha_exact": exact["alpha_vp"],
        "criterion": measured["name"],
        "relative_error": None if alpha is None else alpha / exact["alpha_vp"] - 1.0,
    }


@renamed()
def draw_world(
    name: str | Law, path: str | Path, train: bool = False, seed: int = 0, *, run: Run | None = None
) -> Record:
    """Explore a world and write its page; see `explore_world`.

    Returns:
        The record of what the page shows.
    """
    record = explore_world(name, train, seed, run=run)
    write_report(record, path)
    return record
