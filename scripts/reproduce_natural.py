"""The first paper's comparison on faces and CIFAR-10, from nothing: train two networks, sample, measure, write.

    make reproduce-celeba                          # faces at 32 x 32 and at 64 x 64
    make reproduce-cifar10
    make reproduce-cifar10 MODEL=FOLDER            # with a network of your own in place of the plain one
    python scripts/reproduce_natural.py cifar10 --tiny   # everything once, in minutes: no evidence

Two networks of one recipe (recipes/): one that predicts noise, one that learns only what a law does not know. Rows:
DDPM (DDIM with eta = 1), DDIM, PNDM, DPM++2M on its own and on Karras levels, UniPC, with 1, 3, 5 and 10 network
evaluations; columns: the standard start with the scheduler's settings, late from one Gaussian, late from all laws
(`auto`), and the second network from its law. Then the paper's own grid, linspace(0, t_start, n), t_start scanned,
beside its published FIDs: ratios compare, numbers do not.

Distances are Fréchet distances in --features (EfficientNet-Lite0 at 112 x 112 by default; never FID) to the test
images. Beside each: precision, recall, the entropy of the classes as logistic regressions on the features read them,
and copies.
Every --part images are kept in --out: called again it goes on, and ends with the same numbers.

Hours on one idle core, from a few timed steps and images: see docs/natural-images.md.

Needs SYMBREAK_DATA with celeba10k-train.parquet, celeba10k-test.parquet, cifar10-train.parquet, cifar10-test.parquet.
Source: Raya & Ambrogioni 2023, arXiv:2305.19693.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import symbreak as sb
from symbreak.intervals import entropy_interval
from symbreak.metrics.attributes import attribute_classifier
from symbreak.metrics.composition import class_counts, class_entropy
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import features
from symbreak.metrics.frechet import distance
from symbreak.metrics.memorization import different, nearest_summary
from symbreak.runtime.files import write_json
from symbreak.runtime.identity import weights_hash
from symbreak.start.grids import steps_for

ROOT = Path(__file__).parents[1]
SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++2m", "dpm++2m-karras", "unipc-karras")
CALLS = (1, 3, 5, 10)
LEVELS = (200, 300, 400, 500, 600, 700)  # first steps of the paper's grid that are scanned
SELECTION = 10**6  # first seed of those that select


@dataclass(frozen=True)
class World:
    """A data set, how it is read, and what the paper published of it: FID, late and standard, of DDIM by steps."""

    data: str
    options: dict
    recipe: str
    classes: tuple[str, ...]
    published: dict[int, tuple[float, float]]


FACES = {10: (15.82, 19.37), 5: (22.06, 28.51), 3: (29.96, 50.30)}  # CelebA64, of another network
WORLDS = {
    "celeba-32": World("celeba10k", {"size": 32, "crop": 70}, "faces-32", ("Male", "Smiling", "Young"), FACES),
    "celeba-64": World("celeba10k", {"size": 64, "crop": 70}, "faces-64", ("Male", "Smiling", "Young"), FACES),
    "cifar10": World("cifar10", {}, "cifar10", ("label",), {10: (15.98, 19.79), 5: (26.36, 44.61), 3: (42.31, 109.37)}),
}


def paper_images(unet, full, law, steps, first, seeds, eta, batch=100):
    """Images of the paper's DDIM (eta 0) or DDPM (eta 1), steps even from 0 to ``first``; law None: white noise."""
    out, bar = [], full.alphas_cumprod.double()
    times = torch.linspace(0, first, steps).long().flip(0).tolist()
    level = sb.schedule(full).level(first)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    for part in torch.as_tensor(list(seeds)).split(batch):
        generators = [torch.Generator().manual_seed(int(s)) for s in part]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        x = noise if law is None else level.alpha * law.transport(noise, level.sigma).float()
        with torch.inference_mode():
            for i, t in enumerate(times):
                a, b = float(bar[t]), float(bar[times[i + 1]]) if i + 1 < steps else 1.0
                eps = unet(x, torch.full((len(x),), t), return_dict=False)[0]
                clean = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
                spread = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
                x = b**0.5 * clean + max(0.0, 1 - b - spread**2) ** 0.5 * eps
                if spread:
                    x = x + spread * torch.stack([torch.randn(shape, generator=g) for g in generators])
        out.append(x.clamp(-1, 1))
    return torch.cat(out)


class Bench:
    """What every cell shares."""

    def __init__(self, world, root, models, out, args):
        limit = 300 if args.tiny else None
        self.train, test = (
            sb.images(str(root / f"{world.data}-{half}.parquet"), limit=limit, labels=world.classes, **world.options)
            for half in ("train", "test")
        )
        self.pipe, self.residual = (sb.load_pipeline(str(m)) for m in models)
        self.extract = sb.extractor(args.features)
        self.judge = attribute_classifier(self.train, world.classes, self.extract)
        self.classes = self.judge.joint or world.classes[0]
        self.held_out = test.tensor()
        self.part, self.samples = args.part, args.samples
        identity = [weights_hash(p.unet) for p in (self.pipe, self.residual)]
        prints = [images.fingerprint() for images in (self.train, test)]
        of = {"networks": identity, "features": self.extract.name, "part": self.part, "data": prints}
        self.run = sb.Run(out).identified(of)
        kept = self.run.part("real", lambda: {"features": features(self.extract, self.held_out).numpy()})
        self.real = torch.from_numpy(kept["features"])
        self.reference = sb.Moments.fit([self.real])
        self.laws = dict(zip(("Gaussian", "classes", "clusters"), sb.candidate_laws(self.train)))
        self.network = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.chooser = self.train.subset(min(256, len(self.train) // 2)).tensor()
        self.points = self.train.tensor()
        self.known = different(self.points)

    def measured(self, x_of):
        """Distance, diversity and copying of images that come a part at a time: (rows, classes, some images)."""
        parts = [x_of(i) for i in range(self.samples // self.part)]
        rows = torch.cat([torch.from_numpy(p["features"]).double() for p in parts])
        some = torch.cat([torch.from_numpy(p["images"]) for p in parts])
        read = torch.cat([torch.from_numpy(p["classes"]) for p in parts])
        near = nearest_summary(some, self.known, None)["samples"]
        shared = precision_recall(rows[:1000], self.real[:1000])
        return {
            **distance(rows, self.reference, len(parts), self.extract.name).to_dict(),
            "entropy": class_entropy(read, len(self.judge.classes[self.classes])),
            **{k: shared[k] for k in ("precision", "recall")},
            "memorized": near["memorized"],
            "neighbours_of": near["count"],
        }

    def read(self, x):
        """Features, classes and some images of a part."""
        said = self.judge(x)[self.classes]
        said = said.argmax(1) if said.ndim == 2 else said
        return {"features": features(self.extract, x).numpy(), "classes": said.numpy(), "images": x[:100].numpy()}

    def cell(self, key, make, calls, **more):
        """What is measured of the images that ``make`` gives for seeds."""

        def part(i):
            seeds = range(i * self.part, (i + 1) * self.part)
            return self.run.part(f"{key}/{i}", lambda: self.read(make(seeds)))

        # Parts serve any number of samples, what is measured of them one.
        return self.run.value(f"{key}/{self.samples}", lambda: {**self.measured(part), "calls": calls, **more})


def table(bench, tell):
    """Rows at 1, 3, 5 and 10 evaluations: standard start, one Gaussian, all laws, and the network below a law."""
    rows = []
    for name in SAMPLERS:
        base = sb.scheduler(name, like=bench.pipe.scheduler)
        for calls in CALLS:
            try:
                steps = steps_for(base, calls, name)
            except sb.InputError:
                continue
            row = {"sampler": name, "calls": calls}
            starts = {"standard": (bench.pipe.unet, sb.standard_start(base, steps))}
            for column, laws in (("gaussian", ["Gaussian"]), ("auto", list(bench.laws))):
                some = [bench.laws[k] for k in laws]
                try:
                    late = sb.late_start(base, some, steps, denoiser=bench.network, data=bench.chooser, check=False)
                except sb.InputError as error:  # a network that is hardly trained
                    row[f"no {column}"] = str(error)
                    continue
                starts[column] = bench.pipe.unet, late
            own = bench.residual.start.law, bench.residual.start.level
            if name.startswith("dpm++2m"):
                like = sb.scheduler(name, like=bench.residual.scheduler)
                starts["residual"] = bench.residual.unet, sb.late_start(like, own[0], steps, at=own[1], check=False)
            for column, (unet, start) in starts.items():

                def make(seeds, unet=unet, start=start):
                    return sb.generate(unet, start, seeds)

                more = {"law": repr(start.law), "sigma": start.level.sigma}
                row[column] = bench.cell(f"{name}/{calls}/{column}", make, start.calls, **more)
            rows.append(row)
            tell(row)
    return rows


def own_grid(bench, world, tell):
    """DDIM on the paper's grid, the first step scanned on images of other seeds, as the paper scans FID."""
    rows, full, law = [], bench.pipe.scheduler, bench.laws["Gaussian"]
    for steps in sorted(world.published)[: len(LEVELS)]:

        def make(seeds, first, law, steps=steps):
            return paper_images(bench.pipe.unet, full, law, steps, first, seeds, eta=0.0)

        def score(first):
            rows_ = features(bench.extract, make(range(SELECTION, SELECTION + min(300, bench.samples)), first, law))
            return sb.frechet_distance(sb.Moments.fit([rows_]), bench.reference)

        key = f"scan/{steps}/{min(300, bench.samples)}"
        scanned = {t: bench.run.value(f"{key}/{t}", lambda t=t: score(t)) for t in LEVELS}
        best = min(scanned, key=scanned.__getitem__)
        row = {"steps": steps, "calls": steps, "first": best, "published": world.published[steps]}
        row["standard"] = bench.cell(f"paper/{steps}/standard", lambda s: make(s, 999, None), steps)
        row["late"] = bench.cell(f"paper/{steps}/late", lambda s, t=best: make(s, t, law), steps)
        rows.append(row)
        tell(row)
    return rows


def trained(world, out, root, args):
    """Folders of the plain network and of the one below a law, trained where they are not."""
    folders = []
    options = [str(v) for k, value in world.options.items() for v in (f"--{k}", value)]
    for name, flags in (("plain", []), ("residual", ["--residual"])):
        if name == "plain" and args.model:
            folders.append(args.model)
            continue
        recipe = ["--recipe", str(ROOT / "recipes" / f"{world.recipe}.json")]
        steps = ["--steps", str(args.steps)] if args.steps else []
        data = ["--data", f"{root}/{world.data}-train.parquet", "--labels", "none", *options]
        limit = ["--limit", "300"] if args.tiny else []
        command = ["train", *data, *limit, *recipe, *steps, *flags, "--out", str(out / name)]
        subprocess.run([sys.executable, "-m", "symbreak", *command], check=True)
        folders.append(out / name)
    return folders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=sorted(WORLDS))
    parser.add_argument("--model", default=None, help="a diffusers folder; without it one is trained")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--features", default="efficientnet-lite0-112")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--part", type=int, default=1000, help="images a repeat, and what an interruption loses")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps instead of the recipe's")
    parser.add_argument("--tiny", action="store_true", help="a few images, steps and rows: no evidence")
    args = parser.parse_args()
    if args.tiny:
        args.samples, args.part, args.steps, args.features = 32, 16, 2, "efficientnet-lite0-64"
        globals().update(SAMPLERS=("dpm++2m",), CALLS=(1, 3), LEVELS=(300,))
    world, root = WORLDS[args.world], Path(os.environ.get("SYMBREAK_DATA", ""))
    if not (root / f"{world.data}-train.parquet").is_file():
        sys.exit(f"{args.world} needs SYMBREAK_DATA, a folder with {world.data}-train.parquet and -test.parquet.")
    if args.samples < 2 * args.part or args.samples % args.part:
        sys.exit(f"--samples {args.samples}; expected a multiple of {args.part}, at least {2 * args.part}.")
    out = args.out or ROOT / "build" / (args.world + ("-tiny" if args.tiny else ""))
    models, began = trained(world, out, root, args), time.perf_counter()
    bench = Bench(world, root, models, out / "measured", args)

    def tell(row):
        cells = " ".join(f"{k} {v['mean']:.3g}" for k, v in row.items() if isinstance(v, dict))
        name = row.get("sampler", "paper's grid")
        print(name, row["calls"], cells, f"({time.perf_counter() - began:.0f} s)", flush=True)

    some = torch.randperm(len(bench.points), generator=torch.Generator().manual_seed(9))[: args.samples]
    real = bench.run.part(
        f"train-{len(some)}", lambda: {"features": features(bench.extract, bench.points[some]).numpy()}
    )
    rows = torch.from_numpy(real["features"])
    counts = class_counts(bench.judge, bench.points[some])[bench.classes]
    write_json(
        out / "table.json",
        {
            "about": {
                "tiny": args.tiny,
                "features": bench.extract.name,
                "samples": args.samples,
                "networks": [sum(p.numel() for p in m.unet.parameters()) for m in (bench.pipe, bench.residual)],
                "accuracies": bench.judge.accuracies,
                "entropy": entropy_interval(counts),
            },
            "train": distance(rows, bench.reference, max(1, len(rows) // args.part), bench.extract.name).to_dict(),
            "rows": table(bench, tell),
            "paper": own_grid(bench, world, tell),
        },
    )
    print(out / "table.json", json.dumps({"seconds": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
