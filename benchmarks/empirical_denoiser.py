"""The data set's posterior mean against the machine's float32 matrix products, a loop and a dense version.

    python benchmarks/empirical_denoiser.py [--points 50000] [--queries 512] [--threads 2] [--json]

CIFAR-10 (d = 3,072) from $SYMBREAK_DATA where it is set, else a synthetic set of the same size that lies near
a 64-dimensional surface. The share is that of two products [queries, d] x [d, points] at the rate measured
beside it; above 100 % the second product was saved (few points had weight). The per-query loop runs on a
part of the queries and is scaled up.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from symbreak.laws import Empirical
from symbreak.noise import generator


def data(n: int) -> tuple[str, torch.Tensor]:
    folder = os.environ.get("SYMBREAK_DATA")
    file = Path(folder) / "cifar10-train.parquet" if folder else None
    if file is not None and file.is_file():
        from symbreak.data.readers import images

        rows: list[torch.Tensor] = []
        have = 0
        for batch in images(str(file)):
            rows.append(batch[: n - have])
            have += len(rows[-1])
            if have >= n:
                break
        return "CIFAR-10", torch.cat(rows).reshape(have, -1)
    g = generator(0)
    out = torch.empty(n, 3072)
    lift = torch.randn(64, 3072, generator=g) / 8
    for i in range(0, n, 5000):
        rows_here = torch.randn(min(5000, n - i), 64, generator=g) @ lift
        out[i : i + 5000] = torch.tanh(rows_here) + 0.05 * torch.randn(len(rows_here), 3072, generator=g)
    return "synthetic", out


def seconds(*calls: Callable[[], object], repeat: int = 3) -> list[float]:
    """Shortest of a few runs of each; in turn, so that a machine busy with other work slows all alike."""
    best = [float("inf")] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def dense(points: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """One softmax over all points at once, float32, as one would write it first."""
    logits = -(torch.cdist(x, points) ** 2) / (2 * sigma**2)
    return torch.softmax(logits, dim=1) @ points


def loop(points: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """One query after the other, by differences (float32 sums)."""
    out = torch.empty_like(x)
    for i, one in enumerate(x):
        w = torch.softmax(-((points - one) ** 2).sum(1) / (2 * sigma**2), dim=0)
        out[i] = w @ points
    return out


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    gap = torch.linalg.vector_norm(out.double() - reference, dim=1)
    return float((gap / torch.linalg.vector_norm(reference, dim=1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0])
    parser.add_argument("--looped", type=int, default=4, help="queries of the per-query loop")
    parser.add_argument("--checked", type=int, default=16, help="queries compared with float64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="timed runs, of which the shortest counts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    name, points = data(args.points)
    n, d = points.shape
    law = Empirical(points)
    g = generator(1)
    clean = points[torch.randint(n, (args.queries,), generator=g)]
    noise = torch.randn(clean.shape, generator=g)

    # The machine's own rate for the very products that are needed: q k^T and w v.
    block = points[: min(n, 32768)]
    logits = torch.empty(args.queries, len(block))
    flops = 4 * args.queries * len(block) * d

    def products() -> None:
        torch.mm(clean, block.T, out=logits)
        torch.mm(logits, block)

    law.denoise(clean[:2], 1.0)  # the centred copy of the data is made once
    rows = []
    for sigma in args.sigmas:
        x = clean + sigma * noise
        measured, took, all_at_once = seconds(
            products,
            lambda x=x, sigma=sigma: law.denoise(x, sigma),
            lambda x=x, sigma=sigma: dense(points, x, sigma),
            repeat=args.repeat,
        )
        rate = flops / measured
        ideal = 4 * args.queries * n * d / rate
        few = x[: args.looped]
        looped = seconds(lambda few=few, sigma=sigma: loop(points, few, sigma), repeat=1)[0]
        one_by_one = looped * len(x) / len(few)
        part = x[: args.checked]
        exact = law.denoise(part.double(), sigma)
        rows.append(
            {
                "sigma": sigma,
                "gemm_gflops": rate / 1e9,
                "two_products_seconds": ideal,
                "seconds": took,
                "gemm_share": ideal / took,
                "error": error(law.denoise(part, sigma), exact),
                "dense_seconds": all_at_once,
                "dense_error": error(dense(points, part, sigma), exact),
                "loop_seconds": one_by_one,
            }
        )
    result = {
        "data": name,
        "points": n,
        "dim": d,
        "queries": args.queries,
        "threads": args.threads,
        "loop_measured_on": args.looped,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{name}: {n:,} points, d = {d:,}, {args.queries} queries, {args.threads} threads")
    print(f"loop: {args.looped} queries, scaled up; errors: the worst of {args.checked}, against float64")
    print("  sigma  GFLOP/s   ours s  of GEMM    error   dense s    error    loop s  ours/dense  ours/loop")
    for r in rows:
        ours, other, slow = r["seconds"], r["dense_seconds"], r["loop_seconds"]
        print(
            f"{r['sigma']:7g} {r['gemm_gflops']:8.0f} {ours:8.2f} {r['gemm_share']:8.0%} {r['error']:8.1e} "
            f"{other:9.2f} {r['dense_error']:8.1e} {slow:9.1f} {other / ours:10.2f}x {slow / ours:9.1f}x"
        )


if __name__ == "__main__":
    main()
