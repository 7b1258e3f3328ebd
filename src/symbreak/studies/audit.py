"""Does my network copy? Duplicates, memorized samples, train against held-out: `Record` of kind "audit".

    duplicates   equal pixels, and near ones: within a tenth of the scale of the training images' own neighbours
    memorized    d_1 / d_2 < 1/3, d_2 to the nearest training image that is no duplicate of the first: beside a pair
                 of duplicates d_1 / d_2 would be 1, and every copy of them would be missed
    nearer       share of samples nearer to training than to held-out images, 1/2 without copying

Held-out images are asked the same as the samples: they say what to expect of images that nobody copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.data.held_out import held_out
from symbreak.data.images import Images, describe
from symbreak.metrics.features import BATCH, Extractor, chosen, feature_shards
from symbreak.metrics.memorization import NEAR, THRESHOLD, apart, groups, nearer_to_train, neighbours, proportion
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.families import denoiser
from symbreak.networks.loading import refuse_conditional, weights_hash
from symbreak.networks.samplers import scheduler
from symbreak.noise import generator
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, digest, output_folder
from symbreak.runtime.plain import plain, stopwatch, versions
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Blocks
from symbreak.start.late_start import standard_start
from symbreak.start.sample import generate_shards
from symbreak.studies.findings import png_row

__all__ = ["audit"]

COUNT, STEPS, SAMPLER = 1000, 50, "dpm++2m"
BINS = 40
SHOWN = 24  # pairs drawn
LISTED = 100  # duplicate groups listed
LEAST = 10  # references a side for the comparison with held-out images
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Side:
    """Images that are asked about, or asked: as pixels, as rows of the features, and by their bytes."""

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


def audit(
    train: Images,
    samples: torch.Tensor | Images | None = None,
    *,
    model: Any = None,
    holdout: Images | None = None,
    features: str | Extractor = "pixels",
    weights: str | Path | None = None,
    sha256: str | None = None,
    threshold: float = THRESHOLD,
    near: float = NEAR,
    count: int = COUNT,
    sampler: str = SAMPLER,
    steps: int = STEPS,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
    memory: int = 2**30,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Record:
    """Duplicates in a training set, and whether samples copy it.

    Args:
        train: the images the network was trained on, exactly these.
        samples: images [N, C, H, W] in [-1, 1], or `Images`; without samples and model only the data are audited.
        model: a diffusers pipeline with ``.unet`` and ``.scheduler`` to sample from instead.
        holdout: images of the same source that the network has not seen; by default the other half of the digits,
            none for other data.
        features: ``"pixels"``, an extractor or its name (see `extractor`): where neighbours are looked for.
        weights, sha256: of ``"inception"`` and ``"dinov2"``, see `extractor`.
        threshold: a sample is memorized where d_1 / d_2 is below it.
        near: training images are near duplicates within this fraction of the median distance to the eighth
            neighbour, see `symbreak.metrics.memorization.groups`.
        count, sampler, steps: of the model's samples; standard start.
        seeds: of the model's samples, instead of 0 .. count - 1.
        seed: of the subset of references and the permutations.
        memory: bytes to hold and to work in; images and features that do not fit are kept in files without a name, in
            ``out`` or where temporary files are. Results do not depend on it.
        device: where a feature network named here runs; by default on the CPU.
        out: folder for ``record.json``, and for finished blocks while it runs: the same call goes on after an
            interruption and finds the same numbers.
        progress: called with (stage, done, total).

    Returns:
        A `Record` of kind ``"audit"``; `write_report` draws it. Intervals are 95 %.

    Raises:
        InputError: for fewer than 3 or all-equal training images, samples of another shape or range, a threshold
            outside (0, 1), samples and a model together.

    Source: threshold of Bonnaire et al., arXiv:2505.17638; data-copying test kin to Meehan et al.,
        arXiv:2004.05675.
    """
    _check(train, samples, model, holdout, threshold, near, seed)
    folder = None if out is None else output_folder(out)
    timings: dict[str, float] = {}
    tell = progress or (lambda stage, done, total: None)

    stage = stopwatch(timings, tell)
    packages = versions(torch.get_num_threads())
    parts = held_out(train, holdout, share=0)
    held = parts.test if len(parts.test) else None
    notes = [] if holdout is not None else [parts.note]
    if held is None:
        notes = [
            "No held-out images, so nothing says what d1/d2 is to be expected of images that nobody copied. Pass "
            "--holdout with images of the same source that the network has not seen."
        ]
    extract = chosen(features, train, weights, sha256, device, memory // 2, folder)
    name = extract.name
    made: dict[str, Any] | None = None
    wanted: list[int] | None = None
    drawn: Blocks | None = None
    asking: torch.Tensor | Images | Shards | None = samples
    if model is not None:
        wanted = list(range(count)) if seeds is None else [int(s) for s in seeds]
        made, drawn, draw = _sampling(train, model, sampler, steps, wanted, memory // 12, folder, packages)
        with stage("samples") as step:
            asking = draw(step)
    held_of, work = memory // 12, max(2**20, memory // 2)  # three sides, of images and features
    with stage("features") as step:

        def taken(of: Images | Shards | torch.Tensor) -> _Side:
            return _side(of, train.integer, extract, held_of, folder, step)

        known = taken(train)
        asked, kept = (None if of is None else taken(of) for of in (asking, held))
    settings = {
        "data": train.name,
        "content": train.fingerprint(),
        "selection": list(train.history),
        "holdout": None if held is None else held.fingerprint(),
        "samples": None if asked is None else digest(asked.digests),
        "made": made,
        "features": name,
        "threshold": threshold,
        "near": near,
        "seed": seed,
    }
    rows = [side.features for side in (known, asked, kept) if side is not None]
    store = Blocks(folder, {**settings, "versions": packages, "rows": rows})
    with stage("duplicates") as step:
        first = known.first()
        if len(first) == 1:
            raise InputError(f"all {len(train):,} images of {train.name} are equal; expected different ones.")
        points = known.rows.take(first)
        group, radius, scale = groups(points, near, memory=work, keep=store.keep, progress=step)
        if group.max() == 0:
            raise InputError(f"the features {name} are the same for all images of {train.name}. Choose others.")
        twins = _duplicates(known, first, group, train.name_of)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for title, side in (("samples", asked), ("held_out", kept)):
        if side is not None:
            with stage(title.replace("_", "-")) as step:
                d, j = apart(side.rows, points, group, memory=work, keep=store.keep, name=title, progress=step)
                found[title] = d, torch.from_numpy(first)[j]
    comparison = None
    if asked is not None and kept is not None:
        with stage("train or held-out") as step:
            comparison = _compare(asked, known, kept, first, seed, work, store, step)
    memorized = {
        title: _memorized(found[title][0], side, known, threshold) if side is not None else None
        for title, side in (("samples", asked), ("held_out", kept))
    }
    leaked = 0 if memorized["held_out"] is None else memorized["held_out"]["exact"]
    if leaked:
        notes.append(
            f"{leaked:,} of {len(kept or ()):,} held-out images equal a training image in every pixel: they are not "
            "held out. Remove them; the comparison of training with held-out images leaves them out."
        )
    if asked is not None and kept is not None and comparison is None:
        notes.append(
            f"No comparison of training with held-out images: fewer than {LEAST} different ones in one of the sets."
        )
    titles = _titles(samples, wanted)
    content = {
        "data": describe(train),
        "held_out": None if held is None else parts.to_dict(),
        "samples": None
        if asked is None
        else {
            "count": len(asked),
            "distinct": len(asked.first()),
            "source": samples.name if isinstance(samples, Images) else "a network" if made else "a tensor",
        },
        "features": name,
        "threshold": threshold,
        "duplicates": {**twins, "near": {**twins["near"], "fraction": near, "radius": radius, "scale": scale}},
        "memorized": memorized,
        "comparison": comparison,
        "histograms": _histograms(found),
        "pairs": [] if asked is None else _pairs(found["samples"], asked, known, titles, train.name_of, threshold),
        "notes": notes,
    }
    content["verdict"] = _verdict(content)
    record = Record("audit", settings, content, packages, timings)
    if folder is not None:
        record.save(folder)
        store.close()
        if drawn is not None:
            drawn.close()
    return record


# --- input ----------------------------------------------------------------------------------------


def _check(
    train: Images, samples: Any, model: Any, holdout: Images | None, threshold: float, near: float, seed: int
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
    if holdout is not None and holdout.shape != train.shape:
        raise InputError(f"the held-out images are {holdout.shape}, the training images {train.shape}. Resize them.")
    if samples is not None:
        shape = tuple(samples.shape[1:] if isinstance(samples, torch.Tensor) else samples.shape)
        if len(samples) == 0 or shape != train.shape:
            raise InputError(f"{len(samples)} samples of shape {shape} for training images {train.shape}. Resize them.")
        if isinstance(samples, torch.Tensor):
            x = samples.detach()
            low, high = (float(v) for v in x.aminmax())
            if not x.is_floating_point() or not -1 - 1e-3 <= low <= high <= 1 + 1e-3:
                kind = str(x.dtype).removeprefix("torch.")
                raise InputError(
                    f"samples of type {kind} with values {low:g} .. {high:g}; expected floats in [-1, 1]. For 8-bit "
                    "pixels: x / 127.5 - 1."
                )


def _side(
    source: Images | Shards | torch.Tensor,
    eight_bit: bool,
    extract: Extractor,
    memory: int,
    folder: Path | None,
    step: Callable[[int, int], None],
) -> _Side:
    if isinstance(source, torch.Tensor):
        source = Shards.of(source.detach().float().cpu(), BATCH)
    blocks = 1 if extract.name == "pixels" else BATCH
    x = source.shards(memory, folder, step, blocks) if isinstance(source, Images) else source
    digests = x.digests(partial(_bytes, eight_bit=eight_bit))
    if extract.name == "pixels":  # as they are: no float64 copy, and no bound on their number as for a distance
        return _Side(x, x, digests, digest(digests))
    rows = feature_shards(extract, x, memory, folder, step)
    return _Side(x, rows, digests, digest(rows.digests()))


def _bytes(batch: torch.Tensor, eight_bit: bool) -> torch.Tensor:
    """Pixels as 8-bit numbers, or as the floats they came as."""
    return ((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) if eight_bit else batch + 0.0


def _sampling(
    train: Images,
    model: Any,
    sampler: str,
    steps: int,
    seeds: list[int],
    memory: int,
    folder: Path | None,
    packages: dict[str, str],
) -> tuple[dict[str, Any], Blocks, Callable[[Callable[[int, int], None]], Shards]]:
    """What the samples are, where finished ones are kept, and how to make them."""
    refuse_conditional(model, "the network")
    network = denoiser(model.unet, model.scheduler)
    if tuple(network.shape) != train.shape:
        raise InputError(
            f"the network makes images of {tuple(network.shape)}, but the training images are {train.shape}. Resize "
            "them (--pad) or choose another network."
        )
    if not seeds:
        raise InputError("0 samples of the network; expected at least one.")
    begin = standard_start(scheduler(sampler, like=model.scheduler), steps)
    made = {
        "network": weights_hash(model.unet),
        "probe": fingerprint(network),
        "scheduler": plain(dict(model.scheduler.config)),
        "sampler": sampler,
        "steps": steps,
        "calls": begin.calls,
        "seeds": _ranges(seeds),
    }
    store = Blocks(folder, {**made, "all": seeds, "versions": packages})

    def draw(step: Callable[[int, int], None]) -> Shards:
        return generate_shards(model.unet, begin, seeds, keep=store.keep, memory=memory, folder=folder, progress=step)

    return made, store, draw


def _ranges(seeds: list[int]) -> str:
    """Seeds as text: 0-99 where they follow each other."""
    whole = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if whole else ",".join(map(str, seeds))


# --- findings -------------------------------------------------------------------------------------


def _duplicates(known: _Side, first: np.ndarray, group: np.ndarray, name_of: Callable[[int], str]) -> dict[str, Any]:
    """Groups of equal images, and groups of near ones among the different images."""
    place = {known.digests[i]: n for n, i in enumerate(first.tolist())}
    own = np.array([place[d] for d in known.digests])  # different image of every training image
    exact = _members(own, np.arange(len(known)))
    near = _members(group, first)
    pictures = [
        {
            "title": f"{kind}, {len(g)} images",
            "png": png_row(known.pixels.at(torch.from_numpy(g[:8]))),
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


def _members(label: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """Groups of at least two, the largest first."""
    order = np.argsort(label, kind="stable")
    parts = np.split(index[order], np.flatnonzero(np.diff(label[order])) + 1)
    return sorted((p for p in parts if len(p) > 1), key=lambda p: (-len(p), int(p[0])))


def _count(some: list[np.ndarray], name_of: Callable[[int], str]) -> dict[str, Any]:
    return {
        "groups": len(some),
        "images": sum(map(len, some)),
        "spare": sum(len(g) - 1 for g in some),
        "largest": max(map(len, some), default=0),
        "listed": [{"index": g[:20].tolist(), "names": [name_of(i) for i in g[:20].tolist()]} for g in some[:LISTED]],
    }


def _memorized(d: torch.Tensor, side: _Side, known: _Side, threshold: float) -> dict[str, Any]:
    ratio = d[:, 0] / d[:, 1]
    copies = set(known.digests)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    return {
        **proportion(int((ratio < threshold).sum()), len(side)),
        "exact": sum(one in copies for one in side.digests),
        "nearest": d[:, 0].quantile(levels).tolist(),
        "ratio": ratio.quantile(levels).tolist(),
    }


def _compare(
    asked: _Side,
    known: _Side,
    kept: _Side,
    first: np.ndarray,
    seed: int,
    memory: int,
    store: Blocks,
    step: Callable[[int, int], None],
) -> dict[str, Any] | None:
    """Nearest of equally many training and held-out images, all different and none in both."""
    sides = []
    for number, (side, index, others) in enumerate(((known, first, kept), (kept, kept.first(), known))):
        shared = set(others.digests)
        own = torch.tensor([i for i in index.tolist() if side.digests[i] not in shared], dtype=torch.long)
        sides.append(own[torch.randperm(len(own), generator=generator(seed, 62, number + 1))])
    count = min(map(len, sides))
    if count < LEAST:
        return None
    found = []
    for number, (side, own) in enumerate(zip((known, kept), sides)):

        def tell(done: int, total: int, number: int = number) -> None:
            step(number * total + done, 2 * total)

        points, name = side.rows.take(own[:count].sort().values.numpy()), f"compare-{number}"
        d, j = neighbours(asked.rows, points, 1, memory=memory, keep=store.keep, name=name, progress=tell)
        found.append((d[:, 0], j[:, 0]))
    edges = np.linspace(0, float(max(f[0].max() for f in found)) or 1.0, BINS + 1)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    return {
        **nearer_to_train(found[0], found[1], count, seed),
        "edges": edges.tolist(),
        **{
            title: {
                "quantiles": f[0].quantile(levels).tolist(),
                "histogram": np.histogram(f[0].numpy(), edges)[0].tolist(),
            }
            for title, f in zip(("train", "held_out"), found)
        },
    }


def _histograms(found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Counts of d1/d2 and of d1, for samples and held-out images in the same bins."""
    if not found:
        return {}
    farthest = max(float(d[:, 0].max()) for d, _ in found.values()) or 1.0
    out = {}
    for name, edges, values in (
        ("ratio", np.linspace(0, 1, BINS + 1), {k: d[:, 0] / d[:, 1] for k, (d, _) in found.items()}),
        ("distance", np.linspace(0, farthest, BINS + 1), {k: d[:, 0] for k, (d, _) in found.items()}),
    ):
        counts = {k: np.histogram(v.numpy(), edges)[0].tolist() for k, v in values.items()}
        out[name] = {"edges": edges.tolist(), **counts}
    return out


def _titles(samples: Any, seeds: Sequence[int] | None) -> Callable[[int], str]:
    """What a sample is called."""
    if isinstance(samples, Images):
        return samples.name_of
    return "sample {}".format if seeds is None else lambda i: f"seed {seeds[i]}"


def _pairs(
    found: tuple[torch.Tensor, torch.Tensor],
    asked: _Side,
    known: _Side,
    title_of: Callable[[int], str],
    name_of: Callable[[int], str],
    threshold: float,
) -> list[dict[str, Any]]:
    """The samples of lowest d1/d2 beside their two training images."""
    d, j = found
    ratio = d[:, 0] / d[:, 1]
    order = ratio.argsort(stable=True)[:SHOWN].tolist()
    copies = set(known.digests)
    return [
        {
            "sample": title_of(i),
            "nearest": name_of(int(j[i, 0])),
            "second": name_of(int(j[i, 1])),
            "index": [i, *j[i].tolist()],
            "d1": float(d[i, 0]),
            "d2": float(d[i, 1]),
            "ratio": float(ratio[i]),
            "memorized": bool(ratio[i] < threshold),
            "exact": asked.digests[i] in copies,
            "png": png_row(torch.cat([asked.pixels.at(torch.tensor([i])), known.pixels.at(j[i])])),
        }
        for i in order
    ]


def _verdict(content: dict[str, Any]) -> dict[str, Any]:
    """Does it copy? By the intervals, and by the test against held-out images at 1 %."""
    samples, held = content["memorized"]["samples"], content["memorized"]["held_out"]
    compared = content["comparison"]
    if samples is None:
        return {"kind": "unknown", "sentence": "No samples: only the data were audited."}
    share = f"{samples['share']:.2%} of {samples['of']:,} samples have d1/d2 < {content['threshold']:.3g}"
    if held is None:
        sentence = f"{share}; without held-out images nothing says how many to expect."
        return {"kind": "unknown", "sentence": sentence}
    beside = f"{share}, against {held['share']:.2%} of {held['of']:,} held-out images"
    if samples["low"] > held["high"]:
        return {"kind": "copies", "sentence": f"It copies: {beside}, beyond both intervals."}
    if compared is not None and compared["p_value"] < 0.01:
        return {
            "kind": "leans",
            "sentence": f"It leans on its training images: {compared['share']:.1%} of the samples lie nearer to "
            f"training than to held-out images, where 50 % are expected. It does not copy them by d1/d2: {beside}.",
        }
    return {"kind": "none", "sentence": f"No sign of copying at these counts: {beside}."}
