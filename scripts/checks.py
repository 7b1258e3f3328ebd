"""The three checks that a late start owes: is x_t Gaussian, how wrong may the level be, is a Gaussian the right start.

    python scripts/checks.py --quick                                   # a smoke run on the digits, a minute
    python scripts/checks.py --data digits                             # the digits, about 20 minutes of one core
    python scripts/checks.py --data mnist --model FOLDER               # MNIST, needs SYMBREAK_DATA; hours
    python scripts/checks.py --page                                    # the pages in docs/, from what is finished

Finished parts are kept in --out and not done again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import symbreak as sb
from symbreak.metrics.feature_rows import extractor, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import difference
from symbreak.phases.beyond_gaussian import non_gaussianity, refitting_error
from symbreak.phases.gaussian_tests import MULTIVARIATE, PROJECTED, Gaussianity, gaussianity
from symbreak.phases.reverse_paths import reverse_states
from symbreak.phases.speciation import cloning_time
from symbreak.report.record import Record
from symbreak.runtime.files import write_json
from symbreak.studies.compare_starts import candidate_starts, compare_starts
from symbreak.studies.measure import Measure
from symbreak.studies.sensitivity import sensitivity

ROOT = Path(__file__).parents[1]
PAGES = {"gaussian": "is-it-gaussian", "sensitivity": "sensitivity", "starts": "which-start"}
TITLES = {"digits": "The digits", "mnist": "MNIST"}
TESTS = (*MULTIVARIATE, *PROJECTED)
NETWORK_STEPS = 60
FULL = "full Gaussian"
SOURCES = ("training images", "network", "class mixture", FULL)


def world(name: str, model: str | None):
    """Training images, held-out images, pipeline."""
    if name == "digits":
        return sb.images("digits"), sb.images("digits:held-out"), sb.load_pipeline(model or "digits")
    root = Path(os.environ["SYMBREAK_DATA"])
    train, test = (sb.images(str(root / f"mnist-{part}.parquet")) for part in ("train", "test"))
    return train, test, sb.load_pipeline(model)


def classifier(name: str, train, test, out: Path):
    """The extractor: bundled for the digits, else trained once on the training images and kept."""
    if name == "digits":
        return extractor("digits-classifier")
    path = out / "classifier.safetensors"
    if not path.exists():
        save_classifier(train_classifier(train, held_out=test, epochs=2), path, f"{name}-classifier")
    return load_classifier(path)


def progress_of(stage: str):
    """A progress callback that prints one line now and then."""
    seen = [0.0]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - seen[0] > 20 or done == total:
            seen[0] = time.monotonic()
            print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

    return tell


def resumed(stage: str, out: Path) -> sb.Run:
    """A run that keeps what is finished in a folder of its own."""
    tell = progress_of(stage)
    return sb.Run(out / stage, progress=lambda _, done, total: tell(done, total))


def is_it_gaussian(data, test, pipe, laws, out: Path, args) -> dict:
    """Tests of data, network and laws at every level, at two sample sizes."""
    if (out / "gaussian.json").exists():
        return Record.load(out / "gaussian.json").content
    gaussian = laws[FULL]
    moments, network = gaussian.moments, sb.denoiser(pipe.unet, pipe.scheduler)
    scale = math.sqrt(float(gaussian.eigenvalues[0]))
    sigma = np.geomspace(0.15 * scale, min(20 * scale, 0.99 * network.sigma_range[1]), args.tests)
    sizes = [min(args.states, len(data)), min(args.states, len(data)) // 4]
    settings = {"data": data.fingerprint(), "levels": sigma.tolist(), "sizes": sizes, "modes": 8, "directions": 16}
    settings |= {"steps": NETWORK_STEPS, "simulations": args.simulations}
    run = sb.Run(out).identified({"check": "gaussian", **settings})
    began = time.perf_counter()
    nats = non_gaussianity(network, gaussian, test.tensor()[: args.nats], sigma, run=run)
    states = reverse_states(
        network, sigma, sizes[0], NETWORK_STEPS, run=run.telling(progress_of("reverse trajectories"))
    )
    sources = {"training images": data, "network": states, "class mixture": laws["class mixture"], FULL: gaussian}
    tested_by: dict[str, dict] = {}
    for n in sizes:
        for name, source in sources.items():
            tested: Gaussianity = gaussianity(
                source,
                None if isinstance(source, dict) else sigma,
                samples=n,
                moments=moments,
                simulations=(args.simulations, 10 * args.simulations + 9 + 2000 * args.quick),
            )
            if name == "training images":
                tested = replace(tested, nats=nats)
            tested_by.setdefault(name, {})[str(n)] = tested.to_dict()
            print(f"is it Gaussian: {name}, {n} states", file=sys.stderr, flush=True)
    content = {"found": tested_by, "nats": nats.to_dict(), "data": {"name": data.name, "count": len(data)}}
    record = Record("gaussianity", settings, content, {}, {"all": time.perf_counter() - began})
    write_json(out / "gaussian.json", record.to_dict())
    run.close()
    return record.content


def marks(data, test, pipe, laws, nats) -> dict:
    """Critical levels to place on the curves."""
    mixture = laws["class mixture"].inner  # beyond the leading modes it is one Gaussian
    return {
        "speciation (spectral)": sb.speciation_time(laws[FULL].moments),
        "cloning, class mixture": cloning_time(mixture, samples=5000),
        "second well, class mixture": sb.bifurcation(mixture, "sde", "ve", criterion="wells"),
        "non-Gaussianity of 0.1 nat, network": nats.time(
            fitting=refitting_error(laws[FULL], len(data), nats.losses.sigma)
        ),
    }


def run(args) -> None:
    out = args.out or ROOT / "build" / "checks" / ("quick" if args.quick else args.data)
    out.mkdir(parents=True, exist_ok=True)
    data, test, pipe = world(args.data, args.model)
    extract = classifier(args.data, data, test, out)
    laws = candidate_starts(data, clusters=40 if args.data == "digits" else 60)
    is_it_gaussian(data, test, pipe, laws, out, args)
    gaussian = laws[FULL]
    network = sb.denoiser(pipe.unet, pipe.scheduler)
    scale = math.sqrt(float(gaussian.eigenvalues[0]))
    shared = {"holdout": test, "measure": Measure(extract, args.samples, args.repeats)}
    calls = tuple(map(int, args.calls.split(",")))
    # The critical levels wait on an image-by-image loss curve: only where the record is not there yet.
    if not (out / "sensitivity" / "record.json").exists():
        nats = non_gaussianity(network, gaussian, test.tensor()[: args.nats], np.geomspace(0.15, 3, 12) * scale)
        sensitivity(
            data,
            pipe,
            args.samplers.split(","),
            calls,
            np.geomspace(0.15 * scale, 20 * scale, args.levels),
            starts={"Gaussian": gaussian, "white noise": laws["white noise"]},
            marks=marks(data, test, pipe, laws, nats),
            run=resumed("sensitivity", out),
            **shared,
        )
    if not (out / "starts" / "record.json").exists():
        compare_starts(
            data,
            pipe,
            args.sampler,
            calls,
            scale * np.array([0.35, 1.0, 3.0]),
            starts=laws,
            run=resumed("starts", out),
            **shared,
        )
    print(f"all three checks are in {out}")


# Figures and pages


def gaussian_figure(content: dict) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=100)
    names = [name for name in SOURCES if name in content["found"]]
    axes = figure.subplots(1, len(names) + 1, sharex=True)
    for ax, name in zip(axes, names):
        sizes = sorted(content["found"][name], key=int)
        for i, test in enumerate(TESTS):
            for size, line in zip(sizes, (":", "-") if len(sizes) > 1 else ("-",)):
                one = content["found"][name][size]
                label = test if (size == sizes[-1] and name == names[0]) else None
                ax.plot(one["sigma"], one["p_values"][test], line, color=f"C{i}", lw=1.2, label=label)
        ax.axhline(0.05, color="0.6", lw=0.8)
        ax.set(xscale="log", yscale="log", title=name, xlabel="sigma")
        ax.set_ylim(3e-4, 1.3)
    axes[0].set_ylabel("p-value (projections: Holm over directions)")
    figure.legend(fontsize=7, loc="outside lower center", ncol=len(TESTS))
    c = content["nats"]
    ax = axes[-1]
    ax.plot(c["sigma"], np.maximum(c["value"], 1e-4), color="k", lw=1.2)
    ax.fill_between(c["sigma"], np.maximum(c["low"], 1e-4), np.maximum(c["high"], 1e-4), color="0.85")
    ax.axhline(0.1, color="0.6", lw=0.8)
    ax.set(xscale="log", yscale="log", title="nats (network)", xlabel="sigma", ylim=(1e-3, None))
    return figure


def sensitivity_figure(content: dict) -> Figure:
    rows = content["rows"]
    samplers, calls = (sorted({r[k] for r in rows}, key=[r[k] for r in rows].index) for k in ("sampler", "calls"))
    size = (2.6 * len(samplers) + 0.6, 2.1 * len(calls) + 0.5)
    figure = Figure(figsize=size, layout="constrained", dpi=90)
    axes = figure.subplots(len(calls), len(samplers), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        ax = axes[calls.index(row["calls"])][samplers.index(row["sampler"])]
        d = row["standard"]["distance"]
        ax.axhspan(d["low"], d["high"], color="0.88", lw=0)
        ax.axhline(d["mean"], color="0.5", lw=0.8, label="standard start")
        for i, (name, start) in enumerate(row["starts"].items()):
            sigma = [c["sigma"] for c in start["cells"]]
            mean, low, high = ([c["distance"][k] for c in start["cells"]] for k in ("mean", "low", "high"))
            ax.plot(sigma, mean, "o-", ms=2.5, lw=1, color=f"C{i}", label=name)
            ax.fill_between(sigma, np.maximum(low, 0.3), high, color=f"C{i}", alpha=0.2, lw=0)
        for i, (name, mark) in enumerate(content["marks"].items()):
            if mark["level"]:
                ax.axvline(mark["level"]["sigma"], color=f"C{i + 2}", lw=0.8, ls="--", label=name)
        ax.set(xscale="log", yscale="log")
        ax.set_yticks([2, 5, 10, 20, 50, 100, 200], ["2", "5", "10", "20", "50", "100", "200"], minor=False)
        ax.tick_params(axis="y", which="minor", labelleft=False)
        if row["calls"] == calls[0]:
            ax.set_title(row["sampler"], fontsize=9)
        if row["calls"] == calls[-1]:
            ax.set_xlabel("start level sigma")
        if row["sampler"] == samplers[0]:
            ax.set_ylabel(f"distance, {row['calls']} NFE")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, fontsize=7)
    return figure


def starts_figure(content: dict) -> Figure:
    rows = content["rows"]
    names = list(dict.fromkeys(r["start"] for r in rows))
    calls, levels = (sorted({r[k] for r in rows}) for k in ("calls", "asked"))
    figure = Figure(figsize=(3.4 * len(calls) + 1, 3.6), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(calls), sharey=True, squeeze=False)[0]
    for ax, n in zip(axes, calls):
        for i, level in enumerate(levels):
            for j, name in enumerate(names):
                d = next(r for r in rows if (r["start"], r["calls"], r["asked"]) == (name, n, level))["distance"]
                y, label = j + 0.22 * (i - 1), f"sigma {level:.2g}" if j == 0 and n == calls[0] else None
                ax.plot([max(d["low"], 0.3), d["high"]], [y, y], color=f"C{i}", lw=1.4)
                ax.plot(d["mean"], y, "o", ms=3.5, color=f"C{i}", label=label)
        ax.axvline(next(s for s in content["standard"] if s["calls"] == n)["distance"]["mean"], color="0.5", lw=0.8)
        ax.set(xscale="log", title=f"{n} calls", xlabel="distance")
        ax.set_xticks([2, 5, 10, 20, 50, 100, 200], ["2", "5", "10", "20", "50", "100", "200"])
        ax.tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(loc="outside lower center", ncol=4, fontsize=8)
    return figure


def span(d: dict) -> str:
    return f"{d['mean']:.2f} [{d['low']:.2f}, {d['high']:.2f}]"


def first(row: dict) -> str:
    if row["level"] is None:
        return "none"
    above = "-" if row["high"] is None else f"{row['high']['sigma']:.2f}"
    return f"{row['level']['sigma']:.2f} ({above})"


def how(content: dict, settings: dict) -> str:
    d, e = content["rows"][0], content["extractor"]
    d = d["standard"]["distance"] if "standard" in d else d["distance"]
    return (
        f"{content['data']['count']:,} training images, network of {content['network']['parameters']:,} parameters. "
        f"Fréchet distance in the features of `{e['name']}` (held-out accuracy {e['held_out_accuracy']:.1%}) to "
        f"{d['reference']:,} held-out images: mean of {d['repeats']} repeats of {d['samples']} images with its 95 % "
        "interval (jackknife over repeats and parts of the reference), the same seeds in every cell. Training images "
        "at the same counts score "
        f"{span_floor(content['floor'])}."
    )


def span_floor(d: dict) -> str:
    inside = "" if d["low"] is None else f" [{d['low']:.2f}, {d['high']:.2f}]"
    return f"{d['mean']:.2f}{inside} ({d['repeats']} disjoint sets)"


def gaussian_numbers(content: dict, settings: dict) -> list[str]:
    results = content["found"]
    sizes = sorted(results["network"], key=int, reverse=True)
    one = results["network"][sizes[0]]
    out = [
        f"{len(one['sigma'])} levels from sigma {one['sigma'][0]:.3g} to {one['sigma'][-1]:.3g}, {one['modes']} "
        f"leading modes, {one['directions']} directions (the modes and random ones), p-values from "
        f"{one['simulations'][0]:,} and {one['simulations'][1]:,} Gaussian samples, levels in sequence from the lowest "
        "up, each test at 5 %; the network's states are those of its own reverse trajectories in "
        f"{settings['steps']} steps.",
        "",
        "First rejection from high noise down, in brackets the next level above, which is not rejected:",
        "",
        "| states of | n | " + " | ".join(TESTS) + " |",
        "|---" * (len(TESTS) + 2) + "|",
    ]
    for name in SOURCES:
        by_size = results[name]
        for n in sizes:
            cells = [first(by_size[n]["first_rejection"][t]) for t in TESTS]
            out.append(f"| {name} | {n} | " + " | ".join(cells) + " |")
    c = content["nats"]
    out += [
        "",
        f"Beside it what the departure costs: non-Gaussianity of the data against their Gaussian, from the network's "
        f"denoising losses on {c['images']} held-out images (a lower bound in expectation), with the number of "
        "directions that Anderson-Darling rejects by Holm and by Benjamini-Hochberg:",
        "",
        "| sigma | nats | directions rejected, data | network |",
        "|---|---|---|---|",
    ]
    data, net = results["training images"][sizes[0]], results["network"][sizes[0]]
    for i, s in enumerate(data["sigma"]):
        cells = []
        for one in (data, net):
            counts = [one["directions_rejected"][k]["Anderson-Darling"][i] for k in ("holm", "bh")]
            cells.append(f"{counts[0]}, {counts[1]} of {one['directions']}")
        nats = f"{c['value'][i]:.3f} [{c['low'][i]:.3f}, {c['high'][i]:.3f}]"
        out.append(f"| {s:.3g} | {nats} | " + " | ".join(cells) + " |")
    return out


OLD = (
    "> Measured by an earlier version: flat ranges and knees are those of repeats against one reference (Student t), "
    "flat ranges at the 95 % of a single comparison, and the knee is where the mean curve passes the upper end of the "
    "standard start's interval. They are narrower than the columns above say."
)


def sensitivity_numbers(content: dict, settings: dict) -> list[str]:
    knees = [row["starts"]["white noise"]["knee"] for row in content["rows"]]
    out = [
        *([OLD, ""] if any(k["level"] and k["interval"] != "jackknife" for k in knees) else []),
        how(content, settings),
        "",
        "Critical levels: "
        + "; ".join(
            f"{k} at sigma {m['level']['sigma']:.2f}" if m["level"] else f"{k}: none"
            for k, m in content["marks"].items()
        )
        + ".",
        "",
    ]
    out += [
        "| sampler | NFE | standard start | best Gaussian start | flat: intervals overlap | flat: paired | "
        "white noise, best | its knee | Gaussian less white noise, each at its best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells, bests = [], []
        for name in ("Gaussian", "white noise"):
            start = row["starts"][name]
            best = next(c for c in start["cells"] if c["sigma"] == start["flat"]["best"])
            cells.append(f"{span(best['distance'])} at {best['sigma']:.2g}")
            bests.append(best["distance"])
            if name == "Gaussian":
                cells += [f"{a:.2g} to {b:.2g}" for a, b in (start["flat"]["overlap"], start["flat"]["paired"])]
        at = row["starts"]["white noise"]["knee"]
        ends = [f"{at[k]['sigma']:.2g}" if at[k] else "open" for k in ("low", "high")]
        cells.append(f"{at['level']['sigma']:.2g} [{ends[0]}, {ends[1]}]" if at["level"] else f"none: {at['reason']}")
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference(*bests)))
        out.append(
            f"| {row['sampler']} | {row['calls']} | {span(row['standard']['distance'])} | " + " | ".join(cells) + " |"
        )
    return out


def starts_numbers(content: dict, settings: dict) -> list[str]:
    rows = content["rows"]
    names = list(dict.fromkeys(r["start"] for r in rows))
    out = [how(content, settings), f"Sampler {settings['sampler']}.", ""]
    for n in sorted({r["calls"] for r in rows}):
        same = [r for r in rows if r["calls"] == n]
        levels = sorted({r["asked"] for r in same})
        s = next(s for s in content["standard"] if s["calls"] == n)
        out += [
            f"**{n} NFE.** The standard start has {span(s['distance'])} (recall {s['recall']:.2f}, class entropy "
            f"{number(s['entropy'])}). Distance by start level; the columns after it at the level that is best "
            "for the start:",
            "",
            "| start | "
            + " | ".join(f"sigma {v:.2g}" for v in levels)
            + " | precision | recall | class entropy, bits | "
            "nearest training image | d1/d2 < 1/3 |",
            "|---" * (len(levels) + 6) + "|",
        ]
        for name in names:
            cells = [r for r in same if r["start"] == name]
            best = min(cells, key=lambda r: r["distance"]["mean"])
            by = {r["asked"]: span(r["distance"]) for r in cells}
            more = [number(best[k]) for k in ("precision", "recall", "entropy", "nearest")]
            out.append(
                f"| {name} | "
                + " | ".join(by[v] for v in levels)
                + " | "
                + " | ".join(more)
                + f" | {best['memorized']:.1%} |"
            )
        out.append("")
    distances = {(r["start"], r["calls"], r["asked"]): r["distance"] for r in rows}
    cells = sorted({k[1:] for k in distances})
    out += [
        "Less the full Gaussian's distance at the same level and NFE, of the same seeds against the same reference, "
        "with 95 % interval:",
        "",
        "| start | " + " | ".join(f"{n} NFE, {level:.2g}" for n, level in cells) + " |",
        "|---" * (len(cells) + 1) + "|",
    ]
    for name in names:
        if name != FULL:
            gaps = [difference(distances[(name, *c)], distances[(FULL, *c)]) for c in cells]
            out.append(f"| {name} | " + " | ".join("{:+.2f} [{:+.2f}, {:+.2f}]".format(*g) for g in gaps) + " |")
    out.append("")
    real = content["real"]
    out.append(
        f"Real images at the same count ({real['images']} training images; nearness of held-out ones): precision "
        f"{real['precision']:.2f}, recall {real['recall']:.2f}, class entropy {number(real['entropy'])} bits, nearest "
        f"training image {real['nearest']:.2f}, d1/d2 < 1/3 in {real['memorized']:.1%}."
    )
    return out


def number(v: float | None) -> str:
    return "-" if v is None else f"{v:.2f}"


WRITERS = {
    "gaussian": (gaussian_numbers, gaussian_figure),
    "sensitivity": (sensitivity_numbers, sensitivity_figure),
    "starts": (starts_numbers, starts_figure),
}


def write_pages() -> None:
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for data in TITLES:
        folder = ROOT / "build" / "checks" / data
        files = {
            "gaussian": folder / "gaussian.json",
            "sensitivity": folder / "sensitivity" / "record.json",
            "starts": folder / "starts" / "record.json",
        }
        for name, file in files.items():
            if not file.exists():
                print(f"{file} is not there; the page keeps what it has")
                continue
            record = Record.load(file)
            numbers, draw = WRITERS[name]
            picture = f"{PAGES[name]}-{data}.png"
            draw(record.content).savefig(figures / picture, metadata={"Software": None})
            head = (
                [] if data == "digits" else [f"## {TITLES[data]}", ""]
            )  # the digits' heading stands before their prose
            body = [*head, *numbers(record.content, record.settings), "", f"![{TITLES[data]}](figures/{picture})"]
            fill(ROOT / "docs" / f"{PAGES[name]}.md", data, body)


def fill(path: Path, name: str, body: list[str]) -> None:
    begin, end = f"<!-- {name}:begin, written by scripts/checks.py -->", f"<!-- {name}:end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(before + "\n".join([begin, *body, end]) + rest.split(end)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--model", default=None, help="a diffusers folder; needed for MNIST")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=200, help="images a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samplers", default="dpm++2m,dpm++2m-karras,ddim,pndm,ddpm")
    parser.add_argument("--sampler", default="dpm++2m", help="of the comparison of starts")
    parser.add_argument("--calls", default="3,5,10")
    parser.add_argument("--levels", type=int, default=9, help="start levels of the sensitivity")
    parser.add_argument("--tests", type=int, default=12, help="levels of the tests")
    parser.add_argument("--states", type=int, default=1000, help="states tested")
    parser.add_argument("--simulations", type=int, default=999, help="Gaussian samples behind a p-value")
    parser.add_argument("--nats", type=int, default=256, help="held-out images of the loss curve")
    parser.add_argument("--quick", action="store_true", help="a smoke run, no evidence")
    parser.add_argument("--page", action="store_true", help="write pages and figures from what is finished and stop")
    args = parser.parse_args()
    if args.page:
        write_pages()
        return
    if args.data == "mnist" and (args.model is None or not os.environ.get("SYMBREAK_DATA")):
        raise SystemExit("MNIST needs --model FOLDER and SYMBREAK_DATA.")
    if args.quick:
        args.samples, args.repeats, args.samplers, args.calls, args.levels = 20, 2, "dpm++2m-karras,ddim", "3", 3
        args.tests, args.states, args.simulations, args.nats = 5, 120, 199, 32
    run(args)


if __name__ == "__main__":
    main()
