"""Does my network copy? Duplicates, memorized samples, train against held-out: `Record` of kind "audit".

    duplicates   equal pixels, and near ones: within a tenth of the scale of the training images' own neighbours
    memorized    d_1 / d_2 < 1/3, d_2 to the nearest training image that is no duplicate of the first: beside a pair
                 of duplicates d_1 / d_2 would be 1, and every copy of them would be missed
    transformed  the same for copies that are flipped, shifted by up to two pixels, paler or of less contrast
    nearer       share of samples nearer to training than to held-out images, 1/2 without copying

Held-out images are measured like the samples: they show what to expect of images that were not copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from symbreak.data.held_out import held_out
from symbreak.data.images import Images, describe
from symbreak.data.shape import to_fit
from symbreak.intervals import proportion
from symbreak.laws.nearest_neighbours import neighbours
from symbreak.metrics.extractors import BATCH, Extractor
from symbreak.metrics.feature_rows import Features, chosen, feature_shards
from symbreak.metrics.memorization import NEAR, THRESHOLD, apart, groups, nearer_to_train
from symbreak.metrics.transformed import nearest_transformed, transformations
from symbreak.networks.denoiser import Denoiser, Denoises
from symbreak.networks.families import denoiser
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Pipeline
from symbreak.noise import generator
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.files import InputError, digest, read_json
from symbreak.runtime.identity import identity_of, of_data
from symbreak.runtime.plain import Values, plain, versions
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, renamed
from symbreak.start.classes import Classes
from symbreak.start.cut_schedule import check_unclipped
from symbreak.start.late_start import LateStart, cut, standard_start
from symbreak.start.loading import classes_for
from symbreak.start.sample import Decode, decisive, decoded_shape, generate_shards
from symbreak.studies.evaluate import checked
from symbreak.studies.measure import pipeline_of
from symbreak.studies.pictures import png_row

__all__ = ["Sampling", "audit"]

BINS = 40
SHOWN = 24  # pairs drawn
LISTED = 100  # duplicate groups listed
TRANSFORMED_COST = 1e12  # differences formed for changed copies: some minutes; fewer images are asked where it is more
MICRO = 64  # states of one network evaluation
NO_OTHERS = (
    "No held-out {0}, so nothing says what d1/d2 is to be expected of {0} that nobody copied. Pass --holdout "
    "with {0} of the same source that the network has not seen."
)
LEAST = 10  # references a side for the comparison with held-out images
Pairs = tuple[torch.Tensor, torch.Tensor]  # distances [N, 2] to the two nearest, and which they are


@dataclass(frozen=True)
class Sampling:
    """How a network's samples are made: from its own start where it brings one, else from white noise.

    Attributes:
        count: how many.
        sampler: name of `scheduler`; by default that of the start, from white noise ``"dpm++2m"``.
        steps: num_inference_steps; by default those of the start, from white noise 50.
        seeds: instead of 0 .. count - 1.
        classes: of a class-conditional network, which class every seed has; by default those of the data.
        start: where to begin; by default what `symbreak train --residual` chose for the network.
        decode: of a latent network: latents -> pictures like the data.
        identity: plain values that decide the samples beside these, such as what made the decoder.
    """

    count: int = 1000
    sampler: str | None = None
    steps: int | None = None
    seeds: Sequence[int] | None = None
    classes: Classes | None = None
    start: LateStart | None = None
    decode: Decode | None = None
    identity: Values | None = None

    def list(self) -> list[int]:
        """The seeds, one an image."""
        return list(range(self.count)) if self.seeds is None else [int(s) for s in self.seeds]

    def begin(self, pipe: Pipeline) -> LateStart:
        """The start that a pipeline's samples come from."""
        start = getattr(pipe, "start", None) if self.start is None else self.start
        if start is not None and (self.sampler, self.steps) == (None, None):
            return start
        steps = (50 if start is None else start.steps) if self.steps is None else self.steps
        if start is not None and self.sampler is None:
            base = start.full
        else:
            base = scheduler("dpm++2m" if self.sampler is None else self.sampler, like=pipe.scheduler)
        if start is None or start.law is None:
            return standard_start(base, steps)
        return replace(cut(base, start.law, steps, start.level), pictures=start.pictures, units=start.units)


@dataclass(frozen=True)
class _Side:
    """Images that are searched for, or searched among: as pixels, as rows of the features, and by their bytes."""

    pixels: Shards
    rows: Shards
    digests: tuple[bytes, ...]
    features: str  # a digest of all rows

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self) -> np.ndarray:
        """Position of the first of every set of equal images, rising."""
        seen: dict[bytes, int] = {}
        for i, one in enumerate(self.digests):
            seen.setdefault(one, i)
        return np.fromiter(seen.values(), np.int64)


@renamed(
    weights="features=sb.extractor(name, weights=...)",
    sha256="features=sb.extractor(name, sha256=...)",
    device="features=sb.extractor(name, device=...)",
    **{k: f"sampling=sb.Sampling({k}=...)" for k in ("count", "sampler", "steps", "seeds")},
)
def audit(
    train: Images,
    samples: torch.Tensor | np.ndarray | Images | None = None,
    *,
    model: Pipeline | Denoises | Denoiser | None = None,
    sampling: Sampling = Sampling(),
    holdout: Images | None = None,
    features: Features = "pixels",
    threshold: float = THRESHOLD,
    near: float = NEAR,
    seed: int = 0,
    run: Run | None = None,
) -> Record:
    """Duplicates in a training set, and whether samples copy it.

    Args:
        train: the images the network was trained on, exactly these.
        samples: images [N, C, H, W] in [-1, 1] (samples [N, *S] in the units of ``train``), or `Images`;
            without samples and model only the data are audited.
        model: a diffusers pipeline with ``.unet`` and ``.scheduler``, a `denoiser` or a law, to sample from instead.
        sampling: of the model's samples.
        holdout: images of the same source that the network has not seen; by default the other half of the digits,
            none for other data.
        features: ``"pixels"``, an extractor or its name (see `extractor`): where neighbours are looked for.
        threshold: a sample is memorized where d_1 / d_2 is below it.
        near: training images are near duplicates within this fraction of the median distance to the eighth
            neighbour, see `symbreak.metrics.memorization.groups`.
        seed: of the subset of references and the permutations.
        run: its folder gets ``record.json``, and finished parts while it runs: the same call goes on after an
            interruption and gives the same numbers. Images and features beyond its memory (1 GiB by default) are kept
            in files without a name, there or where temporary files are. Results do not depend on it.

    Returns:
        A `Record` of kind ``"audit"``; `write_report` draws it. Intervals are 95 %.

    Raises:
        InputError: for fewer than 3 or all-equal training images, samples of another shape or range, a threshold
            outside (0, 1), samples and a model together.

    Source: threshold of Bonnaire et al., arXiv:2505.17638; data-copying test kin to Meehan et al.,
        arXiv:2004.05675.
    """
    run = (run or Run()).taken()
    _check(train, samples, model, threshold, near, seed)
    packages = versions(torch.get_num_threads())
    parts = held_out(train, holdout, share=0)
    others = parts.test if len(parts.test) else None
    notes = [NO_OTHERS.format(train.noun)] if others is None else [] if holdout is not None else [parts.note]
    extract = chosen(features, "pixels", train, run.share(1 / 2))
    made: Values | None = None
    drawn: Run | None = None
    source: Images | Shards | None = None
    if samples is not None:
        samples = torch.tensor(samples) if isinstance(samples, np.ndarray) else samples
        # in single precision, as the training images are; whole numbers raise an error that names their type
        if isinstance(samples, torch.Tensor) and samples.is_floating_point():
            samples = samples.float()
        source = checked(samples, train)
    if model is not None:
        made, drawn, source = _sampled(train, model, sampling, run)
    with run.timed("features") as part:
        room, eight_bit = part.share(1 / 12), train.integer  # three sides, of images and features
        known = _side(train, eight_bit, extract, room)
        new, unseen = (None if x is None else _side(x, eight_bit, extract, room) for x in (source, others))
    settings = {
        "data": train.name,
        "content": train.fingerprint(),
        "selection": list(train.history),
        "holdout": None if others is None else others.fingerprint(),
        "samples": None if new is None else digest(new.digests),
        "made": made,
        "features": extract.name,
        "threshold": threshold,
        "near": near,
        "seed": seed,
    }
    rows = [side.features for side in (known, new, unseen) if side is not None]
    decides = {
        "data": of_data(train),
        "holdout": of_data(others),
        "samples": None if new is None else digest(new.digests),
        "features": rows,
        **{k: settings[k] for k in ("threshold", "near", "seed")},
    }
    run = run.identified(identity_of("audit", **decides))
    comparison = _Comparison(train, known, new, unseen, threshold, near, seed, run.share(1 / 2), notes)
    content = {
        "data": describe(train),
        "held_out": None if others is None else parts.to_dict(),
        "samples": None if new is None else _about(new, samples, made),
        "features": extract.name,
        "threshold": threshold,
        **comparison.content(extract.name, _titles(samples, sampling.list() if made else None)),
        "notes": notes,
    }
    content["verdict"] = _verdict(content)
    content["verdict"]["sentences"] = sentences("audit", content)
    record = Record("audit", settings, content, packages, run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
        if drawn is not None:
            drawn.close()
    return record


# --- input ----------------------------------------------------------------------------------------


def _check(
    train: Images,
    samples: torch.Tensor | np.ndarray | Images | None,
    model: object,
    threshold: float,
    near: float,
    seed: int,
) -> None:
    if samples is not None and model is not None:
        raise InputError("samples and a model came together; pass one of them.")
    if len(train) < 3:
        raise InputError(f"{len(train)} training images in {train.name}; expected at least 3.")
    if not 0 < threshold < 1:
        raise InputError(f"a threshold of {threshold:g} for d1/d2; expected a number between 0 and 1, such as 0.333.")
    if not 0 <= near < 1:
        raise InputError(f"near duplicates within {near:g} of the scale; expected 0 <= near < 1, such as {NEAR:g}.")
    if seed < 0:
        raise InputError(f"the seed {seed}; expected a number of at least 0.")
    if samples is not None and len(samples) == 0:
        raise InputError("0 samples; expected at least one.")


def _side(source: Images | Shards, eight_bit: bool, extract: Extractor, run: Run) -> _Side:
    raw = extract.name in ("pixels", "values")
    x = source.shards(run, 1 if raw else BATCH) if isinstance(source, Images) else source
    # as 8-bit numbers, or as the floats they came as
    digests = x.digests(lambda b: ((b.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) if eight_bit else b + 0.0)
    if raw:  # as they are: no float64 copy, and no bound on their number as for a distance
        return _Side(x, x, digests, digest(digests))
    rows = feature_shards(extract, x, run)
    return _Side(x, rows, digests, digest(rows.digests()))


def _sampled(
    train: Images, model: Pipeline | Denoises | Denoiser, sampling: Sampling, run: Run
) -> tuple[Values, Run, Shards]:
    """What the samples are, the run that keeps finished ones, and the samples."""
    model = pipeline_of(model, train)
    labels = classes_for(model, "the pipeline", train, sampling.classes)
    network, seeds = denoiser(model.unet, model.scheduler), sampling.list()
    decode = sampling.decode
    shape = decoded_shape(network.shape, decode)
    if shape != train.shape:
        raise InputError(
            f"the network makes {train.noun} of {shape}, but the training {train.noun} are "
            f"{train.shape}. {to_fit(train.shape, shape)}, or choose another network."
        )
    if not seeds:
        raise InputError("0 samples of the network; expected at least one.")
    begin = sampling.begin(model)
    if train.units is not None or decode is not None:
        check_unclipped(begin.full, f"the samples of {train.name}")
    whole = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    of = decisive(model.unet, begin, MICRO, sampling.identity)
    made: Values = {
        "network": of["weights"],
        "probe": of["probe"],
        "scheduler": plain(dict(model.scheduler.config)),
        "sampler": sampling.sampler or type(begin.scheduler).__name__,
        "steps": begin.steps,
        "calls": of["calls"],
        "law_in_words": of["law_in_words"],
        "level": of["level"],
        **({} if labels is None else {"classes": labels.to_dict()}),
        **{k: of[k] for k in ("guidance", "prompt", "autoencoder") if k in of},
        "seeds": f"{seeds[0]}-{seeds[-1]}" if whole else ",".join(map(str, seeds)),
    }
    of_classes = {} if labels is None else {"classes": labels.of(seeds).tolist()}
    run = run.identified({**of["identity"], **of_classes, "kind": "samples of an audit", "seeds": seeds})
    with run.timed("samples") as part:  # three sides, of images and features
        clamp = None if train.units is None else False
        room = part.share(1 / 12)
        x = generate_shards(model.unet, begin, seeds, labels, micro_batch=MICRO, clamp=clamp, decode=decode, run=room)
    return made, run, x


# --- findings -------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    """Samples and held-out images against the training images, in one set of features."""

    train: Images
    known: _Side
    new: _Side | None
    unseen: _Side | None
    threshold: float
    near: float
    seed: int
    run: Run
    notes: list[str]

    def content(self, features: str, title_of: Callable[[int], str]) -> Values:
        """Duplicates, copies and nearness, as plain values."""
        known, new, unseen, run, noun = self.known, self.new, self.unseen, self.run, self.train.noun
        with run.timed("duplicates") as part:
            first = known.first()
            if len(first) == 1:
                raise InputError(
                    f"all {len(self.train):,} {noun} of {self.train.name} are equal; expected different ones."
                )
            points = known.rows.take(first)
            group, radius, scale = groups(points, self.near, part)
            if group.max() == 0:
                raise InputError(
                    f"the features {features} are the same for all {noun} of {self.train.name}. Choose others."
                )
            twins = self.duplicates(first, group)
            twins["near"] |= {"fraction": self.near, "radius": radius, "scale": scale}
        nearest: dict[str, Pairs] = {}
        memorized: Values = {"samples": None, "held_out": None}
        for title, side in (("samples", new), ("held_out", unseen)):
            if side is not None:
                with run.timed(title.replace("_", "-")) as part:
                    d, j = apart(side.rows, points, group, title, part)
                nearest[title] = d, torch.from_numpy(first)[j]
                memorized[title] = self.memorized(d, side)
        with run.timed("transformed") as part:
            sides = {"samples": new} if new is not None and self.train.units is None else {}
            sides |= {"held_out": unseen} if sides and unseen is not None else {}
            changed = {"samples": None, "held_out": None, **self.transformed(sides, first, part)}
        compared = None
        if new is not None and unseen is not None:
            with run.timed("train or held-out") as part:
                compared = self.nearer(new, unseen, first, part)
        leaked = 0 if memorized["held_out"] is None else memorized["held_out"]["exact"]
        if leaked:
            self.notes.append(
                f"{leaked:,} of {len(unseen or ()):,} held-out {noun} equal a training {noun[:-1]} in every "
                f"{'pixel' if noun == 'images' else 'value'}: they are not held out. Remove them; the comparison of "
                f"training with held-out {noun} leaves them out."
            )
        if new is not None and unseen is not None and compared is None:
            self.notes.append(
                f"No comparison of training with held-out {noun}: fewer than {LEAST} different ones in one of the sets."
            )
        return {
            "duplicates": twins,
            "memorized": memorized,
            "transformed": changed,
            "comparison": compared,
            "histograms": _histograms(nearest),
            "pairs": [] if new is None else self.pairs(nearest["samples"], new, title_of),
        }

    def duplicates(self, first: np.ndarray, group: np.ndarray) -> Values:
        """Groups of equal images, and groups of near ones among the different images."""
        known, name_of = self.known, self.train.name_of
        place = {known.digests[i]: n for n, i in enumerate(first.tolist())}
        different = np.array([place[d] for d in known.digests])  # different image of every training image
        exact, near = _members(different, np.arange(len(known))), _members(group, first)
        pictures = [
            {
                "title": f"{kind}, {len(g)} {self.train.noun}",
                "png": png_row(known.pixels.at(torch.from_numpy(g[:8])), self.train.units),
                "names": [name_of(i) for i in g[:8].tolist()],
            }
            for kind, some in (("equal", exact), ("near", near))
            for g in some[:4]
        ]
        return {
            "exact": _count(exact, name_of),
            "near": _count(near, name_of),
            "different": len(first),
            "deduplicated": int(group.max()) + 1,
            "pictures": pictures,
        }

    def memorized(self, d: torch.Tensor, side: _Side) -> Values:
        """How many of a side's images are memorized, and how near they lie."""
        ratio, copies = d[:, 0] / d[:, 1], set(self.known.digests)
        return {
            **proportion(int((ratio < self.threshold).sum()), len(side)),
            "exact": sum(one in copies for one in side.digests),
            "nearest": _quantiles(d[:, 0]),
            "ratio": _quantiles(ratio),
        }

    def transformed(self, sides: Mapping[str, _Side], first: np.ndarray, run: Run) -> Values:
        """How many of every side's images are copies after a flip, a shift, or a change of brightness, by their pixels.

        Images that are equal in every pixel, or memorized as they are, count, too.
        """
        known = self.known.pixels.take(first)
        changes = transformations(known.shape)
        most = max(LEAST, int(TRANSFORMED_COST / (len(changes) * math.prod(known.shape))))
        index = {
            title: torch.randperm(len(side), generator=generator(self.seed, 67))[:most].sort().values
            for title, side in sides.items()
        }
        some = [side.pixels.take(index[title].numpy()) for title, side in sides.items()]
        nearest = nearest_transformed(some, known, self.near, run) if some else []
        if nearest is None:
            self.notes.append(
                f"No search for changed copies: all images of {self.train.name} are the same up to brightness and "
                "contrast."
            )
            return {}
        out = {}
        for title, (ratio, image, which) in zip(sides, nearest):
            copies = (ratio < self.threshold).nonzero()[:, 0]
            listed = copies[ratio[copies].argsort(stable=True)][:LISTED].tolist()
            out[title] = {
                **proportion(len(copies), len(ratio)),
                "shift": max(abs(down) for _, down, _ in changes),
                "searches": len(changes),
                "listed": [
                    {
                        "index": [int(index[title][i]), int(first[image[i]])],
                        "nearest": self.train.name_of(int(first[image[i]])),
                        "ratio": float(ratio[i]),
                        **dict(zip(("flipped", "down", "right"), changes[int(which[i])])),
                    }
                    for i in listed
                ],
            }
        return out

    def nearer(self, new: _Side, unseen: _Side, first: np.ndarray, run: Run) -> Values | None:
        """Nearest of equally many training and held-out images, all different and none in both."""
        sides = ((self.known, first, unseen), (unseen, unseen.first(), self.known))
        orders = []
        for number, (side, index, others) in enumerate(sides):
            shared = set(others.digests)
            single = torch.tensor([i for i in index.tolist() if side.digests[i] not in shared], dtype=torch.long)
            orders.append(single[torch.randperm(len(single), generator=generator(self.seed, 62, number + 1))])
        count = min(map(len, orders))
        if count < LEAST:
            return None
        nearest: list[Pairs] = []
        for number, ((side, _, _), order) in enumerate(zip(sides, orders)):

            def tell(done: int, total: int, number: int = number) -> None:
                run.tell(number * total + done, 2 * total)

            points, name = side.rows.take(order[:count].sort().values.numpy()), f"compare-{number}"
            d, j = neighbours(new.rows, points, 1, name=name, run=run.telling(tell))
            nearest.append((d[:, 0], j[:, 0]))
        edges = np.linspace(0, float(max(d.max() for d, _ in nearest)) or 1.0, BINS + 1)
        return {
            **nearer_to_train(nearest[0], nearest[1], count, self.seed),
            "edges": edges.tolist(),
            **{
                title: {"quantiles": _quantiles(d), "histogram": np.histogram(d.numpy(), edges)[0].tolist()}
                for title, (d, _) in zip(("train", "held_out"), nearest)
            },
        }

    def pairs(self, nearest: Pairs, new: _Side, title_of: Callable[[int], str]) -> list[Values]:
        """The samples of lowest d1/d2 beside their two training images."""
        (d, j), known, name_of = nearest, self.known, self.train.name_of
        ratio, copies = d[:, 0] / d[:, 1], set(known.digests)
        return [
            {
                "sample": title_of(i),
                "nearest": name_of(int(j[i, 0])),
                "second": name_of(int(j[i, 1])),
                "index": [i, *j[i].tolist()],
                "d1": float(d[i, 0]),
                "d2": float(d[i, 1]),
                "ratio": float(ratio[i]),
                "memorized": bool(ratio[i] < self.threshold),
                "exact": new.digests[i] in copies,
                "png": png_row(torch.cat([new.pixels.at(torch.tensor([i])), known.pixels.at(j[i])]), self.train.units),
            }
            for i in ratio.argsort(stable=True)[:SHOWN].tolist()
        ]


def _quantiles(values: torch.Tensor) -> list[float]:
    """Those of 5, 50 and 95 %."""
    return values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()


def _members(label: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """Groups of at least two, the largest first."""
    order = np.argsort(label, kind="stable")
    parts = np.split(index[order], np.flatnonzero(np.diff(label[order])) + 1)
    return sorted((p for p in parts if len(p) > 1), key=lambda p: (-len(p), int(p[0])))


def _count(some: list[np.ndarray], name_of: Callable[[int], str]) -> Values:
    return {
        "groups": len(some),
        "images": sum(map(len, some)),
        "spare": sum(len(g) - 1 for g in some),
        "largest": max(map(len, some), default=0),
        "listed": [{"index": g[:20].tolist(), "names": [name_of(i) for i in g[:20].tolist()]} for g in some[:LISTED]],
    }


def _histograms(nearest: dict[str, Pairs]) -> Values:
    """Counts of d1/d2 and of d1, for samples and held-out images in the same bins."""
    if not nearest:
        return {}
    farthest = max(float(d[:, 0].max()) for d, _ in nearest.values()) or 1.0
    out = {}
    for name, edges, values in (
        ("ratio", np.linspace(0, 1, BINS + 1), {k: d[:, 0] / d[:, 1] for k, (d, _) in nearest.items()}),
        ("distance", np.linspace(0, farthest, BINS + 1), {k: d[:, 0] for k, (d, _) in nearest.items()}),
    ):
        counts = {k: np.histogram(v.numpy(), edges)[0].tolist() for k, v in values.items()}
        out[name] = {"edges": edges.tolist(), **counts}
    return out


def _about(new: _Side, samples: object, made: Values | None) -> Values:
    """What a record says of the samples."""
    return {
        "count": len(new),
        "distinct": len(new.first()),
        "source": samples.name if isinstance(samples, Images) else "a network" if made else "a tensor",
        "start": _start_of(samples, made),
    }


def _start_of(samples: object, made: Values | None) -> str | None:
    """Where sampling began, in words; of samples in a folder as `sample` wrote it there, ``None`` where nobody did."""
    about: object = made
    if isinstance(samples, Images) and (info := Path(samples.name) / "sample.json").is_file():
        try:
            about = read_json(info)
        except InputError:
            return None
    if not isinstance(about, dict) or not isinstance(about.get("law_in_words"), str):
        return None
    level = about.get("level")
    sigma = level.get("sigma") if isinstance(level, dict) else None
    where = f", at sigma {sigma:.3g}" if isinstance(sigma, float) and math.isfinite(sigma) else ""
    return f"{about['law_in_words']}{where}, {about.get('calls', 'some')} network evaluations a sample"


def _titles(samples: object, seeds: Sequence[int] | None) -> Callable[[int], str]:
    """What a sample is called."""
    if isinstance(samples, Images):
        return samples.name_of
    return "sample {}".format if seeds is None else lambda i: f"seed {seeds[i]}"


def _verdict(content: Values) -> Values:
    """Does it copy? By the intervals, and by the test against held-out images at 1 %."""
    samples, unseen = content["memorized"]["samples"], content["memorized"]["held_out"]
    compared, noun = content["comparison"], "samples" if "units" in content["data"] else "images"
    if samples is None:
        return {"kind": "unknown", "sentence": "No samples: only the data were audited."}
    share = f"{samples['share']:.2%} of {samples['of']:,} samples have d1/d2 < {content['threshold']:.3g}"
    if unseen is None:
        sentence = f"{share}; without held-out {noun} nothing says how many to expect."
        return {"kind": "unknown", "sentence": sentence}
    beside = f"{share}, against {unseen['share']:.2%} of {unseen['of']:,} held-out {noun}"
    if samples["low"] > unseen["high"]:
        return {"kind": "copies", "sentence": f"It copies: {beside}, beyond both intervals."}
    changed, expected = content["transformed"]["samples"], content["transformed"]["held_out"]
    if changed is not None and changed["low"] > expected["high"]:
        return {
            "kind": "copies",
            "sentence": f"It copies with changes: flipped, shifted by up to {changed['shift']} pixels or paler, "
            f"{changed['share']:.2%} of {changed['of']:,} samples have d1/d2 < {content['threshold']:.3g}, "
            f"against {expected['share']:.2%} of {expected['of']:,} held-out images, beyond both intervals. As "
            f"they are, {beside}.",
        }
    if compared is not None and compared["p_value"] < 0.01:
        return {
            "kind": "leans",
            "sentence": f"It leans on its training {noun}: {compared['share']:.1%} of the samples lie nearer to "
            f"training than to held-out {noun}, where 50 % are expected. It does not copy them by d1/d2: {beside}.",
        }
    paler = (
        ""
        if changed is None
        else (
            f" Flipped, shifted by up to {changed['shift']} pixels or paler: {changed['share']:.2%} of "
            f"{changed['of']:,}, against {expected['share']:.2%}."
        )
    )
    others = "turned, rescaled, cut out or recoloured" if noun == "images" else "shifted, rescaled or cut out"
    said = f"No sign of copying at these counts: {beside}.{paler} Copies that are {others} are not looked for."
    return {"kind": "none", "sentence": said}
