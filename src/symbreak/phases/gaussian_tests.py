"""Is x_t Gaussian? Tests of the noised state x = x_0 + sigma eps, level by level.

    Mardia skewness, kurtosis    b_1 = mean_ij (y_i . y_j)^3,   b_2 = mean_i |y_i|^4              (Mardia 1970)
    Henze-Zirkler                n integral |psi_n(t) - exp(-|t|^2 / 2)|^2 phi_beta(t) dt          (1990)
    Anderson-Darling, K^2        of one-dimensional projections, all directions together by Holm

with y the coordinates in the leading k modes of the data, standardised by the sample's own mean and covariance. Every
statistic is invariant under affine maps, so its null law depends on the sample size and k only: p-values come from
Gaussian samples of the same size and are exact, (1 + number as large) / (1 + simulations). They stay exact where the
modes are those of the same images before noise: for Gaussian data the centred coordinates are then left-spherical, and
their standardised form has the same law whatever their covariance.

Data that are not Gaussian are so at no level (Cramer 1936: if x_0 + sigma eps is Gaussian, x_0 is). A test only says
whether n samples see it, and the level of the first rejection falls with fewer samples. What the departure costs is
measured in nats by `symbreak.phases.beyond_gaussian`, which the caller may put beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from scipy import special, stats

from symbreak.critical import CriticalTime, Curve, Levels, levels
from symbreak.laws.law import Law
from symbreak.moments.low_rank import LowRankMoments
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Batches
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Run, renamed
from symbreak.runtime.shown import Shown

__all__ = [
    "MULTIVARIATE",
    "PROJECTED",
    "Gaussianity",
    "first_rejection",
    "gaussianity",
    "henze_zirkler",
    "holm",
    "mardia",
]

MULTIVARIATE = ("Mardia skewness", "Mardia kurtosis", "Henze-Zirkler")
PROJECTED = ("Anderson-Darling", "D'Agostino K2")
SIMULATIONS = 999  # Gaussian samples behind a p-value on the modes
PROJECTIONS = 9999  # and behind that of a projection, which multiplies with the number of directions
LARGEST = 2000  # samples tested, at most: Henze-Zirkler compares every two
NUMBERS = 2**22  # numbers of one piece of simulated projections
SOURCE = "Mardia 1970, Henze & Zirkler 1990, Anderson & Darling 1954, D'Agostino & Pearson 1973; simulated null"


@dataclass(frozen=True)
class Gaussianity(Shown):
    """What the tests say, level by level.

    Attributes:
        sigma: rising levels [G].
        samples: states n tested at each.
        modes: k leading modes.
        directions: projections: the k modes, then random directions.
        alpha: size of a test.
        statistics: by test: [G], or [G, directions] for tests of projections.
        p_values: by test [G]: of the test, or the smallest of all directions after Holm's correction.
        raw: p-values of every projection [G, directions], by test.
        simulations: Gaussian samples behind the p-values: on the modes, of a projection.
        nats: non-Gaussianity in nats, where the caller has it.
    """

    sigma: np.ndarray
    samples: int
    modes: int
    directions: int
    alpha: float
    statistics: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]
    simulations: tuple[int, int]
    nats: Curve | None = field(default=None)

    @property
    def rejected(self) -> dict[str, np.ndarray]:
        """By test: whether it rejects at each level, [G]; a level by itself, at size ``alpha``."""
        return {name: p <= self.alpha for name, p in self.p_values.items()}

    def directions_rejected(self, control: str = "holm") -> dict[str, np.ndarray]:
        """By test of projections: how many directions reject at each level, [G].

        Args:
            control: ``"holm"`` (chance of a single false one at most alpha) or ``"bh"`` (share of false ones;
                Benjamini & Hochberg 1995, for independent or positively dependent directions).
        """
        if control not in ("holm", "bh"):
            raise InputError(f"control {control!r}; expected 'holm' or 'bh'.")
        adjust = holm if control == "holm" else stats.false_discovery_control
        return {k: np.array([(adjust(p) <= self.alpha).sum() for p in raw]) for k, raw in self.raw.items()}

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        counts = {c: self.directions_rejected(c) for c in ("holm", "bh")}
        return {
            "sigma": self.sigma.tolist(),
            "samples": self.samples,
            "modes": self.modes,
            "directions": self.directions,
            "alpha": self.alpha,
            "simulations": list(self.simulations),
            "statistics": {k: v.tolist() for k, v in self.statistics.items() if v.ndim == 1},
            "p_values": {k: v.tolist() for k, v in self.p_values.items()},
            "rejected": {k: v.tolist() for k, v in self.rejected.items()},
            "directions_rejected": {c: {k: v.tolist() for k, v in by_test.items()} for c, by_test in counts.items()},
            "first_rejection": {name: first_rejection(self, name).to_dict() for name in self.p_values},
            "nats": self.nats and self.nats.to_dict(),
        }


@renamed(nats="...) and then dataclasses.replace(answer, nats=...")
def gaussianity(
    source: Law | Batches | Mapping[float, torch.Tensor],
    sigma: Levels | None = None,
    *,
    modes: int = 8,
    directions: int = 16,
    samples: int | None = None,
    moments: Moments | LowRankMoments | None = None,
    alpha: float = 0.05,
    simulations: tuple[int, int] = (SIMULATIONS, PROJECTIONS),
    seed: int = 0,
    run: Run | None = None,
) -> Gaussianity:
    """Test whether x_0 + sigma eps is Gaussian, at every level, for a data set, a law or states of a network.

    Args:
        source: images [N, *S] (a tensor, array, `Images` or batches), a law with ``.sample``, or the states
            themselves, {sigma: VE states [n, *S]}, as from `phases.reverse_paths.reverse_states`.
        sigma: a level or levels [G]; for states, their own.
        modes: leading modes k of the covariance that the multivariate tests look at.
        directions: random directions projected on, beside the k modes.
        samples: states n; by default all images, at most 2,000, and 1,000 of a law. Fewer are picked at random.
        moments: `Moments` whose leading modes are taken; by default those of the images before noise, or of the states.
        alpha: size of a test.
        simulations: Gaussian samples behind the p-values of the multivariate tests and of projections.
        seed: of noise (fresh at every level), directions and picks; the simulated null is the
            same for all.
        run: where finished levels are kept, and whom to tell.

    Returns:
        A `Gaussianity`; ``dataclasses.replace(answer, nats=...)`` puts non-Gaussianity in nats beside the tests.

    Raises:
        InputError: for too few samples for k modes (at least 20 and 3 k), NaN, or states that do not vary in a mode.

    Source: Mardia 1970; Henze & Zirkler 1990; simulated null derived (module docstring).

    >>> from symbreak.laws import Mixture
    >>> law = Mixture.from_parameters([[-1.0, 0.0], [1.0, 0.0]], [0.0, 0.0])
    >>> tested = gaussianity(law, [0.3, 30.0], modes=2, directions=4, samples=200, simulations=(99, 999))
    >>> tested.rejected["Henze-Zirkler"].tolist()
    [True, False]
    """
    if not 0 < alpha < 1 or modes < 1 or directions < 0 or min(simulations) < 1:
        raise InputError(
            f"alpha {alpha:g}, {modes} modes, {directions} directions, {simulations} simulations; expected 0 < alpha < "
            "1, at least one mode and one simulation."
        )
    states, s = _states(source, sigma, samples, seed)
    first = states(float(s[0]))
    n, dim = len(first), math.prod(first.shape[1:])
    k = min(modes, dim)
    if n < max(20, 3 * k):
        raise InputError(f"{n} samples for {k} modes; expected at least {max(20, 3 * k)}. Ask for fewer modes.")
    axes = _axes(source, states, moments, k, dim)
    random = torch.randn(dim, directions, generator=generator(seed, 52), dtype=torch.float64)
    random /= torch.linalg.vector_norm(random, dim=0, keepdim=True).clamp_min(1e-300)
    whole = _null(n, k, simulations[0])
    single = _null_projected(n, simulations[1])

    def level(u: float) -> Arrays:
        x = states(u).reshape(n, -1).double()
        if x.shape != (n, dim) or not bool(torch.isfinite(x).all()):
            raise InputError(f"the states at sigma {u:.4g} hold NaN or are not {n} of {dim} numbers.")
        q = axes if axes is not None else Moments.fit([x], parts=1).leading_vectors(k)
        y = (x - x.mean(0)) @ torch.cat([q, random], 1)
        return {"modes": _statistics(y[:, :k].numpy()), "projections": _projected(y.T.numpy())}

    run = run or Run()
    decides = [s.tolist(), n, k, directions, seed, axes]
    if run.folder is not None:
        decides += [states(u) for u in s.tolist()] if isinstance(source, Mapping) else [first]
    parts = run.parts("gaussianity", s.tolist(), level, *decides)
    on_modes, flat = (np.stack([part[name] for part in parts], axis=1) for name in ("modes", "projections"))
    statistics = {name: on_modes[i] for i, name in enumerate(MULTIVARIATE)}
    p_values = {name: _p(on_modes[i], whole[i], two_sided=i == 1) for i, name in enumerate(MULTIVARIATE)}
    raw = {name: _p(flat[i], single[i]) for i, name in enumerate(PROJECTED)}
    for i, name in enumerate(PROJECTED):
        statistics[name] = flat[i]
        p_values[name] = np.array([holm(p).min() for p in raw[name]])
    return Gaussianity(s, n, k, k + directions, alpha, statistics, p_values, raw, (simulations[0], simulations[1]))


@renamed(found="result=...")
def first_rejection(result: Gaussianity, test: str) -> CriticalTime:
    """The level at which a test first rejects, from high noise down, at the sample size used.

    The departure from a Gaussian falls with noise, so levels are taken in a fixed sequence, from the lowest up, each at
    size alpha, until one does not reject: for Gaussian data any level appears with probability alpha at most, and a
    chance rejection above is no finding. The answer is the last one that rejects; ``low`` is that level and ``high``
    the next one above, a bracket of the grid and no confidence interval.

    Args:
        result: what `gaussianity` returns.
        test: one of its tests.

    Raises:
        InputError: for an unknown test.
    """
    if test not in result.p_values:
        raise InputError(f"no test {test!r}; there are {', '.join(result.p_values)}.")
    criterion = f"{test} first rejects"
    size = f"{result.samples} samples, alpha {result.alpha:g}"
    least = 2 if test == MULTIVARIATE[1] else result.directions if test in PROJECTED else 1
    draws = result.simulations[1 if test in PROJECTED else 0]
    rejected = result.p_values[test] <= result.alpha
    if not rejected[0]:
        few = least / (draws + 1) > result.alpha
        reason = (
            f"{draws} simulations cannot reject; at least {math.ceil(least / result.alpha) - 1} are needed"
            if few
            else f"it does not reject at sigma {result.sigma[0]:.4g}, the lowest level; {size}"
        )
        return CriticalTime(None, criterion=criterion, source=SOURCE, reason=reason, confidence=1 - result.alpha)
    top = bool(rejected.all())
    i = len(rejected) - 1 if top else int(np.argmin(rejected)) - 1
    return CriticalTime(
        NoiseLevel(float(result.sigma[i])),
        NoiseLevel(float(result.sigma[i])),
        None if top else NoiseLevel(float(result.sigma[i + 1])),
        criterion=criterion,
        source=SOURCE,
        reason=f"{size}; " + ("rejects at the highest level tried" if top else "the interval is the grid's"),
        confidence=1 - result.alpha,
        interval="bracket",
    )


def mardia(x: np.ndarray) -> tuple[float, float]:
    """Mardia's multivariate skewness b_1 and kurtosis b_2 of rows [n, k], covariance over n.

    b_1 is k (k + 1) (k + 2) / n and b_2 is k (k + 2) to leading order for Gaussian rows.

    Source: Mardia 1970, Biometrika 57.
    """
    y = _standardised(x)
    # mean_ij (y_i . y_j)^3 is the squared norm of the third-moment tensor: no n x n matrix.
    third = np.einsum("ni,nj,nl->ijl", y, y, y, optimize=True) / len(y)
    return float((third**2).sum()), float(((y * y).sum(1) ** 2).mean())


def henze_zirkler(x: np.ndarray) -> float:
    """The Henze-Zirkler statistic of rows [n, k], with its usual smoothing

        beta = ((2 k + 1) n / 4)^(1 / (k + 4)) / sqrt 2.

    Source: Henze & Zirkler 1990, Communications in Statistics 19.
    """
    y = _standardised(x)
    n, k = y.shape
    b2 = 0.5 * ((2 * k + 1) * n / 4) ** (2 / (k + 4))
    length = (y * y).sum(1)
    apart = np.maximum(length[:, None] + length - 2 * y @ y.T, 0.0)
    pairs = np.exp(-0.5 * b2 * apart, out=apart).sum() / n
    single = np.exp(-0.5 * b2 / (1 + b2) * length).sum()
    return float(pairs - 2 * (1 + b2) ** (-k / 2) * single + n * (1 + 2 * b2) ** (-k / 2))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values [m]: at most alpha exactly where the step-down procedure rejects.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.

    >>> [round(float(v), 6) for v in holm(np.array([0.01, 0.04, 0.03]))]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return out


def _standardised(x: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and covariance 1 (over n)."""
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    if not values[0] > 1e-12 * max(values[-1], 1e-300):
        raise InputError("the states do not vary in one of the modes; ask for fewer modes or noisier levels.")
    out: np.ndarray = (centred @ vectors) / np.sqrt(values)
    return out


def _statistics(x: np.ndarray) -> np.ndarray:
    """The multivariate statistics [3] of rows [n, k]."""
    return np.array([*mardia(x), henze_zirkler(x)])


def _projected(y: np.ndarray) -> np.ndarray:
    """Anderson-Darling and K^2 [2, m] of m samples in rows [m, n]."""
    n = y.shape[1]
    centred = y - y.mean(1, keepdims=True)
    spread = centred.std(1, ddof=1, keepdims=True)
    if not (spread > 0).all():
        raise InputError("the states do not vary in one of the directions; choose noisier levels.")
    z = np.sort(centred / spread, axis=1)
    weight = 2 * np.arange(1, n + 1) - 1
    squared = -n - (weight * (special.log_ndtr(z) + special.log_ndtr(-z[:, ::-1]))).mean(1)
    return np.stack([squared, stats.normaltest(y, axis=1).statistic])


@lru_cache(maxsize=8)
def _null(n: int, k: int, draws: int) -> np.ndarray:
    """Multivariate statistics of Gaussian samples [3, draws]."""
    rng = np.random.default_rng([54, n, k])
    return np.stack([_statistics(rng.standard_normal((n, k))) for _ in range(draws)], axis=1)


@lru_cache(maxsize=8)
def _null_projected(n: int, draws: int) -> np.ndarray:
    """Statistics of one-dimensional Gaussian samples [2, draws]."""
    rng, size = np.random.default_rng([55, n]), max(1, NUMBERS // n)
    parts = [_projected(rng.standard_normal((min(size, draws - i), n))) for i in range(0, draws, size)]
    return np.concatenate(parts, axis=1)


def _p(value: np.ndarray, null: np.ndarray, two_sided: bool = False) -> np.ndarray:
    """Monte Carlo p-values of statistics [...] against simulated ones [draws]."""
    ordered = np.sort(null)
    above = len(null) - np.searchsorted(ordered, value, side="left")
    p: np.ndarray = (1 + above) / (len(null) + 1)
    if two_sided:
        below = (1 + np.searchsorted(ordered, value, side="right")) / (len(null) + 1)
        p = np.minimum(1.0, 2 * np.minimum(p, below))
    return p


def _states(
    source: Law | Batches | Mapping[float, torch.Tensor], sigma: Levels | None, samples: int | None, seed: int
) -> tuple[Callable[[float], torch.Tensor], np.ndarray]:
    """A function of the level that gives VE states [n, *S], and the levels."""
    if samples is not None and samples < 1:
        raise InputError(f"{samples} samples; expected at least 20.")
    if isinstance(source, Mapping):
        s = np.unique(levels(np.array(list(source), dtype=float))[0])
        if sigma is not None and not np.array_equal(s, np.unique(levels(sigma)[0])):
            raise InputError("levels came with states of other levels; leave sigma out.")
        known = {float(u): torch.as_tensor(x).cpu() for u, x in source.items()}
        count = {len(x) for x in known.values()}
        if len(count) != 1:
            raise InputError(f"states of {min(count)} to {max(count)} samples; expected one number at every level.")
        n = min(samples or LARGEST, *count)
        return (lambda u: known[u][:n]), s
    if sigma is None:
        raise InputError("no levels; expected sigma, a level or several.")
    s = np.unique(levels(sigma)[0])
    clean = _clean(source, samples, seed)
    place = {float(u): j for j, u in enumerate(s)}

    def noised(u: float) -> torch.Tensor:
        if u == 0:
            return clean
        # Every level draws its own noise, so that chance does not repeat itself from level to level.
        g = generator(seed, 51, place[u])
        return clean + u * torch.randn(clean.shape, generator=g, dtype=torch.float64)

    return noised, s


def _clean(source: Law | Batches, samples: int | None, seed: int) -> torch.Tensor:
    """Images [n, *S] float64 of a data set, or draws of a law."""
    if hasattr(source, "sample"):
        drawn: torch.Tensor = source.sample(samples or 1000, 0.0, generator(seed, 56))
        return drawn.double()
    whole = (
        torch.as_tensor(source)
        if isinstance(source, torch.Tensor | np.ndarray)
        else torch.cat([torch.as_tensor(batch) for batch in source])
    ).cpu()
    n = min(samples or LARGEST, len(whole))
    if samples is not None and samples > len(whole):
        raise InputError(f"{samples} samples of {len(whole)} images; expected at most that many.")
    picks = torch.randperm(len(whole), generator=generator(seed, 57))[:n]
    return whole[picks].double()


def _axes(
    source: object, states: Callable[[float], torch.Tensor], moments: Moments | LowRankMoments | None, k: int, dim: int
) -> torch.Tensor | None:
    """Leading modes [d, k] of moments, or of the images before noise; ``None`` for those of each level's states."""
    if moments is not None:
        if moments.dim != dim:
            raise InputError(f"moments of {moments.dim} dimensions for states of {dim}; expected the data's own.")
        vectors = moments.vectors if hasattr(moments, "vectors") else moments.eigh[1]
        return torch.as_tensor(vectors[:, :k]).double()
    if isinstance(source, Mapping):
        return None
    return Moments.fit([states(0.0).flatten(1)], parts=1).eigh[1][:, :k].double()
