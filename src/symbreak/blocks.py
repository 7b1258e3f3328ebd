"""Finished blocks of long work, kept in a folder: the same call goes on after an interruption with the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.files import InputError, read_tensors, write_tensors
from symbreak.record import plain

__all__ = ["Blocks"]


class Blocks:
    """Finished blocks of one run.

    Args:
        folder: where they are kept; ``None`` keeps nothing.
        identity: plain values that decide the blocks; runs that differ in any do not see each other's.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        text = json.dumps(plain(identity), sort_keys=True)
        self.folder = None if folder is None else folder / f"blocks-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def keep(self, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
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
