"""Late starts against the best starts without one, at equal NFE, and against a full scan.

    python benchmarks/late_start.py                                    # a few cells on the digits: a smoke run
    python benchmarks/late_start.py --data digits                      # the digits
    python benchmarks/late_start.py --data mnist --model FOLDER        # MNIST, needs SYMBREAK_DATA
    python benchmarks/late_start.py --page docs/late-start.md          # the page, from what is finished

Every baseline may take the grids that `auto` may take (the sampler's own in three spacings, and Karras' where the
sampler has it). Grids, levels, laws and the best sampler of a column are picked on other seeds than those printed.
Distances are Fréchet distances in a classifier's 64 features to held-out images that nothing was fitted on or chosen
with. Comparisons are differences on the same seeds and reference. What is finished is kept in --out and not done again.
"""

import argparse
import contextlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

import symbreak as sb
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import (
    accuracy,
    extractor,
    features,
    load_classifier,
    save_classifier,
    train_classifier,
)
from symbreak.metrics.frechet import difference, distance, floor, ratio
from symbreak.networks.denoiser import fingerprint
from symbreak.runtime.files import write_json
from symbreak.start.grids import grids, standard_starts, steps_for
from symbreak.start.late_start import cut
from symbreak.studies.measure import SELECTION_SEED, Comparison

SAMPLERS = ("dpm++2m", "unipc", "ddim", "pndm", "ddpm")
MANY = (20, 50)  # network evaluations of baselines beyond the table
PLAIN = ("standard", "afs")  # columns without a late start


class Teleported:
    """A Gaussian whose flow starts at the schedule's finite top (Wang & Vastola, arXiv:2412.09726)."""

    def __init__(self, law, top):
        self.law, self.top, self.shape = law, top, law.shape

    def transport(self, noise, sigma):
        return self.law.transport(self.top * noise, sigma, sigma_from=self.top)


class FirstStepAnalytic(torch.nn.Module):
    """AFS: the first prediction is the state itself, x / sqrt(1 + sigma^2), without the network (arXiv:2210.05475)."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.first = unet, unet.config, math.inf

    def forward(self, sample, timestep, **kwargs):
        if float(torch.as_tensor(timestep).reshape(-1)[0]) >= self.first:
            return (sample,)
        return self.unet(sample, timestep, **kwargs)


def world(name, model):
    """Training images, images to choose with, reference images, pipeline, classifier."""
    if name == "digits":
        train, test = sb.images("digits"), sb.images("digits:held-out").tensor()
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(4))
        return train, test[order[:300]], test[order[300:]], sb.load_pipeline(model or "digits")
    root = Path(os.environ["SYMBREAK_DATA"])
    train = sb.images(str(root / "mnist-train.parquet"))
    test = sb.images(str(root / "mnist-test.parquet")).tensor()
    return train, test[:1000], test[1000:], sb.load_pipeline(model)


def classifier(name, train, out):
    if name == "digits":
        return extractor("digits-classifier")
    path = out / "classifier.safetensors"
    if not path.exists():
        save_classifier(train_classifier(train, epochs=2), path, "mnist-classifier")
    model = load_classifier(path)
    test = sb.images(str(Path(os.environ["SYMBREAK_DATA"]) / "mnist-test.parquet"))
    model.accuracy = accuracy(model, test)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=200, help="images a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--selection", type=int, default=200, help="images that select")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--calls", default="1,3,5,10")
    parser.add_argument("--clusters", type=int, default=None)
    parser.add_argument("--page", type=Path, default=None, help="write the documentation's page and stop")
    parser.add_argument("--no-scan", action="store_true", help="leave the scan over laws and levels out")
    args = parser.parse_args()
    if args.page is not None:
        write_page(args.page)
        return
    quick = args.data is None
    args.data = args.data or "digits"
    if quick:
        args.samples, args.selection, args.samplers, args.calls, args.no_scan = 40, 40, "dpm++2m", "3", True
        args.out = args.out or Path("build/late_start/quick")
    if args.data == "mnist" and (args.model is None or not os.environ.get("SYMBREAK_DATA")):
        print("late_start on MNIST: skipped, needs --model FOLDER and SYMBREAK_DATA")
        return
    out = args.out or Path("build/late_start") / args.data
    out.mkdir(parents=True, exist_ok=True)
    train, chooser, reference, pipe = world(args.data, args.model)
    unet = pipe.unet
    extract = classifier(args.data, train, out)
    real = features(extract, [reference])
    ref = sb.Moments.fit([real])
    began = time.process_time()
    clusters = args.clusters or (40 if args.data == "digits" else 60)
    gaussian = sb.Gaussian.fit(train)
    laws = {
        "Gaussian": gaussian,
        "classes": sb.PrincipalMixture.fit(train, labels=True, gaussian=gaussian),
        "clusters": sb.PrincipalMixture.fit(train, components=clusters, gaussian=gaussian),
    }
    fitting = time.process_time() - began
    network = sb.denoiser(unet, pipe.scheduler)
    top = sb.schedule(pipe.scheduler).sigma_range[1]
    scale = math.sqrt(float(gaussian.eigenvalues[0]))
    about = {
        "data": train.fingerprint(),
        "chosen with": len(chooser),
        "network": fingerprint(network),
        "extractor": extract.to_dict(),
        "sizes": [args.samples, args.repeats, args.selection, clusters],
    }
    run = sb.Run(out).identified(about)
    seeds, choosing = range(args.samples * args.repeats), range(SELECTION_SEED, SELECTION_SEED + args.selection)
    comparison = Comparison(unet, extract, ref, train.shards(run), seeds, choosing, args.repeats, 100, run, real)

    def measure(start, selected, net=unet, key="", **more):
        """A start's distance and quality in one row, its distance on the selecting seeds, and what else is said."""
        cell = comparison.cell(start, comparison.quality, unet=net, key=key)
        return {**cell["distance"], **{k: v for k, v in cell.items() if k != "distance"}, "selected": selected, **more}

    def spaced(base, steps, spent):
        """The standard starts of every grid and spacing, by name."""
        starts = {
            {"own": spacing}.get(grid, grid): start  # a spacing does not move Karras' levels
            for grid, full in grids(base).items()
            for spacing, start in standard_starts(full, steps, skip=True).items()
        }
        return {name: start for name, start in starts.items() if start.calls == spent}

    def standard(base, steps, calls):
        """The standard start of the best grid and spacing."""
        starts = spaced(base, steps, calls)
        if calls in MANY:  # a long run is little moved by its spacing; all are scored only where a choice is cheap
            starts = {k: v for k, v in starts.items() if k in ("trailing", "own", "Karras")}
        name, scores = comparison.choose(starts)
        return measure(starts[name], scores[name], grid=name)

    def afs(base, calls):
        """Standard start with calls + 1 steps, the first of them analytic, of the best grid and spacing."""
        tried = []
        for grid, start in spaced(base, calls + 1, calls + 1).items():
            net = FirstStepAnalytic(unet)
            net.first = float(start.scheduler.timesteps[0])
            tried.append((comparison.score(start, unet=net, key="afs"), grid, start, net))
        if not tried:
            return None
        selected, grid, start, net = min(tried, key=lambda t: t[0])
        return measure(start, selected, net, "afs", grid=grid)

    levels = np.geomspace(0.15 * scale, 3.0 * scale, 8)

    def scanned(base, steps, some):
        """The best of some laws, of 8 levels and of the sampler's grids."""
        tried = []
        for grid, full in grids(base).items():
            for law in some:
                for sigma in levels:
                    with contextlib.suppress(ValueError):
                        start = cut(full, laws[law], steps, sb.NoiseLevel(float(sigma)))
                        tried.append((comparison.score(start), law, grid, start))
        selected, law, grid, start = min(tried, key=lambda t: t[0])
        return start, grid, measure(start, selected, law=law, grid=grid)

    def chosen(base, steps):
        """The start that chooses itself; its distance on the selecting seeds decides among samplers only."""
        began = time.process_time()
        start = sb.late_start(base, list(laws.values()), steps, denoiser=network, data=chooser, check=False)
        seconds = time.process_time() - began + fitting
        law = "standard" if start.law is None else list(laws)[start.choice.chosen.law]
        return measure(start, comparison.score(start), law=law, grid=start.choice.chosen.grid, seconds=seconds)

    def row_of(name, calls):
        """All columns of a sampler at a number of network evaluations; none where no number of steps costs them."""
        base = sb.scheduler(name, like=pipe.scheduler)
        try:
            steps = steps_for(base, calls)
        except sb.InputError:
            return None
        row = {"sampler": name, "calls": calls, "standard": standard(base, steps, calls)}
        if calls in MANY:
            return row
        analytic = afs(base, calls)
        late, grid, row["gaussian"] = scanned(base, steps, ["Gaussian"])
        teleported = cut(grids(base)[grid], Teleported(gaussian, top), steps, late.asked)
        row["teleported"] = measure(teleported, None)
        row["auto"] = chosen(base, steps)
        if not args.no_scan:
            row["scan"] = scanned(base, steps, list(laws))[2]
        return row if analytic is None else {**row, "afs": analytic}

    rows = []
    for calls in (*map(int, args.calls.split(",")), *(() if quick else MANY)):
        for name in args.samplers.split(","):
            row = row_of(name, calls)
            if row is not None:
                rows.append(row)
                write_json(out / "late_start.json", {"rows": rows, "fitting": fitting})
                print(line(row), flush=True)
    same = floor(features(extract, [chooser]), ref, args.samples, args.repeats, extract.name).to_dict()
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(9))[: len(seeds)]
    real_ones = features(extract, [comparison.train.at(some)])
    ideal = distance(real_ones, ref, args.repeats, extract.name).to_dict()
    about = {
        "data": train.name,
        "images": len(train),
        "network": sum(p.numel() for p in unet.parameters()),
        "choosing": len(chooser),
        "selection": args.selection,
        "accuracy": extract.accuracy,
        "real": precision_recall(features(extract, [chooser])[:1000], real[:1000]),
        "drawing": drawing(laws, unet, train.shape),
        "threads": torch.get_num_threads(),
    }
    whole = {"rows": rows, "fitting": fitting, "floor": same, "train": ideal, "about": about}
    write_json(out / "late_start.json", whole)
    print(f"training images at the same counts {ideal['mean']:.3g}; fitting the laws took {fitting:.1f} s")
    for name, d in about["drawing"].items():
        print(f"drawing 256 starts, {name}: {d['seconds'] * 1e3:.1f} ms, {d['share']:.2%} of one network evaluation")


def drawing(laws, unet, shape, batch=256):
    """Seconds to draw a batch of starts, and their share of one network evaluation of the same batch: medians of 7."""
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(3))

    def seconds(work):
        work()
        times = []
        for _ in range(7):
            began = time.process_time()  # of one thread, so that a busy machine does not count
            work()
            times.append(time.process_time() - began)
        return float(np.median(times))

    with torch.inference_mode():
        call = seconds(lambda: unet(noise, torch.tensor(300), return_dict=False))
        timings = {}
        for name, law in laws.items():
            sigma = 0.3 * math.sqrt(float(law.moments.eigh[0][0]))
            took = seconds(lambda law=law, sigma=sigma: law.transport(noise, sigma))
            timings[name] = {"seconds": took, "call": call, "share": took / call}
    return timings


def write_page(path):
    """The parts of the documentation's page that finished runs under build/late_start decide; its prose stays."""
    text = path.read_text(encoding="utf-8")
    for name in ("digits", "mnist"):
        file = Path("build/late_start") / name / "late_start.json"
        begin, end = f"<!-- {name}:begin, written by benchmarks/late_start.py -->", f"<!-- {name}:end -->"
        if not file.exists() or "about" not in json.loads(file.read_text()):
            print(f"{file} is not finished; the page keeps what it has")
            continue
        before, rest = text.split(begin)
        body = section(name, json.loads(file.read_text()))
        text = before + "\n".join([begin, *body, end]) + rest.split(end)[1]
    path.write_text(text, encoding="utf-8")


def best(rows, keys):
    """The row and the column of the best start, picked on seeds that are not printed."""
    return min(((r, k) for r in rows for k in keys if k in r), key=lambda p: p[0][p[1]]["selected"])


def named(row, key):
    """A start in words."""
    about = row[key]
    what = {"standard": f"{about['grid']}", "afs": f"AFS, {about['grid']}"}.get(key)
    return f"{cell(about)}, {row['sampler']}" + (f", {what}" if what else f", sigma {about['sigma']:.2g}")


def gap(a, b):
    """How much farther a is than b, with the interval of the difference."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference(a, b))


def summary(rows):
    """Rows at a glance: for every NFE the best of all samplers, and the differences to what auto chose."""
    out = []
    for calls in sorted({r["calls"] for r in rows if "auto" in r}):
        same = [r for r in rows if r["calls"] == calls]
        plain, gaussian, auto = (best(same, keys) for keys in (PLAIN, ("gaussian",), ("auto",)))
        gaps = [gap(r[k], auto[0]["auto"]) for r, k in (plain, gaussian)]
        out.append(f"| {calls} | " + " | ".join([*(named(*p) for p in (plain, gaussian, auto)), *gaps]) + " |")
    return out


def cell(d):
    return f"{d['mean']:.2f} [{d['low']:.2f}, {d['high']:.2f}] ({d['pooled']:.2f})"


def section(name, whole):
    rows, about, train = whole["rows"], whole["about"], whole["train"]
    d = rows[0]["auto"]
    n = d["samples"] * d["repeats"]
    out = [
        f"{about['images']:,} training images, network of {about['network']:,} parameters. Fréchet distance in the "
        f"64 features of `{d['extractor']}` (accuracy {about['accuracy']:.1%}) to {d['reference']:,} held-out images: "
        f"mean of {d['repeats']} repeats of {d['samples']} images with its 95 % interval (jackknife over repeats and "
        f"parts of the reference); in round brackets that of all {n:,} images at once. Grids, levels and laws of "
        "the baselines and of the scan, and the sampler that stands for a column, were selected on "
        f"{about['selection']} images of other seeds. All starts of a sampler may take the same grids: its own in "
        f"three spacings, and Karras' where it has it. `auto` saw {about['choosing']} held-out images that are not in "
        "the reference; of the network's images it saw none. PNDM repeats a step and has no AFS. Teleportation starts "
        "at the level and on the grid of the scanned Gaussian. The scan goes over laws, 8 levels and grids. "
        f"Training images, {train['repeats']} repeats of {train['samples']:,}: {cell(train)}.",
        "",
        "Differences are of the same seeds against the same reference, with their 95 % interval:",
        "",
        "| NFE | best without a late start | best Gaussian start, level scanned | chosen by `auto` | without a late "
        "start, less `auto` | Gaussian, less `auto` |",
        "|---|---|---|---|---|---|",
        *summary(rows),
        "",
        *verdicts(rows),
        "",
        "| sampler | NFE | standard start | AFS | Gaussian, scanned | teleported | **auto** | its choice | scan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((r for r in rows if "auto" in r), key=lambda r: r["calls"]):
        a = row["auto"]
        choice = "standard" if a["law"] == "standard" else f"{a['law']} at {a['sigma']:.2g}, {a['grid']}"
        cells = [cell(row[k]) if k in row else "-" for k in ("standard", "afs", "gaussian", "teleported")]
        cells[:2] = [f"{c}, {row[k]['grid']}" if k in row else c for c, k in zip(cells, PLAIN)]
        scan = "-"
        if "scan" in row:
            scan = f"{cell(row['scan'])}, {row['scan']['law']} at {row['scan']['sigma']:.2g}, {row['scan']['grid']}"
        out.append(f"| {row['sampler']} | {row['calls']} | {' | '.join(cells)} | {cell(a)} | {choice} | {scan} |")
    out += ["", "Standard starts with more network evaluations:", "", "| sampler | NFE | distance |", "|---|---|---|"]
    many = sorted((r for r in rows if "auto" not in r), key=lambda r: r["calls"])
    out += [f"| {r['sampler']} | {r['calls']} | {cell(r['standard'])}, {r['standard']['grid']} |" for r in many]
    out += [
        "",
        "Diversity and copying, dpm++2m (class entropy of all images of a cell; precision and recall with k = 3 of at "
        "most 1,000 features; nearest training image in pixels of 500 images):",
        "",
        "| start | NFE | class entropy, bits | precision | recall | nearest | d1/d2 < 1/3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted((r for r in rows if r["sampler"] == "dpm++2m"), key=lambda r: r["calls"]):
        for key in ("standard", "afs", "gaussian", "auto"):
            if key in row:
                v = row[key]
                out.append(
                    f"| {key} | {row['calls']} | {v['entropy']:.3f} | {v['precision']:.3f} | {v['recall']:.3f} | "
                    f"{v['nearest']:.2f} | {v['memorized']:.1%} |"
                )
    real = about["real"]
    out += [f"| held-out images | | | {real['precision']:.3f} | {real['recall']:.3f} | | |", ""]
    seconds = [r["auto"]["seconds"] for r in rows if "auto" in r]
    out.append(f"Fitting all laws and choosing took {min(seconds):.0f} to {max(seconds):.0f} s of one thread.")
    out += [
        f"Drawing 256 starts, {law}: {v['seconds'] * 1e3:.1f} ms, {v['share']:.2%} of one network evaluation of as "
        f"many images, {v['share'] / 3:.2%} of three."
        for law, v in about["drawing"].items()
    ]
    return out


def verdicts(rows):
    """What was to be shown: ratios and differences with their intervals."""
    out = []
    for calls in sorted({r["calls"] for r in rows if "auto" in r}):
        same = [r for r in rows if r["calls"] == calls]
        auto = best(same, ["auto"])[0]["auto"]
        times = [ratio(r[k], auto) for r, k in (best(same, PLAIN), best(same, ["gaussian"]))]
        said = ["without an interval" if t is None else "{:.2f} [{:.2f}, {:.2f}]".format(*t) for t in times]
        out.append(
            f"- {calls} NFE: the best without a late start is {said[0]} times as far as the best `auto`, the best "
            f"scanned Gaussian {said[1]} times."
        )
    for few, many in ((1, 10), (3, 20), (3, 50), (5, 50), (10, 50)):
        late, plain = ([r for r in rows if r["calls"] == n] for n in (few, many))
        if late and plain:
            (a, _), (b, key) = best(late, ["auto"]), best(plain, PLAIN)
            out.append(
                f"- `auto` with {few} NFE ({a['sampler']}) less the best without a late start with {many} "
                f"({b['sampler']}, {key}): {gap(a['auto'], b[key])}."
            )
    scanned = [r for r in rows if "scan" in r]
    gaps = {f"{r['sampler']} with {r['calls']}": difference(r["auto"], r["scan"]) for r in scanned}
    worse = [f"{name} ({g[0]:+.2f} [{g[1]:+.2f}, {g[2]:+.2f}])" for name, g in gaps.items() if g[1] > 0]
    better = sum(g[2] < 0 for g in gaps.values())
    if gaps:
        out.append(
            f"- `auto` against the scan over laws, levels and grids, {len(gaps)} rows: farther beyond the interval in "
            f"{len(worse)}{': ' if worse else ''}{', '.join(worse)}; nearer beyond the interval in {better}."
        )
    return out


def line(row):
    parts = [f"{row['sampler']:>15} {row['calls']:>3}"]
    for key in ("standard", "afs", "gaussian", "teleported", "auto", "scan"):
        if key in row:
            d = row[key]
            parts.append(f"{key} {d['mean']:.3g} [{d['low']:.3g}, {d['high']:.3g}]")
    d = row.get("auto")
    about = (
        f"({d['law']} at {d['sigma']:.2g}, {d['grid']}, {d['seconds']:.0f} s, recall {d['recall']:.2f})" if d else ""
    )
    return " ".join([*parts, about])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
