"""The paper's table on MNIST, from nothing: train a network, a classifier for the features, sample, measure, write.

    make reproduce-mnist                           # trains the network first (recipes/mnist.json)
    make reproduce-mnist MODEL=FOLDER              # with a network of your own
    python scripts/reproduce_mnist.py --page       # docs/mnist.md, from what is finished

DDPM (DDIM with eta = 1), DDIM, PNDM with 3, 5 and 10 network calls, standard start and late starts, beside DPM++2M and
UniPC on Karras grids; then the paper's own grid, linspace(0, t_start, n) with PNDM's Runge-Kutta warm-up, which spends
12, 14 and 19 calls for 3, 5 and 10 steps. Distances are Fréchet distances to the 10,000 test images in the 64 features
of a classifier. Every thousand images are kept in --out: called again it goes on, and ends with the same numbers.

Needs SYMBREAK_DATA with mnist-train.parquet and mnist-test.parquet.
Source: Raya & Ambrogioni 2023, arXiv:2305.19693 (MNIST, PNDM; FID there, classifier features here).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import PNDMScheduler

import symbreak as sb
from symbreak.metrics.composition import class_entropy
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import accuracy, features, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import distance
from symbreak.metrics.memorization import different, nearest_summary
from symbreak.runtime.files import write_json, write_whole
from symbreak.runtime.identity import weights_hash
from symbreak.start.grids import steps_for

ROOT = Path(__file__).parents[1]
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "pndm": "PNDM",
    "dpm++2m-karras": "DPM++2M, Karras",
    "unipc-karras": "UniPC, Karras",
}
CALLS = (3, 5, 10)
REPEAT = 1000  # images a repeat, and what an interruption loses at most
SELECTION = 10**6  # first seed of those that select
LEVELS = (200, 300, 400, 500, 600, 700)  # first steps of the paper's grid that are scanned, as in the paper
PUBLISHED = {3: (154.89, 38.23), 5: (21.22, 5.11), 10: (14.36, 5.02)}  # FID, vanilla and late, arXiv:2305.19693


def paper_grid(like, steps, first):
    """PNDM as the paper runs it: steps even from 0 to ``first``, with the Runge-Kutta warm-up."""
    betas = torch.linspace(like.config.beta_start, like.config.beta_end, like.config.num_train_timesteps)
    scheduler = PNDMScheduler(
        num_train_timesteps=first + 1, trained_betas=betas[: first + 1].numpy(), timestep_spacing="linspace"
    )
    # Three Runge-Kutta steps need four points; with 3 steps the last one, at step 0, is not taken: 12 calls.
    scheduler.set_timesteps(max(steps, 4))
    return scheduler, scheduler.timesteps[: 9 + steps]


def paper_images(unet, full, law, steps, first, seeds, batch=100):
    """Images of the paper's sampler; law None: white noise at the top."""
    out, level = [], sb.schedule(full).level(first)
    for part in torch.as_tensor(list(seeds)).split(batch):
        noise = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(int(s))) for s in part])
        scheduler, times = paper_grid(full, steps, first)
        x = noise if law is None else level.alpha * law.transport(noise, level.sigma).float()
        with torch.inference_mode():
            for t in times:
                x = scheduler.step(unet(x, t.expand(len(x)), return_dict=False)[0], t, x, return_dict=False)[0]
        out.append(x.clamp(-1, 1))
    return torch.cat(out)


class Bench:
    """What every cell shares."""

    def __init__(self, root, model, out, samples):
        self.train = sb.images(str(root / "mnist-train.parquet"))
        test = sb.images(str(root / "mnist-test.parquet"))
        self.pipe = sb.load_pipeline(str(model))
        path = out / "classifier.safetensors"
        if not path.exists():
            print("training the classifier", file=sys.stderr, flush=True)
            save_classifier(train_classifier(self.train, held_out=test, epochs=2), path, "mnist-classifier")
        self.extract = load_classifier(path)
        self.extract.accuracy = accuracy(self.extract, test)
        self.held_out = test.tensor()
        self.real = features(self.extract, [self.held_out])
        self.reference = sb.Moments.fit([self.real])
        self.samples = samples
        identity = {"network": weights_hash(self.pipe.unet), "classifier": weights_hash(self.extract), "repeat": REPEAT}
        self.run = sb.Run(out).identified(identity)
        gaussian = sb.Gaussian.fit(self.train)
        self.laws = {
            "Gaussian": gaussian,
            "classes": sb.PrincipalMixture.fit(self.train, labels=True, gaussian=gaussian),
            "clusters": sb.PrincipalMixture.fit(self.train, components=60, gaussian=gaussian),
        }
        self.network = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.chooser = self.train.subset(1000).tensor()
        self.points = self.train.tensor()
        self.known = different(self.points)

    def images(self, start, seeds):
        return sb.generate(self.pipe.unet, start, seeds, micro_batch=100)

    def cell(self, key, make, calls, **more):
        """Distance, diversity and copying of ``samples`` images, a thousand at a time."""

        def part(i):
            x = make(range(i * REPEAT, (i + 1) * REPEAT))
            return {"features": features(self.extract, [x]).numpy(), "images": x[:100].numpy()}

        def measured():
            parts = [self.run.part(f"{key}/{i}", lambda i=i: part(i)) for i in range(self.samples // REPEAT)]
            rows = torch.cat([torch.from_numpy(p["features"]).double() for p in parts])
            some = torch.cat([torch.from_numpy(p["images"]) for p in parts])
            labels = self.extract.head(rows.float()).argmax(1)
            near = nearest_summary(some, self.known, None)["samples"]
            shared = precision_recall(rows[:1000], self.real[:1000])
            return {
                **distance(rows, self.reference, len(parts), self.extract.name).to_dict(),
                "entropy": class_entropy(labels, 10),
                "precision": shared["precision"],
                "recall": shared["recall"],
                "nearest": near["median_nearest"],
                "memorized": near["memorized"],
                "neighbours_of": near["count"],
                "calls": calls,
                **more,
            }

        return self.run.value(key, measured)


def table(bench, tell):
    """Rows at 3, 5 and 10 calls: standard start, late with one Gaussian, late with all laws, each chosen by itself."""
    rows = []
    for name in SAMPLERS:
        base = sb.scheduler(name, like=bench.pipe.scheduler)
        for calls in CALLS:
            steps = steps_for(base, calls, name)
            row = {"sampler": name, "calls": calls}
            start = sb.standard_start(base, steps)
            row["standard"] = bench.cell(f"{name}/{calls}/standard", lambda s, a=start: bench.images(a, s), calls)
            for column, laws in (("gaussian", ["Gaussian"]), ("auto", list(bench.laws))):
                start = sb.late_start(
                    base, [bench.laws[k] for k in laws], steps, denoiser=bench.network, data=bench.chooser, check=False
                )
                law = "standard" if start.law is None else laws[start.choice.chosen.law]
                more = {"law": law, "sigma": start.level.sigma}
                key = f"{name}/{calls}/{column}"
                row[column] = bench.cell(key, lambda s, a=start: bench.images(a, s), start.calls, **more)
            rows.append(row)
            tell(row)
    return rows


def own_grid(bench, tell):
    """PNDM on the paper's grid, the first step scanned on images of other seeds, as the paper scans FID."""
    rows, full, law = [], bench.pipe.scheduler, bench.laws["Gaussian"]
    for steps in CALLS:

        def make(seeds, first, law, steps=steps):
            return paper_images(bench.pipe.unet, full, law, steps, first, seeds)

        def score(first, steps=steps):
            x = make(range(SELECTION, SELECTION + 300), first, law)
            return sb.frechet_distance(sb.Moments.fit([features(bench.extract, [x])]), bench.reference)

        scanned = {t: bench.run.value(f"scan/{steps}/{t}", lambda t=t: score(t)) for t in LEVELS}
        best = min(scanned, key=scanned.__getitem__)
        calls = len(paper_grid(full, steps, best)[1])
        row = {"steps": steps, "calls": calls, "first": best, "published": PUBLISHED[steps]}
        row["standard"] = bench.cell(f"paper/{steps}/standard", lambda s: make(s, 999, None), calls)
        row["late"] = bench.cell(f"paper/{steps}/late", lambda s, t=best: make(s, t, law), calls)
        rows.append(row)
        tell(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a diffusers folder; without it one is trained")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mnist")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--page", action="store_true", help="write docs/mnist.md from what is finished and stop")
    args = parser.parse_args()
    if args.page:
        write_page(json.loads((args.out / "mnist.json").read_text(encoding="utf-8")))
        return
    root = os.environ.get("SYMBREAK_DATA")
    if not root or not (Path(root) / "mnist-train.parquet").exists():
        sys.exit("reproduce-mnist needs SYMBREAK_DATA, a folder with mnist-train.parquet and mnist-test.parquet.")
    if args.samples < 2 * REPEAT or args.samples % REPEAT:
        sys.exit(f"--samples {args.samples}; expected a multiple of {REPEAT}, at least {2 * REPEAT}.")
    model = args.model
    if not model:
        model = args.out / "network"
        recipe = ROOT / "recipes" / "mnist.json"
        command = ["train", "--data", f"{root}/mnist-train.parquet", "--recipe", str(recipe), "--out", str(model)]
        subprocess.run([sys.executable, "-m", "symbreak", *command], check=True)
    began = time.perf_counter()
    bench = Bench(Path(root), model, args.out, args.samples)

    def tell(row):
        cells = " ".join(f"{k} {v['mean']:.3g}" for k, v in row.items() if isinstance(v, dict))
        print(
            row.get("sampler", "paper's grid"),
            row["calls"],
            cells,
            f"({time.perf_counter() - began:.0f} s)",
            flush=True,
        )

    count = args.samples // REPEAT
    some = bench.points[torch.randperm(len(bench.points), generator=torch.Generator().manual_seed(9))[: args.samples]]
    ideal = distance(features(bench.extract, [some]), bench.reference, count, bench.extract.name).to_dict()
    whole = {
        "about": {
            "network": sum(p.numel() for p in bench.pipe.unet.parameters()),
            "trained": "recipes/mnist.json" if not args.model else "trained before, passed as MODEL",
            "accuracy": bench.extract.accuracy,
            "samples": args.samples,
            "threads": torch.get_num_threads(),
        },
        "train": ideal,
        "rows": table(bench, tell),
        "paper": own_grid(bench, tell),
    }
    write_json(args.out / "mnist.json", whole)
    write_page(whole)


def cell(d):
    half = d["high"] - d["mean"]
    return f"{d['mean']:.3g} ± {half:.2g} ({d['pooled']:.3g})"


def write_page(whole):
    """The measured part of docs/mnist.md; what stands around it was written by hand."""
    about, train = whole["about"], whole["train"]
    n = about["samples"]
    lines = [
        "Written by `make reproduce-mnist` (scripts/reproduce_mnist.py). Fréchet distance in the 64 features of a",
        f"classifier ({about['accuracy']:.1%} right on the test images) to the 10,000 test images: mean of",
        f"{n // REPEAT} repeats of {REPEAT:,} images with a 95 % interval, and in brackets all {n:,} at once.",
        f"{n:,} training images: {cell(train)}. The network: {about['network']:,} parameters, {about['trained']}.",
        "These are not FIDs of Inception features: compare ratios, not numbers, with the paper's.",
        "",
        "## Equal NFE",
        "",
        "The standard start is that of the scheduler, with the settings of diffusers. Late starts choose level and",
        "grid by themselves (`at=\"auto\"`), from one Gaussian or from all laws.",
        "",
        "| sampler | NFE | standard start | late, one Gaussian | late, `auto` |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in whole["rows"]:
        cells = " | ".join(cell(r[k]) for k in ("standard", "gaussian", "auto"))
        lines.append(f"| {SAMPLERS[r['sampler']]} | {r['calls']} | {cells} |")
    lines += [
        "",
        "## What a distance hides",
        "",
        "| sampler | NFE | start | law, sigma | class entropy, bits | precision | recall | nearest | d1/d2 < 1/3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in whole["rows"]:
        for k in ("standard", "gaussian", "auto"):
            d = r[k]
            law = f"{d['law']}, {d['sigma']:.3g}" if d.get("law", "standard") != "standard" else "white noise"
            lines.append(
                f"| {SAMPLERS[r['sampler']]} | {r['calls']} | {k} | {law} | {d['entropy']:.3f} | "
                f"{d['precision']:.3f} | {d['recall']:.3f} | {d['nearest']:.2f} | "
                f"{d['memorized']:.1%} of {d['neighbours_of']} |"
            )
    lines += [
        "",
        "Precision and recall: k = 3, 1,000 samples, 1,000 test images. Nearest: median pixel distance to the nearest",
        "of 60,000 training images.",
        "",
        "## The paper's own grid",
        "",
        "PNDM with its Runge-Kutta warm-up on steps even from 0 to t_start, one Gaussian; t_start scanned on 300",
        "images of other seeds. Published: FID of another network, standard | late (arXiv:2305.19693).",
        "",
        "| steps | NFE | standard start | late, from step | ratio | published | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in whole["paper"]:
        plain, late = r["published"]
        ratio = r["standard"]["mean"] / r["late"]["mean"]
        lines.append(
            f"| {r['steps']} | {r['calls']} | {cell(r['standard'])} | {cell(r['late'])}, {r['first']} "
            f"| {ratio:.2g} | {plain} \\| {late} | {plain / late:.2g} |"
        )
    better = [r for r in whole["rows"] if r["auto"]["high"] < r["standard"]["low"]]
    worse = [r for r in whole["rows"] if r["auto"]["low"] > r["standard"]["high"]]
    ratios = [r["standard"]["mean"] / r["auto"]["mean"] for r in better]
    said = f", by factors from {min(ratios):.2g} to {max(ratios):.2g}" if ratios else ""
    lines += [
        "",
        f"`auto` is nearer to the test images than the standard start beyond the intervals in {len(better)} of "
        f"{len(whole['rows'])} rows{said};",
        f"it is farther beyond them in {len(worse)}.",
        "",
    ]
    path = ROOT / "docs" / "mnist.md"
    begin, end = "<!-- measured:begin, written by scripts/reproduce_mnist.py -->", "<!-- measured:end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    text = before + "\n".join([begin, *lines]) + end + rest.split(end)[1]
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
