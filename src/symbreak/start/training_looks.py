"""How a training goes, to look at: held-out losses, grids of samples, and one picture of all."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from symbreak.networks.denoiser import ask, denoise_by_class
from symbreak.networks.families import denoiser
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Network
from symbreak.noise import NoiseLevel, generator
from symbreak.report.figures import training_figure
from symbreak.runtime.files import write_whole
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import rank_of
from symbreak.start.fit import late_start
from symbreak.start.late_start import standard_start
from symbreak.start.objectives import noising
from symbreak.start.sample import StepError, generate
from symbreak.start.training_law import TrainingLaw

__all__ = ["Looks", "grid"]

TIMES = 8  # looks in a training
IMAGES = 16  # of a grid
LEVELS = 7
FEW, MANY = 3, 10  # network evaluations of the previews: with a law, and without


def grid(x: torch.Tensor, columns: int = 8) -> Image.Image:
    """Images [N, C, H, W] in [-1, 1] side by side, of 1 or 3 channels, enlarged to 64 pixels where they are smaller."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    n, h, w, c = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1, c), 255, np.uint8)
    for i, one in enumerate(pixels):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        sheet[top : top + h, left : left + w] = one
    picture = Image.fromarray(sheet[:, :, 0] if c == 1 else sheet)
    times = max(1, 64 // max(h, w))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


class Looks:
    """What was seen at some steps of a training.

    Args:
        folder: of the training; grids go into ``previews/``.
        shape: sample shape.
        known: the law that is trained below; without one there are no held-out losses.
        labels: classes of the training images, of which the grids show one after the other; ``None`` for a network that
            is told none.

    Attributes:
        seconds: that each look of this process took.
        rows: step and held-out squared error per element at each of ``sigma``, a row a look.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, ...], known: TrainingLaw | None, labels: torch.Tensor | None
    ) -> None:
        self.folder, self.shape, self.known = folder, tuple(shape), known
        self.classes = None if labels is None else labels.unique()
        self.rows: list[list[float]] = []
        self.sigma: list[float] = []
        self.law: list[float] = []
        self.seconds: list[float] = []
        if known is not None:
            held = self.clean = known.parts.test.tensor()
            self.labels = None if labels is None else known.parts.test.labels
            self.noise = torch.randn(held.shape, generator=generator(0, 411))
            self.sigma = [float(s) for s in np.geomspace(max(0.02, 1.01 * float(known.error[0, 0])), known.top, LEVELS)]
            alone = partial(denoise_by_class, known.law, labels=self.labels, null=True)
            self.law = [self._error(alone, s) for s in self.sigma]

    def _error(self, denoise: Any, sigma: float) -> float:
        return float((self.clean - denoise(self.clean + sigma * self.noise, sigma)).square().mean())

    def due(self, step: int, steps: int) -> bool:
        """Whether one is to look after a step."""
        return step == steps or step in {round(steps * k / TIMES) for k in range(1, TIMES)}

    def look(self, unet: Network, step: int, device: torch.device) -> None:
        """Held-out losses, and a grid of samples of fixed seeds."""
        began = time.monotonic()
        self._look(unet, step, device)
        self.seconds.append(time.monotonic() - began)

    def _look(self, unet: Network, step: int, device: torch.device) -> None:
        with torch.inference_mode():
            if self.known is not None:
                network = denoiser(unet, noising())
                losses = [self._error(lambda x, s: ask(network, x, s, self.labels), s) for s in self.sigma]
                self.rows.append([step, *losses])
            if len(self.shape) != 3 or self.shape[0] not in (1, 3):
                return
            base = scheduler("dpm++2m-karras", like=noising())
            start = standard_start(base, MANY)
            if self.known is not None:
                start = late_start(base, self.known.law, FEW, at=NoiseLevel(self.known.top * 0.75), check=False)
            labels = None if self.classes is None else self.classes[torch.arange(IMAGES) % len(self.classes)]
            try:
                x = generate(unet, start, range(IMAGES), labels, micro_batch=IMAGES, device=device)
            except StepError:  # a network that is not trained yet may diverge; the training goes on
                return
        if rank_of()[0] == 0:
            path = self.folder / "previews" / f"{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda target: grid(x).save(target, format="PNG"))

    def to_dict(self) -> Values:
        """Plain values, for records."""
        rows = [{"step": int(step), "loss": losses} for step, *losses in self.rows]
        return {"sigma": self.sigma, "law": self.law, "rows": rows}

    def draw(self, result: Values) -> None:
        """``training.png``: losses against steps and levels, and the last grid."""
        shown = sorted((self.folder / "previews").glob("*.png"))
        last = np.asarray(Image.open(shown[-1]).convert("RGB")) if shown else None
        figure = training_figure(result, last)
        write_whole(self.folder / "training.png", lambda target: figure.savefig(target, format="png"))
