"""Labels as people write them (numbers, text, truth values, with gaps) to class numbers with names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from symbreak.data.images import Images
from symbreak.runtime.errors import InputError

__all__ = ["Classes", "attributes", "classes_of", "from_columns", "label_column", "labelled"]

MAX_CLASSES = 2**20
MAX_NUMBER = 2**16  # larger whole numbers are names, of which the few that there are get numbers
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@dataclass(frozen=True)
class Classes:
    """The class of every image.

    Attributes:
        codes: int64 [N]; -1 where it is missing.
        names: one a class number.
        notes: what was decided.
    """

    codes: np.ndarray
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def classes_of(source: str, values: np.ndarray, names: Sequence[str] = (), column: str = "") -> Classes:
    """Class numbers and names of labels.

    Whole numbers below 65,536 stay the class numbers that they are; text, truth values and other numbers are numbered
    in sorted order. ``None``, NaN and -1 (where a network or the hub writes it for "no label") are missing.

    Args:
        source: names the data in messages.
        values: [N] labels.
        names: of the class numbers, where the source has them.
        column: whose values they are; names the classes of truth values.

    Raises:
        InputError: for labels that are no classes.
    """
    objects = values.dtype.kind == "O"
    where = np.array([v is not None and v == v for v in values], bool) if objects else values == values  # NaN is none
    present = values[where]
    if objects and len(present):
        kinds = {type(v).__name__ for v in present}
        present = np.array(present.tolist())
        if present.ndim != 1 or (present.dtype.kind in "US" and kinds - {"str", "bytes", "str_"}):
            raise InputError(f"{source} has labels of mixed kinds ({', '.join(sorted(kinds))}); expected one.")
    codes = np.full(len(values), -1, np.int64)
    if not len(present):
        return Classes(codes, ())
    kind = present.dtype.kind
    if kind == "f" and np.isinf(present).any():
        raise InputError(f"{source} has an infinite label; expected class numbers, or NaN where there is none.")
    if kind == "b":
        plain = column in ("", *LABEL_COLUMNS)
        codes[where] = present
        return Classes(codes, ("False", "True") if plain else (f"not {column}", column))
    if kind in "iu" or (kind == "f" and bool((present == np.floor(present)).all())):
        least, most = int(present.min()), int(present.max())
        if names and len(names) <= most:
            raise InputError(f"{source} has the label {most}, but only {len(names)} class names.")
        signs = least == -1 and set(np.unique(present)) == {-1, 1}  # two classes
        if least >= -1 and most < MAX_NUMBER and not signs:
            codes[where] = present.astype(np.int64)
            return Classes(codes, tuple(names) or tuple(str(i) for i in range(most + 1)))
        if least == -1 and not signs:
            where[where] = present != -1
            present = present[present != -1]
    elif kind not in "fSU":
        raise InputError(f"{source} has labels of the type {values.dtype}; expected numbers or text.")
    unique, numbered = np.unique(present, return_inverse=True)
    if len(unique) >= MAX_CLASSES:
        raise InputError(f"{source} has {len(unique):,} different labels; expected classes below {MAX_CLASSES:,}.")
    codes[where] = numbered
    texts = tuple(v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in unique.tolist())
    if kind in "SU":
        return Classes(codes, texts)
    return Classes(codes, texts, (f"The labels {', '.join(texts[:5])} are numbered 0 .. {len(texts) - 1} in order.",))


def label_column(names: Collection[str]) -> str | None:
    """The column that is read as labels unasked: the first of `LABEL_COLUMNS`, in whatever case."""
    return next((n for c in LABEL_COLUMNS for n in names if n.lower() == c), None)


def from_columns(
    source: str,
    columns: dict[str, bool],
    read: Callable[[str], tuple[np.ndarray, Sequence[str]]],
    wanted: Sequence[str] | None,
) -> Classes | None:
    """The classes that columns of a table give; of several columns those of their combinations.

    Args:
        source: names the data in messages.
        columns: of the table, and whether their values may be classes.
        read: name -> values, names of class numbers.
        wanted: the columns; ``None`` takes the first of `LABEL_COLUMNS`.

    Raises:
        InputError: for a column that the table does not have, or that holds no classes.
    """
    may = [name for name, fits in columns.items() if fits]
    choice = f"It has: {', '.join(may[:60])}." if may else "It has no column with labels."
    if wanted is None:
        name = label_column(columns)
        if name is not None and columns[name]:
            return classes_of(source, *read(name), column=name)
        if name is None and not may:
            return None
        what = "No column is read as labels" if name is None else f"The column {name} holds no classes"
        return Classes(np.array([], np.int64), (), (f"{what}; labels= takes one. {choice}",))
    for name in wanted:
        if name not in columns:
            raise InputError(f"{source} has no label column {name!r}. {choice}")
        if not columns[name]:
            raise InputError(f"the column {name!r} of {source} holds no classes. {choice}")
    each = [classes_of(f"the column {name!r} of {source}", *read(name), column=name) for name in wanted]
    if len(each) == 1:
        return each[0]
    rows = np.stack([c.codes for c in each], 1)
    unique, numbered = np.unique(rows, axis=0, return_inverse=True)
    texts = [" and ".join(c.names[k] if k >= 0 else "" for c, k in zip(each, row, strict=True)) for row in unique]
    kept = [i for i, row in enumerate(unique) if (row >= 0).all()]
    order = np.full(len(unique), -1, np.int64)
    order[kept] = np.arange(len(kept))
    notes = (note for c in each for note in c.notes)
    return Classes(order[numbered.reshape(-1)], tuple(texts[i] for i in kept), tuple(notes))


def attributes(images: Images, names: Sequence[str] | None = None) -> dict[str, Classes]:
    """The classes of every image by each of some columns of its source, such as Male, Smiling, ...

    Args:
        images: of a parquet file, or of a data set of `datasets`.
        names: the columns; ``None`` takes all that tell exactly two classes apart.

    Raises:
        InputError: for a source without such columns, a column that it does not have, or one whose images are all of
            one class.
    """
    known, read = ((), None) if images._columns is None else images._columns
    if read is None or not known:
        raise InputError(
            f"{images.name} has no columns of attributes. Expected a parquet file with some, or labels and --labels."
        )
    out = {}
    for name in known if names is None else names:
        if name not in known:
            raise InputError(f"{images.name} has no attribute {name!r}. It has: {', '.join(known[:60])}.")
        codes, classes = read(name)
        codes = codes if images._index is None else codes[images._index]
        present = np.unique(codes[codes >= 0])
        if names is None and len(present) != 2:
            continue
        if len(present) < 2:
            only = f"are {classes[int(present[0])]!r}" if len(present) else "have no value"
            raise InputError(
                f"all {len(images):,} {images.noun} of {images.name} {only} in the attribute {name!r}: one class is "
                "empty. Expected two; choose another attribute, or more images."
            )
        out[name] = Classes(codes, classes)
    if not out:
        raise InputError(f"no column of {images.name} tells two classes apart. It has: {', '.join(known[:60])}.")
    return out


def labelled(images: Images, classes: Classes | None) -> Images:
    """Images with their classes; those without one are left out, and counted in the notes.

    Raises:
        InputError: for labels of another length.
    """
    if classes is None:
        return images
    codes, notes = classes.codes, (*images.remarks, *classes.notes)
    if not len(classes.names):
        if len(codes):
            notes = (*notes, f"All labels are missing: the {images.noun} have no classes.")
        return replace(images, labels=None, classes=(), remarks=notes)
    if len(codes) != len(images):
        raise InputError(
            f"{images.name} has {len(codes)} labels for {len(images)} {images.noun}; expected labels of shape "
            f"({len(images)},)."
        )
    missing = int((codes < 0).sum())
    if missing:
        first = images.name_of(int(np.argmin(codes)))
        left = f"{missing:,} of {len(codes):,} {images.noun} have no label and are left out; the first is {first}."
        notes = (*notes, left)
    out = replace(images, labels=torch.from_numpy(codes), classes=classes.names, remarks=notes)
    return out.take(np.flatnonzero(codes >= 0), "with a label") if missing else out
