"""Cloning of two Gaussians: one growing batch with shared trunks, against a whole run for every branch time.

d = 1,024, means +-ones(d), variance 1, 19 branch times tau = 1, 1.5 ... 10 as published (arXiv:2402.18491),
2,000 pairs, every trajectory from tau = 10. The baseline runs the same code once for each branch time, so
each pair's trunk is simulated 19 times. Calls are states given to the denoiser, which do not depend on the
machine; seconds are CPU seconds of one thread.

    python benchmarks/cloning_world.py [--pairs 2000] [--steps 100] [--dim 1024]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from symbreak.laws import Mixture
from symbreak.phases.speciation import clone_agreement, cloning_probability


class Counted:
    """A law that counts the states its denoiser is asked about."""

    def __init__(self, law: Mixture) -> None:
        self.law, self.shape, self.states = law, law.shape, 0

    def sample(self, *args, **kwargs) -> torch.Tensor:
        return self.law.sample(*args, **kwargs)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.states += len(x)
        return self.law.denoise(x, sigma)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--baseline-pairs", type=int, default=250, help="pairs the baseline is timed on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    d = args.dim
    law = Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)
    sigma = np.sqrt(np.expm1(2 * np.arange(1.0, 10.01, 0.5)))

    def side(images: torch.Tensor) -> torch.Tensor:
        return (images.sum(1) > 0).long()

    def run(levels: np.ndarray, pairs: int, seed: int) -> tuple[np.ndarray, int, float]:
        counted, begin = Counted(law), time.process_time()
        curve = clone_agreement(
            counted,
            levels,
            side,
            pairs=pairs,
            steps=args.steps,
            seeds=seed,
            sigma_start=float(sigma.max()),
            sigma_end=0.02,
            dtype=torch.float32,
        )
        return curve.value, counted.states, time.process_time() - begin

    few = min(args.baseline_pairs, args.pairs)
    ours, states, seconds = run(sigma, args.pairs, 0)
    each = [run(sigma[i : i + 1], few, 1 + i) for i in range(len(sigma))]
    share = args.pairs / few
    base_states, base_seconds = sum(e[1] for e in each) * share, sum(e[2] for e in each) * share
    exact = cloning_probability(law, sigma).value
    error = np.maximum(np.sqrt(exact * (1 - exact) / args.pairs), max(1e-3, 1 / args.pairs))
    print(f"two Gaussians, d = {d}, {args.pairs} pairs, {len(sigma)} branch times, {args.steps} steps")
    print(f"{'':34}{'states denoised':>18}{'CPU s':>10}")
    print(f"{'shared trunks, one growing batch':34}{states:18,}{seconds:10.1f}")
    print(f"{'a whole run for every branch time':34}{base_states:18,.0f}{base_seconds:10.1f}")
    print(f"{'ratio':34}{base_states / states:18.2f}{base_seconds / seconds:10.2f}")
    if few < args.pairs:
        print(f"the baseline ran {few} pairs; its figures are scaled by {share:g}")
    print(f"largest deviation from the exact phi: {np.abs((ours - exact) / error).max():.1f} standard errors")


if __name__ == "__main__":
    main()
