"""Opening a data set: one reader for each kind of source, each of which makes `Images` of it.

Sources: ``"digits"`` (scikit-learn's 8 x 8 digits, split once into halves), a folder of pictures (sub-folders are
classes) or of parquet files, a ``.parquet`` file in the Hugging Face layout, a ``.npz`` or ``.npy`` array, a `datasets`
hub id; arrays, tensors, lists of pictures or arrays, and data sets of `datasets`. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
import torch

from symbreak.data.arrays import PART_BYTES, Range, check_range, from_array, from_file
from symbreak.data.folders import look_into
from symbreak.data.images import BLOCK_BYTES, BYTES, Images, Item, is_count
from symbreak.data.labels import Classes, classes_of, from_columns, labelled
from symbreak.data.parquet import Shards
from symbreak.data.pictures import Encoded, Seen, attempt, is_colour, what_is_decided
from symbreak.data.shape import shaped
from symbreak.data.tables import ARCHIVES, PACKED, is_text_table
from symbreak.runtime.errors import InputError, note
from symbreak.runtime.files import digest, file_hash
from symbreak.runtime.ranks import Arrays, agreed, map_over_ranks, shares

if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from typing_extensions import Unpack

    Source: TypeAlias = (
        str
        | Path
        | Images
        | np.ndarray
        | torch.Tensor
        | Sequence[Image.Image | np.ndarray | torch.Tensor]
        | datasets.Dataset
        | datasets.DatasetDict
    )

__all__ = ["Options", "file_content", "images", "numpy_of", "one_each"]

LOOKED_AT = 256  # pictures whose headers tell whether a data set is in colour
LARGEST = 8192  # pixels of a side
DARK = 64  # below it, pictures may be masks, or numbers of another range


class Options(TypedDict, total=False):
    """How data are read, see `images`."""

    value_range: Range | None
    skip_bad: bool
    classes: Sequence[str] | None
    pad: int | None
    limit: int | None
    batch_size: int | None
    size: int | None
    crop: int | str | None
    mode: str | None
    labels: str | Sequence[str] | Sequence[int] | np.ndarray | torch.Tensor | None
    split: str | None
    layout: str | None


def images(source: Source, **options: Unpack[Options]) -> Images:
    """Open a data set.

    Args:
        source: ``"digits"`` (the training half), ``"digits:held-out"``, ``"digits:all"``; a folder of pictures or of
            parquet files; a ``.parquet`` / ``.npz`` / ``.npy`` file; a hub id ``owner/name``; an array [N, C, H, W],
            [N, H, W, C] or [N, H, W]; a list of pictures or arrays; a data set of `datasets`.
        value_range: the values that stand for black and white. Without it: 0 .. 255 for whole numbers (0 .. 1 where
            none is above 1); of floats [-1, 1] where a value is negative by more than rounding, else [0, 1].
        skip_bad: leave unusable images out (named in ``.skipped``) instead of failing.
        classes: keep only these class names.
        pad: pad every image with black to pad x pad pixels.
        limit: keep only so many images, spread evenly over the classes.
        batch_size: images a batch; by default as many as fit 32 MiB of float32, 1,024 at most.
        size: resize to size x size pixels (Pillow's antialiased bicubic filter), after cropping.
        crop: ``"center"``, the largest square in the middle, or the pixels of its sides.
        mode: ``"RGB"`` or ``"L"`` (grey); by default RGB where pictures are in colour.
        labels: name or names of label columns, one label an image, or ``"none"``; by default a column named label, or
            the sub-folders.
        split: of a source with splits, such as ``"test"``; train without it.
        layout: of an array whose shape does not tell: ``"NHWC"``, ``"NCHW"`` or ``"NHW"``.

    Returns:
        `Images`, whose ``notes`` say what was decided.

    Raises:
        InputError: one line that says what came, what was expected and what to do.

    >>> digits = images("digits")
    >>> len(digits), digits.shape
    (898, (1, 8, 8))
    """
    for unknown in options.keys() - Options.__annotations__.keys():
        near = get_close_matches(unknown, Options.__annotations__, 1) or sorted(Options.__annotations__)
        raise InputError(f"images() has no option {unknown!r}. Expected {', '.join(near)}.")
    pad, limit, mode = options.get("pad"), options.get("limit"), options.get("mode")
    if mode is not None and mode not in ("RGB", "L"):
        raise InputError(f"mode {mode!r}; expected RGB or L (grey).")
    for name, value in (("padding to", pad), ("size of", options.get("size"))):
        if value is not None and not (is_count(value) and value <= LARGEST):
            raise InputError(f"{name} {value!r} pixels; expected one whole number, at most {LARGEST}.")
    opened = _opened(source, options)
    opened = shaped(opened, options.get("size"), options.get("crop"), mode)
    if (classes := options.get("classes")) is not None:
        opened = opened.only(classes)
        if len(opened) < 2:
            raise InputError(f"{opened.name} holds {len(opened)} images of these classes; at least 2 are needed.")
    c, h, w = opened.shape if pad is None else (opened.shape[0], pad, pad)
    size = options.get("batch_size") or max(1, min(1024, BLOCK_BYTES // (4 * c * h * w)))
    opened = replace(opened, shape=(c, h, w), pad=opened.pad if pad is None else pad, batch_size=size)
    opened = opened.usable() if options.get("skip_bad") else opened
    return opened if limit is None else opened.subset(limit)


def _opened(source: Source, options: Options) -> Images:
    """The source with its labels."""
    value_range, layout, split, labels = (
        options.get("value_range"),
        options.get("layout"),
        options.get("split"),
        options.get("labels"),
    )
    whole = isinstance(source, (Images, np.ndarray, torch.Tensor, list, tuple))  # without columns
    columns: Sequence[str] | None = None
    each: Sequence[str] | Sequence[int] | np.ndarray | torch.Tensor | None = None
    if isinstance(labels, str):
        columns = () if labels == "none" else labels.split(",") if isinstance(source, str) else (labels,)
    elif not whole and isinstance(labels, (list, tuple)) and all(isinstance(c, str) for c in labels):
        columns = [str(c) for c in labels]
    else:
        each = labels
    if isinstance(source, Images):
        if source.units is not None:
            raise InputError(f"{source.name} holds samples that are no pictures. Pass it as it is.")
        opened = source
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        if np.ma.is_masked(source):
            raise InputError(
                f"{np.ma.count_masked(source):,} values of the array are masked, and pictures have no missing pixels. "
                "Fill them, as x.filled(0) does."
            )
        opened = from_array("array", numpy_of(source), None, value_range, layout)
    elif isinstance(source, (list, tuple)):
        opened = _from_list(source, value_range, layout)
    elif isinstance(source, (str, Path)):
        opened = _open(source, value_range, layout, split, columns)
    else:
        opened = _from_datasets(source, split, columns)
    if columns and (whole or opened.labels is None or opened.name.startswith("digits")):
        raise InputError(f"{opened.name} has no columns, so labels={columns[0]!r} names none. Pass one label an image.")
    if columns == () and opened.labels is not None:
        opened = replace(opened, labels=None, classes=(), history=(*opened.history, "without labels"))
    text = f"labels {','.join(columns)}" if columns else ""
    if each is not None:
        classes, text = one_each(each, opened.name, len(opened), "image")
        opened = labelled(opened, classes)
    if text:  # splits, subsets and classes are picked by these labels, of which the pictures' content says nothing
        opened = replace(opened, history=(*opened.history, text))
    return opened


def one_each(labels: object, name: str, count: int, noun: str) -> tuple[Classes, str]:
    """The classes of one label a sample, and what a selection's history says of them.

    Raises:
        InputError: for labels of another shape.
    """
    values = numpy_of(labels)
    if values.shape != (count,):
        one = f"{'an' if noun == 'image' else 'a'} {noun}"
        raise InputError(f"labels of shape {values.shape} for {count:,} {noun}s of {name}; expected one {one}.")
    classes = classes_of(name, values)
    return classes, f"labels {digest(torch.from_numpy(classes.codes), classes.names)}"


def numpy_of(x: object) -> np.ndarray:
    """An array, a tensor of any device and layout, or a list; masked values are NaN.

    Raises:
        InputError: for a tensor that has no values to read.
    """
    if isinstance(x, torch.Tensor):
        try:
            x = x.detach().cpu()
            x = (x if x.layout == torch.strided else x.to_dense()).resolve_neg().resolve_conj()
            known = not x.is_floating_point() or x.dtype in (torch.float16, torch.float32, torch.float64)
            return np.asarray((x if known else x.float()).numpy())
        except (RuntimeError, TypeError) as error:
            raise InputError(f"a tensor of {x.dtype} on {x.device} cannot be read ({str(error)[:60]}).") from None
    if isinstance(x, list | tuple):
        return np.asarray([numpy_of(v) if isinstance(v, torch.Tensor) else v for v in x])
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        return np.where(np.ma.getmaskarray(x), np.nan, np.ma.getdata(x))
    return np.asarray(x)


def _open(
    source: str | Path, value_range: Range | None, layout: str | None, split: str | None, columns: Sequence[str] | None
) -> Images:
    if source == "":
        raise InputError("an empty path; expected digits, a folder of images, or a .parquet, .npz or .npy file.")
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if isinstance(source, str) and source in ("digits", "digits:held-out", "digits:all"):
        opened = _from_digits(source)
        there = f"The bundled {source} are read, not the folder of this name; pass ./{source} for it."
        return replace(opened, remarks=(*opened.remarks, there)) if path.exists() else opened
    if path.is_dir():
        folder = look_into(path, split)
        if folder.shards:
            shards = [path / shard for shard in folder.shards]
            return _ranged(_from_parquet(str(path), shards, columns, folder.notes), value_range)
        if columns:
            raise InputError(
                f"{path} has no columns, so labels={columns[0]!r} names none; its sub-folders are classes."
            )
        return _ranged(_from_folder(folder.path, folder.pictures, folder.notes), value_range)
    if path.is_file():
        if split is not None:
            raise InputError(f"{path} is one file, which has no splits. Leave split= (--split) out.")
        if suffix == ".parquet":
            return _ranged(_from_parquet(str(path), [path], columns, ()), value_range)
        if suffix in (".npz", ".npy"):
            return from_file(path, value_range, layout, partial(file_content, path))
        if is_text_table(path):
            raise InputError(f"{source} is a table, which holds no pictures. Open it with sb.samples(...).")
        if suffix in (*PACKED, *ARCHIVES):
            raise InputError(f"{source} is packed. Unpack it, and pass the folder or the file that is in it.")
        raise InputError(
            f"{source} is a {suffix or 'nameless'} file. Expected a folder of images or a .parquet, .npz or .npy file."
        )
    name = str(source)
    looks_like_hub = name.count("/") == 1 and not suffix and not name.startswith((".", "/", "~"))
    if looks_like_hub and not path.parent.exists():
        return _from_hub(name, split, columns)
    raise InputError(f"{source} does not exist. Pass digits, a folder of images, or a .parquet, .npz or .npy file.")


def _ranged(opened: Images, value_range: Range | None) -> Images:
    """8-bit pictures with a range of their own; those of nothing but 0 and 1 are masks."""
    if value_range is not None:
        low, high = check_range(value_range)
    elif (largest := _brightest(opened)) >= DARK:
        return opened
    elif largest == 1:
        low, high = 0.0, 1.0
        text = "The pictures looked at hold nothing but 0 and 1, which are read as black and white."
        opened = replace(opened, remarks=(*opened.remarks, text))
    else:  # 16 bits of which the lower ones are used, masks of numbered classes, or what is dark indeed
        dark = f"No picture looked at has a value above {largest}, read as 0 .. 255"
        repair = "where those are no shades, pass an array with value_range= (--range)."
        return replace(opened, remarks=(*opened.remarks, f"{dark}; {repair}"))
    history = opened.history if (low, high) == BYTES else (*opened.history, f"range {low:g},{high:g}")
    return replace(opened, scale=(high - low) / 2, offset=-(high + low) / 2, history=history)


def _brightest(opened: Images) -> int:
    """The largest value of some pictures; the first that is not dark ends the search."""
    largest = 0
    for load in islice(opened._items(0), LOOKED_AT):
        raw = load()
        largest = max(largest, 0 if isinstance(raw, Exception) else int(raw.max()))
        if largest >= DARK:
            break
    return largest


def _from_digits(source: str) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    raw = bunch.images.astype(np.uint8)
    everything = replace(
        from_array(source, raw, bunch.target),
        scale=8.0,  # values are 0 .. 16
        offset=-8.0,
        batch_size=1024,
        remarks=(),
        _content=lambda: hashlib.sha256(raw.tobytes()).hexdigest(),
    )
    if source == "digits:all":
        return everything
    train, test = everything.split(0.5)
    return test if source == "digits:held-out" else train


def _pictures(
    name: str,
    encoded: Callable[[int], Iterator[Encoded]],
    count: int,
    content: Callable[[], str],
    name_of: Callable[[int], str] = "row {}".format,
    notes: tuple[str, ...] = (),
    seen: Seen | None = None,
    threads: bool = True,
) -> Images:
    """Images of encoded pictures; their size is that of the first one that can be read.

    They are in colour where one of the first is: grey ones among them are then converted.
    """
    if count < 2:
        raise InputError(f"{name} holds {count} image{'s' * (count != 1)}; at least 2 are needed.")
    colour = is_colour(islice(encoded(0), LOOKED_AT))
    seen = seen or Seen(count, files=False)

    def items(start: int) -> Iterator[Item]:
        return (partial(attempt, data, seen, i) for i, data in enumerate(encoded(start), start))

    fault: Exception | None = None
    for load in items(0):
        raw = load()
        if not isinstance(raw, Exception):
            looked = cache(partial(what_is_decided, encoded, seen, colour, name_of))
            first = Images(
                name,
                raw.shape,
                count,
                items,
                cache(content),
                name_of,
                remarks=notes,
                _looked=looked,
                _seen=seen.whole,
                _threads=threads,
            )
            return shaped(first, None, None, "RGB", told=False) if colour else first
        fault = fault or raw
    raise InputError(
        f"{name} holds no readable image (first: {type(fault).__name__}: {str(fault)[:80]}). Expected PNG, JPEG, WebP, "
        "BMP, GIF or TIFF files."
    )


def _from_folder(path: Path, places: list[Path], notes: tuple[str, ...]) -> Images:
    files = [path / place for place in places]
    classes = tuple(sorted({p.parts[0] for p in places if len(p.parts) > 1}))
    if classes and any(len(p.parts) == 1 for p in places):  # an image beside the classes has none
        alone = sum(len(p.parts) == 1 for p in places)
        notes = (*notes, f"{alone:,} images lie beside the sub-folders, so these are not read as classes.")
        classes = ()

    seen = Seen(len(files), files=True)

    def hashed(place: tuple[int, int]) -> Arrays:
        for i in range(*place):
            seen.hash(i, files[i])
        return {"hash": seen.hashes[slice(*place)]}

    def content() -> str:
        # every process hashes the part that it reads, or has read
        parts = map_over_ranks(list(pairwise(shares(len(files)))), hashed)
        digest, hashes = hashlib.sha256(), b"".join(part["hash"].tobytes() for part in parts)
        for i, place in enumerate(places):
            digest.update(os.fsencode(place) + b"\0" + hashes[32 * i : 32 * i + 32])
        return digest.hexdigest()

    opened = _pictures(
        str(path), lambda start: iter(files[start:]), len(files), content, lambda i: str(places[i]), notes, seen
    )
    if not classes:
        return opened
    return replace(opened, labels=torch.tensor([classes.index(p.parts[0]) for p in places]), classes=classes)


def file_content(path: Path) -> str:
    """SHA-256 of a file; of a large one that of its parts' hashes, so that ranks read a part each."""
    size = path.stat().st_size
    if size <= PART_BYTES:
        return agreed(partial(file_hash, path))

    def hashed(start: int) -> Arrays:
        with path.open("rb") as stream:
            stream.seek(start)
            return {"hash": np.frombuffer(hashlib.sha256(stream.read(PART_BYTES)).digest(), np.uint8)}

    parts = map_over_ranks(range(0, size, PART_BYTES), hashed)
    return hashlib.sha256(b"".join(part["hash"].tobytes() for part in parts)).hexdigest()


def _from_parquet(name: str, paths: list[Path], columns: Sequence[str] | None, notes: tuple[str, ...]) -> Images:
    shards = Shards(paths)

    def content() -> str:
        each = [file_content(path) for path in paths]
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()

    classes = None if columns == () else shards.classes(columns)
    opened = _pictures(name, shards.encoded, len(shards), content, notes=notes)
    beside = shards.columns, lambda column: _codes(shards.classes([column]))
    return labelled(replace(opened, _columns=beside), classes)


def _codes(classes: Classes | None) -> tuple[np.ndarray, tuple[str, ...]]:
    return (np.zeros(0, np.int64), ()) if classes is None else (classes.codes, classes.names)


def _from_hub(source: str, split: str | None, columns: Sequence[str] | None) -> Images:
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:  # with it, `datasets` looks into its own cache only
        note(f"{source} is no file here; asking the Hugging Face hub for it")
    try:
        data = datasets.load_dataset(source, split=split or "train")
    except Exception as error:
        raise InputError(
            f"{source} is no file here, and the hub gave no such data set ({type(error).__name__}). "
            "Check the path or the id."
        ) from None
    return _from_datasets(data, None, columns, source)


def _from_datasets(
    data: datasets.Dataset | datasets.DatasetDict,
    split: str | None,
    columns: Sequence[str] | None,
    name: str = "data set",
) -> Images:
    """Images of a data set of `datasets`."""
    import datasets

    if isinstance(data, datasets.DatasetDict):
        wanted = "train" if split is None else split
        if wanted not in data:
            raise InputError(f"{name} has no split {wanted!r}. Pass split= with one of: {', '.join(data)}.")
        data, split = data[wanted], None
    if not isinstance(data, datasets.Dataset):
        raise InputError(
            f"data of the type {type(data).__name__}; expected a path, an array, a tensor, a list of pictures or a "
            "datasets.Dataset."
        )
    if split is not None:
        raise InputError(f"{name} is one split already. Leave split= out.")
    pictures = next((n for n, f in data.features.items() if isinstance(f, datasets.Image)), None)
    if pictures is None:
        raise InputError(f"the data set {name} has no image column; it has: {', '.join(data.column_names)}.")
    undecoded = data.with_format(None).cast_column(pictures, datasets.Image(decode=False))

    def encoded(start: int) -> Iterator[Encoded]:
        for row in undecoded.select(range(start, len(undecoded))):
            cell = row[pictures] or {}
            yield cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)

    def read(column: str) -> tuple[np.ndarray, Sequence[str]]:
        values = list(undecoded[column])
        plain = all(isinstance(v, int) for v in values)
        return np.array(values) if plain else np.array([*values, None], object)[:-1], names.get(column, ())

    names = {n: tuple(f.names) for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    kinds = {
        n: n in names or (isinstance(f, datasets.Value) and f.dtype not in ("null", "binary"))
        for n, f in data.features.items()
        if n != pictures
    }
    classes: Classes | None = None
    if columns != ():
        classes = from_columns(name, kinds, read, [next(iter(names))] if columns is None and names else columns)
    opened = _pictures(name, encoded, len(data), lambda: str(data._fingerprint))
    beside = tuple(n for n, fits in kinds.items() if fits), lambda n: _codes(from_columns(name, kinds, read, [n]))
    return labelled(replace(opened, _columns=beside), classes)


def _from_list(
    source: Sequence[Image.Image | np.ndarray | torch.Tensor], value_range: Range | None, layout: str | None
) -> Images:
    """Images of a list of Pillow's pictures, or of arrays of one shape."""
    from PIL import Image

    if all(isinstance(x, Image.Image) for x in source):
        pictures = [x for x in source if isinstance(x, Image.Image)]

        def content() -> str:
            digest = hashlib.sha256()
            for x in pictures:
                digest.update(f"{x.mode} {x.size} ".encode() + x.tobytes())
            return digest.hexdigest()

        # a picture may be in the list twice, and two threads must not decode it at once
        opened = _pictures(
            "list", lambda start: iter(pictures[start:]), len(pictures), content, "image {}".format, threads=False
        )
        return _ranged(opened, value_range)
    arrays = [numpy_of(x) for x in source if isinstance(x, (np.ndarray, torch.Tensor))]
    if len(arrays) != len(source):
        kinds = sorted({type(x).__name__ for x in source})
        raise InputError(
            f"a list of {', '.join(kinds)}; expected pictures of Pillow, or arrays or tensors of one shape."
        )
    for i, x in enumerate(arrays):
        if (x.shape, x.dtype) != (arrays[0].shape, arrays[0].dtype):
            raise InputError(
                f"array {i} of the list is {x.dtype} {x.shape}, the first {arrays[0].dtype} {arrays[0].shape}. "
                "Expected one shape and type."
            )
    return from_array("list", np.stack(arrays), None, value_range, layout)
