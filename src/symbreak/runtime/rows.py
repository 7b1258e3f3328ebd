"""Rows of a table of which every rank holds a shard: in memory where it fits, else in a file without a name.

No rank reads or holds all rows. What the others need of a rank's rows is exchanged, by all ranks at once: where rows
are shared, `Shards.at` has to be called by all of them, in the same order.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.runtime.files import nameless_file
from symbreak.runtime.ranks import from_each, own_rows, rank_of, shares, summed

__all__ = ["HELD", "Shards"]

HELD = 2**30  # bytes of a shard held in memory
BLOCK_BYTES = 32 * 2**20
Decode = Callable[[np.ndarray], torch.Tensor]


class _Held:
    """Rows of one shard, in the order in which they came."""

    def __init__(self, count: int, memory: int, folder: Path | None) -> None:
        self.count, self.memory, self.folder = count, memory, folder
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)
        self.rows: np.ndarray | None = None
        self.file: Any = None
        self.done = 0

    def add(self, block: np.ndarray) -> None:
        if self.rows is None and self.file is None:
            self.shape, self.dtype = block.shape[1:], block.dtype
            if self.count * self._bytes <= self.memory:
                self.rows = np.empty((self.count, *self.shape), self.dtype)
            else:
                self.file = nameless_file(self.folder)
        if len(block) == self.count and self.file is None:
            self.rows = block  # as a whole, and there already
        elif self.rows is not None:
            self.rows[self.done : self.done + len(block)] = block
        else:
            self.file.write(np.ascontiguousarray(block).data)
        self.done += len(block)

    def end(self) -> None:
        if self.file is not None:
            self.file.flush()

    @property
    def _bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def get(self, index: np.ndarray) -> np.ndarray:
        """Rows at positions of this shard."""
        if self.rows is not None:
            return self.rows[index]
        out = np.empty((len(index), *self.shape), self.dtype)
        if not len(index):
            return out
        # Positions that follow each other are one read.
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
        for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(index)]):
            self._read(out[a:b], int(index[a]) * self._bytes)
        return out

    def _read(self, into: np.ndarray, offset: int) -> None:
        view = into.reshape(-1).view(np.uint8).data
        while len(view):
            data = os.pread(self.file.fileno(), min(len(view), 2**26), offset)
            if not data:
                raise OSError("a temporary file ended before its rows did")
            view[: len(data)] = data
            view, offset = view[len(data) :], offset + len(data)


class Shards:
    """Rows [N, *S] of which this rank holds those from ``edges[rank]`` to ``edges[rank + 1]``.

    Args:
        blocks: this rank's rows, block by block: arrays [B, ...] of any type.
        edges: positions at which the ranks' shards begin, and N; ``[0, N]`` where every rank holds all rows.
        memory: bytes held in memory; a larger shard goes into a file without a name, which ends with the process.
        folder: where that file is; by default where temporary files are.
        decode: rows as they are held -> tensor [B, *S]; by default as they are.
        progress: called with (about how many rows have come, of how many on all ranks).
    """

    def __init__(
        self,
        blocks: Iterable[np.ndarray],
        edges: list[int],
        memory: int = HELD,
        folder: Path | None = None,
        decode: Decode = torch.from_numpy,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.edges, self.decode = edges, decode
        self.shared = len(edges) > 2
        self.rank = rank_of()[0] if self.shared else 0
        self._index: np.ndarray | None = None  # positions among all rows that were held
        self._base = self.first
        self._held = _Held(self.last - self.first, memory, folder)
        for block in blocks:
            self._held.add(block)
            if progress is not None:
                progress(len(self) * self._held.done // self._held.count, len(self))
        self._held.end()
        if self._held.done != self.last - self.first:
            raise RuntimeError(f"{self._held.done} rows came for a shard of {self.last - self.first}")

    @classmethod
    def of(cls, rows: torch.Tensor, multiple: int = 1) -> Shards:
        """Rows that every rank has: each keeps its own part of them, which begins at a multiple of ``multiple``."""
        own, _, _ = own_rows(rows, multiple)
        return cls([own.detach().cpu().numpy()], shares(len(rows), multiple), memory=2**62)

    def __len__(self) -> int:
        return self.edges[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *S)."""
        return (len(self), *self._held.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that was asked for."""
        one = self.decode(np.zeros((1, *self._held.shape), self._held.dtype))
        return one.numel() * one.element_size()

    @property
    def first(self) -> int:
        """Position of this rank's first row."""
        return self.edges[self.rank]

    @property
    def last(self) -> int:
        """Position after this rank's last row."""
        return self.edges[self.rank + 1]

    def own(self, first: int, last: int) -> torch.Tensor:
        """Rows of this rank at positions first .. last - 1 of all."""
        return self.decode(self._raw(np.arange(first, last)))

    def _raw(self, index: np.ndarray) -> np.ndarray:
        """Rows of this rank at positions among all rows, as they are held."""
        return self._held.get((index if self._index is None else self._index[index]) - self._base)

    def here(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of this rank at positions among all, in their order."""
        return self.decode(self._raw(index.numpy()))

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Rows at the given positions, in their order, on all ranks, which make this call together."""
        wanted = index.numpy()
        if not self.shared:
            return self.decode(self._raw(wanted))
        if rank_of()[1] == 1:
            raise RuntimeError("rows that several ranks hold were asked for by one of them alone")
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

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This rank's rows, a block at a time."""
        for _, rows in self.pieces(max(1, min(1024, BLOCK_BYTES // self.row_bytes))):
            yield rows

    def digests(self, content: Callable[[torch.Tensor], torch.Tensor] | None = None) -> tuple[bytes, ...]:
        """16 bytes of BLAKE2b of every row, or of what ``content`` makes of blocks of rows; on all ranks at once."""
        own = []
        for block in self:
            for row in (block if content is None else content(block)).contiguous().numpy():
                own.append(hashlib.blake2b(row.tobytes(), digest_size=16).digest())
        found = from_each({"digests": np.frombuffer(b"".join(own), np.uint8).reshape(-1, 16)}, self.shared)
        return tuple(one.tobytes() for f in found for one in f["digests"])

    def pieces(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """This rank's rows, ``size`` at a time: (position of the first, rows)."""
        for first in range(self.first, self.last, size):
            yield first, self.own(first, min(first + size, self.last))
