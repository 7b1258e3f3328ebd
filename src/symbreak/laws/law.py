"""What the laws share: noise levels, parameters in the dtype of x, and the probability flow.

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

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from symbreak.noise import generator
from symbreak.runtime.files import InputError

__all__ = [
    "Law",
    "Parameters",
    "column",
    "first_level",
    "flatten",
    "fresh",
    "level",
    "path",
    "plain",
    "probability_flow",
    "runge_kutta",
    "top_eigenvalue",
]

Product = Callable[[torch.Tensor], torch.Tensor]


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


class Parameters:
    """Float64 parameters of a law, converted once for every dtype and device that asks."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.whole = tensors
        self._cache: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, ...]] = {}

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """The parameters on the device of x, in its dtype or in ``dtype``."""
        dtype = x.dtype if dtype is None else dtype
        key = (dtype, x.device)
        found = self._cache.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = tuple(p.to(x.device, dtype) for p in self.whole)
            # Inside torch.func transforms a conversion is wrapped for that transform; such a tensor
            # must not outlive it.
            if not any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in found):
                self._cache[key] = found
        return found


def level(sigma: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sigma as float64 on the device of x: [] for a number, [B] for a batch.

    Raises:
        InputError: where sigma is not positive, or neither one number nor one a sample.
    """
    s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
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


def plain(*values: torch.Tensor | float) -> bool:
    """Whether nothing is being differentiated: not by autograd, forward mode or torch.func."""
    for v in values:
        if not isinstance(v, torch.Tensor):
            continue
        if v.requires_grad and torch.is_grad_enabled():
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(v):
            return False
        if torch.autograd.forward_ad.unpack_dual(v).tangent is not None:
            return False
    return True


def fresh(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one with a new random seed: the global one is never touched."""
    if generator is not None:
        return generator
    own = torch.Generator()
    own.seed()
    return own


def top_eigenvalue(product: Product, dim: int, iterations: int = 12) -> float:
    """The top eigenvalue of a covariance from below, by power iteration on v -> C v (v [1, d] float64).

    Good to a few per cent: it sets a scale, it is no result. Start and iterations are fixed.
    """
    v = torch.randn(1, dim, generator=generator(dim), dtype=torch.float64)
    value = 0.0
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v)
        v = product(v)
        value = float(torch.linalg.vector_norm(v))
        if value == 0.0:
            break
    return value


def first_level(sigma: float, sigma_from: float | None, steps: int) -> float:
    """The level a flow starts from, infinite for white noise.

    Raises:
        InputError: for levels or step counts that are not positive.
    """
    start = math.inf if sigma_from is None else float(sigma_from)
    if not (sigma > 0 and start > 0):
        raise InputError(f"the flow was asked for from sigma {start:g} to {sigma:g}; expected levels > 0.")
    if steps < 1:
        raise InputError(f"{steps} steps; expected at least 1.")
    return start


def _coordinate(sigma: float, c: float) -> float:
    """a = log(sigma / (sigma + c))."""
    return 0.0 if math.isinf(sigma) else -math.log1p(c / sigma)


def path(sigma_from: float, sigma: float, c: float, steps: int) -> list[float]:
    """2 steps + 1 levels, middles of the steps included, equally spaced in a = log(sigma / (sigma + c))."""
    ends = [_coordinate(s, c) for s in (sigma_from, sigma)]
    grid = [ends[0] + (ends[1] - ends[0]) * i / (2 * steps) for i in range(2 * steps + 1)]
    # sigma = c e^a / (1 - e^a); the ends exactly as given.
    inner = [math.inf if a == 0 else -c * math.exp(a) / math.expm1(a) for a in grid]
    return [sigma_from, *inner[1:-1], sigma]


def runge_kutta(
    slope: Callable[[torch.Tensor, int], torch.Tensor], g: torch.Tensor, sigmas: Sequence[float], c: float
) -> torch.Tensor:
    """Carry g along dg/da = slope(g, i), i the index in ``sigmas`` (a `path`), by the classical rule."""
    steps = (len(sigmas) - 1) // 2
    h = (_coordinate(sigmas[-1], c) - _coordinate(sigmas[0], c)) / steps
    for i in range(0, 2 * steps, 2):
        k1 = slope(g, i)
        k2 = slope(g + (0.5 * h) * k1, i + 1)
        k3 = slope(g + (0.5 * h) * k2, i + 1)
        k4 = slope(g + h * k3, i + 2)
        g = g + (h / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return g


def probability_flow(
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    sigma: float,
    sigma_from: float | None,
    mean: torch.Tensor,
    variance: float,
    spread: float,
    steps: int,
) -> torch.Tensor:
    """Carry pure noise, or VE states at ``sigma_from``, along a law's probability flow to ``sigma``.

    Args:
        denoise: the law's posterior mean.
        x: [B, *S]; white noise, or states at ``sigma_from``.
        sigma: target level > 0.
        sigma_from: level of x, ``None`` for white noise (infinite sigma).
        mean: mean of the law [*S].
        variance: its mean variance (trace / d).
        spread: its largest standard deviation (a scale; 10 % do not matter).
        steps: Runge-Kutta steps, 4 denoiser calls each.

    Returns:
        VE states [B, *S] at sigma.

    Raises:
        InputError: for levels or step counts that are not positive.
    """
    start = first_level(sigma, sigma_from, steps)
    mu = mean.to(x.device, x.dtype)
    # A law without spread (one point) moves on straight lines whatever c is.
    c = spread if spread > 0 else float(sigma)

    def radius(s: float) -> float:
        return math.hypot(s, math.sqrt(variance))

    sigmas = path(start, float(sigma), c, steps)

    def slope(g: torch.Tensor, i: int) -> torch.Tensor:
        """dg/da = (s + c) / c (g v / r^2 - (D - mu) / r), 0 at infinite sigma."""
        s = sigmas[i]
        if math.isinf(s):
            return torch.zeros_like(g)
        r = radius(s)
        d = denoise(mu + r * g, s)
        return ((s + c) / c) * (g * (variance / r**2) - (d - mu) / r)

    g = x if math.isinf(start) else (x - mu) / radius(start)
    return mu + radius(float(sigma)) * runge_kutta(slope, g, sigmas, c)
