"""Guidance on the bundled class-conditional digits: what docs/guidance.md rests on.

    python scripts/guidance_digits.py scan       scale x window at 10 steps from white noise, DPM++ 2M Karras
    python scripts/guidance_digits.py samplers   the same of four other samplers, chosen on seeds of its own
    python scripts/guidance_digits.py starts     standard and late start, with and without guidance, at equal NFE
    python scripts/guidance_digits.py best       the standard start with the best steps to guide, at equal NFE
    python scripts/guidance_digits.py table      prints what is there

A cell is a JSON file under build/guidance; what is there is not measured again. 1,000 images a cell, a hundred of each
class, the same seeds everywhere, against the 899 digits that nothing was fitted to. `samplers` reports on 500.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch

import symbreak as sb
from symbreak.data.held_out import held_out
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import features
from symbreak.metrics.frechet import distance, frechet_distance
from symbreak.networks.guidance import Guided
from symbreak.start.sample import evaluations

OUT = Path("build/guidance")
MODEL, FEATURES, COUNT = "digits-conditional", "digits-classifier", 1000
STEPS, SCALES, LOWS, HIGHS = 10, (1.5, 2.0, 3.0), (0.0, 0.3, 0.9), (1.5, 4.1, math.inf)
BUDGETS, SAMPLER = (3, 5, 10), "dpm++2m-karras"
OTHERS, FEW, CHOOSING = ("ddpm", "ddim", "pndm", "dpm++2m"), 500, 150  # samplers; images that report, and that choose


class Bench:
    """The network, what it is measured against, and its predicted window."""

    def __init__(self) -> None:
        self.pipe = sb.load_pipeline(MODEL)
        self.denoiser = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.parts = held_out(sb.images("digits"), None)
        self.extract = sb.extractor(FEATURES)
        self.test = features(self.extract, self.parts.test)
        self.classes = self.parts.test.labels
        # The window is found by training images: those that are measured against decide nothing.
        train = self.parts.train.subset(300)
        self.information = sb.condition_information(self.denoiser, train.tensor(), train.labels)
        self.predicted = sb.guidance_window(self.information).levels

    def guided(self, scale: float, window: tuple[float, float] | None) -> Guided:
        """The network, guided away from its null class."""
        return sb.guided(self.denoiser, 10, scale, window)

    def score(self, name: str, unet: object, start: sb.LateStart) -> float:
        """The distance of images of other seeds, by which is chosen."""
        path = OUT / "choosing" / f"{name}.json"
        if not path.exists():
            x = sb.generate(unet, start, range(10**6, 10**6 + CHOOSING), torch.arange(CHOOSING) % 10)
            far = frechet_distance(sb.Moments.fit(features(self.extract, x)), sb.Moments.fit(self.test))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(far), encoding="utf-8")
        return float(json.loads(path.read_text(encoding="utf-8")))

    def cell(self, name: str, unet: object, start: sb.LateStart, count: int = COUNT, **more: object) -> dict:
        """Measure, or read what was measured."""
        path = OUT / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        x = sb.generate(unet, start, range(count), torch.arange(count) % 10)
        made, y = features(self.extract, x), torch.arange(count) % 10
        whole = distance(made, sb.Moments.fit(self.test), 5, FEATURES)
        each = [
            frechet_distance(sb.Moments.fit(made[y == k]), sb.Moments.fit(self.test[self.classes == k]))
            for k in range(10)
        ]
        cover = precision_recall(made, self.test)
        row = {
            **more,
            "nfe": evaluations(unet, start),
            "steps": start.steps,
            "distance": [whole.mean, whole.low, whole.high],
            "pooled": whole.pooled,
            "by_class": each,
            "precision": cover["precision"],
            "recall": cover["recall"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")
        print(name, json.dumps(row)[:150], flush=True)
        return row


def said(window: tuple[float, float] | None) -> str:
    """A window as part of a file's name."""
    return "all" if window is None else f"{window[0]:.2g}-{window[1]:.2g}"


def scan() -> None:
    """Every scale in every window, and the predicted one."""
    bench = Bench()
    start = sb.standard_start(sb.scheduler(SAMPLER, like=bench.pipe.scheduler), STEPS)
    bench.cell("scan-none", bench.pipe.unet, start, scale=1.0, window=None)
    windows = [(low, high) for low in LOWS for high in HIGHS]
    for scale in SCALES:
        for window in [bench.predicted, *windows]:
            kind = "predicted" if window == bench.predicted else said(window)
            name = f"scan-{scale:g}-{kind}"
            bench.cell(name, bench.guided(scale, window), start, scale=scale, window=list(window), kind=kind)


def starts() -> None:
    """Both starts at equal NFE; guided ones take as many steps as the evaluations of both branches allow."""
    bench = Bench()
    full, own = sb.scheduler(SAMPLER, like=bench.pipe.scheduler), bench.pipe.start
    for budget in BUDGETS:
        made = {
            "standard": lambda n: sb.standard_start(full, n),
            "late": lambda n: sb.late_start(own.full, own.law, n, at=own.level, check=False),
        }
        for kind, start in made.items():
            bench.cell(f"{kind}-{budget}", bench.pipe.unet, start(budget), kind=kind, budget=budget, scale=1.0)
            for scale in SCALES[:2]:
                unet = bench.guided(scale, bench.predicted)
                fits = [n for n in range(1, budget + 1) if evaluations(unet, start(n)) <= budget]
                if fits:
                    name = f"{kind}-{budget}-{scale:g}"
                    bench.cell(name, unet, start(max(fits)), kind=kind, budget=budget, scale=scale)


def samplers() -> None:
    """Of four other samplers: no guidance, everywhere, in the predicted window, and in the best of eighteen."""
    bench = Bench()
    for name in OTHERS:
        start = sb.standard_start(sb.scheduler(name, like=bench.pipe.scheduler), STEPS)
        windows = [(low, high) for low in LOWS for high in HIGHS]
        scores = {
            (scale, window): bench.score(f"{name}-{scale:g}-{said(window)}", bench.guided(scale, window), start)
            for scale in (SCALES[0], SCALES[-1])
            for window in windows
        }
        best = min(scores, key=scores.__getitem__)
        own = (SCALES[0], bench.predicted)
        kinds = {"everywhere": (SCALES[0], None), "predicted": own, "best": best}
        bench.cell(f"of-{name}-none", bench.pipe.unet, start, FEW, scale=1.0, window=None, kind="no guidance")
        for kind, (scale, window) in kinds.items():
            chosen = None if window is None else list(window)
            unet = bench.guided(scale, window)
            bench.cell(f"of-{name}-{kind}", unet, start, FEW, scale=scale, window=chosen, kind=kind)


def best() -> None:
    """The standard start at equal NFE with the steps to guide that are the best of all that the budget allows."""
    bench = Bench()
    full = sb.scheduler(SAMPLER, like=bench.pipe.scheduler)
    levels = sb.schedule(full)
    for budget in BUDGETS:
        scores = {}
        for steps in range(budget // 2 + budget % 2, budget):
            start = sb.standard_start(full, steps)
            sigma = [levels.level(float(t)).sigma for t in start.scheduler.timesteps]
            edges = [math.inf, *(math.sqrt(a * b) for a, b in pairwise(sigma)), 0.0]
            guided = budget - steps
            for first in range(steps - guided + 1):
                window = edges[first + guided], edges[first]
                name = f"best-{budget}-{steps}-{first}"
                scores[steps, window] = bench.score(name, bench.guided(SCALES[0], window), start)
        steps, window = min(scores, key=scores.__getitem__)
        row = {"kind": "standard, best window", "budget": budget, "scale": SCALES[0], "window": list(window)}
        bench.cell(f"best-{budget}", bench.guided(SCALES[0], window), sb.standard_start(full, steps), **row)


def line(row: dict) -> str:
    """A row of a table."""
    value, low, high = row["distance"]
    return (
        f"{row['nfe']} | {value:.2f} [{low:.2f}, {high:.2f}] | {sum(row['by_class']) / 10:.2f} | "
        f"{row['precision']:.3f} | {row['recall']:.3f} |"
    )


def table() -> None:
    """Both tables as Markdown."""
    rows = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(OUT.glob("*.json"))}
    cells = {k: v for k, v in rows.items() if k.startswith("scan")}
    others = {k: v for k, v in rows.items() if k.startswith("of-")}
    print("| scale | window | NFE | distance | mean of classes | precision | recall |\n|---|---|---|---|---|---|---|")
    for name, row in sorted(cells.items(), key=lambda item: item[1]["distance"][0]):
        print(f"| {row['scale']:g} | {name.split('-', 2)[-1]} | {line(row)}")
    head = ("budget", "start", "scale", "NFE", "distance", "mean of classes", "precision", "recall")
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in sorted(
        (v for k, v in rows.items() if k not in {*cells, *others}), key=lambda r: (r["budget"], r["kind"])
    ):
        print(f"| {row['budget']} | {row['kind']} | {row['scale']:g} | {line(row)}")
    print(
        "\n| sampler | scale | window | NFE | distance | mean of classes | precision | recall |"
        + "\n"
        + "|---" * 8
        + "|"
    )
    for name, row in others.items():
        where = "-" if row["window"] is None else "{:.2g} to {:.2g}".format(*row["window"])
        print(f"| {name.split('-', 1)[1]} | {row['scale']:g} | {row['kind']}, {where} | {line(row)}")


if __name__ == "__main__":
    commands = {"scan": scan, "samplers": samplers, "starts": starts, "best": best, "table": table}
    commands[sys.argv[1]]()
