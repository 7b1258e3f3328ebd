"""Symmetry breaking in one dimension: the potential of two points splits (arXiv:2305.19693).

Data +1 and -1, variance-preserving process. Above the critical level the reverse drift has one well, below
it two: a pitchfork at alpha = sqrt(sqrt(2) - 1) = 0.64359.
"""

# %%
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import symbreak as sb

law = sb.Empirical([[-1.0], [1.0]])
critical = sb.bifurcation(law, flow="sde", frame="vp")
print(f"bifurcation at alpha = {critical.level.alpha:.10f}, OU time {critical.level.ou_time:.10f}")
for frame in ("vp", "ve"):
    other = sb.bifurcation(law, flow="ode", frame=frame)
    print(f"probability flow, {frame}: {other.reason if other.level is None else f'sigma = {other.sigma:.6f}'}")

# %% the potential at five levels, and its fixed points
x = torch.linspace(-1.6, 1.6, 161, dtype=torch.float64)[:, None]
alphas = [0.45, 0.55, critical.level.alpha, 0.7, 0.75]
wells = {a: sb.potential(law, x, sb.NoiseLevel.from_alpha_bar(a**2).sigma) for a in alphas}
grid = np.sort(np.append(np.geomspace(8.0, 0.2, 120), 0.999 * critical.sigma))
branches = sb.fixed_points(law, grid).branches

# %%
figure = Figure(figsize=(9, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
for i, (a, u) in enumerate(wells.items()):
    colour = (0.1 + 0.17 * i, 0.35, 0.75 - 0.14 * i)
    left.plot(x[:, 0], u.value - u.value[80], color=colour, label=f"alpha = {a:.3f}")
left.set(xlabel="x", ylabel="u(x) - u(0), per unit beta", title="Potential of the reverse SDE", ylim=(-0.3, 0.6))
left.legend(fontsize=8)
alpha = 1 / np.sqrt(1 + grid**2)
for branch in branches:
    at = branch.points[:, 0].numpy()
    right.plot(alpha[branch.stable], at[branch.stable], color="#1f6fb4")
    unstable = branch.exists & ~branch.stable
    right.plot(alpha[unstable], at[unstable], "--", color="#1f6fb4")
right.axvline(critical.level.alpha, color="#999", linewidth=1)
right.set(xlabel="alpha (noise falls to the right)", ylabel="fixed points", title="Pitchfork")
out = Path("build/one_dimensional_potential.png")
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=120)
print(f"figure: {out}")
