"""The collapse against the number of images, of components and of pixels: numbers and figure of docs/memorization.md.

    python scripts/collapse_scaling.py            # the digits, and MNIST where SYMBREAK_DATA has it (two minutes)

Finished parts are kept in build/collapse and not done again.
"""

import json
import math
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

import symbreak as sb
from symbreak.runtime.files import write_json, write_whole

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- collapse:begin, written by scripts/collapse_scaling.py -->", "<!-- collapse:end -->"
MEASURED, CLOSED, MIXED = "#1f6fb4", "#7a5ba6", "#d9822b"


def view(c):
    """[sigma, low, high]; None where there is none."""
    return [None if v is None else v.sigma for v in (c.level, c.low, c.high)]


def measure(data, components, sides):
    """Everything about one data set, as plain values."""
    whole, gaussian = sb.Empirical(data.tensor(), memory=2**30), sb.Gaussian.fit(data)
    mixture = sb.PrincipalMixture.fit(data, labels=True, gaussian=gaussian).inner
    n = len(whole)
    laws = {"data": whole, "Gaussian": gaussian, "class mixture": mixture}
    counts = {"data": None, "Gaussian": n, "class mixture": n}
    at = {k: sb.collapse_time(v, samples=counts[k], draws=5000) for k, v in laws.items()}
    sigma = at["data"].sigma * np.geomspace(0.4, 6, 20)
    curves = {}
    for k, law in laws.items():
        f = sb.excess_entropy(law, sigma, samples=counts[k], draws=5000)
        a = math.log(n) / law.dim
        curves[k] = [(v / a).tolist() for v in (f.value, f.low, f.high)]
    axes = {"samples": [n // k for k in (16, 8, 4, 2, 1)], "components": components, "pixels": sides}
    scalings = {k: sb.collapse_scaling(whole, k, sizes) for k, sizes in axes.items()}
    return {
        "count": n,
        "top": float(gaussian.eigenvalues[0]),
        "collapse": {k: view(v) for k, v in at.items()},
        "reason": at["data"].reason,
        "sigma": sigma.tolist(),
        "curves": curves,
        "scaling": {
            k: {"sizes": s.sizes, "measured": [view(c) for c in s.measured], "gaussian": [view(c) for c in s.gaussian]}
            for k, s in scalings.items()
        },
        "threads": torch.get_num_threads(),
    }


def draw(results, path):
    figure = Figure(figsize=(11, 2.9 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 4, squeeze=False)
    for row, (name, d) in zip(axes, results.items()):
        first = row[0]
        for k, color in (("data", MEASURED), ("Gaussian", CLOSED), ("class mixture", MIXED)):
            value, low, high = d["curves"][k]
            label = f"{d['count']:,} images" if k == "data" else k
            first.plot(d["sigma"], value, "o-" if k == "data" else "-", color=color, markersize=3, label=label)
            first.fill_between(d["sigma"], low, high, color=color, alpha=0.2, linewidth=0)
            first.axvline(d["collapse"][k][0], color=color, linewidth=0.8, linestyle=":")
        first.set(title=f"{name}: excess entropy", ylabel="f / a", xlabel="sigma", xscale="log", ylim=(-0.03, 1.03))
        ticks = [t for t in (0.3, 0.5, 1, 2, 3, 5, 10) if min(d["sigma"]) <= t <= max(d["sigma"])]
        first.set_xticks(ticks, [f"{t:g}" for t in ticks])
        first.xaxis.set_minor_formatter(NullFormatter())
        first.legend(fontsize=7, frameon=False)
        for ax, (axis, s) in zip(row[1:], d["scaling"].items()):
            # Without an interval there was too little to extrapolate: only a bound from above.
            measured = [(z, m, g) for z, m, g in zip(s["sizes"], s["measured"], s["gaussian"]) if m[1] is not None]
            sizes, values, closed = (
                [k[0] for k in measured],
                np.array([k[1] for k in measured], float),
                [k[2][0] for k in measured],
            )
            spread = np.abs(np.nan_to_num(values[:, 1:] - values[:, :1])).T
            ax.errorbar(
                sizes, values[:, 0], spread, fmt="o-", color=MEASURED, markersize=3, capsize=2, label="measured"
            )
            ax.plot(sizes, closed, "s--", color=CLOSED, markersize=3, label="Gaussian of the same moments")
            unit = {"samples": "images n", "components": "leading components d", "pixels": "pixels a side"}[axis]
            ax.set(title=f"{name}: against {axis}", ylabel="sigma of the collapse", xlabel=unit, xscale="log")
            ax.set_yscale("log")
            ax.set_xticks(sizes, [f"{z:,}" for z in sizes], fontsize=7)
            ax.xaxis.set_minor_formatter(NullFormatter())
            for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                which(ScalarFormatter())
            ax.tick_params(axis="y", which="both", labelsize=7)
            ax.legend(fontsize=7, frameon=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda p: figure.savefig(p, format="png", dpi=110))


def shown(v):
    value, low, high = v
    if value is None:
        return "none"
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


def numbers(results):
    lines = ["| data | n | measured | Gaussian | class mixture | spectral speciation |", "|---|---|---|---|---|---|"]
    for name, d in results.items():
        c = [shown(d["collapse"][k]) for k in ("data", "Gaussian", "class mixture")]
        spectral = f"{math.sqrt(d['top'] - 1):.3g}" if d["top"] > 1 else "none"
        lines.append(f"| {name} | {d['count']:,} | {' | '.join(c)} | {spectral} |")
    lines += [
        "",
        "Marked <=: too few images, or these do not fix an extrapolation; the leave-one-out bound from above.",
    ]
    for axis, title in (("samples", "n"), ("components", "leading components"), ("pixels", "pixels a side")):
        for name, d in results.items():
            s = d["scaling"][axis]
            lines += ["", f"| {name}, {title} | " + " | ".join(f"{z:,}" for z in s["sizes"]) + " |"]
            lines.append("|---" * (1 + len(s["sizes"])) + "|")
            cells = [("" if v[1] is not None else "<= ") + shown(v) for v in s["measured"]]
            lines.append("| measured | " + " | ".join(cells) + " |")
            lines.append("| Gaussian | " + " | ".join(shown(v) for v in s["gaussian"]) + " |")
    return lines


def main():
    out = ROOT / "build" / "collapse"
    root = os.environ.get("SYMBREAK_DATA")
    worlds = {"digits": ("digits", [4, 8, 16, 32, 64], [4, 8])}
    if root and (Path(root) / "mnist-train.parquet").exists():
        worlds["MNIST"] = (str(Path(root) / "mnist-train.parquet"), [8, 32, 128, 784], [7, 14, 28])
    results = {}
    for name, (source, components, sides) in worlds.items():
        path = out / f"{name.lower()}.json"
        if not path.exists():
            write_json(path, measure(sb.images(source), components, sides))
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    draw(results, ROOT / "docs" / "figures" / "collapse.png")
    page = ROOT / "docs" / "memorization.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = before + "\n".join([BEGIN, *numbers(results), END]) + rest.split(END)[1]
    write_whole(page, lambda p: p.write_text(text, encoding="utf-8"))
    print("\n".join(numbers(results)))


if __name__ == "__main__":
    main()
