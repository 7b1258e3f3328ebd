# %% Two classes with the same mean: the spectrum sees nothing, free entropy and clones do.
#    Pixels of variance 0.01 and 0.04; the classes' own law poses as a trained network.
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import symbreak as sb
from symbreak.report.figures import phases_figure

whole = len(sys.argv) > 1  # a folder: all that the documentation shows; else the same in a fifth of the time
count = 4000 if whole else 800
rng = np.random.default_rng(0)
y = np.arange(count) % 2
variance = np.where(y == 0, 0.01, 0.04)[:, None, None, None]
x = (np.sqrt(variance) * rng.normal(size=(count, 1, 8, 8))).astype(np.float32)

# %% Open them as any data set: an .npz with images and labels.
folder = Path(sys.argv[1] if whole else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
np.savez(folder / "covariance.npz", images=x, labels=y)
data = sb.images(str(folder / "covariance.npz"), value_range=(-1, 1))

# %% The exact law of the two classes, posing as a network of a pipeline.
covariances = torch.stack([v * torch.eye(64, dtype=torch.float64) for v in (0.01, 0.04)])
flat = sb.Mixture.from_parameters(torch.zeros(2, 1, 8, 8, dtype=torch.float64), covariances)
scheduler = sb.scheduler("ddpm")
pipe = SimpleNamespace(unet=sb.as_unet(flat, scheduler), scheduler=scheduler)


def louder(images):
    """The likelier class of an image, by its variance alone."""
    return (images.flatten(1).square().mean(1) > 0.01 * 0.04 / (0.04 - 0.01) * np.log(4)).long()


# %% Diagnose: every criterion on one axis.
few = sb.Effort(40, 16, branches=6, images=32, losses=14, stability=2, queries=200, points=400, frames=("ve",))
effort = sb.Effort(pairs=200) if whole else few
record = sb.diagnose(data, pipe, classify=louder, effort=effort)
for row in record.content["criteria"]:
    level = "none" if row["level"] is None else f"sigma {row['level']['sigma']:.3f}"
    print(f"{row['name']:32} {row['of']:14} {level}")
print("exact free entropy:", round(sb.speciation_time(flat, "free-entropy").sigma, 3))
record.save(folder)
sb.write_report(record, folder / "report.html")
out = Path("build/classes_by_covariance.png")
out.parent.mkdir(parents=True, exist_ok=True)
phases_figure(record.content).savefig(out, dpi=80)
print(f"figure: {out}")
