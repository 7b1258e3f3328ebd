"""Arrays of images: which axes, and which values are black and white."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np

from symbreak.data.images import BLOCK_BYTES, BYTES, Images
from symbreak.data.labels import classes_of, labelled
from symbreak.runtime.errors import InputError
from symbreak.runtime.ranks import map_over_ranks

__all__ = ["Range", "from_array", "from_file", "load_array", "slabs"]

PART_BYTES = 64 * 2**20  # a larger array of an archive is mapped instead of read
UNPACKED = 2**28  # bytes that a packed array, or a row group of parquet, may always unpack to, and ...
RATIO = 100  # ... times its packed size
ROUNDING = 0.01  # part of the range by which resizing and rounding go beyond it
KEYS = ("images", "x", "data", "arr_0", "x_train", "X", "samples")  # names of the array in an archive
LABEL_KEYS = ("labels", "label", "y", "y_train", "target")
Range = tuple[float, float]
LAYOUTS = {"NHW": (0, None, 1, 2), "NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2)}


def from_file(path: Path, value_range: Range | None, layout: str | None, content: Callable[[], str]) -> Images:
    """Images of a ``.npy`` or ``.npz`` file, see `load_array`."""
    return from_array(str(path), *load_array(path), value_range, layout, content)


def load_array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of a ``.npy`` or ``.npz`` file, large ones mapped, and its labels where it has some.

    Nothing is unpickled, and what unpacks to far more is not read.

    Raises:
        InputError: for a file that holds no plain array.
    """
    labels = None
    try:
        if path.suffix.lower() == ".npy":
            with np.errstate(over="ignore"):  # a declared shape beyond every file
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as archive:
                names = list(archive.files)
                key = next((k for k in KEYS if k in names), None)
                if key is None:
                    raise InputError(f"{path} holds {', '.join(names[:8])}; expected an array named 'images'.")
                array = _mapped(path, _members(archive).get(f"{key}.npy"))
                array = _unpacked(path, archive, key) if array is None else array
                tag = next((k for k in LABEL_KEYS if k in names), None)
                labels = None if tag is None else _unpacked(path, archive, tag)
                if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:  # a column, as MedMNIST has it
                    labels = labels[:, 0]
        if not all(isinstance(a, (np.ndarray, type(None))) for a in (array, labels)):
            raise InputError(f"{path} holds no plain array. Expected a {path.suffix} file that numpy wrote.")
    except InputError:
        raise
    except Exception as error:
        pickled = "pickle" in str(error) or "Python objects" in str(error)
        what = "holds pickled objects, which are never loaded" if pickled else "cannot be read"
        raise InputError(f"{path} {what} ({type(error).__name__}). Expected a plain numeric array.") from None
    return array, labels


def _members(archive: np.lib.npyio.NpzFile) -> dict[str, zipfile.ZipInfo]:
    return {} if archive.zip is None else archive.zip.NameToInfo


def _unpacked(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """An array of an archive, unless it unpacks to far more than the file holds."""
    members = _members(archive)
    info = members.get(f"{key}.npy") or members.get(key)
    if info is not None and info.file_size > max(UNPACKED, RATIO * info.compress_size):
        raise InputError(
            f"{path}: {key} unpacks from {info.compress_size:,} to {info.file_size:,} bytes; the limit is {RATIO} "
            f"times, or {UNPACKED:,} bytes. Save it with numpy.savez, which does not pack."
        )
    return np.asarray(archive[key])


def _mapped(path: Path, info: zipfile.ZipInfo | None) -> np.ndarray | None:
    """A large array of an .npz that is stored as it is, as a memory map, whose checksum is not checked.

    ``None`` where it is small, compressed or pickled.
    """
    if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size <= PART_BYTES:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the lengths of name and extra field, which come before the content
        content = file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        start = file.tell()
    if dtype.hasobject or math.prod(shape) == 0:
        return None
    if start - content + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} does not have the size it declares")
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def from_array(
    name: str,
    array: np.ndarray,
    labels: np.ndarray | None = None,
    value_range: Range | None = None,
    layout: str | None = None,
    content: Callable[[], str] | None = None,
) -> Images:
    """Images of an array.

    Args:
        name: of the data, in messages.
        array: [N, H, W], [N, H, W, C] or [N, C, H, W], of whole numbers, floats or truth values; or a memory map.
        labels: [N].
        value_range: the values that stand for black and white.
        layout: ``"NHW"``, ``"NHWC"`` or ``"NCHW"``, where the shape does not tell.
        content: hash of the file that it came from.

    Raises:
        InputError: for another shape or type; for a shape or a range that may mean two things.
    """
    layout, notes = _layout(name, array.shape, layout)
    count = len(array)
    if count < 2:
        raise InputError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed.")
    if array.size == 0:
        raise InputError(f"{name} has the shape {tuple(array.shape)}: the images have no pixels.")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype} values; expected 8-bit integers or floats.")
    low, high, clip, remarks = _range_of(name, array, value_range)
    axes = LAYOUTS[layout]
    ordered = array[:, None] if axes[1] is None else array.transpose([a for a in axes if a is not None])
    integer = array.dtype == np.uint8 and (low, high) == BYTES

    def load(i: int) -> np.ndarray:
        raw = np.asarray(ordered[i])
        if integer:
            return raw
        raw = raw.astype(np.float32)
        return raw.clip(low, high) if clip else raw

    opened = Images(
        name,
        load(0).shape,
        count,
        _items=lambda start: (partial(load, i) for i in range(start, count)),
        # the same numbers in another range are other images
        _content=cache(lambda: f"{content() if content else _array_hash(array)} {low} {high}"),
        scale=(high - low) / 2,
        offset=-(high + low) / 2,
        integer=integer,
        remarks=(*notes, *remarks),
    )
    if labels is None:
        return opened
    if labels.shape != (count,):
        raise InputError(f"{name} has labels of shape {labels.shape} for {count} images; expected ({count},).")
    return labelled(opened, classes_of(name, labels))


def _layout(name: str, shape: tuple[int, ...], layout: str | None) -> tuple[str, tuple[str, ...]]:
    """The layout of an array, and what was decided about it."""
    said = f"{name} has the shape {tuple(shape)}"
    if layout is not None:
        layout = layout.upper()
        if layout not in LAYOUTS:
            raise InputError(f"layout {layout}; expected NHW, NHWC or NCHW.")
        channels = 1 if layout == "NHW" else shape[layout.index("C")] if len(shape) == 4 else 0
        if len(shape) != len(layout) or channels not in (1, 3):
            raise InputError(f"{said}, which cannot be {layout} with 1 or 3 channels. Pass another layout.")
        return layout, ()
    if len(shape) == 3:
        if shape[-1] in (3, 4) and min(shape[:2]) >= 8:
            raise InputError(
                f"{said}: one picture of {shape[-1]} channels, or {shape[0]} images {shape[-1]} pixels wide? Pass "
                "images in one array [N, H, W, C], or layout=NHW (--layout)."
            )
        return "NHW", ()
    fits = [kind for kind, axis in (("NHWC", -1), ("NCHW", 1)) if len(shape) == 4 and shape[axis] in (1, 3)]
    if not fits:
        raise InputError(
            f"{said}. Expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels. What is no pictures, such "
            "as rows of a table, is opened with sb.samples(array, scale='standard') (--scale standard)."
        )
    if len(fits) == 2:
        raise InputError(f"{said}, which may be NCHW or NHWC. Say which with layout=NCHW (--layout NCHW).")
    return fits[0], (f"The shape {tuple(shape)} is read as {fits[0]}.",) if fits[0] == "NHWC" else ()


def _range_of(name: str, array: np.ndarray, value_range: Range | None) -> tuple[float, float, bool, tuple[str, ...]]:
    """Values that stand for black and white, whether to clip to them, and what was decided."""
    whole_numbers = array.dtype.kind in "biu"
    if value_range is not None:
        low, high = check_range(value_range)
        # declared so, all would be black
        if (low, high) == BYTES and not array.dtype.kind == "b" and (largest := _largest(array)) <= 1:
            raise InputError(
                f"{name} has no value above {largest:g}, declared as 0 .. 255. Pass its true range, 0,1 or -1,1."
            )
        return low, high, False, ()
    if whole_numbers:
        largest = 1.0 if array.dtype.kind == "b" else _largest(array)
        if largest > 1:
            dark = f"No value is above {largest:g}, read as 0 .. 255; pass the true range with value_range= (--range)."
            return *BYTES, False, (dark,) if largest < 64 else ()
        least = 0.0 if array.dtype.kind in "bu" else _ends(array)[0]
        if (least, largest) == (0, 0):
            return *BYTES, False, ()
        low = 0.0 if least == 0 else -1.0
        return low, 1.0, False, (f"All values are whole numbers {least:g} .. {largest:g}, read as {low:g} .. 1.",)
    least, largest = _ends(array)
    if -0.5 < least < -ROUNDING:
        raise InputError(
            f"{name} has values {least:g} .. {largest:g}, which fill neither -1 .. 1 nor 0 .. 1. Pass the values of "
            "black and white with value_range= (--range -1,1 or 0,1)."
        )
    low = -1.0 if least < -ROUNDING else 0.0
    beyond = (low - ROUNDING <= least < low, 1 < largest <= 1 + ROUNDING)
    note = f"The values {least:g} .. {largest:g} are read as {low:g} .. 1"
    return low, 1.0, any(beyond), (note + ("; what is beyond by rounding is clipped." if any(beyond) else "."),)


def check_range(value_range: Range) -> Range:
    """A range as floats.

    Raises:
        InputError: where it is empty or endless.
    """
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        raise InputError(f"value_range {value_range!r}; expected two numbers, (low, high).") from None
    if not (math.isfinite(high - low) and (high - low) / 2 > 0):
        raise InputError(f"--range {low:g},{high:g} is empty or endless; expected LOW,HIGH with LOW < HIGH.")
    return low, high


def slabs(array: np.ndarray) -> list[slice]:
    """Pieces of an array small enough to look at one at a time (the array may be a memory map)."""
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return [slice(start, start + step) for start in range(0, len(array), step)]


def _ends(array: np.ndarray) -> Range:
    """The smallest and the largest number, NaN passed by; ranks look at a part each."""

    def ends(part: slice) -> dict[str, np.ndarray]:
        values = np.asarray(array[part], np.float64)
        return {"ends": np.array([np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)])}

    table = np.stack([part["ends"] for part in map_over_ranks(slabs(array), ends)])
    return float(np.fmin.reduce(table[:, 0])), float(np.fmax.reduce(table[:, 1]))


def _largest(array: np.ndarray) -> float:
    """The largest number; beyond 64 one is enough to tell 8-bit images, and no further is looked for."""
    largest = -math.inf
    for part in slabs(array):
        largest = max(largest, float(np.fmax.reduce(np.asarray(array[part]), axis=None)))
        if largest >= 64:
            break
    return largest


def _array_hash(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in slabs(array):
        digest.update(np.asarray(array[part], dtype=np.float64).tobytes())
    return digest.hexdigest()
