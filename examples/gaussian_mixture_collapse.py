"""Collapse of two Gaussians onto n samples: the excess entropy goes to zero (arXiv:2402.18491).

Means +-ones(d), variance 1, n samples, a = log n / d. f / a is the part of log n that the noised state does
not tell; where it reaches zero a trajectory is bound to one training sample. Lines: exact; points: measured
on a draw of n samples, where f can only approach zero.
"""

# %%
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import symbreak as sb
from symbreak.noise import generator

n, dims = 2000, (64, 256, 1024)
tau = np.linspace(0.4, 6.0, 57)
sigma = np.array([sb.NoiseLevel.from_ou_time(t).sigma for t in tau])


def two_gaussians(d):
    m = torch.ones(d, dtype=torch.float64)
    return sb.Mixture.from_parameters(torch.stack([-m, m]), 1.0)


# %%
figure = Figure(figsize=(6.5, 4), layout="constrained")
ax = figure.subplots()
for i, d in enumerate(dims):
    law, a = two_gaussians(d), np.log(n) / d
    exact = sb.excess_entropy(law, sigma, samples=n)
    collapse = sb.collapse_time(law, samples=n)
    data = sb.Empirical(law.sample(n, 0.0, generator(d)))
    measured = sb.excess_entropy(data, sigma[::4], queries=400)
    colour = f"C{i}"
    ax.plot(tau, exact.value / a, color=colour, label=f"d = {d}")
    errors = [(measured.value - measured.low) / a, (measured.high - measured.value) / a]
    ax.errorbar(tau[::4], measured.value / a, errors, fmt=".", color=colour)
    ax.axvline(collapse.level.ou_time, color=colour, linewidth=1, linestyle=":")
    large = 0.5 * np.log1p(1 / np.expm1(2 * np.log(n / 2) / d))
    print(f"d = {d}: tau_C = {collapse.level.ou_time:.4f}, to leading order with n / 2 samples {large:.4f}")
ax.axhline(0, color="#999", linewidth=1)
ax.set(xlabel="OU time tau", ylabel="excess entropy f / a", title=f"{n} samples of two Gaussians")
ax.legend()
out = Path("build/gaussian_mixture_collapse.png")
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=120)
print(f"figure: {out}")
