"""Copies that were changed: flipped, shifted by a pixel or two, paler. d_1 / d_2 of pixels as they are misses them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from symbreak.metrics.extractors import BATCH, FromFunction
from symbreak.metrics.feature_rows import feature_shards
from symbreak.metrics.memorization import NEAR, apart, groups
from symbreak.runtime.ranks import rank_of, shares
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run

__all__ = ["SHIFT", "nearest_transformed", "transformations"]

SHIFT = 2
ROUNDING = 1e-5  # of windows, which have norm 1: single-precision images that differ in brightness and contrast alone
Transformation = tuple[bool, int, int]  # flipped left to right; shifted down, to the right
Nearest = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def transformations(shape: Sequence[int]) -> list[Transformation]:
    """All that are looked for: flipped or not, shifted by up to two pixels, a quarter of the image at most."""
    reach = [range(-s, s + 1) for s in (min(SHIFT, side // 4) for side in shape[-2:])]
    return [(flip, down, right) for flip in (False, True) for down, right in itertools.product(*reach)]


def _window(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """What is left of images when they are shifted, each at mean 0 and norm 1: brightness and contrast drop out."""
    h, w = x.shape[-2:]
    rows = x[..., max(0, down) : h + min(0, down), max(0, right) : w + min(0, right)].flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)


def _windows(images: Shards, down: int, right: int, run: Run) -> Shards:
    return feature_shards(FromFunction(partial(_window, down=down, right=right), "w"), images, run)


def _queries(sides: Sequence[Shards], run: Run) -> Shards:
    """The images of all sides, one side after the other, and then all of them flipped."""
    edges = shares(2 * sum(map(len, sides)), BATCH)
    rank = rank_of()[0] if len(edges) > 2 else 0

    def blocks() -> Iterator[np.ndarray]:
        at = 0
        for flip, side in itertools.product((False, True), sides):
            for index in torch.arange(len(side)).split(BATCH):
                x = side.at(index)  # by all ranks together
                mine = x[max(0, edges[rank] - at) : max(0, edges[rank + 1] - at)].float()
                at += len(x)
                if len(mine):
                    yield (mine.flip(-1) if flip else mine).numpy()

    return Shards(blocks(), edges, run.bytes(), run.folder)


def nearest_transformed(
    sides: Sequence[Shards], train: Shards, near: float = NEAR, run: Run | None = None
) -> list[Nearest] | None:
    """The lowest d_1 / d_2 of every image over all transformations, duplicates taken out.

    A copy y = a T x + b (T flips and shifts, a > 0) has d_1 = 0: on what its shift leaves, sample and training image
    are compared at mean 0 and norm 1. Near duplicates are those of `groups` among the training images so compared,
    unshifted: images that differ in brightness or contrast alone are one point there, beside which d_1 / d_2 would be
    rounding over rounding. Costs a search of all sides, flipped and not, for each shift (25), and one of the training
    images for their duplicates.

    Args:
        sides: sets of images [N, C, H, W] to look for.
        train: different images [M, C, H, W].
        near: see `groups`.
        run: memory, finished parts, progress. A quarter of its memory each for images, both windows and the search.

    Returns:
        For every side d_1 / d_2 [N], the training image [N], and the transformation [N], a position in
        `transformations`. ``None`` where all training images are the same up to brightness and contrast.
    """
    run = run or Run()
    part, known, count = run.share(1 / 4), transformations(train.shape), 2 * sum(map(len, sides))
    shifts = sorted({one[1:] for one in known}, key=lambda one: (abs(one[0]) + abs(one[1]), one))  # unshifted first
    total, reported = len(train) + len(shifts) * count, 0

    def quiet(_: int, __: int) -> None: ...

    def after(before: int) -> Run:
        """Progress in images asked, which never falls, of one of the searches."""

        def tell(done: int, _: int) -> None:
            nonlocal reported
            reported = max(reported, before + done)
            run.tell(reported, total)

        return part.telling(tell)

    queries = _queries(sides, part)
    group: np.ndarray | None = None
    best = torch.full((count,), torch.inf, dtype=torch.float64)
    image, which = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    for number, (down, right) in enumerate(shifts):
        rows = _windows(train, -down, -right, part.telling(quiet))
        if group is None:
            group = groups(rows, near, after(0), name="alike", least=ROUNDING)[0]
            if group.max() == 0:
                return None
        moved = _windows(queries, down, right, part.telling(quiet))
        d, j = apart(moved, rows, group, f"changed-{number}", after(len(train) + number * count))
        ratio = d[:, 0] / d[:, 1].clamp_min(1e-12)
        better = ratio < best
        here = torch.tensor([known.index((flip, down, right)) for flip in (False, True)]).repeat_interleave(count // 2)
        best, image, which = best.where(~better, ratio), image.where(~better, j[:, 0]), which.where(~better, here)
    # unflipped and flipped, a row each
    best, flip = best.reshape(2, -1).min(0)
    image, which = (x.reshape(2, -1).gather(0, flip[None])[0] for x in (image, which))
    return list(zip(*(x.split([len(side) for side in sides]) for x in (best, image, which))))
