"""A diagnosis while it is made: its data and network, and what was measured so far, as plain values for its record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve
from symbreak.data.images import Images, describe
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser
from symbreak.noise import NoiseLevel, Schedule, generator
from symbreak.phases.mechanism import Check
from symbreak.phases.speciation import ladder, speciation_time
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import Run
from symbreak.studies.pictures import png_row

__all__ = ["Diagnosis", "Effort", "some_images", "spectral_times", "spread_of", "view"]

LEAST = {"pairs": 10, "steps": 4, "branches": 3, "turns": 2, "stability": 2, "losses": 4, "images": 20, "queries": 20}
SPREAD_BY = 1000  # samples that say the spread of the data
TICKS = (10, 20, 50, *range(100, 601, 50), 700, 800, 900, 999)  # round steps on the second axis
DECIDED = (("cloning", "network"), ("cloning", "data"), ("cloning", "class mixture"), ("spectral", "data"))


@dataclass(frozen=True)
class Effort:
    """How much a diagnosis spends.

    Attributes:
        pairs: pairs of clones, paths and kicks; real images of the U-turns, but at most ``images``.
        steps: sampler steps of a whole trajectory.
        branches: branch levels of the clones.
        turns: levels of the U-turns.
        stability: levels at which the network's Jacobian is looked at.
        losses: levels of the loss curves.
        images: images of the loss curves.
        points: training images of the empirical law.
        queries: noised images of the excess entropy; all images count as their neighbours.
        frames: frames in which the network's fixed points are followed.
    """

    pairs: int = 300
    steps: int = 40
    branches: int = 12
    turns: int = 8
    stability: int = 8
    losses: int = 20
    images: int = 256
    points: int = 4000
    queries: int = 1000
    frames: tuple[str, ...] = ("ve", "vp")

    def check(self) -> None:
        """Raise an error that names a number which gives nothing."""
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}.")

    def quick(self) -> Effort:
        """Small enough for a minute on the digits."""
        return replace(
            self, pairs=100, steps=24, branches=8, turns=5, stability=4, losses=12, images=128, frames=("ve",)
        )


@dataclass
class Diagnosis:
    """The data and the network of a diagnosis, and what was measured so far.

    Attributes:
        data: all images; ``train`` are those that the laws are fitted to, ``test`` those they are measured on.
        effort, seed, run: how much to spend, the seed of all noise, folder, memory and progress.
        steps: the schedule whose steps the second axis shows.
        scale: largest standard deviation of the data, the unit of levels.
        criteria, curves, lines, checks, pictures, notes, arc, added: the parts of the record; ``against``, where the
            network is no better than a law; ``copies``, how many of its samples lie near one training sample only;
            ``along``, samples noised to levels along the axis.
    """

    data: Images
    train: Images
    test: Images
    effort: Effort
    seed: int
    run: Run
    steps: Schedule
    scale: float = 1.0
    criteria: list[Values] = field(default_factory=list)
    curves: list[Values] = field(default_factory=list)
    lines: list[Values] = field(default_factory=list)
    checks: list[Values] = field(default_factory=list)
    pictures: list[Values] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    arc: Values | None = None
    added: Values | None = None
    against: dict[str, Values] = field(default_factory=dict)
    copies: Values | None = None
    along: Values | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """The run under a stage of that name; criteria that are added in it find its seconds by the name."""
        first = len(self.criteria)
        with self.run.timed(name) as run:
            run.tell(0, 1)
            yield run
            run.tell(1, 1)
        for row in self.criteria[first:]:
            row["stage"] = name

    def add(self, name: str, of: str, critical: CriticalTime) -> None:
        """Add a critical time of ``"data"``, ``"class mixture"``, ``"Gaussian"`` or ``"network"``."""
        self.criteria.append({"name": name, "of": of, "stage": None, **view(critical, self.steps)})

    def draw(self, panel: str, label: str, of: str, curve: Curve, line: str = "-", color: str | None = None) -> None:
        """Add a curve to a panel of `symbreak.report.figures.PANELS`."""
        self.curves.append({**curve.to_dict(), "panel": panel, "label": label, "of": of, "line": line, "color": color})

    def mark(self, panel: str, value: float, label: str) -> None:
        """Add a level line to a panel."""
        self.lines.append({"panel": panel, "value": value, "label": label})

    def check(self, check: Check) -> None:
        """Add a check of the mechanism."""
        texts = (("value_text", check.value), ("expected_text", check.expected))
        self.checks.append({**check.to_dict(), **{k: f"{v:.3g}" if math.isfinite(v) else "-" for k, v in texts}})

    def show(self, title: str, caption: str, x: torch.Tensor, scaled: bool = True) -> None:
        """Add a picture of samples [N, *S], of directions unless ``scaled``, see `png_row`."""
        self.pictures.append(self.picture(title, caption, x, scaled))

    def picture(self, title: str, caption: str, x: torch.Tensor, scaled: bool = True) -> Values:
        """A picture, see `show`."""
        try:
            png = png_row(x, self.data.units, scaled=scaled)
        except MemoryError:
            raise
        except Exception as error:  # whatever a drawing fails at: what was measured is not lost with it
            png, caption = "", f"{caption} This picture could not be drawn ({type(error).__name__}: {error}).".strip()
        return {"title": title, "caption": caption, "png": png}

    def place(self, sigma: float) -> Values:
        """A level as plain values, with the model's step."""
        level: Values = view(CriticalTime(NoiseLevel(sigma)), self.steps)["level"]
        return level

    def looked_at(self, count: int, low: float, high: float) -> np.ndarray:
        """Falling levels [count] inside a range, even in log sigma, from above all criteria to below them."""
        known = [c["level"]["sigma"] for c in self.criteria if c["level"] is not None and c["level"]["sigma"] > 0]
        known = known or [self.scale]
        ends = (min(0.95 * high, 1.6 * max(known)), max(1.05 * low, 0.6 * min(known)))
        return np.geomspace(*ends, count)

    def levels(self, network: Denoiser, least: float, most: float, count: int) -> np.ndarray:
        """Levels [count] even in log sigma, in units of the data's scale, inside the range of a network."""
        low, high = network.sigma_range
        return np.geomspace(max(1.05 * low, least * self.scale), min(0.95 * high, most * self.scale), count)

    def content(self) -> Values:
        """The parts of the record."""
        names = ["criteria", "curves", "lines", "checks", "pictures", "notes", "arc", "added"]
        names += ["against", "copies", "along"]
        return {**{k: getattr(self, k) for k in names}, "step_ticks": self._ticks(), "regimes": self._regimes()}

    def _ticks(self) -> list[Values]:
        """Levels of round steps; a schedule may not have all of them."""
        ticks = []
        for step in TICKS:
            try:
                ticks.append({"sigma": self.steps.level(step).sigma, "step": float(step)})
            except ValueError:
                continue
        return ticks

    def _regimes(self) -> Values:
        """The two levels between which a sample is new: the measured speciation, and the collapse of the data set."""
        known = {(c["name"], c["of"]): c["level"]["sigma"] for c in reversed(self.criteria) if c["level"] is not None}

        def first(wanted: tuple[tuple[str, str], ...]) -> Values | None:
            at = next((w for w in wanted if w in known), None)
            return None if at is None else {"sigma": known[at], "criterion": at[0], "of": at[1]}

        return {"speciation": first(DECIDED), "collapse": first((("collapse", "data"),))}


def view(critical: CriticalTime, steps: Schedule) -> Values:
    """A critical time as plain values, with the model's step of each level."""
    values: Values = critical.to_dict()
    for key in ("level", "low", "high"):
        level = getattr(critical, key)
        if level is not None:
            try:
                values[key]["step"] = float(steps.time(level))
            except ValueError:
                values[key]["step"] = None  # outside the schedule
    return values


def spectral_times(data: Images, steps: Schedule, moments: Moments, modes: int = 10) -> Values:
    """Spectrum, ladder and the spectral times, of pixels at both of their scales, as plain values."""
    spectrum = moments.spectrum(min(256, moments.dim))
    return {
        "data": describe(data),
        "eigenvalues": spectrum.values.tolist(),
        "eigenvalues_low": spectrum.low.tolist(),
        "eigenvalues_high": spectrum.high.tolist(),
        "total_variance": moments.trace,
        "speciation": {
            "[-1, 1]": view(speciation_time(moments), steps),
            "[0, 1]": view(speciation_time(moments, scale=0.5), steps),
        }
        if data.units is None
        else {data.units.text: view(speciation_time(moments), steps)},
        "ladder": [view(c, steps) for c in ladder(moments, modes)],
    }


def some_images(data: Images, count: int, seed: int, even: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to ``count`` images and their labels, the same ones for the same seed; ``even``: as many of every class."""
    order = torch.randperm(len(data), generator=generator(seed, 31))
    if even and data.labels is not None:
        y = data.labels[order]
        place = torch.zeros(len(y), dtype=torch.int64)  # of an image among those of its class
        for label in y.unique():
            place[y == label] = torch.arange(int((y == label).sum()))
        order = order[torch.argsort(place, stable=True)]
    part = data.take(order[:count].numpy(), "some")
    return part.tensor(), part.labels


def spread_of(data: Images) -> float:
    """The root of the total variance of a data set, by up to 1,000 of its samples: no mode varies by more."""
    index = torch.randperm(len(data), generator=generator(65, 0))[:SPREAD_BY].numpy()
    return float(data.take(index, "some").tensor().double().flatten(1).var(0).sum().sqrt())
