"""What the command line prints: a table for each kind of result. Draws, never computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from symbreak.report.html import p_text, verdict

__all__ = ["audit_table", "evaluation_table", "out_console", "phases_table", "study_table"]

# Tables in a file or a pipe are not folded to 80 columns.
out_console = Console(width=None if sys.stdout.isatty() else 140)


def _plus_minus(d: dict[str, Any]) -> str:
    return f"{d['mean']:.3g}" + ("" if d["high"] is None else f" ± {d['high'] - d['mean']:.2g}")


def study_table(record: Any, path: Path) -> None:
    """Standard against late starts, row by row."""
    content = record.content
    ground = content["floor"]
    title = (
        f"Fréchet distance in {escape(ground['extractor'])}, {ground['samples']} images x {ground['repeats']} repeats"
    )
    table = Table(title=title + (" (smoke, not evidence)" if content["smoke"] else ""))
    for name in (
        "sampler",
        "calls",
        "standard start",
        "late, speciation",
        "late, best level",
        "noised data",
        "best late start",
    ):
        table.add_column(name, justify="left" if name in ("sampler", "best late start") else "right")
    for row in content["rows"]:
        cells = []
        for key in ("standard", "spectral", "best", "noised"):
            d = row[key]["distance"]
            cells.append(_plus_minus(d))
        said = verdict(row["standard"]["distance"], row["best"]["distance"])[0]
        table.add_row(row["sampler"], str(row["calls"]), *cells, said)
    out_console.print(table)
    out_console.print(f"floor (real images, same counts): {_plus_minus(ground)}")
    if content["reference"]:
        d = content["reference"]["distance"]
        out_console.print(f"the network at its best (DDIM, {content['reference']['calls']} calls): {_plus_minus(d)}")
    sys.stdout.write(f"report: {path}\n")


def phases_table(record: Any, out: Path | None) -> None:
    """Every criterion, the checks and the reasons."""
    content = record.content
    top = content["eigenvalues"][0]
    table = Table(
        title=f"When {escape(content['data']['name'])} decides ({content['data']['count']:,} images, pixels in [-1, 1])"
    )
    for name in ("criterion", "of", "flow, frame", "sigma", "OU time", f"step ({content['schedule']})", "s"):
        table.add_column(name, justify="left" if name in ("criterion", "of", "flow, frame") else "right")
    reasons = []
    for row in content["criteria"]:
        cells = []
        for key in ("sigma", "ou_time", "step"):
            value, low, high = (None if row[w] is None else row[w].get(key) for w in ("level", "low", "high"))
            text = "none" if row["level"] is None else "-" if value is None else f"{value:.3g}"
            cells.append(text + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""))
        where = ", ".join(w.upper() for w in (row["flow"], row["frame"]) if w)
        table.add_row(row["name"], row["of"], where, *cells, f"{record.timings[row['stage']]:.1f}")
        if row["level"] is None and row["reason"]:
            reasons.append(f"{row['name']} ({row['of']}): {row['reason']}")
    out_console.print(table)
    small = content["speciation"]["[0, 1]"]
    said = (
        "none"
        if small["level"] is None
        else f"sigma {small['level']['sigma']:.3g}, tau {small['level']['ou_time']:.3g}"
    )
    out_console.print(f"top eigenvalue {top:.4g}; with pixels in [0, 1] {top / 4:.4g}, spectral: {said}", markup=False)
    for check in content["checks"]:
        verdict = {True: "holds", False: "does not hold", None: "cannot be said"}[check["holds"]]
        out_console.print(f"{check['name']}: {verdict}. {check['sentence']}", markup=False)
    for line in (*reasons, *content["notes"]):
        out_console.print(line, markup=False)
    if out is not None:
        sys.stdout.write(f"report: {out / 'report.html'}\n")


def _between(d: dict[str, Any], name: str = "", digits: int = 4) -> str:
    """A value with its interval; ``name`` is the key of the value and the beginning of its ends' keys."""
    value, low, high = d[name or "value"], *(d[f"{name}_{end}" if name else end] for end in ("low", "high"))
    return f"{value:.{digits}g}" + ("" if low is None else f" [{low:.{digits}g}, {high:.{digits}g}]")


def evaluation_table(result: dict[str, Any], out: Path | None) -> None:
    """Distances, diversity, composition and copies."""
    d = result["distance"]
    table = Table(title=f"{d['name']} in {escape(d['extractor'])}, to {d['reference']:,} held-out images")
    for name in ("", "images x repeats", "mean", "95 % interval", "pooled"):
        table.add_column(name, justify="right")
    for name in ("distance", "floor"):
        d = result[name]
        if d is not None:
            interval = "-" if d["low"] is None else f"[{d['low']:.4g}, {d['high']:.4g}]"
            table.add_row(name, f"{d['samples']} x {d['repeats']}", f"{d['mean']:.4g}", interval, f"{d['pooled']:.4g}")
    out_console.print(table)
    lines = []
    if result["extrapolated"] is not None:
        lines.append(f"extrapolated to infinitely many samples: {_between(result['extrapolated'])}")
    if result["kid"] is not None:
        d = result["kid"]
        lines.append(f"{d['name']}: {_between(d)} ({d['samples']:,} samples, {d['reference']:,} held-out images)")
    for key, names in (("precision_recall", ("precision", "recall")), ("density_coverage", ("density", "coverage"))):
        d = result[key]
        if d is not None:
            said = ", ".join(f"{name} {_between(d, name, 3)}" for name in names)
            lines.append(f"{said} (k = {d['k']}, {d['samples']:,} samples, {d['reference']:,} held-out images)")
    if result["vendi"] is not None:
        d = result["vendi"]
        lines.append(f"Vendi score: {_between(d)}; held-out images {_between(d, 'reference_value')} ({d['samples']:,})")
    near = result["neighbours"]
    for name in ("samples", "held_out"):
        v = near[name]
        if v is not None:
            lines.append(
                f"{name}: median distance to the nearest training image {v['median_nearest']:.3g} (pixels), "
                f"d1/d2 < 1/3 in {v['memorized']:.2%} of {v['count']:,}"
            )
    for line in lines:
        out_console.print(line, markup=False, highlight=False)
    for composed in result["composition"]:
        table = Table(title=escape(f"{composed['attribute']}, said by {composed['classifier']}"))
        table.add_column("class")
        for side in ("train", "samples"):
            table.add_column(f"{side} ({composed['counts'][side]:,})", justify="right")
        for row in composed["rows"]:
            table.add_row(escape(row["class"]), *(_between(row[side], "share", 3) for side in ("train", "samples")))
        entropy = composed["entropy"]
        table.add_row(
            f"entropy, bits (at most {entropy['largest']:.3f})",
            *(_between(entropy[side]) for side in ("train", "samples")),
        )
        out_console.print(table)
    for note in result["notes"]:
        out_console.print(f"note: {note}", markup=False, highlight=False)
    if out is not None:
        sys.stdout.write(f"report: {out / 'report.html'}\n")


def audit_table(record: Any, out: Path | None) -> None:
    """Duplicates, memorized samples, the comparison and the verdict."""
    content = record.content
    twins = content["duplicates"]
    table = Table(title=f"Duplicates among {content['data']['count']:,} training images")
    for name in ("", "groups", "images", "could go", "largest"):
        table.add_column(name, justify="right" if name else "left")
    for key, title in (("exact", "equal pixels"), ("near", f"near, within {twins['near']['radius']:.3g}")):
        table.add_row(title, *(f"{twins[key][k]:,}" for k in ("groups", "images", "spare", "largest")))
    out_console.print(table)
    rows = [(k, v) for k, v in content["memorized"].items() if v is not None]
    if rows:
        table = Table(title=f"Memorized: d1/d2 < {content['threshold']:.3g} in {escape(content['features'])}")
        for name in ("", "images", "memorized", "share", "95 % interval", "equal pixels", "median d1", "median d1/d2"):
            table.add_column(name, justify="right" if name else "left")
        for key, m in rows:
            interval = f"[{m['low']:.2%}, {m['high']:.2%}]"
            numbers = f"{m['exact']:,}", f"{m['nearest'][1]:.3g}", f"{m['ratio'][1]:.3g}"
            name = key.replace("_", "-")
            table.add_row(name, f"{m['of']:,}", f"{m['count']:,}", f"{m['share']:.2%}", interval, *numbers)
        out_console.print(table)
    compared = content["comparison"]
    if compared is not None:
        out_console.print(
            f"nearer to training than to held-out images ({compared['references']:,} of each): {compared['share']:.1%} "
            f"[{compared['low']:.1%}, {compared['high']:.1%}], {p_text(compared)}; 50 % without copying",
            markup=False,
        )
    for line in (content["verdict"]["sentence"], *content["notes"]):
        out_console.print(line, markup=False)
    if out is not None:
        sys.stdout.write(f"report: {out / 'report.html'}\n")
