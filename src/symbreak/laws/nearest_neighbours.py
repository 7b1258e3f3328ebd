"""Exact nearest neighbours among the points of a data set, at the speed of float32 products.

|x - y|^2 = |x|^2 - 2 (x.y - |y|^2 / 2) from float32 products of the centred data, which lose at most
n u (|x||y| + |y|^2 / 2) of the term in brackets (n = d + 8 operations of unit roundoff u; Higham, *Accuracy and
Stability of Numerical Algorithms*, section 3.1). The leading candidates are ranked by exact float64 differences.
Where a point left out could still be nearer within that bound, the query is repeated with float64 products and
every point that its bound leaves open. So distances and order are those of differences in float64 (of equal
distances the lower index comes first), whatever the size of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch

from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import from_each, map_over_ranks, rank_of
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Arrays, Run

__all__ = ["Rows", "Search", "neighbours", "searches"]

SPARE = 8  # candidates kept beyond the k wanted
PIECE = 2**18  # numbers differenced at a time: they stay in the cache
QUERIES = 4096  # of a finished part
MEMORY = 2**28  # bytes to work in where a run says nothing
Pairs = tuple[torch.Tensor, torch.Tensor]
Rows = torch.Tensor | Shards


def neighbours(
    queries: Rows,
    points: Rows | None = None,
    k: int = 2,
    *,
    classes: tuple[torch.Tensor, torch.Tensor] | None = None,
    block: int = 1024,
    name: str = "neighbours",
    run: Run | None = None,
) -> Pairs:
    """The k nearest points of every query, exact: d = |x - y| by differences in float64.

    Args:
        queries: [N, *S], float32 or float64, or `Shards` of such rows.
        points: [M, *S] with M >= k, or `Shards`; ``None``: the queries among themselves, no point its neighbour.
        k: neighbours wanted.
        classes: whole numbers of queries [N] and points [M]: neighbours are of another class than the query.
        block: queries at a time; results do not depend on it.
        name: of the run's parts.
        run: memory to work in beside tensors that came (by default 256 MiB), parts of 4,096 queries, progress.

    Ranks share the parts, or among shards each asks the points it has, or all of them for a share of the queries
    (`symbreak.runtime.ranks`).

    Returns:
        Distances [N, k] float64, rising, and the points' indices [N, k]; infinite where fewer are of other classes.

    Raises:
        InputError: for sizes that do not fit, too few points, or NaN.

    >>> d, j = neighbours(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [7.0], [4.0]]))
    >>> d.tolist(), j.tolist()
    ([[1.0, 4.0], [1.0, 2.0]], [[0, 2], [2, 1]])
    """
    run = (run or Run()).named(name)
    memory, same, among = max(2**20, run.bytes(default=MEMORY)), points is None, queries if points is None else points
    _check(queries, among, k, same, block)
    tags = (None, None) if classes is None else classes
    count, total, size = len(queries), len(among), QUERIES
    whole = isinstance(queries, torch.Tensor) and isinstance(among, torch.Tensor)
    searched_here = total  # points that this rank searches
    ready: list[Search] | None
    if whole:
        ready = [Search(among, k, block, memory, same=same, classes=tags[1])]  # type: ignore[arg-type]
    else:
        among = Shards.of(among) if isinstance(among, torch.Tensor) else among
        size = max(1, min(QUERIES, memory // (64 * math.prod(queries.shape[1:]))))
        pieces = partial(searches, among, k, block, memory, same, tags[1])
        searched_here = among.last - among.first
        # Else pieces are read again for every part, which costs little beside thousands of products with each.
        ready = list(pieces()) if 4 * searched_here * among.row_bytes <= memory else None

    def nearest(x: torch.Tensor, index: torch.Tensor, part: int) -> Pairs:
        """The nearest of this rank's points; a ``part`` of so many queries is at an end with these."""
        d = torch.full((len(index), k), math.inf, dtype=torch.float64)
        j, done = torch.full((len(index), k), total), 0
        for search in pieces() if ready is None else ready:
            for some in torch.arange(len(index)).split(search.block) if len(index) else ():
                new = search.ask(x[some], index[some], None if tags[0] is None else tags[0][index[some]])
                d[some], j[some] = _ranked(torch.cat([d[some], new[0]], 1), torch.cat([j[some], new[1]], 1), k)
                done += len(some) * (search.last - search.first)
                run.tell(min(count - 1, int(index[0]) + part * done // (len(index) * searched_here)), count)
            del search  # its points go before the next ones come
        return d, j

    def make(index: torch.Tensor) -> Arrays:
        x = _flat(queries.at(index) if isinstance(queries, Shards) else queries[index])
        if isinstance(among, torch.Tensor):
            d, j = nearest(x, index, len(index))
        else:  # by all ranks at once, each from its points, or from all of them for a part of the queries
            rank, ranks = (0, 1) if among.shared else rank_of()
            mine = slice(len(index) * rank // ranks, len(index) * (rank + 1) // ranks)
            each = from_each(_arrays(nearest(x[mine], index[mine], len(index))))
            d, j = _ranked(*_joined(each, int(among.shared)), k)
        return _arrays((d, j))

    def part(start: int) -> Arrays:
        index = torch.arange(start, min(start + size, count))
        return run.part(f"{name}/{start}-{int(index[-1]) + 1}", partial(make, index))

    starts = range(0, count, size)

    def ended(done: int, _: int) -> None:
        run.tell(min(done * size, count), count)

    if whole:
        return _joined(map_over_ranks(starts, part, ended))
    parts = []
    for done, start in enumerate(starts):
        parts.append(part(start))
        ended(done + 1, 0)
    return _joined(parts)


def _arrays(pairs: Pairs) -> Arrays:
    return {"d": pairs[0].numpy(), "j": pairs[1].numpy()}


def _joined(parts: Iterable[Arrays], axis: int = 0) -> Pairs:
    parts = list(parts)
    d, j = (torch.from_numpy(np.concatenate([p[n] for p in parts], axis)) for n in ("d", "j"))
    return d, j


def _check(queries: Rows, among: Rows, k: int, same: bool, block: int) -> None:
    x, y = queries.shape, among.shape
    if not len(among) - same >= k >= 1 or len(x) < 2 or x[1:] != y[1:] or math.prod(x[1:]) == 0:
        raise InputError(
            f"samples {tuple(x)} against training images {tuple(y)}; expected equal sizes and at least {k + same} "
            "training images."
        )
    if block < 1:
        raise InputError(f"{block} queries at a time; expected at least 1.")


def searches(
    among: Shards, k: int, block: int, memory: int, same: bool = False, classes: torch.Tensor | None = None
) -> Iterator[Search]:
    """This rank's points, as many at a time as fit into a quarter of the memory."""
    for piece in among.pieces(max(1, memory // (4 * among.row_bytes))):
        first, rows = piece
        tags = None if classes is None else classes[first : first + len(rows)]
        search = Search(rows, min(k, len(rows)), block, max(2**18, memory // 4), first, same, tags)
        yield search
        del piece, rows, search


class Search:
    """Points in blocks, and the rounding bounds of products with them.

    Args:
        points: [m, *S].
        k: neighbours wanted, at most m.
        block, memory: queries at a time, bytes to work in.
        first: position of the first point among all; answers are such positions.
        same: whether queries are points: the one at a query's position does not count.
        classes: of the points [m]: those of a query's class do not count.
    """

    def __init__(
        self,
        points: torch.Tensor,
        k: int,
        block: int,
        memory: int,
        first: int = 0,
        same: bool = False,
        classes: torch.Tensor | None = None,
    ) -> None:
        self.same, self.classes, self.first, self.last = same, classes, first, first + len(points)
        self.k, self.memory = k, memory
        self.y = _flat(points)
        self.dim = self.y.shape[1]
        self.block = max(1, min(block, memory // (64 * self.dim)))
        centre = torch.zeros(self.dim, dtype=torch.float64)
        for rows in self._rows():
            centre += self.y[rows].double().sum(0) / len(self.y)
        # Any centre will do, as long as everybody takes the same.
        self.centre = centre.float() if self.y.dtype == torch.float32 else centre
        square = [(self.y[r].double() - self.centre.double()).square().sum(1) for r in self._rows()]
        if not all(bool(torch.isfinite(s).all()) for s in square):
            raise InputError("the images or features hold NaN or infinity; expected finite numbers.")
        norms = torch.cat(square).sqrt()
        # A power of two, so that nothing is rounded, keeps products within the range of float32.
        self.scale = 2.0 ** -math.ceil(math.log2(float(norms.max()))) if float(norms.max()) > 0 else 1.0
        self.half = 0.5 * (norms * self.scale) ** 2
        self.radius = float(norms.max()) * self.scale

    def _rows(self) -> Iterator[slice]:
        step = max(1, min(self.memory // 32, PIECE) // self.dim)
        return (slice(i, min(i + step, len(self.y))) for i in range(0, len(self.y), step))

    def _blocks(self, queries: int, size: int) -> Iterator[slice]:
        """Slices of the points: [queries, block] products (and what ranks them) and [block, d] numbers fit."""
        step = max(1, min(self.memory // (size * (2 * queries + 2 * self.dim)), 2**12))
        return (slice(i, min(i + step, len(self.y))) for i in range(0, len(self.y), step))

    def _centred(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Float64 rows lose nothing before they are centred.
        wide = torch.float64 if torch.float64 in (dtype, rows.dtype) else self.centre.dtype
        return (rows.to(wide) - self.centre.to(wide)).to(dtype).mul_(self.scale)

    def _products(self, x: torch.Tensor, index: torch.Tensor, tags: torch.Tensor | None, part: slice) -> torch.Tensor:
        """x.y - |y|^2 / 2 [b, block] of centred queries, scaled; minus infinity for points that do not count."""
        g = torch.addmm(self.half[part].to(x.dtype), x, self._centred(self.y[part], x.dtype).T, beta=-1.0)
        if self.same:
            here = index - self.first
            q = ((here >= part.start) & (here < part.stop)).nonzero()[:, 0]
            g[q, here[q] - part.start] = -math.inf
        if self.classes is not None and tags is not None:
            g.masked_fill_(tags[:, None] == self.classes[None, part], -math.inf)
        return g

    def _slack(self, square: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Bound [b, 1] of the rounding of `_products`; square: |x|^2 [b, 1] of the queries."""
        nu = (self.dim + 8) * torch.finfo(dtype).eps / 2
        gamma = nu / (1 - nu) if nu < 0.5 else math.inf
        return gamma * (square.sqrt() * self.radius + 0.5 * self.radius**2)

    def ask(self, raw: torch.Tensor, index: torch.Tensor, tags: torch.Tensor | None = None) -> Pairs:
        """The k nearest of queries [b, d] at positions ``index`` [b], of classes ``tags`` [b]."""
        x = self._centred(raw, torch.float32)
        square = self._centred(raw, torch.float64).square().sum(1, keepdim=True)
        if not bool(torch.isfinite(square).all()):
            raise InputError("the images or features hold NaN or infinity; expected finite numbers.")
        value = torch.empty(len(index), 0)
        place = torch.empty(len(index), 0, dtype=torch.long)
        for part in self._blocks(len(index), 4):
            g, j = _top(self._products(x, index, tags, part), self.k + SPARE)
            value, place = torch.cat([value, g], 1), torch.cat([place, j + part.start], 1)
            if value.shape[1] > self.k + SPARE:
                value, order = value.topk(self.k + SPARE, dim=1)
                place = place.gather(1, order)
        row = torch.arange(len(index))
        d = self.exact(raw, index, row.repeat_interleave(place.shape[1]), place.reshape(-1), tags).reshape(place.shape)
        d, place = _ranked(d, place, self.k)
        # Whatever was left out has a product of at most the lowest one kept.
        worst = 0.5 * (square - (d[:, -1:] * self.scale) ** 2)
        slack = self._slack(square, torch.float32) + 1e-12 * (square + worst.abs())
        sure = (value[:, -1:].double() + slack < worst)[:, 0]
        sure |= value[:, -1] == -math.inf  # all points that count were kept
        if value.shape[1] == len(self.y):
            sure[:] = True
        doubt = (~sure).nonzero()[:, 0]
        for some in doubt.split(64) if len(doubt) else ():
            some_tags = None if tags is None else tags[some]
            d[some], place[some] = self._again(raw[some], index[some], some_tags, d[some], place[some])
        return d, place + self.first

    def _again(
        self, raw: torch.Tensor, index: torch.Tensor, tags: torch.Tensor | None, d: torch.Tensor, place: torch.Tensor
    ) -> Pairs:
        """The same from float64 products: every point that may be as near as the k-th known is ranked."""
        best = [(d[i : i + 1], place[i : i + 1]) for i in range(len(index))]
        for q, j in self.within(raw, index, d[:, -1].clone(), tags):
            exact = self.exact(raw, index, torch.full((len(j),), q), j, tags)
            old_d, old_j = best[q]
            fresh = ~torch.isin(j, old_j[0])
            both = torch.cat([old_d, exact[None, fresh]], 1), torch.cat([old_j, j[None, fresh]], 1)
            best[q] = _ranked(*both, self.k)
        return torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])

    def within(
        self, raw: torch.Tensor, index: torch.Tensor, reach: torch.Tensor, tags: torch.Tensor | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """For queries [b, d], points that may lie within ``reach`` [b]: (query, points of this search), in parts."""
        x = self._centred(raw, torch.float64)
        square = x.square().sum(1, keepdim=True)
        lowest = 0.5 * (square - (reach[:, None] * self.scale) ** 2)
        lowest = lowest - self._slack(square, torch.float64) - 1e-12 * (square + lowest.abs())
        for part in self._blocks(len(index), 8):
            open_ = self._products(x, index, tags, part) >= lowest
            for q in open_.any(1).nonzero()[:, 0].tolist():
                yield q, open_[q].nonzero()[:, 0] + part.start

    def exact(
        self, raw: torch.Tensor, index: torch.Tensor, q: torch.Tensor, j: torch.Tensor, tags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """|x_q - y_j| [pairs] by differences in float64; infinite for points that do not count."""
        if len(q) == 1:  # a sum over a single row may be split among threads, and end in other bits
            return self.exact(raw, index, q.repeat(2), j.repeat(2), tags)[:1]
        out = []
        pieces = math.ceil(len(q) / max(3, min(self.memory // 32, PIECE) // self.dim))
        for a, b in zip(q.tensor_split(pieces), j.tensor_split(pieces)):
            gap = self.y[b].double()
            gap -= raw[a]
            out.append(gap.square_().sum(1).sqrt_())
        d = torch.cat(out)
        if self.same:
            d[index[q] == j + self.first] = math.inf
        if self.classes is not None and tags is not None:
            d[tags[q] == self.classes[j]] = math.inf
        return d


def _flat(t: torch.Tensor) -> torch.Tensor:
    flat = t.detach().cpu().reshape(len(t), -1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.double()


def _top(g: torch.Tensor, count: int) -> Pairs:
    """The largest ``count`` of every row and their positions; the maxima of strips say where to look."""
    strips = 64
    width = g.shape[1] // strips
    if width <= 4 * count:
        return g.topk(min(count, g.shape[1]), dim=1)
    # Strip s holds the columns s, s + width, ...; the largest numbers lie in the strips of largest maxima.
    body = g[:, : strips * width].unflatten(1, (strips, width))
    strip = body.amax(1).topk(count, dim=1).indices
    columns = (strip[:, :, None] + width * torch.arange(strips)).flatten(1)
    rest = torch.arange(strips * width, g.shape[1]).expand(len(g), -1)
    columns = torch.cat([columns, rest], 1)
    value, order = g.gather(1, columns).topk(count, dim=1)
    return value, columns.gather(1, order)


def _ranked(d: torch.Tensor, j: torch.Tensor, k: int) -> Pairs:
    """The k nearest of every row, rising; of equal distances the lower index first."""
    order = j.argsort(dim=1)
    d, j = d.gather(1, order), j.gather(1, order)
    order = d.argsort(dim=1, stable=True)[:, :k]
    return d.gather(1, order), j.gather(1, order)
