"""Stability of the generative flow: potentials, fixed points and bifurcations.

Every flow and frame has a drift proportional to D(x, sigma) - kappa x, with D the denoiser and x the
VE state (a state of the VP frame is alpha x), q = alpha-bar, per unit beta in VP:

    VP, reverse SDE        x/2 + score        kappa = (1 + q) / 2      gain = 1 / (1 - q)
    VP, probability flow   x/2 + score/2      kappa = q                gain = 1 / (2 (1 - q))
    VE, both flows         score              kappa = 1                gain = 1 / sigma^2

A fixed point solves D(x) = kappa x; the drift's Jacobian there is gain (J - kappa), J = Cov(x_0 | x) /
sigma^2, so it is unstable where the top eigenvalue of J exceeds kappa. The VP criteria depend on the
data's scale and can fire where nothing breaks; the VE one never fires for a log-concave law.
Branches are followed by pseudo-arclength continuation, which passes through folds.

Source: Raya & Ambrogioni 2023, arXiv:2305.19693; the general criterion is derived for this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.optimize import brentq
from scipy.sparse.linalg import LinearOperator, eigs, eigsh, gmres
from torch.nn.attention import SDPBackend, sdpa_kernel

from symbreak.critical import CriticalTime, levels
from symbreak.denoise import as_denoiser
from symbreak.files import InputError
from symbreak.noise import NoiseLevel, generator

__all__ = ["Branch", "FixedPoints", "Potential", "bifurcation", "drift", "fixed_points", "potential"]

DENSE = 1024  # up to this dimension Jacobians are matrices, above it products
CHUNK = 256  # Jacobian columns a call
SOURCE = "arXiv:2305.19693, stability of the drift's fixed points"


@dataclass(frozen=True)
class Potential:
    """The potential along a path.

    Attributes:
        path: states [P, *S] in the frame named.
        position: arc length along the path [P], zero at its first point.
        value: u [P], zero at the first point, per unit beta (VP) or per unit of sigma^2 (VE).
        error: estimated quadrature error of each value [P].
        sigma, flow, frame: where, and of which flow.
    """

    path: torch.Tensor
    position: np.ndarray
    value: np.ndarray
    error: np.ndarray
    sigma: float
    flow: str
    frame: str


@dataclass(frozen=True)
class Branch:
    """One branch of fixed points, single-valued in sigma.

    Attributes:
        sigma: levels [G].
        points: states [G, *S] in the frame named; NaN at levels where the branch does not exist.
        eigenvalue: top eigenvalue (real part) of the drift's Jacobian [G]; above zero is unstable.
        central: whether it is the branch that continues the single fixed point of high noise.
        fold: sigma at which the branch is born or ends in a fold (saddle-node or, under a symmetry,
            pitchfork), ``None`` where it has none in the range.
    """

    sigma: np.ndarray
    points: torch.Tensor
    eigenvalue: np.ndarray
    central: bool
    fold: float | None

    @property
    def exists(self) -> np.ndarray:
        """Whether there is a point at each level [G]."""
        return np.isfinite(self.eigenvalue)

    @property
    def stable(self) -> np.ndarray:
        """Whether the point at each level exists and is stable [G]; neutral ones (on a ring) count."""
        return self.exists & (np.nan_to_num(self.eigenvalue, nan=1.0) <= 1e-9)


@dataclass(frozen=True)
class FixedPoints:
    """All branches of fixed points that were found on a grid of levels; the central one comes first."""

    sigma: np.ndarray
    branches: tuple[Branch, ...]
    flow: str
    frame: str

    def at(self, i: int) -> tuple[torch.Tensor, np.ndarray]:
        """Points [K, *S] and top eigenvalues [K] at the i-th level."""
        here = [b for b in self.branches if b.exists[i]]
        shape = self.branches[0].points.shape[1:]
        points = torch.stack([b.points[i] for b in here]) if here else torch.zeros(0, *shape, dtype=torch.float64)
        return points, np.array([b.eigenvalue[i] for b in here])


def _checked(flow: str, frame: str) -> None:
    if flow not in ("sde", "ode"):
        raise InputError(f"unknown flow {flow!r}. Pass flow='sde' or flow='ode' (probability flow).")
    if frame not in ("vp", "ve"):
        raise InputError(f"unknown frame {frame!r}. Pass frame='vp' or frame='ve'.")


def _rates(flow: str, frame: str, sigma: float) -> tuple[float, float]:
    """kappa and gain of the module docstring."""
    s2 = sigma * sigma
    if frame == "ve":
        return 1.0, 1.0 / s2
    if flow == "sde":
        return 0.5 * (1.0 + 1.0 / (1.0 + s2)), (1.0 + s2) / s2
    return 1.0 / (1.0 + s2), 0.5 * (1.0 + s2) / s2


def drift(law_or_denoiser: Any, x: torch.Tensor, sigma: float, flow: str = "sde", frame: str = "vp") -> torch.Tensor:
    """The generative drift at states x of the frame named, [B, *S].

        VP: x/2 + score (sde), x/2 + score/2 (ode), per unit beta        VE: score, per unit of sigma^2 (sde)
                                                                         or of sigma^2 / 2 (ode)

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        x: states [B, *S].
        sigma: noise level, noise over signal.
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.

    Raises:
        InputError: for states of another shape, sigma <= 0, or an unknown flow or frame.

    Source: arXiv:2305.19693 (VP, reverse SDE).
    """
    _checked(flow, frame)
    s = float(levels(sigma)[0][0])
    d = as_denoiser(law_or_denoiser)
    if tuple(x.shape[1:]) != tuple(d.shape):
        raise InputError(f"states of shape {tuple(x.shape)}; expected [B, {', '.join(map(str, d.shape))}].")
    kappa, gain = _rates(flow, frame, s)
    alpha = NoiseLevel(s).alpha if frame == "vp" else 1.0
    ve = x / alpha
    return alpha * gain * (d(ve, s) - kappa * ve)


def potential(
    law_or_denoiser: Any,
    path: torch.Tensor,
    sigma: float,
    flow: str = "sde",
    frame: str = "vp",
    tolerance: float | None = None,
) -> Potential:
    """The potential along a path: minus the line integral of the drift.

        u(path_k) = - integral of drift . dx from path_0 to path_k, along straight segments

    For a law it is the reverse SDE's u(x) = -|x|^2 / 4 - log p(x) up to a constant (VP, per unit
    beta), whatever the path. A network's drift need not be a gradient: its u belongs to the path.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        path: states [P, *S] in the frame named, P >= 1.
        sigma: noise level.
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        tolerance: segments are halved until their error is below this share of the largest |u|; by
            default 1e-10 for a law and 1e-5 for a denoiser (networks compute in float32).

    Returns:
        A `Potential`, zero at the first point.

    Raises:
        InputError: for an empty path, a path of another shape, or sigma <= 0.

    Source: arXiv:2305.19693.

    >>> from symbreak.laws.gaussian import Gaussian
    >>> from symbreak.moments import Moments
    >>> u = potential(Gaussian(Moments(2, [0.0], [[1.0]])), torch.tensor([[0.0], [2.0]]), 1.0)
    >>> [round(float(v), 9) for v in u.value]                  # unit variance: x^2 / 4
    [0.0, 1.0]
    """
    _checked(flow, frame)
    s = float(levels(sigma)[0][0])
    shape = tuple(as_denoiser(law_or_denoiser).shape)
    states = torch.as_tensor(path)
    states = states if states.is_floating_point() else states.double()
    if states.ndim == 0 or len(states) == 0:
        raise InputError("the path is empty; expected states [P, *S] with at least one point.")
    if tuple(states.shape[1:]) != shape:
        raise InputError(f"a path of shape {tuple(states.shape)}; expected [P, {', '.join(map(str, shape))}].")
    if not bool(torch.isfinite(states).all()):
        raise InputError("the path holds NaN or infinity; expected finite states.")
    states = states.double()
    if tolerance is None:
        tolerance = 1e-10 if hasattr(law_or_denoiser, "denoise") else 1e-5
    nodes, weights = np.polynomial.legendre.leggauss(4)
    t = torch.as_tensor(0.5 * (nodes + 1.0), device=states.device)
    w = torch.as_tensor(0.5 * weights, device=states.device)

    def rule(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """-integral of drift . dx over segments a -> b, [M]."""
        out = []
        block = max(1, 4096 // len(t))
        for i in range(0, len(a), block):
            x, dx = a[i : i + block], (b - a)[i : i + block]
            column = [1, -1] + [1] * len(shape)
            at = x[:, None] + t.reshape(column) * dx[:, None]
            force = drift(law_or_denoiser, at.reshape(-1, *shape), s, flow, frame).double().reshape(at.shape)
            power = (force * dx[:, None]).reshape(*at.shape[:2], -1).sum(-1)
            out.append(-(power * w).sum(-1))
        return torch.cat(out)

    a, b = states[:-1], states[1:]
    owner = torch.arange(len(a), device=states.device)
    value = torch.zeros(len(a), dtype=torch.float64, device=states.device)
    error = torch.zeros_like(value)
    whole = rule(a, b) if len(a) else value
    largest = 0.0
    for depth in range(16):
        if not len(a):
            break
        middle = 0.5 * (a + b)
        left, right = rule(a, middle), rule(middle, b)
        gap = (left + right - whole).abs()
        if depth == 0:
            largest = max(float((left + right).abs().sum()), 1e-300)
        # Each original segment may spend an equal share of the tolerance.
        fine = (gap <= tolerance * largest / len(value)) | (depth == 15)
        value.index_add_(0, owner[fine], (left + right)[fine])
        error.index_add_(0, owner[fine], gap[fine])
        a, b = torch.cat([a[~fine], middle[~fine]]), torch.cat([middle[~fine], b[~fine]])
        whole, owner = torch.cat([left[~fine], right[~fine]]), torch.cat([owner[~fine], owner[~fine]])
    length = (states[1:] - states[:-1]).flatten(1).norm(dim=1)
    along, u, doubt = (np.concatenate([[0.0], v.cumsum(0).cpu().numpy()]) for v in (length, value, error))
    return Potential(states, along, u, doubt, s, flow, frame)


class _System:
    """F(w, lam) = D(w / kappa, e^lam) - w as numpy vectors [d], with its Jacobian J / kappa - 1.

    At a fixed point w = D, the clean state it belongs to: it stays on the data's scale at every level, where
    the state itself grows like sigma^2 for the probability flow of data that are not centred.
    """

    def __init__(self, law_or_denoiser: Any, flow: str, frame: str, guess: torch.Tensor | None = None) -> None:
        _checked(flow, frame)
        self.source, self.flow, self.frame = law_or_denoiser, flow, frame
        self.denoiser = as_denoiser(law_or_denoiser)
        self.shape = tuple(self.denoiser.shape)
        self.dim = math.prod(self.shape)
        self.is_law = hasattr(law_or_denoiser, "denoise")
        weights = getattr(getattr(law_or_denoiser, "unet", None), "parameters", None)
        self.device = next((p.device for p in weights()), torch.device("cpu")) if weights else torch.device("cpu")
        if self.is_law:
            draws = law_or_denoiser.sample(256, 0.0, generator(0, 256)).double().reshape(256, -1)
            # The exact mean where it is cheap: a law's moments hold a matrix [d, d].
            exact = self.dim <= DENSE and hasattr(law_or_denoiser, "moments")
            mean = law_or_denoiser.moments.mean.reshape(-1) if exact else draws.mean(0)
            self.centre = mean.double().cpu().numpy()
            spread = (draws - draws.mean(0)).cpu().numpy()
            # Top eigenvalue of the draws' covariance: sets ranges and tolerances only.
            self.scale = math.sqrt(max(float(np.linalg.eigvalsh(spread @ spread.T)[-1]) / 256, 1e-300))
            self.low, self.high = min(1e-3, 1e-3 * self.scale), 100.0 * max(self.scale, 0.1)
            self.low = max(self.low, 1e-5 * self.scale)
        else:
            self.low, self.high = self.denoiser.sigma_range
            if not (0 < self.low < self.high < math.inf):
                self.low, self.high = max(self.low, 1e-3), min(self.high, 1e3)
            self.centre = np.zeros(self.dim)
            # How far apart it sends noise of low and middle levels: sets ranges and tolerances only.
            z = np.random.default_rng(1).standard_normal((4, self.dim))
            z = np.concatenate([z, -z])
            reach = [self._denoised(v * z, v) for v in np.geomspace(self.low, self.high, 5)[1:4]]
            self.scale = max(0.5 * max(float(np.linalg.norm(r - r.mean(0), axis=1).max()) for r in reach), 1e-6)
        if guess is not None:
            g = torch.as_tensor(guess).detach().cpu().double()
            if tuple(g.shape) != self.shape:
                raise InputError(f"x0 has the shape {tuple(g.shape)}; expected one state of shape {self.shape}.")
            self.centre = g.reshape(-1).numpy()
        self.noise = self._rounding()
        self.exact = self.noise < 1e-11
        self._cached: tuple[bytes, float, np.ndarray] | None = None

    def _rounding(self) -> float:
        """Size of D's rounding, relative to the scale: second differences over a tiny step."""
        a, v = np.random.default_rng(1).standard_normal((2, self.dim))
        v *= 1e-7 * self.scale / np.linalg.norm(v)
        # Away from the centre, where numbers are small and floats exact.
        base = self.centre + 0.3 * self.scale * a / np.linalg.norm(a)
        sigma = math.sqrt(self.low * self.high)
        at = [self._denoised(base + k * v, sigma) for k in (-1, 0, 1)]
        return float(np.linalg.norm(at[0] - 2 * at[1] + at[2])) / self.scale

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=self.device).reshape(-1, *self.shape)

    @torch.no_grad()
    def _denoised(self, x: np.ndarray, sigma: float) -> np.ndarray:
        out = self.denoiser(self.tensor(x), sigma).detach().double().cpu().numpy().reshape(-1, self.dim)
        return out if x.ndim == 2 else out[0]

    def kappa(self, lam: float) -> float:
        return _rates(self.flow, self.frame, math.exp(lam))[0]

    def residual(self, w: np.ndarray, lam: float) -> np.ndarray:
        return self._denoised(w / self.kappa(lam), math.exp(lam)) - w

    def slope(self, x: np.ndarray, lam: float) -> np.ndarray:
        """dF / dlam by central differences: it steers predictors and correctors, not the answer."""
        h = 1e-5 if self.exact else 1e-2
        low, high = math.log(self.low), math.log(self.high)
        a, b = (lam - h, lam + h) if self.is_law else (max(lam - h, low), min(lam + h, high))
        return (self.residual(x, b) - self.residual(x, a)) / (b - a)

    def products(self, w: np.ndarray, v: np.ndarray, lam: float) -> np.ndarray:
        """J v / kappa for rows v [K, d], J = dD/dx at x = w / kappa."""
        sigma, kappa, out = math.exp(lam), self.kappa(lam), []
        x = w / kappa
        for i in range(0, len(v), CHUNK):
            rows = self.tensor(v[i : i + CHUNK])
            at = self.tensor(x).expand(rows.shape).contiguous()
            if hasattr(self.source, "posterior_covariance"):
                jv = self.source.posterior_covariance(at, rows, sigma) / sigma**2
            else:
                # Flash attention has no forward-mode derivative.
                with sdpa_kernel(SDPBackend.MATH):
                    jv = torch.func.jvp(lambda z: self.denoiser(z, sigma), (at,), (rows,))[1]
            out.append(jv.detach().double().cpu().numpy().reshape(len(rows), self.dim))
        return np.concatenate(out) / kappa

    def jacobian(self, x: np.ndarray, lam: float) -> np.ndarray:
        key = x.tobytes()
        if self._cached is None or self._cached[0] != key or self._cached[1] != lam:
            j = self.products(x, np.eye(self.dim), lam).T
            self._cached = (key, lam, 0.5 * (j + j.T) if self.is_law else j)
        return self._cached[2]

    def _operator(self, x: np.ndarray, lam: float) -> LinearOperator:
        return LinearOperator(
            (self.dim, self.dim),
            matvec=lambda v: self.products(x, v.reshape(1, -1), lam)[0],
            dtype=np.float64,
        )

    def top(self, x: np.ndarray, lam: float) -> float:
        """Top eigenvalue (real part) of J / kappa; above `DENSE` by Lanczos (laws) or Arnoldi."""
        if self.dim <= DENSE:
            j = self.jacobian(x, lam)
            if not self.is_law:
                return float(scipy.linalg.eigvals(j).real.max())
            return float(scipy.linalg.eigvalsh(j, driver="evd")[-1])
        start = np.random.default_rng(0).standard_normal(self.dim)
        a = self._operator(x, lam)
        if self.is_law:
            return float(eigsh(a, k=1, which="LA", v0=start, tol=1e-13, return_eigenvectors=False)[0])
        return float(eigs(a, k=1, which="LR", v0=start, tol=1e-5, return_eigenvectors=False)[0].real)

    def excess(self, x: np.ndarray, lam: float) -> float:
        """Top eigenvalue of J over kappa, minus one: above zero is unstable."""
        return self.top(x, lam) - 1.0

    def asymmetry(self, x: np.ndarray, lam: float) -> float:
        """|J - J^T| / |J + J^T| (Frobenius), from the matrix or from random bilinear forms."""
        if self.dim <= DENSE:
            j = self.jacobian(x, lam)
            return float(np.linalg.norm(j - j.T) / max(float(np.linalg.norm(j + j.T)), 1e-300))
        v = np.random.default_rng(2).standard_normal((32, self.dim))
        g = v @ self.products(x, v, lam).T
        pairs = np.triu_indices(32, 1)
        return float(np.linalg.norm((g - g.T)[pairs]) / max(float(np.linalg.norm((g + g.T)[pairs])), 1e-300))

    def solve(
        self,
        x: np.ndarray,
        lam: float,
        rhs: np.ndarray,
        border: tuple[np.ndarray, np.ndarray, float] | None = None,
    ) -> np.ndarray:
        """Least-squares solution of (J / kappa - 1) u = rhs, or of that bordered by (column, row, corner).

        Directions along which the matrix vanishes (a ring of fixed points, a pitchfork) are left alone.
        """
        if self.dim <= DENSE:
            a = self.jacobian(x, lam) - np.eye(self.dim)
            if border is not None:
                a = np.block([[a, border[0][:, None]], [border[1][None, :], np.array([[border[2]]])]])
            if self.dim <= 64:
                return np.asarray(scipy.linalg.lstsq(a, rhs, cond=1e-11, lapack_driver="gelsd")[0])
            return np.asarray(scipy.linalg.lstsq(a, rhs, cond=1e-11, lapack_driver="gelsy")[0])
        n = self.dim + (border is not None)

        def apply(u: np.ndarray) -> np.ndarray:
            u = u.reshape(-1)
            out = self.products(x, u[None, : self.dim], lam)[0] - u[: self.dim]
            if border is None:
                return out
            return np.append(out + border[0] * u[-1], border[1] @ u[:-1] + border[2] * u[-1])

        rtol = 1e-12 if self.exact else 1e-4
        found, _ = gmres(LinearOperator((n, n), matvec=apply, dtype=np.float64), rhs, rtol=rtol, restart=60, maxiter=4)
        return np.asarray(found)

    def tolerance(self, x: np.ndarray) -> float:
        """|F| below which a point counts as fixed."""
        rounding = 4e-16 * (float(np.linalg.norm(x)) + math.sqrt(self.dim) * self.scale)
        return max(4 * rounding, 1e-14 * self.scale, 30 * self.noise * self.scale)

    def newton(self, x: np.ndarray, lam: float) -> np.ndarray | None:
        """The fixed point near x at a fixed level, or ``None``."""
        size = math.inf
        for _ in range(20):
            f = self.residual(x, lam)
            now = float(np.linalg.norm(f))
            if not math.isfinite(now):
                return None
            if now <= self.tolerance(x):
                return x
            if now >= 0.5 * size and now <= 1e3 * self.tolerance(x):
                return x  # rounding stops the descent
            size = now
            step = self.solve(x, lam, -f)
            reach = float(np.linalg.norm(step))
            x = x + step * min(1.0, 2.0 * self.scale * math.sqrt(self.dim) / max(reach, 1e-300))
        return x if float(np.linalg.norm(self.residual(x, lam))) <= 1e3 * self.tolerance(x) else None

    def settle(self, x: np.ndarray, lam: float, iterations: int = 200) -> np.ndarray:
        """Iterate w <- D(w / kappa) on rows [n, d], towards stable points; diverging rows are dropped."""
        kappa, sigma = self.kappa(lam), math.exp(lam)
        for _ in range(iterations):
            new = self._denoised(x / kappa, sigma)
            moved = np.abs(new - x).max(initial=0.0)
            size = np.linalg.norm(new - self.centre, axis=1)
            limit = 1e3 * (self.scale * math.sqrt(self.dim) + np.linalg.norm(self.centre))
            x = new[np.isfinite(size) & (size < limit)]
            if moved < max(1e-9, 10 * self.noise) * self.scale:
                break
        return x


@dataclass(frozen=True)
class _Point:
    """A point of a branch with its unit tangent in (x / scale, lam)."""

    x: np.ndarray
    lam: float
    tx: np.ndarray
    tl: float


def _tangent(system: _System, x: np.ndarray, lam: float, tx: np.ndarray, tl: float) -> tuple[np.ndarray, float]:
    """The unit tangent that points along (tx, tl)."""
    rhs = np.zeros(system.dim + 1)
    rhs[-1] = 1.0
    t = system.solve(x, lam, rhs, (system.slope(x, lam) / system.scale, tx, tl))
    t = t / max(float(np.linalg.norm(t)), 1e-300)
    return t[:-1], float(t[-1])


def _corrected(system: _System, p: _Point, ds: float) -> tuple[_Point, int] | None:
    """The point of the branch on the plane at arclength ds beyond p, and the Newton steps it took."""
    s = system.scale
    x0, lam0 = p.x + ds * s * p.tx, p.lam + ds * p.tl
    x, lam, size = x0, lam0, math.inf
    for step in range(10):
        f = system.residual(x, lam)
        plane = float(p.tx @ (x - x0)) / s + p.tl * (lam - lam0)
        now = float(np.linalg.norm(f))
        if not math.isfinite(now):
            return None
        done = now <= system.tolerance(x) or (now >= 0.5 * size and now <= 1e3 * system.tolerance(x))
        if done and abs(plane) < 1e-10:
            tx, tl = _tangent(system, x, lam, p.tx, p.tl)
            return _Point(x, lam, tx, tl), step
        size = now
        u = system.solve(x, lam, -np.append(f / s, plane), (system.slope(x, lam) / s, p.tx, p.tl))
        x, lam = x + s * u[:-1], lam + float(u[-1])
        if np.linalg.norm(x - x0) / s + abs(lam - lam0) > 2 * abs(ds) + 1e-6:
            return None
    return None


def _march(
    system: _System, x: np.ndarray, lam: float, sign: int, low: float, high: float, largest: float = 0.25
) -> Iterator[_Point]:
    """Points along a branch from (x, lam) until lam leaves [low, high]; sign 1 sets out upwards in lam."""
    slope = system.solve(x, lam, -system.slope(x, lam) / system.scale)
    norm = math.sqrt(1.0 + float(slope @ slope))
    p = _Point(x, lam, sign * slope / norm, sign / norm)
    yield p
    ds = 0.2 * largest
    for _ in range(4000):
        beyond = (high - p.lam if p.tl > 0 else p.lam - low) / max(abs(p.tl), 1e-12)
        if beyond <= 1e-9:
            return
        length = min(ds, beyond)
        found = _corrected(system, p, length)
        turned = found is not None and float(found[0].tx @ p.tx) + found[0].tl * p.tl < 0.9
        if found is None or (turned and length > 1e-4):
            ds = 0.5 * length
            if ds < 1e-6:
                return
            continue
        q, steps = found
        if q.lam > high + 1e-6 or q.lam < low - 1e-6:
            end = high if q.lam > high else low
            share = (end - p.lam) / (q.lam - p.lam)
            last = system.newton(p.x + share * (q.x - p.x), end)
            if last is not None:
                yield _Point(last, end, q.tx, q.tl)
            return
        p = q
        yield p
        ds = min(largest, length * (1.6 if steps <= 3 else 0.9))


def _fold(system: _System, p: _Point, q: _Point) -> _Point:
    """The point between p and q where the branch turns back in lam (its tangent has no lam component).

    At a pitchfork the equations are singular right at the turn, so lam is interpolated there from points
    around it, along whose arclength it is smooth.
    """
    s = system.scale
    ds = float(p.tx @ (q.x - p.x)) / s + p.tl * (q.lam - p.lam)
    best = p if abs(p.tl) < abs(q.tl) else q

    def turn(length: float) -> float:
        found = _corrected(system, p, length) if length > 0 else (p, 0)
        return p.tl if found is None else found[0].tl

    try:
        middle = float(brentq(turn, 0.0, ds, xtol=1e-4, rtol=1e-3))
    except ValueError:
        return best  # the ends do not bracket: the turn lies at one of them
    angles = np.cos(np.pi * (np.arange(10) + 0.5) / 10)  # an even number: none of them at the turn
    half, degree = (min(0.08, ds), 9) if system.exact else (0.5 * ds, 2)
    cheb, misfit = np.polynomial.chebyshev, math.inf
    for _ in range(5):
        found = [_corrected(system, p, middle + half * float(u)) for u in angles]
        points = [f[0] for f in found if f is not None]
        if len(points) == len(angles):
            series = cheb.chebfit(angles, [r.lam for r in points], degree)
            roots = cheb.chebroots(cheb.chebder(series))
            inside = roots[(np.abs(roots.imag) < 1e-9) & (np.abs(roots.real) < 1)].real
            # The last terms hold what the series leaves out (half too large) or rounding (too small).
            left = float(np.abs(series[-2:]).max()) if system.exact else 0.0
            if len(inside) and left < misfit:
                u = float(inside[np.argmin(np.abs(inside))])
                shape = cheb.chebfit(angles, np.stack([r.x for r in points]), degree)
                x, misfit = np.asarray(cheb.chebval(u, shape)), left
                best = _Point(x, float(cheb.chebval(u, series)), p.tx, 0.0)
        if misfit < 1e-11:
            break
        half *= 0.5
    return best


def _centre(system: _System, high: float) -> np.ndarray | None:
    """The single fixed point at high noise."""
    lam = math.log(high)
    first = system.newton(system.centre, lam)
    if first is None and len(x := system.settle(system.centre[None], lam, 50)):
        first = system.newton(x[0], lam)
    return first


def _crossing(system: _System, p: _Point, q: _Point) -> tuple[float, np.ndarray]:
    """log sigma at which the top eigenvalue crosses between two points of a branch, and the point."""
    held: dict[float, np.ndarray] = {}

    def excess(lam: float) -> float:
        share = (lam - p.lam) / (q.lam - p.lam)
        x = p.x + share * (q.x - p.x)
        held[lam] = x if (found := system.newton(x, lam)) is None else found
        return system.excess(held[lam], lam)

    xtol = 1e-13 if system.exact else 1e-5
    root = float(brentq(excess, q.lam, p.lam, xtol=xtol, rtol=1e-14))
    return root, held.get(root, p.x)


def _starts(system: _System, starts: torch.Tensor | None, n: int = 64) -> np.ndarray:
    """Clean samples [n, d] from which to look for wells."""
    if starts is None:
        if not system.is_law:
            raise InputError("a denoiser has no samples to look for wells from. Pass starts=, e.g. 64 clean samples.")
        draws = system.source.sample(n, 0.0, generator(0, n))
    else:
        draws = torch.as_tensor(starts)
        if draws.ndim == 0 or len(draws) == 0 or tuple(draws.shape[1:]) != system.shape:
            raise InputError(
                f"starts of shape {tuple(draws.shape)}; expected clean samples [n, *S], S = {system.shape}."
            )
    return draws.detach().double().cpu().numpy().reshape(len(draws), -1)


def _distinct(rows: np.ndarray, apart: float, known: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """The rows that lie further than ``apart`` from each other and from those known."""
    kept: list[np.ndarray] = []
    for row in rows:
        if all(np.linalg.norm(row - other) > apart for other in kept + (known or [])):
            kept.append(row)
    return kept


def _wells_at(
    system: _System, starts: np.ndarray, lam: float, known: list[np.ndarray], most: int = 24
) -> list[np.ndarray]:
    """Stable fixed points at a level, reached from the starts and not among those known."""
    found: list[np.ndarray] = []
    rings = 0
    ends = system.settle(starts, lam)
    for x in _distinct(ends, 1e-2 * system.scale, known)[:most]:
        y = system.newton(x, lam)
        if y is not None and _distinct(y[None], 1e-4 * system.scale, known + found):
            excess = system.excess(y, lam)
            ring = abs(excess) < max(1e-9, 100 * system.noise)
            # A ring of fixed points, neutral along itself: one of its points is enough.
            if (not ring and excess < 0) or (ring and not rings):
                found.append(y)
            rings += ring
            if rings > 2:
                break
    return found


def bifurcation(
    law_or_denoiser: Any,
    flow: str = "sde",
    frame: str = "vp",
    x0: torch.Tensor | None = None,
    criterion: str = "centre",
    starts: torch.Tensor | None = None,
) -> CriticalTime:
    """The noise level at which the flow's symmetry breaks.

        centre:  top eigenvalue of Cov(x_0 | x*) / sigma^2 = kappa   (module docstring), at the central
                 fixed point x*, continued from high noise down
        wells:   the highest level at which another stable fixed point exists

    With two symmetric classes both agree (a pitchfork). With three or more the transition is of first
    order: the new wells appear at more noise than the centre destabilises at. Data without a symmetry
    have no crossing at the centre, which then simply becomes one of the wells: ask for the wells.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        flow: ``"sde"`` (reverse SDE) or ``"ode"`` (probability flow).
        frame: ``"vp"`` or ``"ve"``. Quote sde/vp to compare with the paper; use VE to claim that
            something breaks, since VP fires for a single Gaussian of variance above 2 too.
        x0: a guess of the clean state E[x_0 | x*] [*S] of the central fixed point; by default the mean.
        criterion: ``"centre"`` or ``"wells"``.
        starts: clean samples [n, *S] to look for wells from; by default draws of the law.

    Returns:
        A `CriticalTime` with flow and frame; without a level, and with a reason, where nothing crosses.
        For a denoiser the reason states its Jacobian's asymmetry.

    Raises:
        InputError: for an unknown flow, frame or criterion, or an ``x0`` or ``starts`` of another shape.

    Source: arXiv:2305.19693; general criterion and wells derived for this package.

    >>> from symbreak.laws.gaussian import Gaussian
    >>> from symbreak.moments import Moments
    >>> wide = Gaussian(Moments(2, [0.0], [[9.0]]))
    >>> bifurcation(wide, flow="sde", frame="ve").level is None
    True
    >>> round(bifurcation(wide, flow="sde", frame="vp").level.alpha_bar, 9)      # the trap: 1 / (v - 1)
    0.125
    """
    if criterion not in ("centre", "wells"):
        raise InputError(f"unknown criterion {criterion!r}. Pass criterion='centre' or 'wells'.")
    system = _System(law_or_denoiser, flow, frame, x0)
    about: dict[str, Any] = {
        "criterion": "bifurcation" if criterion == "centre" else "wells",
        "flow": flow,
        "frame": frame,
        "source": SOURCE,
    }
    first = _centre(system, system.high)
    if first is None:
        reason = f"no fixed point was found at sigma = {system.high:.4g}, where the search starts. Pass x0="
        return CriticalTime(None, reason=reason, **about)
    if criterion == "wells":
        return _wells(system, first, _starts(system, starts), about)
    return _centre_crossing(system, first, about)


def _level(lam: float, frame: str) -> NoiseLevel:
    return NoiseLevel(math.exp(lam), None if frame == "vp" else 1.0)  # type: ignore[arg-type]


def _centre_crossing(system: _System, first: np.ndarray, about: dict[str, Any]) -> CriticalTime:
    """The first level, from high noise down, at which the central fixed point loses its stability."""
    threshold = max(1e-11, 3 * system.noise)
    low, high = math.log(system.low), math.log(system.high)
    before: _Point | None = None
    value, highest = math.nan, -math.inf

    def limits(x: np.ndarray, lam: float) -> str | None:
        return None if system.is_law else f"the network's Jacobian is asymmetric by {system.asymmetry(x, lam):.1%}"

    for p in _march(system, first, high, -1, low, high):
        last, value = value, system.excess(p.x, p.lam)
        highest = max(highest, value)
        if before is not None and p.tl >= 0:
            fold = _fold(system, before, p)
            reason = "the central fixed point ends here in a fold (saddle-node), stable until then"
            return CriticalTime(_level(fold.lam, system.frame), reason=reason, **about)
        if before is not None and last <= threshold < value:
            # Between the ends of the step the branch may touch zero within rounding: take the end then.
            start = system.excess(before.x, before.lam)
            lam, x = _crossing(system, before, p) if start < 0 else (before.lam, before.x)
            return CriticalTime(_level(lam, system.frame), reason=limits(x, lam), **about)
        before = p
    reached = math.exp(before.lam) if before is not None else system.high
    span = f"from sigma = {system.high:.4g} down to {reached:.4g}"
    if highest <= threshold:
        reason = f"the central fixed point stays stable {span}"
    elif value > threshold:
        reason = f"the central fixed point is unstable at every level {span}: there is no crossing"
    else:
        reason = f"the central fixed point is unstable at high noise and only gains stability {span}"
    return CriticalTime(None, reason=reason, **about)


class _Central:
    """The central branch on a range of levels: interpolated and polished anywhere on it."""

    def __init__(self, system: _System, first: np.ndarray, lam: float, low: float) -> None:
        self.system = system
        points: list[_Point] = []
        self.fold: float | None = None
        for p in _march(system, first, lam, -1, low, lam):
            if points and p.tl >= 0:
                self.fold = _fold(system, points[-1], p).lam
                break
            points.append(p)
        self.lams = np.array([p.lam for p in points])[::-1]
        self.xs = np.stack([p.x for p in points])[::-1]

    def at(self, lam: float) -> np.ndarray | None:
        """The central fixed point at a level, ``None`` beyond its fold."""
        if lam < self.lams[0] - 1e-9:
            return None
        return _polished(self.system, self.lams, self.xs, lam)


def _polished(system: _System, lams: np.ndarray, xs: np.ndarray, lam: float) -> np.ndarray | None:
    """A branch's point at a level, from its points at rising levels."""
    i = int(np.clip(np.searchsorted(lams, lam), 1, max(len(lams) - 1, 1)))
    if len(lams) == 1:
        guess = xs[0]
    else:
        share = (lam - lams[i - 1]) / max(lams[i] - lams[i - 1], 1e-300)
        guess = xs[i - 1] + np.clip(share, 0.0, 1.0) * (xs[i] - xs[i - 1])
    found = system.newton(guess, lam)
    if found is None:
        return None
    reach = np.linalg.norm(xs[min(i, len(xs) - 1)] - xs[i - 1]) if len(lams) > 1 else 0.0
    # Newton must not have left for another branch.
    return found if np.linalg.norm(found - guess) <= 2 * reach + 0.05 * system.scale else None


def _wells(system: _System, first: np.ndarray, starts: np.ndarray, about: dict[str, Any]) -> CriticalTime:
    """The highest fold of the stable branches that are not the central one."""
    low, high = math.log(system.low), math.log(system.high)
    central = _Central(system, first, high, low)
    best: float | None = None
    after = 0
    traced: list[np.ndarray] = []  # wells of the level before: their branches are known
    for lam in np.arange(high, low, -math.log(1.2)):
        lam = float(lam)
        centre = central.at(lam)
        settled = system.settle(np.stack(traced), lam, 20) if traced else np.zeros((0, system.dim))
        followed = [system.newton(x, lam) for x in settled]
        traced = [x for x in followed if x is not None]
        wells = _wells_at(system, starts, lam, traced if centre is None else [centre, *traced])
        # The most stable ones were born first.
        wells.sort(key=lambda x: system.excess(x, lam))
        for x in wells[:4]:
            before: _Point | None = None
            for p in _march(system, x, lam, 1, low, high):
                if before is not None and p.tl <= 0:
                    fold = _fold(system, before, p).lam
                    best = fold if best is None else max(best, fold)
                    break
                before = p
            if before is not None and before.tl > 0 and before.lam > high - 1e-6:
                reason = f"several fixed points are stable at every level up to sigma = {system.high:.4g}"
                return CriticalTime(None, reason=reason, **about)
        traced += wells
        # Wells just below their birth have small basins that the starts can miss: look a few levels further.
        after += best is not None
        if after >= 3:
            break
    if best is None:
        reason = (
            f"no stable fixed point apart from the central one was found from sigma = {system.high:.4g} "
            f"down to {system.low:.4g}, from {len(starts)} starts"
        )
        return CriticalTime(None, reason=reason, **about)
    return CriticalTime(_level(best, system.frame), **about)


def fixed_points(
    law_or_denoiser: Any,
    sigma: float | np.ndarray | torch.Tensor,
    flow: str = "sde",
    frame: str = "vp",
    starts: torch.Tensor | None = None,
    x0: torch.Tensor | None = None,
) -> FixedPoints:
    """The fixed points of a flow on a grid of levels: all branches that are found, with their stability.

    The central branch is continued from high noise. Others are looked for at up to 16 levels of the grid,
    from clean samples (which settle in the wells) and from the middles between points already found
    (which lead to saddles); each is followed in both directions by arclength, through its folds.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a level, or levels [G].
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        starts: clean samples [n, *S] to look from; by default draws of the law.
        x0: a guess of the clean state E[x_0 | x*] [*S] of the central fixed point.

    Returns:
        `FixedPoints`; points are states of the frame named. The search is by sampling: a branch whose
        basin no start meets is not found.

    Raises:
        InputError: for sigma <= 0, an unknown flow or frame, or ``starts`` of another shape.

    Source: arXiv:2305.19693.
    """
    _checked(flow, frame)
    plain = sigma.detach().cpu() if isinstance(sigma, torch.Tensor) else sigma
    grid = np.atleast_1d(np.asarray(plain, dtype=np.float64))
    if grid.ndim != 1 or len(grid) == 0:
        raise InputError("sigma is empty; expected a level or levels [G].")
    for s in grid:
        levels(s)
    system = _System(law_or_denoiser, flow, frame, x0)
    seeds = _starts(system, starts) if starts is not None or system.is_law else system.centre[None]
    lams = np.log(grid)
    low, high = float(lams.min()), float(lams.max())
    top = max(high, math.log(system.high)) if system.is_law else math.log(system.high)

    pieces: list[tuple[np.ndarray, np.ndarray, bool, float | None]] = []  # lams rising, points, central, fold

    def keep(points: list[_Point], central: bool) -> None:
        """Cut a march into pieces that are single-valued in lam, folds at their ends."""
        piece: list[tuple[float, np.ndarray]] = []
        born: float | None = None
        for i, p in enumerate(points):
            if i and (points[i - 1].tl > 0) != (p.tl > 0):
                fold = _fold(system, points[i - 1], p)
                piece.append((fold.lam, fold.x))
                add(piece, central, fold.lam)
                piece, born, central = [(fold.lam, fold.x)], fold.lam, False
            piece.append((p.lam, p.x))
        add(piece, central, born)

    def add(piece: list[tuple[float, np.ndarray]], central: bool, fold: float | None) -> None:
        ordered = sorted(piece, key=lambda item: item[0])
        pieces.append((np.array([a for a, _ in ordered]), np.stack([b for _, b in ordered]), central, fold))

    def known(lam: float) -> list[np.ndarray]:
        here = [_polished(system, a, b, lam) for a, b, _, _ in pieces if a[0] - 1e-9 <= lam <= a[-1] + 1e-9]
        return [x for x in here if x is not None]

    first = _centre(system, math.exp(top))
    if first is not None:
        keep(list(_march(system, first, top, -1, low, top)), True)
    anchors = np.unique(lams)[:: max(1, math.ceil(len(np.unique(lams)) / 16))]
    for lam in anchors:
        lam = float(lam)
        near = known(lam)
        found = _wells_at(system, seeds, lam, near)
        everything = (near + found)[:8]
        middles = [0.5 * (a + b) for i, a in enumerate(everything) for b in everything[:i]]
        for x in middles:
            y = system.newton(x, lam)
            if y is not None and _distinct(y[None], 1e-4 * system.scale, near + found):
                found.append(y)
        for x in found:
            if not _distinct(x[None], 1e-4 * system.scale, known(lam)):
                continue  # a branch followed meanwhile passes here
            up = list(_march(system, x, lam, 1, low, high, 0.1)) if high > lam else []
            down = list(_march(system, x, lam, -1, low, high, 0.1)) if lam > low else []
            if high == low:
                pieces.append((np.array([lam]), x[None], False, None))
                continue
            backwards = [_Point(p.x, p.lam, -p.tx, -p.tl) for p in down[:0:-1]]
            keep(backwards + (up or [_Point(x, lam, -down[0].tx, -down[0].tl)]), False)
    branches = []
    alphas = np.array([NoiseLevel(float(s)).alpha if frame == "vp" else 1.0 for s in grid])
    for piece_lams, xs, central, fold in sorted(pieces, key=lambda piece: not piece[2]):
        points = np.full((len(grid), system.dim), math.nan)
        values = np.full(len(grid), math.nan)
        for i, lam in enumerate(lams):
            if piece_lams[0] - 1e-12 <= lam <= piece_lams[-1] + 1e-12:
                at = _polished(system, piece_lams, xs, float(lam))
                if at is not None:
                    kappa, gain = _rates(flow, frame, math.exp(lam))
                    points[i] = alphas[i] * at / kappa
                    values[i] = gain * kappa * system.excess(at, float(lam))
        if np.isfinite(values).any():
            shaped = torch.from_numpy(points.reshape(len(grid), *system.shape))
            branches.append(Branch(grid, shaped, values, central, None if fold is None else math.exp(fold)))
    return FixedPoints(grid, tuple(branches), flow, frame)
