"""Moments in one pass, against noising the images again for every start level.

    python benchmarks/moments.py            two of the eleven levels are timed and scaled, as it says
    python benchmarks/moments.py --full     all eleven levels

Data: CIFAR-10 train (50,000 x 3,072) from $SYMBREAK_DATA, else synthetic 8-bit images of the same size.
Count first: a covariance of n rows in d dimensions is n d (d + 1) multiply-adds with one triangle only (0.47 T
here); noising adds n d normal draws and one covariance a level, eleven times over.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from symbreak.data.readers import images
from symbreak.moments.one_pass import Moments

LEVELS = 11


def timed(work):
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def load() -> tuple[str, np.ndarray]:
    file = Path(os.environ.get("SYMBREAK_DATA") or "/nonexistent") / "cifar10-train.parquet"
    if file.is_file():
        return "CIFAR-10 train", np.concatenate(list(images(file).blocks()))
    rng = np.random.default_rng(0)
    return "synthetic", rng.integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8)


def main() -> None:
    name, raw = load()
    n, d = len(raw), raw[0].size
    x = raw.reshape(n, d).astype(np.float64) / 127.5 - 1
    rng = np.random.default_rng(0)
    run = LEVELS if "--full" in sys.argv else 2
    print(f"{name}: {n:,} x {d:,}, {torch.get_num_threads()} threads")

    def noise_and_cov(alpha_bar: float) -> np.ndarray:
        noised = rng.standard_normal(x.shape)
        noised *= np.sqrt(1 - alpha_bar)
        noised += np.sqrt(alpha_bar) * x
        return np.cov(noised, rowvar=False)

    levels = np.linspace(0.9, 0.1, LEVELS)[:run]
    baseline = sum(timed(lambda a=a: noise_and_cov(a))[0] for a in levels) * LEVELS / run
    product, gram = timed(lambda: x.T @ x)
    stream = [x[i : i + 2048] for i in range(0, n, 2048)]

    def fit(source: object) -> Moments:
        m = Moments.fit(source)
        _ = m.cov  # the parts are put together on first use: that belongs to the time
        return m

    ours, fitted = timed(lambda: fit(stream))
    eight_bit = images(raw, batch_size=4096)
    exact, bits = timed(lambda: fit(eight_bit))

    mean = x.mean(0)
    truth = (gram - n * np.outer(mean, mean)) / (n - 1)
    scale = np.abs(truth).max()
    said = "all measured" if run == LEVELS else f"{run} of {LEVELS} levels measured, scaled"
    print(f"{'way':<52}{'seconds':>9}{'ratio':>8}  largest error")
    print(f"{'noise + numpy.cov for 11 levels (' + said + ')':<52}{baseline:9.1f}{'':>8}")
    print(f"{'one float64 X^T X':<52}{product:9.2f}")
    for label, seconds, m in (("Moments.fit, float64", ours, fitted), ("Moments.fit, 8-bit exact", exact, bits)):
        error = np.abs(m.cov.numpy() - truth).max() / scale
        print(f"{label:<52}{seconds:9.2f}{baseline / seconds:7.1f}x  {error:.1e} relative")
    print(f"float64 fit / X^T X: {ours / product:.2f}     8-bit fit / X^T X: {exact / product:.2f}")


if __name__ == "__main__":
    main()
