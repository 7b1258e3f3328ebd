"""What an evaluation keeps of a set of images: moments of random groups, and a bounded number of feature rows.

Features are never all held. One pass deals them at random into a few groups, whose moments give the Fréchet
distances with their intervals, and keeps a random subset of rows for what needs rows (kernel distance, precision,
recall, ...). Statistics are cached by content: the images' fingerprint, the extractor's weights, its resize.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.data.images import Images
from symbreak.metrics.extractors import Extractor, Function
from symbreak.metrics.feature_rows import feature_blocks
from symbreak.moments.one_pass import Moments, grouped
from symbreak.noise import generator
from symbreak.runtime.errors import note
from symbreak.runtime.files import InputError, damaged, digest, output_folder, read_tensors, try_writing, write_tensors
from symbreak.runtime.identity import identity_of, of_data
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import agreed, from_each, map_over_ranks, own_rows
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, renamed

__all__ = ["Statistics", "cache_folder", "load_statistics", "statistics"]

FILE = {"format": "symbreak.statistics", "version": "1"}
ORIGIN = {"extractor", "resize", "identity", "data", "fingerprint", "seed"}
ROWS = 10_000


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images, in short.

    Attributes:
        groups: moments of disjoint random groups of equal size, or one larger.
        rows: [R, F] features of a random subset, in the order of the images.
        origin: plain values: ``extractor``, ``resize``, ``identity``, ``data`` (name), ``fingerprint``, ``seed``.
    """

    groups: tuple[Moments, ...]
    rows: torch.Tensor
    origin: Values

    @cached_property
    def whole(self) -> Moments:
        """Moments of all groups, which are its parts."""
        return Moments.joined(self.groups)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.whole.count

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; it appears whole or not at all."""
        output_folder(Path(path).parent)
        return write_tensors(path, *_tensors(self))


def _tensors(made: Statistics) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    single = made.rows.float()
    tensors = {
        "counts": torch.tensor([m.count for m in made.groups]),
        "means": torch.stack([m.mean for m in made.groups]),
        "covs": torch.stack([m.cov for m in made.groups]),
        # most networks answer in single precision: nothing is lost
        "rows": single if bool((single.double() == made.rows).all()) else made.rows,
    }
    return tensors, {**FILE, "origin": json.dumps(made.origin, sort_keys=True)}


def _from_tensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Any) -> Statistics:
    if metadata.get("format") != FILE["format"] or not {"counts", "means", "covs", "rows"} <= set(tensors):
        raise InputError(f"{path} holds no reference statistics. Expected a file that symbreak evaluate wrote.")
    if metadata.get("version") != FILE["version"]:
        raise InputError(f"{path} was written by another version of symbreak. Remove it, and it is made again.")
    with damaged(path, "a set of statistics"):
        parts, rows = [tensors[k] for k in ("counts", "means", "covs")], tensors["rows"].double()
        groups = tuple(Moments(int(n), mean, cov, sampled=True) for n, mean, cov in zip(*parts))
        origin = json.loads(metadata["origin"])
        whole = groups and len({len(p) for p in parts}) == 1 and rows.shape[1:] == groups[0].shape
        if not whole or not bool(torch.isfinite(rows).all()) or ORIGIN - set(origin):
            raise InputError(f"{path} holds broken statistics. Remove it, and it is made again.")
        return Statistics(groups, rows, origin)


def _cached(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a cached file; nothing where there is none, or a damaged one, which is made again."""
    try:
        tensors, metadata = read_tensors(path)
        _from_tensors(tensors, metadata, path)
    except InputError as error:
        if path.exists():
            note(f"{error} The statistics are computed anew.")
        return {}
    return {k: v.numpy() for k, v in tensors.items()}


def load_statistics(path: str | Path) -> Statistics:
    """Read what `Statistics.save` wrote.

    Raises:
        InputError: where the file is missing, damaged or something else.
    """
    return _from_tensors(*read_tensors(path), path)


def cache_folder() -> Path:
    """``$SYMBREAK_CACHE``, else ``~/.cache/symbreak``."""
    return Path(os.environ.get("SYMBREAK_CACHE") or Path.home() / ".cache" / "symbreak")


@renamed()
def statistics(
    extract: Extractor | Function,
    images: Images | Shards | torch.Tensor,
    *,
    groups: int = 1,
    rows: int = ROWS,
    seed: int = 0,
    cache: Path | None = None,
    run: Run | None = None,
) -> Statistics:
    """Statistics of the features of a set of images, in one pass, which ranks share.

    Args:
        extract: the extractor.
        images: a data set, or images [N, C, H, W] in [-1, 1], a tensor or `Shards`.
        groups: random groups; their sizes differ by one at most.
        rows: feature rows to keep, at most.
        seed: of groups and rows.
        cache: folder to keep the result in, by content, see `Extractor.decides`; one that cannot be written, or holds
            a damaged file, costs time and a note on stderr.
        run: whom to tell of the images done.

    Returns:
        The same bits from the cache and fresh, whatever the batches.

    Raises:
        InputError: for fewer than 2 images a group.
    """
    run, extract, count = run or Run(), Extractor.of(extract), len(images)
    if groups < 1 or count < 2 * groups:
        raise InputError(f"{count} images in {groups} groups; expected at least 2 images a group.")
    about = extract.to_dict()
    origin = {
        "extractor": about["name"],
        "resize": about["resize"],
        "identity": about["identity"],
        "data": images.name if isinstance(images, Images) else "array",
        "fingerprint": images.fingerprint() if isinstance(images, Images) else None,
        "seed": seed,
    }
    path = None if cache is None else _place(cache, extract, images, origin, groups, rows)
    if path is not None:
        cached = map_over_ranks([path], _cached)[0]
        if cached:
            tensors = {k: torch.from_numpy(v) for k, v in cached.items()}
            return _from_tensors(tensors, {**FILE, "origin": json.dumps(origin)}, path)
    tensors, metadata = _tensors(_measured(extract, images, groups, rows, origin, run))
    if path is not None:
        _keep(path, tensors, metadata)
    # Through the file's content on both ways, so that a cached result has the same last bits.
    return _from_tensors(tensors, metadata, "the statistics")


def _place(
    cache: Path, extract: Extractor, images: Images | Shards | torch.Tensor, origin: Values, groups: int, rows: int
) -> Path | None:
    """The file of cached statistics; ``None`` where nothing identifies them, or nothing can be written there."""
    if not isinstance(images, Images):
        return None
    # d^2 numbers a group are more than the images, which are their own features: 600 MB of 210 pictures.
    if extract.name in ("pixels", "values") and groups * math.prod(images.shape) > len(images):
        return None
    decides = extract.decides(images.shape)
    if decides is None:
        note(f"the features of {extract.name} are not cached: they differ from call to call.")
        return None
    key = identity_of(
        "statistics",
        data=of_data(images),
        features=decides,
        device=extract.device.type,
        groups=groups,
        rows=rows,
        seed=origin["seed"],
    )
    wrong = agreed(partial(_not_writable, cache))
    if wrong:
        note(f"nothing is cached: {wrong}")
        return None
    text = agreed(lambda: json.dumps(key, sort_keys=True))  # answers may differ in the last bits between machines
    return cache / f"{digest(text)}.safetensors"


def _not_writable(cache: Path) -> str:
    """Why nothing can be written to a cache, "" where it can."""
    try:
        try_writing(cache)
    except (InputError, OSError) as error:
        return str(error)
    return ""


def _keep(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write statistics to the cache; where that fails they are computed again the next time."""
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        note(f"nothing is cached: {error}")


def _measured(
    extract: Extractor, images: Images | Shards | torch.Tensor, groups: int, rows: int, origin: Values, run: Run
) -> Statistics:
    """Moments of random groups and a random subset of the features, in one pass."""
    count, seed = len(images), origin["seed"]
    order = torch.randperm(count, generator=generator(seed, 21, 0)).numpy()
    group = np.empty(count, np.int64)
    for g, part in enumerate(np.array_split(order, groups)):
        group[part] = g
    wanted = np.sort(torch.randperm(count, generator=generator(seed, 22, 0))[:rows].numpy())
    # Ranks begin where a padded block begins: the network sees the same blocks whoever asks it.
    stream, first, shared = own_rows(images, extract.batch)
    last = first + len(stream)
    share = int(np.searchsorted(wanted, last) - np.searchsorted(wanted, first))
    # Filled in place: a few rows kept of every block would lie between the blocks and break the memory up.
    subset = torch.zeros(share, 0)

    def blocks() -> Iterator[torch.Tensor]:
        nonlocal subset
        done, filled = first, 0
        for block in feature_blocks(extract, [stream] if isinstance(stream, torch.Tensor) else stream):
            some = wanted[np.searchsorted(wanted, done) : np.searchsorted(wanted, done + len(block))] - done
            if not filled:
                subset = torch.empty(share, block.shape[1], dtype=block.dtype)
            subset[filled : filled + len(some)] = block[torch.from_numpy(some)]
            done, filled = done + len(block), filled + len(some)
            run.tell(done - first, last - first)
            yield block

    moments = grouped(blocks(), group[first:last], shared)
    parts = from_each({"rows": subset.numpy()}, shared)
    return Statistics(tuple(moments), torch.from_numpy(np.concatenate([p["rows"] for p in parts])), origin)
