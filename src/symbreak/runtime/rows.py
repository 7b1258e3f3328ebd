"""Rows of a table of which every process holds a shard: in memory if it fits, else in a file without a name.

No process reads or holds all rows. Rows that others need are exchanged by all processes at once: where rows are shared,
all of them must call `Shards.at`, in the same order.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import torch

from symbreak.runtime.files import nameless_file
from symbreak.runtime.ranks import from_each, own_rows, rank_of, shares, summed
from symbreak.runtime.run import MEMORY

__all__ = ["Shards"]

BLOCK_BYTES = 32 * 2**20
Decode = Callable[[np.ndarray], torch.Tensor]


class Shards:
    """Rows [N, *S] of which this process holds those from ``edges[rank]`` to ``edges[rank + 1]``.

    Args:
        blocks: this process's rows, block by block: arrays [B, ...] of any type.
        edges: positions at which the processes' shards begin, and N; ``[0, N]`` where every one holds all rows.
        memory: bytes held in memory; a larger shard goes into a file without a name, which ends with the process.
        folder: where that file is; by default in the folder of temporary files.
        decode: rows as they are stored -> tensor [B, *S]; by default as they are.
        progress: called with (about how many rows have been read, of how many on all processes).
    """

    def __init__(
        self,
        blocks: Iterable[np.ndarray],
        edges: list[int],
        memory: int = MEMORY,
        folder: Path | None = None,
        decode: Decode = torch.from_numpy,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.edges, self.decode = edges, decode
        self.shared = len(edges) > 2
        self.rank = rank_of()[0] if self.shared else 0
        self._index: np.ndarray | None = None  # positions among all rows that were stored
        self._base = self.first
        self._rows: np.ndarray | None = None
        self._file: IO[bytes] | None = None
        self._none = np.empty(0, np.uint8)  # no rows, of the shape and type of a row
        count, done = self.last - self.first, 0
        for block in blocks:
            if self._rows is None and self._file is None:
                self._none = np.empty((0, *block.shape[1:]), block.dtype)
                if count * self._stored_bytes > memory:
                    self._file = nameless_file(folder)
                else:  # what comes whole is there already
                    self._rows = block if len(block) == count else np.empty((count, *block.shape[1:]), block.dtype)
            if self._file is not None:
                self._file.write(np.ascontiguousarray(block).data)
            elif block is not self._rows:
                self._rows[done : done + len(block)] = block  # type: ignore[index]
            done += len(block)
            if progress is not None:
                progress(len(self) * done // count, len(self))
        if self._file is not None:
            self._file.flush()
        if done != count:
            raise RuntimeError(f"{done} rows came for a shard of {count}")

    @classmethod
    def of(cls, rows: torch.Tensor, multiple: int = 1) -> Shards:
        """Rows that every rank has: each keeps its own part of them, which begins at a multiple of ``multiple``."""
        mine, _, _ = own_rows(rows, multiple)
        return cls([mine.detach().cpu().numpy()], shares(len(rows), multiple), memory=2**62)

    def __len__(self) -> int:
        return self.edges[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *S)."""
        return (len(self), *self._none.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of a decoded row."""
        one = self.decode(np.zeros((1, *self._none.shape[1:]), self._none.dtype))
        return one.numel() * one.element_size()

    @property
    def _stored_bytes(self) -> int:
        return math.prod(self._none.shape[1:]) * self._none.itemsize

    @property
    def first(self) -> int:
        """Position of this process's first row."""
        return self.edges[self.rank]

    @property
    def last(self) -> int:
        """Position after this process's last row."""
        return self.edges[self.rank + 1]

    def _raw(self, index: np.ndarray) -> np.ndarray:
        """Rows of this process at positions among all rows, as they are stored."""
        index = (index if self._index is None else self._index[index]) - self._base
        if self._rows is not None:
            return self._rows[index]
        out = np.empty((len(index), *self._none.shape[1:]), self._none.dtype)
        # Positions that follow each other are one read.
        ends = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
        for a, b in pairwise(ends):
            if a < b:
                self._read(out[a:b], int(index[a]) * self._stored_bytes)
        return out

    def _read(self, into: np.ndarray, offset: int) -> None:
        view = into.reshape(-1).view(np.uint8).data
        while len(view):
            data = os.pread(self._file.fileno(), min(len(view), 2**26), offset)  # type: ignore[union-attr]
            if not data:
                raise OSError("a temporary file ended before its rows did")
            view[: len(data)] = data
            view, offset = view[len(data) :], offset + len(data)

    def here(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of this process at positions among all, in their order."""
        return self.decode(self._raw(index.numpy()))

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Rows at the given positions, in their order, on all ranks, which make this call together."""
        wanted = index.numpy()
        if not self.shared:
            return self.decode(self._raw(wanted))
        if rank_of()[1] == 1:
            raise RuntimeError("one rank alone requested rows that several ranks hold; make the call on all ranks")
        mine = (wanted >= self.first) & (wanted < self.last)
        some = self._raw(wanted[mine])
        raw = np.zeros((len(wanted), *some.shape[1:]), some.dtype)
        raw[mine] = some
        # Every row has one owner, so that sums of bytes hand them over as they are.
        whole = torch.from_numpy(raw.reshape(-1).view(np.uint8))
        summed(whole)
        return self.decode(whole.numpy().view(some.dtype).reshape(raw.shape))

    def take(self, index: np.ndarray) -> Shards:
        """The rows at rising positions, without a copy of them."""
        return self._view(index, np.searchsorted(index, self.edges).tolist())

    def rows(self, first: int, last: int) -> Shards:
        """Rows of this rank at positions first .. last - 1, for itself alone: to be gone through, a block at a time."""
        return self._view(np.arange(first, last), [0, last - first])

    def _view(self, index: np.ndarray, edges: list[int]) -> Shards:
        out = object.__new__(Shards)
        out.__dict__.update(self.__dict__)
        out._index = index if self._index is None else self._index[index]
        out.edges, out.shared = edges, len(edges) > 2
        out.rank = self.rank if out.shared else 0
        return out

    def pieces(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """This process's rows, ``size`` at a time: (position of the first, rows)."""
        for first in range(self.first, self.last, size):
            yield first, self.decode(self._raw(np.arange(first, min(first + size, self.last))))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This process's rows, a block at a time."""
        for _, rows in self.pieces(max(1, min(1024, BLOCK_BYTES // self.row_bytes))):
            yield rows

    def digests(self, content: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous) -> tuple[bytes, ...]:
        """16 bytes of BLAKE2b of every row, or of what ``content`` makes of blocks; called by all processes."""
        mine = b"".join(
            hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            for block in self
            for row in content(block).contiguous().numpy()
        )
        each = from_each({"digests": np.frombuffer(mine, np.uint8).reshape(-1, 16)}, self.shared)
        return tuple(one.tobytes() for part in each for one in part["digests"])
