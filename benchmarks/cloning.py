"""Clones in one growing batch against the papers' way: every branch time run again, the trunk shared within a pair.

    digits          the bundled network, 20 branch times equally spaced in its 40 steps
    two Gaussians   d = 1,024, means +-ones(d), variance 1; 19 branch times tau = 1, 1.5 ... 10 as published
                    (arXiv:2402.18491), every trajectory from tau = 10, 100 steps; there phi is known

A branch at step k of N (from 0) costs N - 1 - k calls a pair, the trunk N. With the trunk run once that makes

    N + sum_j (N - 1 - k_j)        against        sum_j (2 N - 1 - k_j)

calls a pair: for G branch times spread over all steps 1 + G / 2 against 3 G / 2 times N, a ratio near 3 G / (G + 2).
The baseline is the same code called once for each branch time. Calls are states given to the denoiser, counted, and
do not depend on the machine; seconds are CPU seconds of one thread.

    python benchmarks/cloning.py [--pairs 64] [--steps 40] [--branches 20]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import symbreak as sb
from symbreak.laws import Mixture


class Counted:
    """A denoiser or law that counts the states it is asked about."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.states = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.states += len(x)
        return self.inner(x, sigma)


class CountedLaw(Counted):
    """The same for a law."""

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.states += len(x)
        return self.inner.denoise(x, sigma)


def compare(
    name: str, counted: Counted, levels: np.ndarray, classify: Callable, pairs: int, **settings: Any
) -> tuple[np.ndarray, float, float]:
    """Print one comparison; phi of the growing batch, and the ratios of calls and seconds."""

    def run(at: np.ndarray, seed: int) -> tuple[np.ndarray, int, float]:
        counted.states, begin = 0, time.process_time()
        measured = sb.clones(counted, at, classify, pairs=pairs, seeds=seed, paths=sb.Paths(resamples=100), **settings)
        assert counted.states == measured.calls
        return np.atleast_1d(measured.curve.value), counted.states, time.process_time() - begin

    run(levels[:1], 99)  # the first call warms up
    ours, states, seconds = run(levels, 0)
    each = [run(levels[i : i + 1], 1 + i) for i in range(len(levels))]
    base_states, base_seconds = sum(e[1] for e in each), sum(e[2] for e in each)
    again = np.concatenate([e[0] for e in each])
    n = settings["steps"]
    print(f"{name}, {pairs} pairs, {len(levels)} branch times, {n} steps")
    print(f"{'':44}{'states denoised':>18}{'CPU s':>10}")
    print(f"{'one growing batch':44}{states:18,}{seconds:10.1f}")
    print(f"{'every branch time again':44}{base_states:18,}{base_seconds:10.1f}")
    print(f"{'ratio':44}{base_states / states:18.2f}{base_seconds / seconds:10.2f}")
    error = np.sqrt(np.maximum(ours * (1 - ours) + again * (1 - again), 1 / pairs) / pairs)
    print(f"largest difference of phi between the two: {np.abs((ours - again) / error).max():.1f} standard errors")
    return ours, base_states / states, base_seconds / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--branches", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, branches = args.steps, args.branches

    pipe = sb.load_pipeline("digits")
    network = sb.denoiser(pipe.unet, pipe.scheduler)
    times = np.linspace(network.schedule.t_max, network.schedule.t_min, steps)
    k = np.arange(branches) * steps // branches
    levels = np.array([network.schedule.level(float(t)).sigma for t in times[k]])
    classify = sb.extractor("digits-classifier").logits
    _, ratio, _ = compare("digits", Counted(network), levels, classify, args.pairs, steps=steps)
    expected = (2 * steps - 1 - k).sum() / (steps + (steps - 1 - k).sum())
    print(f"closed form of the ratio of states: {expected:.2f}\n")
    assert abs(ratio - expected) < 1e-9
    assert branches != 20 or ratio >= 2.4

    d, pairs = 1024, 250
    law = Mixture.from_parameters(torch.stack([torch.ones(d), -torch.ones(d)]), 1.0)
    sigma = np.sqrt(np.expm1(2 * np.arange(1.0, 10.01, 0.5)))
    phi, _, _ = compare(
        f"two Gaussians, d = {d}",
        CountedLaw(law),
        sigma,
        lambda images: (images.sum(1) > 0).long(),
        pairs,
        steps=100,
        sigma_end=0.02,
        sigma_start=float(sigma.max()),
        dtype=torch.float32,
    )
    exact = sb.cloning_probability(law, sigma).value
    error = np.maximum(np.sqrt(exact * (1 - exact) / pairs), 1 / pairs)
    print(f"largest deviation from the exact phi: {np.abs((phi - exact) / error).max():.1f} standard errors")


if __name__ == "__main__":
    main()
