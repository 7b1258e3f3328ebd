"""Parquet files in the Hugging Face layout, one or many: a column of encoded pictures, and columns of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from symbreak.data.arrays import RATIO, UNPACKED
from symbreak.data.labels import Classes, from_columns
from symbreak.data.pictures import Encoded
from symbreak.runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["IMAGE_COLUMNS", "Shards", "holds_pictures", "may_be_labels", "plain_values", "readable", "unpacked_size"]

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
BATCH_BYTES = 2**27  # that a batch of rows may take at most, however often its dictionary repeats a value


class Shards:
    """The rows of parquet files with the same columns, in the order of the files.

    Args:
        paths: of the files.

    Raises:
        InputError: for files that are damaged, differ, hold no pictures, or unpack to far more than they hold.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self.paths = paths
        schemas, self.rows = [], []
        for path in paths:
            with readable(path), pq.ParquetFile(path) as file:
                schemas.append(file.schema_arrow)
                self.rows.append(file.metadata.num_rows)
        self.schema = schemas[0]
        self.name = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self.column = self._pictures()
        for path, schema in zip(paths, schemas, strict=True):
            if schema.names != self.schema.names or schema.field(self.column).type != self._type(self.column):
                raise InputError(f"{path} has other columns than {paths[0]}. Put them into folders of their own.")

    def __len__(self) -> int:
        return sum(self.rows)

    def _type(self, column: str) -> pa.DataType:
        return self.schema.field(column).type

    def _pictures(self) -> str:
        """The column of encoded pictures."""
        fit = [name for name in self.schema.names if holds_pictures(self._type(name))]
        named = [name for name in IMAGE_COLUMNS if name in fit]
        if not fit and any(str(self._type(name)).startswith("struct") for name in self.schema.names):
            raise InputError(
                f"{self.name} holds paths of pictures, not the pictures. Pass the folder that they are in."
            )
        if not named and len(fit) != 1:
            raise InputError(
                f"{self.name} has the columns {', '.join(self.schema.names[:8])}; expected 'image' with encoded bytes "
                "(the Hugging Face layout image: {bytes, path}, label)."
            )
        return (named or fit)[0]

    def encoded(self, start: int) -> Iterator[Encoded]:
        """The encoded pictures from a row on; row groups before it are not read."""
        import pyarrow.parquet as pq

        ends = np.cumsum(self.rows)
        for path, rows, end in zip(self.paths, self.rows, ends, strict=True):
            first = max(0, start - int(end - rows))
            if first >= rows:
                continue
            with readable(path), pq.ParquetFile(path) as file:
                groups = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
                skipped = int(np.searchsorted(groups, first, side="right"))
                index = int(groups[skipped - 1]) if skipped else 0
                largest = unpacked_size(path, file, self.column)
                for batch in file.iter_batches(
                    batch_size=max(1, min(512, BATCH_BYTES // max(1, largest))),
                    row_groups=list(range(skipped, file.num_row_groups)),
                    columns=[self.column],
                ):
                    for cell in batch.column(0).slice(max(0, first - index)).to_pylist():
                        yield cell.get("bytes") if isinstance(cell, dict) else cell
                    index += len(batch)

    def classes(self, wanted: Sequence[str] | None) -> Classes | None:
        """The classes that label columns give, see `from_columns`."""
        columns = {name: may_be_labels(self._type(name)) for name in self.schema.names if name != self.column}
        return from_columns(self.name, columns, self._values, wanted)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that may be labels."""
        return tuple(name for name in self.schema.names if name != self.column and may_be_labels(self._type(name)))

    def _values(self, column: str) -> tuple[np.ndarray, Sequence[str]]:
        """The labels of a column, and names of class numbers where the file has them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        chunks: list[pa.Array] = []
        for path in self.paths:
            # a text that is repeated a million times is read once
            with readable(path), pq.ParquetFile(path, read_dictionary=[column]) as file:
                unpacked_size(path, file, column)
                chunks += [
                    chunk.dictionary_encode() if pa.types.is_string(chunk.type) else chunk
                    for chunk in file.read(columns=[column]).column(0).chunks
                ]
        return plain_values(chunks), _names(self.schema.metadata, column)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever Arrow meets in a damaged file becomes one line."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file, or damaged ({str(error)[:80]}).") from None


def holds_pictures(kind: pa.DataType) -> bool:
    if str(kind).startswith("struct"):
        return any(field.name == "bytes" and holds_pictures(field.type) for field in kind)
    return str(getattr(kind, "value_type", kind)) in ("binary", "large_binary", "binary_view")


def may_be_labels(kind: pa.DataType) -> bool:
    import pyarrow.types as t

    if t.is_dictionary(kind):
        return may_be_labels(kind.value_type)
    texts = str(kind) in ("string", "large_string", "string_view")
    return bool(texts or t.is_integer(kind) or t.is_boolean(kind) or t.is_floating(kind))


def plain_values(chunks: Sequence[pa.Array]) -> np.ndarray:
    """The values of a column; those of one with missing values as objects, ``None`` among them."""
    values = [_plain(chunk) for chunk in chunks]
    if any(v.dtype.kind == "O" for v in values):
        values = [v.astype(object) for v in values]
    return np.concatenate(values) if values else np.array([])


def _plain(chunk: pa.Array) -> np.ndarray:
    """The values of one chunk, likewise."""
    import pyarrow as pa

    if pa.types.is_dictionary(chunk.type):
        entries = np.array([*chunk.dictionary.to_pylist(), None], object)
        return entries[chunk.indices.fill_null(len(entries) - 1).to_numpy(zero_copy_only=False)]
    if chunk.null_count or not (pa.types.is_integer(chunk.type) or pa.types.is_boolean(chunk.type)):
        return np.array([*chunk.to_pylist(), None], object)[:-1]
    return chunk.to_numpy(zero_copy_only=False)


def unpacked_size(path: Path, file: pq.ParquetFile, column: str) -> int:
    """The most bytes that a column takes in a row group.

    Raises:
        InputError: where that is far more than the file holds.
    """
    largest = 0
    for g in range(file.num_row_groups):
        group = file.metadata.row_group(g)
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] != column:
                continue
            size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            if size > max(UNPACKED, RATIO * packed):
                raise InputError(
                    f"{path}: a row group of {column} unpacks from {packed:,} to {size:,} bytes; the limit is {RATIO} "
                    f"times, or {UNPACKED:,} bytes. Write it with smaller row groups."
                )
            largest = max(largest, size)
    return largest


def _names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Class names from the Hugging Face schema metadata of a parquet file, if it has any."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(n) for n in info["names"])
    except (KeyError, TypeError, ValueError):
        return ()
