"""A record in one picture, whatever its kind. Draws, never computes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.shown import sigma_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_summary"]


def draw_summary(kind: str, content: Values, ax: Axes) -> None:
    """Draw what a record found into axes.

    Raises:
        InputError: for a kind without a picture, or where parts are missing.
    """
    if kind not in DRAW:
        raise InputError(f"there is no picture for records of kind {kind!r}; expected one of {', '.join(DRAW)}.")
    try:
        DRAW[kind](content, ax)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"this is a damaged record, or one of another version ({error!r}). Run it again.") from error


def _phases(content: Values, ax: Axes) -> None:
    """Critical times of all criteria, the first at the top."""
    rows = [c for c in content["criteria"] if c["level"] is not None and c["level"]["sigma"] > 0]
    rows.sort(key=lambda c: c["level"]["sigma"])
    for i, c in enumerate(rows):
        low, high = ((c[end] or c["level"])["sigma"] for end in ("low", "high"))
        if math.isfinite(float(high)):
            ax.plot([low, high], [i, i], linewidth=4, alpha=0.35, color="C0")
        ax.plot(c["level"]["sigma"], i, "o", color="C0")
    ax.set_yticks(range(len(rows)), [f"{c['name']} ({c['of']})" for c in rows], fontsize=7)
    sigma_axis(ax)


def _attributes(content: Values, ax: Axes) -> None:
    """Levels of all attributes with their intervals, the highest at the top; hollow where they are not resolved."""
    rows = [row for row in content["rows"] if row["level"] is not None][::-1]
    for i, row in enumerate(rows):
        ax.plot(
            [(row[end] or row["level"])["sigma"] for end in ("low", "high")],
            [i, i],
            linewidth=4,
            alpha=0.35,
            color="C0",
        )
        ax.plot(row["level"]["sigma"], i, "o", color="C0", markerfacecolor="C0" if row["resolved"] else "white")
        clones = (row.get("network") or {}).get("clones") or {}
        if clones.get("level"):
            ax.plot(clones["level"]["sigma"], i, "s", color="C2", markersize=4)
    ax.set_yticks(range(len(rows)), [row["attribute"] for row in rows], fontsize=7)
    sigma_axis(ax)


def _study(content: Values, ax: Axes) -> None:
    """Distances of the standard start and of the one that chooses itself, else of the best late one, by evaluations."""
    late = "auto" if content["rows"] and content["rows"][0].get("auto") else "best"
    for i, name in enumerate(dict.fromkeys(row["sampler"] for row in content["rows"])):
        rows = sorted((r for r in content["rows"] if r["sampler"] == name), key=lambda r: r["calls"])
        for start, style, words in (("standard", "s--", "standard start"), (late, "o-", "late start")):
            means = [row[start]["distance"]["mean"] for row in rows]
            ax.plot([row["calls"] for row in rows], means, style, color=f"C{i}", label=f"{name}, {words}")
    ax.set(yscale="log", xlabel="network evaluations", ylabel=f"Fréchet distance, {content['floor']['extractor']}")
    ax.legend(frameon=False, fontsize=7)


def _audit(content: Values, ax: Axes) -> None:
    """How much nearer the nearest training image is than the second, of samples and of held-out images."""
    counts = content["histograms"]["ratio"]
    for side, label in (("samples", "samples"), ("held_out", "held-out images")):
        if side in counts:
            total = sum(counts[side]) or 1
            ax.stairs([c / total for c in counts[side]], counts["edges"], label=label)
    ax.axvspan(0, content["threshold"], color="C3", alpha=0.1, linewidth=0)
    ax.set(xlabel="d1 / d2 (memorized in the shaded part)", ylabel="share a bin", xlim=(0, 1))
    ax.legend(frameon=False)


def _evaluation(content: Values, ax: Axes) -> None:
    """The distance of the samples and that of training images at the same counts, with their intervals."""
    rows = [("samples", content["distance"]), ("training images", content.get("floor"))]
    rows = [(name, d) for name, d in rows if d]
    for i, (name, d) in enumerate(rows):
        low, high = (d["mean"] if d.get(end) is None else d[end] for end in ("low", "high"))
        ax.errorbar([d["mean"]], [i], xerr=[[d["mean"] - low], [high - d["mean"]]], fmt="o", capsize=3, label=name)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set(xlabel=content["distance"]["name"], ylim=(-0.7, len(rows) - 0.3), xlim=(0, None))


def _world(content: Values, ax: Axes) -> None:
    """Fixed points against sigma: stable ones as lines, unstable ones dashed."""
    for branch in content["branches"]:
        for stable, style in ((True, "-"), (False, ":")):
            pairs = zip(branch["x"], branch["stable"])
            x = [v if v is not None and s is stable else math.nan for v, s in pairs]
            ax.plot(content["branch_sigma"], x, style, color="C0")
    ax.set_ylabel(content["axis"], fontsize=8)
    sigma_axis(ax)


DRAW = {
    "phases": _phases,
    "attributes": _attributes,
    "study": _study,
    "audit": _audit,
    "evaluation": _evaluation,
    "world": _world,
}
