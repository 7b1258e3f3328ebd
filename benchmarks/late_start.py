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
            spacing if grid == "own" else f"{grid}, {spacing}": start
            for grid, full in grids(base).items()
            for spacing, start in standard_starts(full, steps, skip=True).items()
        }
        return {name: start for name, start in starts.items() if start.calls == spent}

    def standard(base, steps, calls):
        """The standard start of the best grid and spacing."""
        starts = spaced(base, steps, calls)
        if calls in MANY:  # a long run is little moved by its spacing; all are scored only where a choice is cheap
            starts = {k: v for k, v in starts.items() if k.endswith("trailing")}
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
    """The documentation's page from the finished runs under build/late_start."""
    lines = [
        "# Late starts against the best baselines",
        "",
        "Written by `python benchmarks/late_start.py --page docs/late-start.md` from finished runs of the same script.",
        "How `auto` chooses: [choosing-a-start.md](choosing-a-start.md).",
    ]
    short = []
    for name, title in (("digits", "digits"), ("digits1000", "digits, repeats of 1,000 images"), ("mnist", "mnist")):
        file = Path("build/late_start") / name / "late_start.json"
        if file.exists():
            whole = json.loads(file.read_text())
            if "about" not in whole:
                print(f"{file} is not finished; left out")
                continue
            lines += section(title, whole)
            short += summary(name, whole) if name == title else []
    head = [
        "",
        "## At a glance",
        "",
        "For every number of network evaluations an image (NFE), the best of all samplers by the mean.",
        "",
        "| images | NFE | best without a late start | best Gaussian start, level scanned | chosen by `auto` |",
        "|---|---|---|---|---|",
    ]
    path.write_text("\n".join([*lines[:4], *head, *short, *lines[4:]]) + "\n", encoding="utf-8")


def summary(name, whole):
    """Rows at a glance: for every NFE the best of all samplers, by the mean."""
    late, out = [r for r in whole["rows"] if "auto" in r], []
    for calls in sorted({r["calls"] for r in late}):
        same = [r for r in late if r["calls"] == calls]
        plain = [(r[k], r["sampler"]) for r in same for k in ("standard", "afs") if k in r]
        columns = [
            min(plain, key=lambda p: p[0]["mean"]),
            min(((r["gaussian"], r["sampler"]) for r in same), key=lambda p: p[0]["mean"]),
            min(((r["auto"], r["sampler"]) for r in same), key=lambda p: p[0]["mean"]),
        ]
        out.append(f"| {name} | {calls} | " + " | ".join(f"{cell(d)}, {who}" for d, who in columns) + " |")
    return out


def cell(d):
    return f"{d['mean']:.2f} [{d['low']:.2f}, {d['high']:.2f}] ({d['pooled']:.2f})"


def section(name, whole):
    rows, about, train = whole["rows"], whole["about"], whole["train"]
    d = rows[0]["auto"]
    n = d["samples"] * d["repeats"]
    out = [
        "",
        f"## {name}",
        "",
        f"{about['images']:,} training images, network of {about['network']:,} parameters. Fréchet distance in the "
        f"64 features of `{d['extractor']}` (accuracy {about['accuracy']:.1%}) to {d['reference']:,} held-out images: "
        f"mean of {d['repeats']} repeats of {d['samples']} images with its 95 % interval (jackknife over repeats and "
        f"parts of the reference); in brackets the distance of all {n:,} images at once. Spacings, levels and laws of "
        f"the baselines and of the scan were selected on {about['selection']} images of other seeds. `auto` saw "
        f"{about['choosing']} held-out images that "
        "are not in the reference, and no image of the network. PNDM repeats a step and has no AFS. "
        f"Teleportation starts at {about.get('teleported', 'the level scanned for the Gaussian')}. "
        "The scan goes over laws and 8 levels on the sampler's own grid; *its choice* calls this grid own. "
        f"Training images, {train['repeats']} repeats of {train['samples']:,}: {cell(train)}.",
        "",
        "| sampler | NFE | standard start | AFS | Gaussian, scanned | teleported | **auto** | its choice | scan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((r for r in rows if "auto" in r), key=lambda r: r["calls"]):
        a = row["auto"]
        choice = "standard" if a["law"] == "standard" else f"{a['law']} at {a['sigma']:.2g}, {a['grid']}"
        cells = [cell(row[k]) if k in row else "-" for k in ("standard", "afs", "gaussian", "teleported")]
        scan = f"{cell(row['scan'])}, {row['scan']['law']} at {row['scan']['sigma']:.2g}" if "scan" in row else "-"
        out.append(f"| {row['sampler']} | {row['calls']} | {' | '.join(cells)} | {cell(a)} | {choice} | {scan} |")
    out += ["", "Standard starts with more network evaluations:", "", "| sampler | NFE | distance |", "|---|---|---|"]
    out += [f"| {r['sampler']} | {r['calls']} | {cell(r['standard'])} |" for r in rows if "auto" not in r]
    out += ["", *verdicts(rows), ""]
    out += [
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
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    out.append(f"Fitting all laws and choosing took {min(seconds):.0f} to {max(seconds):.0f} s ({threads}).")
    out += [
        f"Drawing 256 starts, {law}: {v['seconds'] * 1e3:.1f} ms, {v['share']:.2%} of one network evaluation of as "
        f"many images, {v['share'] / 3:.2%} of three."
        for law, v in about["drawing"].items()
    ]
    return out


def wanted(plain, gaussian):
    """Whether the factors aimed at with 3 and 5 calls were reached."""
    words = [("reached" if ratio >= goal else "missed") for ratio, goal in ((plain, 2.0), (gaussian, 1.5))]
    return f" (aims: 2 {words[0]}, 1.5 {words[1]})"


def verdicts(rows):
    """What was to be shown, measured: by the means and by all images at once."""
    out = []
    late = [r for r in rows if "auto" in r]
    for calls in sorted({r["calls"] for r in late}):
        same = [r for r in late if r["calls"] == calls]
        plain = [(r[k], f"{r['sampler']}, {k}") for r in same for k in ("standard", "afs") if k in r]
        parts = []
        for value, words in (("mean", "by the means"), ("pooled", "all images at once")):
            best, who = min(plain, key=lambda p: p[0][value])
            gauss = min((r["gaussian"] for r in same), key=lambda d: d[value])
            auto = min((r["auto"] for r in same), key=lambda d: d[value])
            parts.append(
                f"{words} the best without a late start has {best[value]:.2f} ({who}), the best scanned Gaussian "
                f"{gauss[value]:.2f}, the best auto {auto[value]:.2f}, {best[value] / auto[value]:.2f} and "
                f"{gauss[value] / auto[value]:.2f} times nearer"
                + (wanted(best[value] / auto[value], gauss[value] / auto[value]) if calls in (3, 5) else "")
            )
        out.append(f"- {calls} NFE: {'; '.join(parts)}.")
    inside = [r for r in late if "scan" in r]
    tenth = [r for r in inside if r["auto"]["mean"] <= 1.1 * r["scan"]["mean"]]
    near = [r for r in inside if r in tenth or r["auto"]["mean"] <= r["scan"]["high"]]
    missed = ", ".join(f"{r['sampler']} {r['calls']}" for r in inside if r not in near) or "none"
    out.append(
        f"- auto against the full scan over laws and levels: {len(tenth)} of {len(inside)} rows within 10 %, "
        f"{len(near)} within 10 % or the scan's interval; missed: {missed}."
    )
    plain = [(r[k], r, k) for r in rows for k in ("standard", "afs") if k in r]
    best, row, key = min(plain, key=lambda p: p[0]["mean"])
    out.append(f"- Best without a late start at any NFE: {cell(best)}, {row['sampler']}, {key}, {row['calls']} NFE.")
    ten = min((d for d, r, _ in plain if r["calls"] == 10), key=lambda d: d["mean"])
    for calls in (1, 3):
        same = [r for r in late if r["calls"] == calls]
        if same:
            r = min(same, key=lambda r: r["auto"]["mean"])
            goal, name = (best, "the best above") if calls == 3 else (ten, "the best at 10 NFE without a late start")
            inside = "inside its interval" if r["auto"]["mean"] <= goal["high"] else "above its interval"
            said = "reached" if r["auto"]["mean"] <= goal["mean"] else f"missed, {inside}"
            out.append(
                f"- Best auto with {calls} NFE: {cell(r['auto'])}, {r['sampler']}; aim: {name} "
                f"({goal['mean']:.2f}), {said}."
            )
    return out


def line(row):
    parts = [f"{row['sampler']:>15} {row['calls']:>3}"]
    for key in ("standard", "afs", "gaussian", "teleported", "auto", "scan"):
        if key in row:
            d = row[key]
            parts.append(f"{key} {d['mean']:.3g} [{d['low']:.3g}, {d['high']:.3g}]")
    d = row.get("auto")
    about = f"({d['law']} at {d['sigma']:.2g}, {d['grid']}, {d['seconds']:.0f} s, recall {d['recall']:.2f})" if d else ""
    return " ".join([*parts, about])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
