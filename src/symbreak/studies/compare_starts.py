"""How wrong may the start be? Distances against the start level, and against the law started from.

    sensitivity       for every sampler and number of calls: distance against start level, from a fitted law and from
                      plain white noise (the degradation curve of arXiv:2305.19693), beside the standard start
    compare_starts    many starts at the same levels, sampler and calls: white noise to the noised data themselves

All starts of one run share their seeds, so that differences between them are sharper than either number. Distances are
Fréchet distances in named features to held-out images; intervals are Student t over repeats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime
from symbreak.data.images import Images, describe
from symbreak.intervals import mean_interval
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.simple import Ball, PowerMap, WhiteNoise, diagonal, isotropic
from symbreak.metrics import distance, features, floor
from symbreak.metrics.coverage import class_entropy, precision_recall
from symbreak.metrics.memorization import nearest_summary
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.families import denoiser
from symbreak.networks.loading import weights_hash
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, digest, output_folder
from symbreak.runtime.plain import versions
from symbreak.runtime.run import Blocks
from symbreak.start.fit import late_start
from symbreak.start.grids import standard_starts, steps_for
from symbreak.start.late_start import LateStart
from symbreak.start.sample import generate

__all__ = ["candidate_starts", "compare_starts", "flat_range", "knee", "sensitivity"]

SAMPLERS = ("dpm++2m", "dpm++2m-karras", "ddim", "pndm", "ddpm")
SELECTION = 1_000_000  # first seed of those that choose the standard start's spacing
NEAREST = 500  # images whose nearest training image is looked for
NEIGHBOURS = 1000  # features compared for precision and recall
NOISED = "the data, noised"
Progress = Callable[[int, int], None] | None


def flat_range(sigma: np.ndarray, values: np.ndarray, confidence: float = 0.95) -> dict[str, Any]:
    """The best level of a curve, and the levels around it that cannot be told from it.

    Args:
        sigma: rising levels [G].
        values: distances of repeats [G, R], the same seeds at every level.
        confidence: of the intervals.

    Returns:
        ``best`` (sigma), and as [lowest, highest] level of an unbroken run around it: ``overlap``, where the interval
        overlaps the best's, and ``paired``, where the interval of the differences to the best, repeat by repeat,
        reaches 0. Over levels tried: both end on the grid. ``None`` for single repeats.
    """
    s, v = np.asarray(sigma, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if v.ndim != 2 or len(v) != len(s) or not (np.diff(s) > 0).all():
        raise InputError(f"{len(s)} levels for distances of shape {v.shape}; expected rising levels [G], [G, R].")
    best = int(v.mean(1).argmin())
    out: dict[str, Any] = {"best": float(s[best]), "overlap": None, "paired": None}
    if v.shape[1] < 2:
        return out
    bounds = np.array([mean_interval(row, confidence) for row in v])
    gaps = np.array([mean_interval(row - v[best], confidence) for row in v])
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
    )


def sensitivity(
    data: Images,
    pipeline: Any,
    samplers: Sequence[str] = SAMPLERS,
    calls: Sequence[int] = (3, 5, 10),
    levels: Sequence[float] | None = None,
    *,
    holdout: Images,
    extract: Any,
    starts: Mapping[str, Any] | None = None,
    marks: Mapping[str, CriticalTime] | None = None,
    samples: int = 200,
    repeats: int = 5,
    micro_batch: int = 100,
    out: str | Path | None = None,
    progress: Progress = None,
) -> Record:
    """Distance against start level, for every sampler and number of network calls.

    Args:
        data: the images that laws are fitted to.
        pipeline: with ``.unet`` and ``.scheduler``.
        samplers: names of `scheduler`; calls: network calls an image.
        levels: start levels sigma; by default 9 from .15 to 20 times the data's largest standard deviation.
        holdout: images to measure against.
        extract: a feature extractor (`extractor`).
        starts: by name, anything with ``.transport``; by default the fitted Gaussian and white noise.
        marks: critical levels to place on the curves.
        samples: images a repeat; repeats: of them. The same seeds everywhere.
        micro_batch: fixed size of every network call.
        out: folder for ``record.json`` and, while it runs, for finished cells: an interrupted call goes on.
        progress: called as progress(done cells, all).

    Returns:
        A `Record` of kind ``"sensitivity"``: a row a sampler and number of calls, with the standard start (spacing
        chosen on other seeds), and of every start its cells, `flat_range`, `knee` and where the marks fall.

    Raises:
        InputError: for images of another shape than the network's, fewer than two repeats, or calls that no number
            of steps costs.

    Source: arXiv:2305.19693 (distance against start level).
    """
    ruler = _Ruler(data, holdout, pipeline, extract, samples, repeats, micro_batch, out)
    moments = Moments.fit(data)
    if starts is None:
        starts = {"Gaussian": Gaussian(moments), "white noise": WhiteNoise(data.shape)}
    scale = math.sqrt(float(moments.eigh[0][0]))
    asked = np.unique(np.geomspace(0.15 * scale, 20 * scale, 9) if levels is None else np.array(levels, dtype=float))
    plans = [
        (name, n, steps_for(full, n, name), full)
        for name, full in ((name, scheduler(name, like=pipeline.scheduler)) for name in samplers)
        for n in calls
    ]
    total, done, rows = len(plans) * (1 + len(starts) * len(asked)), 0, []
    for name, n, steps, full in plans:
        spacing, standard = ruler.standard(full, steps)
        found: dict[str, Any] = {}
        reference = ruler.cell(standard)
        done = _tell(progress, done, total)
        for label, law in starts.items():
            cells = []
            for sigma in asked:
                cells.append(ruler.cell(late_start(full, law, steps, at=NoiseLevel(float(sigma)), check=False)))
                done = _tell(progress, done, total)
            # A grid may offer one level for two that were asked for.
            cells = list({cell["sigma"]: cell for cell in cells}.values())
            at = np.array([cell["sigma"] for cell in cells])
            values = np.array([cell["distance"]["values"] for cell in cells])
            flat = flat_range(at, values)
            found[label] = {
                "cells": cells,
                "flat": flat,
                "knee": knee(at, values, np.array(reference["distance"]["values"])).to_dict(),
                "marks": {mark: _place(t, flat["overlap"]) for mark, t in (marks or {}).items()},
            }
        rows.append({"sampler": name, "calls": n, "standard": {**reference, "spacing": spacing}, "starts": found})
    settings = {"samplers": list(samplers), "calls": list(calls), "levels": asked.tolist(), "starts": list(starts)}
    content = {"rows": rows, "marks": {k: t.to_dict() for k, t in (marks or {}).items()}}
    return ruler.record("sensitivity", settings, content)


def candidate_starts(
    data: Images, clusters: int | None = None, size: int | None = None, modes: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Starts to compare, from the one that knows nothing to mixtures, by name.

    Args:
        data: images to fit on.
        clusters: of the cluster mixture; by default one for 20 images, at most 60.
        size: cosines a side of the low-frequency Gaussian; by default half of a side, at most 8.
        modes: whose skewness and kurtosis the learned map matches.
        seed: of the clustering.
    """
    moments = Moments.fit(data)
    gaussian = Gaussian(moments)
    k = min(60, max(2, len(data) // 20)) if clusters is None else int(clusters)
    side = min(8, data.shape[1] // 2) if size is None else int(size)
    found: dict[str, Any] = {
        "white noise": WhiteNoise(data.shape),
        "ball": Ball(isotropic(moments)),
        "diagonal Gaussian": diagonal(moments),
        "low-frequency Gaussian": Gaussian.low_frequency(data, size=side),
        "full Gaussian": gaussian,
        "ellipsoid": Ball(gaussian),
        "learned map": PowerMap.fit(data, gaussian, modes),
    }
    if data.labels is not None and len(data.labels.unique()) > 1:
        found["class mixture"] = PrincipalMixture.fit(data, labels=True, gaussian=gaussian, seed=seed)
    found["cluster mixture"] = PrincipalMixture.fit(data, components=k, gaussian=gaussian, seed=seed)
    return found


def compare_starts(
    data: Images,
    pipeline: Any,
    sampler: str = "dpm++2m",
    calls: Sequence[int] = (3, 5, 10),
    levels: Sequence[float] | None = None,
    *,
    holdout: Images,
    extract: Any,
    starts: Mapping[str, Any] | None = None,
    samples: int = 200,
    repeats: int = 5,
    micro_batch: int = 100,
    out: str | Path | None = None,
    progress: Progress = None,
) -> Record:
    """Many starts at the same levels, with the same sampler, calls and seeds.

    Args:
        data, pipeline, holdout, extract, samples, repeats, micro_batch, out, progress: as for `sensitivity`.
        sampler: name of `scheduler`; calls: network calls an image.
        levels: start levels sigma; by default .35, 1 and 3 times the data's largest standard deviation.
        starts: by name, anything with ``.transport``; by default `candidate_starts`. Training images noised to the
            level are always added: the most that any law could give there, and with copies of them for free.

    Returns:
        A `Record` of kind ``"starts"``: a row a start, level and number of calls, with distance, precision, recall,
        class entropy in bits (where the extractor classifies) and nearest training images; the standard starts; and the
        same of real images.

    Raises:
        InputError: as `sensitivity`.
    """
    ruler = _Ruler(data, holdout, pipeline, extract, samples, repeats, micro_batch, out)
    chosen = candidate_starts(data) if starts is None else dict(starts)
    scale = math.sqrt(float(Moments.fit(data).eigh[0][0]))
    asked = np.unique(scale * np.array([0.35, 1.0, 3.0]) if levels is None else np.array(levels, dtype=float))
    full = scheduler(sampler, like=pipeline.scheduler)
    plans = [(n, steps_for(full, n, sampler)) for n in calls]
    total, done, rows = len(plans) * (1 + len(asked) * (1 + len(chosen))), 0, []
    standard = []
    for n, steps in plans:
        spacing, start = ruler.standard(full, steps)
        standard.append({"calls": n, "spacing": spacing, **ruler.cell(start, whole=True)})
        done = _tell(progress, done, total)
        for sigma in asked:
            at = NoiseLevel(float(sigma))
            for name, law in chosen.items():
                start = late_start(full, law, steps, at=at, check=False)
                rows.append({"start": name, "calls": n, "asked": float(sigma), **ruler.cell(start, whole=True)})
                done = _tell(progress, done, total)
            some = late_start(full, WhiteNoise(data.shape), steps, at=at, check=False)
            rows.append({"start": NOISED, "calls": n, "asked": float(sigma), **ruler.cell(some, True, noised=True)})
            done = _tell(progress, done, total)
    settings = {"sampler": sampler, "calls": list(calls), "levels": asked.tolist(), "starts": list(chosen)}
    content = {"rows": rows, "standard": standard, "about": {k: repr(v) for k, v in chosen.items()}}
    return ruler.record("starts", settings, {**content, "real": ruler.real()})


class _Ruler:
    """One way of measuring for all cells of a run: network, features, reference, counts, finished blocks."""

    def __init__(
        self,
        data: Images,
        holdout: Images,
        pipeline: Any,
        extract: Any,
        samples: int,
        repeats: int,
        micro_batch: int,
        out: str | Path | None,
    ) -> None:
        if samples < 2 or repeats < 2:
            raise InputError(f"{repeats} repeats of {samples} samples; expected at least 2 of each for an interval.")
        size = pipeline.unet.config.sample_size
        shape = (pipeline.unet.config.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))
        for name, images in (("the data", data), ("the held-out images", holdout)):
            if tuple(images.shape) != shape:
                raise InputError(f"{name} are {tuple(images.shape)}, the network makes {shape}. Resize them.")
        self.data, self.holdout, self.unet, self.extract = data, holdout, pipeline.unet, extract
        self.samples, self.repeats, self.micro_batch = samples, repeats, micro_batch
        self.folder = None if out is None else output_folder(out)
        self.images = data.tensor()
        self.held = features(extract, holdout)
        self.reference = Moments.fit([self.held], parts=1)
        self.packages, self.began = versions(torch.get_num_threads()), time.perf_counter()
        self.settings = {
            "data": data.fingerprint(),
            "holdout": holdout.fingerprint(),
            "network": weights_hash(self.unet),
            "answer": fingerprint(denoiser(self.unet, pipeline.scheduler)),
            "extractor": extract.name,
            "features": digest(self.held[:16]),
            "samples": samples,
            "repeats": repeats,
            "micro_batch": micro_batch,
        }
        self.store = Blocks(self.folder, {**self.settings, "versions": self.packages})

    def standard(self, full: Any, steps: int) -> tuple[str, LateStart]:
        """The standard start with the spacing that is best on other seeds, among those that differ."""
        own = {_key(start): (spacing, start) for spacing, start in standard_starts(full, steps).items()}
        if len(own) == 1:
            return next(iter(own.values()))
        seeds = range(SELECTION, SELECTION + self.samples)
        return min(own.values(), key=lambda pair: float(self._block(pair[1], seeds, 1, False)["pooled"][0]))

    def cell(self, start: LateStart, whole: bool = False, noised: bool = False) -> dict[str, Any]:
        """One reported cell, on the reporting seeds."""
        found = self._block(start, range(self.samples * self.repeats), self.repeats, whole, noised)
        mean, low, high = mean_interval(found["values"])
        cell: dict[str, Any] = {
            "sigma": start.level.sigma,
            "calls": start.calls,
            "distance": {
                "values": found["values"].tolist(),
                "mean": mean,
                "low": low,
                "high": high,
                "pooled": float(found["pooled"][0]),
                "repeats": self.repeats,
                "samples": self.samples,
                "reference": self.reference.count,
                "extractor": self.extract.name,
            },
        }
        if whole:
            keys = ("precision", "recall", "entropy", "nearest", "memorized")
            cell |= {k: None if math.isnan(v) else v for k, v in zip(keys, found["more"].tolist())}
        return cell

    def _block(
        self, start: LateStart, seeds: range, repeats: int, whole: bool, noised: bool = False
    ) -> dict[str, np.ndarray]:
        def make() -> dict[str, np.ndarray]:
            clean = None
            if noised:
                picks = torch.randint(len(self.images), (len(seeds),), generator=generator(62, seeds[0]))
                clean = self.images[picks]
            x = generate(self.unet, start, seeds, micro_batch=self.micro_batch, clean=clean)
            f = features(self.extract, x)
            found = distance(f, self.reference, repeats, self.extract.name)
            out = {"values": np.array(found.values), "pooled": np.array([found.pooled])}
            if whole:
                out["more"] = self._more(x, f)
            return out

        return self.store.keep(f"{_key(start)}-{seeds[0]}-{repeats}-{whole}-{noised}", make)

    def _more(self, x: torch.Tensor, f: torch.Tensor) -> np.ndarray:
        """Precision, recall, class entropy, median nearest distance and share memorized."""
        shared = precision_recall(f[:NEIGHBOURS], self.held[:NEIGHBOURS])
        near = nearest_summary(x[:NEAREST], self.images, None)["samples"]
        entropy = math.nan
        if hasattr(self.extract, "logits"):
            with torch.inference_mode():
                labels = torch.cat([self.extract.logits(part).argmax(1) for part in x.split(500)])
            entropy = class_entropy(labels, len(self.extract.classes))
        return np.array([shared["precision"], shared["recall"], entropy, near["median_nearest"], near["memorized"]])

    def real(self) -> dict[str, Any]:
        """What real images score: training images as samples, held-out images for nearness."""
        order = torch.randperm(len(self.images), generator=generator(63, 0))[: self.samples * self.repeats]
        held = self.holdout.tensor()
        near = nearest_summary(held[:NEAREST], self.images, None)["samples"]
        keys = ("precision", "recall", "entropy", "nearest", "memorized")
        x = self.images[order]
        found = dict(zip(keys, self._more(x, features(self.extract, x)).tolist()))
        return {**found, "nearest": near["median_nearest"], "memorized": near["memorized"], "images": len(x)}

    def record(self, kind: str, settings: dict[str, Any], content: dict[str, Any]) -> Record:
        """The record, saved where there is a folder; finished blocks go."""
        real = features(self.extract, self.data)
        ground = floor(real, self.reference, self.samples, self.repeats, self.extract.name)
        about = {
            "data": describe(self.data),
            "held_out": describe(self.holdout),
            "network": {
                "parameters": sum(p.numel() for p in self.unet.parameters()),
                "weights": weights_hash(self.unet),
            },
            "extractor": {"name": self.extract.name, "held_out_accuracy": getattr(self.extract, "accuracy", None)},
            "floor": ground.to_dict(),
        }
        timings = {"all": time.perf_counter() - self.began}
        found = Record(kind, {**self.settings, **settings}, {**about, **content}, self.packages, timings)
        if self.folder is not None:
            found.save(self.folder)
            self.store.close()
        return found


def _key(start: LateStart) -> str:
    """What decides an image beside the network and its seed: the scheduler, its times, and where it starts from."""
    shape = (1, 4, 4) if start.law is None else start.law.shape
    probe = start(torch.randn(4, *shape, generator=generator(64, 0)))
    config = start.scheduler.to_json_string() if hasattr(start.scheduler, "to_json_string") else ""
    times = torch.as_tensor(start.scheduler.timesteps)
    return digest(type(start.scheduler).__name__, config, start.steps, start.level, probe, times)


def _place(mark: CriticalTime, flat: list[float] | None) -> str | None:
    """Where a critical level falls: inside, above or below the flat range."""
    if mark.sigma is None or flat is None:
        return None
    return "below" if mark.sigma < flat[0] else "above" if mark.sigma > flat[1] else "inside"


def _tell(progress: Progress, done: int, total: int) -> int:
    if progress is not None:
        progress(done + 1, total)
    return done + 1
