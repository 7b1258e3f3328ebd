"""Samples of any shape: vectors [N, d], signals [N, C, L], pictures of any channels, latents, volumes [N, C, D, H, W].

Values stay as they are, or are measured in standard deviations of their column (of their channel, where samples have
channels): no range is guessed and nothing is rounded to 8 bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from symbreak.data.arrays import load_array, slabs
from symbreak.data.folders import look_into
from symbreak.data.images import BLOCK_BYTES, Images, Units
from symbreak.data.labels import Classes, classes_of, labelled
from symbreak.data.readers import file_content, images, numpy_of, one_each
from symbreak.data.tables import ARCHIVES, PACKED, has_pictures, is_text_table, read_table, values_of
from symbreak.runtime.errors import InputError
from symbreak.runtime.files import digest
from symbreak.runtime.ranks import map_over_ranks

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Table: TypeAlias = str | Path | np.ndarray | torch.Tensor | Sequence[Any] | pd.DataFrame

__all__ = ["channels_last", "opened", "samples"]

Scale: TypeAlias = "str | tuple[Any, Any] | Images | Units | None"
PICTURES = ("value_range", "size", "crop", "mode", "pad", "layout", "split")  # options of `images` alone
GENERATED = ("samples.csv", "samples.npy")  # samples in the units of their data, in a folder of `symbreak sample`
SHOWN = 5  # columns in a note
APART = 10.0  # spreads of columns that differ by more hide columns
SINGLE = 2.0**-24  # rounding of single precision, in which samples are handed on
LARGEST, LARGEST_SCALED = 1e30, 1e150  # values that leave room for their squares, in single and in double precision
VISIBLE = 1e-3  # of a column's standard deviation that rounding may cost


def samples(
    source: Table,
    *,
    labels: str | Sequence[str] | Sequence[int] | np.ndarray | torch.Tensor | None = None,
    scale: Scale = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    batch_size: int | None = None,
    **pictures: object,
) -> Images:
    """Open samples of any shape; the values are no pixels.

    Args:
        source: an array or tensor [N, *S] of numbers, such as vectors [N, d], signals [N, C, L] or volumes
            [N, C, D, H, W]; a ``.npy`` or ``.npz`` file of one; a table of numbers, a ``.csv`` or ``.tsv`` (also
            ``.csv.gz``, ``.bz2``, ``.xz``) or ``.parquet`` file, a folder of the latter, a pandas data frame, or a data
            set of `datasets`: a row a sample; a folder of ``symbreak sample --data``.
        labels: name or names of label columns of a table (by default one called label, class or target; ``"none"`` for
            no labels); one label a sample of anything else.
        scale: ``None`` leaves the values as they are; ``"standard"`` takes off the mean of every column, or of every
            channel of samples [C, ...], and divides by its standard deviation (of all samples, divided by N);
            (mean, std), numbers or one a column, does so with these; another data set's `Images`, or ``start.units`` of
            a network, with what they have.
        classes: keep only these class names.
        limit: keep only so many samples, spread evenly over the classes.
        skip_bad: leave rows with NaN or infinity out (named in ``.skipped``) instead of failing.
        batch_size: samples a batch; by default as many as fit 32 MiB of float32.

    Returns:
        `Images` of this shape: what takes pictures takes them. ``units`` says what 1 means, ``unscaled(x)`` brings
        samples back to the source's units, ``units.sigma(s)`` a noise level.

    Raises:
        InputError: one line that says what came, what was expected and what to do.

    >>> data = samples([[1.0, 200.0], [3.0, 800.0]], scale="standard")
    >>> data.shape, data.tensor().tolist()
    ((2,), [[-1.0, -1.0], [1.0, 1.0]])
    >>> data.unscaled(data.tensor()).tolist(), data.units.sigma(0.5).tolist()
    ([[1.0, 200.0], [3.0, 800.0]], [0.5, 150.0])
    """
    of = scale.units if isinstance(scale, Images) else scale if isinstance(scale, Units) else None
    raw = _raw(source, labels, () if of is None else of.columns)
    for name in (n for n, value in pictures.items() if value is not None):
        if name in PICTURES:
            flag = {"value_range": "range"}.get(name, name)
            raise InputError(
                f"{name}= (--{flag}) belongs to pictures, and {raw.name} is read as samples of any shape. Leave it out."
            )
        raise InputError(f"samples() has no option {name!r}. Expected labels, scale, classes, limit, skip_bad.")
    array, name = raw.array, raw.name
    columns = raw.columns or _numbered(array)
    pass_ = _looked_through(array)
    if len(pass_.bad) and not skip_bad:
        where = f", {columns[pass_.column]}" if array.ndim == 2 or array.shape[1] > 1 else ""
        raise InputError(
            f"{len(pass_.bad):,} of {len(array):,} samples in {name} hold NaN or infinity (first: row "
            f"{pass_.bad[0]}{where}). Repair or remove them, or pass skip_bad (--skip-bad)."
        )
    if len(array) - len(pass_.bad) < 2:
        raise InputError(f"{name}: {len(array) - len(pass_.bad)} usable samples; at least 2 are needed.")
    units, notes = _units(name, columns, scale, pass_, array.ndim)
    content = cache(lambda: f"{raw.content()} {decided_by(units)}")
    size = batch_size or max(1, min(65536, BLOCK_BYTES // (4 * math.prod(array.shape[1:]))))
    opened = Images(
        name,
        tuple(int(n) for n in array.shape[1:]),
        len(array),
        lambda start: iter(()),
        content,
        "row {}".format,
        scale=1.0,
        offset=0.0,
        integer=False,
        batch_size=size,
        remarks=(*raw.notes, *channels_last(array.shape), *notes),
        units=units,
        _rows=partial(_rows, array, units),
    )
    opened = labelled(opened, raw.classes)
    if raw.history:
        opened = replace(opened, history=(*opened.history, raw.history))
    if len(pass_.bad):
        skipped = tuple(f"row {i}: holds NaN or infinity" for i in pass_.bad)
        places = np.arange(len(array)) if opened._index is None else opened._index
        good = np.flatnonzero(~np.isin(places, pass_.bad))
        opened = replace(opened.take(good, f"without {len(skipped)} unusable"), skipped=skipped)
    opened = opened if classes is None else opened.only(classes)
    return opened if limit is None else opened.subset(limit)


def opened(source: str, scale: str | Images | None = None, **options: Any) -> Images:
    """What a name says, pictures or samples: with ``scale``, and what can be no pictures, are samples.

    Args:
        source: what `images` or `samples` takes; a table, and an array of 2 or 5 dimensions or of channels that
            pictures do not have, are samples.
        scale: ``"standard"``, ``"none"``, ``"MEAN,STD"``, or the data set whose units are taken.
        **options: of `images`, or those of `samples` among them.
    """
    if scale is None and not _no_pictures(Path(source).expanduser()):
        return images(source, **options)
    if scale is not None and options.get("value_range") is not None:
        raise InputError("--range and --scale came together: a range is for pictures, a scale for other values.")
    labels = options.pop("labels", None)
    wanted = {k: v for k, v in options.items() if k != "skip_bad" or v}
    taken = None if scale == "none" else _pair(scale) if isinstance(scale, str) and "," in scale else scale
    return samples(source, labels=labels, scale=taken, **wanted)


def _pair(text: str) -> tuple[float, float]:
    try:
        mean, std = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--scale {text}; expected standard, none, or MEAN,STD such as 0,2.5.") from None
    return mean, std


def _no_pictures(path: Path) -> bool:
    """Whether a file holds a table, or an array that can be no pictures."""
    suffix = path.suffix.lower()
    if not path.is_file() or is_text_table(path):
        return path.is_file()
    if suffix == ".parquet":
        return not has_pictures(path)
    if suffix not in (".npy", ".npz"):
        return False
    array, _ = load_array(path)
    channels = () if array.ndim != 4 else (array.shape[1], array.shape[3])
    return array.ndim in (2, 5) or (array.ndim == 4 and not {1, 3} & set(channels))


@dataclass(frozen=True)
class _Raw:
    """An array [N, *S] of numbers, not yet looked at, with what its source says of it."""

    name: str
    array: np.ndarray
    content: Callable[[], str]
    columns: tuple[str, ...] = ()
    classes: Classes | None = None
    history: str = ""
    notes: tuple[str, ...] = ()


def _raw(source: Table, labels: Any, like: tuple[str, ...]) -> _Raw:
    """The numbers of a source, with their classes; of a table the columns ``like`` those of another, if any."""
    raw = _read(source, labels, like)
    array, name = raw.array, raw.name
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype} values; expected numbers.")
    if array.ndim < 2:
        more = " One number a sample is x[:, None]." if array.ndim == 1 else ""
        raise InputError(f"{name} has the shape {array.shape}; expected [N, *S], such as [N, d].{more}")
    if array.size == 0:
        raise InputError(f"{name} has the shape {array.shape}: there are no values.")
    if len(array) < 2:
        raise InputError(f"{name} holds 1 sample; at least 2 are needed.")
    if labels is None or raw.history or (isinstance(labels, str) and labels == "none"):
        return raw  # the labels are columns of a table, or the file's own, or there are none
    several = isinstance(labels, list | tuple) and len(labels) != len(array)
    names: Sequence[object] = [labels] if isinstance(labels, str) else labels[:1] if several else ()
    if not raw.columns and any(isinstance(c, str) for c in names):
        raise InputError(f"{name} has no columns, so labels={names[0]!r} names none. Pass one label a sample.")
    classes, history = one_each(labels, name, len(array), "sample")
    return replace(raw, classes=classes, history=history)


def _read(source: Table, labels: Any, like: tuple[str, ...]) -> _Raw:
    if hasattr(source, "to_pandas"):  # a data set of `datasets`
        source = source.to_pandas()
    if hasattr(source, "to_numpy") and hasattr(source, "columns"):
        import pyarrow as pa

        labels = str(labels) if isinstance(labels, int) else labels  # a column that pandas numbered
        try:
            table = pa.Table.from_pandas(source, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError) as error:
            said = " ".join(map(str, error.args))[:160]
            raise InputError(f"the data frame is no table of numbers ({said}). Repair or drop the column.") from None
        return _from_table("data frame", table, labels, like)
    if isinstance(source, Images):
        raise InputError(f"{source.name} is a data set already. Pass it as it is, or what it was opened from.")
    if isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        try:
            array = numpy_of(source)
        except InputError:
            raise
        except ValueError:
            raise InputError("a list of samples of different shapes; expected one shape.") from None
        return _Raw("array", array, partial(_array_hash, array))
    if not isinstance(source, str | Path):
        raise InputError(f"samples of the type {type(source).__name__}; expected an array, a table or a file.")
    path = Path(source).expanduser()
    made = [path / name for name in GENERATED if (path / name).is_file()]
    if made:  # a folder of `symbreak sample`
        return replace(_read(made[0], labels, like), name=str(path))
    if path.is_dir():
        shards = [path / shard for shard in look_into(path, None).shards]
        if not shards:
            raise InputError(f"{path} is a folder without parquet files. Expected one of them, or a file of samples.")
        return _from_table(str(path), shards, labels, like)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{source} does not exist. Pass a .csv, .parquet, .npy or .npz file, or an array.")
    if suffix in (".npy", ".npz"):
        array, tags = load_array(path)
        if tags is not None and labels is None and tags.shape != array.shape[:1]:
            raise InputError(
                f"{path} has labels of shape {tags.shape} for {len(array):,} samples; expected one a sample."
            )
        classes = None if tags is None or labels is not None else classes_of(str(path), tags)
        return _Raw(str(path), array, partial(file_content, path), classes=classes)
    if is_text_table(path) or suffix == ".parquet":
        return _from_table(str(path), [path], labels, like)
    if suffix in (*PACKED, *ARCHIVES):
        raise InputError(f"{source} is packed, and only tables of text are read so (.csv.gz). Unpack it first.")
    raise InputError(f"{source} is a {suffix or 'nameless'} file. Expected a .csv, .parquet, .npy or .npz file.")


def _from_table(name: str, source: pa.Table | list[Path], labels: Any, like: tuple[str, ...]) -> _Raw:
    """A table with its label columns; labels that came beside it are not among them."""
    table, notes = read_table(source) if isinstance(source, list) else (source, ())
    names: Sequence[str] | None = None if labels is None else ()
    if isinstance(labels, str) and labels != "none":
        names = [labels] if labels in table.column_names else labels.split(",")
    elif isinstance(labels, list | tuple) and all(isinstance(c, str) for c in labels) and len(labels) != len(table):
        names = list(labels)
    read = values_of(name, table, names, like)
    content = partial(_files_hash, source) if isinstance(source, list) else partial(_array_hash, read.values)
    history = f"labels {','.join(names)}" if names else "without labels" if isinstance(labels, str) else ""
    columns = read.names or _numbered(read.values)
    return _Raw(name, read.values, content, columns, read.classes, history, (*notes, *read.notes))


def _numbered(array: np.ndarray) -> tuple[str, ...]:
    """Names of the columns of vectors, or of the channels of anything else."""
    return tuple(f"{'column' if array.ndim == 2 else 'channel'} {i}" for i in range(array.shape[1]))


def channels_last(shape: tuple[int, ...]) -> tuple[str, ...]:
    """What is said of [N, H, W, C], which is read as [N, C, H, W]."""
    if len(shape) != 4 or not shape[3] <= 4 < min(shape[1:3]):
        return ()
    _, c, h, w = shape
    return (
        f"The shape {tuple(shape)} is read as {c} channels of {h} x {w}. Where channels come last, pass "
        "x.transpose(0, 3, 1, 2); of RGBA pictures sb.images(x[..., :3]).",
    )


def _files_hash(paths: list[Path]) -> str:
    return hashlib.sha256("".join(file_content(path) for path in paths).encode()).hexdigest()


def _array_hash(array: np.ndarray) -> str:
    sha = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    for part in slabs(array):
        sha.update(np.ascontiguousarray(array[part]).tobytes())
    return sha.hexdigest()


def decided_by(units: Units) -> str:
    """What of the units decides the samples."""
    return " ".join("none" if v is None else digest(torch.from_numpy(v)) for v in (units.mean, units.std))


def _rows(array: np.ndarray, units: Units, index: np.ndarray) -> np.ndarray:
    """Samples at some positions, in their units, float32."""
    raw = np.asarray(array[index])
    if units.mean is not None and units.std is not None:
        mean, std = (units.along(v, array.shape[1:]) for v in (units.mean, units.std))
        raw = (raw.astype(np.float64) - mean) / std
    return raw.astype(np.float32)


@dataclass(frozen=True)
class _Pass:
    """What one pass over an array says of it.

    Attributes:
        bad: rows with NaN or infinity, and the column of the first of them.
        mean, std: float64 of every column or channel, of the other rows.
        largest: absolute value of every column or channel.
    """

    bad: np.ndarray
    column: int
    mean: np.ndarray
    std: np.ndarray
    largest: np.ndarray


def _looked_through(array: np.ndarray) -> _Pass:
    """One pass, of which ranks make a part each."""

    def look(part: slice) -> dict[str, np.ndarray]:
        values = np.asarray(array[part], np.float64)
        values = values.reshape(*values.shape[:2], -1)
        finite = np.logical_and.reduce(np.isfinite(values), axis=2)
        bad = np.flatnonzero(~finite.all(axis=1))
        column = int(np.argmin(finite[bad[0]])) if len(bad) else 0
        good = np.delete(values, bad, 0) if len(bad) else values
        count = np.array([len(good) * good.shape[2]], np.float64)
        mean = good.mean((0, 2)) if len(good) else np.zeros(good.shape[1])
        with np.errstate(over="ignore"):  # too large values are named later
            scatter = ((good - mean[:, None]) ** 2).sum((0, 2))
        largest = np.abs(good).max((0, 2)) if len(good) else np.zeros(good.shape[1])
        place = np.array([*(bad + part.start), column], np.int64)
        return {"place": place, "count": count, "mean": mean, "scatter": scatter, "largest": largest}

    parts = map_over_ranks(slabs(array), look)
    bad = np.concatenate([p["place"][:-1] for p in parts])
    column = next((int(p["place"][-1]) for p in parts if len(p["place"]) > 1), 0)
    counts = np.array([p["count"] for p in parts])
    total = max(1.0, float(counts.sum()))
    means = np.stack([p["mean"] for p in parts])
    mean = (counts * means).sum(0) / total
    scatter = sum(p["scatter"] for p in parts) + (counts * (means - mean) ** 2).sum(0)
    return _Pass(bad, column, mean, np.sqrt(scatter / total), np.stack([p["largest"] for p in parts]).max(0))


def _units(
    name: str, columns: tuple[str, ...], scale: Scale, seen: _Pass, dimensions: int
) -> tuple[Units, tuple[str, ...]]:
    """The units that a scale gives, and what was decided."""
    kind = "column" if dimensions == 2 else "channel"

    def named(i: int) -> str:
        return columns[i] if columns[i] == f"{kind} {i}" else f"the {kind} {columns[i]}"

    most = LARGEST_SCALED if isinstance(scale, str | tuple | list) else LARGEST
    if not seen.largest.max() <= most:
        first = int(seen.largest.argmax())
        raise InputError(
            f"{named(first)} of {name} holds values up to {seen.largest[first]:.3g}; expected at most "
            f"{most:g}. Measure it in another unit."
        )
    flat = seen.std <= 1e-12 * np.maximum(seen.largest, 1e-300)  # constant up to rounding
    if isinstance(scale, Images | Units):
        units, of = (scale.units, scale.name) if isinstance(scale, Images) else (scale, "its scale")
        if units is None:
            raise InputError(f"scale={of}, which are pictures. Expected a data set that samples() opened.")
        if len(units.columns) != len(columns):
            raise InputError(f"{name} has {len(columns)} {kind}s, {of} {len(units.columns)}. Expected as many.")
        return units, ()
    if scale is None:
        spread = np.where(flat, np.nan, seen.std)
        blurred = np.flatnonzero(~flat & (seen.largest * SINGLE > VISIBLE * seen.std))
        if len(blurred):
            first = int(blurred[0])
            raise InputError(
                f"{named(first)} of {name} holds values up to {seen.largest[first]:.4g} that differ by "
                f"{seen.std[first]:.3g}, which single precision cannot tell apart. Pass scale='standard' (--scale)."
            )
        units = Units(columns)
        if np.isnan(spread).all() or not np.nanmax(spread) > APART * np.nanmin(spread):
            return units, ()
        most, least = int(np.nanargmax(spread)), int(np.nanargmin(spread))
        return units, (
            f"The {kind}s' standard deviations differ by a factor of {spread[most] / spread[least]:,.0f} "
            f"({columns[most]}: {spread[most]:.3g}, {columns[least]}: {spread[least]:.3g}): the largest hide the "
            f"others. scale='standard' (--scale standard) measures every {kind} in its own standard deviation.",
        )
    if isinstance(scale, str):
        if scale != "standard":
            raise InputError(f"scale {scale!r}; expected 'standard', a pair (mean, std), or None.")
        if flat.any():
            first = int(np.flatnonzero(flat)[0])
            raise InputError(
                f"{named(first)} of {name} is constant ({seen.mean[first]:.6g}): it has no standard "
                "deviation. Leave it out, or pass scale=(mean, std)."
            )
        units = Units(columns, f"standard deviations of each {kind}", seen.mean, seen.std)
        few = ", ".join(
            f"{c} {m:.4g} +- {s:.3g}" for c, m, s in zip(columns[:SHOWN], seen.mean, seen.std, strict=False)
        )
        more = "" if len(columns) <= SHOWN else f", and {len(columns) - SHOWN} more"
        return units, (f"1 is one standard deviation of each {kind} ({few}{more}).",)
    return _given(columns, scale, kind), ()


def _given(columns: tuple[str, ...], scale: Any, kind: str) -> Units:
    """Units of a mean and a standard deviation that came with the data."""
    try:
        mean, std = (np.asarray(numpy_of(v), np.float64) for v in scale)
        mean, std = (np.broadcast_to(v.reshape(-1) if v.ndim else v, len(columns)).copy() for v in (mean, std))
    except (TypeError, ValueError):
        raise InputError(
            f"scale={str(scale)[:60]}; expected 'standard', or (mean, std) of one number or of {len(columns)}, one a "
            f"{kind}."
        ) from None
    wrong = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(std) & (std > 0)))
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"scale=(mean, std) gives the {kind} {columns[first]} {mean[first]:g} and {std[first]:g}; expected finite "
            "numbers, and a standard deviation above 0."
        )
    return Units(columns, f"(value - mean) / std of each {kind}", mean, std)
