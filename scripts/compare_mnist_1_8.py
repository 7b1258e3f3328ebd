"""Clones of a network trained on MNIST 1 and 8 alone, against the published curve (arXiv:2402.18491).

    symbreak train --data mnist-train.parquet --classes 1,8 --pad 32 --recipe recipes/mnist-1-8.json \\
        --out build/mnist-1-8                                                # 81 minutes on one busy core
    python scripts/compare_mnist_1_8.py --data mnist-train.parquet --test mnist-test.parquet --model build/mnist-1-8

The published images have pixels in [0, 1], ours in [-1, 1]: the same image noised by the same VP process at step k
has twice our sigma there, so their level sigma is our 2 sigma, and their tau is ours less ln 2 where sigma is large.
Writes clones.json and clones.png into --out; called again after an interruption it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import symbreak as sb
from symbreak.metrics.feature_rows import accuracy, load_classifier, save_classifier, train_classifier
from symbreak.runtime.files import write_json
from symbreak.runtime.identity import weights_hash
from symbreak.runtime.plain import plain, versions

STEPS = (999, 800, 700, 650, 600, 550, 500, 450, 400, 350, 300, 250, 200, 150, 100)
ROOT = Path(__file__).parents[1]


def halfway(tau: np.ndarray, phi: np.ndarray, level: float = 0.75) -> float:
    """tau at which a curve that falls with tau passes a level, by linear interpolation."""
    order = np.argsort(tau)
    return float(np.interp(-level, -phi[order], tau[order]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("build/phases/mnist-1-8"))
    args = parser.parse_args()
    pipe = sb.load_pipeline(args.model)
    train, test = (sb.images(source, classes=["1", "8"], pad=32) for source in (args.data, args.test))
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "classifier.safetensors"
    if not weights.exists():
        save_classifier(train_classifier(train, held_out=test, epochs=4), weights, "mnist-1-8")
    judge = load_classifier(weights)
    schedule = sb.schedule(pipe.scheduler)
    sigma = np.array([schedule.level(k).sigma for k in STEPS])
    identity = {
        "pairs": args.pairs,
        "steps": args.steps,
        "levels": list(STEPS),
        "network": weights_hash(pipe.unet),
        "scheduler": plain(dict(pipe.scheduler.config)),
        "classifier": weights_hash(judge),
        "versions": versions(torch.get_num_threads()),
    }

    def tell(_: str, done: int, total: int) -> None:
        print(f"\r{done / total:.0%} of {total:,} network evaluations", end="", flush=True)

    run = sb.Run(args.out, progress=tell).identified(identity)
    measured = sb.clones(
        sb.denoiser(pipe.unet, pipe.scheduler), sigma, judge.logits, pairs=args.pairs, steps=args.steps, run=run
    )
    print()
    published = json.loads((ROOT / "tests" / "published.json").read_text())["mnist_1_vs_8_cloning"]
    steps = np.minimum(published["step"], 999)
    theirs = np.array([schedule.level(int(k)).ou_time for k in steps])
    # The same signal-to-noise ratio for pixels in [-1, 1]: sigma doubles.
    moved = np.array([sb.NoiseLevel(2 * schedule.level(int(k)).sigma).ou_time for k in steps])
    ours = np.array([schedule.level(int(k)).ou_time for k in STEPS])
    phi = np.asarray(published["phi"])
    crossing = measured.crossing
    result = {
        **measured.to_dict(),
        "accuracy": accuracy(judge, test),
        "steps_of_sampler": args.steps,
        "level_steps": list(STEPS),
        "ou_time": ours.tolist(),
        "tau": {
            "ours": None if crossing.level is None else crossing.level.ou_time,
            "interval": [None if e is None else e.ou_time for e in (crossing.low, crossing.high)],
            "published": halfway(theirs, phi),
            "published, pixels in [-1, 1]": halfway(moved, phi),
        },
        "gap at the published levels": [
            {"step": int(k), "published": float(p), "ours": float(np.interp(t, ours[::-1], measured.curve.value[::-1]))}
            for k, p, t in zip(steps, phi, moved)
            if ours.min() <= t <= ours.max()
        ],
    }
    write_json(args.out / "clones.json", result)
    run.close()
    draw(args.out / "clones.png", ours, measured, theirs, moved, phi, np.asarray(published["standard_error"]))
    print(json.dumps(result["tau"], indent=1))


def draw(path: Path, ours, measured, theirs, moved, phi, error) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=110)
    ax = figure.subplots()
    c = measured.curve
    ax.errorbar(ours, c.value, [c.value - c.low, c.high - c.value], fmt="o-", ms=4, label="this network, 95 %")
    ax.errorbar(theirs, phi, 1.96 * error, fmt="s--", ms=3, color="#999", label="published, as given ([0, 1])")
    ax.errorbar(moved, phi, 1.96 * error, fmt="s-", ms=3, color="#d9822b", label="published, moved to [-1, 1]")
    ax.axhline(measured.floor, color="#888", linestyle=":", label="floor of this network")
    ax.set(xlabel="OU time tau of the branch (noise falls to the right)", ylabel="clones of one class", xlim=(3.2, 0))
    ax.grid(color="#e6eaf0")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
