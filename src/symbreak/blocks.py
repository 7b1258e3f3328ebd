"""Finished blocks of long work, kept in a folder: the same call goes on after an interruption with the same bits.

Long functions take ``keep``, e.g. `Blocks.keep`, and ``progress``, which is called with (done, of how many).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from symbreak.files import InputError, digest, read_json, read_tensors, write_json, write_tensors
from symbreak.parallel import agreed, dealt, rank_of
from symbreak.record import plain

__all__ = ["Arrays", "Blocks", "Keep", "Progress", "in_blocks", "keyed", "padded_blocks", "unkept"]

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]
Progress = Callable[[int, int], None]


def keyed(name: str, *settings: Any) -> str:
    """``name`` with a digest of settings (tensors, plain values): measurements that share a `Keep` stay apart."""
    return f"{name}-{digest(*settings)}"


def unkept(_: str, make: Callable[[], Arrays]) -> Arrays:
    """The `Keep` that keeps nothing: every block is made."""
    return make()


def in_blocks(
    name: str, items: Sequence[Item], make: Callable[[Item], Arrays], progress: Progress | None, keep: Keep | None
) -> list[Arrays]:
    """The arrays of every item, a block each, made without gradients; ranks share them, see `dealt`.

    Args:
        name: first part of the keys, "name/number".
        items: what the blocks are made of, in order.
        make: item -> arrays.
        progress: called with (blocks done, of how many).
        keep: ``keep(key, make)`` gives the stored arrays of a block, or stores those that make() gives.
    """

    def block(j: int) -> Arrays:
        with torch.inference_mode():
            return (keep or unkept)(f"{name}/{j}", partial(make, items[j]))

    return dealt(range(len(items)), block, progress)


def padded_blocks(batches: Iterable[torch.Tensor], size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """A stream of batches cut into blocks of one size, the last one padded, and how many rows of each are real."""
    waiting: list[torch.Tensor] = []
    rows = 0
    for batch in batches:
        for part in batch.split(size):
            waiting.append(part)
            rows += len(part)
            if rows >= size:
                whole = torch.cat(waiting)
                yield whole[:size], size
                waiting, rows = ([whole[size:]], rows - size) if rows > size else ([], 0)
    if rows:
        whole = torch.cat(waiting)
        yield torch.cat([whole, whole[:1].expand(size - rows, *whole.shape[1:])]), rows


def _first(arrays: Arrays) -> Arrays:
    """The first rank's arrays, on all: machines may differ in the last bits, but have to go the same way."""
    return arrays if rank_of()[1] == 1 else dealt([arrays], lambda own: own)[0]


def _stored(path: Path) -> Arrays:
    """A finished block; nothing where there is none, or a damaged one, which is made again."""
    try:
        return {k: v.numpy() for k, v in read_tensors(path)[0].items()}
    except InputError:
        return {}


class Blocks:
    """Finished blocks of one run: arrays, a file each, and plain values, all of them in ``cells.json``.

    Args:
        folder: where they are kept; ``None`` keeps no files.
        identity: plain values that decide the blocks; runs that differ in any do not see each other's.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        text = json.dumps(plain(identity), sort_keys=True)
        # Networks may differ in the last bits from machine to machine: the first one's says whose blocks these are.
        self.identity = agreed(hashlib.sha256(text.encode()).hexdigest)
        self.folder = None if folder is None else folder / f"blocks-{self.identity[:16]}"
        self.path = None if folder is None else folder / "cells.json"
        self.values: dict[str, Any] | None = None  # not read before the first one is asked for

    def keep(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a block, from the folder or fresh.

        A block that was dealt to this rank is its own affair; any other all ranks make, and take from the first one.
        """
        if self.folder is None:
            return _first(make())
        path = self.folder / f"{key.replace('/', '-')}.safetensors"
        arrays = dealt([path], _stored)[0]
        if not arrays:
            arrays = _first(make())
            write_tensors(path, {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})
        return arrays

    def value(self, key: str, make: Callable[[], Any]) -> Any:
        """A plain value, from the file, from an earlier call or fresh; it is fit for JSON once it is `plain`."""
        if self.values is None:
            self.values = agreed(self._read)
        if key not in self.values:
            made = make()
            self.values[key] = agreed(lambda: made)
            if self.path is not None:
                write_json(self.path, {"identity": self.identity, "cells": plain(self.values)})
        return self.values[key]

    def _read(self) -> dict[str, Any]:
        """This run's values; those of another one are not taken, and a damaged file holds none."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            raw = read_json(self.path)
        except InputError:
            return {}
        return dict(raw.get("cells", {})) if isinstance(raw, dict) and raw.get("identity") == self.identity else {}

    def close(self) -> None:
        """Blocks are of no use once the record is written."""
        if rank_of()[0]:
            return
        if self.path is not None and self.values is not None:
            self.path.unlink(missing_ok=True)
        if self.folder is not None and self.folder.exists():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
