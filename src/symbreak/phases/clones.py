"""Clones, U-turns and kicks: when a trajectory is decided, measured by running it down again.

    clones        two reverse trajectories share their path, the trunk, down to sigma and then use noise of their
                  own; phi(sigma) is the probability that both end in one class
    U-turn        a real image is noised to sigma and denoised again: does its class survive?
    opportunity   a trajectory is kicked at sigma and goes on with the same noise: how far does the kick carry?

A sampler is a Markov chain down the levels, so phi = E sum_c P(c | state at sigma)^2 for that chain, whatever its
network and its steps: it rises monotonically as sigma falls, from sum_c pi_c^2 to 1. A U-turn of data that the
network has learnt changes its class with probability 1 - phi. Crossings are therefore read from a monotone fit.

All trajectories of a block advance together in one batch that grows as sigma falls: the trunk runs once whatever
the number of levels, it is one of the two clones itself, and a clone leaves after the network has been asked
about the state that both share. N steps and levels at steps k_j cost N + sum_j (N - 1 - k_j) evaluations a pair.
Clones and U-turns take steps of second order (`descend`, "2m"), kicked trajectories the plain step, as one that has
just begun has no past to extrapolate from, or that of the probability flow.

Sources: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491 (clones); Sclocchi, Favero, Wyart 2024,
arXiv:2402.16991 (U-turns); Lu et al. 2022, arXiv:2211.01095 (SDE-DPM-Solver++); Song, Meng, Ermon 2020,
arXiv:2010.02502 (DDIM); the monotone form is derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

from symbreak.critical import CriticalTime, Curve, curve, levels, mean_curve, passing, passing_interval
from symbreak.intervals import percentiles
from symbreak.laws.class_posterior import class_of, mixture_of
from symbreak.laws.mixture import Mixture
from symbreak.networks.denoiser import Denoiser, as_denoiser
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.reverse_paths import descend, start_states
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import dealt
from symbreak.runtime.run import Arrays, Keep, Progress, unkept

__all__ = ["Clones", "Opportunity", "UTurns", "clone_agreement", "clones", "opportunity", "u_turns"]

CLONES = "arXiv:2402.18491, phi halfway from sum_c pi_c^2 to 1"
U_TURNS = "arXiv:2402.16991, class change at half of 1 - sum_c p_c pi_c"
KICKS = "largest change of the final image per unit of kick (derived; arXiv:2305.19693)"
# Levels of a network that knows all of them, as EDM's sampler chooses (arXiv:2206.00364).
HIGHEST, LOWEST = 80.0, 0.002
PAIRS = 64  # trajectories of a block: a network's piece, and what an interrupted run loses at most
NUMBERS = 2**16  # numbers in the states of one call of a denoiser

Classify = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Clones:
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

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records; the images are left out."""
        return {
            "curve": self.curve.to_dict(),
            "crossing": self.crossing.to_dict(),
            "classes": self.classes.tolist(),
            "priors": self.priors.tolist(),
            "floor": self.floor,
            "floor_low": self.floor_low,
            "floor_high": self.floor_high,
            "pairs": len(self.agree),
            "calls": self.calls,
        }


@dataclass(frozen=True)
class UTurns:
    """Measured U-turns.

    Attributes:
        classes: share of U-turns that end in another class than that of the image, with bootstrap intervals.
        features: squared feature distance to the image over that of two random images, likewise.
        crossing: level at which the class change passes half of its limit.
        limit: class change at large sigma, 1 - sum_c p_c pi_c (p of the images, pi of the sampler).
        changed, distance: [N, G], averaged over the turns of each image.
        calls: states given to the denoiser.
    """

    classes: Curve
    features: Curve
    crossing: CriticalTime
    limit: float
    changed: np.ndarray
    distance: np.ndarray
    calls: int

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {
            "classes": self.classes.to_dict(),
            "features": self.features.to_dict(),
            "crossing": self.crossing.to_dict(),
            "limit": self.limit,
            "images": len(self.changed),
            "calls": self.calls,
        }


@dataclass(frozen=True)
class Opportunity:
    """The window of opportunity.

    Attributes:
        change: mean distance of the final images per unit of kick, in VP units, with bootstrap intervals.
        classes: share of kicks that change the class, likewise; ``None`` without classes.
        peak, class_peak: levels at which they are largest.
        size: kick over the norm of the state.
        calls: states given to the denoiser.
    """

    change: Curve
    classes: Curve | None
    peak: CriticalTime
    class_peak: CriticalTime | None
    size: float
    calls: int

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {
            "change": self.change.to_dict(),
            "classes": self.classes and self.classes.to_dict(),
            "peak": self.peak.to_dict(),
            "class_peak": self.class_peak and self.class_peak.to_dict(),
            "size": self.size,
            "calls": self.calls,
        }


# --- running down ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampler:
    """How trajectories run down.

    Attributes:
        source, denoiser: what was given, and its denoiser.
        grid: falling levels, the network being asked once at each; ``at`` [G] are the places of those that were
            asked about.
        dtype: of the states.
        block: trajectories of one block; ``rows`` states of one call.
        step: of `descend`.
    """

    source: Any
    denoiser: Denoiser
    grid: np.ndarray
    at: np.ndarray
    dtype: torch.dtype
    block: int
    rows: int
    step: str

    def first(self, n: int, g: torch.Generator) -> torch.Tensor:
        """n states at the first level: a law's own, or pure noise."""
        return start_states(self.source, n, float(self.grid[0]), g, self.dtype)

    def run(
        self,
        x: torch.Tensor,
        g: torch.Generator,
        tell: Callable[[int], None],
        join: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Final images [1 + G, n, *S]: of n trunks, and of the n trajectories that begin at each of the G levels.

        Args:
            x: states [n, *S] at the first level.
            g: of the noise.
            tell: is given the number of states of each call.
            join: (j, trunk [n, *S]) -> states [n, *S] that begin at level j; by default clones of the trunk,
                which leave it once the network has been asked about the state that both share.
        """
        order = np.argsort(self.at, kind="stable")
        here = [[int(j) for j in order if self.at[j] == i] for i in range(len(self.grid))]
        begin = None if join is None else lambda i, trunks: [join(j, trunks) for j in here[i]]
        leave = None if join is not None else [len(some) for some in here]
        n, asked = len(x), 0
        for _, states in descend(self.denoiser, x, [*self.grid, 0.0], g, self.step, begin, leave, self.rows):
            if asked:
                tell(asked)
            asked = len(states)
        images = states.reshape(1 + len(order), n, *x.shape[1:])
        return images[torch.from_numpy(np.append(0, 1 + np.argsort(order)))]

    def cost(self, shared: bool) -> int:
        """States given to the denoiser by one trunk and those that begin on it, a first call being shared or not."""
        n = len(self.grid)
        return int(n + (n - self.at - int(shared)).sum())


def _sampler(
    source: Any,
    s: np.ndarray,
    steps: int,
    sigma_start: float | None,
    sigma_end: float | None,
    dtype: torch.dtype | None,
    step: str = "2m",
) -> _Sampler:
    """The sampler of a law or denoiser whose levels hold s [G].

    Levels are even in the network's own time where it has a schedule, else in log sigma; of these the nearest ones
    are moved to s, so that asking about more levels takes more steps only where they lie closer than the steps.
    """
    d = as_denoiser(source)
    if steps < 2:
        raise InputError(f"{steps} steps; expected at least 2.")
    low, high = d.sigma_range
    if hasattr(source, "denoise"):
        start = sigma_start or float(s.max())
        end = sigma_end or 0.01 * float(source.sample(256, 0.0, generator(0, 256)).double().std(0).mean())
        block = max(16, min(2000, 2**14 // math.prod(d.shape)))  # all clones of a block stay in the cache
    else:
        start, end = sigma_start or (high if high < math.inf else HIGHEST), sigma_end or low or LOWEST
        block = max(PAIRS, min(2000, 2**12 // math.prod(d.shape)))
    if not (low <= end < s.min() and s.max() <= start <= high):
        raise InputError(
            f"branch levels from {s.min():.4g} to {s.max():.4g}; expected them between the last level {end:.4g} and "
            f"the first, {start:.4g}, in the range {low:.4g} to {high:.4g}. Choose others or pass sigma_start and "
            "sigma_end."
        )
    schedule = getattr(d, "schedule", None)
    if schedule is None:
        grid = np.geomspace(start, end, steps)
    else:
        times = np.linspace(schedule.time(start), schedule.time(end), steps)
        grid = np.array([schedule.level(float(t)).sigma for t in times])
    grid[0], grid[-1] = start, end
    taken, extra = {0, steps - 1}, []
    for v in np.unique(s):
        distance = np.abs(np.log(grid / v))
        i = int(distance.argmin())
        if i not in taken:
            grid[i] = v
            taken.add(i)
        elif distance[i] > 1e-11:  # a level that is one up to rounding makes no step
            extra.append(v)
    grid = np.sort(np.append(grid, extra))[::-1].copy()
    at = np.array([int(np.abs(np.log(grid / v)).argmin()) for v in s])
    wanted = dtype or (torch.float64 if hasattr(source, "denoise") else torch.float32)
    rows = max(PAIRS, NUMBERS // math.prod(d.shape))
    return _Sampler(source, d, grid, at, wanted, block, rows, step)


def _blocks(
    name: str,
    total: int,
    size: int,
    cost: int,
    make: Callable[[int, slice, Callable[[int], None]], Arrays],
    progress: Progress | None,
    keep: Keep | None,
    axis: dict[str, int],
) -> Arrays:
    """The arrays of all blocks, joined along their own axis; each block comes from the store or is made.

    Args:
        name: of the experiment, the first part of the keys.
        total: trajectories, ``size`` of them a block, ``cost`` calls for each.
        make: (block, which trajectories, tell) -> arrays.
        axis: array -> axis of the trajectories.
    """

    def block_of(block: int) -> Arrays:
        part = slice(block * size, min((block + 1) * size, total))
        done = part.start * cost

        def tell(states: int) -> None:
            nonlocal done
            done += states
            if progress is not None and done < part.stop * cost:  # the end of a block is told below
                progress(done, total * cost)

        return (keep or unkept)(f"{name}/{block}", partial(make, block, part, tell))

    def ended(blocks: int, _: int) -> None:
        if progress is not None:
            progress(min(blocks * size, total) * cost, total * cost)

    found = dealt(range(-(-total // size)), block_of, ended)
    return {k: np.concatenate([f[k] for f in found], axis=a) for k, a in axis.items()}


# --- classes --------------------------------------------------------------------------------------


def _default_classify(source: Any, end: float) -> Classify:
    """A mixture's likeliest component."""
    mixture = mixture_of(source)
    return lambda images: mixture.responsibilities(images, end).argmax(1)


def _clusters(images: np.ndarray, k: int, seed: int, leading: int = 32) -> np.ndarray:
    """Clusters [1 + G, n] of images [1 + G, n, *S]: k-means of the trunks' [0], the others by the nearest centre."""
    from sklearn.cluster import KMeans

    flat = images.reshape(len(images), images.shape[1], -1).astype(np.float64)
    mean = flat[0].mean(0)
    axes = np.linalg.svd(flat[0] - mean, full_matrices=False)[2][:leading]
    points = (flat - mean) @ axes.T
    found = KMeans(k, random_state=seed, n_init=10).fit(points[0])
    return np.stack([found.predict(p) for p in points]).astype(np.int64)


# --- intervals ------------------------------------------------------------------------------------


def _weights(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n trajectories counts: all once, then in every resample, [1 + R, n]."""
    if resamples < 2:
        raise InputError(f"{resamples} resamples; expected at least 2, usually 1000.")
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), drawn])


def _monotone(s: np.ndarray, falling: np.ndarray) -> np.ndarray:
    """Least-squares fits [R, G] that fall with sigma, of curves [R, G]: they pass a threshold once."""
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(s)
    out = np.empty(falling.shape)
    out[:, order] = [isotonic_regression(values, increasing=False) for values in falling[:, order]]
    return out


def _halfway(
    s: np.ndarray, falling: np.ndarray, threshold: np.ndarray, sampler: _Sampler, criterion: str, source: str, what: str
) -> CriticalTime:
    """The level where a curve [0] passes its threshold, with the interval of its resamples [1:]."""
    passed = passing(s, _monotone(s, falling), threshold)
    about: dict[str, Any] = {"criterion": criterion, "flow": "sde", "source": source}
    point, others = float(passed[0]), passed[1:]
    above, below = int((others == math.inf).sum()), int((others == 0).sum())
    if not 0 < point < math.inf:
        side, at = ("above", s.max()) if point > 0 else ("below", s.min())
        reason = f"{what} passes {threshold[0]:.3g}, halfway, {side} the levels asked about ({at:.4g})"
        if point > 0:
            far = min(4 * at, sampler.denoiser.sigma_range[1])
            mend = f"try levels from {at:.4g} to {far:.4g}" if far > at else "the network's range ends there"
        else:
            near = max(at / 4, float(sampler.grid[-1]))
            mend = f"try levels from {near:.4g} to {at:.4g}" if near < at else "no level is left"
        return CriticalTime(None, reason=f"{reason}; {mend}", **about)
    reason = f"{what} at {threshold[0]:.3g}, halfway"
    for count, side in ((above, "above"), (below, "below")):
        if count:
            reason += f"; {count} of {len(others)} resamples pass {side} the levels asked about"
    low, high, _ = passing_interval(others)
    return CriticalTime(NoiseLevel(point), low, high, reason=reason, **about)


def _priors(labels: np.ndarray, classes: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares [K] of the classes among labels [n, m], and the sum of their squares in every resample [1 + R].

    Only products of different trajectories are counted, which makes the sum of squares unbiased.
    """
    each = np.stack([(labels == c).mean(1) for c in classes], axis=1)
    sums = w @ each
    own = (w * w) @ (each * each).sum(1)
    pairs = w.sum(1) ** 2 - (w * w).sum(1)
    return each.mean(0), ((sums * sums).sum(1) - own) / np.maximum(pairs, 1.0)


# --- clones ---------------------------------------------------------------------------------------


def _clone_labels(
    sampler: _Sampler,
    classify: Classify | None,
    pairs: int,
    seeds: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Arrays:
    """``labels`` [1 + G, pairs] of trunks and clones and the trunks' ``ends``; without classify all ``images``."""

    def make(block: int, part: slice, tell: Callable[[int], None]) -> Arrays:
        g = generator(seeds, block, 1)
        images = sampler.run(sampler.first(part.stop - part.start, g), g, tell)
        if classify is None:
            return {"images": images.float().cpu().numpy()}
        labels = np.stack([class_of(classify, some) for some in images])
        return {"labels": labels, "ends": images[0].float().cpu().numpy()}

    axis = {"images": 1} if classify is None else {"labels": 1, "ends": 0}
    return _blocks("clones", pairs, sampler.block, sampler.cost(True), make, progress, keep, axis)


def clones(
    law_or_denoiser: Any,
    sigma: Any,
    classify: Classify | None = None,
    pairs: int = 300,
    steps: int = 40,
    seeds: int = 0,
    clusters: int | None = None,
    sigma_start: float | None = None,
    sigma_end: float | None = None,
    dtype: torch.dtype | None = None,
    resamples: int = 1000,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Clones:
    """The level at which a sampler decides the class, from pairs of trajectories that part on their way down.

        phi(sigma) = E sum_c P(c | state at sigma)^2        crossing: phi = (1 + sum_c pi_c^2) / 2

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: level, or levels [G], at which clones leave.
        classify: final images [B, *S] float32 -> integer classes [B] or scores [B, K], whose largest counts; by
            default a `Mixture`'s likeliest component.
        pairs: number of trunks; each pair is an independent trajectory and its clones.
        steps: calls of the network on one way down. 40 of them read the crossing of exact mixtures 1.5 to 3 % high in
            sigma, 200 of them under 1 %.
        seeds: every block of pairs draws from a generator of its own, keyed by this and the block's number.
        clusters: number of classes to find in the trunks' final images, by k-means in their leading 32
            principal components, instead of classify. All final images, (1 + G) pairs of them, are then held in
            memory as float32. The interval takes the clusters as given.
        sigma_start: where trunks start; by default the largest level for a law, which is sampled there exactly,
            and the top of its range for a denoiser, from pure noise (80 if it has no top).
        sigma_end: last level, where the posterior mean is the final image; by default 1 % of a law's standard
            deviation, or the bottom of the range (0.002 if that is 0).
        dtype: of the states; by default float64 for a law and float32 for a network.
        resamples: bootstrap resamples of the pairs; one resampling serves all levels, the floor and the crossing.
        progress: is told (states denoised, all states).
        keep: (key, make) -> arrays, for blocks that may have been made before.

    Returns:
        `Clones`. Levels share their trunks: their errors are correlated, which the interval of the crossing knows.
        Where all pairs agree the interval of the curve has no width. The crossing has no level, and a reason,
        where the range does not hold it or where only one class was seen; an end of its interval is missing
        where more than 2.5 % of the resamples pass beyond the levels.

    Raises:
        InputError: for levels outside the range, fewer than 2 pairs or steps, no way or two ways to classify, or
            a classifier that gives NaN or the wrong shape.

    Source: arXiv:2402.18491; K classes, the floor's estimate and the monotone fit are derived.

    >>> law = Mixture.from_parameters([[-4.0], [4.0]], 1.0)
    >>> found = clones(law, [1.0, 2.0, 4.0, 8.0, 16.0], pairs=400)
    >>> found.crossing.low.sigma < 3.8 < found.crossing.high.sigma           # phi = 3/4: z^2 = 16 / (1 + sigma^2)
    True
    """
    s, shape = levels(sigma)
    if pairs < 2:
        raise InputError(f"{pairs} pairs; expected at least 2.")
    if classify is not None and clusters is not None:
        raise InputError("classify and clusters came together; pass one of them.")
    if clusters is not None and not 2 <= clusters <= pairs // 2:
        raise InputError(f"{clusters} clusters of {pairs} final images; expected at least 2, and two images for each.")
    sampler = _sampler(law_or_denoiser, s, steps, sigma_start, sigma_end, dtype)
    if classify is None and clusters is None:
        if not isinstance(law_or_denoiser, Mixture):
            name = type(law_or_denoiser).__name__
            raise InputError(f"{name} has no classes. Pass classify=, a function of final images, or clusters=K.")
        classify = _default_classify(law_or_denoiser, float(sampler.grid[-1]))
    w = _weights(pairs, resamples, seeds)
    found = _clone_labels(sampler, classify, pairs, seeds, progress, keep)
    if clusters is None:
        labels, ends = found["labels"], found["ends"]
    else:
        labels, ends = _clusters(found["images"], clusters, seeds), found["images"][0]
    agree = (labels[1:] == labels[0]).T
    classes = np.unique(labels)
    priors, floor = _priors(labels.T, classes, w)
    low, high = percentiles(floor[1:])
    if len(classes) == 1:
        reason = f"all final images are of class {classes[0]}. Pass another classify, or clusters=K."
        passes = CriticalTime(None, criterion="cloning", flow="sde", source=CLONES, reason=reason)
    else:
        shares = w @ agree / pairs
        passes = _halfway(s, shares, (1 + floor) / 2, sampler, "cloning", CLONES, "agreement of clones")
    return Clones(
        curve=mean_curve(s, agree.T, "clone agreement", w, shape),
        crossing=passes,
        classes=classes,
        priors=priors,
        floor=float(floor[0]),
        floor_low=float(low),
        floor_high=float(high),
        agree=agree,
        ends=ends,
        labels=labels[0],
        calls=pairs * sampler.cost(True),
    )


def clone_agreement(
    law_or_denoiser: Any,
    sigma: Any,
    classify: Classify | None = None,
    pairs: int = 1000,
    steps: int = 200,
    seeds: int = 0,
    sigma_start: float | None = None,
    sigma_end: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Curve:
    """Measured cloning, the curve alone: the share of pairs that part at sigma and end in one class.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a branch level, or branch levels [G].
        classify, pairs, steps, seeds, sigma_start, sigma_end, dtype: as for `clones`.

    Returns:
        A `Curve` with 95 % Wilson intervals, which have a width even where all pairs agree. Levels share their
        trunks: their errors are correlated.

    Raises:
        InputError: for sigma <= 0 or outside the range, no pair, fewer than 2 steps, or no way to classify.

    Source: arXiv:2402.18491.
    """
    s, shape = levels(sigma)
    if pairs < 1:
        raise InputError(f"{pairs} pairs; expected at least 1.")
    sampler = _sampler(law_or_denoiser, s, steps, sigma_start, sigma_end, dtype)
    labels = _clone_labels(
        sampler, classify or _default_classify(law_or_denoiser, float(sampler.grid[-1])), pairs, seeds
    )["labels"]
    share, z = (labels[1:] == labels[0]).mean(1), float(stats.norm.ppf(0.975))
    middle = (share + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z * np.sqrt(share * (1 - share) / pairs + z * z / (4 * pairs**2)) / (1 + z * z / pairs)
    return curve(s, shape, share, middle - half, middle + half, "clone agreement")


# --- U-turns --------------------------------------------------------------------------------------


def u_turns(
    law_or_denoiser: Any,
    images: Any,
    sigma: Any,
    classify: Classify | None = None,
    labels: Any = None,
    features: Callable[[torch.Tensor], Any] | None = None,
    steps: int = 40,
    turns: int = 1,
    seeds: int = 0,
    sigma_start: float | None = None,
    sigma_end: float | None = None,
    dtype: torch.dtype | None = None,
    resamples: int = 1000,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> UTurns:
    """Real images noised to sigma and denoised again: what of them survives?

        x = x_0 + sigma eps, back to x_0' by the reverse SDE;  P(c' != c) = 1 - phi(sigma) where the network is exact

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        images: [N, *S], or `Images`.
        sigma: level, or levels [G], at which images turn back.
        classify: as for `clones`.
        labels: classes [N] of the images, in the classifier's numbers; by default classify(images), so that a
            classifier's mistakes are no changes.
        features: images [B, *S] -> [B, F]; by default the pixels. A distance is normalised by the mean squared
            distance of two of the images: it tends to 1 where nothing survives.
        turns: U-turns of each image at each level.
        steps, seeds, sigma_start, sigma_end, dtype, resamples, progress, keep: as for `clones`; the bootstrap
            resamples images.

    Returns:
        `UTurns`. Beside the U-turns one fresh sample is drawn for each of them, for the sampler's own class shares
        and so the limit of large sigma.

    Raises:
        InputError: for images of another shape than the network's, labels of the wrong length, or as `clones`.

    Source: arXiv:2402.16991.
    """
    s, shape = levels(sigma)
    sampler = _sampler(law_or_denoiser, s, steps, sigma_start, sigma_end, dtype)
    x = images.tensor() if hasattr(images, "tensor") else images
    x = torch.as_tensor(np.asarray(x) if not isinstance(x, torch.Tensor) else x).to("cpu", sampler.dtype)
    if tuple(x.shape[1:]) != tuple(sampler.denoiser.shape):
        raise InputError(
            f"images of shape {tuple(x.shape[1:])} for a network of {tuple(sampler.denoiser.shape)}. Resize the data."
        )
    n = len(x)
    if n < 2 or turns < 1:
        raise InputError(f"{n} images and {turns} turns of each; expected at least 2 images and 1 turn.")
    if not bool(torch.isfinite(x).all()):
        raise InputError("the images hold NaN or infinity; expected numbers, usually from -1 to 1.")
    own = classify or _default_classify(law_or_denoiser, float(sampler.grid[-1]))
    origin = class_of(own, x) if labels is None else _given(labels, n)
    look = _pixels if features is None else features
    seen = _seen(look, x)
    scale = 2 * float(seen.var(axis=0, ddof=1).sum())
    if not scale > 0:
        raise InputError("all images have the same features; expected images that differ.")
    w = _weights(n, resamples, seeds)

    def make(block: int, part: slice, tell: Callable[[int], None]) -> Arrays:
        g = generator(seeds, block, 2)
        rows = np.arange(part.start, part.stop) % n
        clean = x[torch.from_numpy(rows)]

        def join(j: int, trunk: torch.Tensor) -> torch.Tensor:
            return clean + float(s[j]) * torch.randn(clean.shape, generator=g, dtype=clean.dtype)

        back = sampler.run(sampler.first(len(clean), g), g, tell, join)
        far = [((_seen(look, some) - seen[rows]) ** 2).sum(1) / scale for some in back[1:]]
        return {"labels": np.stack([class_of(own, some) for some in back]), "distance": np.stack(far)}

    found = _blocks(
        "u_turns", n * turns, sampler.block, sampler.cost(False), make, progress, keep, {"labels": 1, "distance": 1}
    )
    ends = found["labels"].reshape(1 + len(s), turns, n)
    changed = (ends[1:] != origin).mean(1).T
    distance = found["distance"].reshape(len(s), turns, n).mean(1).T
    classes = np.unique(np.append(ends, origin))
    data = np.stack([origin == c for c in classes], axis=1).astype(float)
    model = np.stack([(ends[0] == c).mean(0) for c in classes], axis=1)
    limit = 1 - ((w @ data) * (w @ model)).sum(1) / n**2
    if len(classes) == 1:
        reason = f"all images are of class {classes[0]}, before and after. Pass another classify."
        passes = CriticalTime(None, criterion="u-turn", flow="sde", source=U_TURNS, reason=reason)
    else:
        stays = 1 - w @ changed / n
        passes = _halfway(s, stays, 1 - limit / 2, sampler, "u-turn", U_TURNS, "the share of kept classes")
    return UTurns(
        classes=mean_curve(s, changed.T, "class change of U-turns", w, shape),
        features=mean_curve(s, distance.T, "feature change of U-turns", w, shape),
        crossing=passes,
        limit=float(limit[0]),
        changed=changed,
        distance=distance,
        calls=n * turns * sampler.cost(False),
    )


def _given(labels: Any, n: int) -> np.ndarray:
    """Labels [n] as integers."""
    a = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if a.shape != (n,):
        raise InputError(f"labels of shape {a.shape} for {n} images; expected one label an image.")
    if not np.issubdtype(a.dtype, np.integer):
        raise InputError(f"labels of {a.dtype}; expected integers, the numbers that classify gives.")
    return a.astype(np.int64)


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(len(images), -1)


def _seen(features: Callable[[torch.Tensor], Any], images: torch.Tensor) -> np.ndarray:
    """Features [B, F] float64."""
    with torch.no_grad():
        out = features(images.float())
    a = out.detach().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)
    if a.ndim < 1 or len(a) != len(images):
        raise InputError(f"features gave the shape {a.shape} for {len(images)} images; expected [{len(images)}, F].")
    flat = a.reshape(len(images), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise InputError("features gave NaN or infinity; expected numbers.")
    return flat


# --- kicks ----------------------------------------------------------------------------------------


def opportunity(
    law_or_denoiser: Any,
    sigma: Any,
    classify: Classify | None = None,
    samples: int = 200,
    steps: int = 40,
    size: float = 0.1,
    flow: str = "sde",
    seeds: int = 0,
    sigma_start: float | None = None,
    sigma_end: float | None = None,
    dtype: torch.dtype | None = None,
    resamples: int = 1000,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Opportunity:
    """The window of opportunity: the levels at which a kick to a trajectory carries furthest.

        x -> x + size |x| u, u a random direction;   change = |F(x + size |x| u) - F(x)| / (size alpha |x|)

    F is the way down to the final image: the reverse SDE, kicked and unkicked trajectory sharing their noise, or
    the probability flow. The kick is measured on the VP state alpha x. For one Gaussian of variance v

        SDE: change = v sqrt(1 + sigma^2) / (v + sigma^2)        ODE: sqrt(v (1 + sigma^2) / (v + sigma^2))

    Under the SDE an early kick is forgotten; the peak lies where the VP drift turns from contracting to
    expanding, sigma^2 = v - 2 for v > 2. Under the flow nothing is forgotten, and a peak is not to be expected.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: level, or levels [G], at which trajectories are kicked.
        classify: as for `clones`; without it, and for a law that is no `Mixture`, there is no class curve.
        samples: number of trajectories.
        size: kick over the norm of the state. Small kicks give the derivative of F and change few classes.
        flow: ``"sde"`` or ``"ode"``.
        steps, seeds, sigma_start, sigma_end, dtype, resamples, progress, keep: as for `clones`; the bootstrap
            resamples trajectories.

    Returns:
        `Opportunity`. A peak is the top of the parabola through the largest mean and its neighbours in log sigma,
        its interval that of the resamples' peaks; with a reason and no level where the largest mean is at an end.

    Raises:
        InputError: for a size that is not positive, an unknown flow, or as `clones`.

    Source: derived; the window belongs to the symmetry breaking of arXiv:2305.19693.
    """
    s, shape = levels(sigma)
    if samples < 2 or not 0 < size < math.inf:
        raise InputError(f"{samples} samples and a size of {size:g}; expected at least 2 samples and a size > 0.")
    if flow not in ("sde", "ode"):
        raise InputError(f"flow {flow!r}; expected sde or ode.")
    sampler = _sampler(law_or_denoiser, s, steps, sigma_start, sigma_end, dtype, flow)
    own = classify
    if own is None and isinstance(law_or_denoiser, Mixture):
        own = _default_classify(law_or_denoiser, float(sampler.grid[-1]))
    w = _weights(samples, resamples, seeds)
    alpha = 1 / np.sqrt(1 + s * s)

    def make(block: int, part: slice, tell: Callable[[int], None]) -> Arrays:
        g = generator(seeds, block, 3)
        norm = np.zeros((len(s), part.stop - part.start))

        def join(j: int, trunk: torch.Tensor) -> torch.Tensor:
            u = torch.randn(trunk.shape, generator=g, dtype=trunk.dtype)
            flat, way = trunk.reshape(len(trunk), -1), u.reshape(len(u), -1)
            kick = size * torch.linalg.vector_norm(flat, dim=1)
            norm[j] = kick.double().numpy() * alpha[j]
            return trunk + (way * (kick / torch.linalg.vector_norm(way, dim=1))[:, None]).reshape(trunk.shape)

        ends = sampler.run(sampler.first(part.stop - part.start, g), g, tell, join).double()
        moved = torch.linalg.vector_norm((ends[1:] - ends[0]).reshape(len(s), len(ends[0]), -1), dim=2)
        labels = np.zeros((1, len(ends[0])), np.int64)
        if own is not None:
            labels = np.stack([class_of(own, some) for some in ends])
        return {"change": moved.numpy() / norm, "labels": labels}

    found = _blocks(
        "opportunity", samples, sampler.block, sampler.cost(False), make, progress, keep, {"change": 1, "labels": 1}
    )
    change, labels = found["change"].T, found["labels"]
    classes = None if own is None else (labels[1:] != labels[0]).T
    return Opportunity(
        change=mean_curve(s, change.T, "change of the final image per unit of kick", w, shape),
        classes=None if classes is None else mean_curve(s, classes.T, "class change by kicks", w, shape),
        peak=_peak(s, w @ change, "opportunity", flow),
        class_peak=None if classes is None else _peak(s, w @ classes, "opportunity, class", flow),
        size=float(size),
        calls=samples * sampler.cost(False),
    )


def _peak(s: np.ndarray, sums: np.ndarray, criterion: str, flow: str) -> CriticalTime:
    """The level where sums [1 + R, G] are largest: row 0, with the interval of the other rows."""
    about: dict[str, Any] = {"criterion": criterion, "flow": flow, "frame": "vp", "source": KICKS}
    order = np.argsort(s)
    u, v = np.log(s[order]), sums[:, order]
    if np.ptp(v[0]) == 0:
        return CriticalTime(None, reason="the kicks carry equally far at every level; pass more levels", **about)
    top = v.argmax(1)
    if top[0] in (0, len(u) - 1):
        end, way = (s.min(), "lower") if top[0] == 0 else (s.max(), "higher")
        reason = f"the kicks carry furthest at the end of the levels, {end:.4g}; try {way} levels, if there are any"
        return CriticalTime(None, reason=reason, **about)
    i = np.clip(top, 1, len(u) - 2)
    rows = np.arange(len(v))
    (a, b, c), (fa, fb, fc) = (u[i - 1], u[i], u[i + 1]), (v[rows, i - 1], v[rows, i], v[rows, i + 1])
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    flat = left == right
    at = np.where(flat, b, b - 0.5 * ((b - a) * left - (b - c) * right) / np.where(flat, 1.0, left - right))
    at = np.where(top == i, at, u[top])  # a resample that is largest at an end
    low, high = percentiles(at[1:])
    ends = int((top[1:] != i[1:]).sum())
    note = f"{ends} of {len(at) - 1} resamples are largest at an end of the levels" if ends else None
    level, below, above = (NoiseLevel(math.exp(float(q))) for q in (at[0], low, high))
    return CriticalTime(level, below, above, reason=note, **about)
