"""Speciation of two Gaussians in d dimensions: cloning curves collapse onto one (arXiv:2402.18491).

Means +-ones(d), variance 1. Two reverse trajectories share their path down to OU time tau, then part; phi is
the probability that both end in the same class. The spectral criterion puts speciation at 1/2 log d.
"""

# %%
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import symbreak as sb

tau = np.linspace(1.0, 8.0, 57)
sigma = np.array([sb.NoiseLevel.from_ou_time(t).sigma for t in tau])


def two_gaussians(d):
    m = torch.ones(d, dtype=torch.float64)
    return sb.Mixture.from_parameters(torch.stack([-m, m]), 1.0)


# %% exact curves (quadrature) and the criteria
dims = (256, 1024, 4096, 16384)
phi = {d: sb.cloning_probability(two_gaussians(d), sigma).value for d in dims}
times = {d: sb.speciation_time(two_gaussians(d), "free-entropy").level.ou_time for d in dims}
for d in dims:
    at = float(sb.cloning_probability(two_gaussians(d), sb.NoiseLevel.from_ou_time(times[d]).sigma).value)
    print(f"d = {d}: free-entropy tau = {times[d]:.4f} (1/2 log d = {0.5 * np.log(d):.4f}), phi there {at:.4f}")

# %% measured: pairs of reverse trajectories in the full 256 dimensions
branch = sigma[8:40:8]
measured = sb.clone_agreement(two_gaussians(256), branch, pairs=200, steps=60)

# %%
figure = Figure(figsize=(9, 3.6), layout="constrained")
left, right = figure.subplots(1, 2, sharey=True)
for d in dims:
    left.plot(tau, phi[d], label=f"d = {d}")
    right.plot(tau - times[d], phi[d])
at = [sb.NoiseLevel(s).ou_time for s in measured.sigma]
errors = np.clip([measured.value - measured.low, measured.high - measured.value], 0, None)
left.errorbar(at, measured.value, errors, fmt="k.", label="200 pairs, d = 256")
left.set(xlabel="OU time tau", ylabel="phi, both clones in one class", title="Cloning")
left.legend(fontsize=8)
right.axvline(0, color="#999", linewidth=1)
right.axhline(0.7752002454, color="#999", linewidth=1)
right.set(xlabel="tau - tau of the free entropy", title="One curve for all d")
out = Path("build/gaussian_mixture_speciation.png")
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=120)
print(f"figure: {out}")
