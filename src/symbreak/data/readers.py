"""Opening a data set: one reader for each kind of source, each of which makes `Images` of it.

Sources: ``"digits"`` (scikit-learn's 8 x 8 digits, split once into halves), a folder of images
(sub-folders are classes), a ``.parquet`` file in the Hugging Face layout, a ``.npz`` or ``.npy``
array, a `datasets` hub id. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from symbreak.data.images import BLOCK_BYTES, Images, Item, Raw
from symbreak.runtime.errors import InputError
from symbreak.runtime.files import file_hash
from symbreak.runtime.ranks import agreed, map_over_ranks

__all__ = ["images"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
HASHED = 1000  # files that one process hashes at a time
PART_BYTES = 64 * 2**20  # of a file; a larger one is hashed in parts, and mapped instead of read
MAX_CLASSES = 2**20
MAX_PIXELS = 64 * 2**20  # an image beyond this is a bomb or a mistake
BYTES = (0.0, 255.0)  # range of 8-bit values
Range = tuple[float, float]


def images(
    source: str | Path | Images | np.ndarray | torch.Tensor,
    *,
    value_range: Range | None = None,
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
        opened = source
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
        opened = _from_array("array", array, None, value_range)
    else:
        opened = _open(str(source), value_range)
    if classes is not None:
        opened = opened.only(classes)
    if pad is not None and not 0 < pad <= 8192:
        raise InputError(f"padding to {pad} pixels; expected a size between the image's own and 8192.")
    c, h, w = opened.shape if pad is None else (opened.shape[0], pad, pad)
    size = batch_size or max(1, min(1024, BLOCK_BYTES // (4 * c * h * w)))
    opened = replace(opened, shape=(c, h, w), pad=opened.pad if pad is None else pad, batch_size=size)
    opened = opened.usable() if skip_bad else opened
    return opened if limit is None else opened.subset(limit)


def _open(source: str, value_range: Range | None) -> Images:
    if source in ("digits", "digits:held-out", "digits:all"):
        return _from_digits(source)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if suffix == ".parquet":
            return _from_parquet(path)
        if suffix in (".npz", ".npy"):
            return _from_numpy(path, value_range)
        raise InputError(
            f"{source} is a {suffix or 'nameless'} file. Expected a folder of images or a .parquet, .npz or .npy file."
        )
    looks_like_hub = source.count("/") == 1 and not suffix and not source.startswith((".", "/", "~"))
    if looks_like_hub and not path.parent.exists():
        return _from_hub(source)
    raise InputError(f"{source} does not exist. Pass digits, a folder of images, or a .parquet, .npz or .npy file.")


def _from_digits(source: str) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    raw = bunch.images.astype(np.uint8)
    everything = replace(
        _from_array(source, raw, bunch.target, None),
        scale=8.0,  # values are 0 .. 16
        offset=-8.0,
        batch_size=1024,
        _content=lambda: hashlib.sha256(raw.tobytes()).hexdigest(),
    )
    if source == "digits:all":
        return everything
    train, test = everything.split(0.5)
    return test if source == "digits:held-out" else train


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


def _encoded(
    name: str,
    items: Callable[[int], Iterator[Item]],
    count: int,
    content: Callable[[], str],
    labels: torch.Tensor | None,
    classes: tuple[str, ...],
    name_of: Callable[[int], str] = "row {}".format,
) -> Images:
    """Images of encoded pictures; their shape is that of the first one that can be read."""
    _enough(name, count)
    for load in items(0):
        raw = load()
        if not isinstance(raw, Exception):
            return Images(name, raw.shape, count, items, content, name_of, labels, classes)
    raise InputError(f"{name} holds no readable image. Expected PNG, JPEG, WebP, BMP, GIF or TIFF files.")


def _enough(name: str, count: int) -> None:
    if count < 2:
        raise InputError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed.")


def _from_folder(path: Path) -> Images:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"{path} holds no images. Expected PNG, JPEG, WebP, BMP, GIF or TIFF files in it.")
    places = [p.relative_to(path) for p in files]
    classes = tuple(sorted({p.parts[0] for p in places if len(p.parts) > 1}))
    if any(len(p.parts) == 1 for p in places):  # an image beside the classes has none
        classes = ()
    labels = torch.tensor([classes.index(p.parts[0]) for p in places]) if classes else None

    def items(start: int) -> Iterator[Item]:
        return (partial(_attempt, file) for file in files[start:])

    def hashed(start: int) -> bytes:
        return b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files[start : start + HASHED])

    def content() -> str:
        digest, hashes = hashlib.sha256(), _hashes(range(0, len(files), HASHED), hashed)
        for i, place in enumerate(places):
            digest.update(os.fsencode(place) + b"\0" + hashes[32 * i : 32 * i + 32])
        return digest.hexdigest()

    return _encoded(str(path), items, len(files), content, labels, classes, lambda i: str(places[i]))


def _hashes(starts: Sequence[int], hashed: Callable[[int], bytes]) -> bytes:
    """The hashes of pieces of a source, one after the other; every process makes a part of them."""
    parts = map_over_ranks(starts, lambda start: {"hash": np.frombuffer(hashed(start), np.uint8)})
    return b"".join(part["hash"].tobytes() for part in parts)


def _content(path: Path) -> str:
    """SHA-256 of a file; of a large one that of its parts' hashes, so that ranks read a part each."""
    size = path.stat().st_size
    if size <= PART_BYTES:
        return agreed(partial(file_hash, path))

    def hashed(start: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(PART_BYTES)).digest()

    return hashlib.sha256(_hashes(range(0, size, PART_BYTES), hashed)).hexdigest()


def _from_parquet(path: Path) -> Images:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file ({str(error)[:80]}).") from None
    types = {field.name: field.type for field in schema}
    column = next((name for name in types if name in ("image", "img")), None)
    if column is None or not (pa.types.is_struct(types[column]) or pa.types.is_binary(types[column])):
        raise InputError(
            f"{path} has the columns {', '.join(schema.names[:8])}; expected 'image' with encoded bytes "
            "(the Hugging Face layout image: {bytes, path}, label)."
        )
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    label = next((name for name in types if name in ("label", "labels", "fine_label")), None)
    if label is not None and pa.types.is_integer(types[label]):
        try:
            values = file.read(columns=[label]).column(0).to_numpy()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} has damaged labels ({str(error)[:80]}).") from None
        if len(values) and values.min() >= 0:
            most = int(values.max())
            if most >= MAX_CLASSES:
                raise InputError(f"{path} has the label {most}; expected class numbers below {MAX_CLASSES:,}.")
            labels = torch.from_numpy(values.astype(np.int64))
            classes = _label_names(schema.metadata, label) or tuple(str(i) for i in range(most + 1))
            if len(classes) <= most:
                raise InputError(f"{path} has the label {most}, but only {len(classes)} class names.")

    def items(start: int) -> Iterator[Item]:
        try:
            with pq.ParquetFile(path) as stream:
                groups = range(stream.num_row_groups)
                ends = np.cumsum([stream.metadata.row_group(g).num_rows for g in groups])
                skipped = int(np.searchsorted(ends, start, side="right"))  # row groups before the first row
                index = int(ends[skipped - 1]) if skipped else 0
                for batch in stream.iter_batches(batch_size=512, row_groups=list(groups[skipped:]), columns=[column]):
                    for cell in batch.column(0).slice(max(0, start - index)).to_pylist():
                        yield partial(_attempt, cell.get("bytes") if isinstance(cell, dict) else cell)
                    index += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is a damaged parquet file ({str(error)[:80]}).") from None

    return _encoded(str(path), items, file.metadata.num_rows, partial(_content, path), labels, classes)


def _label_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Class names from the Hugging Face schema metadata of a parquet file, if it has any."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(n) for n in info["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _from_hub(source: str) -> Images:
    import datasets

    try:
        data = datasets.load_dataset(source, split="train")
        column = next(n for n, f in data.features.items() if isinstance(f, datasets.Image))
    except StopIteration:
        raise InputError(f"the data set {source} has no image column.") from None
    except Exception as error:
        raise InputError(
            f"{source} is no file here, and the hub gave no such data set ({type(error).__name__}). "
            "Check the path or the id."
        ) from None
    undecoded = data.cast_column(column, datasets.Image(decode=False))
    label = next((n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)), None)
    labels = None if label is None else torch.tensor(data[label])
    classes = () if label is None else tuple(data.features[label].names)

    def items(start: int) -> Iterator[Item]:
        for row in undecoded.select(range(start, len(undecoded))):
            yield partial(_attempt, row[column]["bytes"] or Path(row[column]["path"]))

    return _encoded(source, items, len(data), lambda: str(data._fingerprint), labels, classes)


def _from_numpy(path: Path, value_range: Range | None) -> Images:
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
                array = _mapped(path, archive.zip.NameToInfo.get(f"{key}.npy"))
                array = archive[key] if array is None else array
                tag = next((k for k in ("labels", "label", "y", "y_train") if k in names), None)
                labels = None if tag is None else archive[tag]
        if not all(isinstance(a, (np.ndarray, type(None))) for a in (array, labels)):
            raise InputError(f"{path} holds no plain array. Expected a {path.suffix} file that numpy wrote.")
    except InputError:
        raise
    except Exception as error:
        pickled = "pickle" in str(error) or "Python objects" in str(error)
        what = "holds pickled objects, which are never loaded" if pickled else "cannot be read"
        raise InputError(f"{path} {what} ({type(error).__name__}). Expected a plain numeric array.") from None
    return _from_array(str(path), array, labels, value_range, partial(_content, path))


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


def _from_array(
    name: str,
    array: np.ndarray,
    labels: np.ndarray | None,
    value_range: Range | None,
    content: Callable[[], str] | None = None,
) -> Images:
    if array.ndim == 3:
        ordered = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        ordered = array.transpose(0, 3, 1, 2)
    elif array.ndim == 4 and array.shape[1] in (1, 3):
        ordered = array
    else:
        raise InputError(
            f"{name} has the shape {tuple(array.shape)}. Expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 "
            "channels."
        )
    count = len(array)
    _enough(name, count)
    if array.size == 0:
        raise InputError(f"{name} has the shape {tuple(array.shape)}: the images have no pixels.")
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise InputError(f"{name} holds {array.dtype} values; expected 8-bit integers or floats.")
    low, high = _range_of(name, array, value_range)
    integer = array.dtype == np.uint8 and (low, high) == BYTES

    def load(i: int) -> np.ndarray:
        raw = np.asarray(ordered[i])
        return raw if integer else raw.astype(np.float32)

    classes: tuple[str, ...] = ()
    tags = None
    if labels is not None:
        if labels.shape != (count,):
            raise InputError(f"{name} has labels of shape {labels.shape} for {count} images; expected ({count},).")
        if labels.dtype.kind not in "biufSU":
            raise InputError(f"{name} has labels of the type {labels.dtype}; expected numbers or text.")
        values, codes = np.unique(labels, return_inverse=True)
        classes, tags = tuple(str(v) for v in values), torch.from_numpy(codes.astype(np.int64))
    return Images(
        name,
        load(0).shape,
        count,
        _items=lambda start: (partial(load, i) for i in range(start, count)),
        # the same numbers in another range are other images
        _content=lambda: f"{content() if content else _array_hash(array)} {low} {high}",
        labels=tags,
        classes=classes,
        scale=(high - low) / 2,
        offset=-(high + low) / 2,
        integer=integer,
    )


def _range_of(name: str, array: np.ndarray, value_range: Range | None) -> Range:
    """Lowest and highest value that stand for black and white."""
    whole_numbers = np.issubdtype(array.dtype, np.integer)
    if value_range is None:
        return BYTES if whole_numbers else (-1.0, 1.0) if _extreme(array, np.fmin) < 0 else (0.0, 1.0)
    low, high = map(float, value_range)
    if not (math.isfinite(high - low) and (high - low) / 2 > 0):
        raise InputError(f"--range {low:g},{high:g} is empty or endless; expected LOW,HIGH with LOW < HIGH.")
    if (low, high) == BYTES and not whole_numbers:
        largest = _extreme(array, np.fmax)
        if largest <= 1:  # declared so, all would be black
            raise InputError(
                f"{name} has no value above {largest:g}, declared as 0 .. 255. Pass its true range, 0,1 or -1,1."
            )
    return low, high


def _slabs(array: np.ndarray) -> list[slice]:
    """Pieces of an array small enough to look at one at a time (the array may be a memory map)."""
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return [slice(start, start + step) for start in range(0, len(array), step)]


def _extreme(array: np.ndarray, of: np.ufunc) -> float:
    """The smallest (``np.fmin``) or largest (``np.fmax``) number, NaN passed by; ranks look at a part each."""
    parts = map_over_ranks(
        _slabs(array), lambda part: {"end": of.reduce(np.asarray(array[part], np.float64), axis=None)}
    )
    return float(of.reduce([part["end"] for part in parts]))


def _array_hash(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in _slabs(array):
        digest.update(np.asarray(array[part], dtype=np.float64).tobytes())
    return digest.hexdigest()
