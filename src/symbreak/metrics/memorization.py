"""Copying: how near generated images lie to training images.

A sample counts as memorized when its nearest training image is less than a third as far as the second
nearest, d_1 / d_2 < 1/3 (Bonnaire et al., arXiv:2505.17638). Held-out real images give the scale.

Neighbours come from float32 products of the centred data, |x - y|^2 = |x|^2 - 2 (x.y - |y|^2 / 2), which lose
at most n u (|x||y| + |y|^2 / 2) of the term in brackets (n = d + 8 operations of unit roundoff u; Higham,
*Accuracy and Stability of Numerical Algorithms*, section 3.1). The leading candidates are ranked by exact
float64 differences. Where a point left out could still be nearer within that bound, the query is asked again
with float64 products and every point that its bound leaves open. So distances and order are those of
differences in float64 (of equal distances the lower index comes first), whatever the size of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv

from symbreak.files import InputError
from symbreak.noise import generator

__all__ = ["apart", "groups", "nearer_to_train", "nearest", "nearest_summary", "neighbours", "proportion"]

THRESHOLD = 1 / 3
NEAR = 0.1  # of the median distance to the eighth neighbour
EIGHTH = 8
SPARE = 8  # candidates kept beyond the k wanted
PIECE = 2**18  # numbers differenced at a time: they stay in the cache
KEPT = 4096  # queries a kept block
PERMUTATIONS = 99_999
Keep = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]
Pairs = tuple[torch.Tensor, torch.Tensor]


def neighbours(
    queries: torch.Tensor,
    points: torch.Tensor | None = None,
    k: int = 2,
    *,
    block: int = 1024,
    memory: int = 2**28,
    keep: Keep | None = None,
    name: str = "neighbours",
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """The k nearest points of every query, exact: d = |x - y| by differences in float64.

    Args:
        queries: [N, *S], float32 or float64.
        points: [M, *S] with M >= k; ``None``: the queries among themselves, none its own neighbour.
        k: neighbours wanted.
        block: queries at a time.
        memory: bytes of working memory beside the data; results depend on neither.
        keep: keep(key, make) -> arrays, for blocks that may have been made before; ``name`` begins their keys.
        progress: called with (queries done, queries in all).

    Returns:
        Distances [N, k] float64, rising, and the points' indices [N, k].

    Raises:
        InputError: for sizes that do not fit, too few points, NaN, or too little memory.

    >>> d, j = neighbours(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [7.0], [4.0]]))
    >>> d.tolist(), j.tolist()
    ([[1.0, 4.0], [1.0, 2.0]], [[0, 2], [2, 1]])
    """
    search = _Search(queries, points, k, block, memory)
    found: list[Pairs] = []
    for start in range(0, len(queries), KEPT):
        stop = min(start + KEPT, len(queries))

        def make(start: int = start, stop: int = stop) -> dict[str, np.ndarray]:
            parts = []
            for some in torch.arange(start, stop).split(search.block):
                parts.append(search.ask(some))
                if progress is not None:
                    progress(int(some[-1]) + 1, len(queries))
            return {"d": torch.cat([d for d, _ in parts]).numpy(), "j": torch.cat([j for _, j in parts]).numpy()}

        arrays = make() if keep is None else keep(f"{name}/{start}", make)
        found.append((torch.from_numpy(arrays["d"]), torch.from_numpy(arrays["j"])))
        if progress is not None:
            progress(stop, len(queries))
    return torch.cat([d for d, _ in found]), torch.cat([j for _, j in found])


class _Search:
    """Points in blocks, and the rounding bounds of products with them."""

    def __init__(self, queries: torch.Tensor, points: torch.Tensor | None, k: int, block: int, memory: int) -> None:
        self.own = points is None
        among = queries if points is None else points
        enough = len(among) - self.own >= k >= 1
        if not enough or queries.ndim < 2 or queries.shape[1:] != among.shape[1:] or queries[:1].numel() == 0:
            raise InputError(
                f"samples {tuple(queries.shape)} against training images {tuple(among.shape)}; expected equal sizes "
                f"and at least {k + self.own} training images."
            )
        if memory < 2**20 or block < 1:
            raise InputError(f"{memory:,} bytes and {block} queries at a time; expected at least 1 MiB and 1.")
        self.k, self.memory = k, memory
        self.x, self.y = (_flat(t) for t in (queries, among))
        self.dim = self.x.shape[1]
        self.block = max(1, min(block, memory // (64 * self.dim)))
        centre = torch.zeros(self.dim, dtype=torch.float64)
        for rows in self._rows():
            centre += self.y[rows].double().sum(0) / len(self.y)
        # Any centre will do, as long as everybody takes the same.
        self.centre = centre.float() if self.x.dtype == self.y.dtype == torch.float32 else centre
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
        wide = torch.float64 if dtype == torch.float64 else self.centre.dtype
        return (rows.to(wide) - self.centre.to(wide)).to(dtype).mul_(self.scale)

    def _products(self, x: torch.Tensor, index: torch.Tensor, part: slice) -> torch.Tensor:
        """x.y - |y|^2 / 2 [b, block] of centred queries, scaled; minus infinity for a query itself."""
        g = torch.addmm(self.half[part].to(x.dtype), x, self._centred(self.y[part], x.dtype).T, beta=-1.0)
        if self.own:
            q = ((index >= part.start) & (index < part.stop)).nonzero()[:, 0]
            g[q, index[q] - part.start] = -math.inf
        return g

    def _slack(self, square: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Bound [b, 1] of the rounding of `_products`; square: |x|^2 [b, 1] of the queries."""
        nu = (self.dim + 8) * torch.finfo(dtype).eps / 2
        gamma = nu / (1 - nu) if nu < 0.5 else math.inf
        return gamma * (square.sqrt() * self.radius + 0.5 * self.radius**2)

    def ask(self, index: torch.Tensor) -> Pairs:
        """The k nearest of the queries at the given positions."""
        raw = self.x[index]
        x = self._centred(raw, torch.float32)
        square = self._centred(raw, torch.float64).square().sum(1, keepdim=True)
        if not bool(torch.isfinite(square).all()):
            raise InputError("the images or features hold NaN or infinity; expected finite numbers.")
        value = torch.empty(len(index), 0)
        place = torch.empty(len(index), 0, dtype=torch.long)
        for part in self._blocks(len(index), 4):
            g, j = _top(self._products(x, index, part), self.k + SPARE)
            value, place = torch.cat([value, g], 1), torch.cat([place, j + part.start], 1)
            if value.shape[1] > self.k + SPARE:
                value, order = value.topk(self.k + SPARE, dim=1)
                place = place.gather(1, order)
        d = self._exact(index.repeat_interleave(place.shape[1]), place.reshape(-1)).reshape(place.shape)
        d, place = _ranked(d, place, self.k)
        # Whatever was left out has a product of at most the lowest one kept.
        worst = 0.5 * (square - (d[:, -1:] * self.scale) ** 2)
        slack = self._slack(square, torch.float32) + 1e-12 * (square + worst.abs())
        sure = (value[:, -1:].double() + slack < worst)[:, 0]
        if value.shape[1] == len(self.y):
            sure[:] = True
        doubt = (~sure).nonzero()[:, 0]
        for some in doubt.split(64) if len(doubt) else ():
            d[some], place[some] = self._again(index[some], d[some], place[some])
        return d, place

    def _again(self, index: torch.Tensor, d: torch.Tensor, place: torch.Tensor) -> Pairs:
        """The same from float64 products: every point that may be as near as the k-th known is ranked."""
        known = d[:, -1].clone()
        best = [(d[i : i + 1], place[i : i + 1]) for i in range(len(index))]
        for q, j in self.within(index, known):
            exact = self._exact(index[q].expand(len(j)), j)
            old_d, old_j = best[q]
            fresh = ~torch.isin(j, old_j[0])
            both = torch.cat([old_d, exact[None, fresh]], 1), torch.cat([old_j, j[None, fresh]], 1)
            best[q] = _ranked(*both, self.k)
        return torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])

    def within(self, index: torch.Tensor, reach: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """For queries at the given positions, points that may lie within ``reach`` [b]: (query, indices), in parts."""
        x = self._centred(self.x[index], torch.float64)
        square = x.square().sum(1, keepdim=True)
        lowest = 0.5 * (square - (reach[:, None] * self.scale) ** 2)
        lowest = lowest - self._slack(square, torch.float64) - 1e-12 * (square + lowest.abs())
        for part in self._blocks(len(index), 8):
            open_ = self._products(x, index, part) >= lowest
            for q in open_.any(1).nonzero()[:, 0].tolist():
                yield q, open_[q].nonzero()[:, 0] + part.start

    def _exact(self, q: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """|x_q - y_j| [pairs] by differences in float64; infinite for a query itself."""
        if len(q) == 1:  # a sum over a single row may be split among threads, and end in other bits
            return self._exact(q.repeat(2), j.repeat(2))[:1]
        out = []
        pieces = math.ceil(len(q) / max(3, min(self.memory // 32, PIECE) // self.dim))
        for a, b in zip(q.tensor_split(pieces), j.tensor_split(pieces)):
            gap = self.y[b].double()
            gap -= self.x[a]
            out.append(gap.square_().sum(1).sqrt_())
        d = torch.cat(out)
        if self.own:
            d[q == j] = math.inf
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


def nearest(samples: torch.Tensor, train: torch.Tensor, block: int = 1024, memory: int = 2**28) -> Pairs:
    """Distances [N, 2] to the two nearest training rows, rising, and the index [N] of the nearest.

    Args:
        samples: [N, *S]; train: [M, *S] with M >= 2.
        block, memory: as for `neighbours`; results do not depend on them.
    """
    d, index = neighbours(samples, train, 2, block=block, memory=memory)
    return d, index[:, 0]


def nearest_summary(samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor | None) -> dict[str, Any]:
    """Median nearest distance and share with d_1/d_2 < 1/3, for samples and for held-out images."""

    def one(x: torch.Tensor) -> dict[str, Any]:
        d, _ = nearest(x, train)
        ratio = d[:, 0] / d[:, 1].clamp_min(1e-12)
        return {
            "count": len(x),
            "median_nearest": float(d[:, 0].median()),
            "memorized": float((ratio < THRESHOLD).double().mean()),
        }

    return {
        "features": "pixels",
        "threshold": THRESHOLD,
        "samples": one(samples),
        "held_out": None if held_out is None else one(held_out),
    }


# Duplicates


def groups(
    points: torch.Tensor,
    near: float = NEAR,
    *,
    memory: int = 2**28,
    keep: Keep | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, float, float]:
    """Near duplicates among different points: all that a chain of pairs |x - y| <= radius joins.

        radius = near * median_i |x_i - its eighth neighbour|

    The eighth and not the first neighbour sets the scale, so that data of which every image comes twice, or up
    to eight times, still have their own scale. Every pair within the radius is found.

    Args:
        points: [M, *S], exact duplicates taken out, M >= 2.
        near: fraction of the scale, 0 for none but equal points.
        memory, keep, progress: as for `neighbours`.

    Returns:
        The group [M] of every point (0, 1, ... by first appearance), the radius and the scale.
    """
    k = min(EIGHTH, len(points) - 1)
    d, j = neighbours(points, None, k, memory=memory, keep=keep, name="train", progress=progress)
    scale = float(d[:, -1].median())
    radius = near * scale
    rows, columns = (d <= radius).nonzero(as_tuple=True)
    first, second = [rows], [j[rows, columns]]
    full = (d[:, -1] <= radius).nonzero()[:, 0]  # these may have more neighbours within the radius
    if len(full) and k < len(points) - 1:
        search = _Search(points, None, k, 64, memory)
        for some in full.split(64):
            for q, others in search.within(some, torch.full((len(some),), radius, dtype=torch.float64)):
                inside = others[search._exact(some[q].expand(len(others)), others) <= radius]
                first.append(some[q].expand(len(inside)))
                second.append(inside)
    a, b = torch.cat(first).numpy(), torch.cat(second).numpy()
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), (len(points), len(points)))
    label = connected_components(graph, directed=False)[1]
    _, place, codes = np.unique(label, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(place))
    return order[codes], radius, scale


def apart(
    queries: torch.Tensor,
    points: torch.Tensor,
    group: np.ndarray,
    *,
    memory: int = 2**28,
    keep: Keep | None = None,
    name: str = "samples",
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Nearest point, and nearest point of another group: d_1 / d_2 that duplicates cannot spoil.

    Args:
        queries: [N, *S]; points: [M, *S] of at least two groups; group: [M] integers, see `groups`.
        memory, keep, name, progress: as for `neighbours`.

    Returns:
        Distances [N, 2] float64, rising, and indices [N, 2].
    """
    labels = torch.from_numpy(np.asarray(group, dtype=np.int64))
    if int(labels.max()) == int(labels.min()):
        raise InputError("all training images are duplicates of one; expected at least 2 different ones.")
    d, j = neighbours(queries, points, min(EIGHTH, len(points)), memory=memory, keep=keep, name=name, progress=progress)
    own = labels[j]
    other = own != own[:, :1]
    column = other.double().argmax(1, keepdim=True)
    distance, index = torch.cat([d[:, :1], d.gather(1, column)], 1), torch.cat([j[:, :1], j.gather(1, column)], 1)
    rest = (~other.any(1)).nonzero()[:, 0]  # all neighbours found belong to one large group
    for g in own[rest, 0].unique().tolist():
        rows = rest[own[rest, 0] == g]
        outside = (labels != g).nonzero()[:, 0]
        far, where = neighbours(queries[rows], points[outside], 1, memory=memory)
        distance[rows, 1], index[rows, 1] = far[:, 0], outside[where[:, 0]]
    return distance, index


# Counts and what they can say


def proportion(count: float, of: float, confidence: float = 0.95) -> dict[str, Any]:
    """A share with its Clopper-Pearson interval, which covers at least the confidence at every count.

    >>> found = proportion(0, 100)  # the upper end is 1 - 0.025 ** (1 / 100)
    >>> found["share"], found["low"], round(found["high"], 6)
    (0.0, 0.0, 0.036217)
    """
    tail = (1 - confidence) / 2
    low = 0.0 if count <= 0 else float(betaincinv(count, of - count + 1, tail))
    high = 1.0 if count >= of else float(betaincinv(count + 1, of - count, 1 - tail))
    return {"count": count, "of": of, "share": count / of, "low": low, "high": high}


def nearer_to_train(
    to_train: Pairs, to_held_out: Pairs, references: int, seed: int = 0, confidence: float = 0.95
) -> dict[str, Any]:
    """Do samples lie nearer to training than to held-out images? 1/2 of them where the network copies nothing.

        S = (1 / N) sum_r c_r [r is a training image],  c_r the samples whose nearest reference is r

    Without copying, training and held-out images are exchangeable: the p-value is that of S under random
    halves of the 2 m references (draws of the exact permutation law). A plain binomial test would take samples
    that share a reference for independent; the interval counts N_eff = N^2 / sum c_r^2 samples for this reason.

    Args:
        to_train, to_held_out: distance [N] and index [N] of the nearest among m training, m held-out images.
        references: m.
        seed: of the permutations.

    Returns:
        Share, interval, ``effective`` count, ``p_value`` (one-sided: too near to the training images), counts.

    Source: kin of the data-copying test of Meehan, Chaudhuri & Dasgupta, arXiv:2004.05675; effective counts
        after Kish, *Survey Sampling* (1965).
    """
    (a, i), (b, j) = to_train, to_held_out
    weight = torch.zeros(2, references, dtype=torch.float64)
    weight[0].index_add_(0, i, torch.where(a < b, 1.0, torch.where(a == b, 0.5, 0.0)).double())
    weight[1].index_add_(0, j, torch.where(b < a, 1.0, torch.where(a == b, 0.5, 0.0)).double())
    nearer, n = float(weight[0].sum()), len(a)
    effective = n**2 / float(weight.square().sum())
    values, counts = np.unique(weight.numpy(), return_counts=True)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator(seed, 61)).item()))
    drawn = rng.multivariate_hypergeometric(counts, references, size=PERMUTATIONS, method="marginals")
    p = (1 + int((drawn @ values >= nearer - 1e-9).sum())) / (1 + PERMUTATIONS)
    share = proportion(nearer / n * effective, effective, confidence)
    return {
        "count": nearer,
        "of": n,
        "share": nearer / n,
        "low": share["low"],
        "high": share["high"],
        "effective": effective,
        "ties": int((a == b).sum()),
        "references": references,
        "p_value": p,
        "permutations": PERMUTATIONS,
    }
