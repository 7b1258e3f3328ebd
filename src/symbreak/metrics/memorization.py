"""Copying: how near generated images lie to training images.

A sample counts as memorized when its nearest training image is less than a third as far as the second
nearest that is no duplicate of it, d_1 / d_2 < 1/3 (Bonnaire et al., arXiv:2505.17638). Held-out real images give the
scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from symbreak.data.images import Images
from symbreak.intervals import proportion
from symbreak.laws.nearest_neighbours import Rows, neighbours, searches
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import from_each
from symbreak.runtime.rows import Shards
from symbreak.runtime.run import Run, renamed
from symbreak.runtime.shown import Shown

__all__ = ["Different", "apart", "different", "groups", "nearer_to_train", "nearest", "nearest_in", "nearest_summary"]

THRESHOLD = 1 / 3
NEAR = 0.1  # of the median distance to the eighth neighbour
EIGHTH = 8
SCALE_ROWS = 1000  # training images that the scale of near duplicates is taken from
PERMUTATIONS = 99_999
Pairs = tuple[torch.Tensor, torch.Tensor]


def nearest(samples: torch.Tensor, train: torch.Tensor, block: int = 1024, memory: int = 2**28) -> Pairs:
    """Distances [N, 2] to the two nearest training rows, rising, and the index [N] of the nearest.

    Args:
        samples: [N, *S]; train: [M, *S] with M >= 2.
        block, memory: as for `neighbours`; results do not depend on them.
    """
    d, index = neighbours(samples, train, 2, block=block, run=Run(memory=memory))
    return d, index[:, 0]


@dataclass(frozen=True)
class Different(Shown):
    """Training images that differ, to look for copies among.

    Attributes:
        points: the different images, exact duplicates taken out.
        radius: two of them within it are near duplicates, see `groups`.
        count: training images, duplicates among them.
    """

    points: Shards
    radius: float
    count: int


@renamed()
def different(train: Rows | Images, run: Run | None = None) -> Different:
    """The different images of a training set, and the scale of their near duplicates.

    The radius is that of `groups`, a tenth of the median distance to the eighth neighbour; of more than 1,000 images a
    random 1,000 are queried, so that this costs no search of all among all.

    Raises:
        InputError: where fewer than two images differ.
    """
    run = run or Run()
    rows = train.shards(run.share(1 / 4).named("images")) if isinstance(train, Images) else train
    rows = Shards.of(rows) if isinstance(rows, torch.Tensor) else rows
    first: dict[bytes, int] = {}
    for i, one in enumerate(rows.digests()):
        first.setdefault(one, i)
    points = rows.take(np.fromiter(first.values(), np.int64))
    if len(points) < 2:
        raise InputError(f"{len(rows):,} training images, all equal; expected at least 2 different ones.")
    some = torch.randperm(len(points), generator=generator(0, 66))[:SCALE_ROWS].sort().values
    k = min(EIGHTH + 1, len(points))  # the nearest of an image is itself
    d, _ = neighbours(points.take(some.numpy()), points, k, run=run.share(1 / 2).unstored())
    return Different(points, NEAR * float(d[:, -1].median()), len(rows))


@renamed()
def nearest_in(samples: Rows, train: Rows | Images | Different, run: Run | None = None) -> torch.Tensor:
    """Distances [N, 2] to the nearest training image, and to the nearest one that is no duplicate of it.

    Every rank reads and holds a part of the training images. Duplicates of the nearest one are what a chain of near
    duplicates among the sample's neighbours joins to it; `groups` follows chains through all images.

    Args:
        samples: [N, *S].
        train: at least 2 different images: a data set, rows, or what `different` made of them.
        run: its memory is to hold images in and to work in; results do not depend on it.
    """
    run = (run or Run()).unstored()
    known = train if isinstance(train, Different) else different(train, run)
    points, inner = known.points, run.share(1 / 2)
    k = min(EIGHTH, len(points))
    d, j = neighbours(samples, points, k, run=inner)
    second = torch.full((len(d),), torch.inf, dtype=torch.float64)
    for part in torch.arange(len(d)).split(max(1, inner.bytes() // (16 * k * points.row_bytes))):
        near = points.at(j[part].flatten()).double().reshape(len(part), k, -1)
        joined = (torch.cdist(near, near) <= known.radius).double()
        same = joined[:, :1]
        for _ in range(k):
            same = ((same @ joined) > 0).double()
        second[part] = d[part].where(same[:, 0] == 0, torch.inf).min(1).values
    rest = torch.isinf(second).nonzero()[:, 0]  # all neighbours are duplicates of the nearest
    if len(rest):
        some = samples.take(rest.numpy()) if isinstance(samples, Shards) else samples[rest]
        second[rest] = apart(some, points, groups(points, run=inner)[0], run=inner)[0][:, 1]
    return torch.stack([d[:, 0], second], 1)


@renamed()
def nearest_summary(
    samples: Rows, train: Rows | Images | Different, held_out: Rows | None, run: Run | None = None
) -> Values:
    """Median nearest distance and share with d_1/d_2 < 1/3, duplicates taken out, for samples and held-out images.

    Both have 95 % intervals: of the median by ranks, of the share by Clopper and Pearson, given the training images.

    Args:
        samples, held_out: [N, *S].
        train: training images, see `nearest_in`.
        run: see `nearest_in`.
    """
    run = run or Run()
    known = train if isinstance(train, Different) else different(train, run)

    def one(x: Rows) -> Values:
        d = nearest_in(x, known, run)
        memorized = proportion(int((d[:, 0] / d[:, 1].clamp_min(1e-12) < THRESHOLD).sum()), len(x))
        middle = stats.quantile_test(d[:, 0].numpy(), p=0.5).confidence_interval()
        return {
            "count": len(x),
            "median_nearest": float(d[:, 0].median()),
            **{f"median_nearest_{k}": float(v) for k, v in zip(("low", "high"), middle)},
            "memorized": memorized["share"],
            **{f"memorized_{k}": memorized[k] for k in ("low", "high")},
            "searched": known.count,
            "different": len(known.points),
        }

    return {
        "features": "pixels",
        "threshold": THRESHOLD,
        "samples": one(samples),
        "held_out": None if held_out is None else one(held_out),
    }


# Duplicates


def groups(
    points: Rows, near: float = NEAR, run: Run | None = None, *, name: str = "train", least: float = 0.0
) -> tuple[np.ndarray, float, float]:
    """Near duplicates among different points: all that a chain of pairs |x - y| <= radius joins.

        radius = near * median_i |x_i - its eighth neighbour|

    The eighth and not the first neighbour sets the scale, so that data of which every image comes twice, or up
    to eight times, still have their own scale. Every pair within the radius is found.

    Args:
        points: [M, *S] or `Shards`, exact duplicates taken out, M >= 2.
        near: fraction of the scale, 0 for none but equal points.
        run: memory to work in (256 MiB by default), finished parts, whom to tell.
        name: begins the keys of finished parts.
        least: radius at least, where equal points differ by rounding.

    Returns:
        The group [M] of every point (0, 1, ... by first appearance), the radius and the scale.
    """
    run = run or Run()
    memory = max(2**20, run.bytes(default=2**28))
    k = min(EIGHTH, len(points) - 1)
    d, j = neighbours(points, None, k, name=name, run=run)
    scale = float(d[:, -1].median())
    radius = max(near * scale, least)
    rows, columns = (d <= radius).nonzero(as_tuple=True)
    first, second = [rows], [j[rows, columns]]
    full = (d[:, -1] <= radius).nonzero()[:, 0]  # these may have more neighbours within the radius
    if len(full) and k < len(points) - 1:
        more = _within(points, full, radius, memory)
        first.append(more[0])
        second.append(more[1])
    a, b = torch.cat(first).numpy(), torch.cat(second).numpy()
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), (len(points), len(points)))
    label = connected_components(graph, directed=False)[1]
    _, place, codes = np.unique(label, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(place))
    return order[codes], radius, scale


def _within(points: Rows, some: torch.Tensor, radius: float, memory: int) -> Pairs:
    """All pairs of the points at some positions with others within the radius."""
    rows = Shards.of(points) if isinstance(points, torch.Tensor) else points
    first, second = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for index in some.split(max(1, min(4096, memory // (8 * rows.row_bytes)))):
        x = rows.at(index).flatten(1)
        for search in searches(rows, 1, 64, memory, same=True):
            for part in torch.arange(len(index)).split(64):
                reach = torch.full((len(part),), radius, dtype=torch.float64)
                for q, others in search.within(x[part], index[part], reach):
                    one = torch.full((len(others),), q)
                    inside = others[search.exact(x[part], index[part], one, others) <= radius] + search.first
                    first.append(index[part[q]].expand(len(inside)))
                    second.append(inside)
    each = from_each({"a": torch.cat(first).numpy(), "b": torch.cat(second).numpy()}, rows.shared)
    return tuple(torch.from_numpy(np.concatenate([e[k] for e in each])) for k in "ab")  # type: ignore[return-value]


def apart(queries: Rows, points: Rows, group: np.ndarray, name: str = "samples", run: Run | None = None) -> Pairs:
    """Nearest point, and nearest point of another group: d_1 / d_2 that duplicates cannot spoil.

    Args:
        queries: [N, *S] or `Shards`; points: [M, *S] or `Shards`, of at least two groups; group: [M] integers, see
            `groups`.
        name: begins the keys of finished parts.
        run: as for `groups`.

    Returns:
        Distances [N, 2] float64, rising, and indices [N, 2].
    """
    labels = torch.from_numpy(np.asarray(group, dtype=np.int64))
    if int(labels.max()) == int(labels.min()):
        raise InputError("all training images are duplicates of one; expected at least 2 different ones.")
    run = run or Run()
    memory, k = max(2**20, run.bytes(default=2**28)), min(EIGHTH, len(points))
    d, j = neighbours(queries, points, k, name=name, run=run)
    of = labels[j]
    other = of != of[:, :1]
    column = other.double().argmax(1, keepdim=True)
    distance, index = torch.cat([d[:, :1], d.gather(1, column)], 1), torch.cat([j[:, :1], j.gather(1, column)], 1)
    rest = (~other.any(1)).nonzero()[:, 0]  # all neighbours belong to one large group
    if len(rest):
        some = queries.take(rest.numpy()) if isinstance(queries, Shards) else queries[rest]
        far, where = neighbours(some, points, 1, classes=(of[rest, 0], labels), run=Run(memory=memory))
        distance[rest, 1], index[rest, 1] = far[:, 0], where[:, 0]
    return distance, index


# Counts and what they can say


def nearer_to_train(
    to_train: Pairs, to_held_out: Pairs, references: int, seed: int = 0, confidence: float = 0.95
) -> Values:
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
