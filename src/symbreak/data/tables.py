"""Numeric tables (.csv, .tsv, .parquet, data frames): columns of numbers, of which some may be labels."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from symbreak.data.arrays import RATIO, UNPACKED
from symbreak.data.labels import Classes, from_columns, label_column
from symbreak.data.parquet import IMAGE_COLUMNS, holds_pictures, may_be_labels, plain_values, readable, unpacked_size
from symbreak.data.pictures import can_be_opened
from symbreak.runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ARCHIVES", "PACKED", "Columns", "has_pictures", "is_text_table", "read_table", "values_of"]

CSV = (".csv", ".tsv", ".txt")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".zst")  # which are not read
PACKED: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
LOOKED_AT = 32  # cells of a column of bytes that say whether they are pictures
MOST_CLASSES = 100  # different whole numbers that a column called "label" may have, and still be read as labels unasked
INDEX = ("", "index", "id", "unnamed: 0", "__index_level_0__")  # names of columns that may only number the rows
DECIMAL_COMMA = re.compile(r"(?<![\w.,])[-+]?\d+,\d+(?![\w.,])")  # a number such as 1,5
DECIMAL_POINT = re.compile(r"\d\.\d")


@dataclass(frozen=True)
class Columns:
    """The numbers of a table.

    Attributes:
        values: float64 [N, d], or [N, *S] of one column of lists; NaN where a value is missing.
        names: of the columns [d]; none of a column of lists.
        classes: of its label columns.
        notes: what was decided.
    """

    values: np.ndarray
    names: tuple[str, ...]
    classes: Classes | None
    notes: tuple[str, ...]


def is_text_table(path: Path) -> bool:
    """Whether a file's name is that of a table of text, compressed or not."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower() in CSV


def has_pictures(path: Path) -> bool:
    """Whether a parquet file has a column of encoded pictures, or of their paths; other bytes are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(path):
        schema = pq.read_schema(path)
    paths = (pa.types.is_struct(kind) and "path" in [field.name for field in kind] for kind in schema.types)
    bytes_ = [name for name, kind in zip(schema.names, schema.types) if holds_pictures(kind)]
    named = any(name in IMAGE_COLUMNS or pa.types.is_struct(schema.field(name).type) for name in bytes_)
    if any(paths) or named or len(bytes_) == len(schema.names):
        return True
    for name in bytes_:
        with readable(path), pq.ParquetFile(path) as file:
            unpacked_size(path, file, name)
            rows = next(file.iter_batches(LOOKED_AT, columns=[name]), None)
        cells = () if rows is None else rows.column(0).to_pylist()
        if any(map(can_be_opened, cells)):
            return True
    return False


def read_table(paths: Sequence[Path]) -> tuple[pa.Table, tuple[str, ...]]:
    """One file of text, or parquet files of the same columns, and what was decided.

    Raises:
        InputError: for files that cannot be read, or whose columns differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if is_text_table(paths[0]):
        return _read_text(paths[0])
    tables: list[pa.Table] = []
    for path in paths:
        with readable(path), pq.ParquetFile(path) as file:
            for name in file.schema_arrow.names:
                unpacked_size(path, file, name)
            tables.append(file.read())
        if tables[0].schema.names != tables[-1].schema.names:
            raise InputError(f"{path} has other columns than {paths[0]}. Put them into folders of their own.")
    try:
        return pa.concat_tables(tables, promote_options="permissive"), ()
    except pa.ArrowException as error:
        raise InputError(f"{paths[0].parent}: the files differ ({str(error)[:80]}).") from None


def _read_text(path: Path) -> tuple[pa.Table, tuple[str, ...]]:
    import pyarrow as pa
    from pyarrow import csv as text

    whole = _unpacked(path)
    try:
        with path.open("rb") if whole is None else io.BytesIO(whole) as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            head = "".join(line for _, line in zip(range(20), stream, strict=False))
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8. Save it as UTF-8.") from None
    lines = head.splitlines()
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    head, above = "\n".join(lines[comments:]), lines[comments - 1].lstrip("# ") if comments else ""
    words = {len(line.split()) for line in lines[comments:]} - {0}
    # columns between blanks, as numpy.savetxt writes them
    spaced = not set(",;\t|") & set(head) and len(words) == 1 and min(words) > 1
    try:
        delimiter = " " if spaced else csv.Sniffer().sniff(head, ",;\t|").delimiter
    except csv.Error:
        delimiter = "\t" if ".tsv" in path.name.lower() else ","

    def cells(line: str) -> list[str]:
        return line.split() if spaced else next(csv.reader([line], delimiter=delimiter), [])

    comma = delimiter != "," and bool(DECIMAL_COMMA.search(head)) and not DECIMAL_POINT.search(head)
    first = cells(lines[comments]) if lines else []
    numbers = [name.replace(",", ".") if comma else name for name in first]
    bare = bool(first) and all(_is_number(name) for name in numbers)  # a table without a header
    names = cells(above) if bare and len(cells(above)) == len(first) else []  # savetxt puts it behind a #
    notes: tuple[str, ...] = ("Commas in numbers are read as decimal points.",) if comma else ()
    if bare and not names:
        notes += ("The first line holds numbers: the columns have no names.",)
    try:
        content: Path | io.BytesIO = path if whole is None else io.BytesIO(whole)
        if spaced:
            text_ = (path.read_bytes() if whole is None else whole).decode("utf-8-sig")
            rows = (" ".join(line.split()) for line in text_.splitlines()[comments:])
            content = io.BytesIO("\n".join(rows).encode())
        table = text.read_csv(
            content,
            read_options=text.ReadOptions(autogenerate_column_names=bare, skip_rows=0 if spaced else comments),
            parse_options=text.ParseOptions(delimiter=delimiter),
            convert_options=text.ConvertOptions(decimal_point="," if comma else "."),
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:120]}.") from None
    if bare:
        return table.rename_columns(names or [f"column {i}" for i in range(table.num_columns)]), notes
    table = table.rename_columns([name.strip() for name in table.column_names])
    # a delimiter at the end of every line
    if table.num_columns and table.column_names[-1] == "" and table.column(-1).null_count == len(table):
        table = table.remove_column(table.num_columns - 1)
    return table, notes


def _unpacked(path: Path) -> bytes | None:
    """The content of a compressed table; ``None`` for a plain one.

    Raises:
        InputError: where it is damaged, or unpacks to far more than it holds.
    """
    unpack = PACKED.get(path.suffix.lower())
    if unpack is None:
        return None
    most = max(UNPACKED, RATIO * path.stat().st_size)
    try:
        with unpack(path) as stream:
            content: bytes = stream.read(most + 1)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked ({type(error).__name__}). Pack it again, or unpack it.") from None
    if len(content) > most:
        raise InputError(f"{path} unpacks to more than {most:,} bytes. Unpack it, and pass the table.")
    return content


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def values_of(source: str, table: pa.Table, wanted: Sequence[str] | None, like: tuple[str, ...] = ()) -> Columns:
    """The numbers of a table, and the classes that its label columns give.

    Args:
        source: names the data in messages.
        table: the table.
        wanted: label columns; ``()`` for none, ``None`` for one called label, class, target, ...
        like: names of the columns to take, in this order, where the table has them all; by default all.

    Raises:
        InputError: for a column that is not there, text among the numbers, or no numbers at all.
    """
    names = table.column_names
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise InputError(f"{source} has two columns {twice!r}. Give every column a name of its own.")
    notes: list[str] = []
    if wanted is None:
        wanted, notes = _labels_by_name(table)
    classes = None
    if wanted:
        columns = {name: may_be_labels(table.field(name).type) for name in names}
        classes = from_columns(source, columns, lambda name: (plain_values(table.column(name).chunks), ()), wanted)
        notes += classes.notes if classes is not None else ()
        classes = None if classes is None else replace(classes, notes=())
    rest = [name for name in names if name not in (wanted or ())]
    blobs = [name for name in rest if holds_pictures(table.field(name).type)]
    if blobs and set(rest) - set(blobs):
        rest = [name for name in rest if name not in blobs]
        notes.append(
            f"The columns {', '.join(map(repr, blobs[:5]))} hold bytes, which are no numbers, and are left out."
        )
    if set(like) & set(rest):
        missing = next((n for n in like if n not in rest), None)
        if missing is not None:
            raise InputError(
                f"{source} has no column {missing!r}, which the data have. It has: {', '.join(names[:60])}."
            )
        left = [n for n in rest if n not in like]
        notes += (
            [f"The columns {', '.join(left[:5])} are not among those of the data and are left out."] if left else []
        )
        rest = list(like)
    for name in [n for n in rest if n.lower() in INDEX and n not in like]:
        values = _numbers(source, table, name)
        whole = values.ndim == 1 and len(values) > 1 and np.array_equal(values, np.floor(values))
        if whole and len(np.unique(values)) == len(values):  # shuffled and filtered rows keep their numbers
            notes.append(f"The column {name!r} only numbers the rows and is left out.")
            rest.remove(name)
    if not rest:
        raise InputError(f"{source} has no columns of numbers beside the labels; it has: {', '.join(names[:20])}.")
    each = [_numbers(source, table, name) for name in rest]
    lists = next((name for name, v in zip(rest, each, strict=True) if v.ndim > 1), None)
    if lists is not None:
        if len(rest) > 1:
            raise InputError(
                f"{source} has a column of lists, {lists!r}, beside {len(rest) - 1} others. Expected numbers in every "
                "column, or one column of lists."
            )
        return Columns(each[0], (), classes, tuple(notes))
    return Columns(np.stack(each, 1), tuple(rest), classes, tuple(notes))


def _labels_by_name(table: pa.Table) -> tuple[tuple[str, ...], list[str]]:
    """The column that is read as labels unasked, and what is said of it."""
    name = label_column(table.column_names)
    if name is None:
        return (), []
    different = len(table.column(name).unique())
    if not may_be_labels(table.field(name).type) or different > MOST_CLASSES:
        few = f"The column {name} holds {different:,} different values: it is read as numbers, not as classes."
        return (), [f"{few} labels={name} (--labels {name}) reads it as classes."]
    return (name,), [f"The column {name} is read as labels; labels=none (--labels none) reads it as numbers."]


def _numbers(source: str, table: pa.Table, name: str) -> np.ndarray:
    """A column as float64 [N], or [N, *S] where its values are lists.

    Raises:
        InputError: for anything but numbers; of text the first row is named.
    """
    import pyarrow as pa
    import pyarrow.types as t

    column = table.column(name)
    kind = column.type
    if t.is_dictionary(kind):
        kind, column = kind.value_type, column.cast(kind.value_type)
    if t.is_boolean(kind):
        column = column.cast(pa.int8())
    elif t.is_list(kind) or t.is_fixed_size_list(kind) or t.is_large_list(kind):
        try:
            return np.asarray(column.to_pylist(), np.float64)
        except (TypeError, ValueError):
            raise InputError(
                f"the column {name!r} of {source} holds lists of different lengths, or not of numbers. Expected lists "
                "of one length."
            ) from None
    elif t.is_null(kind):
        return np.full(len(column), np.nan)
    elif not (t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind)):
        texts = column.to_pylist()
        for row, value in enumerate(texts):
            if value is not None and not (isinstance(value, str) and (not value.strip() or _is_number(value))):
                raise InputError(
                    f"row {row} of {source} holds {str(value)[:40]!r} in the column {name!r}; expected a number. "
                    f"Repair it, drop the column, or read it as labels with labels={name} (--labels {name})."
                )
        return np.array([float(v) if v is not None and v.strip() else np.nan for v in texts])
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
