"""Are two sets of samples from one law? Sliced Wasserstein distance, and classifiers that try to tell them apart.

Both see more than means and covariances, and need no features that somebody trained: they suit tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats

from symbreak.intervals import jackknife, proportion
from symbreak.metrics.kernel_distance import rows_for_blocks
from symbreak.noise import generator
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values

__all__ = ["classifier_test", "sliced_wasserstein"]

DIRECTIONS = 128
BLOCKS = 10
MOST = 4000  # rows of each set that are told apart
FEWEST = 20
SQUARES = 200  # columns up to which the squares of the values are offered to the linear classifier, too


def sliced_wasserstein(
    samples: torch.Tensor, real: torch.Tensor, *, directions: int = DIRECTIONS, blocks: int = BLOCKS, seed: int = 0
) -> Values:
    """Sliced 2-Wasserstein distance of rows [N, F] and real ones [M, F].

        SW^2 = mean over directions t of W_2^2(t . x, t . y)

    It is exact along every direction; directions are drawn evenly from the sphere, the same for the same seed. Of
    finite samples it is above 0 for equal laws: compare it with what real rows give at the same counts.

    Args:
        samples, real: at least 2 rows a block.
        directions: how many; rounded up to whole bases.
        blocks: random blocks of both sets, each left out once for the interval (jackknife): spread, not bias.
        seed: of directions and blocks.

    Returns:
        ``value`` (SW), ``low``, ``high``, ``directions``, ``samples``, ``reference``.

    Raises:
        InputError: for too few rows or unequal features.

    Source: Rabin et al. 2011; Bonneel et al. 2015.

    >>> x = torch.arange(8.0)[:, None]
    >>> round(sliced_wasserstein(x, x + 2.0)["value"], 6)
    2.0
    """
    x, y, blocks = rows_for_blocks(samples, real, blocks)
    # Whole orthonormal bases, by which a shift is measured exactly.
    width, g = x.shape[1], generator(seed, 41)
    bases = torch.randn(max(1, -(-directions // width)), width, min(width, directions), generator=g).double()
    axes = torch.linalg.qr(bases).Q.transpose(0, 1).flatten(1)
    along = [(x @ axes).numpy(), (y @ axes).numpy()]
    value = _distance(*(np.sort(a, axis=0) for a in along))
    left_out = []
    for side, a in enumerate(along):
        whole = [np.sort(b, axis=0) for b in along]
        values = []
        for part in torch.randperm(len(a), generator=generator(seed, 42, side)).tensor_split(blocks):
            whole[side] = np.sort(np.delete(a, part.numpy(), axis=0), axis=0)
            values.append(_distance(*whole))
        left_out.append(np.array(values))
    low, high = jackknife(value, *left_out)
    return {
        "value": value,
        "low": max(0.0, low),
        "high": high,
        "directions": axes.shape[1],
        "samples": len(x),
        "reference": len(y),
    }


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """SW of sorted projections [N, K] and [M, K]: quantile functions are steps, which meet at i / N and j / M."""
    n, m = len(x), len(y)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # whole numbers, in units of 1 / (n m)
    width = np.diff(ends, prepend=0) / (n * m)
    i, j = (ends - 1) // m, (ends - 1) // n
    return float(np.sqrt(max(0.0, (width[:, None] * (x[i] - y[j]) ** 2).sum(0).mean())))


def classifier_test(samples: torch.Tensor, real: torch.Tensor, *, seed: int = 0) -> Values:
    """How well a classifier tells samples [N, F] from real rows [M, F] that it has not seen: 1/2 where it cannot.

    Equally many rows of both are drawn; half of each train the classifiers, the others are held out. ``logistic`` is a
    logistic regression on the standardized values and (up to 200 columns) their squares, ``knn`` asks nearest
    neighbours among the standardized rows, about the square root of their number. ``p_value`` is the binomial law's for
    so many right ones by chance, one-sided.

    Args:
        samples, real: at least 20 rows each; at most 4,000 of each are used.
        seed: of the halves.

    Returns:
        ``logistic`` and ``knn``, each with ``share`` right, its interval ``low``, ``high`` (of these classifiers: those
        of other halves scatter a little more), ``count``, ``of`` and ``p_value``; ``samples``, ``reference``: rows of
        each set, half of them held out.

    Raises:
        InputError: for too few rows, or unequal features.

    Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise InputError(f"features of shape {tuple(samples.shape)} and {tuple(real.shape)}; expected [N, F], [M, F].")
    count = min(len(samples), len(real), MOST)
    if count < FEWEST:
        raise InputError(f"{len(samples)} samples and {len(real)} real ones to tell apart; expected {FEWEST} of each.")
    both = []
    for side, rows in enumerate((samples, real)):
        order = torch.randperm(len(rows), generator=generator(seed, 43, side))[:count]
        both.append(rows.double()[order].numpy())
    half = count // 2
    train, test = (np.concatenate([rows[part] for rows in both]) for part in (slice(half), slice(half, None)))
    mean, spread = train.mean(0), train.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    train, test = (train - mean) / spread, (test - mean) / spread
    known, wanted = (np.repeat([0, 1], n) for n in (half, count - half))
    out: Values = {"samples": count, "reference": count}
    for name, right in _right(train, test, known, wanted):
        p = stats.binomtest(right, len(wanted), 0.5, alternative="greater").pvalue
        out[name] = {**proportion(right, len(wanted)), "p_value": float(p)}
    return out


def _right(train: np.ndarray, test: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[str, int]]:
    """How many held-out rows each classifier gets right."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    squares = train.shape[1] <= SQUARES
    linear, held_out = (np.hstack([x, x**2 - 1]) if squares else x for x in (train, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # sets far apart have no finite optimum
        logistic = LogisticRegression(C=1.0, max_iter=500).fit(linear, known)
    yield "logistic", int((logistic.predict(held_out) == wanted).sum())
    neighbours = max(3, round(len(train) ** 0.5)) | 1  # an odd number has no ties
    yield "knn", int((KNeighborsClassifier(neighbours).fit(train, known).predict(test) == wanted).sum())
