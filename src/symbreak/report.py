"""Record -> one self-contained HTML file that opens from disk. Draws, never computes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from symbreak.files import InputError, write_whole
from symbreak.record import Record, plain

__all__ = [
    "arc_figure",
    "audit_figure",
    "comparison_figure",
    "p_text",
    "phases_figure",
    "sweep_axes",
    "verdict",
    "write_report",
]

COLUMNS = (("standard", "standard start"), ("spectral", "late, at speciation"), ("best", "late, best of sweep"))
COLORS = ("#1f6fb4", "#d9822b", "#3a9a5b", "#b3424a", "#7a5ba6", "#7f6a5a", "#c2649a", "#5f6b7a")


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
    try:
        values = find(record)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"the record lacks {error}; it is damaged or from another version. Run it again.") from None
    loader = jinja2.FunctionLoader(
        lambda n: (resources.files("symbreak") / "templates" / n).read_text(encoding="utf-8")
    )
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    html = pages.get_template(page).render(**values)
    return write_whole(path, lambda p: p.write_text(html, encoding="utf-8"))


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
        "spectrum": _spectrum_figure(phases),
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


PANELS = {
    "clones": ("probability", "Clones and U-turns: is the class decided?"),
    "entropy": ("nats", "Class entropy H[c | x]: what is still open"),
    "information": ("nats", "How far from a Gaussian, by denoising losses (a lower bound)"),
    "loss": ("squared error", "Denoising loss on held-out images"),
    "rate": ("MMSE / sigma^2, nats", "Entropy rate, rescaled: the noise levels that decide most"),
    "stability": ("eigenvalue / threshold", "Stability of the central fixed point"),
    "mechanism": ("share", "Early dynamics: do fluctuations revert, is the denoiser linear?"),
    "collapse": ("f / a", "Excess entropy: 0 where a perfect score replays the training images"),
    "samples": ("log10 n", "Training images needed, so that a level lies above the collapse"),
    "condensation": ("share", "Condensation: do trajectories fall onto single training images?"),
    "opportunity": ("gain", "Window of opportunity: what a kick at this level changes in the end"),
}
SOURCES = {"network": COLORS[0], "class mixture": COLORS[1], "data": COLORS[2], "Gaussian": COLORS[4]}


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
        "phases": _svg(phases_figure(content)),
        "arc": _svg(arc_figure(content["arc"])) if content["arc"] else "",
        "criteria": rows,
        "checks": content["checks"],
        "pictures": [{**p, "png": _base64(p["png"])} for p in content["pictures"]],
        "notes": content["notes"],
    }


def phases_figure(content: dict[str, Any]) -> Any:
    """All criteria and curves on one sigma axis, the model's own step on a second one."""
    import math

    from matplotlib.figure import Figure

    found = [c for c in content["criteria"] if c["level"] is not None and c["level"]["sigma"] > 0]
    panels = [p for p in PANELS if any(c["panel"] == p for c in content["curves"])]
    heights = [0.6 + 0.2 * max(1, len(found)), *[2.2] * len(panels)]
    figure = Figure(figsize=(10.5, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    top = axes[0]
    ordered = sorted(found, key=lambda c: -c["level"]["sigma"])
    for i, c in enumerate(ordered):
        color = SOURCES.get(c["of"], COLORS[5])
        low, high = ((c[w] or c["level"])["sigma"] for w in ("low", "high"))
        if isinstance(high, float) and math.isfinite(high):
            top.plot([max(low, 1e-3), high], [i, i], color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
        top.plot(c["level"]["sigma"], i, "o", color=color, markersize=5)
    names = [f"{c['name']}{', ' + c['frame'].upper() if c['frame'] else ''} ({c['of']})" for c in ordered]
    top.set_yticks(range(len(names)), names, fontsize=8)
    top.set_ylim(len(names) - 0.4, -0.6)
    sigmas = [s for c in content["curves"] for s in c["sigma"]] + [c["level"]["sigma"] for c in found]
    bound = (content.get("regimes") or {}).get("collapse")
    for ax, panel in zip(axes[1:], panels):
        unit, title = PANELS[panel]
        own = [c for c in content["curves"] if c["panel"] == panel]
        for i, c in enumerate(own):
            color = c.get("color") or SOURCES.get(c["of"], COLORS[i % len(COLORS)])
            order = sorted(range(len(c["sigma"])), key=c["sigma"].__getitem__)
            if panel == "samples" and c["of"] == "data" and bound:  # far below the collapse images say nothing of it
                order = [j for j in order if c["sigma"][j] >= 0.5 * bound["sigma"]]
            s = [c["sigma"][j] for j in order]
            v, low, high = ([math.nan if c[k][j] is None else c[k][j] for j in order] for k in ("value", "low", "high"))
            ax.plot(s, v, c.get("line", "-"), color=color, linewidth=1.4, markersize=3, label=c["label"])
            ax.fill_between(s, low, high, color=color, alpha=0.15, linewidth=0)
        for line in content["lines"]:
            if line["panel"] == panel:
                ax.axhline(line["value"], color="#888", linestyle=":", linewidth=1, label=line["label"])
        if panel in ("loss", "information"):
            ax.set_yscale("log")
        if panel == "information":
            ax.set_ylim(bottom=1e-2)
        if panel == "samples":  # far below the collapse numbers lose their meaning
            ax.set_ylim(0, 3 * max(line["value"] for line in content["lines"] if line["panel"] == panel))
        ax.set_ylabel(unit, fontsize=8)
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for ax in axes:
        ax.set_xscale("log")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#e6eaf0", linewidth=0.8)
        ax.set_axisbelow(True)
    if sigmas:
        top.set_xlim(1.15 * max(sigmas), 0.87 * min(sigmas))
        _shade(axes, content.get("regimes") or {})
    ticks: list[dict[str, float]] = []
    for t in content["step_ticks"] if sigmas else ():
        apart = 0.06 * math.log(max(sigmas) / min(sigmas))  # or their numbers run into each other
        near = ticks and abs(math.log(t["sigma"] / ticks[-1]["sigma"])) < apart
        if min(sigmas) <= t["sigma"] <= max(sigmas) and not near:
            ticks.append(t)
    if ticks:
        above = top.twiny()
        above.set_xscale("log")
        above.set_xlim(top.get_xlim())
        from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

        above.xaxis.set_major_locator(FixedLocator([t["sigma"] for t in ticks]))
        above.xaxis.set_minor_locator(NullLocator())
        above.xaxis.set_minor_formatter(NullFormatter())
        above.set_xticklabels([f"{t['step']:.0f}" for t in ticks], fontsize=8)
        above.set_xlabel(f"step of {content['schedule']}", fontsize=8)
        above.spines[["right"]].set_visible(False)
    _plain_ticks(axes[-1].xaxis, [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)])
    axes[-1].set_xlabel("sigma (noise falls to the right, as in generation)")
    return figure


def _shade(axes: Any, regimes: dict[str, Any]) -> None:
    """The three regimes behind every panel: noise, generalization, memorization."""
    highest, lowest = axes[0].get_xlim()
    ends = [regimes.get(k) and regimes[k]["sigma"] for k in ("speciation", "collapse")]
    born, bound = (highest if v is None else min(max(v, lowest), highest) for v in ends)
    bound = lowest if ends[1] is None else bound
    spans = [(highest, max(born, bound), "#dfe7f2", "noise"), (bound, lowest, "#f7dedd", "memorization")]
    if ends[0] is None:
        spans = spans[1:]
    if born > bound:
        spans.append((born, bound, "#e4f1e4", "generalization"))
    for left, right, color, name in spans:
        if left <= right:
            continue
        for ax in axes:
            ax.axvspan(left, right, color=color, alpha=0.55, linewidth=0, zorder=-5)
        middle = (left * right) ** 0.5
        place = axes[0].get_xaxis_transform()
        axes[0].text(middle, 0.99, name, transform=place, fontsize=8, ha="center", va="top", color="#555")


def arc_figure(arc: dict[str, Any]) -> Any:
    """The potential along the arcs, one line a level, from high noise to low."""
    import math

    figure, axes = _figure(7.5, 3.6)
    ax = axes[0]
    order = sorted(range(len(arc["sigma"])), key=lambda i: -arc["sigma"][i])
    for place, i in enumerate(order):
        u = [math.nan if v is None else v for v in arc["value"][i]]
        # Wells deepen by orders of magnitude from level to level: every line has a scale of its own.
        height = max((v for v in u if math.isfinite(v)), default=1.0) or 1.0
        wells = arc["wells"][i]
        label = f"sigma {arc['sigma'][i]:.3g}: {wells} well{'s' * (wells != 1)}"
        shade = 0.25 + 0.65 * place / max(1, len(order) - 1)
        color = (0.85 * (1 - shade) + 0.12, 0.2 + 0.3 * (1 - shade), shade)
        ax.plot([a / math.pi for a in arc["angle"]], [v / height for v in u], color=color, linewidth=1.3, label=label)
    for at in (0.0, 0.5):
        ax.axvline(at, color="#bbb", linewidth=0.8)
    ax.set(xlabel="angle / pi; the trajectories are at 0 and 0.5", ylabel="potential, scaled to 1")
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


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
        "sweep": _sweep_figure(content),
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
        "histograms": _svg(audit_figure(content)) if rows else "",
        "compared": None
        if compared is None
        else {
            "share": f"{compared['share']:.1%}",
            "interval": f"[{compared['low']:.1%}, {compared['high']:.1%}]",
            "p": p_text(compared),
            "references": f"{compared['references']:,}",
            "effective": f"{compared['effective']:,.0f}",
            "of": f"{compared['of']:,}",
            "figure": _svg(comparison_figure(compared)),
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


SIDES = (("samples", "samples", COLORS[0]), ("held_out", "held-out images", COLORS[1]))


def audit_figure(content: dict[str, Any]) -> Any:
    """Histograms of d1/d2 and of the nearest training distance, samples against held-out images."""
    figure, (left, right) = _figure(10.5, 3.2, 2)
    for ax, key in ((left, "ratio"), (right, "distance")):
        found = content["histograms"][key]
        for side, label, color in SIDES:
            if side in found:
                _steps(ax, found["edges"], found[side], color, label)
        ax.set_ylabel("share a bin")
        ax.legend(fontsize=8, frameon=False, loc="best")
    left.axvspan(0, content["threshold"], color=COLORS[3], alpha=0.08, linewidth=0)
    left.axvline(content["threshold"], color=COLORS[3], linestyle="--", linewidth=1)
    left.set(xlabel="d1 / d2 (memorized in the shaded part)", xlim=(0, 1), title="Is one training image much nearer?")
    right.set(xlabel=f"distance to the nearest training image, {content['features']}", title="How near is the nearest?")
    right.set_xlim(left=0)
    return figure


def comparison_figure(compared: dict[str, Any]) -> Any:
    """Distances of the samples to the nearest training and to the nearest held-out image."""
    figure, axes = _figure(6.5, 3.0)
    for side, label, color in (("train", "training images", COLORS[3]), ("held_out", "held-out images", COLORS[2])):
        _steps(
            axes[0],
            compared["edges"],
            compared[side]["histogram"],
            color,
            f"nearest of {compared['references']:,} {label}",
        )
    axes[0].set(xlabel="distance of a sample", ylabel="share a bin", xlim=(0, None))
    axes[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def _steps(ax: Any, edges: list[float], counts: list[int], color: str, label: str) -> None:
    total = sum(counts) or 1
    ax.stairs([c / total for c in counts], edges, color=color, linewidth=1.4, label=label)
    ax.stairs([c / total for c in counts], edges, color=color, alpha=0.12, fill=True)


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
        "line": "" if beyond is None else _line_figure(d, beyond),
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


def _line_figure(d: dict[str, Any], beyond: dict[str, Any]) -> str:
    """The distance at the counts measured and the line to infinitely many samples."""
    figure, (ax,) = _figure(6.5, 3.2)
    n, left_out = beyond["counts"]
    ax.plot([0, 1 / left_out], [beyond["value"], beyond["distances"][1]], color=COLORS[0], linewidth=1, linestyle="--")
    ax.plot([1 / n, 1 / left_out], beyond["distances"], "o", color=COLORS[0], label="all samples; one part left out")
    ends = [[beyond["value"] - beyond["low"]], [beyond["high"] - beyond["value"]]]
    ax.errorbar([0], [beyond["value"]], yerr=ends, fmt="s", color=COLORS[1], capsize=3, label="infinitely many, 95 %")
    ax.plot([1 / d["samples"]], [d["mean"]], "^", color=COLORS[2], label="mean of the repeats")
    ax.set(xlabel="1 / number of samples", ylabel=d["name"])
    ax.legend(fontsize=8, frameon=False)
    return _svg(figure)


MOST_BARS = 40


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
        "figure": _composition_figure(table) if len(table["rows"]) <= MOST_BARS else "",
    }


def _composition_figure(table: dict[str, Any]) -> str:
    rows = table["rows"]
    figure, (ax,) = _figure(max(5.0, 0.55 * len(rows) + 2), 3.0)
    for i, (side, label) in enumerate((("train", "training images"), ("samples", "samples"))):
        shares = [r[side]["share"] for r in rows]
        ends = [
            [r[side]["share"] - r[side]["share_low"] for r in rows],
            [r[side]["share_high"] - r[side]["share"] for r in rows],
        ]
        at = [k + 0.4 * i for k in range(len(rows))]
        ax.bar(at, shares, 0.38, yerr=ends, color=COLORS[i], label=label, error_kw={"linewidth": 0.8}, capsize=2)
    ax.set_xticks([k + 0.2 for k in range(len(rows))], [r["class"] for r in rows], fontsize=8)
    ax.set_ylabel("share")
    ax.legend(fontsize=8, frameon=False)
    return _svg(figure)


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


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue().split("?>", 1)[-1].split('dtd">', 1)[-1]


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    # Figures are built without pyplot: no global state, no display.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "symbreak"  # the same figure gives the same bytes
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **kwargs)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#e6eaf0", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _spectrum_figure(phases: dict[str, Any]) -> str:
    figure, (left, right) = _figure(10.5, 3.4, 2)
    values = phases["eigenvalues"]
    rank = range(1, len(values) + 1)
    low = [float("nan") if v is None else v for v in phases["eigenvalues_low"]] if "eigenvalues_low" in phases else None
    left.loglog(rank, [max(v, 1e-12) for v in values], color=COLORS[0], marker=".", markersize=3, linewidth=1)
    if low is not None:
        high = [float("nan") if v is None else v for v in phases["eigenvalues_high"]]
        left.fill_between(rank, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    # Intervals of eigenvalues next to zero reach far beyond every eigenvalue: the values set the scale.
    bottom = max(1e-6, 0.5 * min((v for v in values if v > 1e-9), default=1e-6))
    left.set_ylim(bottom, 5 * max(1.0, *values))
    left.axhline(1.0, color="#888", linestyle="--", linewidth=1)
    left.annotate(
        "Lambda = 1: modes above have a speciation time",
        (1, 1.0),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="#666",
    )
    left.set(xlabel="mode", ylabel="covariance eigenvalue", title="Spectrum, pixels in [-1, 1]")
    rungs = [c for c in phases["ladder"] if c["level"] is not None]
    for i, c in enumerate(rungs):
        if c["low"] is not None and c["high"] is not None:
            right.plot(
                [max(c["low"]["sigma"], 1e-3), c["high"]["sigma"]],
                [i + 1, i + 1],
                color=COLORS[1],
                linewidth=3,
                alpha=0.4,
            )
        right.plot(c["level"]["sigma"], i + 1, "o", color=COLORS[1], markersize=5)
    right.set_xscale("log")
    right.set_yticks(range(1, len(rungs) + 1))
    right.invert_xaxis()
    right.invert_yaxis()
    right.set(xlabel="sigma (noise falls to the right)", ylabel="mode", title="When each mode is decided (95 %)")
    if not rungs:
        right.text(0.5, 0.5, "no mode above 1", transform=right.transAxes, ha="center")
    return _svg(figure)


def _plain_ticks(axis: Any, at: list[float]) -> None:
    """Ticks written as 1.36 instead of powers of ten; a matplotlib log axis knows only the latter."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(at))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def _sweep_figure(content: dict[str, Any]) -> str:
    calls = sorted({row["calls"] for row in content["rows"]})
    figure, axes = _figure(3.5 * len(calls), 3.6, len(calls), sharey=True)
    sweep_axes(content, axes)
    return _svg(figure)


def sweep_axes(content: dict[str, Any], axes: Any) -> None:
    """Distance against start level, one of the given axes for each number of network calls."""
    rows = content["rows"]
    calls = sorted({row["calls"] for row in rows})
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    critical = content["phases"]["speciation"]["[-1, 1]"]
    for ax, n in zip(axes, calls):
        for row in rows:
            if row["calls"] != n:
                continue
            color = COLORS[samplers.index(row["sampler"]) % len(COLORS)]
            sweep = sorted(row["sweep"], key=lambda s: s["sigma"])
            ax.loglog(
                [s["sigma"] for s in sweep],
                [s["pooled"] for s in sweep],
                "o-",
                color=color,
                markersize=3.5,
                linewidth=1.3,
                label=row["sampler"],
            )
            ax.axhline(min(row["spacings"].values()), color=color, linestyle=":", linewidth=1)
        if critical["low"] is not None and critical["high"] is not None:
            ax.axvspan(critical["low"]["sigma"], critical["high"]["sigma"], color="#999", alpha=0.25, linewidth=0)
        ax.axvline(critical["level"]["sigma"], color="#555", linewidth=1)
        ax.axhline(content["selection_floor"]["mean"], color="#999", linewidth=1)
        _plain_ticks(ax.xaxis, sorted({s["sigma"] for row in rows[:1] for s in row["sweep"]}))
        _plain_ticks(ax.yaxis, [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)])
        ax.invert_xaxis()
        ax.set(xlabel="start level sigma (later to the right)", title=f"{n} network calls")
    axes[0].set_ylabel(f"Fréchet distance, {content['floor']['extractor']}", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)


# the page of every kind of record, and what fills it
PAGES: dict[str, tuple[str, Callable[[Record], dict[str, Any]]]] = {
    "study": ("report.html", _values),
    "phases": ("report.html", _values),
    "audit": ("audit.html", _audit_values),
    "evaluation": ("evaluation.html", _evaluation_values),
}
