"""The page docs/when-it-decides.md: tables and figures from finished diagnoses.

    symbreak phases --data digits --model digits --out build/phases/digits
    python examples/classes_by_covariance.py build/phases/covariance
    symbreak phases --data mnist-train.parquet --classes 1,8 --pad 32 --model build/mnist-1-8 \\
        --holdout mnist-test.parquet --pairs 150 --out build/phases/mnist
    python scripts/compare_mnist_1_8.py ...          # build/phases/mnist-1-8/clones.json
    python scripts/draw_phases.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from symbreak.report.figures import phases_figure
from symbreak.report.record import Record
from symbreak.report.tables import tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "when-it-decides.md"


def table(record: Record) -> list[str]:
    parts, _ = tables(record)
    out = []
    for part in (parts["criteria"], parts["checks"]):
        if part.rows:
            shown = [i for i, (name, kind) in enumerate(part.columns) if kind != "details" and name != "seconds"]
            names = [part.columns[i][0] for i in shown]
            cells = (" | ".join(str(row[i]) for i in shown) for row in part.rows)
            out += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(f"| {c} |" for c in cells)]
            out += [""] * bool(part.notes) + [f"- {note}" for note in dict.fromkeys(part.notes)]
    return out[1:]


def comparison(result: dict) -> list[str]:
    tau = result["tau"]
    low, high = tau["interval"]
    rows = [f"| {g['step']} | {g['published']:.3f} | {g['ours']:.3f} |" for g in result["gap at the published levels"]]
    inside = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return [
        f"- phi passes its halfway level at tau {tau['ours']:.3f}{inside} ({result['pairs']:,} pairs, "
        f"{result['steps_of_sampler']} reverse steps of second order, the published network "
        f"ancestral ones; classifier {result['accuracy']:.2%} on held-out images).",
        f"- The published curve passes .75 at tau {tau['published']:.3f} for pixels in [0, 1], which is "
        f"tau {tau['published, pixels in [-1, 1]']:.3f} for pixels in [-1, 1] (twice the sigma; ln 2 where sigma is "
        f"large): ours is {tau['ours'] - tau['published, pixels in [-1, 1]']:+.3f} of that, and "
        f"{tau['ours'] - tau['published']:+.3f} of the curve as given.",
        "",
        "| published step | published phi | this network at that signal-to-noise ratio |",
        "|---|---|---|",
        *rows,
    ]


def main() -> None:
    figures = ROOT / "docs" / "figures"
    text = PAGE.read_text(encoding="utf-8")
    for name in ("digits", "covariance", "mnist"):
        folder = ROOT / "build" / "phases" / name
        if not (folder / "record.json").exists():
            continue
        record = Record.load(folder)
        picture = f"phases-{name}.png"
        phases_figure(record.content).savefig(
            figures / picture, dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
        text = between(text, name, [*table(record), "", f"![Every criterion on one axis, {name}](figures/{picture})"])
    clones = ROOT / "build" / "phases" / "mnist-1-8"
    if (clones / "clones.json").exists():
        shutil.copy(clones / "clones.png", figures / "mnist-1-8-clones.png")
        text = between(text, "mnist-1-8", comparison(json.loads((clones / "clones.json").read_text())))
    PAGE.write_text(text, encoding="utf-8")


def between(text: str, name: str, lines: list[str]) -> str:
    begin, end = f"<!-- {name}:begin, written by scripts/draw_phases.py -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return before + "\n".join([begin, *lines, end]) + rest.split(end)[1]


if __name__ == "__main__":
    main()
