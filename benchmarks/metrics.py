"""Metrics on the same features: time and peak memory as ratios to torch-fidelity, torchmetrics and a dense version.

    python benchmarks/metrics.py                 small sizes, under a minute on one core
    python benchmarks/metrics.py --full          2,048 features, as Inception gives them; minutes
    .venv-fid/bin/python benchmarks/metrics.py   with torch-fidelity, after `make test-fid`

Every way runs in a process of its own, for its peak memory: what it adds to the process as it stands with libraries
loaded. Features come in batches of 256, made on the fly, as an extractor gives them; what a way holds is its own doing.
Count first: a covariance of n rows is n d^2 / 2 multiply-adds on one triangle; the distance itself, some 25 d^3,
outweighs it below n = 50 d; holding all features in single precision is 4 n d bytes, moments are 8 d^2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

BATCH = 256


def stream(n: int, d: int, seed: int):
    """Features [n, d] float32 in batches: correlated, not centred."""
    scale = torch.logspace(0, -2, d)
    for start in range(0, n, BATCH):
        g = torch.Generator().manual_seed(seed * 1_000_003 + start)
        x = torch.randn(min(BATCH, n - start), d, generator=g)
        yield (x + 0.3 * x.roll(1, 1)) * scale + 0.1 * seed


def whole(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.cat(list(stream(n, d, seed)))


def frechet_symbreak(n: int, d: int) -> float:
    from symbreak.metrics.frechet import frechet_distance
    from symbreak.moments.one_pass import Moments

    return frechet_distance(*(Moments.fit(stream(n, d, s), parts=1) for s in (1, 2)))


def frechet_torch_fidelity(n: int, d: int) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    both = [fid_features_to_statistics(whole(n, d, s)) for s in (1, 2)]
    return fid_statistics_to_metric(*both, False)["frechet_inception_distance"]


def frechet_torchmetrics(n: int, d: int) -> float:
    from torchmetrics.image.fid import _compute_fid

    # The class insists on images; this is what it adds up and computes, in its double precision.
    sums = []
    for s in (1, 2):
        total, products = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        for x in stream(n, d, s):
            total += x.double().sum(0)
            products += x.double().T @ x.double()
        mean = total / n
        sums += [mean, (products - n * torch.outer(mean, mean)) / (n - 1)]
    return float(_compute_fid(*sums))


def frechet_dense(n: int, d: int) -> float:
    import scipy.linalg

    a, b = (whole(n, d, s).double().numpy() for s in (1, 2))
    p, q, gap = np.cov(a, rowvar=False), np.cov(b, rowvar=False), a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(p) + np.trace(q) - 2 * np.trace(scipy.linalg.sqrtm(p @ q)).real)


def kernel_symbreak(n: int, d: int) -> float:
    from symbreak.metrics.kernel_distance import kid

    return kid(whole(n, d, 1), whole(n, d, 2), subsets=0)["value"]


def kernel_subsets(n: int, d: int) -> float:
    from symbreak.metrics.kernel_distance import kid

    return kid(whole(n, d, 1), whole(n, d, 2), subsets=20)["subsets_mean"]


def kernel_torch_fidelity(n: int, d: int) -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric

    scores = kid_features_to_metric(whole(n, d, 1), whole(n, d, 2), kid_subsets=20, verbose=False)
    return scores["kernel_inception_distance_mean"]


def kernel_torchmetrics(n: int, d: int) -> float:
    from torchmetrics.image.kid import poly_mmd

    x, y = whole(n, d, 1), whole(n, d, 2)
    g = torch.Generator().manual_seed(0)
    pick = lambda z: z[torch.randperm(n, generator=g)[:1000]]  # noqa: E731
    return float(torch.stack([poly_mmd(pick(x), pick(y)) for _ in range(20)]).mean())


def kernel_dense(n: int, d: int) -> float:
    x, y = (whole(n, d, s).double() for s in (1, 2))
    xx, yy, xy = (((a @ b.T) / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    pairs = n * (n - 1)
    return float((xx.sum() - xx.diagonal().sum()) / pairs + (yy.sum() - yy.diagonal().sum()) / pairs - 2 * xy.mean())


def recall_symbreak(n: int, d: int) -> float:
    from symbreak.metrics.coverage import precision_recall

    scores = precision_recall(whole(n, d, 1), whole(n, d, 2))
    return scores["precision"] + scores["recall"]


def recall_torch_fidelity(n: int, d: int) -> float:
    from torch_fidelity.metric_prc import prc_features_to_metric

    scores = prc_features_to_metric(whole(n, d, 1), whole(n, d, 2), verbose=False)
    return scores["precision"] + scores["recall"]


def recall_dense(n: int, d: int) -> float:
    x, y = (whole(n, d, s).double() for s in (1, 2))
    xx, yy, xy = torch.cdist(x, x), torch.cdist(y, y), torch.cdist(x, y)
    precision = (xy <= yy.sort(1).values[:, 3]).any(1).double().mean()
    return float(precision + (xx.sort(1).values[:, 3] >= xy.T).any(1).double().mean())


# quantity: its ways, the first one's result is what the others are compared with
TABLES = {
    "Fréchet distance": {
        "symbreak, streamed": (frechet_symbreak, "symbreak"),
        "dense, scipy's matrix root": (frechet_dense, "scipy"),
        "torchmetrics, streamed": (frechet_torchmetrics, "torchmetrics"),
        "torch-fidelity": (frechet_torch_fidelity, "torch_fidelity"),
    },
    "kernel distance, all rows, with interval": {
        "symbreak, in tiles": (kernel_symbreak, "symbreak"),
        "dense, no interval": (kernel_dense, "torch"),
    },
    "kernel distance, 20 subsets of 1,000": {
        "symbreak, with the line above": (kernel_subsets, "symbreak"),
        "torchmetrics": (kernel_torchmetrics, "torchmetrics"),
        "torch-fidelity": (kernel_torch_fidelity, "torch_fidelity"),
    },
    "precision + recall": {
        "symbreak, in blocks": (recall_symbreak, "symbreak"),
        "dense": (recall_dense, "torch"),
        "torch-fidelity": (recall_torch_fidelity, "torch_fidelity"),
    },
}


def one(table: str, way: str, n: int, d: int) -> None:
    """Run one way; print its result, seconds and added peak memory."""
    if importlib.util.find_spec("torchvision") is not None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        importlib.import_module("tests.torchvision_operators")  # it may not fit a CPU build of torch
    work = TABLES[table][way][0]
    work(64, 8) if "subsets" not in table else work(1000, 8)  # libraries are loaded, threads started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    value = work(n, d)
    seconds = time.perf_counter() - began
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"value": value, "seconds": seconds, "mib": added / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("TABLE", "WAY", "N", "D"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one[:2], *(int(v) for v in args.one[2:]))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for table, ways in TABLES.items():
        if table.startswith("Fréchet"):
            n, d = (20_000, 2048) if args.full else (10_000, 512)
        else:
            n, d = (5_000, 2048) if args.full else (2_000, 512)
        print(f"\n{table}: {n:,} samples and {n:,} real images, {d:,} features")
        print(f"{'way':<34}{'seconds':>9}{'ratio':>7}{'MiB added':>11}{'ratio':>7}  result")
        base = None
        for way, (_, package) in ways.items():
            if importlib.util.find_spec(package) is None:
                print(f"{way:<34}skipped: {package} is not installed")
                continue
            call = [sys.executable, __file__, "--one", table, way, str(n), str(d)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                print(f"{way:<34}failed: {done.stderr.strip().splitlines()[-1][:80]}")
                continue
            measured = json.loads(done.stdout.splitlines()[-1])
            base = base or measured
            ratios = [f"{measured[k] / base[k]:.2f}x" if base[k] > 0 else "-" for k in ("seconds", "mib")]
            print(
                f"{way:<34}{measured['seconds']:9.2f}{ratios[0]:>7}{measured['mib']:11.0f}{ratios[1]:>7}  "
                f"{measured['value']:.8g}"
            )


if __name__ == "__main__":
    main()
