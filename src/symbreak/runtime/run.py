"""Run: what long work needs, in one argument: a folder for finished parts, a memory budget, a progress callback.

After an interruption the same call with the same folder continues and ends with the same bits.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from symbreak.runtime.bars import Bars
from symbreak.runtime.errors import note
from symbreak.runtime.files import InputError, digest, output_folder, read_json, read_tensors, write_json, write_tensors
from symbreak.runtime.identity import Identity, differences, identity_of
from symbreak.runtime.lock import Hold
from symbreak.runtime.plain import plain
from symbreak.runtime.ranks import Arrays, agreed, map_over_ranks, rank_of

__all__ = ["MEMORY", "Arrays", "Run", "padded_blocks", "renamed"]

Item = TypeVar("Item")
Function = TypeVar("Function", bound=Callable[..., Any])
Tell = Callable[[str, int, int], None]
MEMORY = 2**30  # bytes of working memory where nothing was said


class Run:
    """A folder for finished parts, a memory budget and a progress callback, passed to long work as ``run=``.

    Args:
        folder: where finished parts and rows beyond the memory are stored; ``None`` stores nothing.
        memory: bytes of working memory; ``None`` means the default of each function. Results do not depend on it.
        progress: called with (stage, done, of how many); ``True`` draws bars, as a notebook does where nothing is said,
            and ``False`` none.

    Raises:
        InputError: if ``folder`` is a file, and for less than 1 MiB.

    >>> run = Run(memory=2**30)
    >>> run.bytes(1 / 4) == run.share(1 / 4).bytes() == 2**28
    True
    """

    def __init__(
        self, folder: str | Path | None = None, memory: int | None = None, progress: Tell | bool | None = None
    ) -> None:
        if memory is not None and memory < 2**20:
            raise InputError(f"memory is {memory:,} bytes; expected at least 1 MiB (1,048,576).")
        self.folder = None if folder is None else output_folder(folder)
        if progress is True or (progress is None and "ipykernel" in sys.modules):
            progress = Bars()
        self.memory, self.progress = memory, progress
        self.stage = ""
        self.timings: dict[str, float] = {}
        self._hold: Hold | None = None
        self._parts = _Parts(self.folder, {} if folder is None else identity_of("part"))

    def _view(self, **changed: Any) -> Run:
        view = copy.copy(self)
        view.__dict__.update(changed)
        return view

    def bytes(self, share: float = 1.0, default: int = MEMORY) -> int:
        """Bytes of a share of the working memory; ``default`` is the whole if no memory was set."""
        return int((default if self.memory is None else self.memory) * share)

    def share(self, share: float, default: int = MEMORY) -> Run:
        """This run with a share of its memory: for one of several things in memory at the same time."""
        return self._view(memory=self.bytes(share, default))

    def unstored(self) -> Run:
        """This run without stored parts: for work whose inputs have no key."""
        return self._view(_parts=_Parts(None, {}))

    def taken(self) -> Run:
        """This run with its folder to itself, as long as somebody knows it: before any work, see `Hold`.

        Raises:
            InputError: where another process works in the folder, or nothing can be written there.
        """
        return self if self.folder is None else self._view(_hold=Hold(self.folder))

    def named(self, stage: str) -> Run:
        """This run with a name for its progress, unless a caller has set one."""
        return self if self.stage else self._view(stage=stage)

    def telling(self, tell: Callable[[int, int], None]) -> Run:
        """This run with progress reported to ``tell(done, total)``: for one of several steps of a stage."""
        return self._view(progress=lambda _, done, total: tell(done, total))

    @contextmanager
    def timed(self, stage: str) -> Iterator[Run]:
        """This run under a stage of that name; the seconds are added to ``timings``."""
        began = time.perf_counter()
        yield self._view(stage=stage)
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def tell(self, done: int, total: int) -> None:
        """Report progress: ``done`` of ``total`` things of the stage."""
        if self.progress:
            self.progress(self.stage, done, total)

    def identified(self, decides: Mapping[str, Any]) -> Run:
        """This run with timings from zero and parts of an identity: all that decides them, see `identity_of`.

        What is no identity yet becomes one, with this machine's versions and threads.

        From here on its folder is locked, until it is closed or nobody knows it any more. A note says where the folder
        has parts of other settings, which are left alone, and by what they differ.

        Raises:
            InputError: where another process works in the folder, or nothing can be written there.
        """
        hold = None if self.folder is None else Hold(self.folder)
        whole = dict(decides)
        if "versions.symbreak" not in whole:
            whole = identity_of(str(whole.pop("kind", "run")), **whole)
        return self._view(_parts=_Parts(self.folder, whole, hold), timings={})

    def _key(self, key: str, settings: tuple[object, ...]) -> str:
        """The name of a part with a digest of its settings; without a folder nothing is digested."""
        return f"{key}-{digest(*settings)}" if settings and self.folder is not None else key

    def part(self, key: str, make: Callable[[], Arrays], *settings: Any) -> Arrays:
        """The arrays of a finished part, read from the folder or computed now.

        Within `parts` a part is computed on one rank; elsewhere on every rank, and that of the first rank counts.

        Args:
            key: name of the part.
            make: computes its arrays.
            settings: tensors and plain values that decide it beside the run's identity.
        """
        return self._parts.part(self._key(key, settings), make)

    def parts(self, key: str, items: Sequence[Item], make: Callable[[Item], Arrays], *settings: Any) -> list[Arrays]:
        """A part for each item, computed without gradients; the ranks share the items, see `map_over_ranks`."""
        name, run = self._key(key, settings), self.named(key)

        def one(j: int) -> Arrays:
            with torch.inference_mode():
                return self._parts.part(f"{name}/{j}", partial(make, items[j]))

        return map_over_ranks(range(len(items)), one, run.tell)

    def value(self, key: str, make: Callable[[], Any]) -> Any:
        """A plain value, read from the folder or computed now; `plain` makes it fit for JSON."""
        return self._parts.value(key, make)

    def close(self) -> None:
        """Remove the finished parts, which are not needed once the record is written."""
        self._parts.close()


OLD = {
    "memory": "run=sb.Run(memory=...)",
    "progress": "run=sb.Run(progress=...)",
    "keep": "run=sb.Run(folder)",
    "folder": "run=sb.Run(folder)",
    "out": "run=sb.Run(folder)",
}


def renamed(**spellings: str) -> Callable[[Function], Function]:
    """Decorator of a public function whose arguments changed: an old one raises an error that names the new one.

    Args:
        spellings: old argument -> what to write now, beside those of `OLD`.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, now in {**OLD, **spellings}.items():
                if old in kwargs and old not in function.__annotations__:
                    raise InputError(f"{function.__name__}({old}=...) is now {function.__name__}({now}).")
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def padded_blocks(batches: Iterable[torch.Tensor], size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """A stream of batches cut into blocks of one size, the last one padded, and how many rows of each are real."""
    waiting: list[torch.Tensor] = []
    rows = 0
    for batch in batches:
        for piece in batch.split(size):
            waiting.append(piece)
            rows += len(piece)
            if rows >= size:
                whole = torch.cat(waiting)
                yield whole[:size], size
                waiting, rows = ([whole[size:]], rows - size) if rows > size else ([], 0)
    if rows:
        whole = torch.cat(waiting)
        yield torch.cat([whole, whole[:1].expand(size - rows, *whole.shape[1:])]), rows


def _first(arrays: Arrays) -> Arrays:
    """The first rank's arrays on all ranks: machines may differ in the last bits, but must take the same decisions."""
    return arrays if rank_of()[1] == 1 else map_over_ranks([arrays], lambda same: same)[0]


def _stored(path: Path) -> Arrays:
    """A finished part; nothing if it is missing or damaged, and then it is computed again."""
    try:
        return {k: v.numpy() for k, v in read_tensors(path)[0].items()}
    except InputError as error:
        if path.exists():
            note(str(error))
        return {}


class _Parts:
    """Finished parts of one identity in a folder of their own: arrays, a file each, and plain values in a table."""

    def __init__(self, folder: Path | None, decides: Identity, hold: Hold | None = None) -> None:
        self.folder: Path | None = None
        self.identity, self.hold = decides, hold
        self.values: dict[str, Any] | None = None  # not read before the first one is needed
        if folder is not None:
            # Networks may differ in the last bits between machines: the first one's says whose parts these are.
            self.identity = agreed(lambda: json.loads(json.dumps(plain(decides))))
            self.folder = folder / f"blocks-{digest(json.dumps(self.identity, sort_keys=True))}"
            if hold is not None:
                agreed(lambda: self._others(folder))

    def _others(self, folder: Path) -> None:
        """Say where there are parts of the same kind, but of another identity."""
        if self.folder is None or self.folder.exists():
            return
        for path in sorted(folder.glob("blocks-*/identity.json")):
            try:
                other = read_json(path)
            except InputError:
                continue
            if isinstance(other, dict) and other.get("kind") == self.identity.get("kind"):
                by = differences(other, self.identity)
                note(f"{path.parent} belongs to a run with other settings, and is not used: {by}.")

    def _claim(self) -> None:
        """Write whose parts these are, before the first of them."""
        if self.folder is not None and not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", self.identity)

    def part(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        if self.folder is None:
            return _first(make())
        path = self.folder / f"{key.replace('/', '-')}.safetensors"
        arrays = map_over_ranks([path], _stored)[0]
        if not arrays:
            arrays = _first(make())
            self._claim()
            write_tensors(path, {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})
        return arrays

    def value(self, key: str, make: Callable[[], Any]) -> Any:
        if self.values is None:
            self.values = agreed(self._read)
        if key not in self.values:
            made = make()
            self.values[key] = agreed(lambda: made)
            if self.folder is not None:
                self._claim()
                cells = plain(self.values)
                write_json(self.folder / "cells.json", {"digest": _text(cells), "cells": cells})
        return self.values[key]

    def _read(self) -> dict[str, Any]:
        """The finished values; a damaged file holds none."""
        path = None if self.folder is None else self.folder / "cells.json"
        if path is None or not path.exists():
            return {}
        try:
            raw = read_json(path)
        except InputError:
            raw = None
        if isinstance(raw, dict) and isinstance(raw.get("cells"), dict) and raw.get("digest") == _text(raw["cells"]):
            return dict(raw["cells"])
        note(f"{path} is damaged, and is made again.")
        return {}

    def close(self) -> None:
        if rank_of()[0] == 0 and self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)
        if self.hold is not None:
            self.hold.release()


def _text(cells: object) -> str:
    return digest(json.dumps(cells, sort_keys=True))
