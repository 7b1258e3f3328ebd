"""The figures of reports and of the documentation, from plain values. Draws, never computes."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from symbreak.runtime.plain import Values

if TYPE_CHECKING:
    import numpy as np
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
SIDES = (("samples", "samples", COLORS[0]), ("held_out", "held-out images", COLORS[1]))


def phases_figure(content: Values) -> Figure:
    """All criteria and curves on one sigma axis, the model's own step on a second one."""
    from matplotlib.figure import Figure

    rows = [c for c in content["criteria"] if c["level"] is not None and c["level"]["sigma"] > 0]
    rows.sort(key=lambda c: -c["level"]["sigma"])
    panels = [p for p in PANELS if any(c["panel"] == p for c in content["curves"])]
    heights = [0.6 + 0.2 * max(1, len(rows)), *[2.2] * len(panels)]
    figure = Figure(figsize=(10.5, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    top, regimes = axes[0], content.get("regimes") or {}
    for i, c in enumerate(rows):
        _span(top, c, i, SOURCES.get(c["of"], COLORS[5]), 0.35)
    names = [f"{c['name']}{', ' + c['frame'].upper() if c['frame'] else ''} ({c['of']})" for c in rows]
    top.set_yticks(range(len(names)), names, fontsize=8)
    top.set_ylim(len(names) - 0.4, -0.6)
    for ax, panel in zip(axes[1:], panels):
        _panel(ax, panel, content, regimes.get("collapse"))
    for ax in axes:
        ax.set_xscale("log")
        _plain_frame(ax)
    sigmas = [s for c in content["curves"] for s in c["sigma"]] + [c["level"]["sigma"] for c in rows]
    if sigmas:
        top.set_xlim(1.15 * max(sigmas), 0.87 * min(sigmas))
        _shade(axes, regimes)
        _step_axis(top, content, min(sigmas), max(sigmas))
    _plain_ticks(axes[-1].xaxis, [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)])
    axes[-1].set_xlabel("sigma (noise falls to the right, as in generation)")
    return figure


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _span(ax: Axes, critical: Values, y: float, color: str, alpha: float) -> None:
    """A critical time as a dot on its interval, at height y."""
    low, high = ((critical[w] or critical["level"])["sigma"] for w in ("low", "high"))
    if isinstance(high, float) and math.isfinite(high):
        ax.plot([max(low, 1e-3), high], [y, y], color=color, linewidth=4, alpha=alpha, solid_capstyle="butt")
    ax.plot(critical["level"]["sigma"], y, "o", color=color, markersize=5)


def _panel(ax: Axes, panel: str, content: Values, collapse: Values | None) -> None:
    """The curves of one panel."""
    unit, title = PANELS[panel]
    curves = [c for c in content["curves"] if c["panel"] == panel]
    lines = [line for line in content["lines"] if line["panel"] == panel]
    for i, c in enumerate(curves):
        color = c.get("color") or SOURCES.get(c["of"], COLORS[i % len(COLORS)])
        order = sorted(range(len(c["sigma"])), key=c["sigma"].__getitem__)
        if panel == "samples" and c["of"] == "data" and collapse:  # far below the collapse images say nothing of it
            order = [j for j in order if c["sigma"][j] >= 0.5 * collapse["sigma"]]
        s, v, low, high = (_numbers([c[k][j] for j in order]) for k in ("sigma", "value", "low", "high"))
        ax.plot(s, v, c.get("line", "-"), color=color, linewidth=1.4, markersize=3, label=c["label"])
        ax.fill_between(s, low, high, color=color, alpha=0.15, linewidth=0)
    for line in lines:
        ax.axhline(line["value"], color="#888", linestyle=":", linewidth=1, label=line["label"])
    if panel in ("loss", "information") and any(v is not None and v > 0 for c in curves for v in c["value"]):
        ax.set_yscale("log")
    if panel == "information":
        ax.set_ylim(bottom=1e-2)
    if panel == "samples":  # far below the collapse numbers lose their meaning
        ax.set_ylim(0, 3 * max(line["value"] for line in lines))
    ax.set_ylabel(unit, fontsize=8)
    ax.set_title(title, fontsize=9, loc="left")
    _legend_beside(ax)


def _step_axis(top: Axes, content: Values, low: float, high: float) -> None:
    """The model's own steps above the axis of sigma."""
    ticks: list[dict[str, float]] = []
    apart = 0.06 * math.log(high / low)  # or their numbers run into each other
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
        above.set_xlabel(f"step of {content['schedule']}", fontsize=8)
        above.spines[["right"]].set_visible(False)


def _shade(axes: np.ndarray, regimes: Values) -> None:
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


def arc_figure(arc: Values) -> Figure:
    """The potential along the arcs, one line a level, from high noise to low."""
    figure, axes = figure_of(7.5, 3.6)
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
    _legend_beside(ax)
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

    rows = [row for row in content["rows"] if row["level"] is not None]
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for i, row in enumerate(rows):
        at, color = row["level"]["sigma"], COLORS[0] if row["resolved"] else COLORS[7]
        ends = [at if row[k] is None else row[k]["sigma"] for k in ("low", "high")]
        ax.plot(ends, [i, i], color=color, linewidth=1.5)
        ax.plot(at, i, "o", color=color, markersize=4.5, markerfacecolor=color if row["resolved"] else "white")
    if content["spectral"]["level"] is not None:
        ax.axvline(content["spectral"]["level"]["sigma"], color=COLORS[1], linestyle=":", label="spectral, all images")
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    ax.set_yticks(range(len(rows)), [row["attribute"].replace("_", " ") for row in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.invert_xaxis()
    _plain_ticks(ax.xaxis, [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)])
    ax.set_xlabel("sigma (noise falls to the right, as in generation)")
    _plain_frame(ax)
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
    figure, axes = figure_of(6.5, 3.0)
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
    figure, (ax,) = figure_of(6.5, 3.2)
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
    figure, (ax,) = figure_of(max(5.0, 0.55 * len(rows) + 2), 3.0)
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
    return svg(figure)


def svg(figure: Figure) -> str:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text().replace("$\\mathdefault", ""):
            text.set_parse_math(False)  # a name with dollars is no formula
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
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


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
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="#666",
    )
    left.set(xlabel="mode", ylabel="covariance eigenvalue", title=f"Spectrum, {scale_of(phases)}")
    rungs = [c for c in phases["ladder"] if c["level"] is not None]
    for i, c in enumerate(rungs):
        _span(right, c, i + 1, COLORS[1], 0.4)
    right.set_xscale("log")
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
        right.set_xscale("log")
        right.set_xlabel("sigma")
        right.set_title("Held-out squared error, of the law's", fontsize=10)
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
        ax.set(xlabel="start level sigma (later to the right)", title=f"{n} network evaluations")
    axes[0].set_ylabel(f"Fréchet distance, {content['floor']['extractor']}", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
