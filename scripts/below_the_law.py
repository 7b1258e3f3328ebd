"""Train one small network many ways and measure each against images seen: what docs/training-below-the-law.md rests on.

    python scripts/below_the_law.py run digits edm,residual 0,1,2      trains and measures, skips what is done
    python scripts/below_the_law.py seconds digits edm,residual        times law and steps, one way beside the other
    python scripts/below_the_law.py table digits                       prints what is there
    python scripts/below_the_law.py figure FILE.png                    draws it

Everything but the preconditioning is the same for all ways: backbone, images in the same order, noise, optimizer,
learning rate and average. Results are JSON files under build/below-the-law/.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel

import symbreak as sb
from symbreak.metrics.composition import class_entropy
from symbreak.metrics.coverage import precision_recall
from symbreak.metrics.feature_rows import features, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import frechet_distance
from symbreak.metrics.memorization import nearest
from symbreak.networks.residual import LawResidual, law_error, law_size
from symbreak.noise import NoiseLevel, generator
from symbreak.start.late_start import standard_start
from symbreak.start.objectives import Batch, Epsilon, Residual, noising
from symbreak.start.recipe import Recipe
from symbreak.start.train import _network
from symbreak.start.training_law import fading

DATA = os.environ.get("SYMBREAK_DATA", "data")
OUT = Path("build/below-the-law")
LOW = 0.01  # lowest level of training
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)  # of held-out losses, and shares of the start level


@dataclass(frozen=True)
class World:
    """A data set, its network and budget."""

    channels: tuple[int, ...]
    steps: int
    batch: int
    measured: tuple[int, ...]
    start: float
    top: float
    images: int  # generated for every distance
    clusters: int
    lr: float = 2e-3

    def open(self, name: str) -> tuple[sb.Images, sb.Images]:
        """Training images and held-out ones."""
        if name == "digits":
            from symbreak.data.held_out import held_out

            parts = held_out(sb.images("digits"), None, 0.5)
            return parts.train, parts.test
        if name.startswith("mnist"):
            train = sb.images(f"{DATA}/mnist-train.parquet", limit=20000)
            return train, sb.images(f"{DATA}/mnist-test.parquet", limit=4000)
        options = {"size": 32, "crop": 70, "labels": ["Male", "Smiling", "Young"]}
        return (
            sb.images(f"{DATA}/celeba10k-train.parquet", **options),
            sb.images(f"{DATA}/celeba10k-test.parquet", **options),
        )


WORLDS = {
    "digits": World((24, 48), 600, 128, (100, 200, 400, 600), 0.8, 1.35, 1000, 40),
    "mnist": World((16, 32, 64), 200, 64, (50, 100, 200), 2.0, 4.4, 500, 40, lr=1.5e-3),
    "mnist-longer": World((16, 32, 64), 1200, 64, (400, 800, 1200), 2.0, 4.4, 500, 40, lr=1.5e-3),
    "faces": World((16, 32, 64), 200, 64, (50, 100, 200), 3.0, 4.5, 500, 40, lr=1.5e-3),
}


class Isotropic:
    """N(0, v I): EDM's preconditioning as a law."""

    classes = None

    def __init__(self, shape: tuple[int, ...], v: float) -> None:
        self.shape, self.v = shape, v

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x * self.v / (self.v + s * s)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        return math.sqrt(self.v) * torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)


def ways(world: World, full: object, gaussian: object, iso: Isotropic) -> dict[str, dict[str, object]]:
    """Every way to train: the law, its folds, the range and density of levels."""
    bare = {"law": full, "top": world.top}
    unfaded = {**bare, "folds": 4, "second": True}
    residual = {**unfaded, "fade": True}
    return {
        "epsilon": {"epsilon": True},
        "edm": {"law": iso, "top": 80.0, "density": "lognormal"},
        "edm-below": {"law": iso, "top": world.top},
        "edm-entropy": {"law": iso, "top": world.top, "density": "entropy"},
        "residual": residual,  # as symbreak train --residual
        "half": {**residual, "half": True},
        "unfaded": unfaded,
        "folds-only": {**bare, "folds": 4},
        "second-only": {**bare, "second": True},
        "bare": bare,
        "ten-folds": {**unfaded, "folds": 10},
        "gaussian": {**unfaded, "law": gaussian},
        "entropy": {**unfaded, "density": "entropy"},
        "lognormal": {**unfaded, "density": "lognormal"},
        "few-clusters": {**unfaded, "clusters": 10},
        "many-clusters": {**unfaded, "clusters": 100},
        "low-top": {**unfaded, "top": 1.1 * world.start},
        "high-top": {**unfaded, "top": 4 * world.start},
    }


def fit(data: sb.Images | torch.Tensor, clusters: int, kind: str = "clusters") -> object:
    gaussian = sb.Gaussian.fit(data)
    return gaussian if kind == "gaussian" else sb.PrincipalMixture.fit(data, components=clusters, gaussian=gaussian)


class Levels(Residual):
    """Training below a law with another density of levels.

    Args:
        residual, folds, low: see `Residual`.
        density: log-uniform, lognormal (EDM's), or entropy: the root of nats in a step of log sigma, by the law.
    """

    def __init__(self, residual: LawResidual, folds: list[object], low: float, density: str) -> None:
        super().__init__(residual, folds, low)
        self.density = density

    def levels(self, n: int, g: torch.Generator) -> torch.Tensor:
        if self.density == "log-uniform":
            return super().levels(n, g)
        grid = np.geomspace(self.low, self.residual.top, 400)
        density = np.exp(-0.5 * ((np.log(grid) + 1.2) / 1.2) ** 2)
        if self.density == "entropy":
            density = self.residual.scale(torch.from_numpy(grid)).numpy() / grid
        share = np.cumsum(density)
        u = torch.rand(n, generator=g, dtype=torch.float64).numpy()
        return torch.from_numpy(np.interp(u, share / share[-1], grid))


class Ruler:
    """Distances, recall, composition and copies against held-out images."""

    def __init__(self, name: str, train: sb.Images, test: sb.Images) -> None:
        path = OUT / f"{name.split('-')[0]}-classifier.safetensors"
        if name == "digits":
            from symbreak.metrics.feature_rows import BUNDLED

            self.extract = load_classifier(BUNDLED)
        else:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_classifier(
                    train_classifier(train.take(np.arange(8000), "8,000"), held_out=test, epochs=6), path, path.stem
                )
            self.extract = load_classifier(path)
        self.train = train.tensor()
        self.real = features(self.extract, test.tensor())
        self.moments = sb.Moments.fit(self.real)
        self.floor = frechet_distance(
            sb.Moments.fit(features(self.extract, self.train[: len(self.real)])), self.moments
        )

    def distance(self, x: torch.Tensor) -> float:
        return frechet_distance(sb.Moments.fit(features(self.extract, x)), self.moments)

    def more(self, x: torch.Tensor) -> dict[str, object]:
        d, _ = nearest(x.reshape(len(x), -1).double(), self.train.reshape(len(self.train), -1).double())
        spread = precision_recall(features(self.extract, x), self.real)
        logits = torch.cat([self.extract.logits(block) for block in x.split(256)])
        return {
            "copies": int((d[:, 0] / d[:, 1] < 1 / 3).sum()),
            "ratio": float((d[:, 0] / d[:, 1]).median()),
            **{key: value for key, value in spread.items() if key.startswith(("precision", "recall"))},
            "bits": class_entropy(logits.argmax(1), logits.shape[1]),
        }


class Trial:
    """A network that is trained one way on one world.

    Args:
        name: of the world.
        way: one of `ways`.
        seed: of weights, order and noise.
    """

    def __init__(self, name: str, way: str, seed: int) -> None:
        self.world, self.seed = WORLDS[name], seed
        self.train, self.test = self.world.open(name)
        self.ruler = Ruler(name, self.train, self.test)
        self.clean, self.unseen = self.train.tensor(), self.test.tensor()[:512]
        self.full = fit(self.train, self.world.clusters)
        iso = Isotropic(self.train.shape, float(self.clean.double().square().mean()))
        kind = "gaussian" if way == "gaussian" else "clusters"
        gaussian = sb.Gaussian.fit(self.train) if kind == "gaussian" else None
        self.way = ways(self.world, self.full, gaussian, iso)[way]
        self.exact = self.way.get("law") is iso
        recipe = Recipe(channels=self.world.channels, dropout=0.0)
        if self.way.get("half"):  # of the parameters
            smaller = tuple(max(8, round(c / math.sqrt(2) / 8) * 8) for c in recipe.channels)
            recipe = Recipe(channels=smaller, dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = _network(recipe, self.train.shape, None, 2 if self.way.get("second") else 1)
        began = time.perf_counter()
        self.objective = Epsilon(self.network) if self.way.get("epsilon") else self._below(kind)
        self.setup = time.perf_counter() - began  # laws of folds and the law's error
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.world.lr, weight_decay=0.01)
        self.average = EMAModel(self.parameters, decay=0.999, use_ema_warmup=True, power=0.75)

    def _below(self, kind: str) -> Residual:
        """The objective of training below a law."""
        way, clusters = self.way, int(self.way.get("clusters", self.world.clusters))
        law = fit(self.train, clusters) if "clusters" in way else way["law"]
        k, top = int(way.get("folds", 1)), float(way["top"])
        fold = torch.arange(len(self.clean)) % k
        folds = [law]
        if k > 1:
            folds = [fit(self.clean[fold != i], min(clusters, int((fold != i).sum()) // 3), kind) for i in range(k)]
        at = 0.0
        if self.exact:
            e = torch.from_numpy(np.geomspace(0.005, top, 24))
            error = torch.stack([e, law.v * e**2 / (law.v + e**2)])
        else:
            error = law_error(law, self.unseen, top)
            at = fading(error) if way.get("fade") else 0.0
            error = law_error(law, self.unseen, top, fade=(at, law_size(law))) if at else error
        options = {"error": error, "top": top, "fade": at, "second_input": bool(way.get("second"))}
        return Levels(LawResidual(law, self.network, **options), folds, LOW, str(way.get("density", "log-uniform")))

    def go(self) -> list[dict[str, object]]:
        """Train, and measure at the steps of the world."""
        world, rows, spent = self.world, [], 0.0
        for step in range(world.steps):
            spent += self.step(step)
            if step + 1 in world.measured:
                self.average.store(self.parameters)
                self.average.copy_to(self.parameters)
                self.network.eval()
                with torch.inference_mode():
                    row = self.measure(step + 1 == world.steps)
                self.average.restore(self.parameters)
                rows.append({"step": step + 1, "seen": (step + 1) * world.batch, "seconds": spent, **row})
                print(json.dumps(rows[-1]), flush=True)
        return rows

    def step(self, step: int) -> float:
        """One step of training; its seconds."""
        world, began = self.world, time.perf_counter()
        self.network.train()
        per_epoch = max(1, len(self.clean) // world.batch)
        order = torch.randperm(len(self.clean), generator=generator(self.seed, 1, step // per_epoch))
        index = order[step % per_epoch * world.batch :][: world.batch]
        batch = Batch(self.clean[index], index, None, slice(None))
        loss = self.objective.loss(batch, generator(self.seed, 2, step), torch.device("cpu"))()
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / world.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = world.lr * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.step(self.parameters)
        return time.perf_counter() - began

    def measure(self, last: bool) -> dict[str, object]:
        """Distances at few evaluations from the late start, and at twenty from white noise; held-out errors."""
        unet, scheduler = self.objective.unet(), noising()
        first = 10_000 * (self.seed + 1)
        seeds = list(range(first, first + self.world.images))
        out: dict[str, object] = {}
        for steps in (1, 2, 3, 5):
            # with two steps Karras' grid spends the second one at the lowest level
            sampler = sb.scheduler("dpm++2m" if steps == 2 else "dpm++2m-karras", like=scheduler)
            start = sb.late_start(sampler, self.full, steps, at=NoiseLevel(self.world.start), check=False)
            x = sb.generate(unet, start, seeds)
            out[f"late-{start.calls}"] = self.ruler.distance(x)
            if last and steps in (3, 5):
                out[f"late-{start.calls}-more"] = self.ruler.more(x)
        if last or self.exact or self.way.get("epsilon"):
            x = sb.generate(unet, standard_start(sb.scheduler("dpm++2m-karras", like=scheduler), 20), seeds)
            out["standard-20"] = self.ruler.distance(x)
        denoise, noise = sb.denoiser(unet, scheduler), torch.randn(self.unseen.shape, generator=generator(7))
        sigmas = [*LEVELS, 0.5 * self.world.start, self.world.start]
        for key, answer in (("loss", denoise), ("law", self.full.denoise)):
            out[key] = {
                f"{s:g}": float(
                    (self.unseen - torch.cat([answer(b, s) for b in (self.unseen + s * noise).split(64)]))
                    .square()
                    .mean()
                )
                for s in sigmas
            }
        return out


def run(name: str, chosen: list[str], seeds: list[int]) -> None:
    """Train all that is missing."""
    for seed in seeds:
        for way in chosen:
            path = OUT / name / f"{way}-{seed}.json"
            if not path.exists():
                trial = Trial(name, way, seed)
                rows, size = trial.go(), sum(p.numel() for p in trial.network.parameters())
                result = {"name": name, "way": way, "seed": seed, "parameters": size, "floor": trial.ruler.floor}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({**result, "rows": rows}))


def seconds(name: str, chosen: list[str], rounds: int = 8) -> None:
    """Time what each way does before its first step, and its steps in turn with those of the others (the median)."""
    trials = {way: Trial(name, way, 0) for way in chosen}
    spent = {way: [trial.step(k) for k in range(3)] for way, trial in trials.items()}  # to warm up
    spent = {way: [] for way in chosen}
    for k in range(rounds):
        for way, trial in trials.items():
            spent[way] += [trial.step(3 + 3 * k + i) for i in range(3)]
    cost = {way: {"setup": trials[way].setup, "step": float(np.median(spent[way]))} for way in chosen}
    (OUT / f"{name}-seconds.json").write_text(json.dumps(cost, indent=1))
    print(json.dumps(cost, indent=1))


def results(name: str) -> dict[str, list[dict]]:
    """What was measured in a world, by way."""
    found: dict[str, list[dict]] = {}
    for path in sorted((OUT / name).glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["way"], []).append(result)
    return found


def spread(values: list[float]) -> str:
    """A mean over seeds, and the smallest and largest."""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def table(name: str) -> None:
    """Means over seeds as Markdown, the smallest and largest in brackets."""
    found = results(name)
    keys = ["late-1", "late-2", "late-3", "late-5", "standard-20"]
    print(f"| way (seeds) | images seen | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 2)}")
    for way, runs in found.items():
        for rows in zip(*(r["rows"] for r in runs)):
            cells = [spread([r[k] for r in rows]) if k in rows[0] else "" for k in keys]
            print(f"| {way} ({len(runs)}) | {rows[0]['seen']:,} | {' | '.join(cells)} |")
    print("\nAfter the last step: held-out squared error an element, by sigma; recall, bits, copies at 3 and 5 NFE.\n")
    for way, runs in found.items():
        rows = [r["rows"][-1] for r in runs]
        losses = ", ".join(f"{s}: {spread([r['loss'][s] for r in rows])}" for s in rows[0]["loss"])
        more = [
            f"{k} {spread([r[f'late-{n}-more'][k] for r in rows])}"
            for n in (3, 5)
            for k in ("recall", "bits", "copies")
        ]
        cost = spread([r["seconds"] for r in rows])
        print(f"- {way} ({runs[0]['parameters']:,} parameters, {cost} s): {losses}; {', '.join(more)}")
    first = next(iter(found.values()))[0]
    law = ", ".join(f"{s}: {v:.3g}" for s, v in first["rows"][-1]["law"].items())
    print(f"- the law alone: {law}; distance of as many real images: {first['floor']:.3g}")


def figure(path: Path) -> None:
    """Distance at 3 evaluations, and the baselines' at 20 from white noise, against images seen and against seconds."""
    from matplotlib.figure import Figure

    worlds = [name for name in WORLDS if (OUT / f"{name}-seconds.json").exists()]
    page = Figure(figsize=(4 * len(worlds), 6.2), layout="constrained", dpi=110)
    lines = {
        ("residual", "late-3"): ("residual of the law, 3 NFE", "#1f6fb4", "-"),
        ("half", "late-3"): ("the same, half the parameters", "#7db0dd", "-"),
        ("edm", "late-3"): ("EDM, 3 NFE from the same start", "#d9822b", "-"),
        ("edm", "standard-20"): ("EDM, 20 NFE from white noise", "#d9822b", ":"),
        ("epsilon", "standard-20"): ("epsilon, 20 NFE from white noise", "#7f6a5a", ":"),
    }
    for column, name in zip(page.subplots(2, len(worlds), squeeze=False, sharey="col").T, worlds):
        cost, trials = json.loads((OUT / f"{name}-seconds.json").read_text()), results(name)
        for (way, key), (label, color, style) in lines.items():
            runs = trials.get(way, [])
            steps = [r["step"] for r in runs[0]["rows"] if key in r] if runs else []
            if not steps:
                continue
            values = np.array([[r[key] for r in run["rows"] if key in r] for run in runs])
            spent = [cost[way]["setup"] + cost[way]["step"] * n for n in steps]
            for ax, x in zip(column, ([n * WORLDS[name].batch for n in steps], spent)):
                ax.plot(x, values.mean(0), style, color=color, marker="o", ms=3, label=label)
                ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        for ax, label in zip(column, ("training images seen", "seconds of training, one core")):
            ax.axhline(next(iter(trials.values()))[0]["floor"], color="#999999", lw=0.8)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel(label)
        seen = [n * WORLDS[name].batch for n in WORLDS[name].measured]
        column[0].set_xticks(seen, [f"{n:,}" for n in seen], fontsize=8)
        low, high = column[1].get_xlim()
        ticks = [t for t in (10, 20, 30, 50, 70, 100, 150, 200, 300, 500) if low <= t <= high]
        column[1].set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
        for ax in column:
            ax.minorticks_off()
        column[0].set_title(name, fontsize=10)
        column[0].set_ylabel("distance to held-out images")
        column[1].set_ylabel("distance to held-out images")
    page.legend(
        *page.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    page.savefig(path)


if __name__ == "__main__":
    job = sys.argv[1] if len(sys.argv) > 2 else ""
    if job == "table":
        table(sys.argv[2])
    elif job == "seconds" and len(sys.argv) == 4:
        seconds(sys.argv[2], sys.argv[3].split(","))
    elif job == "figure":
        figure(Path(sys.argv[2]))
    elif job == "run" and len(sys.argv) == 5:
        run(sys.argv[2], sys.argv[3].split(","), [int(seed) for seed in sys.argv[4].split(",")])
    else:
        raise SystemExit(__doc__)
