"""Time and memory against the number of images and their size, and two processes against one.

    python benchmarks/scale.py                 # up to a million images, twenty minutes or more on 2 cores
    python benchmarks/scale.py --quick         # small sizes, about a minute: no evidence
    python benchmarks/scale.py --out table.md  # also writes the tables

Images are synthetic 8-bit noise, made block by block as they are asked for: nobody ever holds them, and the time to
make them is taken off. Every number of images runs in a fresh process, whose peak is its own. fit: `Moments.fit`. fid:
streamed statistics of 256 features (a random projection, cut at zero) and a Fréchet distance; nothing but the extractor
differs from FID. collapse: `excess_entropy` of the data set at 19 levels, 1,000 queries. nearest: the two nearest
images of 1,000 queries, as `audit` looks for them. Both are allowed 256 MiB: images that do not fit are in a file.
Exponents are least-squares slopes of log time over log size from the second size on (the first one shows what a call
costs at all), with 95 % Student-t intervals. The machine's limit is a square float32 product in the same run and number
of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

FEATURES = 256
LEVELS = 19
MEMORY = 2**28
BLOCK = 4096
LARGE = {
    "fit": [1_000, 10_000, 100_000, 1_000_000],
    "fid": [1_000, 10_000, 100_000, 1_000_000],
    "collapse": [1_000, 10_000, 100_000, 1_000_000],
    "nearest": [1_000, 10_000, 100_000, 1_000_000],
    "sides": [8, 16, 32, 64],
    "side": 28,
    "count": 20_000,
    "queries": 1_000,
    "repeats": 3,
    "shared": {"fit": 200_000, "sample": 2_000, "collapse": 20_000, "nearest": 50_000},
}
SMALL = {
    "fit": [1_000, 10_000, 40_000],
    "fid": [1_000, 10_000, 40_000],
    "collapse": [1_000, 3_000, 6_000],
    "nearest": [1_000, 10_000, 40_000],
    "sides": [8, 12, 16, 24],
    "side": 16,
    "count": 4_000,
    "queries": 256,
    "repeats": 2,
    "shared": {"fit": 40_000, "sample": 192, "collapse": 3_000, "nearest": 10_000},
}


# --- what is measured, in a process of its own ----------------------------------------------------


class Synthetic:
    """A stream of 8-bit images with the face of `Images`: a block is a pool of noise under a mask of its own."""

    integer, scale, offset = True, 127.5, -127.5

    def __init__(self, count, side, first=0, pool=None):
        import numpy as np

        self.count, self.side, self.first = count, side, first
        self.pool = (
            np.random.default_rng(0).integers(0, 256, (BLOCK, 1, side, side), np.uint8) if pool is None else pool
        )
        self.shape = (1, side, side)

    def __len__(self):
        return self.count

    def rows(self, first, last):
        return Synthetic(last - first, self.side, self.first + first, self.pool)

    def blocks(self):
        import numpy as np

        done = self.first
        while done < self.first + self.count:
            block, at = divmod(done, BLOCK)
            size = min(BLOCK - at, self.first + self.count - done)
            mask = np.random.default_rng([1, block]).integers(0, 256, self.shape, np.uint8)
            yield self.pool[at : at + size] ^ mask
            done += size

    def __iter__(self):
        import torch

        return (torch.from_numpy(b).float().add_(self.offset).div_(self.scale) for b in self.blocks())


class Projection:
    """Cheap features: a fixed random projection, cut at zero."""

    name, batch = f"random-{FEATURES}", 1024

    def __init__(self, dim, features=FEATURES):
        import torch

        self.weight = torch.randn(dim, features, generator=torch.Generator().manual_seed(0)) / math.sqrt(dim)

    def __call__(self, x):
        return (x.flatten(1) @ self.weight).relu_()


def fit(count, side, queries):
    import symbreak as sb

    return sb.Moments.fit(Synthetic(count, side)).cov  # the parts are put together on first use: part of the time


def fid(count, side, queries, features=FEATURES):
    import symbreak as sb
    from symbreak.metrics.reference import statistics

    extract = Projection(side * side, features)
    statistics_of = [statistics(extract, Synthetic(n, side), rows=1000).whole for n in (2 * features, count)]
    return sb.frechet_distance(*statistics_of)


def points(count, side):
    """Images of which a rank holds its part, as bytes."""
    import torch

    from symbreak.runtime.ranks import own_rows, shares
    from symbreak.runtime.rows import Shards

    stream = Synthetic(count, side)

    def scaled(raw):
        return torch.from_numpy(raw).float().add_(stream.offset).div_(stream.scale)

    return Shards(own_rows(stream)[0].blocks(), shares(count), MEMORY, decode=scaled)


def collapse(count, side, queries):
    import numpy as np

    import symbreak as sb
    from symbreak.laws.pairwise_weights import SharedPoints

    law = SharedPoints(points(count, side), MEMORY)
    sb.excess_entropy(law, np.geomspace(0.5, 30.0, LEVELS), queries=queries)


def nearest(count, side, queries):
    import torch

    from symbreak.laws.nearest_neighbours import neighbours
    from symbreak.runtime.run import Run

    rows = points(count, side)
    queried = 2 * torch.rand(queries, *rows.shape[1:], generator=torch.Generator().manual_seed(1)) - 1
    neighbours(queried, rows, 2, run=Run(memory=MEMORY))


def sample(count, side, queries):
    import symbreak as sb
    from symbreak.start.late_start import standard_start

    pipe = sb.load_pipeline("digits")
    sb.generate(pipe.unet, standard_start(sb.scheduler("dpm++2m", like=pipe.scheduler), 5), range(count))


def walk(count, side, task):
    """Seconds to make the images as a task takes them."""
    stream, began = Synthetic(count, side), time.perf_counter()
    for _ in stream if task == "fid" else stream.blocks():
        pass
    return time.perf_counter() - began


def work(task, count, side, queries):
    """Floating-point operations that cannot be saved: one triangle of a covariance, the products."""
    d = side * side
    return {
        "fit": count * d * (d + 1.0),
        "fid": count * (2.0 * d * FEATURES + FEATURES * (FEATURES + 1.0)),
        "collapse": 4.0 * count * min(queries, count) * d,
        "nearest": 2.0 * count * queries * d,
    }[task]


TASKS = {"fit": fit, "fid": fid, "collapse": collapse, "nearest": nearest, "sample": sample}


def peak():
    """Largest resident memory of this process so far, in bytes; exec starts it afresh, unlike getrusage's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def timed(task, count, side, queries, repeats, net):
    """Seconds of every repeat; ``net`` of making the images."""
    out = []
    for _ in range(repeats):
        making = walk(count, side, task) if net else 0.0
        began = time.perf_counter()
        TASKS[task](count, side, queries)
        out.append(max(1e-6, time.perf_counter() - began - making))
    return out


def child(job):
    """Measure what a job says; the answer is the last line of stdout."""
    import torch

    from symbreak.runtime.ranks import joined

    measured = []
    with joined() as (rank, _), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job["what"] == "gemm":
            a = torch.randn(2048, 2048)
            a @ a
            times = []
            for _ in range(8):
                began = time.perf_counter()
                a @ a
                times.append(time.perf_counter() - began)
            measured = [2 * 2048**3 / min(times)]
        else:
            # Libraries are loaded, and memory is held, before anything is measured.
            for task, side in {task: side for task, _, side in job["runs"]}.items():
                TASKS[task](300, side, 64)
            before = peak()
            for task, count, side in job["runs"]:
                seconds = timed(task, count, side, job["queries"], job["repeats"], job["net"])
                measured.append({"task": task, "count": count, "side": side, "seconds": seconds})
            measured = {"runs": measured, "before": before, "peak": peak()}
    if rank == 0:
        print(json.dumps({"measured": measured, "threads": torch.get_num_threads()}))


# --- all of it ------------------------------------------------------------------------------------


def in_a_process(job, ranks=1, threads=None):
    """The answer of fresh processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = [sys.executable, __file__, "--child", json.dumps(job)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    place |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(
            run,
            env={**os.environ, **place, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit(f"{job} ended with {[one.returncode for one in started]}")
    return json.loads(said[0].splitlines()[-1])


def slope(sizes, seconds):
    """Exponent of time in size, and half its 95 % interval, from all repeats of all sizes but the first."""
    from scipy import stats

    x = [math.log(s) for s, several in zip(sizes[1:], seconds[1:]) for _ in several]
    y = [math.log(t) for several in seconds[1:] for t in several]
    fit = stats.linregress(x, y)
    return fit.slope, stats.t.ppf(0.975, len(x) - 2) * fit.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the tables as markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    plan = SMALL if args.quick else LARGE
    settings = {"what": "runs", "queries": plan["queries"], "repeats": plan["repeats"], "net": True}
    lines = []

    def say(line=""):
        print(line, flush=True)
        lines.append(line)

    gemm = in_a_process({"what": "gemm"})
    limit, side = gemm["measured"][0], plan["side"]
    say(f"{gemm['threads']} thread(s), {os.cpu_count()} cores; float32 product {limit / 1e9:.0f} GFLOP/s")
    say()
    say(f"Images of {side} x {side}; `seconds` is the median of {plan['repeats']}, without making the images.")
    say()
    say("| task | images | seconds | us an image | of the limit | peak memory, MB | of it before, MB |")
    say("|---|---|---|---|---|---|---|")
    exponents = {}
    for task in ("fit", "fid", "collapse", "nearest"):
        several = []
        for count in plan[task]:
            measured = in_a_process({**settings, "runs": [[task, count, side]]})["measured"]
            seconds = sorted(measured["runs"][0]["seconds"])
            middle = seconds[len(seconds) // 2]
            share = work(task, count, side, plan["queries"]) / middle / limit
            say(
                f"| {task} | {count:,} | {middle:.3g} | {middle / count * 1e6:.3g} | {share:.1%} | "
                f"{measured['peak'] / 1e6:.0f} | {measured['before'] / 1e6:.0f} |"
            )
            several.append(seconds)
        exponents[task, "images"] = slope(plan[task], several)
    say()
    say(f"{plan['count']:,} images, by their size d (features of FID stay {FEATURES}).")
    say()
    say("| task | d | seconds | of the limit |")
    say("|---|---|---|---|")
    tasks = ("fit", "fid", "collapse", "nearest")
    runs = [[task, plan["count"], s] for task in tasks for s in plan["sides"]]
    measured = in_a_process({**settings, "runs": runs})["measured"]["runs"]
    for run in measured:
        middle = sorted(run["seconds"])[len(run["seconds"]) // 2]
        share = work(run["task"], run["count"], run["side"], plan["queries"]) / middle / limit
        say(f"| {run['task']} | {run['side'] ** 2:,} | {middle:.3g} | {share:.1%} |")
    for task in tasks:
        several = [run["seconds"] for run in measured if run["task"] == task]
        exponents[task, "d"] = slope([s * s for s in plan["sides"]], several)
    say()
    say("| task | time grows with | exponent |")
    say("|---|---|---|")
    for (task, what), (value, half) in exponents.items():
        say(f"| {task} | {what} | {value:.2f} +- {half:.2f} |")
    say()
    runs = [[task, count, side] for task, count in plan["shared"].items()]
    one, two = (
        in_a_process({**settings, "net": False, "runs": runs}, ranks, threads=1)["measured"]["runs"] for ranks in (1, 2)
    )
    say("Processes of one thread each, joined by gloo. Making the images is shared, too, and included in the time.")
    say()
    say("| task | count | one process, s | two, s | ratio |")
    say("|---|---|---|---|---|")
    for a, b in zip(one, two):
        alone, both = (min(r["seconds"]) for r in (a, b))
        say(f"| {a['task']} | {a['count']:,} | {alone:.3g} | {both:.3g} | {alone / both:.2f} |")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
