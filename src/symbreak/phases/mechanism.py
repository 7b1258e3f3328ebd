"""The mechanism behind a late start, checked: early fluctuations revert, and the early dynamics are linear.

    reversion     correlation of a reverse trajectory's state with its start at level T, centred, over all pixels.
                  Exact reverse dynamics have the joint law of the forward process, x_T = x_s + sqrt(T^2 - s^2) z:
                      rho(s) = sqrt(tr(C + s^2) / tr(C + T^2)),     C the data's covariance
    linearity     share of the variance of D(x, sigma) over noised images that an affine map explains. The Gaussian
                  law's own map is the best one for a perfect network, whose share is then
                      1 - (LMMSE - MMSE) / (tr C - MMSE),          LMMSE = sum_i lambda_i sigma^2 / (lambda_i + sigma^2)

A correlation does not depend on the frame: it is the same for VP and VE states. The share tends to 1 at small sigma
as well, where D(x) is nearly x: it speaks about the mechanism only at and above the level of a start.

Source: derived; the mechanism is that of arXiv:2305.19693.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import trapezoid

from symbreak.critical import CriticalTime, Curve, Levels, Result, curve, levels, passing_time, share_curve
from symbreak.intervals import resampled
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import Law, is_law
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.networks.denoiser import CHUNK, Batches, Denoiser, as_denoiser, ask, fingerprints, images_for
from symbreak.noise import NoiseLevel, generator
from symbreak.phases.reverse_paths import descend, grid_through, start_states
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["Check", "LinearShare", "Reversion", "linear_share", "linearity_check", "reversion", "reversion_check"]

NUMBERS = 2**18  # numbers of one block of trajectories
FOLDS = 5
LEADING = 64  # principal coordinates that the linear map is corrected in, at most
PENALTIES = np.geomspace(1e-8, 10.0, 10)  # of the correction, in units of a coordinate's own variance
REVERTED = 0.5
LINEAR = 0.9
DENSE = 1024  # up to this dimension a law's covariance is formed


@dataclass(frozen=True)
class Check(Result):
    """One of the mechanism's signatures.

    Attributes:
        name: what was looked at.
        holds: whether it holds; ``None`` where that cannot be decided.
        value: the number measured, NaN where there is none.
        expected: the number it is held against.
        sentence: both in words.
    """

    record = ("name", "holds", "value", "expected", "sentence")

    name: str
    holds: bool | None
    value: float
    expected: float
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Reversion(Curve):
    """Correlation of reverse trajectories with their start, a `Curve` with 95 % bootstrap intervals over paths.

    Attributes:
        start: level T of the start.
        exact: the correlation under exact dynamics at the same levels, ``None`` without moments.
        products: of every path and level, centred: x_s . x_T, |x_s|^2 and |x_T|^2, [3, G, N].
        seed: of the bootstrap.
    """

    record = (*Curve.record, "start", "paths", "exact")

    start: float
    exact: Curve | None
    products: np.ndarray
    seed: int

    @property
    def paths(self) -> int:
        """Number of paths N."""
        return self.products.shape[2]

    def time(self, threshold: float = REVERTED, resamples: int = 1000) -> CriticalTime:
        """The level where the correlation falls below a threshold, e.g. 1/2 or 1/e, with its bootstrap interval."""
        criterion, source = f"correlation with the start at {threshold:.4g}", "derived"
        sigma, value = np.append(np.atleast_1d(self.sigma), self.start), np.append(np.atleast_1d(self.value), 1.0)
        if not 0 < threshold < 1:
            raise InputError(f"a threshold of {threshold:g}; expected a correlation between 0 and 1.")
        reason = (
            f"the correlation is {value.min():.3g} at the least, from sigma {self.start:.4g} down to "
            f"{sigma.min():.4g}, and does not pass {threshold:.3g}; the range to try is below that"
        )
        again = _correlations(self.products, self.seed, resamples)
        curves = np.concatenate([value[None], np.append(again, np.ones((len(again), 1)), axis=1)])
        # In log the correlation of pure noise, s / T, is a straight line.
        logs = np.log(np.maximum(curves, 1e-6))
        return passing_time(sigma, logs, math.log(threshold), reason, criterion, source)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {**super().to_dict(), "half": self.time(0.5).to_dict(), "1/e": self.time(math.exp(-1)).to_dict()}


@renamed()
def reversion(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    paths: int = 256,
    steps: int = 40,
    seeds: int = 0,
    moments: Moments | LowRankMoments | Law | None = None,
    sigma_start: float | None = None,
    run: Run | None = None,
) -> Reversion:
    """How a reverse trajectory forgets its start: correlation of its state with the start, by level.

        rho(s) = E (x_s - m_s).(x_T - m_T) / sqrt(E|x_s - m_s|^2 E|x_T - m_T|^2)

    under the reverse SDE, on levels even in log sigma, the requested levels among them.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a level, or levels [G], at most the start's.
        paths: number of trajectories.
        steps: steps from the start to the lowest level; each asks the network once a path.
        seeds: every block of paths draws from a generator keyed by this and its number.
        moments: `Moments` of the data (or anything with ``.moments``) for the exact curve; a law of up to 1,024
            dimensions has its own.
        sigma_start: level T of the start; by default the top of a network's range, from pure noise, or, for a
            law, which is sampled there exactly, the largest level.
        run: finished parts and progress in blocks of paths.

    Returns:
        A `Reversion`.

    Raises:
        InputError: for levels outside the range, fewer than 2 paths or 1 step, or moments of another dimension.

    Source: derived.
    """
    s, shape = levels(sigma)
    d = as_denoiser(law_or_denoiser)
    if paths < 2:
        raise InputError(f"{paths} paths; expected at least 2.")
    start = float(sigma_start or (s.max() if is_law(law_or_denoiser) else d.sigma_range[1]))
    grid, at = grid_through(d, s, start, steps)
    dim = math.prod(d.shape)
    if moments is None and is_law(law_or_denoiser) and dim <= DENSE:
        moments = getattr(law_or_denoiser, "moments", None)
    exact = None
    if moments is not None:
        total, count = _trace(moments)
        if count != dim:
            raise InputError(f"moments of {count} dimensions for samples of {dim}; expected the data's own.")
        rho = np.sqrt((total + dim * s**2) / (total + dim * start**2))
        exact = curve(s, shape, rho, rho, rho, "exact correlation with the start")
    # Blocks as even as they can be: each is centred by itself.
    most = max(1, NUMBERS // dim // CHUNK) * CHUNK
    sizes = [len(part) for part in np.array_split(np.arange(paths), -(-paths // most))]

    def block(i: int) -> Arrays:
        g = generator(seeds, 41, i)
        x = start_states(
            law_or_denoiser, sizes[i], start, g, torch.float64 if is_law(law_or_denoiser) else torch.float32
        )
        first = (x - x.mean(0)).flatten(1).double()
        products = np.zeros((3, len(s), sizes[i]))
        for j, (_, state) in enumerate(descend(d, x, grid, g)):
            centred = (state - state.mean(0)).flatten(1).double()
            for k in np.flatnonzero(at == j):
                pairs = ((centred, first), (centred, centred), (first, first))
                products[:, k] = np.stack([(a * b).sum(1).numpy() for a, b in pairs])
        if not np.isfinite(products).all():
            raise InputError("the network answers NaN or infinity; expected denoised images.")
        return {"products": products}

    run = run or Run()
    settings = (*fingerprints(run, law_or_denoiser), grid.tolist(), at.tolist(), paths, seeds)
    parts = run.parts("reversion", range(len(sizes)), block, *settings)
    products = np.concatenate([part["products"] for part in parts], axis=2)
    low, high = np.quantile(_correlations(products, seeds), [0.025, 0.975], axis=0)
    measured = curve(s, shape, _correlation(products.mean(2)), low, high, "correlation with the start")
    return measured.extended(Reversion, start=start, exact=exact, products=products, seed=seeds)


def reversion_check(paths: Reversion, at: float | NoiseLevel | CriticalTime) -> Check:
    """Early fluctuations revert: below 0.5 is the correlation with the start at the level of speciation.

    Args:
        paths: of `reversion`, started far above that level.
        at: the level: sigma, a `NoiseLevel` or a `CriticalTime`.
    """
    name = "early fluctuations revert"
    sigma, value = np.append(np.atleast_1d(paths.sigma), paths.start), np.append(np.atleast_1d(paths.value), 1.0)
    level = _level(name, at, sigma, REVERTED)
    if isinstance(level, Check):
        return level
    order = np.argsort(sigma)
    rho = float(np.interp(math.log(level), np.log(sigma[order]), value[order]))
    holds = rho < REVERTED
    sentence = (
        f"The state at sigma {level:.3g} has a correlation of {rho:.2g} with the start at sigma {paths.start:.3g}: "
        f"{'below' if holds else 'not below'} {REVERTED:g}."
    )
    return Check(name, holds, rho, REVERTED, sentence)


@dataclass(frozen=True, kw_only=True)
class LinearShare(Curve):
    """Share of the variance of D(x, sigma) explained by an affine map of x, a `Curve` with 95 % intervals.

    Out of sample: an estimate from below of what the best affine map explains. Far above the data D hardly varies, and
    what varies is a network's error as much as its answer: a small share there is a small matter, see ``remainder``.

    Attributes:
        gaussian: the same for the Gaussian law's own map, with the data's moments.
        remainder: E|D - A x - b|^2 at every level [G].
        spread: E|D - E D|^2 [G].
    """

    record = (*Curve.record, "gaussian", "remainder", "spread")

    gaussian: Curve
    remainder: np.ndarray
    spread: np.ndarray


@renamed()
def linear_share(
    denoiser: Law | Denoiser,
    images: Batches,
    sigma: Levels,
    gaussian: Gaussian | None = None,
    leading: int | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> LinearShare:
    """How linear a network's denoiser is at every level.

        1 - E|D - A x - b|^2 / E|D - E D|^2,    x = x_0 + sigma eps

    The map is the Gaussian law's denoiser plus a ridge regression of what it leaves on the leading principal
    coordinates of x. Five folds of the images: fitted on four, the penalty chosen there by leaving one out, and
    measured on the fifth.

    Args:
        denoiser: network as a `Denoiser`, or a law.
        images: [N, *S], an `Images` or batches, at least 20.
        sigma: a level, or levels [G].
        gaussian: the Gaussian of the data; best fitted on other and more images. By default fitted in every fold.
        leading: principal coordinates of the regression; by default a quarter of the images fitted on, at most 64.
        seed: of the noise, the same at every level, and of the folds.
        run: a finished part a level, and progress in levels.

    Returns:
        A `LinearShare`.

    Raises:
        InputError: for shapes that do not fit, fewer than 20 images or levels outside the network's range.

    Source: derived.
    """
    s, shape = levels(sigma)
    d = as_denoiser(denoiser)
    x0 = images_for(d, images, s, 4 * FOLDS)
    n = len(x0)
    order = torch.randperm(n, generator=generator(seed, 51))
    fold = torch.empty(n, dtype=torch.long)
    fold[order] = torch.arange(n) % FOLDS
    eps = torch.randn(x0.shape, generator=generator(seed, 52), dtype=x0.dtype)
    laws = [gaussian or Gaussian(Moments.fit([x0[fold != f]])) for f in range(FOLDS)]
    if tuple(laws[0].shape) != tuple(d.shape):
        raise InputError(f"a Gaussian of shape {tuple(laws[0].shape)} for a network of {tuple(d.shape)}; expected one.")
    p = min(LEADING, n * (FOLDS - 1) // FOLDS // 4) if leading is None else int(leading)
    p = min(p, *(law.rank for law in laws))

    def level(u: float) -> Arrays:
        x = x0 + u * eps
        answer = ask(d, x, u).flatten(1).double()
        if not bool(torch.isfinite(answer).all()):
            raise InputError(f"the network answers NaN or infinity at sigma {u:.4g}; expected denoised images.")
        energy = np.zeros((3, n))
        for f, law in enumerate(laws):
            train, test = fold != f, fold == f
            left = answer - law.denoise(x.double(), u).flatten(1)
            flat = x.flatten(1).double() - law.moments.mean.reshape(-1)
            z = flat @ law.eigenvectors[:, :p].double() / (law.eigenvalues[:p] + u * u).sqrt()
            rest = left[test] - _ridge(z[train], left[train], z[test])
            for k, r in enumerate((rest, left[test], answer[test] - answer[train].mean(0))):
                energy[k, test.numpy()] = (r * r).sum(1).numpy()
        return {"energy": energy}

    run = run or Run()
    settings = (*fingerprints(run, denoiser, laws[0]), x0, s.tolist(), p, seed)
    parts = run.parts("linear", s.tolist(), level, *settings)
    best, rest, total = np.stack([part["energy"] for part in parts], axis=1)

    law_curve = share_curve(s, rest, total, "share explained by the Gaussian's map", shape)
    linear = share_curve(s, best, total, "share explained by a linear map", shape)
    return linear.extended(LinearShare, gaussian=law_curve, remainder=best.mean(1), spread=total.mean(1))


def linearity_check(linear: LinearShare, at: float | NoiseLevel | CriticalTime) -> Check:
    """The early dynamics are linear: from the level of a start up an affine map explains at least 0.9 of D.

        1 - (integral of E|D - A x - b|^2 / u^3 du) / (integral of E|D - E D|^2 / u^3 du),    u from that level up

    Levels count as they do for the divergence: by what a wrong denoiser there costs in nats. The least share of all
    levels would speak of a network's error far above the data, where D hardly varies.

    Args:
        linear: of `linear_share`, on levels around and above that level.
        at: the start's level: sigma, a `NoiseLevel` or a `CriticalTime`.
    """
    name = "early dynamics are linear"
    order = np.argsort(np.atleast_1d(linear.sigma))
    sigma = np.atleast_1d(linear.sigma)[order]
    level = _level(name, at, sigma, LINEAR, top=False)
    if isinstance(level, Check):
        return level
    u = np.log(np.append(level, sigma[sigma > level]))
    left, whole = (
        trapezoid(np.interp(u, np.log(sigma), energy[order]) * np.exp(-2 * u), u)
        for energy in (linear.remainder, linear.spread)
    )
    share = float(1 - left / whole)
    here = float(np.interp(math.log(level), np.log(sigma), np.atleast_1d(linear.value)[order]))
    holds = share >= LINEAR
    sentence = (
        f"From sigma {level:.3g} up a linear map explains {share:.0%} of the network's denoiser, {here:.0%} at that "
        f"level: {'not below' if holds else 'below'} {LINEAR:.0%}."
    )
    return Check(name, holds, share, LINEAR, sentence)


def _ridge(z: torch.Tensor, left: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Ridge regression with a free constant, fitted on rows z [n, p] -> left [n, d] and read at rows ``at``.

    The penalty is the one with the least squared error on rows left out one at a time; no slope at all is tried too.
    """
    n, offset, centre = len(z), left.mean(0), z.mean(0)
    y, target = z - centre, left - offset
    values, vectors = torch.linalg.eigh(y.T @ y / n)
    y, values = y @ vectors, values.clamp_min(0.0)
    slopes = y.T @ target / n
    best, gain = ((target / (1 - 1 / n)) ** 2).sum(), torch.zeros_like(values)
    for penalty in PENALTIES:
        shrunk = 1 / (values + penalty)
        leverage = 1 / n + (y * y) @ shrunk / n
        error = (((target - (y * shrunk) @ slopes) / (1 - leverage).clamp_min(1e-6)[:, None]) ** 2).sum()
        if error < best:
            best, gain = error, shrunk
    out: torch.Tensor = offset + ((at - centre) @ vectors * gain) @ slopes
    return out


def _correlation(products: np.ndarray) -> np.ndarray:
    """Correlations [...] of mean products [3, ...]."""
    out: np.ndarray = products[0] / np.sqrt(np.maximum(products[1] * products[2], 1e-300))
    return out


def _correlations(products: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """Bootstrap correlations [R, G] of products [3, G, N]."""
    again = resampled(products.reshape(-1, products.shape[2]), seed, resamples)
    return _correlation(again.reshape(resamples, 3, -1).transpose(1, 0, 2))


def _trace(moments: Moments | LowRankMoments | Law) -> tuple[float, int]:
    """Total variance and dimension."""
    m: Any = getattr(moments, "moments", moments)
    return m.trace, m.dim


def _level(
    name: str, at: float | NoiseLevel | CriticalTime, sigma: np.ndarray, expected: float, top: bool = True
) -> float | Check:
    """sigma of a level among those measured, the top one or not, or the check that cannot be made there."""
    level = at.sigma if isinstance(at, CriticalTime | NoiseLevel) else float(at)
    if level is not None and sigma.min() <= level <= sigma.max() and (top or level < sigma.max()):
        return level
    if level is None:
        why = ((isinstance(at, CriticalTime) and at.reason) or "there is no level").rstrip(".")
    else:
        why = f"sigma {level:.4g} is outside {sigma.min():.4g} to {sigma.max():.4g}, where it was measured"
    return Check(name, None, math.nan, expected, f"Cannot be said: {why}.")
