"""Finished blocks of long work, kept in a folder: the same call goes on after an interruption with the same bits.

Long functions take ``keep``, e.g. `Blocks.keep`, and ``progress``, which is called with (done, of how many).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from symbreak.files import InputError, read_tensors, write_tensors
from symbreak.record import plain

__all__ = ["Arrays", "Blocks", "Keep", "Progress", "in_blocks", "unkept"]

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]
Progress = Callable[[int, int], None]


def unkept(_: str, make: Callable[[], Arrays]) -> Arrays:
    """The `Keep` that keeps nothing: every block is made."""
    return make()


def in_blocks(
    name: str, items: Sequence[Item], make: Callable[[Item], Arrays], progress: Progress | None, keep: Keep | None
) -> list[Arrays]:
    """The arrays of every item, a block each, made without gradients.

    Args:
        name: first part of the keys, "name/number".
        items: what the blocks are made of, in order.
        make: item -> arrays.
        progress: called with (blocks done, of how many).
        keep: ``keep(key, make)`` gives the stored arrays of a block, or stores those that make() gives.
    """
    found = []
    for j, item in enumerate(items):
        with torch.inference_mode():
            found.append((keep or unkept)(f"{name}/{j}", partial(make, item)))
        if progress is not None:
            progress(j + 1, len(items))
    return found


class Blocks:
    """Finished blocks of one run.

    Args:
        folder: where they are kept; ``None`` keeps nothing.
        identity: plain values that decide the blocks; runs that differ in any do not see each other's.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        text = json.dumps(plain(identity), sort_keys=True)
        self.folder = None if folder is None else folder / f"blocks-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def keep(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a block, from the folder or fresh."""
        if self.folder is None:
            return make()
        path = self.folder / f"{key.replace('/', '-')}.safetensors"
        if path.exists():
            try:
                return {k: v.numpy() for k, v in read_tensors(path)[0].items()}
            except InputError:
                pass  # a damaged block is made again
        arrays = make()
        write_tensors(path, {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})
        return arrays

    def close(self) -> None:
        """Blocks are of no use once the record is written."""
        if self.folder is not None and self.folder.exists():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
