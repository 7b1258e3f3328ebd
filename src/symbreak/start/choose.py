"""Choosing a start: which law, at which level, on which grid, for a scheduler and a number of network evaluations.

Everything is put into one unit, the squared error of the final sample in pixel^2, summed over pixels
(docs/choosing-a-start.md derives it):

    law cost A(sigma)      of using the law's denoiser D_q instead of the network's D_net above sigma:
                           integral_sigma^inf (loss_q(u) - loss_net(u)) dlog u, both losses of what the
                           Gaussian's flow carries from level u to the end, (C (C + u^2)^-1)^1/2 (x_0 - D)
    sampler cost B(sigma)  of the real scheduler's steps below sigma, run with the best law in the network's
                           place against that law's exact flow: no network call

The least A + B wins; the standard start competes with A = 0 and the B of its whole schedule. Losses are
denoising losses on given images; no image is sampled from the network, and no distance between images of it
and data is looked at. Source: derived, from theory of arXiv:2305.19693 and the I-MMSE relation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from symbreak.laws import Gaussian
from symbreak.laws.class_posterior import Labels
from symbreak.laws.law import Law, Transports
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.networks.denoiser import Batches, Denoiser, Denoises, as_denoiser
from symbreak.networks.families import as_unet
from symbreak.networks.types import Scheduler
from symbreak.noise import NoiseLevel, Schedule, generator
from symbreak.phases.losses import integral_above, loss_curve
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.ranks import agreed
from symbreak.runtime.run import Run
from symbreak.runtime.shown import Shown, axes, sigma_axis
from symbreak.start.cut_schedule import no_levels, schedule_of, visited
from symbreak.start.free_grid import Search, entropic
from symbreak.start.grids import grids, standard_starts
from symbreak.start.late_start import Grid, LateStart, cut, on_grid
from symbreak.start.learned_steps import mark
from symbreak.start.sampler_cost import END, STATES, SamplerCost, many

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Candidate", "Choice", "LossGap", "Measured", "choose", "free_start", "loss_gaps"]

LEVELS = 12  # start levels that are tried
LOSSES = 20  # levels at which denoising losses are taken
IMAGES = 256  # images for the losses
LOWEST, HIGHEST = 0.1, 3.0  # start levels that are tried, as multiples of the top standard deviation
FOUND = ("free", "entropic")  # grids that are found, not a scheduler's own
ENTROPIES = 24  # levels at which an entropic grid measures the network
STANDARD = 8.0  # how far below its schedule's top white noise may start
WARN_NATS = 1.0
WARN_NONLINEAR = 0.5


class Measured(Law, Protocol):
    """A law with known moments."""

    @property
    def moments(self) -> Moments | LowRankMoments: ...


@dataclass(frozen=True)
class Candidate(Shown):
    """One way to start, and what it costs.

    Attributes:
        law: index of the law, ``None`` for the standard start.
        grid: name of the grid.
        level: where it begins.
        law_cost: squared error of the final sample that the law adds above the level, less the network's own there
            (negative where the network is the worse one), pixel^2 summed over pixels.
        sampler_cost: squared error of the steps below, in the same unit.
    """

    law: int | None
    grid: str
    level: NoiseLevel
    law_cost: float
    sampler_cost: float

    @property
    def cost(self) -> float:
        """Both together."""
        return self.law_cost + self.sampler_cost

    def to_dict(self) -> Values:
        """Plain values, for records."""
        return {**vars(self), "level": self.level.to_dict()}


@dataclass(frozen=True)
class Choice(Shown):
    """Why a start was chosen.

    Attributes:
        laws: their names.
        candidates: everything that was tried.
        chosen: the cheapest.
        nats: lower bound on KL(data || law) at the chosen level and its standard error, from the losses.
        gaussian_nats: the same for one Gaussian.
        nonlinear: share of the network's denoiser, in variance, that one Gaussian's does not explain there.
        images, states: counts behind the two costs.
        signatures: one line each on what speaks against trusting the start.
    """

    laws: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    nats: tuple[float, float]
    gaussian_nats: float
    nonlinear: float
    images: int
    states: int
    signatures: tuple[str, ...]

    @property
    def standard(self) -> Candidate:
        """The best standard start."""
        return min((c for c in self.candidates if c.law is None), key=lambda c: c.cost)

    @property
    def sentence(self) -> str:
        """What was chosen, in one sentence."""
        best, usual = self.chosen, self.standard
        grid = "on the scheduler's own grid" if best.grid == "own" else f"on the grid {best.grid}"
        against = "Squared error of an image that the start adds, less the network's own where a law takes its place:"
        if best.law is None:
            return f"{against} {best.cost:.3g} for the standard start {grid}, and no late start less."
        return (
            f"{against} {best.cost:.3g} for {self.laws[best.law]} at sigma {best.level.sigma:.3g} {grid} "
            f"({best.law_cost:.2g} for the law, {best.sampler_cost:.2g} for the sampler), {usual.cost:.3g} "
            "for the standard start."
        )

    def table(self) -> str:
        """The two curves of the chosen law and grid, the minimum marked, as text."""
        best = self.chosen
        if best.law is None:
            late = [c for c in self.candidates if c.law is not None]
            best = min(late, key=lambda c: c.cost) if late else best
        rows = [c for c in self.candidates if (c.law, c.grid) == (best.law, best.grid)]
        name = "no law" if best.law is None else self.laws[best.law]
        lines = [f"{name}, grid {best.grid}:", f"{'sigma':>8} {'law':>9} {'sampler':>9} {'sum':>9}"]
        for c in sorted(rows, key=lambda c: -c.level.sigma):
            mark = " <- least" if c is self.chosen else ""
            costs = f"{c.law_cost:9.3g} {c.sampler_cost:9.3g} {c.cost:9.3g}"
            lines.append(f"{c.level.sigma:8.3g} {costs}{mark}")
        usual = self.standard
        mark = " <- least" if usual is self.chosen else ""
        lines.append(f"{'standard':>8} {0.0:9.3g} {usual.sampler_cost:9.3g} {usual.cost:9.3g}{mark}")
        if best.grid in FOUND:
            least: dict[str, float] = {}
            for c in sorted(self.candidates, key=lambda c: c.cost):
                if (c.law is None) == (best.law is None):
                    least.setdefault(c.grid, c.cost)
            lines.append("least sum by grid: " + ", ".join(f"{grid} {cost:.3g}" for grid, cost in least.items()))
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """What every start costs against its level; the axes, new ones where none came."""
        ax = axes(ax)
        for law, name in enumerate(self.laws):
            rows = [c for c in self.candidates if (c.law, c.grid) == (law, self.chosen.grid)]
            rows.sort(key=lambda c: c.level.sigma)
            label = f"from {name.split('(')[0]} {law + 1}"
            ax.plot([c.level.sigma for c in rows], [c.cost for c in rows], ".-", label=label)
        ax.axhline(self.standard.cost, color="0.6", label="standard start")
        ax.plot(self.chosen.level.sigma, self.chosen.cost, "o", color="k", mfc="none", ms=10, label="chosen")
        ax.set(yscale="log", ylabel="squared error that a start adds")
        sigma_axis(ax)
        ax.legend(frameon=False, fontsize=8)
        return ax

    def to_dict(self) -> Values:
        """Plain values, for records."""

        whole = {
            **vars(self),
            "candidates": [c.to_dict() for c in self.candidates],
            "chosen": self.chosen.to_dict(),
            "sentence": self.sentence,
        }
        values: Values = plain(whole)
        return values


@dataclass(frozen=True)
class LossGap(Shown):
    """Denoising losses of a law against a network's, on the same noised images.

    Attributes:
        sigma: rising levels [U].
        cost: law cost A of a start at every level [U], pixel^2 summed over pixels.
        nats: integral of (loss_q - loss_net) / u^2 dlog u from every level up [U]: in expectation a lower
            bound on KL(data || law) at that level; ``error`` [U] is its standard error over images.
        nonlinear: E|D_net - D_q|^2 / E|D_net - mean|^2 at every level [U].
        useless: whether the network's loss at a level [U] is above that of the mean or of x itself.
        images: number of images.
    """

    sigma: np.ndarray
    cost: np.ndarray
    nats: np.ndarray
    error: np.ndarray
    nonlinear: np.ndarray
    useless: np.ndarray
    images: int

    def at(self, name: str, sigma: float) -> float:
        """A curve at a level, linear in log sigma, constant beyond the ends."""
        return float(np.interp(math.log(sigma), np.log(self.sigma), getattr(self, name)))


def loss_gaps(
    denoiser: Denoiser,
    laws: Sequence[Law],
    data: torch.Tensor,
    sigma: np.ndarray,
    gaussian: Gaussian,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    run: Run | None = None,
) -> list[LossGap]:
    """Denoising losses of laws against those of a network.

    Args:
        denoiser: network as a `Denoiser`.
        laws: laws with ``.denoise``.
        data: images [N, *S], best ones that neither the laws nor the network were fitted on.
        sigma: rising levels [U] inside the network's range.
        gaussian: whose flow says how much of an error at a level reaches the end.
        seed: of the noise, the same at every level.
        labels: class [N] of every image, for a class-conditional network.
        run: its progress counts levels.

    Returns:
        One `LossGap` a law.
    """
    mean = gaussian.moments.mean.to(data)
    end = END * float(sigma[0])

    def reach(r: torch.Tensor, u: float) -> torch.Tensor:
        return gaussian.transport(mean + r, end, sigma_from=u) - mean

    names = [str(i) for i in range(len(laws))]
    quick = (run or Run()).unstored()
    sources = dict(zip(names, laws))
    losses = loss_curve(denoiser, data, sigma, sources, labels, seed, centre=mean, through=reach, run=quick)
    around = float((data - mean).flatten(1).double().square().sum(1).mean())
    useless = losses.network.mean(1) > np.minimum(around, losses.state.mean(1))
    out = []
    for name in names:
        nats = integral_above((losses.laws[name] - losses.network) / sigma[:, None] ** 2, sigma, order=1)
        cost = (losses.through[name] - losses.through[None]).mean(1)
        out.append(
            LossGap(
                sigma,
                integral_above(cost, sigma, order=1),
                nats.mean(1),
                nats.std(1, ddof=1) / math.sqrt(len(data)),
                losses.apart[name].mean(1) / losses.spread.mean(1),
                useless,
                len(data),
            )
        )
    return out


def choose(
    scheduler: Scheduler,
    laws: Iterable[Transports],
    steps: int,
    denoiser: Denoises | Denoiser,
    data: Batches,
    labels: Labels | None = None,
    seed: int = 0,
    run: Run | None = None,
    grid: str | None = None,
    standard: bool = False,
) -> tuple[LateStart, Choice]:
    """The cheapest start for a scheduler and a number of steps.

    Args:
        scheduler: a diffusers scheduler; its own grid is tried, and Karras and uniform where its class has them.
        laws: laws to start from.
        steps: num_inference_steps.
        denoiser: the network as a `Denoiser`, or a law.
        data: images: an `Images`, a tensor [N, *S], or batches; up to 256 of them, drawn by ``seed``, are used. Best
            are images that neither the laws nor the network have seen: seen ones flatter whoever has seen them.
        labels: class of every image, [N] integers, for a class-conditional network.
        seed: of all noise.
        run: its progress counts levels and grids.
        grid: ``"free"`` looks for the levels of all steps, too; ``"entropic"`` tries only equal steps of the rescaled
            entropy rate, measured on the network at 24 levels more. Schedulers that take no levels keep theirs.
        standard: try no law, only the standard start.

    Returns:
        The start, ``law`` ``None`` where the standard start is the cheapest, and the `Choice` behind it.

    Raises:
        InputError: for shapes that do not fit, or fewer than 16 images.
    """
    laws = list(laws)
    for law in laws:
        if not (isinstance(law, Denoises) and hasattr(law, "moments")):
            name = type(law).__name__
            raise InputError(f"{name} has no .denoise and .moments, which choosing needs. Pass at= with a level.")
    laws = cast(list[Measured], laws)
    try:
        network = as_denoiser(denoiser)
    except TypeError as error:
        raise InputError(str(error)) from None
    images, classes = _some(data, labels, IMAGES, seed)
    shapes = {tuple(network.shape), tuple(images.shape[1:]), *(tuple(law.shape) for law in laws)}
    if len(shapes) > 1:
        raise InputError(
            f"the network works on samples of shape {tuple(network.shape)}, the laws on "
            f"{', '.join(str(tuple(law.shape)) for law in laws)}, the data are {tuple(images.shape[1:])}; expected one "
            "shape. Fit the laws on data of the network's shape and range."
        )
    if len(images) < 16:
        raise InputError(
            f"{len(images)} images to choose a start with; expected at least 16, better 256. Give more with data= or "
            "holdout=."
        )
    _check_classes(network, classes, laws)
    gaussian = _gaussian(laws)
    check_range(images, gaussian)
    low, high, top = _band(schedule_of(scheduler), network, gaussian)
    sigma = np.geomspace(low, top, LOSSES)
    *gaps, single = loss_gaps(network, [*laws, gaussian], images, sigma, gaussian, seed, classes, run)
    _check_network(single)
    # The world in which samplers are tried: the law that lies nearest to the data.
    nearest = int(np.argmin([g.nats[0] for g in gaps]))
    world = laws[nearest]
    levels = np.geomspace(low, high, LEVELS)
    count = STATES if grid is None else many(world)
    made_in = partial(SamplerCost, world, gaussian, lowest=float(low), seed=seed, states=count)
    trials = _tried(scheduler, laws, gaps, steps, () if standard else levels, made_in, run)
    notes: tuple[str, ...] = ()
    if grid is not None and no_levels(scheduler):
        notes = (f"{no_levels(scheduler)}; its own grids were tried instead of the grid {grid}.",)
    elif grid is not None:
        made = _free if grid == "free" else partial(_entropic, network=network, images=images, classes=classes)
        made_for = mark(as_unet(network, scheduler).parameters())
        lowest = max(network.sigma_range[0], schedule_of(scheduler).sigma_range[0], trials.cost.end)
        for one in made(trials, scheduler, laws, gaps, steps, lowest, (float(low), float(high))):
            trials.add(replace(one, grid=replace(cast(Grid, one.grid), network=made_for)), grid, gaps, laws)
    starts, states = trials.starts, trials.cost.count
    candidates = [c for c in starts if math.isfinite(c.cost)]
    if grid == "entropic" and not notes:  # who asks for it does not want another
        candidates = [c for c in candidates if c.grid == grid]
    if not candidates:
        raise InputError(f"{type(scheduler).__name__} has no start of {steps} steps here. Ask for fewer.")
    # Processes on different machines may differ in the last bits of a cost, but have to take one start.
    best = candidates[agreed(lambda: min(range(len(candidates)), key=lambda i: candidates[i].cost))]
    at = best.level.sigma
    of = single if best.law is None else gaps[best.law]
    nats, nonlinear = (of.at("nats", at), of.at("error", at)), single.at("nonlinear", at)
    signatures = _signatures(best, gaps[nearest], nats, nonlinear, low, high)
    names = tuple(repr(law) for law in laws)
    gaussian_nats = single.at("nats", at)
    choice = Choice(names, tuple(candidates), best, nats, gaussian_nats, nonlinear, len(images), states, signatures)
    start = starts[best]
    return replace(start, notes=(*start.notes, *notes)), choice


def _gaussian(laws: Sequence[Measured]) -> Gaussian:
    """The Gaussian that one of the laws is or has, else that of the first law's moments."""
    known = (g for law in laws for g in (law, getattr(law, "gaussian", None)) if isinstance(g, Gaussian))
    return next(known, None) or Gaussian(laws[0].moments)


def _band(full: Schedule, network: Denoiser, gaussian: Gaussian) -> tuple[float, float, float]:
    """Lowest and highest start level that is tried, and the highest level at which losses are taken."""
    top = math.sqrt(float(gaussian.eigenvalues[0]))
    ends = (max(full.sigma_range[0], network.sigma_range[0]), min(full.sigma_range[1], network.sigma_range[1]))
    low = max(LOWEST * top, ends[0] * 1.001)
    high = min(HIGHEST * top, ends[1] * 0.999)
    if not low < high:
        raise InputError(
            f"the data have a top standard deviation of {top:.3g}, the schedule runs from sigma {ends[0]:.3g} to "
            f"{ends[1]:.3g}: no start level lies in both. Bring the data into the network's range."
        )
    return low, high, min(20 * top, ends[1] * 0.999)


@dataclass
class _Trials:
    """Starts that were tried in a world, by what they cost."""

    cost: SamplerCost
    random: bool = False  # whether the sampler draws noise
    starts: dict[Candidate, LateStart] = field(default_factory=dict)

    def add(self, start: LateStart, grid: str, gaps: Sequence[LossGap], laws: Sequence[Measured]) -> None:
        """Try a start, of every law where it has one."""
        cost = self.cost.error(start, self.random)
        if start.law is None:
            self.starts[Candidate(None, grid, start.level, 0.0, cost)] = start
            return
        for i, law in enumerate(laws):
            law_cost = gaps[i].at("cost", start.level.sigma)
            self.starts[Candidate(i, grid, start.level, law_cost, cost)] = replace(start, law=law)

    def best(self, late: bool) -> LateStart | None:
        """The cheapest of the late or of the standard starts."""
        some = [c for c in self.starts if (c.law is not None) == late and math.isfinite(c.cost)]
        return self.starts[min(some, key=lambda c: c.cost)] if some else None


def _tried(
    scheduler: Scheduler,
    laws: list[Measured],
    gaps: list[LossGap],
    steps: int,
    levels: Sequence[float] | np.ndarray,
    made_in: Callable[[set[float]], SamplerCost],
    run: Run | None = None,
) -> _Trials:
    """Every start that the scheduler's grids offer, by what it costs in a world made for their levels."""
    tried = grids(scheduler)
    late = {name: _late(grid, laws[0], steps, levels) for name, grid in tried.items()}
    trials = _Trials(made_in({start.level.sigma for some in late.values() for start in some}))
    run = (run or Run()).named("starts")
    for place, (name, grid) in enumerate(tried.items()):
        run.tell(place, len(tried))
        usual = standard_starts(grid, steps, skip=True)
        anyone = next(iter((*usual.values(), *late[name])), None)
        if anyone is None:
            continue  # no start of so many steps on this grid
        trials.random = trials.cost.is_stochastic(anyone)
        for spacing, start in usual.items():
            trials.add(start, name + ("" if spacing == "own" else f", {spacing}"), gaps, laws)
        for start in late[name]:
            trials.add(start, name, gaps, laws)
    run.tell(len(tried), len(tried))
    return trials


def _free(
    trials: _Trials,
    scheduler: Scheduler,
    laws: Sequence[Measured],
    gaps: Sequence[LossGap],
    steps: int,
    lowest: float,
    band: tuple[float, float],
) -> Iterator[LateStart]:
    """The late and the standard start whose levels were all found together, from the cheapest of the usual grids."""

    top = schedule_of(scheduler).sigma_range[1]

    def law_cost(sigma: float) -> float:
        return min(gap.at("cost", sigma) for gap in gaps)

    def searched(usual: LateStart) -> LateStart:
        # Far above the data white noise may as well start lower, but not where signal is missing.
        first = band if usual.law is not None else (top if math.isinf(top) else top / STANDARD, top)
        law = None if usual.law is None else laws[0]
        search = Search(trials.cost, scheduler, law, law_cost, first, lowest, trials.random)
        # Processes on different machines may differ in the last bits.
        levels = agreed(lambda: search.run(_begin(usual, steps, first, lowest)))
        return on_grid(scheduler, law, Grid("free", levels))

    for late in (True, False):
        usual = trials.best(late)
        if usual is not None:
            with suppress(InputError):
                yield searched(usual)


def _begin(usual: LateStart, steps: int, first: tuple[float, float], lowest: float) -> list[float]:
    """The levels that a search begins at: a start's own, or even ratios where the scheduler repeats some."""
    levels = visited(usual.scheduler, schedule_of(usual.full))
    top = min(max(levels[0], first[0]), first[1])
    if len(levels) == steps and levels[-1] > lowest and top > levels[min(1, steps - 1)]:
        return [top, *levels[1:]]
    if math.isinf(top):
        return [top, *np.geomspace(100.0, lowest * 2, steps - 1).tolist()]
    return [float(s) for s in np.geomspace(top, max(lowest * 2, top / 100), steps)]


def _entropic(
    trials: _Trials,
    scheduler: Scheduler,
    laws: Sequence[Measured],
    gaps: Sequence[LossGap],
    steps: int,
    lowest: float,
    band: tuple[float, float],
    *,
    network: Denoiser,
    images: torch.Tensor,
    classes: torch.Tensor | None,
) -> Iterator[LateStart]:
    """Starts on the entropic grid, from every level that the scheduler's own grid was tried at."""
    high = min(schedule_of(scheduler).sigma_range[1], network.sigma_range[1], 1000 * band[1])
    sigma = np.geomspace(lowest * 1.001, high * 0.999, ENTROPIES)
    losses = loss_curve(network, images, sigma, labels=classes)
    late = sorted({c.level.sigma for c in trials.starts if c.law is not None})
    for law, tops in ((None, [high]), (laws[0], late)):
        for top in tops:
            levels = entropic(losses, top, steps)
            with suppress(InputError):  # more steps than lie below this level
                yield on_grid(scheduler, law, Grid("entropic", levels, None, ENTROPIES * len(images)))


def free_start(scheduler: Scheduler, law: Measured, steps: int, level: NoiseLevel | None, seed: int = 0) -> LateStart:
    """A start at a given level, or the standard one, on the grid that costs the sampler least; without a network.

    Args:
        scheduler: a diffusers scheduler that takes levels.
        law: with ``.denoise`` and ``.moments``; it stands in the network's place.
        steps: num_inference_steps.
        level: where it begins; ``None`` is the standard start.
        seed: of the noise.
    """
    gaussian = _gaussian([law])
    low = LOWEST * math.sqrt(float(gaussian.eigenvalues[0]))
    levels = () if level is None else (level.sigma,)
    none = LossGap(np.ones(1), np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), 0)
    made_in = partial(SamplerCost, law, gaussian, lowest=min([low, *levels]), seed=seed, states=many(law))
    trials = _tried(scheduler, [law], [none], steps, levels, made_in)
    if level is not None:
        trials.starts = {c: start for c, start in trials.starts.items() if c.law is not None}
    lowest = max(schedule_of(scheduler).sigma_range[0], trials.cost.end)
    band = (level.sigma, level.sigma) if level is not None else (low, low)
    for start in _free(trials, scheduler, [law], [none], steps, lowest, band):
        trials.add(start, "free", [none], [law])
    costs: dict[str, float] = {}
    for c in sorted(trials.starts, key=lambda c: c.cost):
        costs.setdefault(c.grid, c.cost)
    best = trials.best(level is not None)
    if best is None:
        raise InputError(f"{type(scheduler).__name__} has no start of {steps} steps here. Ask for fewer.")
    said = ", ".join(f"{name} {cost:.3g}" for name, cost in costs.items())
    return replace(best, notes=(*best.notes, f"Squared error that the sampler adds to an image, by grid: {said}."))


def _late(grid: Scheduler, law: Law, steps: int, sigmas: Sequence[float] | np.ndarray) -> list[LateStart]:
    """Late starts at the levels that a scheduler can offer, each once."""
    starts: dict[float, LateStart] = {}
    for s in map(float, sigmas):
        with suppress(InputError):  # more steps than lie below this level
            start = cut(grid, law, steps, NoiseLevel(s))
            starts.setdefault(round(math.log(start.level.sigma), 6), start)
    return list(starts.values())


def _some(data: Batches, labels: Labels | None, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to ``count`` images of a data set [N, *S] float32 drawn by the seed, and their classes [N]."""
    if isinstance(data, str):
        raise InputError(f"data={data!r} is a name; expected images. Pass sb.images({data!r}).")
    if isinstance(data, torch.Tensor | np.ndarray):
        data = [torch.as_tensor(data)]
    batches = [torch.as_tensor(batch).float().cpu() for batch in data]
    if not batches:
        raise InputError("no images to choose a start with; expected at least 16, better 256.")
    whole = torch.cat(batches)
    order = torch.randperm(len(whole), generator=generator(seed, 24))[:count].sort().values
    if labels is None:
        return whole[order], None
    try:
        y = (labels.cpu() if isinstance(labels, torch.Tensor) else torch.as_tensor(np.asarray(labels))).reshape(-1)
    except TypeError:
        raise InputError("labels that are no numbers; expected one whole number an image.") from None
    if len(y) != len(whole) or y.is_floating_point():
        raise InputError(f"{len(y)} labels for {len(whole)} images to choose with; expected one whole number each.")
    return whole[order], y[order].long()


def _check_classes(network: Denoiser, classes: torch.Tensor | None, laws: Sequence[Law]) -> None:
    """Labels that the network or a law does not have, or that are missing, raise an error."""
    config = getattr(getattr(network, "unet", None), "config", {})
    known = config.get("num_class_embeds")
    bound = "class_labels" in getattr(network, "condition", {})
    if classes is None:
        if known and not bound:
            raise InputError(f"the network has {known} classes, but no labels came. Pass labels=, one an image.")
        return
    if not known:
        raise InputError("labels came for a network without classes. Leave them out.")
    if not 0 <= int(classes.min()) <= int(classes.max()) < known:
        raise InputError(
            f"labels from {int(classes.min())} to {int(classes.max())}; the network knows 0 to {known - 1}."
        )
    for law in laws:
        components = getattr(law, "classes", None)
        missing = [] if components is None else sorted(set(classes.tolist()) - set(components.tolist()))
        if missing:
            raise InputError(
                f"the images to choose with have the class {missing[0]}, {type(law).__name__} has no component for it. "
                "Fit the law on data of all classes."
            )


def _check_network(gap: LossGap) -> None:
    """Data that the network cannot denoise at all raise an error: they are not in the range it was trained on."""
    if gap.useless.all():
        raise InputError(
            f"at every level from sigma {gap.sigma[0]:.3g} to {gap.sigma[-1]:.3g} the network's answer is further from "
            "the data than the data's mean or the noised image itself: the data are not in the network's range, "
            "[-1, 1] for images, or the network is not trained."
        )


def check_range(images: torch.Tensor, gaussian: Gaussian) -> None:
    """Laws that were fitted on data of another range than the images to choose with raise an error."""
    around = float(((images - gaussian.moments.mean.to(images)) ** 2).flatten(1).sum(1).mean())
    apart = float((images.mean(0) - gaussian.moments.mean.to(images)).square().sum())
    fitted = float(gaussian.eigenvalues.sum()) + gaussian.floor * (gaussian.dim - len(gaussian.eigenvalues))
    if fitted > 0 and not (0.35 < around / fitted < 3 and (around - apart) / fitted > 0.1):
        raise InputError(
            f"the data lie at a mean squared distance of {around:.3g} from the law's mean, the law expects "
            f"{fitted:.3g}: the law was fitted on data of another range or kind. Fit it on data in the network's range."
        )


def _signatures(
    best: Candidate, world: LossGap, nats: tuple[float, float], nonlinear: float, low: float, high: float
) -> tuple[str, ...]:
    """What speaks against trusting a start."""
    notes = []
    if best.law is None:
        # Integrals from a level up: the most negative one says by how much, the highest level near it from where on up.
        surely = world.nats + 2 * world.error
        if best.grid != "free" or surely.min() > -WARN_NATS:
            return ()
        i = int(np.flatnonzero(surely <= 0.95 * surely.min())[-1])
        return (
            f"The free grid was found with a law in the network's place, but above sigma {world.sigma[i]:.2g} the "
            f"network is {-world.nats[i]:.2g} +- {2 * world.error[i]:.1g} nats worse than the law: other grids may be "
            "better for it. Start late, or compare grids by samples.",
        )
    if nats[0] - 2 * nats[1] > WARN_NATS:
        notes.append(
            f"The law is at least {nats[0]:.2g} +- {2 * nats[1]:.1g} nats from the data at this level: outside its "
            "range; a better law would pay."
        )
    if nonlinear > WARN_NONLINEAR:
        notes.append(
            "The network's early dynamics are not linear: the mean square of its denoiser's distance from one "
            f"Gaussian's is {nonlinear:.0%} of its own variance here."
        )
    if best.level.sigma <= low * 1.05 or best.level.sigma >= high * 0.95:
        way = (
            "the network adds little to the law even there; train it for longer, or take the law's own samples"
            if best.level.sigma <= low * 1.05
            else "little of the schedule is left out; a law that is nearer to the data would start later"
        )
        notes.append(f"The level lies at an end of what was tried ({low:.3g} to {high:.3g}): {way}.")
    return tuple(notes)
