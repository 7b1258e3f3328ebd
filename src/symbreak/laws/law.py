"""What a law is, and what the laws share: checked arguments and the probability flow.

In the VE picture x = x_0 + sigma eps the flow of a law with posterior mean D is

    dx / dsigma = (x - D(x, sigma)) / sigma.

It is integrated *from infinite noise*, without a largest sigma: with mu the mean, v the mean variance and c
the largest standard deviation of the law,

    x = mu + sqrt(sigma^2 + v) g,      a = log(sigma / (sigma + c)),

g is analytic in 1 / sigma and equals the white noise z where a = 0 (sigma infinite), and dg/da vanishes
there; an isotropic Gaussian has g = z throughout. Below the spread of the data a is log sigma. Equal steps
in a, the same for every sample, and the classical Runge-Kutta rule: error of fourth order in 1 / steps,
and no sample's steps depend on its neighbours.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch

from symbreak.noise import generator, sigma_of
from symbreak.runtime.files import InputError

__all__ = [
    "ExactLaw",
    "FlowPath",
    "Law",
    "Transports",
    "column",
    "flatten",
    "fresh",
    "is_law",
    "level",
    "rows_of",
    "top_eigenvalue",
]


@runtime_checkable
class Law(Protocol):
    """A distribution of x_0 whose noised version x = x_0 + sigma eps is known: drawn from, scored, denoised, carried.

    Batches are [B, *S], float32 or float64; sigma > 0 is one level or [B], one a sample.

    Attributes:
        shape: sample shape S.
        dim: number of elements d of one sample.
    """

    shape: tuple[int, ...]

    @property
    def dim(self) -> int: ...

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]."""

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]."""

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats, float64."""

    def posterior_covariance(self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x."""

    def transport(self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None) -> torch.Tensor:
        """White noise, or VE states at ``sigma_from``, along the law's probability flow: VE states [B, *S] at sigma."""


class Transports(Protocol):
    """What a start is drawn from: a `Law`, or anything else that carries white noise to a level."""

    shape: tuple[int, ...]

    def transport(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """VE states [B, *S] from white noise [B, *S]."""


def is_law(source: object) -> TypeGuard[Law]:
    """Whether a source is a law, which can be sampled at any level and is exact, or a denoiser."""
    return hasattr(source, "denoise")


class ExactLaw(abc.ABC):
    """Base of the laws of this package: a `Law` made of what it says of flat rows.

    ``_denoise``, ``_score``, ``_log_prob`` and ``_covary`` get rows [B, d] and sigma^2, [] or [B, 1] float64.
    """

    shape: tuple[int, ...]
    _centre: torch.Tensor  # mean [d] float64
    _scales: tuple[float, float]  # mean variance, and largest standard deviation (a scale; 10 % do not matter)

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """Posterior means [B, d]."""

    def _score(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return (self._denoise(flat, s2).to(flat.dtype) - flat) / s2.to(flat.dtype)

    @abc.abstractmethod
    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """Log densities [B] float64."""

    @abc.abstractmethod
    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """Posterior covariance times v [B, d]."""

    def _flat(self, x: torch.Tensor, sigma: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flatten(x, self.shape), column(level(sigma, x) ** 2)

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]; sigma a float or [B]."""
        return self._denoise(*self._flat(x, sigma)).to(x.dtype).reshape(x.shape)

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]; sigma a float or [B]."""
        return self._score(*self._flat(x, sigma)).to(x.dtype).reshape(x.shape)

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats, float64; sigma a float or [B]."""
        return self._log_prob(*self._flat(x, sigma))

    def posterior_covariance(self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x; sigma a float or [B]."""
        if v.shape != x.shape:
            raise InputError(f"vectors of shape {tuple(v.shape)} for states of {tuple(x.shape)}; expected the same.")
        flat, s2 = self._flat(x, sigma)
        return self._covary(flat, v.reshape(flat.shape), s2).to(x.dtype).reshape(x.shape)

    def transport(
        self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None, steps: int = 48
    ) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

        Args:
            noise: [B, *S]; white noise, or VE states at ``sigma_from``.
            sigma: target level.
            sigma_from: level of the states; ``None`` for pure noise (the limit of infinite sigma).
            steps: Runge-Kutta steps of four posterior means each; the error falls with their fourth power.

        Returns:
            VE states [B, *S] at sigma.

        Raises:
            InputError: for levels or step counts that are not positive.
        """
        variance, spread = self._scales
        x, mu = flatten(noise, self.shape), self._centre.to(noise)
        flow = FlowPath(sigma, sigma_from, spread, steps)

        def radius(s: float) -> float:
            return math.hypot(s, math.sqrt(variance))

        def slope(g: torch.Tensor, i: int) -> torch.Tensor:
            """dg/da = (s + c) / c (g v / r^2 - (D - mu) / r), 0 at infinite sigma."""
            s = flow.sigmas[i]
            if math.isinf(s):
                return torch.zeros_like(g)
            r = radius(s)
            d = self._denoise(mu + r * g, level(s, g) ** 2).to(g.dtype)
            return ((s + flow.c) / flow.c) * (g * (variance / r**2) - (d - mu) / r)

        g = x if math.isinf(flow.start) else (x - mu) / radius(flow.start)
        return (mu + radius(flow.end) * flow.carry(slope, g)).reshape(noise.shape)


def level(sigma: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sigma as float64 on the device of x: [] for a number, [B] for a batch.

    Raises:
        InputError: where sigma is not positive, or neither one number nor one a sample.
    """
    s = torch.as_tensor(sigma_of(sigma), dtype=torch.float64, device=x.device)
    if s.ndim > 1 or (s.ndim == 1 and len(s) not in (1, len(x))):
        raise InputError(f"sigma of shape {tuple(s.shape)} for a batch of {len(x)}; expected a number or [{len(x)}].")
    try:
        bad = not bool((s > 0).all())
    except RuntimeError:  # under vmap values cannot be looked at
        bad = False
    if bad:
        raise InputError(f"sigma is {float(s.min()):g}; expected a noise level > 0.")
    return s


def column(s: torch.Tensor) -> torch.Tensor:
    """[] stays [], [B] becomes [B, 1]."""
    return s[:, None] if s.ndim else s


def rows_of(s2: torch.Tensor, part: slice) -> torch.Tensor:
    """sigma^2, [] or [B, 1], of some rows of a batch."""
    return s2[part] if s2.ndim and len(s2) > 1 else s2


def flatten(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A batch [B, *S] as [B, d].

    Raises:
        InputError: where the samples do not have the law's shape, or are no floating numbers.
    """
    if tuple(x.shape[1:]) != tuple(shape) or x.ndim != len(shape) + 1:
        wanted = ", ".join(map(str, shape))
        raise InputError(f"a batch of shape {tuple(x.shape)}; this law needs [B, {wanted}].")
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"a batch of {x.dtype}; expected float32 or float64. Convert it first.")
    return x.reshape(len(x), -1)


def fresh(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one with a new random seed: the global one is never touched."""
    if generator is not None:
        return generator
    new = torch.Generator()
    new.seed()
    return new


def top_eigenvalue(product: Callable[[torch.Tensor], torch.Tensor], dim: int, iterations: int = 12) -> float:
    """The top eigenvalue of a covariance from below, by power iteration on v -> C v (v [1, d] float64).

    Good to a few per cent: it sets a scale, it is no result. Start and iterations are fixed.
    """
    v = torch.randn(1, dim, generator=generator(dim), dtype=torch.float64)
    value = 0.0
    for _ in range(iterations):
        v = product(v / torch.linalg.vector_norm(v))
        value = float(torch.linalg.vector_norm(v))
        if value == 0.0:
            break
    return value


class FlowPath:
    """Levels of a flow, equally spaced in a = log(sigma / (sigma + c)).

    Args:
        sigma: last level.
        sigma_from: first level, ``None`` for infinite noise.
        c: largest standard deviation of the law. One without spread moves on straight lines whatever c is.
        steps: Runge-Kutta steps.

    Attributes:
        sigmas: 2 steps + 1 levels, middles of the steps included, the ends exactly as they came.

    Raises:
        InputError: for levels or step counts that are not positive.
    """

    def __init__(self, sigma: float, sigma_from: float | None, c: float, steps: int) -> None:
        self.start, self.end = math.inf if sigma_from is None else float(sigma_from), float(sigma)
        if not (self.end > 0 and self.start > 0):
            raise InputError(f"the flow goes from sigma {self.start:g} to {self.end:g}; expected levels > 0.")
        if steps < 1:
            raise InputError(f"{steps} steps; expected at least 1.")
        self.c, self.steps = c if c > 0 else self.end, steps
        ends = [0.0 if math.isinf(s) else -math.log1p(self.c / s) for s in (self.start, self.end)]
        self.h = (ends[1] - ends[0]) / steps
        grid = [ends[0] + (ends[1] - ends[0]) * i / (2 * steps) for i in range(1, 2 * steps)]
        # sigma = c e^a / (1 - e^a)
        self.sigmas = [self.start, *(-self.c * math.exp(a) / math.expm1(a) for a in grid), self.end]

    def carry(self, slope: Callable[[torch.Tensor, int], torch.Tensor], g: torch.Tensor) -> torch.Tensor:
        """g along dg/da = slope(g, i), i the index in ``sigmas``, by the classical Runge-Kutta rule."""
        h = self.h
        for i in range(0, 2 * self.steps, 2):
            k1 = slope(g, i)
            k2 = slope(g + (0.5 * h) * k1, i + 1)
            k3 = slope(g + (0.5 * h) * k2, i + 1)
            k4 = slope(g + h * k3, i + 2)
            g = g + (h / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        return g
