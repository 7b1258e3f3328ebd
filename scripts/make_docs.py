"""Draw the pictures of the gallery, and the figure and the table of the digits from a study that is finished.

symbreak study --data digits --model digits --out build/study && make figures
"""

from __future__ import annotations

import runpy
from pathlib import Path

from matplotlib.figure import Figure

from symbreak.report.figures import sweep_axes
from symbreak.report.record import Record

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- study:begin, written by `make figures` -->", "<!-- study:end -->"


def cell(d: dict) -> str:
    return f"{d['mean']:.2f}" + ("" if d["low"] is None else f" [{d['low']:.2f}, {d['high']:.2f}]")


def main() -> None:
    gallery()
    if not (ROOT / "build" / "study" / "record.json").exists():
        print("build/study holds no study of the digits: their table and figure stay as they are.")
        return
    record = Record.load(ROOT / "build" / "study")
    content = record.content
    if content["smoke"]:
        raise SystemExit("build/study holds a smoke run; run `symbreak study` without --quick first.")
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=110)
    sweep_axes(content, figure.subplots(1, 3, sharey=True))
    figure.savefig(figures / "digits-levels.png", metadata={"Software": None})

    ground, reference = content["floor"], content["reference"]
    first = content["rows"][0]["standard"]["distance"]
    near, real = reference["neighbours"], content["floor_neighbours"]
    how = (
        f"Fréchet distance in the 64 features of `{ground['extractor']}` (held-out accuracy "
        f"{content['extractor']['held_out_accuracy']:.1%}) to the {ground['reference']} held-out digits; mean of "
        f"{first['repeats']} repeats of {first['samples']} images with its 95 % interval (jackknife over "
        "repeats and reference), at equal "
        "NFE. Grid and spacing of the standard start, and grid and level of the late start, were chosen on other seeds."
    )
    facts = [
        f"- Floor, training images at the same counts ({ground['repeats']} disjoint sets): {cell(ground)}; "
        f"all {content['data']['count']} at once: "
        f"{ground['pooled']:.2f}.",
        f"- The network with 100 DDIM evaluations: {cell(reference['distance'])}, "
        f"{reference['distance']['mean'] / ground['mean']:.2f} times the floor; "
        f"all {record.settings['samples']:,} images at once: {reference['distance']['pooled']:.2f}, "
        f"{reference['distance']['pooled'] / ground['pooled']:.1f} times.",
        f"- Nearest training image, median pixel distance: its samples {near['median_nearest']:.2f}, held-out digits "
        f"{real['median_nearest']:.2f}; d1/d2 < 1/3 in {near['memorized']:.1%} and {real['memorized']:.1%}.",
    ]
    table = [
        "| sampler | NFE | standard start | late, speciation | late, best level | noised data | chosen by `auto` | "
        "standard / `auto` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = " | ".join(cell(row[k]["distance"]) for k in ("standard", "spectral", "best", "noised", "auto"))
        gain = row["gains"]["auto"]
        said = f"{gain['value']:.2g} [{gain['low']:.2g}, {gain['high']:.2g}]"
        table.append(f"| {row['sampler']} | {row['calls']} | {cells} | {said} |")
    note = (
        "*noised data*: training images noised to the level of the column before, the most any law could give there. "
        "*late*: one Gaussian. *chosen by `auto`*: law, level and grid, without looking at a sample. Last column: the "
        "ratio of the two distances on the same seeds against the same reference, with its interval."
    )
    made = "Written by `make figures` from the record of `symbreak study --data digits --model digits`."
    rows = [row["gains"]["auto"] for row in content["rows"]]
    nearer, farther = sum(g["low"] > 1 for g in rows), sum(g["high"] < 1 for g in rows)
    sentences = [f"- {sentence}" for sentence in content["verdict"] if "`" not in sentence]
    sentences.append(
        f"- Of the {len(rows)} rows below `auto` is nearer than the standard start beyond the interval in {nearer}, "
        f"farther in {farther}."
    )
    page = ["# The digits study", "", made, "", *sentences]
    page += [
        "",
        how,
        "",
        *facts,
        "",
        *table,
        "",
        note,
        "",
        "![Distance against start level](figures/digits-levels.png)",
        "",
        f"Points: late starts from one Gaussian at {len(content['rows'][0]['sweep'])} levels, on the seeds that levels "
        "were chosen with. Dotted: the "
        "standard start of the same sampler at as many evaluations. Grey: the spectral speciation level with its "
        "interval. Lowest line: the floor.",
        "",
    ]
    (ROOT / "docs" / "digits.md").write_text("\n".join(page), encoding="utf-8")
    fill(ROOT / "src" / "symbreak" / "weights" / "digits" / "README.md", ["**Measured.** " + how, "", *facts])


def gallery() -> None:
    """Run the scripts of the gallery; the last figure of each is its picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for path in sorted((ROOT / "docs" / "gallery").glob("*.py")):
        runpy.run_path(str(path))
        plt.gcf().savefig(path.with_suffix(".png"), dpi=100, metadata={"Software": None})
        plt.close("all")


def fill(path: Path, body: list[str]) -> None:
    """Replace what stands between the study's markers."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(head + "\n".join([BEGIN, *body, END]) + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
