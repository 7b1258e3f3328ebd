# %% [markdown]
# # When do the digits decide?
#
# %% [markdown]
# The covariance gives a first answer, the labels a second one: how probable is it that two trajectories which part at a
# noise level end in the same class?
# %%
import matplotlib.pyplot as plt
import numpy as np

import symbreak as sb

data = sb.images("digits")
spectral = sb.speciation_time(sb.Moments.fit(data))
classes = sb.Mixture.fit(data.tensor(), labels=data.labels)
cloning = sb.cloning_probability(classes, np.geomspace(4, 0.3, 25), samples=2000)
decided = sb.speciation_time(classes, "free-entropy", samples=2000)
# %%
figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
cloning.plot(ax)
spectral.plot(ax)
ax.axvline(decided.sigma, color="C1", label=f"free-entropy: sigma {decided.sigma:.3g}")
ax.legend(frameon=False)
