"""Speciation: the noise level at which the classes of a data set become distinguishable.

Many criteria, many levels; every result names its own.

    spectral          Lambda exp(-2 tau) = 1: tau = 1/2 log Lambda, sigma^2 = Lambda - 1, Lambda the top
                      eigenvalue of the data covariance. It depends on the data's scale: [0, 1] instead of
                      [-1, 1] shifts tau by -ln 2.
    signal-to-noise   sigma^2 = Lambda, tau = 1/2 log(1 + Lambda)
    free-entropy      E[L] = Std[L], L = log p(x | c) - log p(x | other classes), x drawn from class c
    cloning           phi = E sum_c p(c | x)^2: the probability that two reverse trajectories that share
                      their path down to sigma and then use independent noise end in the same class

Sources: Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491 (spectral, cloning of two Gaussians);
Achilli, Benedetti, Biroli, Mézard, arXiv:2602.04404 (free entropy); phi of any mixture is derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import brentq

from symbreak.critical import CriticalTime, Curve, Levels, curve, levels, root_time
from symbreak.intervals import jackknife
from symbreak.laws.class_posterior import by_class, class_draws, mixture_of, posterior_average
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.moments.low_rank import Population
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.noise import NoiseLevel
from symbreak.runtime.files import InputError

__all__ = ["SpeciationTime", "cloning_probability", "cloning_time", "ladder", "speciation_time"]

SPECTRAL = "arXiv:2402.18491, Lambda exp(-2 tau) = 1"
SIGNAL_TO_NOISE = "sigma^2 = Lambda (derived)"
FREE_ENTROPY = "arXiv:2602.04404, E[L] = Std[L]"
CLONING = "arXiv:2402.18491"
CRITERIA = ("spectral", "signal-to-noise", "free-entropy")


@dataclass(frozen=True)
class SpeciationTime(CriticalTime):
    """A free-entropy time: the level at which the first class stands out, and the level of every class.

    Attributes:
        classes: one `CriticalTime` a class, in the order of their numbers (the components', where a mixture has
            no classes): the level seen from states of that class. They differ for classes of different shape.
    """

    record = (*CriticalTime.record, "classes")

    classes: tuple[CriticalTime, ...] = ()


def _spectral(modes: Population, i: int, criterion: str, scale: float) -> CriticalTime:
    """The time of the i-th eigenvalue, in units where the data are multiplied by ``scale``."""
    # Rounding of an eigenvalue that is 1 is no mode.
    hides, source = (1.0 + 1e-12, SPECTRAL) if criterion == "spectral" else (-1.0, SIGNAL_TO_NOISE)
    value, low, high = (float(v[i]) * scale**2 for v in (modes.values, modes.low, modes.high))
    time = partial(CriticalTime, criterion=criterion, source=source)
    inside = (
        f"the eigenvalue lies under the Marchenko-Pastur edge of the others: the law's own is {low:.4g} to {high:.4g}"
    )
    if value <= hides:
        reason = "the noise of the VP process hides this mode at every level"
        if modes.hidden[i]:
            return time(None, reason=f"{inside}, their mean {value:.4g}; up to 1, {reason}")
        at = f"the top eigenvalue {value:.4g}" if i == 0 else f"the eigenvalue {value:.4g}"
        return time(None, reason=f"{at} is at most 1: {reason}.")
    ends = [
        None if math.isnan(v) else NoiseLevel(math.sqrt(max(v - float(hides > 0), 0.0))) for v in (value, low, high)
    ]
    kind = "bound" if modes.hidden[i] else "jackknife" if ends[1] else ""
    return time(*ends, reason=f"{inside}; the least is taken" if modes.hidden[i] else None, interval=kind)


def speciation_time(
    law_or_moments: Law | Moments | LowRankMoments,
    criterion: str = "spectral",
    scale: float = 1.0,
    samples: int = 20000,
    seed: int = 0,
) -> CriticalTime:
    """The speciation level of a law or of measured moments.

    Args:
        law_or_moments: `Moments`, or a law with ``.moments``; for ``"free-entropy"`` a `Mixture`
            (of its ``classes``; without them every component is a class).
        criterion: ``"spectral"``, ``"signal-to-noise"`` or ``"free-entropy"`` (module docstring).
        scale: factor on the data; 0.5 gives the value for images in [0, 1].
        samples: draws for the free entropy of three and more classes (two are exact).
        seed: of those draws.

    Returns:
        A `CriticalTime`. Spectral and signal-to-noise: the eigenvalue is the law's, which samples spread out (see
        `Moments.population`), with a jackknife interval; no level, with a reason, where it is at most 1 (spectral).
        For an eigenvalue that cannot be told from noise the answer is the least level, with bounds. Free entropy:
        a `SpeciationTime`, whose ``classes`` hold one time for each class that x is drawn from and whose
        own level is the largest of them, where the first class stands out (read from other draws than those that
        choose the class, where the draws do not tell which it is). With three and more classes
        each is set against the mixture of the others, by Monte Carlo, with jackknife intervals.

    Raises:
        InputError: for an unknown criterion, a scale <= 0, or a law without classes.

    >>> import torch
    >>> data = torch.tensor([[-2.0], [2.0]]).repeat(500, 1)
    >>> round(speciation_time(Moments.fit([data])).level.ou_time, 3)
    0.694
    >>> law = Mixture.from_parameters([[-2.0], [2.0]], 1.0)
    >>> round(speciation_time(law, "free-entropy").sigma ** 2, 9)                # M - s2
    3.0
    """
    if criterion not in CRITERIA:
        raise InputError(f"unknown speciation criterion {criterion!r}. Known: {', '.join(CRITERIA)}.")
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"scale is {scale:g}; expected a factor > 0 on the data.")
    if criterion == "free-entropy":
        return _free_entropy(mixture_of(law_or_moments), scale, samples, seed)
    moments: Moments | LowRankMoments = getattr(law_or_moments, "moments", law_or_moments)  # type: ignore[arg-type]
    return _spectral(moments.population(1), 0, criterion, scale)


def ladder(moments: Moments, modes: int = 10, scale: float = 1.0) -> list[CriticalTime]:
    """The spectral time of each of the leading modes: the order in which they are decided."""
    leading = moments.population(modes)
    return [_spectral(leading, i, "spectral", scale) for i in range(len(leading))]


def _free_entropy(law: Mixture, scale: float, samples: int, seed: int) -> SpeciationTime:
    """Free-entropy times of every class of a mixture."""
    member = law.membership.bool()
    if member.shape[1] < 2:
        raise InputError("all components of the mixture are of one class; expected at least two classes.")
    gaps = law.means - law.weights @ law.means
    variance = float(law.weights @ (gaps * gaps).sum(1)) + float(law.eigenvalues.sum() + law.floor.sum() * law.dim)
    size = math.sqrt(variance)
    if not size > 0:
        raise InputError("all components are one point; expected classes that differ.")
    times, left_out = [], []
    names = range(law.components) if law.classes is None else law.classes.unique().tolist()
    for k, name in enumerate(names):
        ends: tuple[float | None, float | None, float | None] = (None, None, None)
        rows: np.ndarray | None = None
        reason: str | None = f"E[L] stays below Std[L] for class {name} at every level"
        if law.class_weights[k] == 0:
            reason = f"class {name} has weight 0"
        elif law.components == 2:
            ends = (_outermost(_pair(law, int(member[:, k].nonzero()[0])), size), None, None)
        else:
            ends, rows = _against_rest(law, member[:, k], size, max(samples // len(names), 100), seed)
        left_out.append(rows)
        level, low, high = (None if e is None else NoiseLevel(e * scale) for e in ends)
        reason = reason if level is None else None
        kind = "" if level is None else "exact" if low is None else "draws only"
        times.append(
            CriticalTime(level, low, high, criterion="free-entropy", source=FREE_ENTROPY, reason=reason, interval=kind)
        )
    first = max(times, key=lambda c: -1.0 if c.sigma is None else c.sigma)
    noisy = [(time, rows) for time, rows in zip(times, left_out) if rows is not None]
    return SpeciationTime(**vars(_first_of(first, noisy, scale)), classes=tuple(times))


def _first_of(first: CriticalTime, noisy: list[tuple[CriticalTime, np.ndarray]], scale: float) -> CriticalTime:
    """The level of the first class, from draws that did not choose which class that is.

    The largest of several noisy levels is too large. Each group of draws reads the level of the class that is the first
    one without the group, by the jackknife's pseudo-values. The interval is that of a maximum: its lower end is the
    first class's at 5 % over the number of classes that may be the first, its upper end the largest of theirs.

    Args:
        noisy: the time of each class, and log sigma with each of the groups of draws left out [groups].
    """
    if first.low is None:
        return first
    some = [(c, rows) for c, rows in noisy if c.high is not None and c.high.sigma >= first.low.sigma]
    if len(some) < 2:
        return first
    rows = np.array([left_out for _, left_out in some])
    groups, log_scale = rows.shape[1], math.log(scale)
    pseudo = groups * rows.mean(1, keepdims=True) - (groups - 1) * rows
    top = next(left_out for c, left_out in some if c.sigma == first.sigma)
    low = jackknife(math.log(first.sigma or 0.0), top, confidence=1 - 0.05 / len(some))[0]
    high = max(math.log(c.high.sigma) for c, _ in some if c.high)
    level = log_scale + float(pseudo[rows.argmax(0), np.arange(groups)].mean())
    at, below, above = (NoiseLevel(math.exp(v)) for v in (min(max(level, low), high), low, high))
    reason = f"one of {len(some)} classes whose levels the draws do not tell apart"
    return replace(first, level=at, low=below, high=above, reason=reason)


def _outermost(excess: Callable[[float], float], size: float, points: int = 120) -> float | None:
    """The largest sigma at which a function of sigma turns positive, going down from far outside the data."""
    grid = size * np.geomspace(1e3, 1e-5, points)
    before = excess(float(grid[0]))
    for a, b in pairwise(grid):
        now = excess(float(b))
        if before < 0 <= now:
            return math.exp(brentq(lambda u: excess(math.exp(u)), math.log(b), math.log(a), xtol=1e-13, rtol=1e-14))
        before = now
    return None


def _pair(law: Mixture, k: int) -> Callable[[float], float]:
    """E[L] - Std[L] of two Gaussians, x drawn from component k: both moments are exact.

    With A = C_k + sigma^2, B = C_j + sigma^2, gap g and delta_i the eigenvalues of B^-1/2 (A - B) B^-1/2,

        E = 1/2 sum_i (delta_i - log(1 + delta_i)) + 1/2 g B^-1 g
        Var = 1/2 sum_i delta_i^2 + g B^-1 A B^-1 g.
    """
    j, d = 1 - k, law.dim
    gap = (law.means[k] - law.means[j])[:, None]
    frame = torch.cat([law.vectors[k], law.vectors[j], gap], dim=1)
    # Outside the span of both bases and the gap the two covariances are multiples of the identity.
    u = torch.linalg.qr(frame)[0] if frame.shape[1] < d else torch.eye(d, dtype=torch.float64)

    def inside(i: int) -> torch.Tensor:
        t = u.T @ law.vectors[i]
        return (t * (law.eigenvalues[i] - law.floor[i])) @ t.T + law.floor[i] * torch.eye(u.shape[1]).double()

    here, other = inside(k), inside(j)
    values, vectors = torch.linalg.eigh(other)
    values = values.clamp_min(0.0)
    difference = vectors.T @ (here - other) @ vectors
    along = (vectors.T @ (u.T @ gap))[:, 0]
    beyond, floors = d - u.shape[1], (float(law.floor[k]), float(law.floor[j]))

    def excess(sigma: float) -> float:
        root = (values + sigma * sigma).sqrt()
        b = difference / root[:, None] / root
        delta = torch.linalg.eigvalsh(b).clamp_min(-1 + 1e-15)
        w = along / root
        out = (floors[0] - floors[1]) / (floors[1] + sigma * sigma)
        mean = 0.5 * float((delta - torch.log1p(delta)).sum() + w @ w) + 0.5 * beyond * (out - math.log1p(out))
        variance = float(0.5 * (delta * delta).sum() + w @ w + w @ b @ w) + 0.5 * beyond * out * out
        return mean / math.sqrt(variance) - 1.0 if variance > 0 else -1.0

    return excess


def _against_rest(
    law: Mixture, inside: torch.Tensor, size: float, samples: int, seed: int, groups: int = 10
) -> tuple[tuple[float | None, float | None, float | None], np.ndarray | None]:
    """sigma where E[L] = Std[L] for L = log p(x | c) - log p(x | not c), its jackknife interval, and the left-out logs.

    Args:
        inside: components of the class c, a mask [K].
    """
    draws = class_draws(law, inside.nonzero()[:, 0].tolist(), samples, seed)
    log_w = law.weights.log()

    def odds(sigma: float) -> np.ndarray:
        out = []
        for clean, noise in draws:
            log_p = law.component_log_prob(clean + sigma * noise, sigma).double()
            here, rest = (
                torch.logsumexp(log_p[:, some] + log_w[some], dim=1) - torch.logsumexp(log_w[some], dim=0)
                for some in (inside, ~inside)
            )
            out.append(here - rest)
        return torch.cat(out).numpy()

    def excess(values: np.ndarray) -> float:
        spread = float(values.std(ddof=1))
        return float(values.mean()) / spread - 1.0 if spread > 0 else -1.0

    root = _outermost(lambda s: excess(odds(s)), size, points=48)  # draws are expensive
    if root is None:
        return (None, None, None), None
    h = 0.02
    slope = (excess(odds(root * math.exp(h))) - excess(odds(root * math.exp(-h)))) / (2 * h)
    at, part = odds(root), np.arange(sum(len(c) for c, _ in draws)) % groups
    moved = np.array([-excess(at[part != g]) / slope for g in range(groups)])
    low, high = jackknife(0.0, moved)
    return (root, root * math.exp(low), root * math.exp(high)), math.log(root) + moved


def cloning_probability(
    law: Law, sigma: Levels, samples: int = 20000, seed: int = 0, labels: torch.Tensor | None = None
) -> Curve:
    """The probability that two clones which part at sigma end in the same class.

        phi(sigma) = E_x sum_c p(c | x)^2        two Gaussians +-m: 1/2 + 1/2 E tanh^2(z (z + Y))

    Args:
        law: a `Mixture` (of its ``classes``; without them every component is a class), or an `Empirical` law with
            labels.
        sigma: a level, or levels [G].
        samples: draws in all (at least 16 a class), where there is no quadrature; at most one a point of an
            `Empirical` law.
        seed: of the draws; every level shares them, so errors of neighbouring levels are correlated.
        labels: class [N] of every point of an `Empirical` law.

    Returns:
        A `Curve` with 95 % intervals (for a single level its arrays have no axis). Two components with a
        common covariance and any weights are done by quadrature, their interval has no width.

    Raises:
        InputError: for a law without classes, or sigma <= 0.

    Source: arXiv:2402.18491 (two Gaussians); the general form is derived.

    >>> law = Mixture.from_parameters([[-1.0], [1.0]], 0.0)
    >>> round(float(cloning_probability(law, 1.0).value), 10)                    # z = 1
    0.7752002454
    """
    s, shape = levels(sigma)
    agreement = by_class(law, lambda log_p: (2 * log_p).exp().sum(-1))
    values = posterior_average(law, s, agreement, samples, seed, labels)
    # Quadrature rounds: a certain agreement is 1, not 1 + 2e-16.
    value, low, high = (np.clip(v, 0.0, 1.0) for v in values)
    return curve(s, shape, value, low, high, "cloning probability")


def cloning_time(law: Law, sigma: Levels | None = None, samples: int = 20000, seed: int = 0) -> CriticalTime:
    """The level at which the clones of a mixture agree halfway between their floor and certainty.

        phi(sigma) = (1 + sum_c pi_c^2) / 2

    Args:
        law: a `Mixture` (of its ``classes``; without them every component is a class).
        sigma: levels between whose ends it is looked for; by default from far inside to far outside the data.
        samples, seed: as for `cloning_probability`, which all levels share.

    Returns:
        A `CriticalTime`; with a reason and no level where the range does not hold it. Its interval covers the
        Monte Carlo error only and has no width where there is none.

    Raises:
        InputError: for a law without classes, or sigma <= 0.

    Source: arXiv:2402.18491 (phi); halfway from the floor is derived.

    >>> law = Mixture.from_parameters([[-1.0], [1.0]], 0.0)
    >>> round(float(cloning_probability(law, cloning_time(law).sigma).value), 9)
    0.75
    """
    mixture = mixture_of(law)
    half = 0.5 * (1.0 + float((mixture.class_weights**2).sum()))
    if sigma is None:
        size = math.sqrt(float(mixture.moments.eigh[0].sum()))
        ends = np.array([1e-5, 1e3]) * size if size > 0 else np.array([1.0])
    else:
        ends = levels(sigma)[0]

    def average(s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        phi = cloning_probability(mixture, s, samples, seed)
        return phi.value, phi.low, phi.high

    low, high = float(ends.min()), float(ends.max())
    if not average(np.array([high]))[0][0] < half < average(np.array([low]))[0][0]:
        reason = f"agreement of clones does not pass {half:.3g} from sigma {low:.4g} to {high:.4g}"
        return CriticalTime(None, criterion="cloning", flow="sde", source=CLONING, reason=reason)
    reason = f"agreement of clones at {half:.3g}, halfway from its floor to certainty"
    time = root_time(average, half, (math.log(low), math.log(high)), criterion="cloning", source=CLONING)
    time = replace(time, flow="sde", reason=reason)
    return replace(time, low=time.low or time.level, high=time.high or time.level)
