"""How wrong may the start level be? Distance against the level a sampler starts at.

For every sampler and number of network evaluations: from a fitted law and from plain white noise (the degradation curve
of arXiv:2305.19693), beside the standard start. All starts share their seeds, so that differences between them are
sharper than either number. Distances are Fréchet distances in named features to held-out images. All intervals are
jackknives over the repeats and parts of the reference, those of the differences in `flat_range` and `knee`, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from symbreak.critical import CriticalTime
from symbreak.data.images import Images
from symbreak.laws import Gaussian
from symbreak.laws.law import Transports
from symbreak.laws.simple import WhiteNoise
from symbreak.metrics.frechet import mean_of_repeats
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
DECIDES = ("values", "reference_left_out")  # of a distance, what its differences are jackknifed over


def flat_range(
    sigma: np.ndarray, values: np.ndarray, left_out: np.ndarray | None = None, confidence: float = 0.95
) -> Values:
    """The best level of a curve, and the levels around it that cannot be told from it.

    Args:
        sigma: rising levels [G].
        values: distances of repeats [G, R], the same seeds and reference at every level.
        left_out: mean distances without each part of the reference [G, B]; without them the intervals are those of the
            repeats, given this reference.
        confidence: of the intervals.

    The best is picked on the same repeats, so a level is left out only beyond the bound of all ordered pairs of levels,

        t > t_{R-1}(1 - (1 - confidence) / (G (G - 1))),    for the parts of the reference t_{B-1}(...)

    (Bonferroni): among equal levels any is left out in at most 5 % of all experiments. Few repeats tell little: with 8
    levels the bound is t = 7.4 for 5 repeats, 4.4 for 10; of 8 parts it is 4.9.

    Returns:
        ``best`` (sigma), and as [lowest, highest] level of an unbroken run around it: ``overlap``, where the interval
        overlaps the best's, and ``paired``, where the interval of the difference to the best, on the same seeds and
        reference, reaches 0. Over levels tried: both end on the grid. ``None`` for single repeats. ``bound``: that on
        t of the repeats.

    Source: multiple comparisons with the best, Hsu 1981, here without assuming equal variances.
    """
    s, v, w = _curve(sigma, values, left_out)
    best = int(v.mean(1).argmin())
    out: Values = {"best": float(s[best]), "overlap": None, "paired": None, "bound": None}
    if v.shape[1] < 2:
        return out
    each = 1 - 2 * (1 - confidence) / max(2, len(s) * (len(s) - 1))  # two-sided confidence of one comparison
    bounds = _intervals(v, w, max(confidence, each))
    gaps = _intervals(v - v[best], w - w[best], each)
    out["bound"] = float(stats.t.ppf(0.5 + each / 2, v.shape[1] - 1))
    for name, inside in (("overlap", bounds[:, 1] <= bounds[best, 2]), ("paired", gaps[:, 1] <= 0)):
        low = high = best
        while low > 0 and inside[low - 1]:
            low -= 1
        while high < len(s) - 1 and inside[high + 1]:
            high += 1
        out[name] = [float(s[low]), float(s[high])]
    return out


def knee(
    sigma: np.ndarray,
    values: np.ndarray,
    standard: np.ndarray,
    left_out: np.ndarray | None = None,
    standard_left_out: np.ndarray | None = None,
    confidence: float = 0.95,
) -> CriticalTime:
    """The lowest level tried from which on up a curve is not worse than the standard start.

    Worse is a level whose difference to the standard start, on the same seeds and reference, has an interval above 0.
    The intervals hold together at all G levels, each at 1 - (1 - confidence) / G.

    Args:
        sigma: rising levels [G].
        values, standard: distances of repeats [G, R], and of the standard start [R].
        left_out, standard_left_out: mean distances without each part of the reference [G, B], [B]; see `flat_range`.
        confidence: of the intervals.

    Returns:
        The level; ``low``: the level tried below it, which is worse; ``high``: the lowest level from which on up the
        intervals end below 0, ``None`` where the highest level's does not. What many images would say, the level from
        which on up the mean is not above the standard start's, lies between ``low`` and ``high``.

    Raises:
        InputError: for a single repeat.

    Source: the degradation curve is that of arXiv:2305.19693; this definition of its knee is ours.
    """
    s, v, w = _curve(sigma, values, left_out)
    if v.shape[1] < 2:
        raise InputError("a single repeat has no interval; expected at least two to find a knee.")
    w_standard = np.zeros(0) if standard_left_out is None else np.asarray(standard_left_out)
    gaps = _intervals(v - np.asarray(standard), w - w_standard, 1 - (1 - confidence) / len(s))

    def lowest(fine: np.ndarray) -> int:
        """Index of the lowest level from which on up all are fine."""
        return int(len(s) - np.argmin(fine[::-1])) if not fine.all() else 0

    at, surely = lowest(gaps[:, 1] <= 0), lowest(gaps[:, 2] <= 0)
    level: NoiseLevel | None = None
    low: NoiseLevel | None = None
    high: NoiseLevel | None = None
    reason: str | None = None
    if at == 0:
        reason = f"from sigma {s[0]:.4g}, the lowest tried, on up no level is worse than the standard start"
    elif at == len(s):
        reason = f"at sigma {s[-1]:.4g}, the highest tried, it is worse than the standard start"
    else:
        level, low = NoiseLevel(float(s[at])), NoiseLevel(float(s[at - 1]))
        high = NoiseLevel(float(s[surely])) if surely < len(s) else None
        reason = None if high else "the interval is open above: at the highest level its difference may be above 0"
    return CriticalTime(
        level,
        low,
        high,
        criterion="knee of the distance",
        source="arXiv:2305.19693 (curve)",
        reason=reason,
        confidence=confidence,
        interval="jackknife" if level else "",
    )


def _curve(
    sigma: np.ndarray, values: np.ndarray, left_out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels [G], distances [G, R] and those without each part of the reference [G, B], checked."""
    s, v = np.asarray(sigma, dtype=np.float64), np.asarray(values, dtype=np.float64)
    w = np.zeros((len(s), 0)) if left_out is None else np.asarray(left_out, dtype=np.float64)
    if v.ndim != 2 or w.ndim != 2 or not len(v) == len(w) == len(s) or not (np.diff(s) > 0).all():
        raise InputError(
            f"{len(s)} levels, distances of shape {v.shape} and {w.shape}; expected rising levels [G], [G, R], [G, B]."
        )
    return s, v, w


def _intervals(values: np.ndarray, left_out: np.ndarray, confidence: float) -> np.ndarray:
    """Mean and ends [G, 3] of every level, jackknifed over repeats and parts of the reference."""
    return np.array([mean_of_repeats(v, w, confidence) for v, w in zip(values, left_out)])


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
        of_standard = [np.array(reference["distance"][k]) for k in DECIDES]
        run.tell(done := done + 1, total)
        curves: Values = {}
        for label, law in starts.items():
            cells = {}
            for sigma in sigmas:
                cell = comparison.cell(late_start(full, law, steps, at=NoiseLevel(float(sigma)), check=False))
                cells[cell["sigma"]] = cell  # a grid may offer one level for two requested ones
                run.tell(done := done + 1, total)
            at = np.array(list(cells))
            values, left_out = (np.array([cell["distance"][k] for cell in cells.values()]) for k in DECIDES)
            flat = flat_range(at, values, left_out)
            curves[label] = {
                "cells": list(cells.values()),
                "flat": flat,
                "knee": knee(at, values, of_standard[0], left_out, of_standard[1]).to_dict(),
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
