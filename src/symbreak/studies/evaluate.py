"""The whole evaluation of a set of samples: distances, diversity, copies, each with counts and interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.data.held_out import HeldOut, check_units, held_out
from symbreak.data.images import Images, describe
from symbreak.data.labels import attributes
from symbreak.data.shape import to_fit
from symbreak.laws.class_posterior import Labels
from symbreak.metrics.attributes import attribute_classifier, attribute_names
from symbreak.metrics.composition import CLASSES, class_counts, composition
from symbreak.metrics.coverage import density_coverage, precision_recall, vendi_score
from symbreak.metrics.extractors import BATCH, Extractor, FromFunction
from symbreak.metrics.feature_rows import Features, NamedExtractor, chosen
from symbreak.metrics.feature_rows import features as feature_rows
from symbreak.metrics.frechet import extrapolated, group_distance
from symbreak.metrics.kernel_distance import kid
from symbreak.metrics.memorization import nearest_summary
from symbreak.metrics.reference import ROWS, Statistics, cache_folder, load_statistics, statistics
from symbreak.metrics.two_sample import classifier_test, sliced_wasserstein
from symbreak.networks.denoiser import Denoiser, Denoises
from symbreak.networks.families import denoises
from symbreak.networks.types import Network
from symbreak.noise import generator
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.files import InputError, digest, try_writing
from symbreak.runtime.plain import Values, versions
from symbreak.runtime.ranks import agreed, from_each, rank_of
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import MEMORY, Run, renamed
from symbreak.start.classes import Classes
from symbreak.start.cut_schedule import check_unclipped
from symbreak.start.late_start import LateStart
from symbreak.start.sample import Decode, decisive, decoded_shape, generate_shards
from symbreak.studies.pictures import png_row, shown

__all__ = ["Subset", "default_extractor", "evaluate", "evaluate_network"]

GRID = 10  # images of a sample grid
NEIGHBOUR_COST = 5e10  # differences formed for the nearest neighbours, half a minute or so
MICRO = 64
REFERENCE_PARTS = 8  # of the reference, for the intervals of distances


def default_extractor(data: Images) -> str:
    """The extractor where none is named: the bundled one for the digits, else pixels, or values of other samples."""
    if data.units is not None:
        return "values"
    return "digits-classifier" if data.name.startswith("digits") and data.shape == (1, 8, 8) else "pixels"


@dataclass(frozen=True)
class Subset:
    """Which of the images serve where not all can.

    Attributes:
        rows: feature rows to hold of each set, at most; also the training images to classify.
        seed: of parts, rows, subsets.
    """

    rows: int = ROWS
    seed: int = 0


@renamed(
    features_in="features=...",
    weights="features=sb.extractor(name, weights=...)",
    sha256="features=sb.extractor(name, sha256=...)",
    device="features=sb.extractor(name, device=...)",
    rows="subset=sb.Subset(rows=...)",
    seed="subset=sb.Subset(seed=...)",
)
def evaluate(
    samples: torch.Tensor | np.ndarray | Images | Shards,
    data: Images,
    holdout: Images | None = None,
    *,
    features: Features | None = None,
    classify: Features | None = None,
    reference: str | Path | None = None,
    repeats: int = 5,
    subset: Subset = Subset(),
    cache: bool | Path = True,
    run: Run | None = None,
) -> Values:
    """How far samples are from held-out images, what they leave out, and whether they copy the training images.

    Features are streamed: the Fréchet distances hold moments, about (3 repeats + 24) x features^2 numbers. Kernel
    distance, precision, recall and the rest hold the features of a random subset of each set.

    Args:
        samples: images [N, C, H, W] in [-1, 1], `Images`, or `Shards` of such images. Of data that `samples` opened,
            samples [N, *S] in the data's units, as `generate` makes them.
        data: the training images (floor, composition and nearest neighbours are taken from them).
        holdout: images to measure against; by default the other half of the digits, else half of ``data``.
        features: extractor, or the name of one (see `extractor`).
        classify: for the composition table: an extractor's name that is a classifier, or images -> classes [B], scores
            [B, K] or a dictionary of such by attribute. By default the extractor, where it is a classifier.
            ``"attributes"``, or ``"attributes:Male,Smiling"``, trains one on each of the data's columns of attributes,
            in the features.
        reference: file of reference statistics: read where it exists, else written. What was made of other images than
            ``holdout``, or with another extractor, raises an error.
        repeats: random parts of the samples, for the intervals, which leave out parts of the reference, too.
        subset: how many feature rows of each set are held, and the seed of all that is random.
        cache: whether statistics of real images are kept by content in `cache_folder`; or the folder.
        run: its folder gets ``record.json``. Its memory is for what is made of the features: the moments have to fit,
            and fewer rows are held where there is room for fewer; by default as many as ``subset`` says.

    Returns:
        Plain values: ``distance`` (mean over repeats, and ``pooled`` over all samples), ``extrapolated``, ``floor``,
        ``kid``, ``precision_recall``, ``density_coverage``, ``vendi``, ``composition``, ``neighbours``, ``extractor``,
        counts, pictures, ``verdict``: all of it in a few sentences, and ``notes``: what could not be measured, or is
        not to be trusted. What could not be
        measured is ``None``. Of samples that are no pictures also ``sliced_wasserstein`` and ``two_sample``
        (classifiers that try to tell samples from held-out ones), each with its ``floor``, of training samples.

    Raises:
        InputError: where sizes or ranges differ, images hold NaN, or statistics come from another extractor.
    """
    run = (run or Run()).taken()
    saved = load_statistics(reference) if reference is not None and agreed(Path(reference).exists) else None
    if reference is not None and saved is None:
        try_writing(Path(reference).parent)
    everything, parts = data, _halves(data, holdout, saved, reference)
    if parts is not None:
        data, holdout = parts.train, parts.test
    if repeats < 1 or len(samples) < 2 * repeats:
        raise InputError(f"{len(samples)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    samples = checked(samples, data)
    if features is None or isinstance(features, str):
        features = NamedExtractor(features)
    named = features if isinstance(features, NamedExtractor) else NamedExtractor()
    room = run.share(1 / 2, 2 * MEMORY)  # for a classifier that is trained
    extract = chosen(features, default_extractor(data), data, room)
    judge = _judge(classify, extract, data, room)
    notes: list[str] = []
    if parts is not None and parts.how == "kept back":
        notes.append(
            f"No held-out {data.noun} came: {len(parts.test):,} of the {len(everything):,} training {data.noun} stand "
            f"for them. A network trained on them lies nearer to them than to new {data.noun}; pass --holdout with "
            f"{data.noun} it has not seen. Copies are looked for among all training {data.noun}."
        )
    rows = _rows_that_fit(subset.rows, extract, data, repeats, run, notes)
    if saved is not None:
        _same_extractor(saved, extract, reference, data.shape)
    store = cache_folder() if cache is True else None if cache is False else Path(cache)
    with run.timed("held-out images") as part:
        real = saved
        if real is None:
            against = data if holdout is None else holdout
            groups = max(1, min(REFERENCE_PARTS, len(against) // 2))
            real = statistics(extract, against, groups=groups, rows=rows, seed=subset.seed, cache=store, run=part)
            if reference is not None:
                replace(real, origin={**real.origin, "answers": extract.sketch(data.shape)}).save(reference)
    with run.timed("samples") as part:
        made = statistics(extract, samples, groups=repeats, rows=rows, seed=subset.seed, run=part)
    if len(real.groups) == 1:
        notes.append(
            "The reference statistics came in one part: the intervals of the distances are those of the samples, given "
            "this reference, and its bias stays in. Make it again without --reference FILE, or under another name."
        )
    work = _Evaluation(extract, samples, everything, data, holdout, made, real, subset.seed, store, run, notes)
    about = {k: v for k, v in real.origin.items() if k != "answers"} if parts is None else parts.to_dict()
    content = {"data": describe(data), "held_out": about, **work.content(judge, rows)}
    content["verdict"] = sentences("evaluation", content)
    if run.folder is not None:
        settings = {
            "features": named.name or (default_extractor(data) if named is features else extract.name),
            "weights": None if named.weights is None else str(named.weights),
            "classify": _spelled(classify),
            "reference": None if reference is None else str(reference),
            "repeats": repeats,
            "rows": rows,
            "seed": subset.seed,
        }
        Record("evaluation", settings, content, versions(torch.get_num_threads()), run.timings).save(run.folder)
    return content


def evaluate_network(
    unet: Network | Denoises | Denoiser,
    start: LateStart,
    seeds: Sequence[int],
    data: Images,
    holdout: Images | None = None,
    labels: Classes | Labels | int | None = None,
    *,
    micro_batch: int = MICRO,
    identity: Values | None = None,
    decode: Decode | None = None,
    run: Run | None = None,
    **measuring: Any,
) -> Values:
    """Sample a network, going on from what an interrupted call has finished, and evaluate the images.

    Args:
        unet, start, seeds, labels, micro_batch: see `generate`.
        data, holdout: see `evaluate`.
        identity: plain values that decide the images beside these, such as how the network was compiled.
        decode: of a latent network: latents -> pictures like the data.
        run: its folder keeps finished images until the record is written; a quarter of its memory holds images.
        **measuring: passed to `evaluate`.

    Returns:
        As `evaluate`.
    """
    run = (run or Run()).taken()
    shape = decoded_shape(denoises(unet, start.full).shape, decode)
    _check_first(shape, start, seeds, data, holdout, measuring, decode is not None)
    clamp = None if data.units is None else False
    settings = decisive(unet, start, micro_batch, identity)
    made = settings["identity"]
    classes = labels.of(seeds) if isinstance(labels, Classes) else labels
    of_classes = {} if classes is None else {"classes": torch.as_tensor(classes).tolist()}
    sampling = run.identified({**made, **of_classes, "kind": "samples", "seeds": [int(s) for s in seeds]})
    room = sampling.share(1 / 4)
    images = generate_shards(unet, start, seeds, classes, micro_batch=micro_batch, clamp=clamp, decode=decode, run=room)
    content = evaluate(images, data, holdout, run=run if run.memory is None else run.share(3 / 4), **measuring)
    names = ("calls", "steps", "level", "law_in_words", "guidance", "classes", "prompt")
    content["sampling"] = {name: settings[name] for name in names if name in settings}
    content["verdict"] = sentences("evaluation", content)
    if run.folder is not None and rank_of()[0] == 0:
        replace(Record.load(run.folder), content=content).save(run.folder)
    sampling.close()
    return content


def _check_first(
    shape: Sequence[int],
    start: LateStart,
    seeds: Sequence[int],
    data: Images,
    holdout: Images | None,
    measuring: dict[str, Any],
    latents: bool = False,
) -> None:
    """What can be known to fail raises its error before a network is sampled, which may take hours."""
    if tuple(shape) != data.shape:
        raise InputError(
            f"the network makes {data.noun} of {tuple(shape)}, but the training {data.noun} are {data.shape}. "
            f"{to_fit(data.shape, tuple(shape))}, or choose another network."
        )
    if not latents:
        start.check_units(data)
    if data.units is not None or latents:
        check_unclipped(start.full, f"the samples of {data.name}")
    reference, repeats = measuring.get("reference"), measuring.get("repeats", 5)
    saved = load_statistics(reference) if reference is not None and agreed(Path(reference).exists) else None
    _halves(data, holdout, saved, reference)
    if repeats < 1 or len(seeds) < 2 * repeats:
        raise InputError(f"{len(seeds)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    for value in (measuring.get("features"), measuring.get("classify")):
        named = NamedExtractor(value) if isinstance(value, str) else value
        meant, names = attribute_names(named.name if isinstance(named, NamedExtractor) else None)
        if meant:
            attributes(data, names)
        elif isinstance(named, NamedExtractor) and named.name != "classifier":  # which is trained
            feature_rows(chosen(named, default_extractor(data), data, Run()), _some(data, np.arange(1)))


@dataclass
class _Evaluation:
    """What is measured, and with what: samples and real images by their statistics in one extractor."""

    extract: Extractor
    samples: Images | Shards
    everything: Images  # the training images, held-out ones among them where none came
    data: Images
    holdout: Images | None
    made: Statistics
    real: Statistics
    seed: int
    store: Path | None
    run: Run
    notes: list[str]
    marks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.marks = {"extractor": self.extract.name, "resize": self.extract.resize}

    def content(self, judge: Any, rows: int) -> Values:
        """All of the evaluation, as plain values."""
        samples, made, real, seed = self.samples, self.made, self.real, self.seed
        content: Values = {
            "samples": {
                "name": samples.name if isinstance(samples, Images) else "array",
                "count": len(samples),
                "fingerprint": samples.fingerprint() if isinstance(samples, Images) else digest(samples.digests()),
            },
            "extractor": {**self.extract.to_dict(), "features": real.whole.dim},
        }
        with self.run.timed("distances"):
            content |= self.distances()
        with self.run.timed("floor") as part:
            content["floor"] = self.floor(part)
        name = "KID" if self.extract.name == "inception" else "kernel distance"
        measures: dict[str, Callable[[], Values]] = {
            "kid": lambda: {"name": name, **kid(made.rows, real.rows, seed=seed)},
            "precision_recall": lambda: precision_recall(made.rows, real.rows),
            "density_coverage": lambda: density_coverage(made.rows, real.rows, seed=seed),
            "vendi": self.vendi,
        }
        for key, measure in measures.items():
            with self.run.timed(key):
                try:
                    content[key] = {**measure(), **self.marks}
                except InputError as error:
                    content[key] = None
                    self.notes.append(f"Not measured: {error}")
        if self.data.units is not None:
            with self.run.timed("two samples") as part:
                content |= self.two_samples(part)
        with self.run.timed("composition"):
            content["composition"] = [] if judge is None else _composition(judge, samples, self.data, rows, seed)
        with self.run.timed("neighbours"):
            content["neighbours"] = self.neighbours()
        content["pictures"] = self.pictures()
        content["notes"] = self.notes
        return content

    def pictures(self) -> list[Values]:
        """Some of the samples, and some of the images that they are measured against."""
        noun, units, most = self.data.noun, self.data.units, shown(self.data.shape, GRID)
        title = f"{'training' if self.holdout is None else 'held-out'} {noun}"
        real = self.data if self.holdout is None else self.holdout
        drawn = torch.randperm(len(real), generator=generator(self.seed, 27, 0))[:most].sort().values
        rows = {
            "samples": _some(self.samples, np.arange(min(most, len(self.samples)))),
            title: _some(real, drawn.numpy()),
        }
        if len(self.data.shape) == 1:
            return [{"title": f"samples (blue), {title} (orange)", "png": png_row(rows["samples"], units, rows[title])}]
        return [{"title": title, "png": png_row(x, units)} for title, x in rows.items()]

    def two_samples(self, run: Run) -> Values:
        """Distances that suit tables, each beside what training samples give at the same count."""
        made, real, seed = self.made.rows, self.real.rows, self.seed
        known: torch.Tensor | None = None
        if self.real.origin["fingerprint"] != self.data.fingerprint():
            part = _part(self.data, self.made.count, seed)
            known = statistics(self.extract, part, rows=len(made), seed=seed, cache=self.store, run=run).rows
        out: Values = {}
        measures: dict[str, Callable[..., Values]] = {
            "sliced_wasserstein": sliced_wasserstein,
            "two_sample": classifier_test,
        }
        for key, measure in measures.items():
            try:
                floor = None if known is None else measure(known, real, seed=seed)
                out[key] = {**measure(made, real, seed=seed), "floor": floor, **self.marks}
            except InputError as error:
                out[key] = None
                self.notes.append(f"Not measured: {error}")
        return out

    def distances(self) -> Values:
        """Fréchet distance by repeats and pooled, and extrapolated to infinitely many samples."""
        groups, whole, count, features = list(self.made.groups), self.real.whole, self.made.count, self.real.whole.dim
        distance = group_distance(groups, whole, self.extract.name)
        beyond = extrapolated(groups, whole, distance.pooled) if len(groups) >= 3 else None
        name = "FID" if self.extract.name == "inception" else "Fréchet distance"
        ends = {k: None if beyond is None else beyond.pop(k) for k in ("pooled_low", "pooled_high")}
        rough = " it is not"
        if beyond is None:
            self.notes.append("Not extrapolated to infinitely many samples: that needs at least 3 repeats.")
        else:
            rough = f": {beyond['value']:.4g} [{beyond['low']:.4g}, {beyond['high']:.4g}], itself rough"
        if count <= features:
            self.notes.append(
                f"Only {count:,} samples for {features:,} features: the distance ({distance.pooled:.4g} pooled) is "
                f"biased far upward. Extrapolated to infinitely many{rough}. Trust it from 3 samples a feature on."
            )
        if self.real.count <= features:
            few = f"Only {self.real.count:,} reference {self.data.noun} for {features:,} features"
            self.notes.append(f"{few}: all distances are too large.")
        more = None if beyond is None else {"name": name, **beyond, "reference": self.real.count, **self.marks}
        return {
            "distance": {"name": name, **distance.to_dict(), **ends, "count": count, **self.marks},
            "extrapolated": more,
        }

    def floor(self, run: Run) -> Values | None:
        """Training images against the reference at the samples' counts."""
        if self.real.origin["fingerprint"] == self.data.fingerprint():
            self.notes.append(f"No floor: the reference are the training {self.data.noun} themselves.")
            return None
        repeats = len(self.made.groups)
        size = min(self.made.count // repeats, len(self.data))
        disjoint = min(repeats, len(self.data) // size)
        part = _part(self.data, size * disjoint, self.seed)
        train = statistics(self.extract, part, groups=disjoint, rows=0, seed=self.seed, cache=self.store, run=run)
        distance = group_distance(list(train.groups), self.real.whole, self.extract.name)
        return {**distance.to_dict(), "count": train.count, **self.marks}

    def vendi(self) -> Values:
        """Of the samples and, at the same count, of the reference."""
        both = (self.made.rows, self.real.rows)
        size = min(map(len, both))
        picks = [torch.randperm(len(x), generator=generator(self.seed, 24, i))[:size] for i, x in enumerate(both)]
        score, other = (vendi_score(x[p], seed=self.seed) for x, p in zip(both, picks))
        ends = {"reference_value_low": other["low"], "reference_value_high": other["high"]}
        return {**score, "reference_value": other["value"], **ends}

    def neighbours(self) -> Values:
        """Nearest training images of the samples and of the held-out images.

        Samples are looked for among all training images, held-out images among those that they are no part of.
        """
        everything, data, run = self.everything, self.data, self.run
        most = max(GRID, int(NEIGHBOUR_COST / (len(everything) * math.prod(data.shape))))

        def picked(images: Images | Shards, i: int) -> torch.Tensor:
            order = torch.randperm(len(images), generator=generator(self.seed, 25, i))[:most]
            return _some(images, np.sort(order.numpy()))

        held_out = None if self.holdout is None else picked(self.holdout, 1)
        whole = held_out is None or everything is data
        nearest = nearest_summary(picked(self.samples, 0), everything, held_out if whole else None, run)
        if held_out is not None and not whole:
            nearest["held_out"] = nearest_summary(held_out, data, None, run)["samples"]
        return nearest if data.units is None else {**nearest, "features": "values"}


def _spelled(classify: Features | None) -> str | None:
    if isinstance(classify, NamedExtractor):
        return classify.name
    return classify if classify is None or isinstance(classify, str) else "a callable"


def _halves(data: Images, holdout: Images | None, saved: Statistics | None, path: str | Path | None) -> HeldOut | None:
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


def checked(samples: torch.Tensor | np.ndarray | Images | Shards, data: Images) -> Images | Shards:
    """Samples as rows, off a GPU.

    Raises:
        InputError: for samples of another size than the data, with NaN, or in another range.
    """
    if isinstance(samples, np.ndarray):
        samples = torch.tensor(samples)
    if isinstance(samples, torch.Tensor):
        if not samples.is_floating_point():
            whole = " in [-1, 1]. Pass images(samples), which knows 8-bit images" if data.units is None else ""
            raise InputError(f"the samples are {str(samples.dtype).removeprefix('torch.')}; expected floats{whole}.")
        samples = Shards.of(samples if samples.dtype == torch.float64 else samples.float(), BATCH)
    shape = samples.shape if isinstance(samples, Images) else samples.shape[1:]
    if shape != data.shape:
        raise InputError(
            f"the samples have the shape {shape}, the training {data.noun} {data.shape}. {to_fit(shape, data.shape)}."
        )
    if data.units is not None or isinstance(samples, Images):
        _check_scale(samples, data)
    if isinstance(samples, Images):
        return samples  # opened with a range, which they were checked against, or without NaN
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
    if data.units is not None:
        return samples
    low, high = min(float(e["ends"][0]) for e in each), max(float(e["ends"][1]) for e in each)
    if low >= 0 and float(next(iter(data)).min()) < -0.5:
        end = 1 if high <= 1 else 255
        raise InputError(
            f"the samples lie in [{low:.3g}, {high:.3g}], but the training images reach below 0: they look like "
            f"[0, {end}]. Expected [-1, 1]: pass images(samples, value_range=(0, {end}))."
        )
    if low < -1.001 or high > 1.001:
        far = 255.0 if low >= 0 else max(-low, high)
        repair = f"images(samples, value_range=({'0' if low >= 0 else f'-{far:.3g}'}, {far:.3g}))"
        if far < 1.5:  # images of a network overshoot by this much: cut, not rescaled
            repair = "samples.clamp(-1, 1)"
        raise InputError(f"the samples lie in [{low:.3g}, {high:.3g}]; expected [-1, 1]: pass {repair}.")
    return samples


def _check_scale(samples: Images | Shards, data: Images) -> None:
    """Samples that look as if they were in other units than the data raise an error: raw ones, or scaled once more.

    How far they are off is the median over columns of |mean| + |log standard deviation|, both 0 for the data.
    """
    if isinstance(samples, Images):
        check_units(data, samples, "samples")
    units = data.units
    if units is None or units.mean is None or units.std is None:
        return
    rows = _some(samples, np.arange(min(1000, len(samples)))).double().transpose(0, 1).flatten(1).numpy()
    mean, std = rows.mean(1), np.maximum(rows.std(1), 1e-12)

    def off(mean: np.ndarray, std: np.ndarray) -> float:
        return float(np.median(np.abs(mean) + np.abs(np.log(std))))

    here = off(mean, std)
    raw, twice = (
        off((mean - units.mean) / units.std, std / units.std),
        off(mean * units.std + units.mean, std * units.std),
    )
    if here > 2 and min(raw, twice) < here / 4:
        what, repair = (
            ("the columns' own units", "sb.samples(samples, scale=data)")
            if raw < twice
            else ("the data's units already, and scaled once more", "them as a tensor, or sb.samples(samples)")
        )
        raise InputError(f"the samples look as if they were in {what}; the data are in {units.text}. Pass {repair}.")


def _rows_that_fit(rows: int, extract: Extractor, data: Images, repeats: int, run: Run, notes: list[str]) -> int:
    """How many feature rows of each set fit beside the moments."""
    if run.memory is None:
        return rows
    width = feature_rows(extract, _some(data, np.arange(1))).shape[1]
    # Moments of both sets and the training images by parts, beside the matrices of a distance; the rows of both sets,
    # and blocks of 1,024 of them against all others, a few at a time.
    moments = (3 * repeats + 2 * REFERENCE_PARTS + 8) * 8 * width**2
    room = (run.memory - moments) // (64 * width + 4 * 8 * 1024)
    if room < 100:
        raise InputError(
            f"{run.memory / 1e9:.3g} GB of memory for {width:,} features in {repeats} repeats, whose moments take "
            f"{moments / 1e9:.3g} GB. Allow more, or choose fewer --repeats or other --features."
        )
    if room < rows:
        notes.append(f"Kernel distance, precision, recall and the like on at most {room:,} images: the memory allowed.")
    return int(min(rows, room))


def _same_extractor(saved: Statistics, extract: Extractor, path: str | Path | None, shape: tuple[int, ...]) -> None:
    about = extract.to_dict()
    theirs = [saved.origin[k] for k in ("extractor", "resize", "identity")]
    ours = [about[k] for k in ("name", "resize", "identity")]
    answers = saved.origin.get("answers")
    other = ""
    if answers is None and isinstance(extract, FromFunction):
        other = ", but says nothing of what that function answers"
    elif answers is not None:
        now = np.array(extract.sketch(shape)) if theirs[1:] == ours[1:] else np.zeros(0)
        # Machines differ in rounding, 1e-5 of the largest after some layers; other weights in the first digits.
        if len(now) != len(answers) or np.abs(now - answers).max() > 1e-3 * np.abs(now).max():
            other = ", whose answers to fixed images are others now"
    if (answers is None and theirs != ours) or theirs[1:] != ours[1:] or other:
        read, here = (f"{n} (resize: {r}; weights: {i or 'unknown'})" for n, r, i in (theirs, ours))
        raise InputError(
            f"{path} holds statistics in {read}{other}, but this evaluation is in {here}. Pass the --features it was "
            "made with, or another --reference."
        )


def _part(data: Images, count: int, seed: int) -> Images:
    """So many of the images, at random and not evenly over the classes: they stand for a sample."""
    if count >= len(data):
        return data
    index = torch.randperm(len(data), generator=generator(seed, 23, 0))[:count].numpy()
    return data.take(index, f"random {count} {seed}")


def _judge(classify: Features | None, extract: Extractor, data: Images, run: Run) -> Any:
    """What says the class of an image, ``None`` where there is nothing."""
    if _spelled(classify) == "pixels":
        raise InputError(
            "--classify pixels gives no classes; expected a classifier, FILE.safetensors, module:callable."
        )
    meant, names = attribute_names(_spelled(classify))
    if meant:
        return attribute_classifier(data, names, extract)
    if isinstance(classify, str | NamedExtractor):
        return chosen(classify, default_extractor(data), data, run)
    return extract if classify is None and hasattr(extract, "logits") else classify


def _composition(judge: Any, samples: Images | Shards, data: Images, rows: int, seed: int) -> list[Values]:
    inner = getattr(judge, "function", judge)  # a callable may give classes, which are no features
    names = getattr(inner, "classes", None)
    by_attribute = names if isinstance(names, dict) else {} if names is None else {CLASSES: list(names)}
    function = getattr(inner, "logits", inner)
    train, counted = class_counts(function, _part(data, rows, seed)), class_counts(function, samples)
    about = Extractor.of(judge).to_dict()
    marks = {"classifier": about["name"], "held_out_accuracy": about["held_out_accuracy"]}
    each = getattr(inner, "accuracies", {})  # of attributes
    return [
        {**table, **marks, "balanced_accuracy": each.get(table["attribute"])}
        for table in composition(train, counted, by_attribute)
    ]


def _some(images: Images | Shards, index: np.ndarray) -> torch.Tensor:
    """Images at rising positions [n, C, H, W]."""
    return images.take(index, "some").tensor() if isinstance(images, Images) else images.at(torch.from_numpy(index))
