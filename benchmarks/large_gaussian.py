"""A rank-100 Gaussian start for images too large for a covariance, against plain products of the same count.

    python benchmarks/large_gaussian.py               256 x 256 x 3, 120 images, rank 50
    python benchmarks/large_gaussian.py --side 1024   1024 x 1024 x 3 (d = 3.1 million), 250 images, rank 100

The images are made when they are asked for: smoothed noise with the power spectrum 1 / k^2 of photographs. Count
first: a pass multiplies n images by m = r + 10 vectors and back, 4 n d m operations, and the last pass has k = 50
vectors more. Beside the passes stand Gram matrices in float64 and rotations of tall matrices, 6 d m^2 + 4 d m r +
6 d m k for two passes, which do not grow with n. Making the data is timed by itself. Afterwards, outside the
measured memory, the n x n Gram matrix of the same images gives the exact spectrum of the empirical covariance, and
with it the exact divergence beside the certificate.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

import numpy as np
import torch

from symbreak.laws import Gaussian
from symbreak.moments.low_rank import OVERSAMPLING, PROBES
from symbreak.moments.one_pass import Moments
from symbreak.noise import generator

LIMIT = 8.0  # GB
BATCH = 8


class Smooth:
    """Smoothed noise [B, 3, side, side], pixel standard deviation about 0.5; the same images in every walk."""

    def __init__(self, side: int, count: int, seed: int = 0) -> None:
        self.side, self.count, self.seed, self.seconds = side, count, seed, 0.0
        k = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)) * side
        self.filter = 1.0 / k.clamp(min=1.0)
        self.filter[0, 0] = 0.0
        full = torch.fft.irfft2(self.filter.square(), s=(side, side))[0, 0]
        self.filter *= 0.5 / math.sqrt(float(full))

    def __iter__(self):
        for start in range(0, self.count, BATCH):
            began = time.perf_counter()
            batch = torch.empty(min(BATCH, self.count - start), 3, self.side, self.side)
            for i in range(len(batch)):
                noise = torch.randn(3, self.side, self.side, generator=generator(self.seed, start + i))
                batch[i] = torch.fft.irfft2(torch.fft.rfft2(noise) * self.filter, s=(self.side, self.side))
            self.seconds += time.perf_counter() - began
            yield batch


def rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gemm_seconds(block: int, d: int, wide: int, work: float) -> float:
    """Seconds that plain float32 products of this shape take for ``work`` operations."""
    g = generator(1)
    d = min(d, 2**20)
    a, b = torch.randn(block, d, generator=g), torch.randn(d, wide, generator=g)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return work / (2.0 * block * d * wide) * best


def exact(data: Smooth, moments, law: Gaussian, sigmas: tuple[float, ...]) -> tuple[np.ndarray, list[float]]:
    """Eigenvalues of the empirical covariance by the Gram matrix, and KL(data's Gaussian || law) at the levels."""
    x = torch.empty(data.count, moments.dim)
    for i, batch in enumerate(data):
        x[i * BATCH : i * BATCH + len(batch)] = batch.reshape(len(batch), -1)
    x -= moments.mean.reshape(-1).float()
    gram = torch.zeros(data.count, data.count, dtype=torch.float64)
    for a in range(0, moments.dim, 2**17):
        part = x[:, a : a + 2**17].double()
        gram += part @ part.T
    values = np.maximum(np.linalg.eigvalsh(gram.numpy())[::-1][: data.count - 1], 0.0) / (data.count - 1)
    eigenvalues, nats = law.eigenvalues.numpy(), []
    for s in sigmas:
        log_law = np.log1p(eigenvalues / s**2).sum() + (law.dim - law.rank) * math.log1p(law.floor / s**2)
        nats.append(0.5 * float(log_law - np.log1p(values / s**2).sum()))
    return values, nats


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--starts", type=int, default=16)
    args = parser.parse_args()
    large = args.side >= 1024
    n = args.images or (250 if large else 120)
    r = args.rank or (100 if large else 50)
    data, d, m = Smooth(args.side, n), 3 * args.side**2, r + OVERSAMPLING
    print(f"{n} images of 3 x {args.side} x {args.side} (d = {d:,}), rank {r}, {args.passes} passes, ", end="")
    print(f"{torch.get_num_threads()} threads")

    began = time.perf_counter()
    moments = Moments.fit(data, rank=r, passes=args.passes)
    fit, making = time.perf_counter() - began, data.seconds
    law = Gaussian(moments)
    noise = torch.randn(args.starts, *law.shape, generator=generator(2))
    began = time.perf_counter()
    starts = law.transport(noise, 10.0)
    draw, peak = time.perf_counter() - began, rss()
    passes = 4.0 * n * d * (args.passes * m + PROBES)
    tall = (4.0 * args.passes - 2.0) * d * m * m + 4.0 * d * m * r + 6.0 * d * m * PROBES
    bound = gemm_seconds(max(1, min(n, 2**26 // d)), d, m, passes)
    print(f"  fit {fit:.1f} s, of them {making:.1f} s making the images; {args.starts} starts {draw:.2f} s")
    print(f"  peak memory {peak:.2f} GB of {LIMIT:.0f} GB")
    print(f"  products {passes / 1e12:.2f} T operations, {bound:.1f} s as plain float32 products in this run")
    print(
        f"  (fit - making) / plain products = {(fit - making) / bound:.2f}; with the {tall / 1e12:.2f} T operations of"
    )
    ratio = (fit - making) / (bound * (1 + tall / passes))
    print(f"  tall Gram matrices and rotations at the same speed {ratio:.2f}")
    print(f"  drawing: {4.0 * args.starts * d * r / draw / 1e9:.0f} G operations/s")
    gap = starts.flatten(1) - moments.mean.reshape(-1).float()
    energy = float(gap.square().sum(dtype=torch.float64)) / args.starts
    print(f"  mean |x - mu|^2 of the starts / (tr C + d sigma^2) = {energy / (moments.trace + 100.0 * d):.4f}")
    assert peak < LIMIT, f"peak memory {peak:.2f} GB"
    del noise, starts, gap

    sigmas = tuple(math.sqrt(float(moments.eigenvalues[0])) * f for f in (0.03, 0.1, 0.3, 1.0))
    values, nats = exact(data, moments, law, sigmas)
    ritz = moments.eigenvalues.numpy()
    at = sorted({0, 9, r // 2 - 1, r - 1})
    print("  eigenvalue   exact       Ritz        Ritz / exact")
    for i in at:
        print(f"  {i + 1:10d}   {values[i]:<10.5g}  {ritz[i]:<10.5g}  {ritz[i] / values[i]:.4f}")
    print(f"  left out: R {moments.remainder:.5g} of {moments.trace:.5g}; largest exact {values[r]:.4g} (the next")
    print(f"  eigenvalue), certified <= {moments.largest_dropped:.4g}")
    print("  sigma / sqrt(L_1)   sigma     KL exact    certified   ratio")
    for f, s, k in zip((0.03, 0.1, 0.3, 1.0), sigmas, nats):
        c = law.certificate(s).nats
        print(f"  {f:<18g}  {s:<8.4g}  {k:<10.4g}  {c:<10.4g}  {c / k:.2f}")
        assert c >= k
    print(f"  {law.certificate(sigmas[-2]).sentence()}")


if __name__ == "__main__":
    main()
