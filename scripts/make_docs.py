"""Draw the figure and the table of the documentation from a finished study.

make demo && make docs
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from symbreak.record import Record
from symbreak.report import sweep_axes, verdict

ROOT = Path(__file__).parents[1]


def cell(d: dict) -> str:
    return f"{d['mean']:.2f} [{d['low']:.2f}, {d['high']:.2f}]"


def main() -> None:
    record = Record.load(ROOT / "build" / "demo")
    content = record.content
    if content["smoke"]:
        raise SystemExit("build/demo holds a smoke run; run `make demo` first.")
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=110)
    sweep_axes(content, figure.subplots(1, 3, sharey=True))
    figure.savefig(figures / "digits-levels.png", metadata={"Software": None})

    ground, reference = content["floor"], content["reference"]
    lines = [
        "# The digits study",
        "",
        "Written by `make docs` from the record of `make demo`; nothing here is typed by hand.",
        "",
        f"Fréchet distance in the 64 features of `{ground['extractor']}` (held-out accuracy "
        f"{content['extractor']['held_out_accuracy']:.1%}) to the {ground['reference']} held-out digits; mean of "
        f"{ground['repeats']} repeats of {ground['samples']} images with its 95 % Student-t interval, at equal network "
        "calls. The spacing of the standard start and the level of the late start were chosen on other seeds.",
        "",
        f"- Floor (training images at the same counts): {cell(ground)}; all {content['data']['count']} at once: "
        f"{ground['pooled']:.2f}.",
        f"- Network, standard DDIM with {reference['calls']} calls: {cell(reference['distance'])}; "
        f"all {record.settings['samples']:,} images at once: {reference['distance']['pooled']:.2f}.",
        f"- Nearest training image, median pixel distance: samples {reference['neighbours']['median_nearest']:.2f}, "
        f"held-out digits {content['floor_neighbours']['median_nearest']:.2f}; d1/d2 < 1/3 in "
        f"{reference['neighbours']['memorized']:.1%} and {content['floor_neighbours']['memorized']:.1%}.",
        "",
        "| sampler | calls | standard start | late, speciation | late, best level | noised data | best late start |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = " | ".join(cell(row[k]["distance"]) for k in ("standard", "spectral", "best", "noised"))
        said = verdict(row["standard"]["distance"], row["best"]["distance"])[0]
        lines.append(f"| {row['sampler']} | {row['calls']} | {cells} | {said} |")
    lines += ["", "![Distance against start level](figures/digits-levels.png)", ""]
    (ROOT / "docs" / "digits.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
