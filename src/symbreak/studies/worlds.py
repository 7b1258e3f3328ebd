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
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime
from symbreak.data.readers import images
from symbreak.laws import Empirical, Gaussian, Mixture, Sphere
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import as_denoiser
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.bifurcation import FixedPoints, bifurcation, fixed_points, potential
from symbreak.phases.collapse import collapse_time
from symbreak.phases.reverse_paths import descend
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import versions

__all__ = ["WORLDS", "PointNetwork", "check_world", "draw_world", "explore_world", "train_point_network"]

WORLDS = ("two-deltas", "sphere", "mixture", "digits")
TRAJECTORIES = 60
SUBSTEPS = 3  # posterior steps between two levels that are drawn
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Scene:
    """A law and how to look at it.

    Attributes:
        law: what flows and is diagnosed.
        classes: the same data as a mixture, one component a class, where there are classes.
        moments: of the data, for the spectral criteria.
        samples: number of training samples for the collapse; 0 where the question has no sense.
        flow, frame: in which potential and fixed points are drawn.
        axis: unit vector [d] that states are projected on; ``middle`` [d] projects to zero.
        path: sigma -> VE states [P, *S]; ``position`` [P] is what the figure's abscissa shows.
        straight: whether the path is the axis itself, so that fixed points can be marked on it.
        stability: flows and frames that the central fixed point of the law is followed in.
        extra: further criteria, named.
        starts: clean samples [n, *S] to look for fixed points from.
        ends: clean states [n, *S] -> integer labels, the colours of trajectories; ``end_names`` name them.
    """

    title: str
    lead: str
    law: Any
    classes: Mixture | None
    moments: Moments
    samples: int
    sigma: np.ndarray
    axis: torch.Tensor
    axis_name: str
    path: Callable[[float], torch.Tensor]
    position: np.ndarray
    path_name: str
    starts: torch.Tensor
    ends: Callable[[torch.Tensor], torch.Tensor]
    end_names: tuple[str, ...]
    middle: torch.Tensor | None = None
    flow: str = "sde"
    frame: str = "vp"
    straight: bool = True
    stability: tuple[tuple[str, str], ...] = (("sde", "vp"), ("ode", "vp"), ("sde", "ve"), ("ode", "ve"))
    extra: tuple[tuple[str, Callable[[], CriticalTime]], ...] = ()
    notes: tuple[str, ...] = field(default=())


def _line(direction: torch.Tensor, reach: float, points: int = 121) -> tuple[Any, np.ndarray]:
    """A straight path of VP states along a unit vector, as VE states, and its positions."""
    position = np.linspace(-reach, reach, points)
    states = torch.from_numpy(position)[:, None] * direction
    return (lambda sigma: states / NoiseLevel(sigma).alpha), position


def _two_deltas() -> _Scene:
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    axis = torch.ones(1, dtype=torch.float64)
    path, position = _line(axis, 1.6)
    return _Scene(
        title="Two points, +1 and -1",
        lead="The data are two numbers. At high noise the generative drift has one well, at zero; on the way "
        "down the well splits, and each trajectory has to choose.",
        law=Empirical(points),
        classes=Mixture.from_parameters(points, 0.0),
        moments=Moments(2, torch.zeros(1), torch.ones(1, 1)),
        samples=0,
        sigma=np.geomspace(8.0, 0.15, 81),
        axis=axis,
        axis_name="state, VP frame",
        path=path,
        position=position,
        path_name="state x, VP frame",
        starts=points,
        ends=lambda x: (x[:, 0] > 0).long(),
        end_names=("ends at -1", "ends at +1"),
    )


def _sphere() -> _Scene:
    axis = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    law = Sphere(3, 1.0)
    path, position = _line(axis, 1.6)
    return _Scene(
        title="The unit sphere of R^3",
        lead="Data uniform on a sphere have a continuous symmetry. Below the critical level the centre is "
        "unstable and a whole sphere of fixed points, all equivalent, takes its place; the figures cut it "
        "along one axis.",
        law=law,
        classes=None,
        moments=law.moments,
        samples=1000,
        sigma=np.geomspace(4.0, 0.1, 73),
        axis=axis,
        axis_name="first coordinate of the state, VP frame",
        path=path,
        position=position,
        path_name="state along the first axis, VP frame",
        # One start: every other point of the ring is this one turned.
        starts=axis[None],
        ends=lambda x: (x[:, 0] > 0).long(),
        end_names=("ends at a negative first coordinate", "ends at a positive first coordinate"),
        notes=("Fixed points of the ring are neutral along it; they count as stable.",),
    )


def _mixture() -> _Scene:
    angle = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    law = Mixture.from_parameters(2.0 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.1)
    axis = torch.tensor([1.0, 0.0], dtype=torch.float64)
    path, position = _line(axis, 2.6, 157)
    return _Scene(
        title="Three Gaussians on a triangle",
        lead="Means at distance 2 from the centre, variance 0.1. With three symmetric classes the transition "
        "is of first order: the wells of the classes appear (in folds, each with a saddle) while the centre "
        "is still stable, which loses its stability only later.",
        law=law,
        classes=law,
        moments=law.moments,
        samples=1000,
        sigma=np.geomspace(10.0, 0.2, 81),
        axis=axis,
        axis_name="state along the axis through class 0, VP frame",
        path=path,
        position=position,
        path_name="state along the axis through class 0, VP frame",
        starts=law.means,
        ends=lambda x: law.responsibilities(x, 0.05).argmax(1),
        end_names=("class 0", "class 1", "class 2"),
        notes=("Classes 1 and 2 lie on top of each other in this projection, and so do their branches.",),
    )


def _digits() -> _Scene:
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
    return _Scene(
        title="8 x 8 digits, one Gaussian a class",
        lead=f"{n} digits in [-1, 1] with their mean removed, as a mixture of ten full Gaussians. There is "
        "no symmetry to break: the central fixed point is followed into one of the wells without a crossing, "
        "and the wells of the other classes are born one after another. The potential is drawn between "
        f"classes {a} and {b}.",
        law=law,
        classes=law,
        moments=moments,
        samples=n,
        sigma=np.geomspace(6.0, 0.5, 33),
        axis=axis,
        axis_name=f"state between the means of {a} and {b}, VP frame",
        path=lambda sigma: arc,
        position=angle.numpy() / math.pi,
        path_name=f"angle a / pi on the arc cos(a) m_{a} + sin(a) m_{b} through two class means",
        starts=means.reshape(-1, *law.shape),
        ends=lambda x: law.responsibilities(x, 0.1).argmax(1),
        end_names=tuple(f"ends as {k}" for k in range(law.components)),
        middle=0.5 * (means[a] + means[b]),
        frame="ve",
        straight=False,
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


SCENES = {"two-deltas": _two_deltas, "sphere": _sphere, "mixture": _mixture, "digits": _digits}


# --- a small network ------------------------------------------------------------------------------


class PointNetwork(torch.nn.Module):
    """A small perceptron that predicts epsilon, as a denoiser: D = x - sigma eps(alpha x, log sigma).

    Args:
        dim: dimension d of a sample.
        width: hidden units a layer.
        sigma_range: levels it is trained on.
    """

    def __init__(self, dim: int, width: int, sigma_range: tuple[float, float]) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (dim,)
        self.sigma_range = sigma_range
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(dim + 1, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, dim),
        )

    def epsilon(self, state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The noise predicted from VP states [B, d] at levels [B] or []."""
        level = sigma.log().mul(0.5).expand(len(state))[:, None]
        out: torch.Tensor = self.layers(torch.cat([state, level], dim=1))
        return out

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x] [B, d] for VE states x [B, d]; sigma a float or [B]."""
        s = torch.as_tensor(sigma, dtype=torch.float64)
        low, high = self.sigma_range
        if bool((s < low * (1 - 1e-9)).any()) or bool((s > high * (1 + 1e-9)).any()):
            raise InputError(f"sigma {float(s.min()):g} .. {float(s.max()):g}; expected {low:g} .. {high:g}.")
        s = s.to(x)
        column = s[:, None] if s.ndim else s
        weight = next(self.parameters())
        state = (x / (1 + column**2).sqrt()).to(weight)
        return x - column * self.epsilon(state, s.to(weight)).to(x)


def train_point_network(
    points: torch.Tensor,
    seed: int = 0,
    steps: int = 6000,
    batch: int = 512,
    width: int = 64,
    lr: float = 3e-3,
    progress: Progress | None = None,
) -> tuple[PointNetwork, dict[str, Any]]:
    """Train a small network on points by epsilon prediction over the DDPM linear schedule.

        loss = E |eps_theta(alpha (x_0 + sigma eps), log sigma) - eps|^2,  the step uniform over 0 .. 999

    Weights are an average over the last steps. Every draw (x_0, eps) is used together with (x_0, -eps), which
    quietens the gradient.

    Args:
        points: data [n, d].
        seed: of initial weights and draws.
        steps, batch, width, lr: optimizer steps, pairs a step, hidden units, peak learning rate.

    Returns:
        The network in float64 (so that its Jacobians are exact) and the settings and losses of the run.

    Source: arXiv:2006.11239.
    """
    if points.ndim != 2 or len(points) < 1:
        raise InputError(f"points of shape {tuple(points.shape)}; expected [n, d].")
    sched = schedule("ddpm-linear")
    table = torch.tensor([sched.level(k).sigma for k in range(1000)], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = PointNetwork(points.shape[1], width, sched.sigma_range)
    data, g = points.float(), generator(seed, 17)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    mean = [w.detach().clone() for w in net.parameters()]
    began, losses, running = time.perf_counter(), [], 0.0
    for step in range(steps):
        x0 = data[torch.randint(len(data), (batch,), generator=g)]
        sigma = table[torch.randint(1000, (batch,), generator=g)]
        eps = torch.randn(x0.shape, generator=g)
        x0, sigma, eps = torch.cat([x0, x0]), torch.cat([sigma, sigma]), torch.cat([eps, -eps])
        alpha = (1 + sigma * sigma).rsqrt()[:, None]
        loss = (net.epsilon(alpha * (x0 + sigma[:, None] * eps), sigma) - eps).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            # From the first step on it forgets as fast as 1 / step, then over the last 200 steps.
            torch._foreach_lerp_(mean, list(net.parameters()), max(0.005, 1.0 / (step + 1)))
        running += float(loss.detach())
        if (step + 1) % 500 == 0:
            losses.append(running / 500)
            running = 0.0
            if progress is not None:
                progress(f"training: step {step + 1:,} of {steps:,}, loss {losses[-1]:.4f}")
    with torch.no_grad():
        for weight, average in zip(net.parameters(), mean):
            weight.copy_(average)
    net = net.double().eval().requires_grad_(False)
    settings = {"steps": steps, "batch": batch, "width": width, "lr": lr, "seed": seed, "schedule": sched.name}
    count = sum(p.numel() for p in net.parameters())
    return net, {**settings, "parameters": count, "loss": losses, "seconds": time.perf_counter() - began}


# --- exploring ------------------------------------------------------------------------------------


def check_world(name: str, train: bool = False, seed: int = 0) -> None:
    """Refuse, before any work, what `explore_world` cannot do.

    Raises:
        InputError: for an unknown world, a network for a world that has none, or a seed below zero.
    """
    if name not in SCENES:
        raise InputError(f"unknown world {name!r}. Known: {', '.join(WORLDS)}.")
    if train and name != "two-deltas":
        raise InputError(f"no network is trained for the world {name}; --train goes with two-deltas.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected an integer >= 0.")


def explore_world(name: str, train: bool = False, seed: int = 0, progress: Progress | None = None) -> Record:
    """Everything that the page of a world shows, as plain values.

    Args:
        name: one of `WORLDS`.
        train: also train a small network on the same data (two-deltas only) and put it through the same
            functions.
        seed: of trajectories and of the network.
        progress: told in words what is being done.

    Returns:
        A `Record` of kind ``"world"``: ``potential``, ``branches``, ``trajectories``, ``critical``,
        ``cloning`` and ``network``. Coordinates are VP states projected on one axis.

    Raises:
        InputError: for an unknown world, or a network for a world that has none.
    """
    check_world(name, train, seed)
    tell = progress or (lambda _: None)
    timings: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        timings[stage], clock = now - clock, now

    tell("the law")
    scene = SCENES[name]()
    lap("law")
    tell("potential")
    content: dict[str, Any] = {
        "name": name,
        "title": scene.title,
        "lead": scene.lead,
        "notes": list(scene.notes),
        "flow": scene.flow,
        "frame": scene.frame,
        "sigma": _short(scene.sigma, 12),
        "axis": scene.axis_name,
        "path": scene.path_name,
        "straight": scene.straight,
        "position": _short(scene.position),
        "potential": _potentials(scene, scene.law),
    }
    lap("potential")
    tell("fixed points")
    levels = _levels(scene)
    content["branch_sigma"] = _short(levels, 12)
    # Where the slider's levels are among those of the branches.
    content["branch_index"] = [int(np.flatnonzero(levels == s)[0]) for s in scene.sigma]
    found = fixed_points(scene.law, levels, scene.flow, scene.frame, starts=scene.starts)
    content["branches"] = _branches(scene, found)
    lap("fixed points")
    tell("reverse trajectories")
    content["trajectories"] = _trajectories(scene, scene.law, seed)
    lap("trajectories")
    content["critical"] = _critical(scene, found, tell)
    lap("critical times")
    content["cloning"] = None
    if scene.classes is not None:
        tell("cloning")
        content["cloning"] = cloning_probability(scene.classes, scene.sigma, samples=4000).to_dict()
        lap("cloning")
    content["network"] = None
    if train:
        content["network"] = _network(scene, content["critical"], seed, tell)
        lap("network")
    settings = {"world": name, "train": train, "seed": seed}
    return Record("world", settings, content, versions(torch.get_num_threads()), timings)


def _short(values: Any, digits: int = 7) -> list[Any]:
    """Numbers with as many digits as a figure can show; NaN becomes None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [_short(row, digits) for row in array]
    return [None if math.isnan(v) else float(f"{v:.{digits}g}") for v in array]


def _project(scene: _Scene, states: torch.Tensor, alpha: float) -> np.ndarray:
    """VP coordinate of VE states [N, *S] along the scene's axis, zero at its middle."""
    flat = states.reshape(len(states), -1).double()
    flat = flat if scene.middle is None else flat - scene.middle
    return alpha * (flat @ scene.axis).numpy()


def _potentials(scene: _Scene, source: Any) -> list[list[Any]]:
    """u on the path at every level, zero at its lowest point."""
    out = []
    for s in scene.sigma:
        states = scene.path(float(s)) * (NoiseLevel(float(s)).alpha if scene.frame == "vp" else 1.0)
        u = potential(source, states, float(s), scene.flow, scene.frame, tolerance=1e-7).value
        out.append(_short(u - u.min()))
    return out


def _levels(scene: _Scene) -> np.ndarray:
    """The scene's levels and more of them right below the first fold, where branches are steep."""
    if not scene.straight:
        return scene.sigma
    centre = bifurcation(scene.law, scene.flow, scene.frame)
    wells = bifurcation(scene.law, scene.flow, scene.frame, criterion="wells", starts=scene.starts)
    # Nearer to a pitchfork than 1e-3 its branches are one point up to rounding, and are found twice.
    below = 1.0 - np.array([1e-3, 3e-3, 1e-2, 2e-2, 4e-2])
    more = [c.sigma * below for c in (centre, wells) if c.sigma is not None]
    return np.unique(np.concatenate([scene.sigma, *more]))[::-1]


def _branches(scene: _Scene, found: FixedPoints) -> list[dict[str, Any]]:
    """Fixed points against sigma: coordinate, stability, and whether the point lies on the path."""
    alpha = np.array([NoiseLevel(float(s)).alpha for s in found.sigma])
    out = []
    for branch in found.branches:
        ve = branch.points / (torch.from_numpy(alpha if scene.frame == "vp" else np.ones_like(alpha))).reshape(
            -1, *[1] * (branch.points.ndim - 1)
        )
        along = _project(scene, ve, 1.0) * alpha
        flat = ve.reshape(len(ve), -1)
        off = torch.linalg.vector_norm(flat - (flat @ scene.axis)[:, None] * scene.axis, dim=1).numpy()
        here = branch.exists
        value: dict[str, Any] = {
            "central": branch.central,
            "fold": branch.fold,
            "x": _short(along),
            "eigenvalue": _short(branch.eigenvalue),
            "stable": [bool(v) for v in branch.stable],
            "on_path": [bool(scene.straight and h and o < 1e-6) for h, o in zip(here, off)],
        }
        if scene.classes is not None and not scene.straight and branch.stable.any():
            # Which class a well belongs to, at the lowest level where it exists.
            i = int(np.flatnonzero(branch.stable)[-1])
            value["class"] = int(scene.ends(ve[i : i + 1])[0])
        out.append(value)
    return out


@torch.no_grad()
def _trajectories(scene: _Scene, source: Any, seed: int) -> dict[str, Any]:
    """Reverse trajectories from the noised law at the highest level, projected, with where they end."""
    d, g = as_denoiser(source), generator(seed, 3)
    x = scene.law.sample(TRAJECTORIES, float(scene.sigma[0]), g)
    count = len(scene.sigma)
    fine = np.exp(np.interp(np.arange((count - 1) * SUBSTEPS + 1) / SUBSTEPS, np.arange(count), np.log(scene.sigma)))
    rows = []
    for i, (s, states) in enumerate(descend(d, x, [*fine, 0.0], g)):
        if s and i % SUBSTEPS == 0:
            rows.append(_project(scene, states, NoiseLevel(s).alpha))
    return {"x": _short(np.stack(rows).T, 5), "end": scene.ends(states).tolist(), "names": list(scene.end_names)}


def _critical(scene: _Scene, found: FixedPoints, tell: Progress) -> list[dict[str, Any]]:
    """Critical times of every criterion that the world has."""
    rows: list[tuple[str, Callable[[], CriticalTime]]] = [
        ("bifurcation", partial(bifurcation, scene.law, flow, frame)) for flow, frame in scene.stability
    ]
    rows.append(("new wells", lambda: _first_wells(scene, found)))
    rows += [(c, partial(speciation_time, scene.moments, c)) for c in ("spectral", "signal-to-noise")]
    if scene.classes is not None:
        draws = 50_000 if scene.classes.dim < 10 else 5000
        rows.append(("free-entropy", partial(speciation_time, scene.classes, "free-entropy", samples=draws)))
        rows.append(("cloning", partial(cloning_time, scene.classes, scene.sigma, samples=4000)))
    if scene.samples:
        law = scene.law if scene.classes is None else scene.classes
        rows.append(("collapse", partial(collapse_time, law, scene.samples, draws=4000)))
    out = []
    for name, find in (*rows, *scene.extra):
        tell(f"critical times: {name}")
        value = _row(name, find())
        if name.startswith("collapse"):
            value["note"] = f"{scene.samples} samples" + (f"; {value['note']}" if value["note"] else "")
        out.append(value)
    return out


def _first_wells(scene: _Scene, found: FixedPoints) -> CriticalTime:
    """The highest fold in which a stable branch is born, among the branches already followed."""
    folds = [b.fold for b in found.branches if not b.central and b.fold is not None and b.stable.any()]
    about: dict[str, Any] = {"criterion": "wells", "flow": scene.flow, "frame": scene.frame}
    about["source"] = "arXiv:2305.19693, folds of the drift's fixed points"
    if not folds:
        reason = "no stable fixed point apart from the central one was found"
        return CriticalTime(None, reason=reason, **about)
    vp = NoiseLevel(max(folds))
    return CriticalTime(vp if scene.frame == "vp" else NoiseLevel(vp.sigma, alpha=1.0), **about)


def _row(name: str, found: CriticalTime) -> dict[str, Any]:
    """A line of the table: a critical time with what to call it."""
    value = found.to_dict()
    if found.level is not None:
        # Whatever frame the criterion lives in, its level is quoted by the VP scale too.
        value["alpha_vp"] = math.sqrt(found.level.alpha_bar)
        linear = schedule("ddpm-linear")
        low, high = linear.sigma_range
        inside = low <= found.level.sigma <= high
        value["ddpm_step"] = linear.step(found.level) if inside else None
    else:
        value["alpha_vp"], value["ddpm_step"] = None, None
    if found.criterion == "spectral":
        value["frame"] = "vp"  # Lambda exp(-2 tau) = 1 compares with the unit noise of the VP process
    classes = getattr(found, "classes", ())
    levels = sorted((c.sigma for c in classes if c.sigma is not None), reverse=True)
    note = found.reason or ""
    if len({f"{v:.4g}" for v in levels}) > 1:
        note = f"the first of {len(levels)} classes; the last at sigma {levels[-1]:.4g}"
    return {**value, "name": name, "note": note, "network": False}


def _network(scene: _Scene, critical: list[dict[str, Any]], seed: int, tell: Progress) -> dict[str, Any]:
    """A network trained on the same points, put through the functions that the law was put through."""
    net, settings = train_point_network(scene.starts, seed, progress=tell)
    tell("potential and fixed points of the network")
    levels = _levels(scene)
    found = fixed_points(net, levels, scene.flow, scene.frame, starts=scene.starts)
    rows = []
    for name, criterion, flow, frame in (
        ("bifurcation", "centre", "sde", "vp"),
        ("new wells", "wells", "sde", "vp"),
        ("bifurcation", "centre", "sde", "ve"),
        ("new wells", "wells", "sde", "ve"),
    ):
        tell(f"critical times of the network: {name}, {flow}, {frame}")
        row = _row(name, bifurcation(net, flow, frame, criterion=criterion, starts=scene.starts))
        rows.append({**row, "network": True})
    exact = next(r for r in critical if r["name"] == "bifurcation" and (r["flow"], r["frame"]) == ("sde", "vp"))
    # A network is never exactly odd, and the centre of an imperfect pitchfork may become a well without a
    # crossing: what is compared is the level at which the potential splits.
    measured = rows[1]
    alpha = measured["alpha_vp"]
    return {
        "training": settings,
        "potential": _potentials(scene, net),
        "branches": _branches(scene, found),
        "trajectories": _trajectories(scene, net, seed),
        "critical": rows,
        "alpha": alpha,
        "alpha_exact": exact["alpha_vp"],
        "criterion": measured["name"],
        "relative_error": None if alpha is None else alpha / exact["alpha_vp"] - 1.0,
    }


def draw_world(
    name: str, path: str | Path, train: bool = False, seed: int = 0, progress: Progress | None = None
) -> Record:
    """Explore a world and write its page; see `explore_world`.

    Returns:
        The record of what the page shows.
    """
    record = explore_world(name, train, seed, progress)
    write_report(record, path)
    return record
