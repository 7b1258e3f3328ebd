"""The figures of reports and of the documentation, from plain values. Draws, never computes."""

from __future__ import annotations

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from symbreak.runtime.plain import Values
from symbreak.runtime.shown import sigma_axis

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "MOST_BARS",
    "added_figure",
    "arc_figure",
    "attributes_figure",
    "audit_figure",
    "comparison_figure",
    "composition_figure",
    "curves_figure",
    "figure_of",
    "line_figure",
    "phases_figure",
    "scale_of",
    "spectrum_figure",
    "svg",
    "sweep_axes",
    "sweep_figure",
    "training_figure",
]


COLORS = ("#1f6fb4", "#d9822b", "#3a9a5b", "#b3424a", "#7a5ba6", "#7f6a5a", "#c2649a", "#5f6b7a")
# of every panel: what its one axis counts, and what it shows
PANELS = {
    "clones": ("probability", "Is the class decided? Two samples that part here end in the same class"),
    "against": ("ratio", "The network's squared error over a law's: above 1 the law denoises better"),
    "collapse": ("f / a", "Excess entropy: at 0 a perfect denoiser replays the training images"),
    "changed": ("share", "Class changed by going back to this level, or by a kick there"),
    "pixels": ("share", "Squared difference after a U-turn, of that of two images"),
    "entropy": ("nats", "Class entropy H[c | x]: what is still open"),
    "condition": ("nats", "When does the prompt decide? What a noised sample tells of it"),
    "information": ("nats", "How far from a law, by denoising losses (a lower bound)"),
    "loss": ("squared error", "Squared error of a denoised image, summed over its pixels in [-1, 1]"),
    "rate": ("nats", "Squared error / sigma^2: the noise levels that decide most"),
    "stability": ("ratio", "Stability of the central fixed point: eigenvalue over its threshold"),
    "mechanism": ("correlation", "Do early fluctuations revert? Correlation of a state with its start"),
    "linear": ("share", "Is the early denoiser linear? Share that one linear map explains"),
    "samples": ("log10 n", "Training images needed, so that this level lies above the collapse"),
    "condensation": ("probability", "Do trajectories fall onto single training images? The nearest is the final one"),
    "participation": ("share", "How few training images share a state: 1 - log participation / log n"),
    "opportunity": ("gain", "Window of opportunity: what a kick at this level changes in the end"),
}
FIRST = ("clones", "against", "collapse")  # panels below the criteria; the others are a figure of their own
NOTHING = {"against": 1.0, "information": 0.0, "collapse": 0.0}  # points whose interval has this value are hollow
LINE = 0.105  # height of a line of a label, of a panel's
LETTERS = 21  # of a line of a label beside a panel
RATIOS = (0.2, 0.3, 0.5, 0.7, 0.9, 1, 1.1, 1.5, 2, 3, 5)
LOGARITHMIC = ("loss", "information", "against")
# Inches of a figure, on 480 pixels still read; the part of them that is left of the panels, and of the labels of lines.
WIDTH, LEFT, MARGIN = 5.2, 0.1, 0.74
SOURCES = {"network": COLORS[0], "class mixture": COLORS[1], "data": COLORS[2], "Gaussian": COLORS[4]}
SIDES = (("samples", "samples", COLORS[0]), ("held_out", "held-out images", COLORS[1]))


def phases_figure(content: Values) -> Figure:
    """Samples along the axis, all criteria and what decides, on one sigma axis with the model's own step above it."""
    rows = [c for c in content["criteria"] if c["level"] is not None and c["level"]["sigma"] > 0]
    rows.sort(key=lambda c: -c["level"]["sigma"])
    strip = (content.get("along") or {}).get("rows", [])
    panels = _drawn(content, FIRST)
    places = [_side(c, *_window(content)) for c in rows]
    slots = len(rows) + places.count(None) + 1.5
    figure, axes = _stacked([*[0.34 * len(strip)] * bool(strip), 0.155 * slots, *[1.35] * len(panels)], content)
    if strip:
        _strip(axes[0], content["along"])
    below = axes[1:] if strip else axes
    _criteria(below[0], rows, places, slots)
    _shade(axes, content.get("regimes") or {}, named=below[0])
    for ax, panel in zip(below[1:], panels):
        _panel(ax, panel, content)
    return figure


def curves_figure(content: Values) -> Figure | None:
    """All other curves, a panel a quantity, on the same axis; ``None`` where there are none."""
    panels = _drawn(content, [p for p in PANELS if p not in FIRST])
    if not panels:
        return None
    figure, axes = _stacked([1.35] * len(panels), content)
    _shade(axes, content.get("regimes") or {}, named=axes[-1])
    for ax, panel in zip(axes, panels):
        _panel(ax, panel, content)
    return figure


def _drawn(content: Values, panels: Iterable[str]) -> list[str]:
    return [p for p in panels if any(c["panel"] == p for c in content["curves"])]


def _stacked(heights: list[float], content: Values) -> tuple[Figure, np.ndarray]:
    """Axes below each other on one axis of sigma, with the regimes behind them and the model's step above."""
    from matplotlib.figure import Figure

    total = sum(heights) + 0.42 * len(heights) + 0.75
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    figure.subplots_adjust(LEFT, 0.5 / total, MARGIN, 1 - 0.5 / total, hspace=0.42 * len(heights) / sum(heights))
    low, high = _window(content)
    for ax in axes:
        ax.set_xscale("log")
        _plain_frame(ax)
        ax.tick_params(labelsize=8)
    axes[0].set_xlim(high, low)
    _step_axis(axes[0], content, low, high)
    _plain_ticks(axes[-1].xaxis, [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)])
    axes[-1].set_xlabel("sigma, noise over signal (falls to the right, as in generation)", fontsize=8)
    return figure, axes


def _window(content: Values) -> tuple[float, float]:
    """Lowest and highest level where one looks: around the criteria, inside the curves."""
    levels = [c["level"]["sigma"] for c in content["criteria"] if c["level"] is not None and c["level"]["sigma"] > 0]
    curves = [s for c in content["curves"] for s in c["sigma"]]
    everything = curves or levels or [0.1, 10.0]
    low, high = min(everything), max(everything)
    if levels:
        low, high = max(low, 0.5 * min(levels)), min(high, 2 * max(levels))
    return (low, high) if low < high else (0.5 * low, 2 * low)


def _strip(ax: Axes, along: Values) -> None:
    """Rows of samples, each at its level on the axis; of levels whose pictures would cover each other, every other."""
    import numpy as np
    from PIL import Image

    ax.grid(False)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    right, left = (math.log(end) for end in sorted(ax.get_xlim()))
    count, rows = len(along["sigma"]), [row for row in along["rows"] if row["png"]]
    # One frame for all pictures, each in its place: axes of their own for each take as long as the whole diagnosis.
    frame = ax.inset_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
    frame.set_axis_off()
    ax.figure.suppressComposite = True  # pictures stay single ones, with their own pixels
    box = ax.get_window_extent()
    height, places = 1 / max(1, len(rows)), [(left - math.log(sigma)) / (left - right) for sigma in along["sigma"]]
    apart = abs(places[-1] - places[0]) / max(1, count - 1) * box.width
    for i, row in enumerate(rows):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"]))).convert("RGB"))
        tiles = np.array_split(pixels, count, axis=1)
        scale = min(0.94 / count * box.width / tiles[0].shape[1], 0.92 * height * box.height / tiles[0].shape[0])
        every = math.ceil(scale * tiles[0].shape[1] / max(apart, 1e-9)) if count > 1 else 1
        for x, tile in list(zip(places, tiles))[::-1][::every]:
            y = 1 - (i + 0.5) * height
            w, h = scale * tile.shape[1] / box.width / 2, scale * tile.shape[0] / box.height / 2
            place = (x - w, x + w, y - h, y + h)
            frame.imshow(tile, interpolation="nearest", aspect="auto", extent=place, clip_on=False)
        ax.text(1.02, 1 - (i + 0.5) * height, row["title"], transform=ax.transAxes, fontsize=8, va="center")
    ax.set_title("When does it decide? Held-out samples along the axis", fontsize=9, loc="left", pad=16)


def _name(c: Values) -> str:
    return f"{c['name']}{', ' + c['frame'].upper() if c['frame'] else ''} ({c['of']})"


def _ends(c: Values, low: float, high: float) -> tuple[float, float]:
    """The lowest and the highest level that a critical time is drawn at."""
    ends = [e["sigma"] for e in (c["low"], c["level"], c["high"]) if e and isinstance(e["sigma"], float)]
    return max(min(ends), low), min(max(ends), high)


def _side(c: Values, low: float, high: float) -> str | None:
    """The side of its bar where the name of a critical time has room; ``None`` where its bar is too long."""
    first, last = _ends(c, low, high)
    points = 72 * WIDTH * (MARGIN - LEFT) / math.log(high / low)
    room = {"right": points * math.log(first / low) + 72 * WIDTH * (1 - MARGIN), "left": points * math.log(high / last)}
    return next((side for side in room if 4.4 * len(_name(c)) + 6 < room[side]), None)


def _criteria(ax: Axes, rows: list[Values], places: list[str | None], slots: float) -> None:
    """Critical times, one below the other, each with its name beside it, or above it where there is no room."""
    right, left = sorted(ax.get_xlim())
    y = -1.0
    for c, side in zip(rows, places):
        y += 1 if side else 2
        color = SOURCES.get(c["of"], COLORS[5])
        _span(ax, c, y, color, 0.35)
        first, last = _ends(c, right, left)
        at, offset = (last, -5) if side == "left" else (first, 5) if side else (last, 0)
        text: Values = {"xytext": (offset, 0), "textcoords": "offset points", "va": "center"}
        text["ha"] = "right" if side == "left" else "left"
        ax.annotate(_name(c), (at, y - (side is None)), fontsize=8, color=color, annotation_clip=False, **text)
    ax.set_yticks([])
    ax.set_ylim(slots - 0.6, -0.6)
    ax.set_title("Every criterion with its interval (hollow: without one)", fontsize=9, loc="left")


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _span(ax: Axes, critical: Values, y: float, color: str, alpha: float) -> None:
    """A critical time as a dot on its interval, at height y; hollow where it has none."""
    known = [critical[w] is not None and math.isfinite(float(critical[w]["sigma"])) for w in ("low", "high")]
    low, high = ((critical[w] or critical["level"])["sigma"] for w in ("low", "high"))
    if isinstance(high, float) and math.isfinite(high):
        ax.plot([max(low, 1e-3), high], [y, y], color=color, linewidth=4, alpha=alpha, solid_capstyle="butt")
    face = color if all(known) else "white"
    ax.plot(critical["level"]["sigma"], y, "o", color=color, markerfacecolor=face, markersize=4.5)


def _panel(ax: Axes, panel: str, content: Values) -> None:
    """The curves of one panel, their names at their ends."""
    unit, title = PANELS[panel]
    if content.get("data", {}).get("units"):  # no pictures
        title = title.replace(
            " of a denoised image, summed over its pixels in [-1, 1]", " of a denoised sample, summed"
        )
        title = title.replace("images", "samples")
    curves = [c for c in content["curves"] if c["panel"] == panel]
    lines = [line for line in content["lines"] if line["panel"] == panel]
    collapse, labels = (content.get("regimes") or {}).get("collapse"), []
    for i, c in enumerate(curves):
        color = c.get("color") or SOURCES.get(c["of"], COLORS[i % len(COLORS)])
        order = sorted(range(len(c["sigma"])), key=c["sigma"].__getitem__)
        if panel == "samples" and c["of"] == "data" and collapse:  # far below the collapse images say nothing of it
            order = [j for j in order if c["sigma"][j] >= 0.5 * collapse["sigma"]]
        s, v, low, high = (_numbers([c[k][j] for j in order]) for k in ("sigma", "value", "low", "high"))
        dashes = c.get("line", "-").strip("os^")
        ax.plot(s, v, dashes, color=color, linewidth=1.4)
        ax.fill_between(s, low, high, color=color, alpha=0.15, linewidth=0)
        _points(ax, (s, v, low, high), color, NOTHING.get(panel), c.get("line", "-") != dashes)
        labels.append((s, v, c["label"], color))
    for line in lines:
        ax.axhline(line["value"], color="#888", linestyle=":", linewidth=1)
        labels.append(([ax.get_xlim()[1]], [line["value"]], line["label"], "#777"))
    if panel == "against":
        ax.axhline(1.0, color="#888", linestyle=":", linewidth=1)
    _height(ax, panel, curves, lines)
    _labels_at_lines(ax, labels)
    ax.set_ylabel(unit, fontsize=8)
    ax.set_title(title, fontsize=9, loc="left")


def _points(ax: Axes, curve: tuple[list[float], ...], color: str, nothing: float | None, marked: bool) -> None:
    """The points of a curve; hollow where the interval does not tell the value from one that says nothing."""
    resolved: tuple[list[float], list[float]] = ([], [])
    hollow: tuple[list[float], list[float]] = ([], [])
    for s, v, low, high in zip(*curve):
        told = nothing is None or not low <= nothing <= high
        for values, number in zip(resolved if told else hollow, (s, v)):
            values.append(number)
    if marked:
        ax.plot(*resolved, "o", color=color, markersize=3)
    ax.plot(*hollow, "o", color=color, markerfacecolor="white", markersize=3.4, markeredgewidth=0.9)


def _height(ax: Axes, panel: str, curves: list[Values], lines: list[Values]) -> None:
    """The limits of a panel's own axis, by what is seen on the axis of sigma."""
    low, high = sorted(ax.get_xlim())
    seen = [
        float(v)
        for c in curves
        for s, v in zip(c["sigma"], c["value"])
        if v is not None and low <= s <= high and math.isfinite(float(v))
    ]
    if panel in LOGARITHMIC and any(v > 0 for v in seen):
        ax.set_yscale("log")
    if panel == "information":
        ax.set_ylim(1e-2, 2 * max([1.0, *seen]))
    elif panel == "samples":  # far below the collapse numbers lose their meaning
        ax.set_ylim(0, 3 * max([line["value"] for line in lines], default=2.0))
    elif panel == "against" and seen:
        bottom, top = min(0.9, max(0.2, min(seen))) / 1.1, max(1.1, min(5.0, max(seen))) * 1.1
        ax.set_ylim(bottom, top)
        near = () if top / bottom < 2.6 else (0.9, 1.1)  # which would lie on 1
        _plain_ticks(ax.yaxis, [v for v in RATIOS if bottom < v < top and v not in near])
    elif seen:
        seen += [line["value"] for line in lines]
        room = 0.08 * (max(seen) - min(seen) or 1.0)
        if ax.get_yscale() == "linear":
            ax.set_ylim(min(seen) - room, max(seen) + room)


Label = tuple[list[float], list[float], str, str]  # levels and values of a line, its name and colour


def _labels_at_lines(ax: Axes, labels: list[Label]) -> None:
    """The name of every line at its right end, moved apart where they would lie on each other."""
    low, _ = sorted(ax.get_xlim())
    at: list[float] = []
    names: list[tuple[list[str], str]] = []
    for s, v, text, color in labels:
        known = [(abs(math.log(a / low)), b) for a, b in zip(s, v) if math.isfinite(b) and a > 0]
        if known:
            end = max(min(known)[1], ax.get_ylim()[0]) if ax.get_yscale() == "log" else min(known)[1]
            height = ax.transAxes.inverted().transform(ax.transData.transform((low, end)))[1]
            at.append(min(1.0, max(0.0, float(height))))
            names.append((textwrap.wrap(text, LETTERS) or [""], color))
    order = sorted(range(len(at)), key=at.__getitem__)
    room = {pair: LINE * sum(len(names[i][0]) for i in pair) / 2 + 0.02 for pair in itertools.pairwise(order)}
    for below, above in room:
        at[above] = max(at[above], at[below] + room[below, above])
    if order:
        at[order[-1]] = min(at[order[-1]], 0.97 - LINE * (len(names[order[-1]][0]) - 1) / 2)
    for below, above in reversed(room):  # down again where the topmost would leave the panel
        at[below] = min(at[below], at[above] - room[below, above])
    style: Values = {"transform": ax.transAxes, "fontsize": 8, "va": "center", "linespacing": 1.0}
    for height, (lines, color) in zip(at, names):
        ax.text(1.015, height, "\n".join(lines), color=color, **style)


def _step_axis(top: Axes, content: Values, low: float, high: float) -> None:
    """The model's own steps above the axis of sigma."""
    ticks: list[dict[str, float]] = []
    apart = 0.1 * math.log(high / low)  # or their numbers run into each other
    for t in content["step_ticks"]:
        near = ticks and abs(math.log(t["sigma"] / ticks[-1]["sigma"])) < apart
        if low <= t["sigma"] <= high and not near:
            ticks.append(t)
    if ticks:
        above = top.twiny()
        above.set_xscale("log")
        above.set_xlim(top.get_xlim())
        _plain_ticks(above.xaxis, [t["sigma"] for t in ticks])
        above.set_xticklabels([f"{t['step']:.0f}" for t in ticks], fontsize=8)
        above.tick_params(pad=1, length=2)
        above.spines[["right"]].set_visible(False)
        name = f"step ({content['schedule']})"
        above.text(
            1.015, 1.0, textwrap.fill(name, LETTERS), transform=above.transAxes, fontsize=8, va="bottom", color="#555"
        )


def _shade(axes: np.ndarray, regimes: Values, named: Axes) -> None:
    """The three regimes behind every panel: noise, generalization, memorization; their names in one of them."""
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
        place = named.get_xaxis_transform()
        style: Values = {"fontsize": 8, "ha": "center", "va": "bottom", "color": "#555"}
        named.annotate(name, ((left * right) ** 0.5, 0), (0, 2), xycoords=place, textcoords="offset points", **style)


def arc_figure(arc: Values) -> Figure:
    """The potential along the arcs, one line a level, from high noise to low."""
    figure, axes = figure_of(WIDTH, 4.0)
    ax = axes[0]
    order = sorted(range(len(arc["sigma"])), key=lambda i: -arc["sigma"][i])
    for place, i in enumerate(order):
        u = _numbers(arc["value"][i])
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
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=2)
    return figure


def added_figure(added: Values) -> Figure:
    """What a network adds to its law: errors, the share of the denoiser that the law explains, nats above a level."""
    figure, axes = figure_of(10.5, 3.0, 3)
    panels = (
        ("Squared error on held-out images", (("law", "law", COLORS[1]), ("sum", "law and network", COLORS[0]))),
        (
            "Share that the law explains",
            (("share", "of the denoiser's variance", COLORS[1]), ("score", "of the score", COLORS[2])),
        ),
        ("Nats that the network adds above", (("nats", "", COLORS[0]),)),
    )
    for ax, (title, curves) in zip(axes, panels):
        for key, label, color in curves:
            s, v, low, high = (_numbers(added[key][k]) for k in ("sigma", "value", "low", "high"))
            ax.plot(s, v, "o-", color=color, markersize=2.5, linewidth=1.3, label=label)
            ax.fill_between(s, low, high, color=color, alpha=0.2, linewidth=0)
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis, [m * 10.0**e for e in range(-4, 4) for m in (1, 3)])
        ax.set_xlim(1.1 * max(s), 0.9 * min(s))
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("sigma (noise falls to the right)", fontsize=8)
        if added["between"] is not None:
            ax.axvspan(*added["between"], color=COLORS[0], alpha=0.07, linewidth=0)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].legend(fontsize=8, frameon=False, loc="lower left")
    axes[2].axhline(0, color="#888", linestyle="--", linewidth=1)
    return figure


def attributes_figure(content: Values) -> Figure:
    """The levels of all attributes on one axis; hollow ones are not resolved."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in content["rows"] if row["level"] is not None]
    strip = (content.get("along") or {}).get("rows", [])
    heights = [*[0.45 * len(strip)] * bool(strip), 1.0 + 0.2 * len(rows)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.2), layout="constrained")
    *above, ax = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    shown: dict[str, Artist] = {"told apart halfway": Line2D([], [], color=COLORS[0], marker="o", markersize=4.5)}
    for i, row in enumerate(rows):
        for name, marker in (("clones", "s"), ("u_turns", "^")):
            critical = (row.get("network") or {}).get(name)
            if critical and critical["level"] is not None:
                color = COLORS[2] if row["network"]["classifier"]["resolved"] else COLORS[7]
                ends = [(critical[k] or critical["level"])["sigma"] for k in ("low", "high")]
                ax.plot(ends, [i + 0.25] * 2, color=color, linewidth=0.8, alpha=0.6)
                ax.plot(critical["level"]["sigma"], i + 0.25, marker, color=color, markersize=4, ls="")
                shown.setdefault(name.replace("u_t", "U-t"), Line2D([], [], color=COLORS[2], marker=marker, ls=""))
        at, color = row["level"]["sigma"], COLORS[0] if row["resolved"] else COLORS[7]
        ends = [at if row[k] is None else row[k]["sigma"] for k in ("low", "high")]
        ax.plot(ends, [i, i], color=color, linewidth=1.5)
        ax.plot(at, i, "o", color=color, markersize=4.5, markerfacecolor=color if row["resolved"] else "white")
        if row["free_entropy"]["level"] is not None:
            (stroke,) = ax.plot(row["free_entropy"]["level"]["sigma"], i, "|", color=COLORS[3], markersize=8)
            shown.setdefault("free entropy", stroke)
    if content["spectral"]["level"] is not None:
        shown["spectral, all images"] = ax.axvline(content["spectral"]["level"]["sigma"], color=COLORS[1], ls=":")
    style: Values = {"frameon": False, "fontsize": 8, "ncol": 3, "columnspacing": 1, "handlelength": 1.4}
    ax.legend(shown.values(), shown, loc="lower left", bbox_to_anchor=(-0.02, 1), **style)
    ax.set_yticks(range(len(rows)), [row["attribute"].replace("_", " ") for row in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.invert_xaxis()
    _plain_ticks(ax.xaxis, [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)])
    ax.set_xlabel("sigma (noise falls to the right, as in generation)")
    _plain_frame(ax)
    if strip:  # in the places that the layout gives, which pictures keep their shape in
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        _strip(above[0], content["along"])
    return figure


def audit_figure(content: Values) -> Figure:
    """Histograms of d1/d2 and of the nearest training distance, samples against held-out images."""
    figure, (left, right) = figure_of(10.5, 3.2, 2)
    for ax, key in ((left, "ratio"), (right, "distance")):
        counts = content["histograms"][key]
        for side, label, color in SIDES:
            if side in counts:
                _steps(ax, counts["edges"], counts[side], color, label)
        ax.set_ylabel("share a bin")
        ax.legend(fontsize=8, frameon=False, loc="best")
    left.axvspan(0, content["threshold"], color=COLORS[3], alpha=0.08, linewidth=0)
    left.axvline(content["threshold"], color=COLORS[3], linestyle="--", linewidth=1)
    left.set(xlabel="d1 / d2 (memorized in the shaded part)", xlim=(0, 1), title="Is one training image much nearer?")
    right.set(xlabel=f"distance to the nearest training image, {content['features']}", title="How near is the nearest?")
    right.set_xlim(left=0)
    return figure


def comparison_figure(compared: Values) -> Figure:
    """Distances of the samples to the nearest training and to the nearest held-out image."""
    figure, axes = figure_of(WIDTH, 3.0)
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


def _steps(ax: Axes, edges: list[float], counts: list[int], color: str, label: str) -> None:
    total = sum(counts) or 1
    ax.stairs([c / total for c in counts], edges, color=color, linewidth=1.4, label=label)
    ax.stairs([c / total for c in counts], edges, color=color, alpha=0.12, fill=True)


def line_figure(d: Values, beyond: Values) -> str:
    """The distance at the counts measured, the line to infinitely many samples, and the value of infinitely many."""
    figure, (ax,) = figure_of(WIDTH, 3.2)
    n, left_out = beyond["counts"]
    end = beyond.get("samples_only", beyond["value"])  # the value where the reference's bias stays in
    ax.plot([0, 1 / left_out], [end, beyond["distances"][1]], color=COLORS[0], linewidth=1, linestyle="--")
    ax.plot([1 / n, 1 / left_out], beyond["distances"], "o", color=COLORS[0], label="all samples; one part left out")
    ends = [[beyond["value"] - beyond["low"]], [beyond["high"] - beyond["value"]]]
    label = "infinitely many on both sides, 95 %" if beyond.get("parts", 1) > 1 else "infinitely many samples, 95 %"
    ax.errorbar([0], [beyond["value"]], yerr=ends, fmt="s", color=COLORS[1], capsize=3, label=label)
    ax.plot([1 / d["samples"]], [d["mean"]], "^", color=COLORS[2], label="mean of the repeats")
    ax.set(xlabel="1 / number of samples", ylabel=d["name"])
    ax.legend(fontsize=8, frameon=False)
    return svg(figure)


MOST_BARS = 40


def composition_figure(table: Values) -> str:
    rows = table["rows"]
    figure, (ax,) = figure_of(WIDTH, 0.9 + 0.3 * len(rows))
    for i, (side, label) in enumerate((("train", "training images"), ("samples", "samples"))):
        shares = [r[side]["share"] for r in rows]
        ends = [
            [r[side]["share"] - r[side]["share_low"] for r in rows],
            [r[side]["share_high"] - r[side]["share"] for r in rows],
        ]
        at = [k + 0.4 * i for k in range(len(rows))]
        ax.barh(at, shares, 0.38, xerr=ends, color=COLORS[i], label=label, error_kw={"linewidth": 0.8}, capsize=2)
    names = [n if len(n) <= 30 else f"{n[:29]}…" for n in (r["class"] for r in rows)]
    ax.set_yticks([k + 0.2 for k in range(len(rows))], names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("share")
    ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncol=2)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure for a page; panels beside each other one by one, so that a narrow page puts them below each other."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text().replace("$\\mathdefault", ""):
            text.set_parse_math(False)  # a name with dollars is no formula
    axes, pictures = figure.axes, []
    if len({ax.get_position().x0 for ax in axes}) < len(axes) or len(axes) < 2:
        return _inline(figure)
    figure.draw_without_rendering()  # lays the panels out while all of them are there
    figure.set_layout_engine("none")
    for shown in axes:
        for ax in axes:
            ax.set_visible(ax is shown)
        shown.tick_params(labelleft=True)
        pictures.append(_inline(figure))
    return f'<div class="panels">{"".join(pictures)}</div>'


def _inline(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue().split("?>", 1)[-1].split('dtd">', 1)[-1]


def figure_of(
    width: float, height: float, columns: int = 1, *, fixed: bool = False, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with a row of axes; none of them for 0 columns. With ``fixed`` the caller says where they are."""
    # Figures are built without pyplot: no global state, no display.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "symbreak"  # the same figure gives the same bytes
    figure = Figure(figsize=(width, height), layout=None if fixed else "constrained")
    axes = figure.subplots(1, max(1, columns), squeeze=False, **kwargs)[0]
    if not columns:
        figure.clear()
    for ax in axes:
        _plain_frame(ax)
    return figure, axes


def _plain_frame(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e6eaf0", linewidth=0.8)
    ax.set_axisbelow(True)


def _legend_beside(ax: Axes) -> None:
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def scale_of(phases: Values) -> str:
    """The scale of the values of a spectrum: of pixels, or the units of other samples."""
    first = next(iter(phases["speciation"]))
    return f"pixels in {first}" if first == "[-1, 1]" else str(first)


def spectrum_figure(phases: Values) -> str:
    figure, (left, right) = figure_of(10.5, 3.4, 2)
    values = phases["eigenvalues"]
    rank = range(1, len(values) + 1)
    left.loglog(rank, [max(v, 1e-12) for v in values], color=COLORS[0], marker=".", markersize=3, linewidth=1)
    if "eigenvalues_low" in phases:
        low, high = (_numbers(phases[f"eigenvalues_{end}"]) for end in ("low", "high"))
        left.fill_between(rank, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    # Intervals of eigenvalues next to zero reach far beyond every eigenvalue: the values set the scale.
    bottom = max(1e-6, 0.5 * min((v for v in values if v > 1e-9), default=1e-6))
    left.set_ylim(bottom, 5 * max(1.0, *values))
    left.axhline(1.0, color="#888", linestyle="--", linewidth=1)
    left.annotate(
        "Lambda = 1: modes above have a speciation time",
        (1, 1.0),
        xytext=(2, -11),
        textcoords="offset points",
        fontsize=8,
        color="#666",
    )
    left.set(xlabel="mode", ylabel="covariance eigenvalue", title=f"Spectrum, {scale_of(phases)}")
    rungs = [c for c in phases["ladder"] if c["level"] is not None]
    for i, c in enumerate(rungs):
        _span(right, c, i + 1, COLORS[1], 0.4)
    right.set_xscale("log")
    _plain_ticks(right.xaxis, [m * 10.0**e for e in range(-4, 5) for m in (1, 1.5, 2, 3, 4, 5, 7)])
    right.set_yticks(range(1, len(rungs) + 1))
    right.invert_xaxis()
    right.invert_yaxis()
    right.set(xlabel="sigma (noise falls to the right)", ylabel="mode", title="When each mode is decided (95 %)")
    if not rungs:
        right.text(0.5, 0.5, "no mode above 1", transform=right.transAxes, ha="center")
    return svg(figure)


def training_figure(result: Values, samples: np.ndarray | None) -> Figure:
    """Losses of a training against steps, held-out losses against levels, and a sheet of samples [H, W, 3]."""
    from matplotlib.figure import Figure

    looks = result["looks"]
    heights = [3.0] if samples is None else [3.0, 9.0 * samples.shape[0] / samples.shape[1]]
    figure = Figure(figsize=(9.0, sum(heights) + 0.3), dpi=110, layout="constrained")
    rows = figure.add_gridspec(len(heights), 2 if looks["rows"] else 1, height_ratios=heights)
    left = figure.add_subplot(rows[0, 0])
    steps = result["recipe"]["steps"]
    at = [steps * (i + 0.5) / len(result["loss"]) for i in range(len(result["loss"]))]
    left.plot(at, result["loss"], color=COLORS[0])
    left.set_xlabel("steps")
    left.set_title("Training loss (1: the network adds nothing)" if looks["rows"] else "Training loss", fontsize=10)
    axes = [left]
    if looks["rows"]:
        right = figure.add_subplot(rows[0, 1])
        for i, row in enumerate(looks["rows"]):
            ratio = [a / b for a, b in zip(row["loss"], looks["law"])]
            shade = (i + 1) / len(looks["rows"])
            right.plot(looks["sigma"], ratio, color=COLORS[0], alpha=0.15 + 0.85 * shade, label=f"step {row['step']:,}")
        right.axhline(1.0, color=COLORS[4], lw=1, ls="--")
        sigma_axis(right)
        right.set_title("Held-out squared error over the law's (below 1 the network helps)", fontsize=10)
        _legend_beside(right)
        axes.append(right)
    for ax in axes:
        _plain_frame(ax)
    if samples is not None:
        sheet = figure.add_subplot(rows[1, :])
        sheet.imshow(samples)
        sheet.set_axis_off()
    return figure


def _plain_ticks(axis: Axis, at: list[float]) -> None:
    """Ticks written as 1.36 instead of powers of ten; a matplotlib log axis knows only the latter."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(at))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def sweep_figure(content: Values) -> str:
    calls = sorted({row["calls"] for row in content["rows"]})
    figure, axes = figure_of(3.5 * len(calls), 3.6, len(calls), sharey=True)
    sweep_axes(content, axes)
    return svg(figure)


def sweep_axes(content: Values, axes: np.ndarray) -> None:
    """Distance against start level, one of the given axes for each number of network evaluations."""
    rows = content["rows"]
    calls = sorted({row["calls"] for row in rows})
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    critical = next(iter(content["phases"]["speciation"].values()))
    for ax, n in zip(axes, calls):
        for row in rows:
            if row["calls"] != n:
                continue
            color = COLORS[samplers.index(row["sampler"]) % len(COLORS)]
            sweep = sorted(_on_own_grid(row), key=lambda s: s["sigma"])
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
        _plain_ticks(ax.xaxis, sorted({s["sigma"] for row in rows[:1] for s in _on_own_grid(row)}))
        bottom, top = ax.get_ylim()
        steps = (1, 2, 5) if top > 10 * bottom else (1, 1.5, 2, 3, 4, 5, 7)
        _plain_ticks(ax.yaxis, [m * 10.0**e for e in range(-6, 7) for m in steps])
        ax.invert_xaxis()
        ax.set(xlabel="start level sigma (later to the right)", title=f"{n} network evaluations")
    axes[0].set_ylabel(f"Fréchet distance, {content['floor']['extractor']}", fontsize=8)
    axes[-1].legend(fontsize=8, frameon=False)


def _on_own_grid(row: Values) -> list[Values]:
    """The levels of a sweep on the sampler's own grid; records of before know no other."""
    return [s for s in row["sweep"] if s.get("level_grid", "own") == "own"]
