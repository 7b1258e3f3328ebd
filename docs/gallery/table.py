# %% [markdown]
# # A table from scikit-learn
#
# %% [markdown]
# Nothing here is about pictures: the wine table has thirteen columns and three classes. Standardized, its classes are
# decided at a noise of about two standard deviations.
# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine

import symbreak as sb

wine = load_wine()
data = sb.samples(wine.data, labels=wine.target, scale="standard")
classes = sb.Mixture.fit(data.tensor(), labels=data.labels, kind="isotropic")
spectral = sb.speciation_time(sb.Moments.fit(data))
cloning = sb.cloning_probability(classes, np.geomspace(8, 0.3, 25), samples=2000)
# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
sb.Moments.fit(data).plot(left)
cloning.plot(right)
spectral.plot(right)
