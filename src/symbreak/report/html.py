"""Record -> one self-contained HTML file that opens from disk. Draws, never computes."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from symbreak.report.figures import (
    MOST_BARS,
    added_figure,
    arc_figure,
    attributes_figure,
    audit_figure,
    comparison_figure,
    composition_figure,
    curves_figure,
    line_figure,
    phases_figure,
    spectrum_figure,
    svg,
    sweep_figure,
)
from symbreak.report.record import Record
from symbreak.report.tables import noun_of, number, tables, world_rows
from symbreak.report.verdict import headline, sentences, start_in_words
from symbreak.runtime.files import InputError, write_whole
from symbreak.runtime.plain import Values, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]


def write_report(record: Record, path: str | Path) -> Path:
    """Write the page of a study, a diagnosis, attributes, an audit, an evaluation or a world.

    Args:
        record: a `Record` of kind ``"study"``, ``"phases"``, ``"attributes"``, ``"audit"``, ``"evaluation"`` or
            ``"world"``.
        path: the HTML file; it appears whole or not at all.

    Raises:
        InputError: for a record of another kind or with missing parts.
    """
    import jinja2

    if record.kind not in PAGES:
        known = ", ".join(PAGES)
        raise InputError(f"there is no report for records of kind {record.kind!r}; expected one of {known}.")
    page, draw = PAGES[record.kind]
    folder = resources.files("symbreak.report") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True)
    pages.filters |= {"number": number, "png": _base64, "coded": _coded}
    pages.policies["json.dumps_function"] = partial(json.dumps, separators=(",", ":"), allow_nan=False)
    try:
        content = plain(record.content)
        parts, said = tables(record)
        page_text = pages.get_template(page).render(
            record=record,
            content=content,
            noun=noun_of(content),
            tables=parts,
            sentences=said,
            verdict=record.verdict or sentences(record.kind, content),
            settings=[*_flat(record.settings), *((f"version: {k}", v) for k, v in sorted(record.versions.items()))],
            timings=sorted(record.timings.items(), key=lambda kv: -kv[1]),
            **draw(content),
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a text for a number, a list for a table: figures and pages fail in any way
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"this is a damaged record, or one of another version ({reason}). Run it again.") from error
    # half of a pair of surrogates, from JSON or a file name, has no place in UTF-8
    return write_whole(path, lambda p: p.write_text(page_text, encoding="utf-8", errors="replace"))


def _flat(settings: Values) -> list[tuple[str, str]]:
    """Settings as text, those of a group one by one."""
    named = []
    for key, value in sorted(settings.items()):
        group = {f"{key}: {k}": v for k, v in sorted(value.items())} if isinstance(value, dict) else {key: value}
        named += [(k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in group.items()]
    return named


def _coded(text: str) -> str:
    """Text escaped for the page, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _base64(text: str) -> str:
    """Only base64 may enter an image source."""
    if not re.fullmatch(r"[A-Za-z0-9+/=]*", text):
        raise KeyError("a readable image grid")
    return text


def _drawn(draw: Callable[..., Figure | str | None], *args: object) -> str:
    """A figure as SVG; of one that cannot be drawn a line that says so: the page goes on without it."""
    try:
        figure = draw(*args)
        return figure if isinstance(figure, str) else "" if figure is None else svg(figure)
    except MemoryError:
        raise
    except Exception as error:  # values far off, fonts, libraries: figures fail in any way
        reason = html.escape(f"{type(error).__name__}: {str(error)[:100]}")
        return f'<p class="i">This figure could not be drawn ({reason}). The numbers are in record.json.</p>'


def _study(content: Values) -> Values:
    return {
        "phases": content["phases"],
        "first": headline(content),
        "start": start_in_words(content),
        "spectrum": _drawn(spectrum_figure, content["phases"]),
        "sweep": _drawn(sweep_figure, content),
    }


def _phases(content: Values) -> Values:
    return {
        "phases": content,
        "spectrum": _drawn(spectrum_figure, content),
        "criteria": _drawn(phases_figure, content),
        "curves": _drawn(curves_figure, content),
        "arc": _drawn(arc_figure, content["arc"]) if content["arc"] else "",
        "added": _drawn(added_figure, content["added"]) if content.get("added") else "",
    }


def _audit(content: Values) -> Values:
    near = content["comparison"]
    return {
        "histograms": _drawn(audit_figure, content) if any(content["memorized"].values()) else "",
        "compared": "" if near is None else _drawn(comparison_figure, near),
    }


def _evaluation(content: Values) -> Values:
    beyond, composed = content["extrapolated"], content["composition"]
    return {
        "line": "" if beyond is None else _drawn(line_figure, content["distance"], beyond),
        "composed": [_drawn(composition_figure, t) if len(t["rows"]) <= MOST_BARS else "" for t in composed],
    }


# the page of every kind of record, and what draws its figures
PAGES: dict[str, tuple[str, Callable[[Values], Values]]] = {
    "study": ("study.html", _study),
    "phases": ("phases.html", _phases),
    "attributes": ("attributes.html", lambda content: {"axis": _drawn(attributes_figure, content)}),
    "audit": ("audit.html", _audit),
    "evaluation": ("evaluation.html", _evaluation),
    "world": ("world.html", lambda content: {"world": {**content, "rows": world_rows(content)}}),
}
