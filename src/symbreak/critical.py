"""The answers: critical times and curves on the sigma axis, each with its interval and source.

A search that finds nothing is an answer too: a `CriticalTime` whose level is ``None`` and whose
``reason`` says why. Intervals are 95 % unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np
from scipy.optimize import brentq

from symbreak.intervals import mean_interval, percentiles, proportion
from symbreak.noise import NoiseLevel
from symbreak.runtime.errors import InputError
from symbreak.runtime.shown import LONGEST, Shown, axes, shortened, sigma_axis

__all__ = [
    "CriticalTime",
    "Curve",
    "Levels",
    "Result",
    "crossing",
    "curve",
    "levels",
    "mean_curve",
    "passing",
    "passing_interval",
    "passing_time",
    "root_time",
    "share_curve",
]

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

Levels: TypeAlias = "float | Sequence[float] | np.ndarray | torch.Tensor"  # a noise level sigma, or levels [G]
Kind = TypeVar("Kind", bound="Curve")


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value.tolist() if isinstance(value, np.ndarray) else value


class Result(Shown):
    """What was measured: some of its attributes go into records."""

    record: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {name: _plain(getattr(self, name)) for name in self.record}


@dataclass(frozen=True)
class CriticalTime(Result):
    """A noise level at which something happens.

    Attributes:
        level: the level, ``None`` where nothing was found (then ``reason`` says why).
        low, high: ends of the interval on the sigma axis, ``None`` where there is no estimate.
        criterion: what was looked for, e.g. ``"spectral"``.
        flow, frame: ``"sde"`` or ``"ode"``, ``"vp"`` or ``"ve"``, where the criterion depends on them.
        source: paper or derivation.
        reason: why there is no level, or what limits it.
        confidence: nominal coverage of the interval.
        interval: how it was made and what it holds: ``"jackknife"`` or ``"bootstrap"`` (over what was measured),
            ``"draws only"`` (the Monte Carlo error of a law that is taken for true), ``"exact"`` (of that law, without
            an error), ``"bracket"`` (the neighbouring levels looked at), ``"bound"``; empty where there is none.
    """

    record: ClassVar[tuple[str, ...]] = (
        "criterion",
        "level",
        "low",
        "high",
        "flow",
        "frame",
        "source",
        "reason",
        "confidence",
        "interval",
    )

    level: NoiseLevel | None
    low: NoiseLevel | None = None
    high: NoiseLevel | None = None
    criterion: str = ""
    flow: str | None = None
    frame: str | None = None
    source: str = ""
    reason: str | None = None
    confidence: float = 0.95
    interval: str = ""

    @property
    def sigma(self) -> float | None:
        """sigma of the level, or ``None``."""
        return None if self.level is None else self.level.sigma

    def __repr__(self) -> str:
        where = "nowhere" if self.sigma is None else f"sigma {self.sigma:.4g}"
        if self.low is not None or self.high is not None:
            low, high = ("?" if end is None else f"{end.sigma:.4g}" for end in (self.low, self.high))
            where += f" [{low}, {high}]"
        process = " ".join(p.upper() for p in (self.frame, self.flow) if p)
        parts = (self.criterion, process, where, self.interval, self.reason)
        return shortened(f"{type(self).__name__}({', '.join(p for p in parts if p)})", LONGEST)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The level as a line on the axis of sigma, with its interval; the axes, new ones where none came."""
        ax = axes(ax)
        alone = not ax.lines
        if self.sigma is None:
            ax.text(0.5, 0.5, self.reason or "nowhere", transform=ax.transAxes, ha="center", wrap=True)
        else:
            line = ax.axvline(self.sigma, label=f"{self.criterion}: sigma {self.sigma:.4g}")
            ends = [e.sigma for e in (self.low or self.level, self.high or self.level) if e is not None]
            if math.isfinite(ends[1]):
                ax.axvspan(*ends, color=line.get_color(), alpha=0.2, linewidth=0)
            ax.legend(frameon=False)
        sigma_axis(ax)
        if alone and self.sigma is not None:
            ax.set_xlim(5 * self.sigma, self.sigma / 5)
            ax.set_yticks([])
        return ax


@dataclass(frozen=True)
class Curve(Result):
    """A quantity against sigma: float64 arrays of one length, ``low``/``high`` its interval."""

    record: ClassVar[tuple[str, ...]] = ("name", "sigma", "value", "low", "high")

    sigma: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("sigma", "value", "low", "high"):
            object.__setattr__(self, key, np.asarray(getattr(self, key), dtype=np.float64))
        if not (self.sigma.shape == self.value.shape == self.low.shape == self.high.shape):
            raise ValueError("a Curve needs sigma, value, low and high of one length.")

    def plot(self, ax: Axes | None = None) -> Axes:
        """The quantity against sigma with its interval; the axes, new ones where none came."""
        ax = axes(ax)
        order = np.argsort(self.sigma, axis=None)
        s, v, low, high = (a.reshape(-1)[order] for a in (self.sigma, self.value, self.low, self.high))
        (line,) = ax.plot(s, v, "-" if len(s) > 1 else "o", label=self.name)
        if len(s) > 1:
            ax.fill_between(s, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        else:
            ax.vlines(s, low, high, color=line.get_color())
        sigma_axis(ax)
        ax.set_ylabel(self.name)
        return ax

    def map(self, function: Callable[[np.ndarray], np.ndarray], name: str) -> Curve:
        """A rising function of the quantity."""
        return Curve(self.sigma, function(self.value), function(self.low), function(self.high), name)

    def extended(self, kind: type[Kind], **attributes: Any) -> Kind:
        """The same curve as one of a kind with further attributes."""
        return kind(self.sigma, self.value, self.low, self.high, self.name, **attributes)


def levels(sigma: Levels) -> tuple[np.ndarray, tuple[int, ...]]:
    """Levels [G] float64 and the shape they came in, () for a single one.

    Raises:
        InputError: for no levels, more than one axis, or levels that are not finite and > 0.
    """
    s = np.asarray(sigma.detach().cpu() if hasattr(sigma, "detach") else sigma, dtype=np.float64)
    if s.ndim > 1 or s.size == 0:
        raise InputError(f"sigma of shape {s.shape}; expected a level or levels [G].")
    if not (np.isfinite(s).all() and (s > 0).all()):
        raise InputError(f"sigma is {float(s.min()):g}; expected finite noise levels > 0.")
    return np.atleast_1d(s), s.shape


def curve(
    sigma: np.ndarray, shape: tuple[int, ...], value: np.ndarray, low: np.ndarray, high: np.ndarray, name: str
) -> Curve:
    """A `Curve` in the shape its levels came in: for a single one float(curve.value) works."""
    s, v, below, above = (np.asarray(a).reshape(shape) for a in (sigma, value, low, high))
    return Curve(s, v, below, above, name)


def crossing(sigma: np.ndarray, value: np.ndarray, threshold: float) -> float | None:
    """Largest sigma at which a curve passes through a threshold, linear in log sigma; else ``None``."""
    order = np.argsort(sigma)
    s, v = np.log(np.asarray(sigma, float)[order]), np.asarray(value, float)[order] - threshold
    for i in range(len(s) - 1, 0, -1):
        if v[i] == 0:
            return float(math.exp(s[i]))
        if v[i] * v[i - 1] < 0:
            return float(math.exp(s[i] + (s[i - 1] - s[i]) * v[i] / (v[i] - v[i - 1])))
    return float(math.exp(s[0])) if len(s) and v[0] == 0 else None


def passing(sigma: np.ndarray, curves: np.ndarray, thresholds: Any) -> np.ndarray:
    """Largest sigma [R] at which curves pass their thresholds: 0 for below all levels, inf for above them.

    A curve that stays on one side of its threshold passes beyond an end. Which one follows from its value at the top
    level and from whether curve 0, the estimate whose resamples the others are, rises from the lowest level to it.

    Args:
        sigma: levels [G], in any order.
        curves: [R, G].
        thresholds: one, or one a curve [R].
    """
    bottom, top = int(np.argmin(sigma)), int(np.argmax(sigma))
    rising = bool(curves[0][top] > curves[0][bottom])
    out = np.empty(len(curves))
    for r, (values, threshold) in enumerate(zip(curves, np.broadcast_to(thresholds, len(curves)))):
        level = crossing(sigma, values, float(threshold))
        beyond = 0.0 if (values[top] > threshold) == rising else math.inf
        out[r] = beyond if level is None else level
    return out


def passing_interval(passed: np.ndarray) -> tuple[NoiseLevel | None, NoiseLevel | None, tuple[str, ...]]:
    """Ends of the interval of resampled levels [R] of `passing`, ``None`` for an end beyond the levels measured.

    The third value names the sides, ``"below"`` and ``"above"``, on which the interval leaves them.
    """
    low, high = percentiles(passed)
    first, last = (NoiseLevel(float(end)) if 0 < end < math.inf else None for end in (low, high))
    return first, last, ("below",) * bool(low == 0) + ("above",) * bool(high == math.inf)


def passing_time(
    sigma: np.ndarray, curves: np.ndarray, thresholds: Any, nowhere: str, criterion: str, source: str
) -> CriticalTime:
    """Where curve 0 passes its threshold, with the interval of its resamples, the other curves.

    Args:
        sigma, curves, thresholds: as for `passing`.
        nowhere: the reason where it passes beyond the levels.
        criterion, source: of the `CriticalTime`.
    """
    passed = passing(sigma, curves, thresholds)
    if not 0 < passed[0] < math.inf:
        return CriticalTime(None, criterion=criterion, source=source, reason=nowhere)
    low, high, sides = passing_interval(passed[1:])
    ends = {"below": f"below {sigma.min():.4g}", "above": f"above {sigma.max():.4g}"}
    reason = f"the interval ends {' and '.join(ends[side] for side in sides)}, outside the levels measured"
    level = NoiseLevel(float(passed[0]))
    note = reason if sides else None
    return CriticalTime(level, low, high, criterion, source=source, reason=note, interval="bootstrap")


def root_time(
    average: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
    target: float,
    ends: tuple[float, float],
    criterion: str,
    source: str,
) -> CriticalTime:
    """Where an average over a law passes a value between two levels; its interval is the Monte Carlo error.

    Args:
        average: levels [G] -> mean and 95 % interval, [G] each. No interval is given where its own has no width.
        target: the value.
        ends: log sigma on either side.
        criterion, source: of the `CriticalTime`.
    """

    @cache  # the solver asks for the ends once more
    def gap(u: float) -> float:
        return float(average(np.array([math.exp(u)]))[0][0]) - target

    signs = [gap(u) for u in ends]
    # An end that is the root itself may miss it by its rounding.
    near = ends[int(np.argmin(np.abs(signs)))]
    root = float(brentq(gap, *ends, xtol=1e-13, rtol=1e-14)) if signs[0] * signs[1] < 0 else near
    mean, low, high = (float(a[0]) for a in average(np.array([math.exp(root)])))
    first = last = None
    interval = "draws only" if high > low else "exact"
    if high > low:
        h = 0.02
        slope = (gap(root + h) - gap(root - h)) / (2 * h)
        first, last = (NoiseLevel(math.exp(root + u)) for u in sorted([(mean - high) / slope, (mean - low) / slope]))
    level = NoiseLevel(math.exp(root))
    return CriticalTime(level, first, last, criterion=criterion, source=source, interval=interval)


def mean_curve(
    sigma: np.ndarray,
    values: np.ndarray,
    name: str,
    weights: np.ndarray | None = None,
    shape: tuple[int, ...] | None = None,
) -> Curve:
    """Means of values [G, N] of the same N items at G levels, as a `Curve` with 95 % intervals.

    Values that are all 0 or 1 are shares, whose intervals are Clopper-Pearson's: neither resamples nor a spread say how
    often what was seen seldom or never may occur.

    Args:
        sigma: levels [G].
        values: of every item at every level [G, N].
        name: of the curve.
        weights: how often each item counts, all once and then in every resample, [1 + R, N]: intervals are then the
            resamples' percentiles. Without them they are Student's t. Neither of shares.
        shape: the one the levels came in, see `curve`; by default [G].
    """
    if np.isin(values, (0, 1)).all():
        shares = [proportion(float(v.sum()), len(v)) for v in values]
        mean, low, high = np.array([[share[k] for k in ("share", "low", "high")] for share in shares]).T
    elif weights is None:
        mean, low, high = np.array([mean_interval(v) for v in values]).T
    else:
        means = weights @ values.T / values.shape[1]
        mean, (low, high) = means[0], percentiles(means[1:])
    return curve(sigma, sigma.shape if shape is None else shape, mean, low, high, name)


def share_curve(
    sigma: np.ndarray, left: np.ndarray, total: np.ndarray, name: str, shape: tuple[int, ...] | None = None
) -> Curve:
    """Shares that are explained, 1 - mean(left) / mean(total), as a `Curve` with 95 % intervals.

    A ratio of means moves with an item, to first order, as the mean of left - ratio total does: its interval is that of
    `mean_interval`. A bootstrap held the right share of skewed items in 82 of 100 sets where this holds it in 94.

    Args:
        sigma: levels [G].
        left: what is left of every item at every level [G, N].
        total: all of it [G, N].
        name: of the curve.
        shape: the one the levels came in, see `curve`; by default [G].
    """
    ratio, whole = left.mean(1) / total.mean(1), total.mean(1)
    moves = (left - ratio[:, None] * total) / whole[:, None]
    _, low, high = np.array([mean_interval(v) for v in moves]).T
    return curve(sigma, sigma.shape if shape is None else shape, 1 - ratio, 1 - ratio - high, 1 - ratio - low, name)
