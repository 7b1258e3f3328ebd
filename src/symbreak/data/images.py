"""Image data sets as streams of [B, C, H, W] float32 batches in [-1, 1].

Sources: ``"digits"`` (scikit-learn's 8 x 8 digits, split once into halves), a folder of images
(sub-folders are classes), a ``.parquet`` file in the Hugging Face layout, a ``.npz`` or ``.npy``
array, a `datasets` hub id. 8-bit images are also served as bytes (`Images.blocks`), from which
`Moments` computes exactly at float32 speed. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.runtime.files import InputError, file_hash
from symbreak.runtime.ranks import agreed, dealt, from_each, own_rows, shares, summed
from symbreak.runtime.rows import HELD, Shards

__all__ = ["Images", "describe", "images", "png_row"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
BLOCK_BYTES = 32 * 2**20
SPLIT_SEED = 20231  # the digits are split once, for everybody
HASHED = 1000  # files, whose hashes are a block
PART_BYTES = 64 * 2**20  # of a file; a larger one is hashed in parts, and mapped instead of read
MAX_CLASSES = 2**20
MAX_PIXELS = 64 * 2**20  # an image beyond this is a bomb or a mistake

# One item: how to load its raw [C, H, W] array (or the error in its place).
Raw = np.ndarray | Exception
Item = Callable[[], Raw]


@dataclass(frozen=True)
class Images:
    """A data set of equal-sized images, iterable any number of times.

    Iterating gives float32 tensors [B, C, H, W] in [-1, 1].

    Attributes:
        name: what it was opened as.
        shape: (C, H, W).
        count: number of images.
        scale, offset: x = (raw + offset) / scale for the raw values of `blocks`.
        integer: whether raw values are integers 0 .. 255.
        labels: int64 tensor [N] or ``None``.
        classes: class names, one a label value.
        skipped: names and faults of the images left out with ``skip_bad``.
    """

    name: str
    shape: tuple[int, int, int]
    count: int
    scale: float
    offset: float
    integer: bool
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    batch_size: int
    _items: Callable[[int], Iterator[Item]] = field(repr=False)  # the items from a position on
    _fingerprint: Callable[[], str] = field(repr=False)  # called by all ranks at once
    _name_of: Callable[[int], str] = field(repr=False)
    keep: np.ndarray | None = field(default=None, repr=False)
    pad: int | None = None
    skipped: tuple[str, ...] = field(default=(), repr=False)
    history: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from map(self.scaled, self.blocks())

    def scaled(self, raw: np.ndarray) -> torch.Tensor:
        """Raw values as float32 in [-1, 1]."""
        return torch.from_numpy((raw.astype(np.float32) + np.float32(self.offset)) / np.float32(self.scale))

    def _kept(self) -> Iterator[tuple[int, Item]]:
        """The items that belong to this selection, not yet loaded, by their position in the source."""
        if self.keep is None:
            yield from enumerate(self._items(0))
            return
        wanted = iter(self.keep.tolist())
        target = next(wanted, None)
        first = target or 0
        for index, item in enumerate(self._items(first), first):
            if target is None:
                return
            if index == target:
                yield index, item
                target = next(wanted, None)

    def blocks(self) -> Iterator[np.ndarray]:
        """Raw blocks [B, C, H, W]: uint8 where ``integer``, else float32 in the file's own range."""
        block: list[np.ndarray] = []
        for index, load in self._kept():
            raw = load()
            fault = self._fault(raw)
            if fault is not None:
                raise self._report(self._name_of(index), fault)
            block.append(self._padded(raw))  # type: ignore[arg-type]
            if len(block) == self.batch_size:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)

    def _usable(self) -> Images:
        """The images without a fault; the others are named in ``skipped``. One pass, which ranks share."""
        part, first, shared = own_rows(self)
        faulty = [first + i for i, (_, load) in enumerate(part._kept()) if self._fault(load()) is not None]
        bad = np.concatenate([f["bad"] for f in from_each({"bad": np.array(faulty, np.int64)}, shared)])
        good = np.setdiff1d(np.arange(len(self)), bad)
        skipped = [f"{self._name_of(i)}: {self._fault(load())}" for i, load in self.take(bad, "bad")._kept()]
        if len(good) < 2:
            raise InputError(f"{self.name}: {len(good)} usable images; at least 2 are needed. First: {skipped[0]}.")
        if not skipped:
            return self
        return replace(self.take(good, f"without {len(skipped)} unusable"), skipped=tuple(skipped))

    def tensor(self) -> torch.Tensor:
        """All images at once, [N, C, H, W] float32 in [-1, 1]; ranks read a part each, and hand it over."""
        part, first, shared = own_rows(self)
        out, done = torch.zeros(len(self), *self.shape), first
        for batch in part:
            out[done : done + len(batch)] = batch
            done += len(batch)
        if shared:
            # As bytes, each of which comes from one rank.
            summed(*out.view(torch.uint8).split(max(1, BLOCK_BYTES // (4 * math.prod(self.shape)))))
        return out

    def shards(
        self,
        memory: int = HELD,
        folder: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        multiple: int = 1,
    ) -> Shards:
        """The images as rows to be asked for, of which every rank reads and holds a part.

        Args:
            memory, folder, progress: see `Shards`.
            multiple: parts begin at multiples of it.
        """
        part, _, _ = own_rows(self, multiple)
        return Shards(part.blocks(), shares(len(self), multiple), memory, folder, self.scaled, progress)

    def name_of(self, index: int) -> str:
        """What the image at a position is called in its source: its file, row or position."""
        return self._name_of(index if self.keep is None else int(self.keep[index]))

    def names(self) -> list[str]:
        """What every image is called."""
        return [self.name_of(i) for i in range(len(self))]

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the source's content and of every selection made."""
        digest = hashlib.sha256(self._fingerprint().encode())
        digest.update(json.dumps([self.shape, self.history, self.pad]).encode())
        return digest.hexdigest()[:16]

    def rows(self, first: int, last: int) -> Images:
        """The images first .. last - 1; of what comes before nothing is read, in parquet no whole row group."""
        return self.take(np.arange(first, last), f"rows {first}-{last - 1}")

    def take(self, index: np.ndarray, note: str) -> Images:
        """The images at the given positions, in rising order; ``note`` says why, for records."""
        index = np.unique(np.asarray(index, dtype=np.int64))
        keep = index if self.keep is None else self.keep[index]
        labels = None if self.labels is None else self.labels[torch.from_numpy(index)]
        return replace(self, keep=keep, labels=labels, count=len(index), history=self.history + (note,))

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
        if not 2 <= count <= len(self):
            raise InputError(
                f"a subset of {count} images of {len(self):,} in {self.name}; expected 2 to {len(self):,}."
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
        unknown = [c for c in self.classes if c not in classes]
        if unknown:
            raise InputError(f"the held-out images have a class {unknown[0]!r} that the data do not have. Drop it.")
        return replace(
            self, labels=torch.tensor([classes.index(c) for c in self.classes])[self.labels], classes=classes
        )

    def _fault(self, raw: Raw) -> str | None:
        if isinstance(raw, Exception):
            return f"cannot be read ({type(raw).__name__}: {str(raw)[:80]})"
        c, h, w = raw.shape
        if self.pad is None and (h, w) != self.shape[1:]:
            return f"is {h} x {w}, not {self.shape[1]} x {self.shape[2]}"
        if self.pad is not None and max(h, w) > self.pad:
            return f"is {h} x {w}, larger than the padding to {self.pad} x {self.pad}"
        if c != self.shape[0]:
            return f"has {c} channel{'s' * (c != 1)}, not {self.shape[0]}"
        if not self.integer:
            if not np.isfinite(raw).all():
                return "holds NaN or infinity"
            x = (raw + self.offset) / self.scale
            if x.min() < -1 - 1e-4 or x.max() > 1 + 1e-4:
                low, high = -self.scale - self.offset, self.scale - self.offset
                return f"has values {raw.min():g} .. {raw.max():g}, outside the range {low:g} .. {high:g}"
        return None

    def _report(self, name: str, fault: str) -> InputError:
        """Count the offenders before failing, so that the message is useful at once."""
        faults = [self._fault(load()) is not None for _, load in self._kept()]
        bad, total = sum(faults), len(faults)
        mend = (
            "Pass the true range with --range LOW,HIGH (of samples: --samples-range)."
            if "outside the range" in fault
            else ("Mend or remove them, or pass --skip-bad.")
        )
        return InputError(f"{bad:,} of {total:,} images in {self.name} are unusable (first: {name} {fault}). {mend}")

    def _padded(self, raw: np.ndarray) -> np.ndarray:
        if self.pad is None:
            return raw
        _, h, w = raw.shape
        top, left = (self.pad - h) // 2, (self.pad - w) // 2
        black = 0 if self.integer else -self.scale - self.offset
        return np.pad(raw, ((0, 0), (top, self.pad - h - top), (left, self.pad - w - left)), constant_values=black)


def images(
    source: str | Path | Images | np.ndarray | torch.Tensor,
    *,
    value_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    pad: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Images:
    """Open a data set.

    Args:
        source: ``"digits"`` (the training half), ``"digits:held-out"``, ``"digits:all"``, a folder,
            a ``.parquet`` / ``.npz`` / ``.npy`` file, a hub id ``owner/name``, or an array
            [N, C, H, W], [N, H, W, C] or [N, H, W].
        value_range: range of float arrays. Without it: [-1, 1] where a value is negative, else [0, 1].
        skip_bad: leave unusable images out (named in ``.skipped``) instead of failing.
        classes: keep only these class names.
        pad: pad every image with black to pad x pad pixels.
        limit: keep only so many images, spread evenly over the classes.
        batch_size: images a batch; by default as many as fit 32 MiB of float32, 1,024 at most.

    Raises:
        InputError: one line that says what came, what was expected and what to do.

    >>> digits = images("digits")
    >>> len(digits), digits.shape
    (898, (1, 8, 8))
    """
    if isinstance(source, Images):
        found = source
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
        found = _from_array("array", array, None, value_range)
    else:
        found = _open(str(source), value_range)
    if classes is not None:
        found = found.only(classes)
    c, h, w = found.shape if pad is None else (found.shape[0], pad, pad)
    if pad is not None and not 0 < pad <= 8192:
        raise InputError(f"padding to {pad} pixels; expected a size between the image's own and 8192.")
    size = batch_size or max(1, min(1024, BLOCK_BYTES // (4 * c * h * w)))
    opened = replace(found, shape=(c, h, w), pad=found.pad if pad is None else pad, batch_size=size)
    opened = opened._usable() if skip_bad else opened
    return opened if limit is None else opened.subset(limit)


def _open(source: str, value_range: tuple[float, float] | None) -> Images:
    if source.split(":")[0] == "digits" and source in ("digits", "digits:held-out", "digits:all"):
        return _digits(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return _from_parquet(path)
        if suffix in (".npz", ".npy"):
            return _from_numpy(path, value_range)
        raise InputError(
            f"{source} is a {suffix or 'nameless'} file. Expected a folder of images or a .parquet, .npz or .npy file."
        )
    looks_like_hub = source.count("/") == 1 and not path.suffix and not source.startswith((".", "/", "~"))
    if looks_like_hub and not path.parent.exists():
        return _from_hub(source)
    raise InputError(f"{source} does not exist. Pass digits, a folder of images, or a .parquet, .npz or .npy file.")


def _digits(source: str) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    raw = bunch.images.astype(np.uint8)[:, None]
    everything = Images(
        name=source,
        shape=(1, 8, 8),
        count=len(raw),
        scale=8.0,
        offset=-8.0,
        integer=True,
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        classes=tuple(str(i) for i in range(10)),
        batch_size=1024,
        _items=lambda start: (partial(raw.__getitem__, i) for i in range(start, len(raw))),
        _fingerprint=lambda: hashlib.sha256(raw.tobytes()).hexdigest(),
        _name_of=lambda i: f"image {i}",
    )
    if source == "digits:all":
        return everything
    train, held_out = everything.split(0.5)
    return held_out if source == "digits:held-out" else train


def _decode(data: bytes | Path) -> np.ndarray:
    """Decode one image to [C, H, W] uint8; greyscale keeps one channel, everything else becomes RGB."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags in a picture that can be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
            if picture.mode in ("I", "F"):
                raise ValueError("32-bit pixels; save it with 8 bits, or pass an array with its range")
            if picture.mode.startswith("I;16"):
                array = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)  # convert would clip
            else:
                array = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _attempt(data: bytes | Path | None) -> Raw:
    try:
        return _decode(data) if data else ValueError("no bytes")
    except Exception as error:  # Pillow raises a dozen types for a broken file; all mean "unusable"
        return error


def _first_shape(name: str, items: Iterator[Item]) -> tuple[int, int, int]:
    for load in items:
        raw = load()
        if not isinstance(raw, Exception):
            return raw.shape
    raise InputError(f"{name} holds no readable image. Expected PNG, JPEG, WebP, BMP, GIF or TIFF files.")


def _eight_bit(
    name: str,
    items: Callable[[int], Iterator[Item]],
    count: int,
    labels: torch.Tensor | None,
    classes: tuple[str, ...],
    fingerprint: Callable[[], str],
    name_of: Callable[[int], str] = "row {}".format,
) -> Images:
    if count < 2:
        raise InputError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed.")
    return Images(
        name=name,
        shape=_first_shape(name, items(0)),
        count=count,
        scale=127.5,
        offset=-127.5,
        integer=True,
        labels=labels,
        classes=classes,
        batch_size=1,
        _items=items,
        _fingerprint=fingerprint,
        _name_of=name_of,
    )


def _from_folder(path: Path) -> Images:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"{path} holds no images. Expected PNG, JPEG, WebP, BMP, GIF or TIFF files in it.")
    tops = [p.relative_to(path).parts[0] if len(p.relative_to(path).parts) > 1 else None for p in files]
    labels, classes = None, tuple(sorted({t for t in tops if t is not None}))
    if classes and None not in tops:
        labels = torch.tensor([classes.index(t) for t in tops])

    def items(start: int) -> Iterator[Item]:
        for file in files[start:]:
            yield partial(_attempt, file)

    def name_of(index: int) -> str:
        return str(files[index].relative_to(path))

    def hashed(start: int) -> dict[str, np.ndarray]:
        own = [hashlib.sha256(file.read_bytes()).digest() for file in files[start : start + HASHED]]
        return {"hash": np.frombuffer(b"".join(own), np.uint8).reshape(-1, 32)}

    def fingerprint() -> str:
        digest = hashlib.sha256()
        found = dealt(range(0, len(files), HASHED), hashed)
        for file, content in zip(files, np.concatenate([f["hash"] for f in found])):
            digest.update(os.fsencode(file.relative_to(path)) + b"\0" + content.tobytes())
        return digest.hexdigest()

    tags = classes if labels is not None else ()
    return _eight_bit(str(path), items, len(files), labels, tags, fingerprint, name_of)


def _label_names(field_metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Class names from the Hugging Face schema metadata of a parquet file, if it has any."""
    try:
        info = json.loads((field_metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(n) for n in info["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _from_parquet(path: Path) -> Images:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file ({str(error)[:80]}).") from None
    column = next((f.name for f in schema if f.name in ("image", "img")), None)
    if column is None or not (
        pa.types.is_struct(schema.field(column).type) or pa.types.is_binary(schema.field(column).type)
    ):
        raise InputError(
            f"{path} has the columns {', '.join(schema.names[:8])}; expected 'image' with encoded bytes "
            "(the Hugging Face layout image: {bytes, path}, label)."
        )
    label = next((f.name for f in schema if f.name in ("label", "labels", "fine_label")), None)
    labels: torch.Tensor | None = None
    names: tuple[str, ...] = ()
    if label is not None and pa.types.is_integer(schema.field(label).type):
        try:
            values = file.read(columns=[label]).column(0).to_numpy()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} has damaged labels ({str(error)[:80]}).") from None
        if len(values) and values.min() >= 0:
            most = int(values.max())
            if most >= MAX_CLASSES:
                raise InputError(f"{path} has the label {most}; expected class numbers below {MAX_CLASSES:,}.")
            labels = torch.from_numpy(values.astype(np.int64))
            names = _label_names(schema.metadata, label) or tuple(str(i) for i in range(most + 1))
            if len(names) <= most:
                raise InputError(f"{path} has the label {most}, but only {len(names)} class names.")

    def rows(start: int) -> Iterator[Item]:
        with pq.ParquetFile(path) as stream:
            groups = stream.num_row_groups
            ends = np.cumsum([stream.metadata.row_group(g).num_rows for g in range(groups)])
            skipped = int(np.searchsorted(ends, start, side="right"))
            index = int(ends[skipped - 1]) if skipped else 0
            wanted = list(range(skipped, groups))
            for batch in stream.iter_batches(batch_size=512, row_groups=wanted, columns=[column]):
                own = batch.column(0).slice(max(0, start - index))
                index += len(batch)
                for cell in own.to_pylist():
                    yield partial(_attempt, cell.get("bytes") if isinstance(cell, dict) else cell)

    def items(start: int) -> Iterator[Item]:
        try:
            yield from rows(start)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is a damaged parquet file ({str(error)[:80]}).") from None

    return _eight_bit(str(path), items, file.metadata.num_rows, labels, names, partial(_content, path))


def _content(path: Path) -> str:
    """SHA-256 of a file; of a large one that of its parts' hashes, so that ranks read a part each."""
    size = path.stat().st_size
    if size <= PART_BYTES:
        return agreed(partial(file_hash, path))

    def hashed(start: int) -> dict[str, np.ndarray]:
        with path.open("rb") as stream:
            stream.seek(start)
            return {"hash": np.frombuffer(hashlib.sha256(stream.read(PART_BYTES)).digest(), np.uint8)}

    found = dealt(range(0, size, PART_BYTES), hashed)
    return hashlib.sha256(b"".join(f["hash"].tobytes() for f in found)).hexdigest()


def _from_hub(source: str) -> Images:
    import datasets

    try:
        found = datasets.load_dataset(source, split="train")
        column = next(n for n, f in found.features.items() if isinstance(f, datasets.Image))
    except StopIteration:
        raise InputError(f"the data set {source} has no image column.") from None
    except Exception as error:
        raise InputError(
            f"{source} is no file here, and the hub gave no such data set ({type(error).__name__}). "
            "Check the path or the id."
        ) from None
    undecoded = found.cast_column(column, datasets.Image(decode=False))
    label = next((n for n, f in found.features.items() if isinstance(f, datasets.ClassLabel)), None)
    labels = None if label is None else torch.tensor(found[label])
    names = () if label is None else tuple(found.features[label].names)

    def items(start: int) -> Iterator[Item]:
        for row in undecoded.select(range(start, len(undecoded))):
            yield partial(_attempt, row[column]["bytes"] or Path(row[column]["path"]))

    return _eight_bit(source, items, len(found), labels, names, lambda: str(found._fingerprint))


def _from_numpy(path: Path, value_range: tuple[float, float] | None) -> Images:
    labels = None
    try:
        if path.suffix.lower() == ".npy":
            with np.errstate(over="ignore"):  # a declared shape beyond every file
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as archive:
                names = list(archive.files)
                key = next((k for k in ("images", "x", "data", "arr_0", "x_train") if k in names), None)
                if key is None:
                    raise InputError(f"{path} holds {', '.join(names[:8])}; expected an array named 'images'.")
                array = _mapped(path, f"{key}.npy")
                array = archive[key] if array is None else array
                tag = next((k for k in ("labels", "label", "y", "y_train") if k in names), None)
                labels = None if tag is None else archive[tag]
        if not all(isinstance(a, (np.ndarray, type(None))) for a in (array, labels)):
            raise InputError(f"{path} holds no plain array. Expected a {path.suffix} file that numpy wrote.")
    except InputError:
        raise
    except Exception as error:
        what = (
            "holds pickled objects, which are never loaded"
            if "pickle" in str(error) or "Python objects" in str(error)
            else "cannot be read"
        )
        raise InputError(f"{path} {what} ({type(error).__name__}). Expected a plain numeric array.") from None
    return _from_array(str(path), array, labels, value_range, partial(_content, path))


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """A large array of an .npz that is stored as it is, as a memory map, whose checksum nobody reads.

    ``None`` where it is small, compressed or pickled.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.NameToInfo.get(member)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size <= PART_BYTES:
            return None
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            header = stream.tell()
    if dtype.hasobject or math.prod(shape) == 0:
        return None
    if header + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{member} does not have the size it declares")
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the lengths of name and extra field, which come before the content
        name, extra = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name + extra + header
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def _from_array(
    name: str,
    array: np.ndarray,
    labels: np.ndarray | None,
    value_range: tuple[float, float] | None,
    fingerprint: Callable[[], str] | None = None,
) -> Images:
    if array.ndim == 3:
        layout = "NHW"
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        layout = "NHWC"
    elif array.ndim == 4 and array.shape[1] in (1, 3):
        layout = "NCHW"
    else:
        raise InputError(
            f"{name} has the shape {tuple(array.shape)}. Expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 "
            "channels."
        )
    count = array.shape[0]
    if count < 2:
        raise InputError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed.")
    if array.size == 0:
        raise InputError(f"{name} has the shape {tuple(array.shape)}: the images have no pixels.")
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise InputError(f"{name} holds {array.dtype} values; expected 8-bit integers or floats.")
    integer = array.dtype == np.uint8 and value_range in (None, (0, 255), (0.0, 255.0))
    if integer:
        low, high = 0.0, 255.0
    elif value_range is not None:
        low, high = map(float, value_range)
        if not (math.isfinite(high - low) and (high - low) / 2 > 0):
            raise InputError(f"--range {low:g},{high:g} is empty or endless; expected LOW,HIGH with LOW < HIGH.")
        if (low, high) == (0.0, 255.0) and not np.issubdtype(array.dtype, np.integer):
            largest = _extreme(array, np.fmax)
            if largest <= 1:  # declared so, all would be black
                raise InputError(
                    f"{name} has no value above {largest:g}, declared as 0 .. 255. Pass its true range, 0,1 or -1,1."
                )
    elif np.issubdtype(array.dtype, np.integer):
        low, high = 0.0, 255.0
    else:
        low, high = (-1.0, 1.0) if _extreme(array, np.fmin) < 0 else (0.0, 1.0)
    scale, offset = (high - low) / 2, -(high + low) / 2

    def load(i: int) -> Raw:
        raw = np.asarray(array[i])
        raw = raw[None] if layout == "NHW" else raw.transpose(2, 0, 1) if layout == "NHWC" else raw
        return raw if integer else raw.astype(np.float32)

    def items(start: int) -> Iterator[Item]:
        return (partial(load, i) for i in range(start, count))

    classes: tuple[str, ...] = ()
    tags = None
    if labels is not None:
        if labels.shape != (count,):
            raise InputError(f"{name} has labels of shape {labels.shape} for {count} images; expected ({count},).")
        if labels.dtype.kind not in "biufSU":
            raise InputError(f"{name} has labels of the type {labels.dtype}; expected numbers or text.")
        values, codes = np.unique(labels, return_inverse=True)
        classes, tags = tuple(str(v) for v in values), torch.from_numpy(codes.astype(np.int64))
    shape = load(0).shape  # type: ignore[union-attr]
    return Images(
        name=name,
        shape=tuple(shape),
        count=count,
        scale=scale,
        offset=offset,
        integer=integer,
        labels=tags,
        classes=classes,
        batch_size=1,
        _items=items,
        # the same numbers in another range are other images
        _fingerprint=lambda: f"{(fingerprint or partial(_array_hash, array))()} {low} {high}",
        _name_of=lambda i: f"image {i}",
    )


def _slabs(array: np.ndarray) -> list[slice]:
    """Pieces of an array small enough to look at one at a time (the array may be a memory map)."""
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return [slice(start, start + step) for start in range(0, len(array), step)]


def _extreme(array: np.ndarray, of: np.ufunc) -> float:
    """The smallest (``np.fmin``) or largest (``np.fmax``) number, NaN passed by; ranks look at a part each."""
    found = dealt(_slabs(array), lambda part: {"found": of.reduce(np.asarray(array[part], np.float64), axis=None)})
    return float(of.reduce([f["found"] for f in found]))


def _array_hash(array: Any) -> str:
    digest = hashlib.sha256()
    for part in _slabs(array):
        digest.update(np.asarray(array[part], dtype=np.float64).tobytes())
    return digest.hexdigest()


def describe(data: Images) -> dict[str, Any]:
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
    }


def png_row(grid: torch.Tensor) -> str:
    """A row of images [N, C, H, W] in [-1, 1] as one PNG, base64."""
    from PIL import Image

    small = grid
    side = max(grid.shape[2:])
    if side > 64:
        scale = 64 / side
        small = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="area")
    pixels = ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=0)
    row = torch.cat(list(pixels), dim=2).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
