"""The first paper's comparison on MNIST, faces and CIFAR-10, from nothing: train two networks, sample, measure, write.

    make reproduce-mnist
    make reproduce-celeba                          # faces at 32 x 32 and at 64 x 64
    make reproduce-cifar10
    make reproduce-cifar10 MODEL=FOLDER            # with a network of your own in place of the plain one
    python scripts/reproduce.py cifar10 --tiny   # everything once, in minutes: no evidence

Two networks of one recipe (recipes/): one that predicts noise, one that learns only what a law does not know. Rows:
DDPM (DDIM with eta = 1), DDIM, PNDM, DPM++2M on its own and on Karras levels, UniPC, with 1, 3, 5 and 10 network
evaluations; columns: the standard start with the scheduler's settings, with its best spacing, and with an analytic
first step (AFS); late from one Gaussian whose level is scanned, late from all laws (`auto`), and the second network
from its law. Then the paper's own grid, linspace(0, t_start, n), t_start scanned, of DDIM, and of PNDM on MNIST, whose
Runge-Kutta warm-up spends 12, 14 and 19 evaluations in 3, 5 and 10 steps; beside it the published FIDs: ratios compare,
numbers do not. Tables appear in the folder as table.md and table.html, and in docs/; samples.png shows the same seeds.

Distances are Fréchet distances in --features to the test images: by default EfficientNet-Lite0 at 112 x 112, on MNIST
the 64 features of a classifier that is trained first; never FID. Beside each: precision, recall, the entropy of the
classes as logistic regressions on the features read them, and copies.
Every --part images are kept in --out: called again it goes on, and ends with the same numbers.

Hours on one core: see docs/natural-images.md and docs/mnist.md.

Needs SYMBREAK_DATA with the parquet files of the world: mnist, celeba10k or cifar10, -train and -test.
Source: Raya & Ambrogioni 2023, arXiv:2305.19693.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from compare_rulers import other_rulers
from diffusers import PNDMScheduler
from scipy.stats import spearmanr

import symbreak as sb
from symbreak.intervals import entropy_interval
from symbreak.metrics.attributes import attribute_classifier
from symbreak.metrics.composition import class_counts, class_entropy
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import features, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import distance, ratio
from symbreak.metrics.memorization import different, nearest_summary
from symbreak.report.tables import measured, number
from symbreak.runtime.files import write_json, write_whole
from symbreak.runtime.identity import weights_hash
from symbreak.runtime.plain import plain
from symbreak.start.grids import standard_starts, steps_for
from symbreak.start.late_start import law_in_words
from symbreak.start.training_looks import grid

ROOT = Path(__file__).parents[1]
SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++2m", "dpm++2m-karras", "unipc-karras")
CALLS = (1, 3, 5, 10)
LEVELS = (200, 300, 400, 500, 600, 700)  # first steps of the paper's grid that are scanned
FACTORS = (0.15, 0.25, 0.5, 1.0, 1.5, 2.5)  # levels of the scanned Gaussian, in its largest standard deviations
SELECTION = 10**6  # first seed of those that select
JUDGED = 10_000  # images that classifiers learn from in EfficientNet features: of more they take longer than a column
LIMIT, SIDE = 300, 20  # images of a tiny run, and their side: laws in 3,072 numbers take minutes


@dataclass(frozen=True)
class World:
    """A data set, how it is read, and what the paper published of it: FID, late and standard, of a sampler by steps."""

    data: str
    options: dict
    recipe: str
    classes: tuple[str, ...]
    published: dict[int, tuple[float, float]]
    features: str = "efficientnet-lite0-112"
    sampler: str = "ddim"  # of the paper's own grid
    page: str = "natural-images.md"
    aims: dict = field(default_factory=lambda: {3: 1.5, 5: 1.2, 10: 1.0})  # times nearer, by NFE


FACES = {10: (15.82, 19.37), 5: (22.06, 28.51), 3: (29.96, 50.30)}  # CelebA64, of another network
DIGITS = {10: (5.02, 14.36), 5: (5.11, 21.22), 3: (38.23, 154.89)}
WORLDS = {
    "mnist": World("mnist", {}, "mnist", ("label",), DIGITS, "classifier", "pndm", "mnist.md", {}),
    "celeba-32": World("celeba10k", {"size": 32, "crop": 70}, "faces-32", ("Male", "Smiling", "Young"), FACES),
    "celeba-64": World("celeba10k", {"size": 64, "crop": 70}, "faces-64", ("Male", "Smiling", "Young"), FACES),
    "cifar10": World("cifar10", {}, "cifar10", ("label",), {10: (15.98, 19.79), 5: (26.36, 44.61), 3: (42.31, 109.37)}),
}


def ddim_steps(full, steps, first):
    """(timestep, function of (prediction, timestep, state) to the next state): DDIM, steps even from 0 to ``first``."""
    bar = full.alphas_cumprod.double()
    times = torch.linspace(0, first, steps).long().flip(0).tolist()

    def step(i, eps, x):
        a, b = float(bar[times[i]]), float(bar[times[i + 1]]) if i + 1 < steps else 1.0
        clean = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
        return b**0.5 * clean + (1 - b) ** 0.5 * eps

    return [(t, partial(step, i)) for i, t in enumerate(times)]


def pndm_steps(full, steps, first):
    """The same of PNDM with its Runge-Kutta warm-up: three steps of it need four points, so 3 steps cost 12."""
    betas = full.betas[: first + 1].numpy()
    scheduler = PNDMScheduler(num_train_timesteps=first + 1, trained_betas=betas, timestep_spacing="linspace")
    scheduler.set_timesteps(max(steps, 4))
    return [
        (int(t), lambda eps, x, t=t: scheduler.step(eps, t, x, return_dict=False)[0])
        for t in scheduler.timesteps[: 9 + steps]
    ]


PAPER = {"ddim": ddim_steps, "pndm": pndm_steps}


def paper_images(unet, full, law, sampler, steps, first, seeds, batch=100):
    """Images of the paper's sampler on its own grid, steps even from 0 to ``first``; law None: white noise."""
    out, level = [], sb.schedule(full).level(first)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    for part in torch.as_tensor(list(seeds)).split(batch):
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in part])
        x = noise if law is None else level.alpha * law.transport(noise, level.sigma).float()
        with torch.inference_mode():
            for t, step in PAPER[sampler](full, steps, first):
                x = step(unet(x, torch.full((len(x),), t), return_dict=False)[0], x)
        out.append(x.clamp(-1, 1))
    return torch.cat(out)


class FirstStepAnalytic(torch.nn.Module):
    """AFS: the first prediction is the state itself, x / sqrt(1 + sigma^2), without the network (arXiv:2210.05475)."""

    def __init__(self, unet, first):
        super().__init__()
        self.unet, self.config, self.first = unet, unet.config, first

    def forward(self, sample, timestep, **kwargs):
        if float(torch.as_tensor(timestep).reshape(-1)[0]) >= self.first:
            return (sample,)
        return self.unet(sample, timestep, **kwargs)


class Bench:
    """What every cell shares."""

    def __init__(self, world, root, models, out, args):
        limit = LIMIT if args.tiny else None
        self.train, test = (
            sb.images(str(root / f"{world.data}-{half}.parquet"), limit=limit, labels=world.classes, **world.options)
            for half in ("train", "test")
        )
        self.pipe, self.residual = (sb.load_pipeline(str(m)) for m in models)
        self.extract = sb.extractor(args.features) if args.features != "classifier" else self.trained(out, test)
        many = len(self.train) > JUDGED and args.features != "classifier"
        judged = self.train.subset(JUDGED) if many else self.train
        self.judge = attribute_classifier(judged, world.classes, self.extract)
        self.classes = self.judge.joint or world.classes[0]
        self.held_out = test.tensor()
        self.part, self.samples, self.select = args.part, args.samples, args.selection
        identity = [weights_hash(p.unet) for p in (self.pipe, self.residual)]
        prints = [images.fingerprint() for images in (self.train, test)]
        self.rulers = other_rulers(self.train, attributes=len(world.classes) > 1)
        by = [self.extract.name, self.extract.decides(self.train.shape), *self.rulers]
        of = {"networks": identity, "features": by, "part": self.part, "data": prints}
        self.run = sb.Run(out).identified(of)
        stored = self.run.part("real", lambda: {"features": features(self.extract, self.held_out).numpy()})
        self.real = torch.from_numpy(stored["features"])
        self.reference = sb.Moments.fit([self.real])
        self.ruled = {k: sb.Moments.fit([self.rows(k, self.held_out)]) for k in self.rulers}
        self.laws = dict(zip(("Gaussian", "classes", "clusters"), sb.candidate_laws(self.train)))
        self.network = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.chooser = self.train.subset(min(256, len(self.train) // 2)).tensor()
        self.points = self.train.tensor()
        self.known = different(self.points)

    def trained(self, out, test):
        """A classifier of the data's own labels, trained once."""
        path = out / "classifier.safetensors"
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            name = f"{Path(self.train.name).stem.removesuffix('-train')}-classifier"
            save_classifier(train_classifier(self.train, held_out=test, epochs=2), path, name)
        return load_classifier(path)

    def rows(self, ruler, x):
        """Features of another ruler."""
        with torch.inference_mode():
            return torch.cat([self.rulers[ruler](block).float() for block in x.split(100)])

    def measured(self, x_of):
        """Distance, diversity and copying of images that come a part at a time: (rows, classes, some images)."""
        parts = [x_of(i) for i in range(self.samples // self.part)]
        rows = torch.cat([torch.from_numpy(p["features"]).double() for p in parts])
        some = torch.cat([torch.from_numpy(p["images"]) for p in parts])
        read = torch.cat([torch.from_numpy(p["classes"]) for p in parts])
        of = {k: torch.cat([torch.from_numpy(p[k]).double() for p in parts]) for k in self.rulers}
        near = nearest_summary(some, self.known, None)["samples"]
        shared = precision_recall(rows[:1000], self.real[:1000])
        return {
            **distance(rows, self.reference, len(parts), self.extract.name).to_dict(),
            "rulers": {k: sb.frechet_distance(sb.Moments.fit([v]), self.ruled[k]) for k, v in of.items()},
            "entropy": class_entropy(read, len(self.judge.classes[self.classes])),
            **{k: shared[k] for k in ("precision", "recall")},
            "memorized": near["memorized"],
            "neighbours_of": near["count"],
        }

    def read(self, x):
        """Features, classes and some images of a part."""
        said = self.judge(x)[self.classes]
        said = said.argmax(1) if said.ndim == 2 else said
        others = {k: self.rows(k, x).numpy() for k in self.rulers}
        return {
            "features": features(self.extract, x).numpy(),
            "classes": said.numpy(),
            "images": x[:100].numpy(),
            **others,
        }

    def cell(self, key, make, calls, **more):
        """What is measured of the images that ``make`` gives for seeds."""

        def part(i):
            seeds = range(i * self.part, (i + 1) * self.part)
            return self.run.part(f"{key}/{i}", lambda: self.read(make(seeds)))

        # Parts serve any number of samples, what is measured of them one.
        return self.run.value(f"{key}/{self.samples}", lambda: {**self.measured(part), "calls": calls, **more})

    def score(self, key, make):
        """Distance of some images of seeds that are not reported."""

        def value():
            rows = features(self.extract, make(range(SELECTION, SELECTION + self.select)))
            return sb.frechet_distance(sb.Moments.fit([rows]), self.reference)

        return self.run.value(f"scan/{key}/{self.select}", value)

    def column(self, key, candidates, calls):
        """A cell of the start of ``candidates``, {name: (network, start)}, that is nearest on other seeds.

        Where there is none, the reason. Starts are made only where the cell is not finished.
        """

        def chosen():
            try:
                some = {k: (u, s) for k, (u, s) in candidates().items() if self.spent(u, s) == calls}
            except sb.InputError as error:  # such as a network that is hardly trained
                return {"reason": str(error)}
            if not some:
                return {"reason": f"no start costs {calls} network evaluations"}
            makes = {k: partial(sb.generate, u, s) for k, (u, s) in some.items()}
            names = list(makes)
            best = names[0] if len(names) == 1 else min(names, key=lambda k: self.score(f"{key}/{k}", makes[k]))
            start = some[best][1]
            more = {"choice": best, "law": law_in_words(start.law), "sigma": start.level.sigma}
            return self.cell(f"{key}/{best}", makes[best], calls, **more)

        return self.run.value(f"column/{key}/{self.samples}/{self.select}", chosen)

    @staticmethod
    def spent(unet, start):
        return start.calls - isinstance(unet, FirstStepAnalytic)


def table(bench, tell):
    """Rows at 1, 3, 5 and 10 evaluations, the columns of `COLUMNS`."""
    rows = []
    for name in SAMPLERS:
        base = sb.scheduler(name, like=bench.pipe.scheduler)
        for calls in CALLS:
            try:
                steps = steps_for(base, calls, name)
            except sb.InputError:
                continue
            row = {"sampler": name, "calls": calls}
            for column, candidates in COLUMNS.items():
                made = partial(candidates, bench, name, base, steps)
                row[column] = bench.column(f"{name}/{calls}/{column}", made, calls)
            rows.append(row)
            tell(row)
    return rows


def spaced(bench, base, steps):
    return {k: (bench.pipe.unet, s) for k, s in standard_starts(base, steps, skip=True).items()}


def analytic(bench, name, base, steps):
    """The standard start with one step more, the first of them without the network."""
    some = standard_starts(base, steps + 1, skip=True)
    return {k: (FirstStepAnalytic(bench.pipe.unet, float(s.scheduler.timesteps[0])), s) for k, s in some.items()}


def scanned(bench, name, base, steps):
    """One Gaussian at some levels."""
    law, out = bench.laws["Gaussian"], {}
    for factor in FACTORS:
        at = sb.NoiseLevel(factor * float(law.eigenvalues[0]) ** 0.5)
        with suppress(sb.InputError):
            out[f"{factor:g}"] = bench.pipe.unet, sb.late_start(base, law, steps, at=at, check=False)
    return out


def automatic(bench, name, base, steps):
    laws = list(bench.laws.values())
    start = sb.late_start(base, laws, steps, denoiser=bench.network, data=bench.chooser, check=False)
    return {"auto": (bench.pipe.unet, start)}


def below(bench, name, base, steps):
    """The network that knows what its law does not, from that law."""
    like, start = sb.scheduler(name, like=bench.residual.scheduler), bench.residual.start
    return {"its own": (bench.residual.unet, sb.late_start(like, start.law, steps, at=start.level, check=False))}


COLUMNS = {
    "standard": lambda bench, name, base, steps: {"own": (bench.pipe.unet, sb.standard_start(base, steps))},
    "grid": lambda bench, name, base, steps: spaced(bench, base, steps),
    "afs": analytic,
    "gaussian": scanned,
    "auto": automatic,
    "residual": below,
}


def own_grid(bench, world, tell):
    """The paper's sampler on its grid, the first step scanned on images of other seeds, as the paper scans FID."""
    rows, full, law = [], bench.pipe.scheduler, bench.laws["Gaussian"]
    for steps in sorted(world.published)[: len(LEVELS)]:

        def make(seeds, first, law, steps=steps):
            return paper_images(bench.pipe.unet, full, law, world.sampler, steps, first, seeds)

        scores = {t: bench.score(f"{steps}/{t}", lambda s, t=t: make(s, t, law)) for t in LEVELS}
        best = min(scores, key=scores.__getitem__)
        spent = len(PAPER[world.sampler](full, steps, best))
        row = {"steps": steps, "calls": spent, "first": best, "published": world.published[steps]}
        row["standard"] = bench.cell(f"paper/{steps}/standard", lambda s: make(s, 999, None), spent)
        row["late"] = bench.cell(f"paper/{steps}/late/{best}", lambda s, t=best: make(s, t, law), spent)
        rows.append(row)
        tell(row)
    return rows


def sheet(bench, rows, path):
    """The same seeds, a row a column of the table, of DDIM with 5 evaluations where it is there."""
    row = next((r for r in rows if (r["sampler"], r["calls"]) == ("ddim", 5)), rows[-1])
    keys = [f"{row['sampler']}/{row['calls']}/{k}/{row[k]['choice']}/0" for k in COLUMNS if "choice" in row[k]]
    picture = grid(torch.cat([torch.from_numpy(bench.run.part(k, dict)["images"][:16]) for k in keys]), columns=16)
    write_whole(path, lambda p: picture.save(p, "png"))


def trained(world, out, root, args):
    """Folders of the plain network and of the one below a law, trained where they are not."""
    folders = []
    options = [str(v) for k, value in world.options.items() for v in (f"--{k}", value)]
    recipe = ROOT / "recipes" / f"{world.recipe}.json"
    if args.tiny:
        recipe = out / "tiny.json"
        write_json(recipe, {"channels": [8, 16], "batch": 8, "steps": 2})
    for name, flags in (("plain", []), ("residual", ["--residual"])):
        if name == "plain" and args.model:
            folders.append(args.model)
            continue
        steps = ["--steps", str(args.steps)] if args.steps else []
        data = ["--data", f"{root}/{world.data}-train.parquet", "--labels", "none", *options]
        limit = ["--limit", str(LIMIT)] if args.tiny else []
        command = ["train", *data, *limit, "--recipe", str(recipe), *steps, *flags, "--out", str(out / name)]
        failed = subprocess.run([sys.executable, "-m", "symbreak", *command]).returncode
        if failed:  # the command has said why
            sys.exit(failed)
        folders.append(out / name)
    return folders


NAMES = {
    "standard": "standard start",
    "grid": "best grid",
    "afs": "AFS",
    "gaussian": "Gaussian, scanned",
    "auto": "`auto`",
    "residual": "below its law",
}
PLAIN = ("standard", "grid", "afs")


def cell(d):
    if "mean" not in d:
        return "-"
    form = ",.0f" if d["mean"] >= 1000 else ".3g"
    return f"{measured(d['mean'], d['low'], d['high'], form)} ({number(d['pooled'], form)})"


def nearest_of(rows, columns):
    """(cell, sampler and column) of the nearest cell of some columns, None where there is none."""
    some = [(r[c], f"{r['sampler']}, {NAMES[c]}") for r in rows for c in columns if "mean" in r[c]]
    return min(some, key=lambda d: d[0]["mean"], default=None)


def times(a, b):
    """How many times as far ``a`` is as ``b``, the seeds the same."""
    said = ratio(a, b)
    return "without an interval" if said is None else measured(*said)


def aims(rows, wanted):
    """What was asked of `auto` at some NFE, and whether it was reached; and the network below its law."""
    lines = []
    for calls in sorted({r["calls"] for r in rows}):
        same = [r for r in rows if r["calls"] == calls]
        usual, auto, own = (nearest_of(same, c) for c in (PLAIN, ("auto",), ("residual",)))
        if usual is None or auto is None:
            continue
        line = f"- {calls} NFE: nearest without a late start {cell(usual[0])} ({usual[1]}), `auto` {cell(auto[0])} "
        line += f"({auto[1]}): {times(usual[0], auto[0])} times as far"
        if calls in wanted:
            reached = usual[0]["mean"] >= wanted[calls] * auto[0]["mean"]
            line += f" (aim {wanted[calls]:g}: {'reached' if reached else 'missed'})"
        if own is not None:
            line += f"; below its law {cell(own[0])} ({own[1]}): {times(usual[0], own[0])} times"
        lines.append(f"{line}.")
    return lines


def rulers(features, rows):
    """Whether other features rank the cells alike, and name the same start of a row as the nearest."""
    cells = [[r[c] for c in NAMES if "mean" in r[c]] for r in rows]
    ranked = {features: [[d["pooled"] for d in row] for row in cells]}
    for name in sorted(cells[0][0]["rulers"]):
        ranked[name] = [[d["rulers"][name] for d in row] for row in cells]
    lines = []
    for a, b in combinations(ranked, 2):
        rank = spearmanr(*(np.concatenate(ranked[k]) for k in (a, b))).statistic
        same = sum(int(np.argmin(x) == np.argmin(y)) for x, y in zip(ranked[a], ranked[b]))
        lines.append(
            f"- {a} and {b}: rank correlation {rank:+.2f} of {sum(map(len, cells))} cells, all images at once; "
        )
        lines[-1] += f"the same start is the nearest in {same} of {len(rows)} rows."
    return lines


def blocks(whole):
    """The tables: paragraphs, and (heads, rows)."""
    about, rows, entropy = whole["about"], whole["rows"], whole["about"]["entropy"]
    n, k = about["samples"], about["samples"] // about["part"]
    sizes = " and ".join(f"{size:,}" for size in about["networks"])
    yield (
        f"Written by `scripts/reproduce.py {about['world']}`. Fréchet distance in {about['features']} (no FID) "
        f"to the test images: mean of {k} repeats of {about['part']:,} images with its 95 % interval (jackknife over "
        f"repeats and parts of the test images), in brackets all {n:,} at once; training images "
        f"{cell(whole['train'])}. Networks of {sizes} parameters, trained: "
        f"{' and '.join(about['trained'])}. "
        f"Spacings, grids under AFS and levels of the scan were selected on {about['selection']} images of other seeds."
        + (" **Tiny: no evidence.**" if about["tiny"] else "")
    )
    yield ["sampler", "NFE", *NAMES.values()], [[r["sampler"], r["calls"], *(cell(r[c]) for c in NAMES)] for r in rows]
    yield aims(rows, WORLDS[about["world"]].aims)
    shown = [(r, c) for r in rows for c in NAMES if "mean" in r[c]]
    yield (
        f"What a distance hides. Classes are {about['classes']}, as logistic regressions on the features read them: "
        f"training images {entropy['plug_in']:.3f} bits. Precision and recall: k = 3, {min(1000, n):,} samples. "
        "Copies: d1 / d2 < 1/3."
    )
    yield (
        ["sampler", "NFE", "start", "drawn from", "sigma", "bits", "precision", "recall", "copies"],
        [
            [r["sampler"], r["calls"], NAMES[c], d["law"], f"{d['sigma']:.3g}", number(d["entropy"], ".3f")]
            + [f"{d['precision']:.3f}", f"{d['recall']:.3f}", f"{d['memorized']:.1%} of {d['neighbours_of']}"]
            for r, c in shown
            for d in [r[c]]
        ],
    )
    yield (
        f"The paper's own grid: {about['sampler']} on steps even from 0 to t_start, one Gaussian, t_start "
        "scanned. Published: FID of another network in Inception features (arXiv:2305.19693): ratios compare, numbers "
        "do not."
    )
    yield (
        ["steps", "NFE", "standard", "late, from step", "ratio", "published FID, standard and late", "ratio"]
        + ["ours over it"],
        [
            [r["steps"], r["calls"], cell(r["standard"]), f"{cell(r['late'])}, {r['first']}"]
            + [times(r["standard"], r["late"]), f"{standard} and {late}", f"{standard / late:.3g}"]
            + [f"{r['standard']['mean'] / r['late']['mean'] * late / standard:.2g}"]
            for r in whole["paper"]
            for late, standard in [r["published"]]
        ],
    )
    yield rulers(about["features"], rows)
    worst = [name for name, a in about["accuracies"].items() if not a["resolved"]]
    yield f"Classifiers below 70 % balanced accuracy: {', '.join(worst) or 'none'}."


def write_pages(whole, out):
    """table.md and table.html in the folder; the table of a whole run also in docs/."""
    text, page = [], []
    for block in blocks(whole):
        if isinstance(block, str):
            text += [block, ""]
            page.append(f"<p>{html.escape(block)}</p>")
        elif isinstance(block, list):
            text += [*block, ""]
            page.append("<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in block) + "</ul>")
        else:
            heads, rows = block
            lines = [heads, ["---"] * len(heads), *rows]
            text += ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]
            made = [("th", heads), *(("td", row) for row in rows)]
            drawn = ("".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in row) for tag, row in made)
            page.append("<table>" + "".join(f"<tr>{row}</tr>" for row in drawn) + "</table>")
    style = "body{font:15px sans-serif;max-width:75em;margin:2em auto}td,th{padding:.2em .6em;text-align:left}"
    title = f"Late start on {whole['about']['world']}"
    whole_page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
    whole_page += "\n".join(page) + "\n"
    text = "\n".join(text)
    write_whole(out / "table.md", lambda p: p.write_text(text, encoding="utf-8"))
    write_whole(out / "table.html", lambda p: p.write_text(whole_page, encoding="utf-8"))
    if whole["about"]["tiny"]:
        return
    name = whole["about"]["world"]
    path = ROOT / "docs" / WORLDS[name].page
    begin, end = (f"<!-- measured:{name}:begin, written by scripts/reproduce.py -->", f"<!-- measured:{name}:end -->")
    before, rest = path.read_text(encoding="utf-8").split(begin)
    docs = f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"
    write_whole(path, lambda p: p.write_text(docs, encoding="utf-8"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=sorted(WORLDS))
    parser.add_argument("--model", default=None, help="a diffusers folder; without it one is trained")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--features", default=None, help="default: efficientnet-lite0-112, on MNIST a classifier")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--part", type=int, default=1000, help="images a repeat, and what an interruption loses")
    parser.add_argument("--selection", type=int, default=300, help="images of other seeds that select")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps instead of the recipe's")
    parser.add_argument("--tiny", action="store_true", help="a few images, steps and rows: no evidence")
    parser.add_argument("--page", action="store_true", help="write the tables from what is finished, and stop")
    args = parser.parse_args(argv)
    out = args.out or ROOT / "build" / (args.world + ("-tiny" if args.tiny else ""))
    if args.page:
        write_pages(json.loads((out / "table.json").read_text(encoding="utf-8")), out)
        return
    if args.tiny:
        args.samples, args.part, args.selection = 32, 16, 32
        args.features = args.features or "efficientnet-lite0-64"
        WORLDS[args.world].options["size"] = SIDE
        globals().update(SAMPLERS=("dpm++2m",), CALLS=(1, 3), LEVELS=(300,), FACTORS=(0.5, 1.0))
    world, root = WORLDS[args.world], Path(os.environ.get("SYMBREAK_DATA", ""))
    args.features = args.features or world.features
    if not (root / f"{world.data}-train.parquet").is_file():
        sys.exit(f"{args.world} needs SYMBREAK_DATA, a folder with {world.data}-train.parquet and -test.parquet.")
    if args.part < 1 or args.samples < 2 * args.part or args.samples % args.part:
        sys.exit(f"--samples {args.samples}; expected a multiple of {args.part}, at least {2 * args.part}.")
    out.mkdir(parents=True, exist_ok=True)
    models, began = trained(world, out, root, args), time.perf_counter()
    bench = Bench(world, root, models, out / "measured", args)

    def tell(row):
        cells = " ".join(f"{k} {v['mean']:.3g}" for k, v in row.items() if isinstance(v, dict) and "mean" in v)
        name = row.get("sampler", "paper's grid")
        print(name, row["calls"], cells, f"({time.perf_counter() - began:.0f} s)", flush=True)

    some = torch.randperm(len(bench.points), generator=torch.Generator().manual_seed(9))[: args.samples]
    real = bench.run.part(
        f"train-{len(some)}", lambda: {"features": features(bench.extract, bench.points[some]).numpy()}
    )
    rows = torch.from_numpy(real["features"])
    counts = class_counts(bench.judge, bench.points[some])[bench.classes]
    steps = 2 if args.tiny and not args.steps else args.steps
    passed = ["passed as MODEL"] if args.model else []
    whole = plain(
        {
            "about": {
                "world": args.world,
                "tiny": args.tiny,
                "features": bench.extract.name,
                "samples": args.samples,
                "part": args.part,
                "selection": args.selection,
                "sampler": world.sampler.upper(),
                "trained": [*passed, f"{steps:,} steps" if steps else "as the recipe says"],
                "networks": [sum(p.numel() for p in m.unet.parameters()) for m in (bench.pipe, bench.residual)],
                "classes": bench.classes,
                "accuracies": bench.judge.accuracies,
                "entropy": entropy_interval(counts),
            },
            "train": distance(rows, bench.reference, max(1, len(rows) // args.part), bench.extract.name).to_dict(),
            "rows": table(bench, tell),
            "paper": own_grid(bench, world, tell),
        }
    )
    write_json(out / "table.json", whole)
    write_pages(whole, out)
    sheet(bench, whole["rows"], out / "samples.png")
    print(out / "table.html", json.dumps({"seconds": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
