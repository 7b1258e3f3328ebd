"""The late start itself: a scheduler cut at a level, and the state that its first step expects.

Above the symmetry breaking the noised data are nearly Gaussian, so a sampler need not start from white
noise at the top: it starts at level s from  x = mu + Q sqrt(L + s^2) Q^T z, z ~ N(0, I), and spends its
steps below (Raya & Ambrogioni 2023, arXiv:2305.19693). Nothing else about the sampler changes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
import numpy as np
import torch

from symbreak.data.images import Images, Units
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.law import Transports
from symbreak.laws.saving import law_from_tensors, law_tensors
from symbreak.networks.denoiser import Denoiser, Denoises, LawDenoiser, as_denoiser
from symbreak.networks.foreign import check_settings
from symbreak.networks.samplers import check_is_scheduler
from symbreak.networks.types import Pipeline, Scheduler
from symbreak.noise import NoiseLevel, schedule, sigma_of
from symbreak.runtime.files import InputError, read_tensors, write_tensors
from symbreak.runtime.plain import Values
from symbreak.runtime.shown import Shown, axes
from symbreak.start.cut_schedule import (
    GRIDS,
    SUPPORTED,
    begins_at,
    check_levels,
    check_scheduler,
    check_steps,
    cut_scheduler,
    schedule_of,
    scheduler_on,
    takes,
    timed,
    visited,
)
from symbreak.start.in_pipeline import hold, pipeline_arguments
from symbreak.start.learned_steps import Learned, Mark, check_mark, teach

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "SUPPORTED",
    "Grid",
    "LateStart",
    "LateStartWarning",
    "check_same_network",
    "cut",
    "law_in_words",
    "on_grid",
    "standard_start",
    "with_steps",
]

FORMAT, VERSIONS = "symbreak.start", ("1", "2", "3")  # 2: with a grid of its own, 3: with learned steps
LAW = "law."  # prefix of the law's tensors and metadata in the file of a start


class LateStartWarning(UserWarning):
    """A late start is legal but outside the range where theory vouches for it."""


@dataclass(frozen=True)
class Grid:
    """Levels of all steps, made for one number of steps.

    Attributes:
        name: how they were found: "free", "entropic" or "given".
        sigmas: falling, one a step; the last step goes down to 0.
        network: what tells the network that they were made for from others (`mark`); ``None`` fits any.
        evaluations: network evaluations that were spent to find them, besides those that choose a start.
    """

    name: str
    sigmas: tuple[float, ...]
    network: Mark | None = None
    evaluations: int = 0

    def check(self, weights: Iterable[torch.Tensor]) -> None:
        """A network with other weights than the one that the grid was made for raises an error."""
        check_mark(self.network, weights, f"{self.name} grid was")

    def to_dict(self) -> Values:
        """Plain values, for records."""
        return {"name": self.name, "sigmas": list(self.sigmas), "evaluations": self.evaluations}


@dataclass(frozen=True, repr=False)
class LateStart(Shown):
    """A ready scheduler and the state that its first step expects.

    Attributes:
        scheduler: cut, timesteps set, never stepped; `fresh` gives copies to step with.
        level: the level where it begins, in the frame of the scheduler's states.
        law: the law the start is drawn from; ``None`` is the standard start from white noise.
        steps: num_inference_steps.
        asked: the requested level; ``level`` is what the scheduler offers.
        full: the scheduler before it was cut.
        notes: one line each on what was rounded or is outside the theory.
        choice: why it was chosen, where ``at="auto"`` did.
        pictures: whether samples of the shape of pictures are pixels, which `generate` cuts to [-1, 1].
        units: of the network's samples, where they are no pictures: what brings them back to the data's own.
        grid: levels of the steps that were found for them; ``None`` where the scheduler makes its own.
        learned: coefficients of its steps, where they were learned from the network; `with_steps` gives them.
    """

    scheduler: Scheduler
    level: NoiseLevel
    law: Transports | None
    steps: int
    asked: NoiseLevel
    full: Scheduler
    notes: tuple[str, ...] = field(default=())
    choice: Any | None = None
    pictures: bool = True
    units: Units | None = None
    grid: Grid | None = None
    learned: Learned | None = None

    def __post_init__(self) -> None:
        # Pipelines set its timesteps themselves. Levels and steps that were made for their number allow no other.
        hold(self.scheduler, fixed=self.grid is not None or self.learned is not None)

    def __repr__(self) -> str:
        begins = f"sigma {self.level.sigma:.4g} with {self.calls} network evaluations"
        law = "white noise" if self.law is None else repr(self.law)
        steps = f"{self.steps} steps" if self.learned is None else f"{self.steps} learned steps"
        return f"LateStart({type(self.scheduler).__name__}, {steps}, from {begins},\n          law={law})"

    @property
    def calls(self) -> int:
        """Network evaluations (NFE) a sample costs: one an entry of the scheduler's timesteps."""
        return len(self.scheduler.timesteps)

    def fresh(self) -> Scheduler:
        """A scheduler at its first step, independent of every other."""
        return copy.deepcopy(self.scheduler)

    def __call__(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """White noise [B, *S] -> the state that ``scheduler.step`` expects first, deterministically.

        Args:
            noise: [B, *S].
            labels: class [B] of every sample, for class-conditional networks; a law without classes is the
                same for all of them.
        """
        if self.law is None:
            return noise * self._noise_scale
        return self.state(self.ve(noise, labels))

    def ve(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The start as a VE state x = x_0 + sigma eps at ``level.sigma``, for EDM and k-diffusion samplers.

        Args:
            noise: [B, *S].
            labels: class [B] of every sample, as in a call.

        Raises:
            InputError: where the start is pure noise without any signal (sigma infinite).
        """
        if self.law is None:
            if self.level.alpha == 0:
                raise InputError("this start is pure noise, sigma infinite, and has no VE state. Start below the top.")
            return self(noise) / self.level.alpha
        classes = {} if labels is None or getattr(self.law, "classes", None) is None else {"labels": labels}
        transport: Callable[..., torch.Tensor] = self.law.transport
        return transport(noise, self.level.sigma, **classes)

    def state(self, x: torch.Tensor) -> torch.Tensor:
        """A VE state x = x_0 + sigma eps at the start level, in the scheduler's own frame."""
        return self.level.alpha * x

    def latents(self, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The start for pipelines that take ``latents=`` and multiply them by ``init_noise_sigma``."""
        return self(noise, labels) / self._noise_scale

    def arguments(self, pipe: Pipeline, noise: torch.Tensor, labels: torch.Tensor | None = None) -> Values:
        """What the own call of a diffusers pipeline needs to start here: ``pipe(prompt, **start.arguments(pipe, z))``.

        Latents, packed where it takes them so, the number of steps, and the levels of the steps where it would make
        its own. A pipeline that puts the scheduler back to the top all the same raises an error.

        Args:
            pipe: a pipeline whose scheduler is this start's: ``pipe.scheduler = start.fresh()``.
            noise: white noise [B, *S].
            labels: class [B] of every sample, for the start's law.

        Returns:
            Names and values: ``latents``, ``num_inference_steps``, and ``sigmas``, ``height``, ``width``,
            ``num_frames`` where the pipeline takes them.

        Raises:
            InputError: for a pipeline with another scheduler, or one that takes no latents.
        """
        return pipeline_arguments(self.scheduler, self.steps, pipe, self.latents(noise, labels).to(noise))

    @property
    def _noise_scale(self) -> float:
        # Flow-matching schedulers have no init_noise_sigma: their pipelines start from the noise itself.
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def denoiser(self, network: Denoises | Denoiser) -> Denoiser:
        """The law's posterior mean above the start level, the network's at and below it.

            D(x, sigma) = D_law(x, sigma)       sigma > level.sigma        (no network evaluation)
                          D_network(x, sigma)   sigma <= level.sigma

        For samplers of one's own that begin at any level, however noisy. A standard start has no law: its
        denoiser is the network itself.

        Args:
            network: a `Denoiser`, such as ``sb.denoiser(unet, scheduler)``, with its condition bound.

        Returns:
            A `Denoiser`; the upper end of its ``sigma_range`` is infinite.

        Raises:
            InputError: where the shapes of law and network differ.
        """
        below = as_denoiser(network)
        if self.law is None:
            return below
        if tuple(below.shape) != tuple(self.law.shape):
            raise InputError(
                f"the start's law has the shape {tuple(self.law.shape)}, the network {tuple(below.shape)}. Fit it on "
                "such data."
            )
        return _Hybrid(LawDenoiser(cast(Denoises, self.law)), below, self.level.sigma)

    def of(self, data: Images) -> LateStart:
        """The same start of a network whose samples are in the units of its data."""
        return replace(self, pictures=data.units is None, units=data.units)

    def check_units(self, data: Images) -> None:
        """Data in other units than the network's samples raise an error that names both."""
        if self.units is None or (data.units is not None and self.units.same(data.units)):
            return
        here, there = ("pixels" if u is None else u.spelled(1.0) for u in (self.units, data.units))
        raise InputError(
            f"the network's samples are measured in {here}, {data.name} in {there}. Open it as for the training "
            "(--scale), or with sb.samples(..., scale=start.units)."
        )

    def to_dict(self) -> Values:
        """Plain values, for records."""
        return {
            "scheduler": type(self.scheduler).__name__,
            "steps": self.steps,
            "calls": self.calls,
            "level": self.level.to_dict(),
            "law": None if self.law is None else repr(self.law),
            "notes": list(self.notes),
            **({} if self.grid is None else {"grid": self.grid.to_dict()}),
            **({} if self.learned is None else {"learned": self.learned.to_dict()}),
            "choice": None if self.choice is None else self.choice.to_dict(),
        }

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the law, and as JSON the uncut scheduler, the requested level and the steps.

        Of a ``choice`` its sentence is kept, in ``notes``, not its curves.

        Raises:
            InputError: for a law that is neither a Gaussian nor a mixture, or a scheduler not of diffusers.
        """
        name = type(self.full).__name__
        if getattr(diffusers, name, None) is not type(self.full):
            raise InputError(f"a start with the scheduler {name} cannot be saved: diffusers has no such class.")
        about: Values = {
            "scheduler": json.loads(self.full.to_json_string()),
            "class": name,
            "steps": self.steps,
            "notes": list(self.notes),
            "law": self.law is not None,
            **({} if self.pictures else {"pictures": False}),
            **({} if self.units is None else {"units": self.units.to_dict()}),
            **({} if self.grid is None else {"grid": self.grid.to_dict() | {"network": self.grid.network}}),
            **({} if self.learned is None else {"learned": self.learned.to_dict() | {"network": self.learned.network}}),
        }
        version = VERSIONS[2 if self.learned is not None else self.grid is not None]
        metadata = {"format": FORMAT, "version": version, "start": json.dumps(about, sort_keys=True)}
        tensors = {"asked": _pair(self.asked), **self._realised()}
        if self.law is not None:
            law, head = law_tensors(self.law)
            tensors |= {LAW + key: value for key, value in law.items()}
            metadata |= {LAW + key: text for key, text in head.items()}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> LateStart:
        """Read what `save` wrote and cut the scheduler again: the same timesteps, level and bits.

        Raises:
            InputError: for a file that is missing, of another format or a newer version, or broken, and where
                this version of diffusers cuts the scheduler to other timesteps than the file says.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path} holds no start (format {metadata.get('format')}). Expected one of LateStart.save."
            )
        if metadata.get("version") not in VERSIONS:
            raise InputError(
                f"{path} is a start saved by a newer symbreak (start version {metadata.get('version')}, this one reads "
                f"{', '.join(VERSIONS)}). Update it."
            )
        try:
            about = json.loads(metadata["start"])
            name, steps, notes = str(about["class"]), about["steps"], tuple(map(str, about["notes"]))
            if not (isinstance(steps, int) and steps >= 1):
                raise TypeError(f"{steps} steps")
            kind: Any = getattr(diffusers, name, None)
            known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
            if not known:
                raise InputError(f"{path} names the scheduler {name}, which diffusers does not have. Update diffusers.")
            check_settings(about["scheduler"], path)  # of a text diffusers would ask the hub
            full = kind.from_config(about["scheduler"])
            level, law = NoiseLevel(*tensors["asked"].tolist()), None
            if about["law"]:
                parts = {key.removeprefix(LAW): t for key, t in tensors.items() if key.startswith(LAW)}
                head = {key.removeprefix(LAW): text for key, text in metadata.items() if key.startswith(LAW)}
                law = law_from_tensors(parts, head, path)
            if "grid" in about:
                saved = about["grid"]
                mark = saved["network"] and (float(saved["network"][0]), float(saved["network"][1]))
                grid = Grid(str(saved["name"]), check_levels(saved["sigmas"], steps), mark, int(saved["evaluations"]))
                start = on_grid(full, law, grid)
            else:
                start = standard_start(full, steps) if law is None else cut(full, law, steps, level)
            if "learned" in about:
                start = with_steps(start, Learned.of(about["learned"], steps))
            units = Units.of(about["units"]) if "units" in about else None
            pairs = [(value, tensors[key]) for key, value in start._realised().items()]
            # Another machine's logarithm may differ in the last digits; another rule of diffusers in the first.
            same = all(a.shape == b.shape and torch.allclose(a, b.double()) for a, b in pairs)
        except InputError:
            raise
        except Exception as error:  # diffusers meets settings that do not fit each other in many ways
            what = " ".join(str(error).split())[:80]
            raise InputError(f"{path} holds a broken start ({type(error).__name__}: {what}). Save it again.") from None
        if not same:
            raise InputError(
                f"{path}: this symbreak with diffusers {diffusers.__version__} gives {name} other timesteps than the "
                f"start was saved with (diffusers {about['scheduler'].get('_diffusers_version')}). Make the start "
                "again, or use the older versions."
            )
        return replace(start, asked=level, notes=notes, pictures=about.get("pictures") is not False, units=units)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The levels at which the network is asked, and those of the standard start; the axes, new where none came.

        After ``at="auto"`` what every start costs against its level instead, see `explain`.
        """
        if self.choice is not None:
            drawn: Axes = self.choice.plot(ax)
            return drawn
        ax, full = axes(ax), schedule_of(self.full)
        pairs = [("standard start", standard_start(self.full, self.steps)), (f"from {type(self.law).__name__}", self)]
        for name, start in pairs[: 1 + (self.law is not None)]:
            sigmas = [full.level(float(t)).sigma for t in start.scheduler.timesteps]
            ax.plot(range(1, len(sigmas) + 1), sigmas, "o-", label=name)
        ax.set(yscale="log", xlabel="network evaluation", ylabel="sigma")
        ax.legend(frameon=False)
        return ax

    def _realised(self) -> dict[str, torch.Tensor]:
        """What tells, in a file, whether the scheduler was cut again to the same."""
        return {"level": _pair(self.level), "timesteps": torch.as_tensor(self.scheduler.timesteps).double()}

    def check_made_for(self, weights: Iterable[torch.Tensor]) -> None:
        """A network with other weights than the one that grid and steps were made for raises an error."""
        weights = list(weights)
        for made in (self.grid, self.learned):
            if made is not None:
                made.check(weights)

    def explain(self) -> str:
        """Where it starts, what it costs, what to know; after ``at="auto"`` the two curves and their minimum."""
        law = "white noise" if self.law is None else repr(self.law)
        head = (
            f"{type(self.scheduler).__name__}, {self.steps} steps, {self.calls} network evaluations, from {law} at "
            f"sigma {self.level.sigma:.4g} (OU time {self.level.ou_time:.4g})."
        )
        certificate = getattr(self.law, "certificate", lambda sigma: None)(self.level.sigma)
        low_rank = (certificate.sentence(),) if certificate is not None and certificate.modes else ()
        text = " ".join((head, *low_rank, *self.notes))
        learned = () if self.learned is None else (self.learned.sentence,)
        return "\n".join((text, *self._grids(), *learned, *(() if self.choice is None else (self.choice.table(),))))

    def _grids(self) -> list[str]:
        """The levels of a grid of its own beside the scheduler's, from the same level down."""
        if self.grid is None:
            return []
        rows = {self.grid.name: self.scheduler}
        for name, karras in (("Karras", True), ("uniform", False)):
            if karras and not takes(self.full, GRIDS[0]):
                continue
            spaced = {g: karras and g == GRIDS[0] for g in GRIDS if takes(self.full, g)}
            with suppress(InputError):  # more steps than these grids have
                other = type(self.full).from_config(self.full.config, **spaced)
                usual = cut(other, self.law, self.steps, self.level) if self.law else standard_start(other, self.steps)
                rows[name] = usual.scheduler
        full = schedule_of(self.full)
        lines = [f"{name:>9}: " + " ".join(f"{s:.4g}" for s in visited(made, full)) for name, made in rows.items()]
        cost = self.grid.evaluations
        spent = [f"The grid cost {cost:,} network evaluations of one image, once."] if cost else []
        return [f"levels of the {self.steps} steps, then 0:", *lines, *spent]


def _pair(level: NoiseLevel) -> torch.Tensor:
    return torch.tensor([level.sigma, level.alpha], dtype=torch.float64)


class _Hybrid:
    """A law's denoiser above a level and a network's at and below it; see `LateStart.denoiser`."""

    def __init__(self, above: Denoiser, below: Denoiser, sigma: float) -> None:
        self.above, self.below, self.sigma = above, below, sigma
        self.shape: tuple[int, ...] = tuple(below.shape)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """From the network's lower end to infinity."""
        return float(self.below.sigma_range[0]), math.inf

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        s = torch.as_tensor(sigma_of(sigma), dtype=torch.float64, device=x.device).reshape(-1)
        # A grid kept in float32 may begin a hair above the level that it was made of.
        inside = s <= self.sigma * (1 + 1e-6)
        if bool(inside.all()):
            return self.below(x, s.clamp(max=self.sigma) if s.numel() > 1 else min(float(s), self.sigma))
        if not bool(inside.any()):
            return self.above(x, sigma)
        out = torch.empty_like(x)
        out[inside] = self.below(x[inside], s[inside].clamp(max=self.sigma))
        out[~inside] = self.above(x[~inside], s[~inside])
        return out


def cut(scheduler: Scheduler, law: Transports, steps: int, level: NoiseLevel) -> LateStart:
    """A late start at a level, or at the nearest that the scheduler can offer (its ``notes`` then say so).

    Raises:
        InputError: for a scheduler that cannot be cut, or more steps than the cut schedule has.
    """
    check_scheduler(scheduler)
    check_steps(steps)
    full = schedule_of(scheduler)
    ready = cut_scheduler(scheduler, level, int(steps), full)
    begins = begins_at(ready, full)
    notes: tuple[str, ...] = ()
    if abs(math.log(begins.sigma / level.sigma)) > 0.02:
        name = type(scheduler).__name__
        notes = (f"The grid of {name} begins at sigma {begins.sigma:.4g} instead of {level.sigma:.4g}.",)
    return LateStart(ready, begins, law, int(steps), level, scheduler, notes)


def on_grid(scheduler: Scheduler, law: Transports | None, grid: Grid) -> LateStart:
    """A start on the levels of a grid, from a law or from white noise, or on the nearest that the network knows.

    Args:
        scheduler: a diffusers scheduler that takes levels; it is not changed.
        law: the law to start from; ``None`` is white noise.
        grid: its first level is where the start begins.

    Raises:
        InputError: for a scheduler that takes no levels, levels outside its schedule, or more than it tells apart.
    """
    full = schedule_of(scheduler)
    ready = scheduler_on(scheduler, grid.sigmas, full)
    begins = begins_at(ready, full)
    return LateStart(ready, begins, law, len(grid.sigmas), begins, scheduler, grid=grid)


def with_steps(start: LateStart, learned: Learned) -> LateStart:
    """A start whose sampler's steps have learned coefficients; the other stays as it is."""
    if len(learned.coefficients) != start.calls:
        raise InputError(
            f"coefficients of {len(learned.coefficients)} learned steps came for a start of {start.calls}. Learn them "
            "for it."
        )
    ready = teach(start.fresh(), schedule_of(start.full), learned.coefficients)
    return replace(start, scheduler=ready, learned=learned)


def standard_start(scheduler: Scheduler, steps: int, spacing: str | None = None) -> LateStart:
    """The usual start from white noise at the top of the schedule, with the face of a late one.

    Args:
        scheduler: any diffusers scheduler; it is not changed.
        steps: num_inference_steps.
        spacing: ``"leading"``, ``"linspace"`` or ``"trailing"``; ``None`` keeps the scheduler's own.
    """
    check_steps(steps)
    check_is_scheduler(scheduler)
    cls = type(scheduler)
    if spacing is not None and not takes(scheduler, "timestep_spacing"):
        raise InputError(f"{cls.__name__} has no timestep_spacing. Leave spacing out.")
    config = dict(scheduler.config) | ({} if spacing is None else {"timestep_spacing": spacing})
    ready = timed(cls.from_config(config), int(steps))
    level = begins_at(ready, schedule(scheduler))
    return LateStart(ready, level, None, int(steps), level, scheduler if spacing is None else cls.from_config(config))


def law_in_words(law: Transports | None) -> str:
    """What a start is drawn from, for people.

    >>> law_in_words(None)
    'white noise'
    """
    if law is None:
        return "white noise"
    if isinstance(law, PrincipalMixture):
        each = "cluster" if law.classes is None else "class"
        count = law.inner.components
        several = law.classes is not None and len(law.classes.unique()) < count
        return f"a mixture of {count} Gaussians, {'several' if several else 'one'} a {each}"
    if isinstance(law, Gaussian):
        return "one Gaussian" if law.rank == law.dim else f"one Gaussian of {law.rank} leading modes"
    return repr(law)


def check_same_network(start: LateStart, scheduler: Scheduler, name: str | Path | None) -> None:
    """A start whose scheduler speaks of other noise, or of another prediction, than a network's raises an error."""
    schedules = [schedule_of(s) for s in (start.full, scheduler)]
    kinds = [str(s.config.get("prediction_type", "flow")) for s in (start.full, scheduler)]
    ranges = [f"{s.sigma_range[0]:.3g} to {s.sigma_range[1]:.3g}" for s in schedules]
    ends = [(s.t_min, s.t_max) for s in schedules]
    same = ends[0] == ends[1] and kinds[0] == kinds[1]
    curves = [[s.level(t).alpha_bar for t in np.linspace(*ends[0], 8)] for s in schedules] if same else []
    if not (same and np.allclose(curves[0], curves[1])):
        raise InputError(
            f"{name} is a start for networks with the prediction {kinds[0]} over sigma {ranges[0]}; this network "
            f"predicts {kinds[1]} over {ranges[1]}. Fit a start for it."
        )
