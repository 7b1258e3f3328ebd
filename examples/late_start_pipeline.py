"""A late start as a diffusers pipeline: fit, sample, save, restore; everything runs offline.

The bundled digits network is sampled with five evaluations, once from white noise at the top of its schedule and
once from a Gaussian at the level where the digits begin to tell apart. The same seed is the same row of the figure.
"""

# %%
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

import symbreak as sb

network = sb.load_pipeline("digits")
data = sb.images("digits")
law = sb.Gaussian.fit(data)
sampler = sb.scheduler("ddim", like=network.scheduler)

# %% two starts with the same number of network evaluations
starts = {"standard start": sb.standard_start(sampler, 5), "late start": sb.late_start(sampler, law, 5)}
print(starts["late start"].explain())


def draw(pipe, seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(batch_size=len(seeds), generator=generators, output_type="pt").images


# %% images of the same seeds, and how far their mean and covariance are from the data's
images = {}
for name, start in starts.items():
    pipe = sb.LateStartPipeline(network.unet, start.scheduler, start)
    pipe.set_progress_bar_config(disable=True)
    images[name] = draw(pipe, range(128))
    distance = sb.frechet_distance(sb.Moments.fit([2 * images[name] - 1]), law.moments)
    print(f"{name}: {start.calls} network evaluations, squared Fréchet distance in pixels {distance:.3f}")

# %% a folder of JSON and safetensors; an image alone has the bits that it had among 128
with tempfile.TemporaryDirectory() as folder:
    pipe.save_pretrained(folder)
    again = sb.LateStartPipeline.from_pretrained(folder)
again.set_progress_bar_config(disable=True)
print("restored to the same bits:", torch.equal(draw(again, [100]), images["late start"][100:101]))

# %%
figure = Figure(figsize=(9, 2.6), layout="constrained")
for axis, (name, batch) in zip(figure.subplots(2, 1), images.items()):
    axis.imshow(torch.cat(list(batch[:16, 0]), dim=1), cmap="gray", vmin=0, vmax=1)
    axis.set(title=f"{name}, 5 network evaluations, seeds 0 to 15", xticks=[], yticks=[])
out = Path("build/late_start_pipeline.png")
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=120)
print(f"figure: {out}")
