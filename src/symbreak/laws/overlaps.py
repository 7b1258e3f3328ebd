"""How much a data set's other points weigh at its noised points: one pass for all noise levels.

    x = y_mu + sigma z        log S_mu(sigma) = log sum_{nu != mu} exp(-(|x - y_nu|^2 - |sigma z|^2) / (2 sigma^2))

The square of the noise cancels exactly, and with A = |y_mu - y_nu|^2 / 2 and B = z . (y_mu - y_nu) the exponents
are -(A / sigma + B) / sigma: the two products Y Y^T and Z Y^T, formed block by block, serve every level, and a
level costs one exponential a pair. Exponents never pass g^2 / 2 for a standard normal g (at A = sigma^2 g^2 / 2),
so no maximum has to be taken away; they are cut at -80, below which only slow denormals are left. Queries that have
hardly any weight above the cut are summed again in float64 with their maximum taken away, where log S is asked for
(``tails``) and not only log(1 + S).

Float32 products lose about 1e-7 of |y|^2 and |z| |y|; levels at which that could move an exponent by more than
``EXACT`` d use products and exponentials in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from symbreak.blocks import Arrays, Keep, Progress, in_blocks, keyed
from symbreak.files import InputError
from symbreak.laws.empirical import Empirical
from symbreak.noise import generator

__all__ = ["PARTS", "Overlaps", "overlaps"]

PARTS = 8  # random parts of the data set, whose sums tell how the estimate depends on its size
QUERIES, POINTS = 256, 2048  # of a block: three arrays of float32 exponents, 6 MiB, stay in the cache
EXACT = 5e-7  # nats a dimension that rounding may move an exponent
LEAST = {torch.float32: -80.0, torch.float64: -700.0}


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of noised points with the other points.

    Attributes:
        sigma: levels [G].
        parts: log sums [Q, PARTS, G] over random parts of the others, float64.
        count: number n of points.
    """

    sigma: np.ndarray
    parts: np.ndarray
    count: int

    def leave_one_out(self) -> np.ndarray:
        """log S [Q, G]."""
        out: np.ndarray = np.logaddexp.reduce(self.parts, axis=1)
        return out


def overlaps(
    law: Empirical,
    sigma: np.ndarray,
    queries: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep | None = None,
    name: str = "overlaps",
    tails: bool = True,
) -> Overlaps:
    """Overlaps of noised points of a data set with its other points, at all levels at once.

    Args:
        law: the data set, n >= 2 points; its ``memory`` bounds what is worked in, and whether a float32 copy of
            the points is kept.
        sigma: levels [G].
        queries: noised points, at most one a point.
        seed: of the choice of points, their noise (common to all levels) and the parts.
        progress: called with (blocks done, blocks).
        keep: where finished blocks are kept, see `symbreak.blocks.Blocks`, under ``name`` and a digest of all else.
        tails: whether log S must be right far below zero; without, it is at least about -40 where it counts.

    Raises:
        InputError: for fewer than 2 queries.

    Ranks share the blocks (`symbreak.parallel`).
    """
    if queries < 2:
        raise InputError(f"{queries} queries; expected at least 2.")
    n, d = len(law), law.dim
    order = torch.randperm(n, generator=generator(seed, n))
    chosen = torch.randperm(n, generator=generator(seed, n, 1))[: min(queries, n)]
    points = _Points(law, order)
    place = torch.empty(n, dtype=torch.int64)
    place[order] = torch.arange(n)
    edges = [n * k // PARTS for k in range(PARTS + 1)]
    slack = 1e-7 * (2 * points.widest / sigma**2 + math.sqrt(2 * points.widest * d) / sigma)
    fine = slack > EXACT * d
    blocks = [chosen[i : i + QUERIES] for i in range(0, len(chosen), QUERIES)]
    key = name if keep is None else keyed(name, law.points, torch.from_numpy(sigma), len(chosen), seed, tails)
    faint = np.where(fine, 0.5 * LEAST[torch.float64], 0.5 * LEAST[torch.float32])

    def make(i: int) -> Arrays:
        mine = place[blocks[i]]
        out = np.full((QUERIES, PARTS, len(sigma)), -np.inf)
        z = torch.randn(len(mine), d, generator=generator(seed, n, 2, i))
        for dtype, which in ((torch.float32, ~fine), (torch.float64, fine)):
            if which.any():
                out[: len(mine), :, which] = _block(points, mine, z.to(dtype), sigma[which], edges)
        if tails:
            found = out[: len(mine)]
            again = (np.isfinite(found) & (found < faint)).any(1)  # [b, G]
            rows, some = again.any(1), again.any(0)
            if again.any():
                exact = _tail(points, mine[rows], z[rows].double(), sigma[some], edges)
                whole = np.ix_(rows, np.arange(PARTS), some)
                found[whole] = np.where(again[np.ix_(rows, some)][:, None], exact, found[whole])
        return {"log": out}

    whole = in_blocks(key, range(len(blocks)), make, progress, keep)
    return Overlaps(sigma, np.concatenate([b["log"][: len(q)] for b, q in zip(whole, blocks)]), n)


class _Points:
    """The centred points in random order, a block at a time."""

    def __init__(self, law: Empirical, order: torch.Tensor) -> None:
        self.rows, self.order = law.points.reshape(len(law), -1), order
        self.centre = law._centre
        self.half = law._half[order]
        self.widest = float(self.half.max())
        self.step = POINTS
        d = law.dim
        while self.step > 64 and 4 * (4 * QUERIES * d + 3 * self.step * d + 4 * QUERIES * self.step) > law.memory:
            self.step //= 2
        self.whole = self._made(slice(0, len(law)), torch.float32) if 4 * self.rows.numel() <= law.memory else None

    def _made(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        index = self.order[part]
        out = torch.empty(len(index), self.rows.shape[1], dtype=dtype)
        for i in range(0, len(index), POINTS):
            out[i : i + POINTS] = (self.rows[index[i : i + POINTS]].double() - self.centre).to(dtype)
        return out

    def block(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows [b, d] of y - centre."""
        return self.whole[part] if self.whole is not None and dtype == torch.float32 else self._made(part, dtype)

    def some(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [b, d] at places in the random order."""
        return (self.rows[self.order[index]].double() - self.centre).to(dtype)


def _exponents(
    points: _Points, mine: torch.Tensor, z: torch.Tensor, edges: list[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A and B [b, block] of queries at places ``mine`` with noise z [b, d], with the part they belong to."""
    dtype, b = z.dtype, len(mine)
    rows = points.some(mine, dtype)
    own = (z * rows).sum(1, keepdim=True)
    half = points.half.to(dtype)
    both = torch.cat([rows, z])
    for k in range(PARTS):
        for first in range(edges[k], edges[k + 1], points.step):
            part = slice(first, min(first + points.step, edges[k + 1]))
            products = both @ points.block(part, dtype).T
            apart, pull = products[:b].neg_(), products[b:].neg_()
            apart += half[part]
            apart += half[mine, None]
            apart.clamp_(min=0.0)
            pull += own
            here = (mine >= part.start) & (mine < part.stop)
            apart[here.nonzero()[:, 0], mine[here] - part.start] = math.inf  # the query's own point
            yield k, apart, pull


def _block(points: _Points, mine: torch.Tensor, z: torch.Tensor, sigma: np.ndarray, edges: list[int]) -> np.ndarray:
    """log sums [b, PARTS, G] of queries at places ``mine`` with noise z [b, d], cut from below."""
    sums = torch.zeros(PARTS, len(sigma), len(mine), dtype=torch.float64)
    for k, apart, pull in _exponents(points, mine, z, edges):
        work = torch.empty_like(apart)
        ones = torch.ones(apart.shape[1], dtype=z.dtype)
        for j, s in enumerate(sigma.tolist()):
            torch.add(pull, apart, alpha=1.0 / s, out=work)
            work.mul_(-1.0 / s).clamp_(min=LEAST[z.dtype]).exp_()
            sums[k, j] += (work @ ones).double()
    return sums.log().permute(2, 0, 1).numpy()


def _tail(points: _Points, mine: torch.Tensor, z: torch.Tensor, sigma: np.ndarray, edges: list[int]) -> np.ndarray:
    """The same with the maximum taken away, however small the sums are."""
    logs = torch.full((PARTS, len(sigma), len(mine)), -math.inf, dtype=torch.float64)
    for k, apart, pull in _exponents(points, mine, z, edges):
        for j, s in enumerate(sigma.tolist()):
            one = torch.logsumexp((apart / s + pull) / -s, 1)
            logs[k, j] = torch.logaddexp(logs[k, j], one)
    return logs.permute(2, 0, 1).numpy()
