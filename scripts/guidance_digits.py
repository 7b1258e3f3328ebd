"""Guidance on the bundled class-conditional digits: what docs/guidance.md rests on.

    python scripts/guidance_digits.py scan       scale x window at 10 steps from white noise
    python scripts/guidance_digits.py starts     standard and late start, with and without guidance, at equal NFE
    python scripts/guidance_digits.py table      prints what is there

A cell is a JSON file under build/guidance; what is there is not measured again. 1,000 images a cell, a hundred of each
class, the same seeds everywhere, against the 899 digits that nothing was fitted to.
"""

from __future__ import annotations

import json
import math
import sys
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

    def cell(self, name: str, unet: object, start: sb.LateStart, **more: object) -> dict:
        """Measure, or read what was measured."""
        path = OUT / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        x = sb.generate(unet, start, range(COUNT), torch.arange(COUNT) % 10)
        made, y = features(self.extract, x), torch.arange(COUNT) % 10
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
    print("| scale | window | NFE | distance | mean of classes | precision | recall |\n|---|---|---|---|---|---|---|")
    for name, row in sorted(cells.items(), key=lambda item: item[1]["distance"][0]):
        print(f"| {row['scale']:g} | {name.split('-', 2)[-1]} | {line(row)}")
    head = ("budget", "start", "scale", "NFE", "distance", "mean of classes", "precision", "recall")
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in sorted((v for k, v in rows.items() if k not in cells), key=lambda r: (r["budget"], r["kind"])):
        print(f"| {row['budget']} | {row['kind']} | {row['scale']:g} | {line(row)}")


if __name__ == "__main__":
    {"scan": scan, "starts": starts, "table": table}[sys.argv[1]]()
