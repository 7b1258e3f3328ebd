"""How much a data set's other points weigh at its noised points: one pass for all noise levels.

    x = y_mu + sigma z        log S_mu(sigma) = log sum_{nu != mu} exp(-(|x - y_nu|^2 - |sigma z|^2) / (2 sigma^2))

The square of the noise cancels exactly, and with A = |y_mu - y_nu|^2 / 2 and B = z . (y_mu - y_nu) the exponents
are -(A / sigma + B) / sigma: the two products Y Y^T and Z Y^T, formed block by block, serve every level, and a
level costs one exponential a pair. Exponents never pass g^2 / 2 for a standard normal g (at A = sigma^2 g^2 / 2),
so no maximum has to be taken away; they are cut at -80, below which only slow denormals are left. Queries that have
hardly any weight above the cut are summed again in float64 with their maximum taken away, where log S is needed
(``tails``) and not only log(1 + S).

Float32 products lose about 1e-7 of |y|^2 and |z| |y|; levels at which that could move an exponent by more than
``EXACT`` d use products and exponentials in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from symbreak.laws.empirical import Empirical
from symbreak.noise import generator
from symbreak.runtime.files import InputError, digest
from symbreak.runtime.ranks import alone, from_each, summed
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Arrays, Run
from symbreak.runtime.shown import Shown

__all__ = ["PARTS", "Overlaps", "SharedPoints", "overlaps"]

PARTS = 8  # random parts of the data set, whose sums tell how the estimate depends on its size
QUERIES, POINTS = 256, 2048  # of a block: three arrays of float32 exponents, 6 MiB, stay in the cache
EXACT = 5e-7  # nats a dimension that rounding may move an exponent
LEAST = {torch.float32: -80.0, torch.float64: -700.0}


@dataclass(frozen=True)
class Overlaps(Shown):
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


class SharedPoints:
    """A data set of which every rank holds a part of the points, as far as overlaps and the collapse need it.

    Args:
        points: at least one, finite.
        memory: bytes of working memory beside the points that are held; a float32 copy of them is kept where it fits.

    Raises:
        InputError: for NaN or infinity.
    """

    def __init__(self, points: Shards, memory: int = 2**28) -> None:
        self.points, self.memory, self.shape = points, memory, tuple(points.shape[1:])
        n, step = len(points), max(1, min(4096, memory // (32 * self.dim)))
        self._centre = torch.zeros(self.dim, dtype=torch.float64)
        for rows in self._own(step):
            self._centre += rows.sum(0) / n
        self._half = torch.empty(points.last - points.first, dtype=torch.float64)
        if points.shared:
            summed(self._centre)
        if not bool(torch.isfinite(self._centre).all()):
            raise InputError("the points hold NaN or infinity; expected finite numbers.")
        done = 0
        for rows in self._own(step):
            self._half[done : done + len(rows)] = 0.5 * (rows - self._centre).square().sum(1)
            done += len(rows)
        each = from_each({"widest": np.array(float(self._half.max()) if done else 0.0)}, points.shared)
        self.widest = max(float(e["widest"]) for e in each)

    def _own(self, step: int) -> Iterator[torch.Tensor]:
        for _, rows in self.points.pieces(step):
            yield rows.flatten(1).double()

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.points)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64; all ranks draw together."""
        index = torch.randint(len(self), (n,), generator=generator)
        return self.points.at(index) + sigma * torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)

    @cached_property
    def identity(self) -> str:
        """A digest of all points."""
        return digest(self.points.digests())


def overlaps(
    law: Empirical | SharedPoints,
    sigma: np.ndarray,
    queries: int = 1000,
    seed: int = 0,
    name: str = "overlaps",
    tails: bool = True,
    run: Run | None = None,
) -> Overlaps:
    """Overlaps of noised points of a data set with its other points, at all levels at once.

    Args:
        law: the data set, n >= 2 points; its ``memory`` bounds what is worked in, and whether a float32 copy of
            the points is kept.
        sigma: levels [G].
        queries: noised points, at most one a point.
        seed: of the choice of points, their noise (common to all levels) and the parts.
        name: of the run's parts.
        tails: whether log S must be right far below zero; without, it is at least about -40 where it counts.
        run: finished parts and progress.

    Raises:
        InputError: for fewer than 2 queries.

    Ranks share the blocks of queries, or compute every query against their own `SharedPoints` and add the sums
    (`symbreak.runtime.ranks`).
    """
    if queries < 2:
        raise InputError(f"{queries} queries; expected at least 2.")
    n, d = len(law), law.dim
    order = torch.randperm(n, generator=generator(seed, n))
    chosen = torch.randperm(n, generator=generator(seed, n, 1))[: min(queries, n)]
    place = torch.empty(n, dtype=torch.int64)
    place[order] = torch.arange(n)
    points = _Points(law, place)
    slack = 1e-7 * (2 * points.widest / sigma**2 + math.sqrt(2 * points.widest * d) / sigma)
    fine = slack > EXACT * d
    blocks = [chosen[i : i + QUERIES] for i in range(0, len(chosen), QUERIES)]
    faint = np.where(fine, 0.5 * LEAST[torch.float64], 0.5 * LEAST[torch.float32])

    def make(i: int, noised: _Noised) -> Arrays:
        out = np.full((QUERIES, PARTS, len(sigma)), -np.inf)
        z = torch.randn(len(noised.place), d, generator=generator(seed, n, 2, i))
        for dtype, which in ((torch.float32, ~fine), (torch.float64, fine)):
            if which.any():
                out[: len(z), :, which] = _block(points, noised, z.to(dtype), sigma[which])
        if tails:
            real = out[: len(z)]
            again = (np.isfinite(real) & (real < faint)).any(1)  # [b, G]
            rows, some = again.any(1), again.any(0)
            if again.any():
                exact = _tail(points, noised.some(torch.from_numpy(rows)), z[rows].double(), sigma[some])
                whole = np.ix_(rows, np.arange(PARTS), some)
                real[whole] = np.where(again[np.ix_(rows, some)][:, None], exact, real[whole])
        return {"log": out}

    run = (run or Run()).named(name)
    of = None if run.folder is None else law.points if isinstance(law, Empirical) else law.identity
    settings = of, torch.from_numpy(sigma), len(chosen), seed, tails
    if isinstance(law, Empirical):
        made = run.parts(name, range(len(blocks)), lambda i: make(i, points.noised(blocks[i], place)), *settings)
        logs = [m["log"] for m in made]
    else:
        logs = []
        for i, index in enumerate(blocks):
            noised = points.noised(index, place)  # by all ranks at once
            with alone(), torch.inference_mode():
                shard = f"{i}/{law.points.first}-{law.points.last}"
                mine = run.part(name, partial(make, i, noised), shard, *settings)
            each = from_each({"log": mine["log"]}, law.points.shared)
            logs.append(np.logaddexp.reduce([e["log"] for e in each]))
            run.tell(i + 1, len(blocks))
    return Overlaps(sigma, np.concatenate([log[: len(q)] for log, q in zip(logs, blocks)]), n)


@dataclass(frozen=True)
class _Noised:
    """Points that are noised: centred rows [b, d] float64, |y|^2 / 2 [b], places in the random order [b]."""

    rows: torch.Tensor
    half: torch.Tensor
    place: torch.Tensor

    def some(self, which: torch.Tensor) -> _Noised:
        return _Noised(self.rows[which], self.half[which], self.place[which])


class _Points:
    """This process's centred points in random order, a block at a time.

    Args:
        law: the data set.
        place: of every point of all in the random order [n], which is cut into `PARTS`.
    """

    def __init__(self, law: Empirical | SharedPoints, place: torch.Tensor) -> None:
        self.law, self.centre, d = law, law._centre, law.dim
        self.first, self.last = (0, len(law)) if isinstance(law, Empirical) else (law.points.first, law.points.last)
        self.places, self.order = place[self.first : self.last].sort()
        n = len(place)
        self.edges = torch.searchsorted(self.places, torch.tensor([n * k // PARTS for k in range(PARTS + 1)])).tolist()
        self.half = law._half[self.order]
        self.widest = float(self.half.max()) if isinstance(law, Empirical) else law.widest
        self.step = POINTS
        while self.step > 64 and 4 * (4 * QUERIES * d + 3 * self.step * d + 4 * QUERIES * self.step) > law.memory:
            self.step //= 2
        every = slice(0, len(self.order))
        self.whole = self._made(every, torch.float32) if 4 * len(self.order) * d <= law.memory else None

    def _rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows [b, d] of this process at its own positions."""
        if isinstance(self.law, Empirical):
            return self.law.points.reshape(len(self.law), -1)[index]
        return self.law.points.here(index + self.first).reshape(len(index), -1)

    def _made(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        index = self.order[part]
        out = torch.empty(len(index), self.law.dim, dtype=dtype)
        for i in range(0, len(index), POINTS):
            out[i : i + POINTS] = (self._rows(index[i : i + POINTS]).double() - self.centre).to(dtype)
        return out

    def block(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows [b, d] of y - centre."""
        return self.whole[part] if self.whole is not None and dtype == torch.float32 else self._made(part, dtype)

    def noised(self, index: torch.Tensor, place: torch.Tensor) -> _Noised:
        """The points at positions among all."""
        rows = self.law.points[index] if isinstance(self.law, Empirical) else self.law.points.at(index)
        centred = rows.reshape(len(index), -1).double() - self.centre
        return _Noised(centred, 0.5 * centred.square().sum(1), place[index])


def _exponents(points: _Points, noised: _Noised, z: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A and B [b, block] of queries with noise z [b, d], with the part they belong to."""
    dtype, b = z.dtype, len(z)
    rows = noised.rows.to(dtype)
    along = (z * rows).sum(1, keepdim=True)
    half, mine = points.half.to(dtype), noised.half.to(dtype)
    both = torch.cat([rows, z])
    for k in range(PARTS):
        for first in range(points.edges[k], points.edges[k + 1], points.step):
            part = slice(first, min(first + points.step, points.edges[k + 1]))
            products = both @ points.block(part, dtype).T
            apart, pull = products[:b].neg_(), products[b:].neg_()
            apart += half[part]
            apart += mine[:, None]
            apart.clamp_(min=0.0)
            pull += along
            here = torch.searchsorted(points.places[part], noised.place).clamp_(max=len(apart[0]) - 1)
            same = (points.places[part][here] == noised.place).nonzero()[:, 0]
            apart[same, here[same]] = math.inf  # the query's own point
            yield k, apart, pull


def _block(points: _Points, noised: _Noised, z: torch.Tensor, sigma: np.ndarray) -> np.ndarray:
    """log sums [b, PARTS, G] of queries with noise z [b, d], cut from below."""
    sums = torch.zeros(PARTS, len(sigma), len(z), dtype=torch.float64)
    for k, apart, pull in _exponents(points, noised, z):
        work = torch.empty_like(apart)
        ones = torch.ones(apart.shape[1], dtype=z.dtype)
        for j, s in enumerate(sigma.tolist()):
            torch.add(pull, apart, alpha=1.0 / s, out=work)
            work.mul_(-1.0 / s).clamp_(min=LEAST[z.dtype]).exp_()
            sums[k, j] += (work @ ones).double()
    return sums.log().permute(2, 0, 1).numpy()


def _tail(points: _Points, noised: _Noised, z: torch.Tensor, sigma: np.ndarray) -> np.ndarray:
    """The same with the maximum taken away, however small the sums are."""
    logs = torch.full((PARTS, len(sigma), len(z)), -math.inf, dtype=torch.float64)
    for k, apart, pull in _exponents(points, noised, z):
        for j, s in enumerate(sigma.tolist()):
            one = torch.logsumexp((apart / s + pull) / -s, 1)
            logs[k, j] = torch.logaddexp(logs[k, j], one)
    return logs.permute(2, 0, 1).numpy()
