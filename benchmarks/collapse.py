"""The excess entropy of MNIST at 19 levels: one pass of two products against a product a level and against loops.

    python benchmarks/collapse.py            # 60,000 x 784, 10,000 queries; SYMBREAK_DATA has MNIST, else synthetic
    python benchmarks/collapse.py --quick    # 6,000 points, 512 queries

Baselines give the same numbers (checked here). The loops are measured on a few queries and levels and extrapolated;
everything else runs in full. One run, one number of threads; ratios are what counts.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

import symbreak as sb
from symbreak.laws.pairwise_weights import POINTS, QUERIES, overlaps
from symbreak.noise import generator

LEVELS = np.geomspace(0.5, 30.0, 19)


def data(points):
    root = os.environ.get("SYMBREAK_DATA")
    if root and (Path(root) / "mnist-train.parquet").exists():
        return sb.images(str(Path(root) / "mnist-train.parquet"), limit=points).tensor(), "MNIST"
    return torch.rand(points, 1, 28, 28, generator=generator(0)) * 2 - 1, "uniform noise (set SYMBREAK_DATA for MNIST)"


def timed(run):
    began = time.perf_counter()
    value = run()
    return value, time.perf_counter() - began


def chosen(n, queries):
    return torch.randperm(n, generator=generator(0, n, 1))[:queries]


def noise(n, d, block, count):
    return torch.randn(count, d, generator=generator(0, n, 2, block))


def papers_loop(y, queries, levels):
    """((x - alpha y) ** 2).sum(1) once a query and level, as in the paper's code (VP: x = alpha (y + sigma z))."""
    out = []
    for mu, z in queries:
        for s in levels:
            alpha = 1 / math.sqrt(1 + s * s)
            x = alpha * (y[mu] + s * z)
            apart = ((x - alpha * y) ** 2).sum(1)
            exponent = -(apart - (alpha * s * z).square().sum()) / (2 * (alpha * s) ** 2)
            out.append(float(torch.logsumexp(exponent, 0)))
    return out


def vector_loop(y, half, queries, levels):
    """One matrix-vector product a query and level."""
    out = []
    for mu, z in queries:
        for s in levels:
            x = y[mu] + s * z
            exponent = (y @ x - half - 0.5 * x.square().sum()) / s**2 + 0.5 * z.square().sum()
            out.append(float(torch.logsumexp(exponent, 0)))
    return out


def product_a_level(y, half, mine, z, levels):
    """One matrix product a level and block: the obvious batched form."""
    out = torch.zeros(len(mine), len(levels), dtype=torch.float64)
    for k, s in enumerate(levels):
        x = y[mine] + s * z
        of_itself = 0.5 * (z.square().sum(1) - x.square().sum(1) / s**2)[:, None]
        total = torch.zeros(len(mine), dtype=torch.float64)
        for part in torch.arange(len(y)).split(POINTS):
            block = slice(int(part[0]), int(part[-1]) + 1)
            exponent = torch.addmm(half[block] / -(s**2), x, y[block].T, alpha=1 / s**2)
            total += exponent.add_(of_itself).clamp_(min=-80.0).exp_().sum(1).double()
        out[:, k] = total.log()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n, queries = (6000, 512) if args.quick else (60_000, 10_000)
    points, name = data(n)
    n, d = len(points), points[0].numel()
    law = sb.Empirical(points, memory=2**30)
    y = points.reshape(n, d) - points.reshape(n, d).mean(0)
    half = 0.5 * y.square().sum(1)
    print(f"{name}: {n:,} x {d}, {queries:,} queries, {len(LEVELS)} levels, {torch.get_num_threads()} thread(s)")
    weights, ours = timed(lambda: overlaps(law, LEVELS, queries, tails=False))
    fe = np.logaddexp(0, weights.leave_one_out())
    # The parts of the pass, on one block of queries: two products, and the elementwise work of all levels.
    mine = chosen(n, queries)
    first = mine[:QUERIES]
    z = noise(n, d, 0, len(first))
    both = torch.cat([y[first], z])
    blocks = [y[i : i + POINTS] for i in range(0, n, POINTS)]
    _, products = timed(lambda: [both @ b.T for b in blocks])
    share = queries / len(first)
    single = products * share / 2
    elementwise = max(ours - 2 * single, 0.0)
    ideal = (len(LEVELS) * single + elementwise) / (2 * single + elementwise)
    print(
        f"two products for all levels: {ours:.1f} s (P = {single:.1f} s a product, E = {elementwise:.1f} s elementwise)"
    )
    flop = 2.0 * n * queries * d
    pair = elementwise / n / queries / len(LEVELS) * 1e9
    print(f"  {flop / single / 1e9:.0f} GFLOP/s in the products; {pair:.2f} ns a pair and level")
    some = 2 if not args.quick else 1
    dense, level_time = [], 0.0
    for i in range(some):
        rows = mine[i * QUERIES : (i + 1) * QUERIES]
        value, seconds = timed(lambda r=rows, k=i: product_a_level(y, half, r, noise(n, d, k, len(r)), LEVELS.tolist()))
        dense.append(value.numpy())
        level_time += seconds
    level_time *= queries / sum(len(v) for v in dense)
    worst = np.abs(np.concatenate(dense).mean(0) - fe[: sum(map(len, dense))].mean(0)).max() / d
    print(f"one product a level: {level_time:.1f} s ({some} of {math.ceil(queries / QUERIES)} blocks measured): "
          f"{level_time / ours:.1f} x (ideal {ideal:.1f} x; largest difference of f^e {worst:.1e})")  # fmt: skip
    few = [(int(m), z[i]) for i, m in enumerate(first[:4])]
    levels = LEVELS[[4, 12]].tolist()
    for label, loop in (("paper's loop", lambda: papers_loop(y, few, levels)),
                        ("matrix-vector loop", lambda: vector_loop(y, half, few, levels))):  # fmt: skip
        loop()
        values, seconds = timed(loop)
        total = seconds / (len(few) * len(levels)) * queries * len(LEVELS)
        gap = np.abs(np.array(values) - fe[:4][:, [4, 12]].reshape(-1)).max() / d
        print(f"{label}: {total:,.0f} s (extrapolated from {len(few)} queries, {len(levels)} levels): "
              f"{total / ours:,.0f} x (difference {gap:.1e})")  # fmt: skip


if __name__ == "__main__":
    main()
