"""Copies that were changed: flipped, shifted by a pixel or two, paler. d_1 / d_2 of pixels as they are misses them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from symbreak.metrics.extractors import FromFunction
from symbreak.metrics.features import feature_shards
from symbreak.metrics.memorization import NEAR, apart, groups
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run

__all__ = ["SHIFT", "alike", "nearest_transformed", "transformations"]

SHIFT = 2
ROUNDING = 1e-5  # of windows, which have norm 1: single-precision images that differ in brightness and contrast alone
Transformation = tuple[bool, int, int]  # flipped left to right; shifted down, to the right


def transformations(shape: Sequence[int], shift: int = SHIFT) -> list[Transformation]:
    """All that are looked for: flipped or not, shifted by up to ``shift`` pixels, a quarter of the image at most."""
    reach = [range(-s, s + 1) for s in (min(shift, side // 4) for side in shape[-2:])]
    return [(flip, down, right) for flip in (False, True) for down, right in itertools.product(*reach)]


def _window(x: torch.Tensor, flip: bool, down: int, right: int) -> torch.Tensor:
    """What is left of images when they are shifted, each at mean 0 and norm 1: brightness and contrast drop out."""
    x = x.flip(-1) if flip else x
    h, w = x.shape[-2:]
    rows = x[..., max(0, down) : h + min(0, down), max(0, right) : w + min(0, right)].flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)


def alike(train: Shards, near: float = NEAR, run: Run | None = None) -> np.ndarray:
    """The group [M] of every training image among near duplicates where brightness and contrast do not count.

    The rule is that of `groups`, applied to the images at mean 0 and norm 1, as they are searched among: images that
    differ in brightness or contrast alone are one point there, beside which d_1 / d_2 would be rounding over rounding.

    Args:
        train: different images [M, C, H, W].
        near, run: see `groups`.
    """
    run = run or Run()
    rows = feature_shards(FromFunction(partial(_window, flip=False, down=0, right=0), "w"), train, run)
    return groups(rows, near, run, name="alike", least=ROUNDING)[0]


def nearest_transformed(
    samples: Shards, train: Shards, group: np.ndarray, *, name: str, run: Run, shift: int = SHIFT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lowest d_1 / d_2 of every sample over all transformations, duplicates taken out.

    A copy y = a T x + b (T flips and shifts, a > 0) has d_1 = 0: on what its shift leaves, sample and training image
    are compared at mean 0 and norm 1. Costs as many searches as there are transformations, 50 by default.

    Args:
        samples, train: images [N, C, H, W] and [M, C, H, W], the latter different.
        group: [M] of near duplicates, see `alike`.
        name: begins the keys of finished parts.
        run: memory, finished parts, progress.
        shift: pixels, at most.

    Returns:
        d_1 / d_2 [N], the training image [N], and the transformation [N], a position in `transformations`.
    """
    known = transformations(train.shape, shift)
    best = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    image, which = torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples), dtype=torch.long)
    rows: Shards | None = None
    for number, (flip, down, right) in sorted(enumerate(known), key=lambda one: one[1][1:]):
        if rows is None or not flip:  # the training images' windows serve both
            rows = feature_shards(FromFunction(partial(_window, flip=False, down=-down, right=-right), "w"), train, run)
        queries = feature_shards(FromFunction(partial(_window, flip=flip, down=down, right=right), "w"), samples, run)
        d, j = apart(queries, rows, group, f"{name}-{number}", run)
        ratio = d[:, 0] / d[:, 1].clamp_min(1e-12)
        better = ratio < best
        best, image, which = (
            best.where(~better, ratio),
            image.where(~better, j[:, 0]),
            which.where(~better, torch.tensor(number)),
        )
        run.tell(number + 1, len(known))
    return best, image, which
