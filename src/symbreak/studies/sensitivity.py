"""How wrong may the start level be? Distance against the level a sampler starts at.

For every sampler and number of network evaluations: from a fitted law and from plain white noise (the degradation curve
of arXiv:2305.19693), beside the standard start. All starts share their seeds, so that differences between them are
sharper than either number. Distances are Fréchet distances in named features to held-out images; their intervals are
jackknives over the repeats and parts of the reference. `flat_range` and `knee` compare levels at one reference: with
Student's t over the repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from symbreak.critical import CriticalTime
from symbreak.data.images import Images
from symbreak.intervals import mean_interval
from symbreak.laws import Gaussian
from symbreak.laws.law import Transports
from symbreak.laws.simple import WhiteNoise
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, Denoises
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Pipeline
from symbreak.noise import NoiseLevel
from symbreak.report.record import Record
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import Run, renamed
from symbreak.start.fit import late_start
from symbreak.start.grids import standard_starts, steps_for
from symbreak.studies.measure import Measure, compared, pipeline_of, recorded

__all__ = ["flat_range", "knee", "sensitivity"]

SAMPLERS = ("dpm++2m", "dpm++2m-karras", "ddim", "pndm", "ddpm")


def flat_range(sigma: np.ndarray, values: np.ndarray, confidence: float = 0.95) -> Values:
    """The best level of a curve, and the levels around it that cannot be told from it.

    Args:
        sigma: rising levels [G].
        values: distances of repeats [G, R], the same seeds at every level.
        confidence: of the intervals.

    The best is picked on the same repeats, so a level is left out only beyond the bound of all ordered pairs of levels,

        t > t_{R-1}(1 - (1 - confidence) / (G (G - 1)))

    (Bonferroni): among equal levels any is left out in at most 5 % of all experiments. Few repeats tell little: with 8
    levels the bound is t = 7.4 for 5 repeats, 4.4 for 10.

    Returns:
        ``best`` (sigma), and as [lowest, highest] level of an unbroken run around it: ``overlap``, where the interval
        overlaps the best's, and ``paired``, where the differences to the best, repeat by repeat, are below the bound.
        Over levels tried: both end on the grid. ``None`` for single repeats. ``bound``: that on t.

    Source: multiple comparisons with the best, Hsu 1981, here without assuming equal variances.
    """
    s, v = np.asarray(sigma, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if v.ndim != 2 or len(v) != len(s) or not (np.diff(s) > 0).all():
        raise InputError(f"{len(s)} levels for distances of shape {v.shape}; expected rising levels [G], [G, R].")
    best = int(v.mean(1).argmin())
    out: Values = {"best": float(s[best]), "overlap": None, "paired": None, "bound": None}
    if v.shape[1] < 2:
        return out
    each = 1 - 2 * (1 - confidence) / max(2, len(s) * (len(s) - 1))  # two-sided confidence of one comparison
    bounds = np.array([mean_interval(row, max(confidence, each)) for row in v])
    gaps = np.array([mean_interval(row - v[best], each) for row in v])
    out["bound"] = float(stats.t.ppf(0.5 + each / 2, v.shape[1] - 1))
    for name, inside in (("overlap", bounds[:, 1] <= bounds[best, 2]), ("paired", gaps[:, 1] <= 0)):
        low = high = best
        while low > 0 and inside[low - 1]:
            low -= 1
        while high < len(s) - 1 and inside[high + 1]:
            high += 1
        out[name] = [float(s[low]), float(s[high])]
    return out


def knee(sigma: np.ndarray, values: np.ndarray, standard: np.ndarray, confidence: float = 0.95) -> CriticalTime:
    """Where a curve leaves the standard start for good: below it every level's mean distance exceeds its interval.

    The level is where the mean curve passes the upper end of the standard start's interval, linear in log sigma between
    the two levels around it; ``low`` and ``high`` are where the ends of the curve's own intervals do, cut off at
    levels tried.

    Args:
        sigma: rising levels [G].
        values: distances of repeats [G, R].
        standard: distances [R] of the standard start.
        confidence: of the intervals.

    Source: the degradation curve is that of arXiv:2305.19693; this definition of its knee is ours.
    """
    s, v = np.asarray(sigma, dtype=np.float64), np.asarray(values, dtype=np.float64)
    criterion, source = "knee of the distance", "arXiv:2305.19693 (curve)"
    bounds = np.array([mean_interval(row, confidence) for row in v])
    threshold = mean_interval(np.asarray(standard), confidence)[2]
    if not math.isfinite(threshold):
        raise InputError("a single repeat has no interval; expected at least two to find a knee.")

    def leaves(curve: np.ndarray) -> float | None:
        """The largest level below which the curve is above the threshold throughout; inf where it always is."""
        above = curve > threshold
        if not above[0]:
            return None
        run = int(np.argmin(above)) if not above.all() else len(s)
        if run == len(s):
            return math.inf
        a, b = curve[run - 1] - threshold, curve[run] - threshold
        return float(math.exp(math.log(s[run - 1]) + (math.log(s[run]) - math.log(s[run - 1])) * a / (a - b)))

    at = leaves(bounds[:, 0])
    if at is None:
        reason = f"at sigma {s[0]:.4g}, the lowest tried, it does not exceed the standard start's interval"
        return CriticalTime(None, criterion=criterion, source=source, reason=reason, confidence=confidence)
    if math.isinf(at):
        reason = f"it exceeds the standard start's interval at every level up to sigma {s[-1]:.4g}"
        return CriticalTime(None, criterion=criterion, source=source, reason=reason, confidence=confidence)
    # A higher curve leaves at a higher level.
    low, high = leaves(bounds[:, 1]), leaves(bounds[:, 2])
    return CriticalTime(
        NoiseLevel(at),
        None if low is None else NoiseLevel(low),
        None if high is None or math.isinf(high) else NoiseLevel(high),
        criterion=criterion,
        source=source,
        reason=None if low is not None and high is not None and math.isfinite(high) else "the interval is open",
        confidence=confidence,
        interval="repeats",
    )


@renamed(**{k: f"measure=sb.Measure({k}=...)" for k in ("extract", "samples", "repeats", "micro_batch")})
def sensitivity(
    data: Images,
    pipeline: Pipeline | Denoises | Denoiser,
    samplers: Sequence[str] = SAMPLERS,
    calls: Sequence[int] = (3, 5, 10),
    levels: Sequence[float] | None = None,
    *,
    holdout: Images,
    measure: Measure,
    starts: Mapping[str, Transports] | None = None,
    marks: Mapping[str, CriticalTime] | None = None,
    run: Run | None = None,
) -> Record:
    """Distance against start level, for every sampler and number of network evaluations.

    Args:
        data: the images that laws are fitted to.
        pipeline: with ``.unet`` and ``.scheduler``; or a `denoiser`, or a law.
        samplers: names of `scheduler`; calls: network evaluations an image.
        levels: start levels sigma; by default 9 from .15 to 20 times the data's largest standard deviation.
        holdout: images to measure against.
        measure: the features, and how many images of every start; the same seeds everywhere.
        starts: by name, anything with ``.transport``; by default the fitted Gaussian and white noise.
        marks: critical levels to place on the curves.
        run: its folder gets ``record.json`` and, while it runs, finished cells: an interrupted call continues.

    Returns:
        A `Record` of kind ``"sensitivity"``: a row a sampler and number of calls, with the standard start (spacing
        chosen on other seeds), and of every start its cells, `flat_range`, `knee` and where the marks fall.

    Raises:
        InputError: for images of another shape than the network's, fewer than two repeats, or calls that no number
            of steps costs.

    Source: arXiv:2305.19693 (distance against start level).
    """
    pipeline = pipeline_of(pipeline, data)
    comparison, settings = compared(data, holdout, pipeline, measure, run or Run())
    run = comparison.run.named("cells")
    moments = Moments.fit(data)
    if starts is None:
        starts = {"Gaussian": Gaussian(moments), "white noise": WhiteNoise(data.shape)}
    scale = math.sqrt(float(moments.eigh[0][0]))
    sigmas = np.unique(np.geomspace(0.15 * scale, 20 * scale, 9) if levels is None else np.array(levels, dtype=float))
    plans = [
        (name, n, steps_for(full, n, name), full)
        for name, full in ((name, scheduler(name, like=pipeline.scheduler)) for name in samplers)
        for n in calls
    ]
    total, done, rows = len(plans) * (1 + len(starts) * len(sigmas)), 0, []
    for name, n, steps, full in plans:
        standard = standard_starts(full, steps)
        spacing, _ = comparison.choose(standard)
        reference = comparison.cell(standard[spacing])
        run.tell(done := done + 1, total)
        curves: Values = {}
        for label, law in starts.items():
            cells = {}
            for sigma in sigmas:
                cell = comparison.cell(late_start(full, law, steps, at=NoiseLevel(float(sigma)), check=False))
                cells[cell["sigma"]] = cell  # a grid may offer one level for two requested ones
                run.tell(done := done + 1, total)
            at, values = np.array(list(cells)), np.array([cell["distance"]["values"] for cell in cells.values()])
            flat = flat_range(at, values)
            curves[label] = {
                "cells": list(cells.values()),
                "flat": flat,
                "knee": knee(at, values, np.array(reference["distance"]["values"])).to_dict(),
                "marks": {mark: _place(t, flat["overlap"]) for mark, t in (marks or {}).items()},
            }
        rows.append({"sampler": name, "calls": n, "standard": {**reference, "spacing": spacing}, "starts": curves})
    settings |= {"samplers": list(samplers), "calls": list(calls), "levels": sigmas.tolist(), "starts": list(starts)}
    content = {"rows": rows, "marks": {k: t.to_dict() for k, t in (marks or {}).items()}}
    return recorded("sensitivity", comparison, data, holdout, settings, content)


def _place(mark: CriticalTime, flat: list[float] | None) -> str | None:
    """Where a critical level falls: inside, above or below the flat range."""
    if mark.sigma is None or flat is None:
        return None
    return "below" if mark.sigma < flat[0] else "above" if mark.sigma > flat[1] else "inside"
