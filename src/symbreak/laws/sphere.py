"""The uniform law on a hypersphere under noise.

x_0 = r u with u uniform on the unit sphere of R^d. With nu = d/2 - 1, z = r |x| / sigma^2 and the Bessel
ratio A(z) = I_{nu+1}(z) / I_nu(z),

    D(x) = r A(z) x / |x|        Cov(x_0 | x) = r^2 (A'(z) along x, A(z) / z across).

The functions I themselves underflow in high dimension, so everything is built on h_nu = A / z, a smooth
function of z^2, through Gauss's continued fraction

    h_nu = 1 / (2 (nu + 1) + z^2 h_{nu+1}),

which is closed after a fixed number of terms by the uniform (Debye) asymptotics of h at an order >= 40,
good to rounding for every z >= 0 (DLMF 10.41). No term is singular at x = 0 and none depends on the data.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from symbreak.laws.law import ExactLaw, fresh
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError

__all__ = ["Sphere", "bessel_ratio"]

ORDER = 40  # from this order on the asymptotic series below is good to rounding
TERMS = 11


def _debye(terms: int) -> tuple[list[list[float]], list[list[float]]]:
    """Coefficients in p of the Debye polynomials u_j and of w_j = u_j / 2 + p u_j', j < terms.

    Source: DLMF 10.41.9: u_{j+1} = p^2 (1 - p^2) u_j' / 2 + 1/8 integral_0^p (1 - 5 t^2) u_j dt.
    """
    u = [[Fraction(1)]]
    for _ in range(terms - 1):
        last = u[-1]
        out = [Fraction(0)] * (len(last) + 3)
        for i, c in enumerate(last):
            out[i + 1] += c * Fraction(i, 2) + c / (8 * (i + 1))
            out[i + 3] -= c * Fraction(i, 2) + 5 * c / (8 * (i + 3))
        u.append(out)
    w = [[c * (Fraction(1, 2) + i) for i, c in enumerate(one)] for one in u]
    return [[float(c) for c in one] for one in u], [[float(c) for c in one] for one in w]


U, W = _debye(TERMS)


def _series(coefficients: list[list[float]], nu: float, p: torch.Tensor) -> torch.Tensor:
    """sum_j poly_j(p) / nu^j."""
    degree = len(coefficients[-1])
    flat = [sum(one[i] / nu**j for j, one in enumerate(coefficients) if i < len(one)) for i in range(degree)]
    out = torch.full_like(p, flat[-1])
    for c in reversed(flat[:-1]):
        out = out * p + c
    return out


def _tail(nu: float, z2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h_nu and F_nu = log(Gamma(nu + 1) (2 / z)^nu I_nu(z)) for nu >= ORDER, z2 = z^2, float64."""
    root = (nu * nu + z2).sqrt()
    p = nu / root
    u = _series(U, nu, p)
    h = 1.0 / (root + nu) - _series(W, nu, p) / u / (root * root)
    # F vanishes at z = 0; differences from there are taken term by term, so large nu cancels nothing.
    excess = z2 / (root + nu)  # root - nu
    at_zero = math.log(float(_series(U, nu, torch.ones((), dtype=torch.float64))))
    f = excess - nu * torch.log1p(excess / (2 * nu)) + 0.5 * p.log() + u.log() - at_zero
    return h, f


def _bessel(nu: float, z2: torch.Tensor, log: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h_nu, h_{nu+1} and, where ``log``, F_nu at z2 = z^2 >= 0, float64, for any nu >= -1/2."""
    shift = max(1, math.ceil(ORDER - nu))
    h, f = _tail(nu + shift, z2)
    above = h
    for j in range(shift - 1, -1, -1):
        order = nu + j
        above = h
        h = 1.0 / (2.0 * (order + 1.0) + z2 * h)
        # I_order = I_{order+1} / (z h_order)
        if log:
            f = f - torch.log(2.0 * (order + 1.0) * h)
    return h, above, f


def bessel_ratio(nu: float, z: torch.Tensor) -> torch.Tensor:
    """I_{nu+1}(z) / I_nu(z) for nu >= -1/2, z >= 0, without the functions themselves.

    >>> round(float(bessel_ratio(-0.5, torch.tensor(1.0, dtype=torch.float64))), 12)  # tanh
    0.761594155956
    """
    if nu < -0.5:
        raise InputError(f"order {nu}; expected nu >= -1/2.")
    wide = z.double()
    return (wide * _bessel(nu, wide * wide, log=False)[0]).to(z.dtype)


class Sphere(ExactLaw):
    """The uniform law on the sphere of a radius in R^dim, centred at 0.

    Args:
        dim: dimension d >= 1 of the space (d = 1: the two points +-radius).
        radius: radius > 0.

    Raises:
        InputError: for a dimension below 1 or a radius that is not positive.

    >>> law = Sphere(1, 1.0)
    >>> round(law.denoise(torch.tensor([[0.5]]), sigma=1.0).item(), 6)  # tanh(x / sigma^2)
    0.462117
    """

    def __init__(self, dim: int, radius: float = 1.0) -> None:
        if int(dim) != dim or dim < 1:
            raise InputError(f"dimension {dim}; expected an integer >= 1.")
        if not 0 < float(radius) < math.inf:
            raise InputError(f"radius {radius}; expected a number > 0.")
        self.radius = float(radius)
        self.shape: tuple[int, ...] = (int(dim),)
        self._centre = torch.zeros(int(dim), dtype=torch.float64)
        self._scales = (self.radius**2 / self.dim, math.sqrt(self.radius**2 / self.dim))

    @property
    def moments(self) -> Moments:
        """Exact mean 0 and covariance r^2 / d (d x d)."""
        return Moments(2, self._centre, self._scales[0] * torch.eye(self.dim, dtype=torch.float64))

    def _parts(self, flat: torch.Tensor, s2: torch.Tensor, log: bool = False) -> tuple[torch.Tensor, ...]:
        """x [B, d], |x|^2, r / sigma^2, h_nu, h_{nu+1}, F_nu, each [B, 1] or [], float64."""
        x = flat.double()
        norm2 = (x * x).sum(1, keepdim=True)
        rate = self.radius / s2
        return x, norm2, rate, *_bessel(0.5 * self.dim - 1.0, norm2 * rate**2, log)

    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        x, _, rate, h, _, _ = self._parts(flat, s2)
        return self.radius * rate * h * x

    def _score(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        x, _, rate, h, _, _ = self._parts(flat, s2)
        return (self.radius * rate * h - 1.0) * x / s2

    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        _, norm2, _, _, _, f = self._parts(flat, s2, log=True)
        gauss = -0.5 * (norm2 + self.radius**2) / s2 - self.dim * (s2.sqrt().log() + 0.5 * math.log(2 * math.pi))
        return (gauss + f)[:, 0]

    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        x, _, rate, h, above, _ = self._parts(flat, s2)
        u = v.double()
        # A' - A / z = z^2 h_nu (h_{nu+1} - h_nu), from the continued fraction.
        radial = rate**2 * (above - h) * (x * u).sum(1, keepdim=True)
        return self.radius**2 * h * (u + radial * x)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, d] float64."""
        g = fresh(generator)
        z, eps = torch.randn(2, n, self.dim, generator=g, dtype=torch.float64, device=g.device)
        return self.radius * z / torch.linalg.vector_norm(z, dim=1, keepdim=True) + float(sigma) * eps

    def __repr__(self) -> str:
        return f"Sphere(dim={self.dim}, radius={self.radius:g})"
