# %% [markdown]
# # The same seeds, three starts
#
# %% [markdown]
# Three network evaluations an image, from white noise, from one Gaussian, and from the start that is chosen. A row is a
# start, a column is a seed.
# %%
import matplotlib.pyplot as plt
import torch

import symbreak as sb

data, pipe = sb.images("digits"), sb.load_pipeline("digits")
scheduler = sb.scheduler("dpm++2m", like=pipe.scheduler)
auto = sb.fit_start(data, pipe.unet, scheduler, steps=3, check=False)
gaussian = sb.late_start(scheduler, sb.Gaussian.fit(data), 3, at=auto.level, check=False)
starts = {"white noise": sb.standard_start(scheduler, 3), "Gaussian": gaussian, "chosen": auto}
rows = [sb.generate(pipe.unet, start, seeds=range(12)) for start in starts.values()]
# %%
figure, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
sheet = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows])
ax.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1)
ax.set_xticks([])
ax.set_yticks([4, 12, 20], starts)
