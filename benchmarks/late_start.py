"""Late starts against the best starts without one, at equal network calls, and against a full scan.

    python benchmarks/late_start.py                                    # digits
    python benchmarks/late_start.py --data mnist --model FOLDER        # MNIST, needs SYMBREAK_DATA

Every opponent gets its best grid: spacings, levels and laws are selected on seeds and images of their own, and
all numbers are reported on other seeds. Distances are Fréchet distances in a classifier's 64 features to
held-out images that nothing was fitted on or chosen with. What is finished is kept in --out and not done again.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

import symbreak as sb
from symbreak.cut import cut
from symbreak.files import write_json
from symbreak.metrics.diversity import class_entropy, precision_recall
from symbreak.metrics.features import extractor, features, load_classifier, save_classifier, train_classifier
from symbreak.metrics.fid import distance, floor
from symbreak.metrics.memorization import nearest_summary

SAMPLERS = ("dpm++2m", "dpm++2m-karras", "unipc", "ddim", "pndm", "ddpm")
SPACINGS = ("leading", "trailing", "linspace")
SELECTION = 10**6  # first seed of those that select
MANY = (20, 50)  # calls of opponents beyond the table


class Teleported:
    """A Gaussian whose flow starts at the schedule's finite top (Wang & Vastola, arXiv:2412.09726)."""

    def __init__(self, law, top):
        self.law, self.top, self.shape = law, top, law.shape

    def transport(self, noise, sigma):
        return self.law.transport(self.top * noise, sigma, sigma_from=self.top)


class FirstStepAnalytic(torch.nn.Module):
    """AFS: the first prediction is the state itself, x / sqrt(1 + sigma^2), and costs no call (arXiv:2210.05475)."""

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
        train, held = sb.images("digits"), sb.images("digits:held-out").tensor()
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(4))
        return train, held[order[:300]], held[order[300:]], sb.load_pipeline(model or "digits")
    root = Path(os.environ["SYMBREAK_DATA"])
    train = sb.images(str(root / "mnist-train.parquet"))
    held = sb.images(str(root / "mnist-test.parquet")).tensor()
    return train, held[:1000], held[1000:], sb.load_pipeline(model)


def classifier(name, train, out):
    if name == "digits":
        return extractor("digits-classifier")
    path = out / "classifier.safetensors"
    if not path.exists():
        save_classifier(train_classifier(train, epochs=2), path, "mnist-classifier")
    return load_classifier(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=200, help="images a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--selection", type=int, default=200, help="images that select")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--calls", default="1,3,5,10")
    parser.add_argument("--clusters", type=int, default=None)
    parser.add_argument("--no-scan", action="store_true", help="leave the scan over laws and levels out")
    args = parser.parse_args()
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
    began = time.perf_counter()
    clusters = args.clusters or (40 if args.data == "digits" else 60)
    gaussian = sb.Gaussian.fit(train)
    laws = {
        "Gaussian": gaussian,
        "classes": sb.PrincipalMixture.fit(train, labels=True, gaussian=gaussian),
        "clusters": sb.PrincipalMixture.fit(train, components=clusters, gaussian=gaussian),
    }
    fitting = time.perf_counter() - began
    network = sb.denoiser(unet, pipe.scheduler)
    top = sb.schedule(pipe.scheduler).sigma_range[1]
    scale = math.sqrt(float(gaussian.eigenvalues[0]))
    cache_path = out / "cells.json"
    cells = json.loads(cache_path.read_text()) if cache_path.exists() else {}
    report_seeds = range(args.samples * args.repeats)
    select_seeds = range(SELECTION, SELECTION + args.selection)
    train_images = train.tensor()

    def keep(key, make):
        if key not in cells:
            cells[key] = make()
            write_json(cache_path, cells)
        return cells[key]

    def images(start, seeds, net=unet):
        return sb.generate(net, start, seeds, micro_batch=100)

    def select(key, start, net=unet):
        found = keep(
            f"select/{key}",
            lambda: sb.frechet_distance(sb.Moments.fit([features(extract, [images(start, select_seeds, net)])]), ref),
        )
        return found

    def measure(key, start, net=unet, **more):
        def make():
            x = images(start, report_seeds, net)
            f = features(extract, [x])
            labels = torch.cat([extract.logits(part).argmax(1) for part in x.split(500)])
            near = nearest_summary(x[:500], train_images, None)["samples"]
            return {
                **distance(f, ref, args.repeats, extract.name).to_dict(),
                "entropy": class_entropy(labels, len(extract.classes)),
                **precision_recall(f[:1000], real[:1000]),
                "nearest": near["median_nearest"],
                "memorized": near["memorized"],
                "sigma": start.level.sigma,
                **more,
            }

        return keep(f"report/{key}", make)

    def afs(base, calls):
        """Standard start with calls + 1 steps, the first of them analytic; best spacing selected."""
        best = None
        for spacing in SPACINGS:
            try:
                start = sb.standard_start(base, calls + 1, spacing)
            except ValueError:
                continue
            if start.calls != calls + 1:
                continue
            net = FirstStepAnalytic(unet)
            net.first = float(start.scheduler.timesteps[0])
            value = select(f"{name}/{calls}/afs/{spacing}", start, net)
            best = (value, spacing, start, net) if best is None or value < best[0] else best
        return best

    def steps_for(base, calls):
        return next((n for n in range(calls, 0, -1) if sb.standard_start(base, n).calls == calls), None)

    rows = []
    for name in args.samplers.split(","):
        base = sb.scheduler(name, like=pipe.scheduler)
        for calls in (*map(int, args.calls.split(",")), *MANY):
            steps = steps_for(base, calls)
            if steps is None:
                continue
            row = {"sampler": name, "calls": calls}
            spaced = {s: sb.standard_start(base, steps, s) for s in SPACINGS}
            if calls in MANY:
                # A long run is little moved by its spacing; all are scored only where a choice is cheap.
                row["standard"] = measure(f"{name}/{calls}/standard", spaced["trailing"], spacing="trailing")
                rows.append(row)
                continue
            chosen = min(spaced, key=lambda s: select(f"{name}/{calls}/standard/{s}", spaced[s]))
            row["standard"] = measure(f"{name}/{calls}/standard", spaced[chosen], spacing=chosen)
            found = afs(base, calls)
            if found:
                _, spacing, start, net = found
                row["afs"] = measure(f"{name}/{calls}/afs", start, net, spacing=spacing)
            levels = np.geomspace(0.15 * scale, 3.0 * scale, 8)

            def late(law, sigma, base=base, steps=steps):
                return cut(base, law, steps, sb.NoiseLevel(float(sigma)))

            def score(law, sigma, name=name, calls=calls, late=late):
                try:
                    return select(f"{name}/{calls}/{law}/{sigma:.4g}", late(laws[law], sigma))
                except ValueError:
                    return math.inf

            best = min(levels, key=lambda s: score("Gaussian", s))
            row["gaussian"] = measure(f"{name}/{calls}/gaussian", late(gaussian, best))
            row["teleported"] = measure(f"{name}/{calls}/teleported", late(Teleported(gaussian, top), best))
            began = time.perf_counter()
            start = sb.late_start(base, list(laws.values()), steps, denoiser=network, data=chooser, check=False)
            seconds = time.perf_counter() - began
            law = "standard" if start.law is None else list(laws)[start.choice.chosen.law]
            grid = start.choice.chosen.grid
            row["auto"] = measure(f"{name}/{calls}/auto", start, law=law, grid=grid, seconds=seconds + fitting)
            if not args.no_scan:
                pairs = [(law, s) for law in laws for s in levels]
                law, sigma = min(pairs, key=lambda p: score(*p))
                row["scan"] = measure(f"{name}/{calls}/scan", late(laws[law], sigma), law=law)
            rows.append(row)
            write_json(out / "late_start.json", {"rows": rows, "fitting": fitting})
            print(line(row), flush=True)
    same = keep(
        "floor", lambda: floor(features(extract, [chooser]), ref, args.samples, args.repeats, extract.name).to_dict()
    )
    noised = features(extract, [train_images[: args.samples * args.repeats]])
    ideal = keep("train", lambda: distance(noised, ref, args.repeats, extract.name).to_dict())
    write_json(out / "late_start.json", {"rows": rows, "fitting": fitting, "floor": same, "train": ideal})
    print(f"training images at the same counts {ideal['mean']:.3g}; fitting the laws took {fitting:.1f} s")


def line(row):
    parts = [f"{row['sampler']:>15} {row['calls']:>3}"]
    for key in ("standard", "afs", "gaussian", "teleported", "auto", "scan"):
        if key in row:
            d = row[key]
            parts.append(f"{key} {d['mean']:.3g} [{d['low']:.3g}, {d['high']:.3g}]")
    d = row["auto"]
    parts.append(f"({d['law']} at {d['sigma']:.2g}, {d['grid']}, {d['seconds']:.0f} s, recall {d['recall']:.2f})")
    return " ".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
