"""A data set of samples of one shape: a stream of float32 batches [B, *S], with its labels and names.

Pictures [B, C, H, W] are in [-1, 1]. 8-bit ones are also served as bytes (`Images.blocks`), from which `Moments`
computes exactly at float32 speed. Other samples (`Images.units` is set) are what `symbreak.data.samples` made of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import from_each, own_rows, shares, summed
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run
from symbreak.runtime.shown import LONGEST, Shown, axes, shortened
from symbreak.runtime.threads import ahead_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLOCK_BYTES", "BYTES", "Images", "Item", "Raw", "Unfit", "Units", "describe", "is_count"]

BLOCK_BYTES = 32 * 2**20
BYTES = (0.0, 255.0)  # range of 8-bit values
FEW = 256  # pictures that one thread decodes
SPLIT_SEED = 20231  # the digits are split once, for everybody

# One item: how to load its raw [C, H, W] array (or the error in its place).
Raw = np.ndarray | Exception
Item = Callable[[], Raw]
# Names of the columns that may be labels, and what reads one: class numbers [N] of the source, -1 for none, and names.
Columns = tuple[tuple[str, ...], Callable[[str], tuple[np.ndarray, tuple[str, ...]]]]


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1 on; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0


class Unfit(ValueError):
    """An image that can be read, but not brought into the shape that was wanted; the text says why."""


@dataclass(frozen=True, eq=False)
class Units(Shown):
    """The units of samples that are no pictures: x = (value - mean) / std, column by column.

    Attributes:
        columns: names of the columns of vectors [d], of the channels of anything else [C, ...].
        text: what 1 means, such as "standard deviations of each column".
        mean, std: float64 [columns]; ``None`` where the values are as they are.
    """

    columns: tuple[str, ...]
    text: str = "the values as they are"
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def sigma(self, sigma: float) -> np.ndarray:
        """A noise level in the units of every column, [columns]."""
        return np.full(len(self.columns), float(sigma)) * (1.0 if self.std is None else self.std)

    def spelled(self, sigma: float, most: int = 4) -> str:
        """What a noise level is in the units of the columns, in words."""
        if self.std is None:
            return self.text
        each = [f"{c} {v:.3g}" for c, v in zip(self.columns[:most], self.sigma(sigma))]
        return f"{self.text} ({', '.join(each)}{', ...' if len(self.columns) > most else ''})"

    def unscaled(self, x: torch.Tensor) -> torch.Tensor:
        """Samples [B, *S] in the units of their source: x std + mean, float64."""
        if self.mean is None or self.std is None:
            return x.double()
        mean, std = (torch.from_numpy(self.along(v, x.shape[1:])).to(x.device) for v in (self.mean, self.std))
        return x.double() * std + mean

    def along(self, values: np.ndarray, like: Sequence[int]) -> np.ndarray:
        """Numbers of the columns beside samples of a shape [*S]."""
        return values.reshape(-1, *[1] * (len(like) - 1))

    def to_dict(self) -> Values:
        """Plain values, for records."""
        numbers = {k: None if v is None else v.tolist() for k, v in (("mean", self.mean), ("std", self.std))}
        return {"text": self.text, "columns": list(self.columns), **numbers}

    @classmethod
    def of(cls, values: Values) -> Units:
        """Back from `to_dict`."""
        numbers = (None if values[k] is None else np.array(values[k], np.float64) for k in ("mean", "std"))
        return cls(tuple(map(str, values["columns"])), str(values["text"]), *numbers)

    def same(self, other: Units) -> bool:
        """Whether 1 means the same in both, up to rounding: means are compared in standard deviations."""
        if self.mean is None or self.std is None or other.mean is None or other.std is None:
            return (self.mean is None, self.std is None) == (other.mean is None, other.std is None)
        if self.mean.shape != other.mean.shape or self.std.shape != other.std.shape:
            return False
        std = np.allclose(self.std, other.std, atol=0)
        return std and bool((np.abs(self.mean - other.mean) <= 1e-5 * (np.abs(self.mean) + self.std)).all())


@dataclass(frozen=True)
class Images(Shown):
    """A data set of samples of one shape, iterable any number of times: pictures, or what `samples` opened.

    Iterating gives float32 tensors [B, *S]; pictures are [B, C, H, W] in [-1, 1].

    Attributes:
        name: what it was opened as.
        shape: of one sample; (C, H, W) of pictures.
        count: number of samples.
        scale, offset: x = (raw + offset) / scale for the raw values of `blocks`.
        integer: whether raw values are integers 0 .. 255.
        labels: int64 tensor [N] or ``None``.
        classes: class names, one a label value.
        skipped: names and faults of the images left out with ``skip_bad``.
        remarks: what opening decided; `notes` adds what reading decides.
        units: of samples that are no pictures; ``None`` for pictures.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    _items: Callable[[int], Iterator[Item]] = field(repr=False)  # the items from a position on
    _content: Callable[[], str] = field(repr=False)  # hash of the source, computed on all processes at once
    _name_of: Callable[[int], str] = field(default="image {}".format, repr=False)
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    scale: float = 127.5
    offset: float = -127.5
    integer: bool = True
    batch_size: int = 1
    pad: int | None = None
    skipped: tuple[str, ...] = field(default=(), repr=False)
    history: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=(), repr=False)
    _looked: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False)  # at every picture of the source
    _seen: Callable[[], bool] = field(default=lambda: True, repr=False)  # whether that takes no reading any more
    _index: np.ndarray | None = field(default=None, repr=False)  # positions in the source, of a selection
    units: Units | None = None
    _rows: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)  # instead of items
    _columns: Columns | None = field(default=None, repr=False)  # of the source, beside the pictures
    _threads: bool = field(default=False, repr=False)  # whether items take time to load, without the GIL

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        classes = "" if self.labels is None else f", {len(self.classes)} classes"
        units = "" if self.units is None else f", in {self.units.text}"
        return shortened(f"Images({self.name}: {self.count:,} {self.noun} of {shape}{classes}{units})", LONGEST)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first sixteen: pictures side by side, anything else as lines; the axes, new ones where none came.

        Of fields with other channels than grey and RGB the first one is shown, of volumes the middle slice.
        """
        ax = axes(ax)
        x = self.rows(0, min(16, self.count)).tensor().numpy()
        if x.ndim < 4:
            ax.plot(x.reshape(-1, x.shape[-1]).T, linewidth=0.8)
            ax.set_xlabel("column" if x.ndim == 2 else "position")
            return ax
        while x.ndim > 4:
            x = x[:, :, x.shape[2] // 2]
        x = x if x.shape[1] == 3 else x[:, :1]
        low, high = (-1.0, 1.0) if self.units is None else (float(x.min()), float(x.max()))
        x = np.pad(x, ((0, -len(x) % 8), (0, 0), (0, 1), (0, 1)), constant_values=high)
        sheet = x.reshape(-1, 8, *x.shape[1:]).transpose(0, 3, 1, 4, 2).reshape(-1, 8 * x.shape[3], x.shape[1])
        sheet = np.clip((sheet - low) / max(high - low, 1e-30), 0, 1)
        ax.imshow(sheet[..., 0] if x.shape[1] == 1 else sheet, cmap="gray", vmin=0, vmax=1)
        ax.set_axis_off()
        return ax

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from map(self.scaled, self.blocks())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided in reading the source, a sentence each; headers of pictures not read yet are read for it."""
        left = [
            f"{len(self.skipped):,} unusable {self.noun} are left out (first: {first})." for first in self.skipped[:1]
        ]
        return (*self.remarks, *self._looked(), *left)

    @property
    def noted(self) -> bool:
        """Whether `notes` are there without reading: a pass over all pictures brings them along."""
        return self._seen()

    @property
    def noun(self) -> str:
        """What its samples are called."""
        return "images" if self.units is None else "samples"

    def unscaled(self, x: torch.Tensor) -> torch.Tensor:
        """Samples [B, *S], these or generated ones, in the units of the source: x std + mean, float64."""
        return x.double() * self.scale - self.offset if self.units is None else self.units.unscaled(x)

    @property
    def range(self) -> tuple[float, float]:
        """The raw values that stand for black and white."""
        return -self.scale - self.offset, self.scale - self.offset

    def scaled(self, raw: np.ndarray) -> torch.Tensor:
        """Raw values as float32 in [-1, 1]."""
        return torch.from_numpy((raw.astype(np.float32) + np.float32(self.offset)) / np.float32(self.scale))

    def _selected(self) -> Iterator[tuple[int, Item]]:
        """The items of this selection, not yet loaded, with their positions in the source."""
        if self._index is None:
            yield from enumerate(self._items(0))
        elif len(self._index):
            first = int(self._index[0])
            wanted = np.zeros(int(self._index[-1]) + 1 - first, bool)
            wanted[self._index - first] = True
            items = itertools.islice(self._items(first), len(wanted))  # what comes after is not read
            yield from itertools.compress(enumerate(items, first), wanted)

    def _loaded(self) -> Iterator[tuple[int, Raw]]:
        """The items of this selection with their positions in the source; encoded pictures come from all cores.

        Raw values are padded; what cannot be used is `Unfit`, which says why.
        """
        threads = torch.get_num_threads()
        if not self._threads or len(self) <= FEW or threads == 1:
            yield from map(self._fitted, self._selected())
            return
        most = BLOCK_BYTES // (math.prod(self.shape) * (1 if self.integer else 4))
        yield from ahead_of(self._selected(), self._fitted, threads, most)

    def _fitted(self, item: tuple[int, Item]) -> tuple[int, Raw]:
        index, load = item
        raw = load()
        fault = self._fault(raw)
        return index, self._padded(raw) if fault is None and isinstance(raw, np.ndarray) else Unfit(fault)

    def blocks(self) -> Iterator[np.ndarray]:
        """Raw blocks [B, *S]: uint8 where ``integer``, else float32 in the file's own range."""
        if self._rows is not None:
            places = np.arange(self.count) if self._index is None else self._index
            for first in range(0, len(places), self.batch_size):
                yield self._rows(places[first : first + self.batch_size])
            return
        block: list[np.ndarray] = []
        for index, raw in self._loaded():
            if isinstance(raw, Exception):
                raise self._report(self._name_of(index), str(raw))
            block.append(raw)
            if len(block) == self.batch_size:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)

    def usable(self) -> Images:
        """The images without a fault; the others are named in ``skipped``. One pass, which processes share."""
        part, first, shared = own_rows(self)
        faulty = [first + i for i, (_, raw) in enumerate(part._loaded()) if isinstance(raw, Exception)]
        bad = np.concatenate([f["bad"] for f in from_each({"bad": np.array(faulty, np.int64)}, shared)])
        good = np.setdiff1d(np.arange(len(self)), bad)
        skipped = [f"{self._name_of(i)}: {self._fault(load())}" for i, load in self.take(bad, "bad")._selected()]
        if len(good) < 2:
            raise InputError(f"{self.name}: {len(good)} usable images; at least 2 are needed. First: {skipped[0]}.")
        if not skipped:
            return self
        return replace(self.take(good, f"without {len(skipped)} unusable"), skipped=tuple(skipped))

    def tensor(self) -> torch.Tensor:
        """All samples at once, [N, *S] float32; ranks read a part each, and hand it over."""
        part, first, shared = own_rows(self)
        out, done = torch.zeros(len(self), *self.shape), first
        for batch in part:
            out[done : done + len(batch)] = batch
            done += len(batch)
        if shared:
            # As bytes, each of which comes from one rank.
            summed(*out.view(torch.uint8).split(max(1, BLOCK_BYTES // (4 * math.prod(self.shape)))))
        return out

    def shards(self, run: Run | None = None, multiple: int = 1) -> Shards:
        """The images as rows read on demand, of which every process reads and holds a part.

        Args:
            run: its memory holds them, its folder those that do not fit; its progress counts the images read.
            multiple: parts begin at multiples of it.
        """
        run, (part, _, _) = run or Run(), own_rows(self, multiple)
        return Shards(part.blocks(), shares(len(self), multiple), run.bytes(), run.folder, self.scaled, run.tell)

    def name_of(self, index: int) -> str:
        """What the image at a position is called in its source: its file, row or position."""
        return self._name_of(index if self._index is None else int(self._index[index]))

    def names(self) -> list[str]:
        """What every image is called."""
        return [self.name_of(i) for i in range(len(self))]

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the source's content and of every selection made."""
        digest = hashlib.sha256(self._content().encode())
        digest.update(json.dumps([self.shape, self.history, self.pad]).encode())
        return digest.hexdigest()[:16]

    def rows(self, first: int, last: int) -> Images:
        """The images first .. last - 1; of what comes before nothing is read, in parquet no whole row group."""
        return self.take(np.arange(first, last), f"rows {first}-{last - 1}")

    def take(self, index: np.ndarray, note: str) -> Images:
        """The images at the given positions, in rising order; ``note`` says why, for records."""
        index = np.unique(np.asarray(index, dtype=np.int64))
        places = index if self._index is None else self._index[index]
        labels = None if self.labels is None else self.labels[torch.from_numpy(index)]
        return replace(self, _index=places, labels=labels, count=len(index), history=(*self.history, note))

    def split(self, fraction: float = 0.5, seed: int = SPLIT_SEED) -> tuple[Images, Images]:
        """Two disjoint parts, stratified by label where there are labels; fixed by the seed.

        Args:
            fraction: share of the first part, 0 < fraction < 1.
        """
        if not 0 < fraction < 1:
            raise InputError(f"a split fraction of {fraction} leaves one part empty; use 0 < fraction < 1.")
        order = self._by_class(seed)
        # Walking through the classes in turn and cutting the running share keeps every class split evenly.
        first = np.floor(np.arange(1, len(order) + 1) * fraction) > np.floor(np.arange(len(order)) * fraction)
        a, b = order[first], order[~first]
        return self.take(a, f"split {fraction} first {seed}"), self.take(b, f"split {fraction} second {seed}")

    def subset(self, count: int, seed: int = SPLIT_SEED) -> Images:
        """``count`` of the images, stratified by label where there are labels; fixed by the seed."""
        if not (is_count(count) and 2 <= count <= len(self)):
            raise InputError(
                f"a subset of {count} {self.noun} of {len(self):,} in {self.name}; expected 2 to {len(self):,}."
            )
        order = self._by_class(seed)
        return self.take(order[np.arange(count) * len(order) // count], f"subset {count} {seed}")

    def _by_class(self, seed: int) -> np.ndarray:
        """All positions, class after class, shuffled within each."""
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels.numpy()
        order = np.random.default_rng(seed).permutation(len(labels))
        return order[np.argsort(labels[order], kind="stable")]

    def only(self, classes: Sequence[str]) -> Images:
        """The images of the named classes."""
        if self.labels is None:
            raise InputError(f"{self.name} has no labels, so classes cannot be picked. Leave --classes out.")
        unknown = [c for c in classes if c not in self.classes]
        if unknown:
            raise InputError(f"{self.name} has no class {unknown[0]!r}. It has: {', '.join(self.classes[:20])}.")
        wanted = [self.classes.index(c) for c in classes]
        return self.take(np.flatnonzero(np.isin(self.labels.numpy(), wanted)), f"classes {','.join(classes)}")

    def numbered(self, classes: tuple[str, ...]) -> Images:
        """The same images with labels in the numbering of ``classes``, matched by name: held-out ones like the data.

        Raises:
            InputError: for a class that is not among them.
        """
        if self.labels is None or self.classes == classes:
            return self
        unknown = [self.classes[i] for i in self.labels.unique().tolist() if self.classes[i] not in classes]
        if unknown:
            raise InputError(f"the held-out images have a class {unknown[0]!r} that the data do not have. Drop it.")
        numbers = torch.tensor([classes.index(c) if c in classes else -1 for c in self.classes])
        return replace(self, labels=numbers[self.labels], classes=classes)

    def _fault(self, raw: Raw) -> str | None:
        if isinstance(raw, Unfit):
            return str(raw)
        if isinstance(raw, Exception):
            return f"cannot be read ({type(raw).__name__}: {str(raw)[:80]})"
        c, h, w = raw.shape
        if self.pad is None and (h, w) != self.shape[1:]:
            return f"is {h} x {w}, not {self.shape[1]} x {self.shape[2]}"
        if self.pad is not None and max(h, w) > self.pad:
            return f"is {h} x {w}, larger than the padding to {self.pad} x {self.pad}"
        if c != self.shape[0]:
            return f"has {c} channel{'s' * (c != 1)}, not {self.shape[0]}"
        low, high = self.range
        if not (self.integer and (low, high) == BYTES):
            if not np.isfinite(raw).all():
                return "holds NaN or infinity"
            x = (raw + self.offset) / self.scale
            if x.min() < -1 - 1e-4 or x.max() > 1 + 1e-4:
                return f"has values {raw.min():g} .. {raw.max():g}, outside the range {low:g} .. {high:g}"
        return None

    def _report(self, name: str, fault: str) -> InputError:
        """Count the unusable images before failing, so that the message is useful at once."""
        bad = sum(isinstance(raw, Exception) for _, raw in self._loaded())
        advice = "Repair or remove them, or pass --skip-bad."
        if fault.startswith("is ") and " not " in fault:
            advice = "Pass --size N (with --crop center for the middle), or --skip-bad."
        if "channel" in fault:
            advice = "Pass --mode RGB or --mode L, or --skip-bad."
        if "outside the range" in fault:
            advice = "Pass the true range with --range LOW,HIGH (of samples: --samples-range)."
        return InputError(
            f"{bad:,} of {len(self):,} images in {self.name} are unusable (first: {name} {fault}). {advice}"
        )

    def _padded(self, raw: np.ndarray) -> np.ndarray:
        if self.pad is None:
            return raw
        _, h, w = raw.shape
        top, left = (self.pad - h) // 2, (self.pad - w) // 2
        black = self.range[0]
        return np.pad(raw, ((0, 0), (top, self.pad - h - top), (left, self.pad - w - left)), constant_values=black)


def describe(data: Images) -> Values:
    """What a record says of a data set."""
    labels = None if data.labels is None else torch.bincount(data.labels, minlength=len(data.classes)).tolist()
    return {
        "name": data.name,
        "count": len(data),
        "shape": list(data.shape),
        "fingerprint": data.fingerprint(),
        "classes": list(data.classes)[:1000],
        "class_counts": labels,
        "selection": list(data.history),
        "skipped": list(data.skipped)[:100],
        "notes": list(data.notes),
        **({} if data.units is None else {"units": data.units.to_dict()}),
    }
