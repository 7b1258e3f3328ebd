"""Record -> one self-contained HTML file that opens from disk. Draws, never computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from symbreak.report.figures import (
    COLUMNS,
    MOST_BARS,
    arc_figure,
    audit_figure,
    comparison_figure,
    composition_figure,
    line_figure,
    phases_figure,
    spectrum_figure,
    svg,
    sweep_figure,
)
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, write_whole
from symbreak.runtime.plain import plain

__all__ = ["p_text", "verdict", "write_report"]


def write_report(record: Record, path: str | Path) -> Path:
    """Write the report of a study, a diagnosis, an audit or an evaluation.

    Args:
        record: a `Record` of kind ``"study"``, ``"phases"``, ``"audit"`` or ``"evaluation"``.
        path: the HTML file; it appears whole or not at all.

    Raises:
        InputError: for a record of another kind or with missing parts.
    """
    import jinja2

    if record.kind not in PAGES:
        known = ", ".join(PAGES)
        raise InputError(f"there is no report for records of kind {record.kind!r}; expected one of {known}.")
    page, find = PAGES[record.kind]
    loader = jinja2.FunctionLoader(
        lambda n: (resources.files("symbreak.report") / "templates" / n).read_text(encoding="utf-8")
    )
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    template = pages.get_template(page)
    try:
        html = template.render(**find(record))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a text for a number, a list for a table: figures and pages fail in any way
        said = f"lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"this is a damaged record, or one of another version ({said}). Run it again.") from error
    # half of a pair of surrogates, from JSON or a file name, has no place in UTF-8
    return write_whole(path, lambda p: p.write_text(html, encoding="utf-8", errors="replace"))


def _number(value: float | str | None, digits: int = 4) -> str:
    """Records write an infinity as a string."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}g}"


def _interval(low: float | str | None, high: float | str | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"[{_number(low, digits)}, {_number(high, digits)}]"


def _values(record: Record) -> dict[str, Any]:
    content = plain(record.content)
    phases = content["phases"] if record.kind == "study" else content
    data = content["data"]
    top = phases["eigenvalues"][0]
    critical = phases["speciation"]["[-1, 1]"]
    values: dict[str, Any] = {
        "title": f"{'Late start on' if record.kind == 'study' else 'Phases of'} {data['name']}",
        "lead": f"{data['count']:,} images of {' x '.join(map(str, data['shape']))}, content {data['fingerprint']}.",
        "smoke": bool(content.get("smoke")),
        "count": f"{data['count']:,}",
        "schedule": phases["schedule"],
        "times": [
            _times(scale, c, top * (1 if scale == "[-1, 1]" else 0.25)) for scale, c in phases["speciation"].items()
        ],
        "speciation_sentence": _speciation_sentence(critical, top, phases["total_variance"]),
        "spectrum": spectrum_figure(phases),
        "rows": [],
        "settings": _settings(record),
        "timings": _seconds(record),
        "grid_height": 44 if max(data["shape"][1:]) <= 16 else 72,
        "grids": [],
        "real_grid": "",
        "sweep": "",
        "selection": "",
        "distance_sentence": "",
        "table_note": "",
    }
    values |= dict.fromkeys(("phases", "arc", "criteria", "checks", "pictures", "notes"), "")
    if record.kind == "study":
        values |= _study_values(content, record.settings)
    elif content.get("criteria"):
        values |= _phases_values(content, plain(record.timings))
    return values


def _settings(record: Record) -> list[tuple[str, str]]:
    return [*_flat(record.settings), *((f"version: {k}", v) for k, v in sorted(record.versions.items()))]


def _seconds(record: Record) -> list[tuple[str, str]]:
    return [(k, f"{v:.1f}") for k, v in sorted(record.timings.items(), key=lambda kv: -kv[1])]


def _flat(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in sorted(settings.items())]


def _times(scale: str, c: dict[str, Any], top: float) -> dict[str, Any]:
    cells = [{"value": _number(top), "interval": ""}]
    for key in ("sigma", "ou_time", "log_snr", "step"):
        views = [None if c[w] is None else c[w].get(key) for w in ("level", "low", "high")]
        low, high = (views[2], views[1]) if key == "log_snr" else (views[1], views[2])
        cells.append({"value": _number(views[0]), "interval": _interval(low, high)})
    return {"scale": scale, "cells": cells, "reason": c["reason"] or ""}


def _speciation_sentence(c: dict[str, Any], top: float, total: float) -> str:
    share = f"The top eigenvalue is {top:.4g}, {top / total:.0%} of the total variance."
    if c["level"] is None:
        return f"{share} No spectral speciation: {c['reason']}"
    step = "" if c["level"].get("step") is None else f", step {c['level']['step']:.0f}"
    return (
        f"{share} Above sigma = {c['level']['sigma']:.3g}{step} the noise hides every mode of the data; below it they "
        "are decided one after the other."
    )


def _phases_values(content: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
    """Everything of a diagnosis beyond the spectrum."""
    rows = []
    for c in content["criteria"]:
        cells = []
        for key in ("sigma", "ou_time", "step"):
            views = [None if c[w] is None else c[w].get(key) for w in ("level", "low", "high")]
            cells.append({"value": _number(views[0], 3), "interval": _interval(views[1], views[2])})
        where = ", ".join(w.upper() for w in (c["flow"], c["frame"]) if w)
        rows.append(
            {
                "name": c["name"],
                "of": c["of"],
                "where": where,
                "cells": cells,
                "source": c["source"],
                "seconds": _number(timings.get(c["stage"]), 2),
                "note": c["reason"] or "",
            }
        )
    return {
        "phases": svg(phases_figure(content)),
        "arc": svg(arc_figure(content["arc"])) if content["arc"] else "",
        "criteria": rows,
        "checks": content["checks"],
        "pictures": [{**p, "png": _base64(p["png"])} for p in content["pictures"]],
        "notes": content["notes"],
    }


def _study_values(content: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    ground, network = content["floor"], content["network"]
    rows, wins, losses = [], 0, 0
    for row in content["rows"]:
        cells = []
        for key in ("standard", "spectral", "best", "noised"):
            cell = row[key]
            note = f"{cell['spacing']}" if key == "standard" else f"sigma {cell['level']['sigma']:.3g}"
            d = cell["distance"]
            cells.append({"value": _number(d["mean"], 3), "interval": _interval(d["low"], d["high"]), "note": note})
        said, kind = verdict(row["standard"]["distance"], row["best"]["distance"])
        wins, losses = wins + (kind == "win"), losses + (kind == "lose")
        rows.append({"sampler": row["sampler"], "calls": row["calls"], "cells": cells, "verdict": said, "kind": kind})
    sentence = (
        f"Fréchet distance in the features of {ground['extractor']} to {ground['reference']:,} held-out images. "
        f"The best Gaussian late start is nearer than the standard start in {wins} of {len(rows)} rows beyond the "
        f"intervals, farther in {losses}. The floor, real training images at the same counts, is {ground['mean']:.3g} "
        f"{_interval(ground['low'], ground['high'])}."
    )
    reference = content.get("reference")
    if reference:
        d = reference["distance"]
        sentence += (
            f" The network at its best, standard DDIM with {reference['calls']} calls: {d['mean']:.3g} "
            f"{_interval(d['low'], d['high'])}."
        )
    d = content["rows"][0]["standard"]["distance"]
    accuracy = content["extractor"].get("held_out_accuracy")
    note = (
        f"Mean of {d['repeats']} repeats of {d['samples']} images with its 95 % Student-t interval, against "
        f"{d['reference']:,} held-out images; calls are network calls (NFE). Spacing and level were "
        "chosen on other seeds. The last column starts from real training images noised to the level of the column "
        "before: what the best law would give. "
        f"Network: {network['parameters']:,} parameters, {network['prediction']} prediction."
        + ("" if accuracy is None else f" The extractor's held-out accuracy is {accuracy:.1%}.")
    )
    grids = [
        {
            "title": f"{row['sampler']}, {row['calls']} network calls",
            "lines": [
                {"name": label, "png": _base64(row[key]["grid"])}
                for key, label in (*COLUMNS, ("noised", "data noised to that level"))
            ],
        }
        for row in content["rows"]
    ]
    return {
        "rows": rows,
        "distance_sentence": sentence,
        "table_note": note,
        "grids": grids,
        "real_grid": _base64(content["real_grid"]),
        "sweep": sweep_figure(content),
        "selection": settings["selection"],
    }


def _audit_values(record: Record) -> dict[str, Any]:
    content = plain(record.content)
    data, twins, compared = content["data"], content["duplicates"], content["comparison"]
    exact, near = twins["exact"], twins["near"]
    rows = []
    for key, title in (("samples", "samples"), ("held_out", "held-out images")):
        m = content["memorized"][key]
        if m is not None:
            rows.append(
                {
                    "name": title,
                    "of": f"{m['of']:,}",
                    "count": f"{m['count']:,}",
                    "share": f"{m['share']:.2%}",
                    "interval": f"[{m['low']:.2%}, {m['high']:.2%}]",
                    "exact": f"{m['exact']:,}",
                    "nearest": f"{m['nearest'][1]:.3g}",
                    "range": _interval(m["nearest"][0], m["nearest"][2]),
                    "ratio": f"{m['ratio'][1]:.3g}",
                    "ratio_range": _interval(m["ratio"][0], m["ratio"][2]),
                }
            )
    source = content["samples"]
    return {
        "title": f"Does it copy {data['name']}?" if source else f"Duplicates in {data['name']}",
        "lead": f"{data['count']:,} training images of {' x '.join(map(str, data['shape']))}, content "
        f"{data['fingerprint']}; neighbours in {content['features']}.",
        "verdict": content["verdict"]["sentence"],
        "kind": {"copies": "lose", "leans": "leans", "none": "win"}.get(content["verdict"]["kind"], "tie"),
        "duplicates": [
            {"name": name, **{k: f"{d[k]:,}" for k in ("groups", "images", "spare", "largest")}}
            for name, d in (("equal in every pixel", exact), ("near duplicates, among the different images", near))
        ],
        "duplicates_sentence": f"{twins['different']:,} of {data['count']:,} images differ, {twins['deduplicated']:,} "
        f"by more than near duplicates do: pairs within {near['radius']:.4g}, or joined by a chain of such pairs. That "
        f"is {near['fraction']:.3g} of the median distance of a training image to its eighth neighbour, "
        f"{near['scale']:.4g}.",
        "twins": [{**p, "png": _base64(p["png"])} for p in twins["pictures"]],
        "rows": rows,
        "threshold": f"{content['threshold']:.3g}",
        "repeated": ""
        if source is None or source["distinct"] == source["count"]
        else f"{source['count'] - source['distinct']:,}",
        "histograms": svg(audit_figure(content)) if rows else "",
        "compared": None
        if compared is None
        else {
            "share": f"{compared['share']:.1%}",
            "interval": f"[{compared['low']:.1%}, {compared['high']:.1%}]",
            "p": p_text(compared),
            "references": f"{compared['references']:,}",
            "effective": f"{compared['effective']:,.0f}",
            "of": f"{compared['of']:,}",
            "figure": svg(comparison_figure(compared)),
        },
        "pairs": [{**p, "png": _base64(p["png"]), "text": _pair(p)} for p in content["pairs"]],
        "notes": content["notes"],
        "smoke": False,
        "grid_height": 56,
        "picture_height": 56 if max(data["shape"][1:]) <= 32 else 66,
        "settings": [
            *((k, v) for k, v in _flat({k: v for k, v in record.settings.items() if not isinstance(v, dict)})),
            *((f"samples: {k}", v) for k, v in _flat(record.settings["made"] or {}) if k != "scheduler"),
            *((f"version: {k}", v) for k, v in sorted(record.versions.items())),
        ],
        "timings": [(k, f"{v:.1f}") for k, v in sorted(record.timings.items(), key=lambda kv: -kv[1])],
    }


def p_text(compared: dict[str, Any]) -> str:
    """A p-value of permutations, which say no more than their number allows."""
    least = compared["p_value"] <= 1 / (1 + compared["permutations"])
    return f"p {'<=' if least else '='} {compared['p_value']:.2g}"


def _pair(p: dict[str, Any]) -> str:
    said = ", equal in every pixel" if p["exact"] else ""
    return f"d1/d2 = {p['ratio']:.3f} ({p['d1']:.3g} / {p['d2']:.3g}){said}"


def _evaluation_values(record: Record) -> dict[str, Any]:
    content = plain(record.content)
    d, ground, beyond = content["distance"], content["floor"], content["extrapolated"]
    extract, data = content["extractor"], content["data"]
    rows = [
        _measured(f"{d['name']}, all samples", {**d, "samples": d["count"]}, "pooled", "interval: spread, not bias"),
        _measured(f"{d['name']}, mean of {d['repeats']} repeats", d, "mean", "", ("low", "high")),
    ]
    if beyond is not None:
        rows.append(_measured(f"{d['name']}, infinitely many samples", {**beyond, "samples": "infinite"}, "value"))
    if ground is not None:
        name = f"floor: training images, {ground['repeats']} repeats"
        rows.append(_measured(name, ground, "mean", "what nothing real beats at this count", ("low", "high")))
    for key, names in (
        ("kid", ("value",)),
        ("precision_recall", ("precision", "recall")),
        ("density_coverage", ("density", "coverage")),
        ("vendi", ("value", "reference_value")),
    ):
        found = content[key]
        for name in () if found is None else names:
            title = {"kid": found.get("name"), "vendi": "Vendi score"}.get(key, name)
            note = f"k = {found['k']}" if "k" in found else found.get("kernel", "")
            if key == "vendi" and name == "reference_value":
                note = "of the held-out images"
            shown = {"reference": None, **found}
            if name == "reference_value":
                shown |= {"samples": None, "reference": found["samples"]}
            rows.append(_measured(title, shown, name, note, ("low", "high") if name == "value" else None))
    accuracy = extract["held_out_accuracy"]
    sentence = (
        f"{d['count']:,} samples against {d['reference']:,} held-out images in the {extract['features']:,} features of "
        f"{extract['name']} (resize: {extract['resize']})"
        + ("." if accuracy is None else f", whose held-out accuracy is {accuracy:.1%}.")
    )
    near = content["neighbours"]
    return {
        "title": f"Evaluation of {content['samples']['name']}",
        "lead": f"Training images: {data['count']:,} of {' x '.join(map(str, data['shape']))} from {data['name']}, "
        f"content {data['fingerprint']}.",
        "smoke": False,
        "grid_height": 44 if max(data["shape"][1:]) <= 16 else 72,
        "settings": _settings(record),
        "timings": _seconds(record),
        "sentence": sentence,
        "numbers": rows,
        "notes": content["notes"],
        "line": "" if beyond is None else line_figure(d, beyond),
        "tables": [_composition_table(t) for t in content["composition"]],
        "neighbours": [
            {
                "name": title,
                "count": f"{near[key]['count']:,}",
                "median": _number(near[key]["median_nearest"], 3),
                "memorized": f"{near[key]['memorized']:.2%}",
            }
            for key, title in (("samples", "samples"), ("held_out", "held-out images"))
            if near[key] is not None
        ],
        "pictures": [{**p, "png": _base64(p["png"])} for p in content["pictures"]],
    }


def _measured(
    name: str, found: dict[str, Any], key: str, note: str = "", ends: tuple[str, str] | None = None
) -> dict[str, str]:
    """A row of the table of numbers; the ends of the interval are ``low`` and ``high``, or named after the key."""
    low, high = ends or (("low", "high") if key == "value" else (f"{key}_low", f"{key}_high"))
    counts = [f"{v:,}" if isinstance(v, int) else str(v or "") for v in (found["samples"], found["reference"])]
    return {
        "name": name,
        "value": _number(found[key]),
        "interval": _interval(found[low], found[high], 4),
        "samples": counts[0],
        "reference": counts[1],
        "features": found["extractor"],
        "note": note,
    }


def _composition_table(table: dict[str, Any]) -> dict[str, Any]:
    def cell(c: dict[str, Any]) -> dict[str, str]:
        return {"value": f"{c['share']:.1%}", "interval": f"[{c['share_low']:.1%}, {c['share_high']:.1%}]"}

    entropy = table["entropy"]
    accuracy = table["held_out_accuracy"]
    return {
        "attribute": table["attribute"],
        "train": f"{table['counts']['train']:,}",
        "samples": f"{table['counts']['samples']:,}",
        "rows": [{"name": r["class"], "cells": [cell(r["train"]), cell(r["samples"])]} for r in table["rows"]],
        "entropy": [
            {
                "value": _number(entropy[side]["value"]),
                "interval": _interval(entropy[side]["low"], entropy[side]["high"], 4),
            }
            for side in ("train", "samples")
        ],
        "largest": _number(entropy["largest"]),
        "classifier": table["classifier"],
        "accuracy": "" if accuracy is None else f" (held-out accuracy {accuracy:.1%})",
        "figure": composition_figure(table) if len(table["rows"]) <= MOST_BARS else "",
    }


def _base64(text: str) -> str:
    """Only base64 may enter an image source."""
    if not re.fullmatch(r"[A-Za-z0-9+/=]*", text):
        raise KeyError("a readable image grid")
    return text


def verdict(standard: dict[str, Any], late: dict[str, Any]) -> tuple[str, str]:
    """A sentence on late against standard start, and ``"win"``, ``"lose"`` or ``"tie"`` by their intervals."""
    ratio = standard["mean"] / late["mean"] if late["mean"] > 0 else float("inf")
    known = None not in (standard["low"], standard["high"], late["low"], late["high"])
    if known and late["high"] < standard["low"]:
        return f"{ratio:.2g} times nearer", "win"
    if known and late["low"] > standard["high"]:
        return f"loses: {1 / ratio:.2g} times farther", "lose"
    return f"within the intervals ({ratio:.2f})", "tie"


# the page of every kind of record, and what fills it
PAGES: dict[str, tuple[str, Callable[[Record], dict[str, Any]]]] = {
    "study": ("report.html", _values),
    "phases": ("report.html", _values),
    "audit": ("audit.html", _audit_values),
    "evaluation": ("evaluation.html", _evaluation_values),
}
