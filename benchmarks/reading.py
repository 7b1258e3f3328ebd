"""Reading a folder of JPEGs against bare Pillow, which decodes the same files with as many processes.

    python benchmarks/reading.py                     # 100,000 files of 64 x 64, 2 % grey; five minutes on 2 cores
    python benchmarks/reading.py --quick             # 4,000 files: no evidence
    python benchmarks/reading.py --folder my/jpegs   # keeps the folder, and takes the one that is there

The folder is in a temporary place that goes away. symbreak: `sb.images(folder)`, then all blocks of bytes in order
([B, 3, 64, 64]), then notes and fingerprint, on `torch.get_num_threads()` threads of one process. Pillow:
`Image.open(path).convert("RGB")` to an array of numpy, on as many forked processes, which hand nothing over. Both are
measured in turn, after a first round that brings the files into memory and is not counted; the ratio is that of the
medians, and the range that of the rounds. Peak memory is that of this process, in MB, before the passes and after them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import symbreak as sb

SIDE, GREY_EVERY = 64, 50
CHUNK = 500  # files that a process of Pillow's takes at a time


def make(folder: Path, count: int) -> None:
    """JPEGs of smooth noise, as many in a sub-folder as a file system likes; the same for the same count."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 1000:04d}" / f"{i:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.convert("L" if i % GREY_EVERY == 7 else "RGB").save(place, quality=90)


def decoded(paths: list[Path]) -> int:
    """Bytes that bare Pillow makes of some files."""
    total = 0
    for path in paths:
        with Image.open(path) as picture:
            total += np.asarray(picture.convert("RGB")).nbytes
    return total


def with_pillow(paths: list[Path], processes: int) -> float:
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    began = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        total = sum(pool.imap_unordered(decoded, chunks))
    seconds = time.perf_counter() - began
    assert total == len(paths) * 3 * SIDE**2
    return seconds


def with_symbreak(folder: Path, count: int) -> tuple[float, float, str]:
    """Seconds of the pass, seconds of all, the note on grey pictures."""
    began = time.perf_counter()
    data = sb.images(folder)
    opened = time.perf_counter()
    total = sum(block.nbytes for block in data.blocks())
    read = time.perf_counter()
    note = data.notes[0]
    data.fingerprint()
    assert total == count * 3 * SIDE**2
    return read - opened, time.perf_counter() - began, note


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files are, or are put")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    count, rounds = (4_000, 2) if options.quick else (options.count, options.rounds)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "jpegs"
        if not folder.exists():
            make(folder, count)
        paths = sorted(folder.rglob("*.jpg"))
        count, workers = len(paths), torch.get_num_threads()
        print(f"{count:,} JPEGs of {SIDE} x {SIDE}, {sum(p.stat().st_size for p in paths) / count:,.0f} bytes each")
        with_pillow(paths, workers)
        before = peak()
        bare, passes, whole = [], [], []
        for _ in range(rounds):
            bare.append(with_pillow(paths, workers))
            read, everything, note = with_symbreak(folder, count)
            passes.append(read)
            whole.append(everything)
    print(note)
    print(f"\n{workers} processes of Pillow, {workers} threads of symbreak; medians of {rounds} rounds\n")
    print("| what | seconds | files/s | ratio to Pillow | of the rounds |\n|---|---|---|---|---|")
    middle = statistics.median(bare)
    for name, seconds in (("Pillow", bare), ("one pass", passes), ("opening, pass, notes, fingerprint", whole)):
        each = [s / b for s, b in zip(seconds, bare, strict=True)]
        s = statistics.median(seconds)
        print(f"| {name} | {s:.3g} | {count / s:,.0f} | {s / middle:.2f} | {min(each):.2f} to {max(each):.2f} |")
    print(f"\npeak memory {peak():,.0f} MB, before the first pass {before:,.0f} MB")


if __name__ == "__main__":
    main()
