"""Drawing 1,000 late starts at d = 3,072, set-up included, against torch's MultivariateNormal.

    python benchmarks/starts.py

MultivariateNormal factors one covariance (Cholesky, d^3 / 3) for one level; ours diagonalises once (about 9 d^3)
and then serves every level with two products of 2 n d^2 operations. So it is slower for a single level
and ahead once several levels are tried, which is what choosing a start does. Both are printed.
"""

from __future__ import annotations

import time

import torch

from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments

N, SHAPE, SIGMAS = 1000, (3, 32, 32), (8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0)


def timed(work):
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def main() -> None:
    d = 3 * 32 * 32
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * d, d, generator=g) * torch.linspace(3, 0.1, d)
    moments = Moments.fit([x])
    mean, cov = moments.mean.reshape(-1), moments.cov
    noise = torch.randn(N, *SHAPE, generator=g)
    moments.shape = SHAPE

    def theirs(sigma):
        law = torch.distributions.MultivariateNormal(mean, cov + sigma**2 * torch.eye(d, dtype=torch.float64))
        return law.sample((N,))

    setup, law = timed(lambda: Gaussian(moments))
    law.transport(noise[:2], 1.0)
    draws = [timed(lambda s=s: law.transport(noise, s))[0] for s in SIGMAS]
    other = [timed(lambda s=s: theirs(s))[0] for s in SIGMAS[:3]]
    one = sum(other) / len(other)
    per = sum(draws) / len(draws)
    print(f"{N:,} starts at d = {d:,}, {torch.get_num_threads()} threads, seconds")
    print(f"  MultivariateNormal, set-up and draw, one level (mean of {len(other)}): {one:.2f}")
    print(f"  ours: set-up once {setup:.2f}, draw {per:.3f} a level")
    print(f"  one level:  MultivariateNormal / ours = {one / (setup + per):.2f}")
    print(f"  {len(SIGMAS)} levels:  MultivariateNormal / ours = {len(SIGMAS) * one / (setup + sum(draws)):.1f}")
    print(f"  every further level: {one / per:.0f}x")


if __name__ == "__main__":
    main()
