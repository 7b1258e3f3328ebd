"""What a command says: bars and warnings on stderr, one table or one JSON object on stdout, one line for an error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from symbreak.runtime.errors import visible

if TYPE_CHECKING:
    from symbreak.data.images import Images
    from symbreak.report.record import Record
    from symbreak.runtime.run import Run

EVERY = 60.0  # seconds from line to line where stderr is a file: bars are drawn there at the end only
err = Console(stderr=True)
_notes: list[str] = []  # to be told once there is something to show: an error prints one line only
_unread: list[Images] = []  # whose notes the first pass over them brings along
_printed: set[str] = set()


def note(source: str, *texts: str) -> None:
    """What reading decided, a line each on stderr before the first bar or the result; nothing before an error."""
    _notes.extend(f"{source}: {text}" for text in texts)


def note_of(data: Images) -> None:
    """What reading a data set decided; of pictures that were not read yet as soon as they were."""
    from symbreak.runtime.ranks import rank_of

    if data.noted or rank_of()[1] > 1:  # processes must count together
        note(data.name, *data.notes)
    else:
        note(data.name, *data.remarks)
        _unread.append(data)


def _tell_notes(all_of_them: bool = False) -> None:
    for data in _unread:
        if all_of_them or data.noted:
            note(data.name, *data.notes)
    _unread[:] = [data for data in _unread if not (all_of_them or data.noted)]
    for text in dict.fromkeys(_notes):
        if text not in _printed:
            err.print(text, markup=False, highlight=False, soft_wrap=True)
    _printed.update(_notes)
    _notes.clear()


@contextmanager
def running(out: Path | None, memory: int | None = None) -> Iterator[Run]:
    """A `Run` with a folder and a budget that draws bars on stderr, of the first process only.

    The folder is this command's alone as long as it knows the run: the report follows.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from symbreak.runtime.ranks import rank_of
    from symbreak.runtime.run import Run

    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=rank_of()[0] > 0)
    tasks: dict[str, Any] = {}
    spoke = time.monotonic()

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal spoke
        _tell_notes()
        if not tasks:
            progress.start()  # not before there is something to show
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)
        if not err.is_terminal and not progress.disable and time.monotonic() >= spoke + EVERY:
            spoke = time.monotonic()
            err.print(f"{stage or 'progress'}: {done:,} of {total:,}", markup=False, highlight=False)

    try:
        yield Run(out, memory, tell).taken()
    finally:
        if tasks:
            progress.stop()


def say(as_json: bool, value: dict[str, Any], draw: Callable[[], None]) -> None:
    """One JSON object, or what ``draw`` prints; one process speaks for all."""
    from symbreak.runtime.plain import plain
    from symbreak.runtime.ranks import rank_of

    if rank_of()[0]:
        return
    _tell_notes(all_of_them=True)
    _printed.clear()
    if as_json:
        sys.stdout.write(json.dumps(plain(value), sort_keys=True) + "\n")
    else:
        draw()


def say_record(record: Record, out: Path | None, as_json: bool, value: dict[str, Any] | None = None) -> None:
    """A record's tables, and its report if a folder was requested.

    Args:
        value: the JSON object; by default the record.
    """
    from symbreak.report.html import write_report
    from symbreak.report.tables import show
    from symbreak.runtime.ranks import rank_of

    page = None if out is None else out / "report.html"
    if page is not None and not rank_of()[0]:  # the process that wrote the record
        write_report(record, page)
    say(as_json, record.to_dict() if value is None else value, lambda: show(record, page))


def fail(code: int, line: str) -> NoReturn:
    """Leave with one line on stderr."""
    _notes.clear()
    _unread.clear()
    _printed.clear()
    sys.stderr.write(visible(" ".join(line.split())) + "\n")
    sys.stderr.flush()
    raise SystemExit(code)
