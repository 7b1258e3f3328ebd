"""Bars of long work: text in a terminal, a widget in a notebook that has ipywidgets."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from symbreak.runtime.ranks import rank_of

__all__ = ["Bars"]


class Bars:
    """A bar a stage, on the first process; called with (stage, done, of how many)."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}  # tqdm has no types

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move a stage's bar, which is closed where it is full."""
        if rank_of()[0]:
            return
        bar = self._bars.get(stage)
        if bar is None:
            bar = self._bars[stage] = tqdm(total=total, desc=stage)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(stage).close()
