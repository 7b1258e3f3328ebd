"""Train one small network many ways and measure each against images seen: what docs/training-below-the-law.md rests on.

    python scripts/below_the_law.py run digits edm,residual 0,1,2      trains and measures, skips what is done
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
from symbreak.metrics.features import features, load_classifier, save_classifier, train_classifier
from symbreak.metrics.frechet import frechet_distance
from symbreak.metrics.memorization import nearest
from symbreak.networks.families import as_unet
from symbreak.networks.residual import LawResidual, law_error
from symbreak.noise import NoiseLevel, generator
from symbreak.start.late_start import standard_start
from symbreak.start.objectives import noising
from symbreak.start.recipe import Recipe
from symbreak.start.train import _network

DATA = os.environ.get("SYMBREAK_DATA", "data")
OUT = Path("build/below-the-law")
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
    dropout: float = 0.0

    def open(self, name: str) -> tuple[sb.Images, sb.Images]:
        """Training images and held-out ones."""
        if name == "digits":
            from symbreak.data.held_out import held_out

            parts = held_out(sb.images("digits"), None, 0.5)
            return parts.train, parts.test
        if name == "mnist":
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


class Faded:
    """A law that gives way to an isotropic Gaussian below a level: weight sigma^4 / (sigma^4 + at^4)."""

    classes = None

    def __init__(self, law: object, below: object, at: float) -> None:
        self.law, self.below, self.at, self.shape = law, below, at, law.shape

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        w = s**4 / (s**4 + self.at**4)
        return w * self.law.denoise(x, sigma) + (1 - w) * self.below.denoise(x, sigma)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.law.sample(n, sigma, generator)


def ways(world: World, full: object, gaussian: object, iso: Isotropic) -> dict[str, dict[str, object]]:
    """Every way to train: the law, its folds, the range and density of levels."""
    bare = {"law": full, "top": world.top}
    below = {**bare, "folds": 4, "second": True}
    return {
        "epsilon": {"epsilon": True},
        "edm": {"law": iso, "top": 80.0, "density": "lognormal"},
        "edm-below": {"law": iso, "top": world.top},
        "edm-entropy": {"law": iso, "top": world.top, "density": "entropy"},
        "residual": bare,
        "second": {**bare, "second": True},
        "folds": {**bare, "folds": 4},
        "folds-second": below,
        "ten-folds": {**below, "folds": 10},
        "faded": {**below, "faded": 0.15 * world.start},
        "faded-low": {**below, "faded": 0.05 * world.start},
        "gaussian": {**below, "law": gaussian},
        "entropy": {**below, "density": "entropy"},
        "lognormal": {**below, "density": "lognormal"},
        "few-clusters": {**below, "clusters": 10},
        "many-clusters": {**below, "clusters": 100},
        "low-top": {**below, "top": 1.1 * world.start},
        "high-top": {**below, "top": 4 * world.start},
        "product": {**below, "faded": "rule"},
        "half": {**below, "half": True},
    }


def fit(data: sb.Images | torch.Tensor, clusters: int, kind: str = "clusters") -> object:
    gaussian = sb.Gaussian.fit(data)
    return gaussian if kind == "gaussian" else sb.PrincipalMixture.fit(data, components=clusters, gaussian=gaussian)


def draw_levels(n: int, way: dict[str, object], error: torch.Tensor, g: torch.Generator, low: float) -> torch.Tensor:
    top = float(way["top"])
    u = torch.rand(n, generator=g, dtype=torch.float64)
    kind = way.get("density", "log-uniform")
    if kind == "log-uniform":
        return low * (top / low) ** u
    grid = np.geomspace(low, top, 400)
    if kind == "lognormal":  # EDM's
        density = np.exp(-0.5 * ((np.log(grid) + 1.2) / 1.2) ** 2)
    else:  # nats in a step of log sigma, from the law's error: capped where all directions are resolved
        e = np.exp(np.interp(np.log(grid), error[0].log().numpy(), error[1].log().numpy()))
        density = np.sqrt(e) / grid
    cdf = np.cumsum(density)
    return torch.from_numpy(np.interp(u.numpy(), cdf / cdf[-1], grid))


class Ruler:
    """Distances, recall, composition and copies against held-out images."""

    def __init__(self, name: str, train: sb.Images, test: sb.Images) -> None:
        path = OUT / f"{name}-classifier.safetensors"
        if name == "digits":
            from symbreak.metrics.features import BUNDLED

            self.extract = load_classifier(BUNDLED)
        else:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_classifier(
                    train_classifier(train.take(np.arange(8000), "8,000"), held_out=test, epochs=6),
                    path,
                    f"{name}-classifier",
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


def measure(
    unet: object, scheduler: object, world: World, law: object, ruler: Ruler, seed: int, last: bool, standard: bool
) -> dict[str, object]:
    """Distances at few evaluations from the late start, and at twenty from white noise."""
    out: dict[str, object] = {}
    seeds = range(10_000 * (seed + 1), 10_000 * (seed + 1) + world.images)
    samplers = {n: sb.scheduler("dpm++2m" if n == 2 else "dpm++2m-karras", like=scheduler) for n in (1, 2, 3, 5, 20)}
    for steps in (1, 2, 3, 5):
        start = sb.late_start(samplers[steps], law, steps, at=NoiseLevel(world.start), check=False)
        x = sb.generate(unet, start, list(seeds))
        out[f"late-{start.calls}"] = ruler.distance(x)
        if last and steps in (3, 5):
            out[f"late-{start.calls}-more"] = ruler.more(x)
    if standard:
        x = sb.generate(unet, standard_start(samplers[20], 20), list(seeds))
        out["standard-20"] = ruler.distance(x)
    return out


def one(name: str, way_name: str, seed: int) -> dict[str, object]:
    """Train and measure one network."""
    world = WORLDS[name]
    train, test = world.open(name)
    ruler = Ruler(name, train, test)
    clean, unseen = train.tensor(), test.tensor()[:512]
    began = time.perf_counter()
    full = fit(train, world.clusters)
    iso = Isotropic(train.shape, float(clean.double().square().mean()))
    way = ways(world, full, sb.Gaussian.fit(train) if way_name.startswith("gaussian") else None, iso)[way_name]
    law, folds = way.get("law"), int(way.get("folds", 1))
    kind = "gaussian" if way_name.startswith("gaussian") else "clusters"
    clusters = int(way.get("clusters", world.clusters))
    if "clusters" in way:
        law = fit(train, clusters)
    fold = torch.arange(len(clean)) % folds
    others = [law]
    if folds > 1:
        others = [fit(clean[fold != k], min(clusters, int((fold != k).sum()) // 3), kind) for k in range(folds)]
    if "faded" in way:
        at = way["faded"]
        if at == "rule":
            e = law_error(law, unseen, float(way["top"]))
            knows = (e[1] < 0.8 * e[0] ** 2).nonzero()[:, 0]
            at = float(e[0, knows[0]]) if len(knows) and knows[0] > 0 else 0.0
        law, others = Faded(law, iso, at), [Faded(o, iso, at) for o in others]
    scheduler = noising()
    low = 0.01
    channels = tuple(c // 2 if way.get("half") else c for c in world.channels)
    if way.get("half"):
        channels = tuple(max(8, round(c / math.sqrt(2) / 8) * 8) for c in world.channels)
    recipe = Recipe(
        channels=channels, dropout=world.dropout, steps=world.steps, batch=world.batch, lr=world.lr, seed=seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = _network(recipe, train.shape, None, 2 if way.get("second") else 1)
    net.train()
    residual = None
    if law is not None:
        error = (
            torch.stack(
                [e := torch.from_numpy(np.geomspace(0.005, float(way["top"]), 24)), iso.v * e**2 / (iso.v + e**2)]
            )
            if law is iso
            else law_error(law, unseen, float(way["top"]))
        )
        residual = LawResidual(law, net, error=error, top=float(way["top"]), second_input=bool(way.get("second")))
        unet = as_unet(residual, scheduler)
    else:
        unet = net
    fitted = time.perf_counter() - began
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    per_epoch, epoch = max(1, len(clean) // recipe.batch), -1
    rows, spent = [], 0.0
    for step in range(recipe.steps):
        t0 = time.perf_counter()
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(len(clean), generator=generator(seed, 1, epoch))
        index = order[step % per_epoch * recipe.batch :][: recipe.batch]
        x0, g = clean[index], generator(seed, 2, step)
        noise = torch.randn(x0.shape, generator=g)
        if residual is None:
            t = torch.randint(0, 1000, (len(x0),), generator=g)
            loss = torch.nn.functional.mse_loss(net(scheduler.add_noise(x0, noise, t), t).sample, noise)
        else:
            sigma = draw_levels(len(x0), way, residual.error, g, low).float()
            column = sigma.reshape(-1, 1, 1, 1)
            x = x0 + column * noise
            base = torch.empty_like(x)
            for k, other in enumerate(others):
                mine = fold[index] == k
                if bool(mine.any()):
                    base[mine] = other.denoise(x[mine], sigma[mine])
            target = (x0 - base) / residual.scale(sigma).reshape(-1, 1, 1, 1)
            loss = torch.nn.functional.mse_loss(residual.correction(x, sigma, base), target)
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step(parameters)
        spent += time.perf_counter() - t0
        if step + 1 in world.measured:
            average.store(parameters)
            average.copy_to(parameters)
            net.eval()
            with torch.inference_mode():
                last = step + 1 == recipe.steps
                standard = residual is None or law is iso or last
                row = measure(unet, scheduler, world, full, ruler, seed, last, standard)
                d = sb.denoiser(unet, scheduler)
                sigmas = [*LEVELS, 0.5 * world.start, world.start]
                at = torch.randn(unseen.shape, generator=generator(7))
                row["loss"] = {
                    f"{s:g}": float(
                        (unseen - torch.cat([d(b, s) for b in (unseen + s * at).split(64)])).square().mean()
                    )
                    for s in sigmas
                }
                row["law"] = {
                    f"{s:g}": float((unseen - full.denoise(unseen + s * at, s)).square().mean()) for s in sigmas
                }
            average.restore(parameters)
            net.train()
            rows.append({"step": step + 1, "seen": (step + 1) * recipe.batch, "seconds": spent, **row})
            print(name, way_name, seed, json.dumps(rows[-1]), flush=True)
    size = sum(p.numel() for p in parameters)
    return {
        "name": name,
        "way": way_name,
        "seed": seed,
        "parameters": size,
        "fitted": fitted,
        "floor": ruler.floor,
        "rows": rows,
    }


def run(name: str, chosen: list[str], seeds: list[int]) -> None:
    """Train all that is missing."""
    for seed in seeds:
        for way in chosen:
            path = OUT / name / f"{way}-{seed}.json"
            if not path.exists():
                result = one(name, way, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result))


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
    """Distance at 3 evaluations, and the baseline's at 20 from white noise, against training images seen."""
    from matplotlib.figure import Figure

    worlds = [name for name in WORLDS if (OUT / name).is_dir()]
    page = Figure(figsize=(4 * len(worlds), 3.4), layout="constrained", dpi=110)
    lines = {
        ("product", "late-3"): ("residual of the law, 3 NFE", "#1f6fb4", "-"),
        ("edm", "late-3"): ("EDM, 3 NFE from the same start", "#d9822b", "-"),
        ("edm", "standard-20"): ("EDM, 20 NFE from white noise", "#d9822b", ":"),
        ("epsilon", "standard-20"): ("epsilon, 20 NFE from white noise", "#7f6a5a", ":"),
    }
    for ax, name in zip(page.subplots(1, len(worlds), squeeze=False)[0], worlds):
        found = results(name)
        for (way, key), (label, color, style) in lines.items():
            runs = found.get(way, [])
            if runs:
                seen = [r["seen"] for r in runs[0]["rows"] if key in r]
                values = np.array([[r[key] for r in run["rows"] if key in r] for run in runs if key in run["rows"][0]])
                if not len(values):
                    continue
                ax.plot(seen, values.mean(0), style, color=color, marker="o", ms=3, label=label)
                ax.fill_between(seen, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        ax.axhline(next(iter(found.values()))[0]["floor"], color="#999999", lw=0.8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("training images seen")
    page.axes[0].set_ylabel("distance to held-out images")
    page.axes[0].legend(fontsize=7, frameon=False)
    page.savefig(path)


if __name__ == "__main__":
    job = sys.argv[1] if len(sys.argv) > 2 else ""
    if job == "table":
        table(sys.argv[2])
    elif job == "figure":
        figure(Path(sys.argv[2]))
    elif job == "run" and len(sys.argv) == 5:
        run(sys.argv[2], sys.argv[3].split(","), [int(seed) for seed in sys.argv[4].split(",")])
    else:
        raise SystemExit(__doc__)
