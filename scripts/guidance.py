"""Guidance of class-conditional networks: what docs/guidance.md rests on.

    python scripts/guidance.py digits scan       scale x window at 10 steps from white noise, DPM++ 2M Karras
    python scripts/guidance.py digits samplers   the same of other samplers, chosen on seeds of its own
    python scripts/guidance.py digits starts     standard and late start, with and without guidance, at equal NFE
    python scripts/guidance.py digits best       the standard start with the best steps to guide, at equal NFE
    python scripts/guidance.py digits table      prints what is there
    python scripts/guidance.py mnist samplers starts best table --model FOLDER       needs SYMBREAK_DATA

FOLDER is of `symbreak train --data mnist-train.parquet --recipe recipes/mnist.json --conditional`. A cell is a JSON
file under build/guidance/WORLD; what is there is not measured again. The same seeds everywhere, each class as often.
Digits: against the 899 that nothing was fitted to, 1,000 images a cell, `samplers` 500. MNIST: 250 images against
8,000 of the test set; what chooses is measured against the other 2,000. The predicted window is the network's; by the
law of the classes, a Gaussian each, the same is predicted without a network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from checks import classifier

import symbreak as sb
from symbreak.data.held_out import held_out
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import features
from symbreak.metrics.frechet import distance, frechet_distance
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.guidance import Guided
from symbreak.start.fit import candidate_laws
from symbreak.start.sample import evaluations

STEPS, BUDGETS, SAMPLER = 10, (3, 5, 10), "dpm++2m-karras"
SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++2m")
BATCH = 50  # states of a network evaluation
Window = tuple[float, float]


@dataclass(frozen=True)
class World:
    """Images of a cell, of one of `samplers`, and that choose; scales of all, and of `samplers`; ends of windows."""

    count: int
    few: int
    choosing: int
    samplers: tuple[str, ...]
    scales: tuple[float, ...]
    scanned: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]

    @property
    def windows(self) -> list[Window]:
        """Every low end with every high one."""
        return [(low, high) for low in self.lows for high in self.highs]


WORLDS = {
    "digits": World(1000, 500, 150, SAMPLERS, (1.5, 2.0, 3.0), (1.5, 3.0), (0.0, 0.3, 0.9), (1.5, 4.1, math.inf)),
    "mnist": World(
        250, 250, 100, (SAMPLER, *SAMPLERS), (1.5, 2.0, 3.0), (1.5, 3.0, 5.0), (0.0, 0.5, 1.5), (3.0, 8.0, math.inf)
    ),
}


class Bench:
    """The network, what it is measured against, and its predicted window."""

    def __init__(self, name: str, model: str | None, out: Path) -> None:
        self.world, self.out = WORLDS[name], out / name
        self.out.mkdir(parents=True, exist_ok=True)
        self.pipe = sb.load_pipeline(model or "digits-conditional")
        self.denoiser = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self._check_cells()
        if name == "digits":
            parts = held_out(sb.images("digits"), None)
            train, test, choosing = parts.train, parts.test, None
        else:
            root = Path(os.environ["SYMBREAK_DATA"])
            train, test = (sb.images(str(root / f"mnist-{part}.parquet")) for part in ("train", "test"))
            choosing = 2000
        self.train = train.subset(min(len(train), 20_000))
        self.extract = classifier(name, train, test, self.out)
        rows, labels = features(self.extract, test), test.labels
        self.real = rows[choosing or 0 :], labels[choosing or 0 :]
        self.chooser = rows[:choosing], labels[:choosing]
        # The window is found by training images: those that are measured against decide nothing.
        some = self.train.subset(300)
        self.information = sb.condition_information(self.denoiser, some.tensor(), some.labels)
        self.predicted = sb.guidance_window(self.information).levels
        law = sb.PrincipalMixture.fit(self.train.subset(min(len(self.train), 8000)), labels=True)
        by_law = sb.condition_information(law, some.tensor(), some.labels)
        self.by_law = sb.guidance_window(by_law).levels

    def _check_cells(self) -> None:
        """Cells and starts of one network: those of another are not taken for its own."""
        path, network = self.out / "network", fingerprint(self.denoiser)
        if path.exists() and path.read_text(encoding="utf-8") != network:
            raise SystemExit(f"{self.out} holds what was measured of another network. Pass another --out.")
        path.write_text(network, encoding="utf-8")

    def guided(self, scale: float, window: Window | None) -> Guided:
        """The network, guided away from its null class."""
        return sb.guided(self.denoiser, 10, scale, window)

    def standard(self, name: str, steps: int = STEPS) -> sb.LateStart:
        """A sampler from white noise."""
        return sb.standard_start(sb.scheduler(name, like=self.pipe.scheduler), steps)

    def levels(self, start: sb.LateStart) -> list[float]:
        """Sigma of every evaluation of a start."""
        levels = sb.schedule(self.pipe.scheduler)
        return [levels.level(float(t)).sigma for t in start.scheduler.timesteps]

    def late(self, steps: int) -> sb.LateStart:
        """The network's own start, or one that is fitted to training images and chosen by others of them."""
        own = getattr(self.pipe, "start", None)
        path = self.out / f"start-{steps}.safetensors"
        if own is None and not path.exists():
            parts = held_out(self.train, None, 256 / len(self.train))
            full, laws = sb.scheduler(SAMPLER, like=self.pipe.scheduler), candidate_laws(parts.train)
            test = parts.test.tensor()
            for n in BUDGETS:
                start = sb.late_start(
                    full, laws, n, denoiser=self.denoiser, data=test, labels=parts.test.labels, check=False
                )
                start.save(self.out / f"start-{n}.safetensors")
        return own or sb.LateStart.load(path)

    def score(self, name: str, unet: object, start: sb.LateStart) -> float:
        """The distance of images of other seeds, by which is chosen."""
        seeds = range(10**6, 10**6 + self.world.choosing)
        return float(self.cell(f"choosing/{name}", unet, start, seeds, self.chooser)["pooled"])

    def cell(
        self,
        name: str,
        unet: object,
        start: sb.LateStart,
        seeds: Sequence[int],
        real: tuple[torch.Tensor, torch.Tensor] | None = None,
        **more: object,
    ) -> dict:
        """Measure, or read what was measured with the same settings."""
        path = self.out / f"{name}.json"
        made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if made is not None and all(made.get(k) == v for k, v in more.items()):
            return made
        y = torch.arange(len(seeds)) % 10
        made = features(self.extract, sb.generate(unet, start, seeds, y, micro_batch=BATCH))
        rows, labels = real or self.real
        whole = distance(made, sb.Moments.fit(rows), 5, self.extract.name)
        each = [frechet_distance(sb.Moments.fit(made[y == k]), sb.Moments.fit(rows[labels == k])) for k in range(10)]
        cover = precision_recall(made, rows[:1000])
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


def said(window: Window | None) -> str:
    """A window as part of a file's name."""
    return "all" if window is None else f"{window[0]:.2g}-{window[1]:.2g}"


def scan(bench: Bench) -> None:
    """Every scale in every window, and the predicted one."""
    world, start = bench.world, bench.standard(SAMPLER)
    seeds = range(world.count)
    bench.cell("scan-none", bench.pipe.unet, start, seeds, scale=1.0, window=None)
    for scale in world.scales:
        for window in [bench.predicted, *world.windows]:
            kind = "predicted" if window == bench.predicted else said(window)
            name = f"scan-{scale:g}-{kind}"
            bench.cell(name, bench.guided(scale, window), start, seeds, scale=scale, window=list(window), kind=kind)


def samplers(bench: Bench) -> None:
    """Of other samplers: no guidance, everywhere, in the predicted window, and in the best of the scan.

    Everywhere at the best scale, the predicted window at the same and, where it differs, at its own best; scales and
    windows are chosen on other seeds.
    """
    world, seeds = bench.world, range(bench.world.few)
    for name in world.samplers:
        start = bench.standard(name)
        scores: dict[tuple[float, Window], float] = {}
        twins: dict[tuple[float, tuple[bool, ...]], float] = {}  # windows that guide the same steps
        for scale in world.scanned:
            for window in [bench.predicted, *world.windows]:
                unet = bench.guided(scale, window)
                steps = tuple(unet.evaluations(sigma) == 2 for sigma in bench.levels(start))
                if (scale, steps) not in twins:
                    twins[scale, steps] = bench.score(f"{name}-{scale:g}-{said(window)}", unet, start)
                scores[scale, window] = twins[scale, steps]
        everywhere = (0.0, math.inf)

        def nearest(*windows: Window, scores: dict[tuple[float, Window], float] = scores) -> tuple[float, Window]:
            return min((k for k in scores if k[1] in windows), key=scores.__getitem__)

        scale = nearest(everywhere)[0]
        same = scale, bench.predicted
        kinds = {"everywhere": nearest(everywhere), "predicted": same, "predicted by law": (scale, bench.by_law)}
        if nearest(bench.predicted) != same:
            kinds["predicted, own scale"] = nearest(bench.predicted)
        kinds["best"] = nearest(*world.windows)
        bench.cell(f"of-{name}-none", bench.pipe.unet, start, seeds, scale=1.0, window=None, kind="no guidance")
        for kind, (scale, window) in kinds.items():
            row = {"scale": scale, "window": list(window), "kind": kind}
            bench.cell(f"of-{name}-{kind}", bench.guided(scale, window), start, seeds, **row)


def starts(bench: Bench) -> None:
    """Both starts at equal NFE; guided ones take as many steps as the evaluations of both branches allow."""
    seeds = range(bench.world.count)
    for budget in BUDGETS:
        own = bench.late(budget)
        made = {
            "standard": lambda n: bench.standard(SAMPLER, n),
            "late": lambda n, own=own: sb.late_start(own.full, own.law, n, at=own.level, check=False),
        }
        for kind, start in made.items():
            row = {"kind": kind, "budget": budget}
            bench.cell(f"{kind}-{budget}", bench.pipe.unet, start(budget), seeds, **row, scale=1.0)
            (one, two), own = bench.world.scales[:2], bench.predicted
            for scale, window, of in ((one, own, ""), (two, own, ""), (one, bench.by_law, "-law")):
                unet = bench.guided(scale, window)
                fits = [n for n in range(1, budget + 1) if evaluations(unet, start(n)) <= budget]
                if fits:
                    bench.cell(f"{kind}-{budget}-{scale:g}{of}", unet, start(max(fits)), seeds, **row, scale=scale)


def best(bench: Bench) -> None:
    """The standard start at equal NFE with the steps to guide that are the best of all that the budget allows."""
    scale = bench.world.scales[0]
    for budget in BUDGETS:
        scores = {}
        for steps in range(budget // 2 + budget % 2, budget):
            start = bench.standard(SAMPLER, steps)
            edges = [math.inf, *(math.sqrt(a * b) for a, b in pairwise(bench.levels(start))), 0.0]
            guided = budget - steps
            for first in range(steps - guided + 1):
                window = edges[first + guided], edges[first]
                name = f"best-{budget}-{steps}-{first}"
                scores[steps, window] = bench.score(name, bench.guided(scale, window), start)
        steps, window = min(scores, key=scores.__getitem__)
        row = {"kind": "standard, best window", "budget": budget, "scale": scale, "window": list(window)}
        start = bench.standard(SAMPLER, steps)
        bench.cell(f"best-{budget}", bench.guided(scale, window), start, range(bench.world.count), **row)


def line(row: dict) -> str:
    """A row of a table."""
    value, low, high = row["distance"]
    return (
        f"{row['nfe']} | {value:.2f} [{low:.2f}, {high:.2f}] | {sum(row['by_class']) / 10:.2f} | "
        f"{row['precision']:.3f} | {row['recall']:.3f} |"
    )


def head(*names: str) -> None:
    """The first rows of a table of cells."""
    names = (*names, "NFE", "distance", "mean of classes", "precision", "recall")
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")


def table(out: Path) -> None:
    """All tables as Markdown."""
    rows = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("*.json"))}
    cells = {k: v for k, v in rows.items() if k.startswith("scan")}
    others = {k: v for k, v in rows.items() if k.startswith("of-")}
    head("scale", "window")
    for name, row in sorted(cells.items(), key=lambda item: item[1]["distance"][0]):
        print(f"| {row['scale']:g} | {name.split('-', 2)[-1]} | {line(row)}")
    head("budget", "start", "scale")
    budgets = {k: v for k, v in rows.items() if k not in {*cells, *others}}
    for name, row in sorted(budgets.items(), key=lambda item: (item[1]["budget"], item[0])):
        print(f"| {row['budget']} | {name}, {row['steps']} steps | {row['scale']:g} | {line(row)}")
    head("sampler", "scale", "window")
    for name, row in others.items():
        where = "-" if row["window"] is None else "{:.2g} to {:.2g}".format(*row["window"])
        print(f"| {name.split('-', 1)[1]} | {row['scale']:g} | {row['kind']}, {where} | {line(row)}")
    head("scanned", "window")
    for path in sorted((out / "choosing").glob("*.json")):
        print(f"| {path.stem} | {line(json.loads(path.read_text(encoding='utf-8')))}")


def main() -> None:
    parts = {"scan": scan, "samplers": samplers, "starts": starts, "best": best}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("parts", nargs="+", choices=(*parts, "table"))
    parser.add_argument("--model", default=None, help="a diffusers folder; needed for MNIST")
    parser.add_argument("--out", type=Path, default=Path("build/guidance"))
    args = parser.parse_args()
    measured = [name for name in args.parts if name != "table"]
    if args.world == "mnist" and measured and (args.model is None or not os.environ.get("SYMBREAK_DATA")):
        raise SystemExit("MNIST needs --model FOLDER and SYMBREAK_DATA.")
    if measured:
        bench = Bench(args.world, args.model, args.out)
        for of, window in (("the network", bench.predicted), ("the law", bench.by_law)):
            print("by {} the class is decided between sigma {:.3g} and {:.3g}".format(of, *window), flush=True)
    for name in measured:
        parts[name](bench)
    if "table" in args.parts:
        table(args.out / args.world)


if __name__ == "__main__":
    main()
