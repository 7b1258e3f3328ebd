"""The whole evaluation of a set of samples: distances, diversity, copies, each with counts and interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.data.held_out import HeldOut, held_out
from symbreak.data.images import Images, describe
from symbreak.metrics.coverage import (
    CLASSES,
    class_counts,
    composition,
    density_coverage,
    precision_recall,
    vendi_score,
)
from symbreak.metrics.features import BATCH, chosen, described, extractor, named, placed
from symbreak.metrics.features import features as feature_rows
from symbreak.metrics.frechet import extrapolated, group_distance
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.memorization import nearest_summary
from symbreak.metrics.reference import ROWS, Statistics, cache_folder, load_statistics, statistics
from symbreak.noise import generator
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, digest, output_folder
from symbreak.runtime.plain import stopwatch, versions
from symbreak.runtime.ranks import agreed, from_each
from symbreak.runtime.rows import HELD, Shards
from symbreak.studies.findings import png_row

__all__ = ["default_extractor", "evaluate"]

GRID = 10  # images of a sample grid
NEIGHBOUR_COST = 5e10  # differences formed for the nearest neighbours, half a minute or so
Progress = Callable[[str, int, int], None]


def default_extractor(data: Images) -> str:
    """The extractor for a data set where none is named: the bundled one for the digits, else pixels."""
    return "digits-classifier" if data.name.startswith("digits") and data.shape == (1, 8, 8) else "pixels"


def evaluate(
    samples: torch.Tensor | Images | Shards,
    data: Images,
    holdout: Images | None = None,
    *,
    features_in: str | Any | None = None,
    weights: str | Path | None = None,
    sha256: str | None = None,
    classify: str | Any | None = None,
    reference: str | Path | None = None,
    repeats: int = 5,
    rows: int = ROWS,
    seed: int = 0,
    memory: int | None = None,
    device: str | torch.device | None = None,
    cache: bool | Path = True,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far samples are from held-out images, what they leave out, and whether they copy the training images.

    Features are streamed: the Fréchet distances hold moments, (repeats + 2) x features^2 numbers. Kernel distance,
    precision, recall and the rest hold the features of at most ``rows`` images of each set, a random subset.

    Args:
        samples: images [N, C, H, W] in [-1, 1], `Images`, or `Shards` of such images.
        data: the training images (floor, composition and nearest neighbours are taken from them).
        holdout: images to measure against; by default the other half of the digits, else half of ``data``.
        features_in: extractor or its name (see `extractor`).
        weights, sha256: of a published network, see `extractor`.
        classify: for the composition table: an extractor's name that is a classifier, or images -> classes [B], scores
            [B, K] or a dictionary of such by attribute. By default the extractor, where it is a classifier.
        reference: file of reference statistics: read where it exists, else written. What was made of other images than
            ``holdout``, or with another extractor, is refused.
        repeats: random parts the samples are dealt into for the intervals.
        rows: feature rows to hold of each set, at most; also the training images to classify.
        seed: of parts, rows, subsets.
        memory: bytes for what is made of the features: the moments have to fit, and fewer ``rows`` are held where
            there is room for fewer. By default as many as ``rows``.
        device: where a feature network or classifier named here runs; by default on the CPU.
        cache: whether statistics of real images are kept by content in `cache_folder`; or the folder.
        out: folder for ``record.json``.
        progress: called with (stage, done, total).

    Returns:
        Plain values: ``distance`` (mean over repeats, and ``pooled`` over all samples), ``extrapolated``, ``floor``,
        ``kid``, ``precision_recall``, ``density_coverage``, ``vendi``, ``composition``, ``neighbours``, ``extractor``,
        counts, pictures and ``notes``: what could not be measured, or is not to be trusted. What could not be
        measured is ``None``.

    Raises:
        InputError: where sizes or ranges differ, images hold NaN, or statistics come from another extractor.
    """
    tell = progress or (lambda stage, done, total: None)
    if isinstance(samples, torch.Tensor):
        samples = Shards.of(_pixels(samples), BATCH)  # which takes them off a GPU
    folder = None if out is None else output_folder(out)
    timings: dict[str, float] = {}
    lap = stopwatch(timings, tell)
    store = cache_folder() if cache is True else None if cache is False else Path(cache)
    saved = load_statistics(reference) if reference is not None and agreed(Path(reference).exists) else None
    parts = _halves(data, holdout, saved, reference)
    if parts is not None:
        data, holdout = parts.train, parts.test
    if repeats < 1 or len(samples) < 2 * repeats:
        raise InputError(f"{len(samples)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    _fitting(samples, data, holdout)

    if features_in is None:
        features_in = default_extractor(data)
    room = HELD if memory is None else memory // 2  # for a classifier that is trained
    extract = chosen(features_in, data, weights, sha256, device, room, folder)
    judge = _judge(classify, extract, data, device, room, folder)
    about = described(extract)
    notes: list[str] = []
    rows = _held(rows, memory, extract, data, repeats, notes)
    if saved is not None:
        _same_extractor(saved, about, reference)

    with lap("held-out images") as said:
        real = saved
        if real is None:
            against = data if holdout is None else holdout
            real = statistics(extract, against, rows=rows, seed=seed, cache=store, progress=said)
            if reference is not None:
                real.save(reference)
    with lap("samples") as said:
        own = statistics(extract, samples, groups=repeats, rows=rows, seed=seed, progress=said)
    marks = {"extractor": about["name"], "resize": about["resize"]}
    content: dict[str, Any] = {
        "data": describe(data),
        "held_out": real.origin if parts is None else parts.to_dict(),
        "samples": {"name": _name(samples), "count": len(samples), "fingerprint": _fingerprint(samples)},
        "extractor": {**about, "features": real.whole.dim},
    }
    with lap("distances"):
        content |= _distances(own, real, marks, notes)
    with lap("floor") as said:
        content["floor"] = _floor(extract, data, own, real, marks, seed, store, notes, said)

    def attempt(key: str, measure: Callable[[], dict[str, Any]]) -> None:
        with lap(key):
            try:
                content[key] = {**measure(), **marks}
            except InputError as error:
                content[key] = None
                notes.append(f"Not measured: {error}")

    attempt("kid", lambda: {"name": _kernel_name(about), **kid(own.rows, real.rows, seed=seed)})
    attempt("precision_recall", lambda: precision_recall(own.rows, real.rows))
    attempt("density_coverage", lambda: density_coverage(own.rows, real.rows, seed=seed))
    attempt("vendi", lambda: _vendi(own, real, seed))
    with lap("composition"):
        content["composition"] = [] if judge is None else _composition(judge, samples, data, rows, seed)
    with lap("neighbours"):
        content["neighbours"] = _neighbours(samples, data, holdout, seed, memory or 2**30, folder)
    shown = ("training images", data) if holdout is None else ("held-out images", holdout)
    content["pictures"] = [
        {"title": title, "png": png_row(_some(found, np.arange(min(GRID, len(found)))))}
        for title, found in (("samples", samples), shown)
    ]
    content["notes"] = notes
    if folder is not None:
        settings = {
            "features": features_in if isinstance(features_in, str) else about["name"],
            "weights": None if weights is None else str(weights),
            "classify": classify if classify is None or isinstance(classify, str) else "a callable",
            "reference": None if reference is None else str(reference),
            "repeats": repeats,
            "rows": rows,
            "seed": seed,
        }
        Record("evaluation", settings, content, versions(torch.get_num_threads()), timings).save(folder)
    return content


def _halves(data: Images, holdout: Images | None, saved: Statistics | None, path: Any) -> HeldOut | None:
    """Training and held-out images; the latter are not needed where their statistics are there."""
    parts = held_out(data, holdout, share=0.5)
    if saved is None or saved.origin["fingerprint"] == parts.test.fingerprint():
        return parts
    if holdout is not None:
        raise InputError(
            f"{path} holds statistics of {saved.origin['data']}, which are other images than {holdout.name}. Leave "
            "--holdout out, or name another --reference."
        )
    return None


def _pixels(samples: torch.Tensor) -> torch.Tensor:
    """Samples in single or double precision."""
    if not samples.is_floating_point():
        raise InputError(
            f"the samples are {str(samples.dtype).removeprefix('torch.')}; expected floats in [-1, 1]. Pass "
            "images(samples), which knows 8-bit images."
        )
    return samples if samples.dtype == torch.float64 else samples.float()


def _fitting(samples: Images | Shards, data: Images, holdout: Images | None) -> None:
    """Refuse samples of other sizes, with NaN, or in another range."""
    shape = samples.shape if isinstance(samples, Images) else samples.shape[1:]
    for name, other in (
        ("the samples", shape),
        ("the held-out images", data.shape if holdout is None else holdout.shape),
    ):
        if other != data.shape:
            raise InputError(f"{name} have the shape {other}, the training images {data.shape}. Resize them.")
    if isinstance(samples, Images):
        return  # opened with a range, which they were checked against
    at, first, ends = samples.first, len(samples), [math.inf, -math.inf]
    bad = 0
    for block in samples:
        broken = (~torch.isfinite(block.flatten(1)).all(1)).nonzero()[:, 0]
        bad += len(broken)
        first = min([first, *(at + broken).tolist()])
        ends = [min(ends[0], float(block.min())), max(ends[1], float(block.max()))]
        at += len(block)
    each = from_each({"bad": np.array([bad, first]), "ends": np.array(ends)}, samples.shared)
    bad, first = sum(int(e["bad"][0]) for e in each), min(int(e["bad"][1]) for e in each)
    if bad:
        raise InputError(
            f"{bad:,} of {len(samples):,} samples hold NaN or infinity (first: sample {first}). Leave them out."
        )
    low, high = min(float(e["ends"][0]) for e in each), max(float(e["ends"][1]) for e in each)
    if low >= 0 and float(next(iter(data)).min()) < -0.5:
        end = 1 if high <= 1 else 255
        raise InputError(
            f"the samples lie in [{low:.3g}, {high:.3g}], but the training images reach below 0: they look like "
            f"[0, {end}]. Expected [-1, 1]: pass images(samples, value_range=(0, {end}))."
        )
    if low < -1.001 or high > 1.001:
        far = 255.0 if low >= 0 else max(-low, high)
        mend = f"images(samples, value_range=({'0' if low >= 0 else f'-{far:.3g}'}, {far:.3g}))"
        if far < 1.5:  # a network's own images overshoot by this much: cut, not rescaled
            mend = "samples.clamp(-1, 1)"
        raise InputError(f"the samples lie in [{low:.3g}, {high:.3g}]; expected [-1, 1]: pass {mend} or mend them.")


def _held(rows: int, memory: int | None, extract: Any, data: Images, repeats: int, notes: list[str]) -> int:
    """How many feature rows of each set fit beside the moments."""
    if memory is None:
        return rows
    width = feature_rows(extract, _some(data, np.arange(1))).shape[1]
    # Moments of both sets and the training images by parts, beside the matrices of a distance; the rows of both sets,
    # and blocks of 1,024 of them against all others, a few at a time.
    moments = (3 * repeats + 8) * 8 * width**2
    room = (memory - moments) // (64 * width + 4 * 8 * 1024)
    if room < 100:
        raise InputError(
            f"{memory / 1e9:.3g} GB of memory for {width:,} features in {repeats} repeats, whose moments take "
            f"{moments / 1e9:.3g} GB. Allow more, or choose fewer --repeats or other --features."
        )
    if room < rows:
        notes.append(f"Kernel distance, precision, recall and the like on at most {room:,} images: the memory allowed.")
    return int(min(rows, room))


def _same_extractor(saved: Statistics, about: dict[str, Any], path: Any) -> None:
    theirs = [saved.origin[k] for k in ("extractor", "resize", "identity")]
    ours = [about["name"], about["resize"], about["identity"]]
    if theirs != ours:
        told = [f"{n} (resize: {r}; weights: {i or 'unknown'})" for n, r, i in (theirs, ours)]
        raise InputError(
            f"{path} holds statistics in {told[0]}, but this evaluation is in {told[1]}. Pass the --features it was "
            "made with, or another --reference."
        )


def _kernel_name(about: dict[str, Any]) -> str:
    return "KID" if about["name"] == "inception" else "kernel distance"


def _distances(own: Statistics, real: Statistics, marks: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Fréchet distance by repeats and pooled, and extrapolated to infinitely many samples."""
    groups, whole = list(own.groups), real.whole
    found = group_distance(groups, whole, marks["extractor"])
    beyond = extrapolated(groups, whole, found.pooled) if len(groups) >= 3 else None
    name = "FID" if marks["extractor"] == "inception" else "Fréchet distance"
    ends = {k: None if beyond is None else beyond.pop(k) for k in ("pooled_low", "pooled_high")}
    if beyond is None:
        notes.append("Not extrapolated to infinitely many samples: that needs at least 3 repeats.")
    features = whole.dim
    if own.count <= features:
        told = (
            ""
            if beyond is None
            else f": {beyond['value']:.4g} [{beyond['low']:.4g}, {beyond['high']:.4g}], itself rough"
        )
        notes.append(
            f"Only {own.count:,} samples for {features:,} features: the distance ({found.pooled:.4g} pooled) is biased "
            f"far upward. Extrapolated to infinitely many{told or ' it is not'}. Trust it from 3 samples a feature on."
        )
    if real.count <= features:
        notes.append(f"Only {real.count:,} reference images for {features:,} features: all distances are too large.")
    return {
        "distance": {"name": name, **found.to_dict(), **ends, "count": own.count, **marks},
        "extrapolated": None if beyond is None else {"name": name, **beyond, "reference": real.count, **marks},
    }


def _floor(
    extract: Any,
    data: Images,
    own: Statistics,
    real: Statistics,
    marks: dict[str, Any],
    seed: int,
    store: Path | None,
    notes: list[str],
    said: Callable[[int, int], None],
) -> dict[str, Any] | None:
    """Training images against the reference at the samples' counts."""
    if real.origin["fingerprint"] == data.fingerprint():
        notes.append("No floor: the reference are the training images themselves.")
        return None
    repeats = len(own.groups)
    size = min(own.count // repeats, len(data))
    disjoint = min(repeats, len(data) // size)
    part = _part(data, size * disjoint, seed)
    train = statistics(extract, part, groups=disjoint, rows=0, seed=seed, cache=store, progress=said)
    found = group_distance(list(train.groups), real.whole, marks["extractor"])
    return {**found.to_dict(), "count": train.count, **marks}


def _part(data: Images, count: int, seed: int) -> Images:
    """So many of the images, at random and not evenly over the classes: they stand for a sample."""
    if count >= len(data):
        return data
    index = torch.randperm(len(data), generator=generator(seed, 23, 0))[:count].numpy()
    return data.take(index, f"random {count} {seed}")


def _vendi(own: Statistics, real: Statistics, seed: int) -> dict[str, Any]:
    """Of the samples and, at the same count, of the reference."""
    size = min(len(own.rows), len(real.rows))
    picks = [torch.randperm(len(s.rows), generator=generator(seed, 24, i))[:size] for i, s in enumerate((own, real))]
    found, other = (vendi_score(s.rows[p], seed=seed) for s, p in zip((own, real), picks))
    ends = {"reference_value_low": other["low"], "reference_value_high": other["high"]}
    return {**found, "reference_value": other["value"], **ends}


def _judge(classify: Any, extract: Any, data: Images, device: Any, memory: int, folder: Path | None) -> Any:
    """What says the class of an image, ``None`` where there is nothing."""
    if classify == "pixels":
        raise InputError(
            "--classify pixels gives no classes; expected a classifier, FILE.safetensors, module:callable."
        )
    judge = classify
    if isinstance(classify, str):
        judge = placed(extractor(classify, data, memory=memory, folder=folder), device)
    return extract if judge is None and hasattr(extract, "logits") else judge


def _composition(judge: Any, samples: Images | Shards, data: Images, rows: int, seed: int) -> list[dict[str, Any]]:
    inner = getattr(judge, "function", judge)  # a callable may give classes, which are no features
    names = getattr(inner, "classes", None)
    by_attribute = names if isinstance(names, dict) else {} if names is None else {CLASSES: list(names)}
    function = getattr(inner, "logits", inner)
    train = class_counts(function, _part(data, rows, seed))
    found = class_counts(function, samples)
    tables = composition(train, found, by_attribute)
    about = described(named(judge))
    return [{**t, "classifier": about["name"], "held_out_accuracy": about["held_out_accuracy"]} for t in tables]


def _neighbours(
    samples: Images | Shards, data: Images, holdout: Images | None, seed: int, memory: int, folder: Path | None
) -> dict[str, Any]:
    most = max(GRID, int(NEIGHBOUR_COST / (len(data) * math.prod(data.shape))))
    picked = []
    for i, found in enumerate((samples, holdout)):
        if found is not None:
            order = torch.randperm(len(found), generator=generator(seed, 25, i))[:most]
            picked.append(_some(found, np.sort(order.numpy())))
    return nearest_summary(picked[0], data, picked[1] if holdout is not None else None, memory, folder)


def _some(found: Images | Shards, index: np.ndarray) -> torch.Tensor:
    """Images at rising positions [n, C, H, W]."""
    return found.take(index, "some").tensor() if isinstance(found, Images) else found.at(torch.from_numpy(index))


def _name(samples: Images | Shards) -> str:
    return samples.name if isinstance(samples, Images) else "array"


def _fingerprint(samples: Images | Shards) -> str:
    return samples.fingerprint() if isinstance(samples, Images) else digest(samples.digests())
