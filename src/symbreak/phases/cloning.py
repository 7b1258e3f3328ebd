"""Clones: when a trajectory is decided, measured by running it down again.

Two reverse trajectories share their path, the trunk, down to sigma and then use noise of their own; phi(sigma) is the
probability that both end in one class. Steps are of second order (`descend`, "2m").

Source: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491; the monotone form is derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats

from symbreak.critical import CriticalTime, Curve, Levels, Result, curve, mean_curve
from symbreak.intervals import percentiles
from symbreak.laws.class_posterior import class_of, classes_by_name
from symbreak.laws.clusters import kmeans
from symbreak.laws.law import Law
from symbreak.networks.denoiser import Denoiser
from symbreak.noise import NoiseLevel
from symbreak.phases.branches import Attributes, Branches, Classify, Paths, Tell, by_attribute, class_shares, stacked
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["Clones", "clone_agreement", "clones", "clones_by_attribute"]

SOURCE = "arXiv:2402.18491, phi halfway from sum_c pi_c^2 to 1"


@dataclass(frozen=True)
class Clones(Result):
    """Measured cloning.

    Attributes:
        curve: phi at the levels, with bootstrap intervals.
        crossing: level at which phi passes halfway from its floor to certainty.
        classes, priors: the classes that were seen, [K], and their shares among all final images, trunks and
            clones (each has the sampler's law).
        floor, floor_low, floor_high: sum of squared priors: unbiased, from different pairs only, and its interval.
        agree: [pairs, G] whether clone and trunk end in one class.
        ends, labels: final images of the trunks, [pairs, *S] float32, and their classes [pairs].
        calls: states given to the denoiser.
    """

    record = ("curve", "crossing", "classes", "priors", "floor", "floor_low", "floor_high", "pairs", "calls")

    curve: Curve
    crossing: CriticalTime
    classes: np.ndarray
    priors: np.ndarray
    floor: float
    floor_low: float
    floor_high: float
    agree: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    calls: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.agree)


@renamed(**dict.fromkeys(("sigma_start", "sigma_end", "dtype", "resamples"), "paths=sb.Paths(...)"))
def clones(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    classify: Classify | None = None,
    pairs: int = 300,
    steps: int = 40,
    seeds: int = 0,
    clusters: int | None = None,
    paths: Paths | None = None,
    run: Run | None = None,
) -> Clones:
    """The level at which a sampler decides the class, from pairs of trajectories that part on their way down.

        phi(sigma) = E sum_c P(c | state at sigma)^2        crossing: phi = (1 + sum_c pi_c^2) / 2

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: level, or levels [G], at which clones leave.
        classify: final images [B, *S] float32 -> integer classes [B] or scores [B, K], whose largest counts; by
            default a `Mixture`'s likeliest class.
        pairs: number of trunks; each pair is an independent trajectory and its clones.
        steps: network evaluations on one way down. Few of them read the crossing high by up to half a step in sigma:
            exact mixtures 13 % with 10 or 20, 2 to 4 % with 40, under 1 % with 200. Its lower end holds half a step.
        seeds: every block of pairs draws from its own generator, keyed by this and the number of the block.
        clusters: number of classes to find in the trunks' final images, by k-means in their leading 32
            principal components, instead of classify. All final images, (1 + G) pairs of them, are then held in
            memory as float32. The interval takes the clusters as fixed.
        paths: `Paths`: where the trajectories begin and end, their precision, resamples of the pairs.
        run: finished blocks of pairs, and progress in states denoised of all.

    Returns:
        `Clones`. Levels share their trunks: their errors are correlated, which the interval of the crossing knows.
        Where all pairs agree the interval of the curve has no width. The crossing has no level, and a reason,
        where the range does not hold it or where only one class was seen; an end of its interval is missing
        where more than 2.5 % of the resamples pass beyond the levels.

    Raises:
        InputError: for levels outside the range, fewer than 2 pairs or steps, no way or two ways to classify, or
            a classifier that gives NaN or the wrong shape.

    Source: arXiv:2402.18491; K classes, the floor's estimate and the monotone fit are derived.

    >>> from symbreak.laws.mixture import Mixture
    >>> law = Mixture.from_parameters([[-4.0], [4.0]], 1.0)
    >>> measured = clones(law, [1.0, 2.0, 4.0, 8.0, 16.0], pairs=400)
    >>> measured.crossing.low.sigma < 3.8 < measured.crossing.high.sigma     # phi = 3/4: z^2 = 16 / (1 + sigma^2)
    True
    """
    branches = _branches(law_or_denoiser, sigma, pairs, steps, paths)
    if classify is not None and clusters is not None:
        raise InputError("classify and clusters came together; pass one of them.")
    if clusters is not None and not 2 <= clusters <= pairs // 2:
        raise InputError(f"{clusters} clusters of {pairs} final images; expected at least 2, and two images for each.")
    arrays = _ends(branches, branches.classifier(classify) if clusters is None else None, pairs, seeds, run)
    labels = arrays["labels"] if clusters is None else _clusters(arrays["ends"], clusters, seeds)
    return _measured(branches, labels, arrays["ends"][0], branches.weights(pairs, seeds))


def clones_by_attribute(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    classify: Attributes,
    pairs: int = 300,
    steps: int = 40,
    seeds: int = 0,
    paths: Paths | None = None,
    run: Run | None = None,
) -> dict[str, Clones]:
    """The level at which a sampler decides each of several attributes: one set of `clones` serves them all.

    Args:
        law_or_denoiser, sigma, pairs, steps, seeds, paths, run: as for `clones`.
        classify: final images [B, *S] float32 -> by the attribute's name classes [B] or scores [B, K].

    Returns:
        `Clones` by attribute. They share their trajectories: the errors of attributes are correlated.

    Raises:
        InputError: as `clones`.

    Source: arXiv:2402.18491.
    """
    branches = _branches(law_or_denoiser, sigma, pairs, steps, paths)
    arrays = _ends(branches, classify, pairs, seeds, run, classes_by_name)
    w, ends = branches.weights(pairs, seeds), arrays["ends"][0]
    return {name: _measured(branches, labels, ends, w) for name, labels in by_attribute(arrays).items()}


def _branches(source: Law | Denoiser, sigma: Levels, pairs: int, steps: int, paths: Paths | None) -> Branches:
    """The trajectories of clones."""
    branches = Branches(source, sigma, steps, paths, shared=True)
    if pairs < 2:
        raise InputError(f"{pairs} pairs; expected at least 2.")
    return branches


def _measured(branches: Branches, labels: np.ndarray, ends: np.ndarray, w: np.ndarray) -> Clones:
    """What the classes [1 + G, pairs] of trunks and clones say, with the weights of `Branches.weights`."""
    pairs = labels.shape[1]
    agree = (labels[1:] == labels[0]).T
    classes = np.unique(labels)
    priors, floor = class_shares(labels.T, classes, w)
    low, high = percentiles(floor[1:])
    crossing = branches.halfway(
        w @ agree / pairs, (1 + floor) / 2, classes, "agreement of clones", criterion="cloning", source=SOURCE
    )
    return Clones(
        curve=mean_curve(branches.s, agree.T, "clone agreement", w, branches.shape),
        crossing=_with_steps(crossing, branches.grid),
        classes=classes,
        priors=priors,
        floor=float(floor[0]),
        floor_low=float(low),
        floor_high=float(high),
        agree=agree,
        ends=ends,
        labels=labels[0],
        calls=pairs * branches.cost,
    )


@renamed(**dict.fromkeys(("sigma_start", "sigma_end", "dtype"), "paths=sb.Paths(...)"))
def clone_agreement(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    classify: Classify | None = None,
    pairs: int = 1000,
    steps: int = 200,
    seeds: int = 0,
    paths: Paths | None = None,
    run: Run | None = None,
) -> Curve:
    """Measured cloning, the curve alone: the share of pairs that part at sigma and end in one class.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a branch level, or branch levels [G].
        classify, pairs, steps, seeds, paths, run: as for `clones`, but float64 states for a network, too.

    Returns:
        A `Curve` with 95 % Wilson intervals, which have a width even where all pairs agree. Levels share their
        trunks: their errors are correlated.

    Raises:
        InputError: for sigma <= 0 or outside the range, no pair, fewer than 2 steps, or no way to classify.

    Source: arXiv:2402.18491.
    """
    paths = paths or Paths()
    branches = Branches(law_or_denoiser, sigma, steps, replace(paths, dtype=paths.dtype or torch.float64), shared=True)
    if pairs < 1:
        raise InputError(f"{pairs} pairs; expected at least 1.")
    labels = _ends(branches, branches.classifier(classify), pairs, seeds, run)["labels"]
    share, z = (labels[1:] == labels[0]).mean(1), float(stats.norm.ppf(0.975))
    middle = (share + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z * np.sqrt(share * (1 - share) / pairs + z * z / (4 * pairs**2)) / (1 + z * z / pairs)
    return curve(branches.s, branches.shape, share, middle - half, middle + half, "clone agreement")


def _with_steps(time: CriticalTime, grid: np.ndarray) -> CriticalTime:
    """A crossing whose interval also holds what its finite steps do, which read it high by up to half a step."""
    if time.sigma is None:
        return time
    i = int(np.clip(np.searchsorted(-grid, -time.sigma), 1, len(grid) - 1))
    ratios = grid[:-1] / grid[1:]
    step = float(ratios[max(i - 2, 0) : i + 1].max())  # a level put in beside the crossing leaves a sliver there
    low = None if time.low is None else NoiseLevel(time.low.sigma / step**0.5)
    reason = f"{time.reason}; steps there are a factor {step:.3g}: it may read high by half of one, which low holds"
    return replace(time, low=low, reason=reason)


def _ends(
    branches: Branches,
    classify: Classify | Attributes | None,
    pairs: int,
    seeds: int,
    run: Run | None,
    read: Callable[..., np.ndarray | dict[str, np.ndarray]] = class_of,
) -> Arrays:
    """``labels`` [1 + G, pairs] of trunks and clones, and the trunks' ``ends`` [1, pairs, *S]; without classify all.

    Where several attributes are ``read``, labels of each.
    """

    def make(rows: np.ndarray, g: torch.Generator, tell: Tell) -> Arrays:
        images = branches.images(len(rows), g, tell)
        if classify is None:
            return {"ends": images.float().cpu().numpy()}
        ends, said = images[:1].float().cpu().numpy(), [read(classify, some) for some in images]
        return {"ends": ends, **stacked(said)}

    return branches.measure(run, "clones", pairs, make, classify, seeds=seeds)


def _clusters(images: np.ndarray, k: int, seed: int, leading: int = 32) -> np.ndarray:
    """Clusters [1 + G, n] of images [1 + G, n, *S]: k-means of the trunks' [0], the others by the nearest centre."""
    flat = images.reshape(len(images), images.shape[1], -1).astype(np.float64)
    mean = flat[0].mean(0)
    axes = np.linalg.svd(flat[0] - mean, full_matrices=False)[2][:leading]
    points = (flat - mean) @ axes.T
    fitted = kmeans(points[0], k, seed, starts=10)
    return np.stack([fitted.predict(p) for p in points]).astype(np.int64)
