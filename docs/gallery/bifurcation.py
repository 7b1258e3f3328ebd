# %% [markdown]
# # A mixture's bifurcation
#
# %% [markdown]
# Three Gaussians on a triangle. The wells of the classes appear, each with a saddle, while the centre is still stable:
# the transition is of first order.
# %%
import matplotlib.pyplot as plt
import numpy as np

import symbreak as sb

law = sb.Mixture.from_parameters([[2.0, 0.0], [-1.0, 3**0.5], [-1.0, -(3**0.5)]], 0.1)
points = sb.fixed_points(law, np.geomspace(5, 0.5, 60), "sde", "vp", starts=law.means)
centre = sb.bifurcation(law, "sde", "vp")
wells = sb.bifurcation(law, "sde", "vp", criterion="wells", starts=law.means)
# %%
figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
for branch in points.branches:
    x = branch.points[:, 0].numpy()
    ax.plot(points.sigma, np.where(branch.stable, x, np.nan), "C0-")
    ax.plot(points.sigma, np.where(branch.stable, np.nan, x), "C0:")
for critical, color, name in ((wells, "C1", "new wells"), (centre, "C3", "the centre is lost")):
    ax.axvline(critical.sigma, color=color, label=f"{name}: sigma {critical.sigma:.3f}")
ax.set(xscale="log", xlabel="sigma (noise falls to the right)", ylabel="first coordinate, VP frame")
ax.invert_xaxis()
ax.legend(frameon=False)
