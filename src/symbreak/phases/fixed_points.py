"""Fixed points of a flow, solved and followed along the noise level.

A fixed point solves D(x) = kappa x (`symbreak.phases.bifurcation` has the drifts). The unknown here is the
clean state w = kappa x = D it belongs to, and lam = log sigma the parameter:

    F(w, lam) = D(w / kappa, e^lam) - w = 0        dF/dw = J / kappa - 1

Newton solves it at one level; pseudo-arclength continuation (Keller 1977) marches along a branch and
passes through its folds.
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
from torch.overrides import TorchFunctionMode

from symbreak.networks.denoiser import as_denoiser
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError

__all__ = [
    "CentralBranch",
    "Point",
    "System",
    "central_point",
    "checked_flow",
    "distinct",
    "fold_between",
    "follow",
    "level_at",
    "loss_of_stability",
    "march",
    "polished",
    "rates",
]

DENSE = 1024  # up to this dimension Jacobians are matrices, above it products
CHUNK = 256  # Jacobian columns a call
SHARES = (1.0, 0.5, 0.25, 0.1)  # of a step of the fixed-point iteration


def checked_flow(flow: str, frame: str) -> None:
    if flow not in ("sde", "ode"):
        raise InputError(f"unknown flow {flow!r}. Pass flow='sde' or flow='ode' (probability flow).")
    if frame not in ("vp", "ve"):
        raise InputError(f"unknown frame {frame!r}. Pass frame='vp' or frame='ve'.")


def rates(flow: str, frame: str, sigma: float) -> tuple[float, float]:
    """kappa and gain of the drift gain (D - kappa x), the table of `symbreak.phases.bifurcation`."""
    s2 = sigma * sigma
    if frame == "ve":
        return 1.0, 1.0 / s2
    if flow == "sde":
        return 0.5 * (1.0 + 1.0 / (1.0 + s2)), (1.0 + s2) / s2
    return 1.0 / (1.0 + s2), 0.5 * (1.0 + s2) / s2


def level_at(lam: float, frame: str) -> NoiseLevel:
    """The level sigma = e^lam of a frame."""
    return NoiseLevel(math.exp(lam), None if frame == "vp" else 1.0)  # type: ignore[arg-type]


class _Contiguous(TorchFunctionMode):
    """Group norm's forward-mode derivative refuses a strided input, such as attention gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class System:
    """F(w, lam) = D(w / kappa, e^lam) - w as numpy vectors [d], with its Jacobian J / kappa - 1.

    At a fixed point w = D, the clean state it belongs to: it stays on the data's scale at every level, where
    the state itself grows like sigma^2 for the probability flow of data that are not centred.
    """

    def __init__(
        self, law_or_denoiser: Any, flow: str, frame: str, guess: torch.Tensor | None = None, dense: int = DENSE
    ) -> None:
        checked_flow(flow, frame)
        self.source, self.flow, self.frame = law_or_denoiser, flow, frame
        self.denoiser = as_denoiser(law_or_denoiser)
        self.shape = tuple(self.denoiser.shape)
        self.dim = math.prod(self.shape)
        self.dense = self.dim <= dense
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
        return rates(self.flow, self.frame, math.exp(lam))[0]

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
                # Flash attention has no forward-mode derivative; weights need none.
                with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Contiguous():
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
            (self.dim, self.dim), matvec=lambda v: self.products(x, v.reshape(1, -1), lam)[0], dtype=np.float64
        )

    def top(self, x: np.ndarray, lam: float) -> float:
        """Top eigenvalue (real part) of J / kappa; above `DENSE` by Lanczos (laws) or Arnoldi."""
        if self.dense:
            j = self.jacobian(x, lam)
            if not self.is_law:
                return float(scipy.linalg.eigvals(j).real.max())
            return float(scipy.linalg.eigvalsh(j, driver="evd")[-1])
        start = np.random.default_rng(0).standard_normal(self.dim)
        a = self._operator(x, lam)
        if self.is_law:
            return float(eigsh(a, k=1, which="LA", v0=start, tol=1e-13, return_eigenvectors=False)[0])
        return float(eigs(a, k=1, which="LR", v0=start, tol=1e-5, return_eigenvectors=False)[0].real)

    def leading(self, w: np.ndarray, lam: float, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k eigenvalues of J = dD/dx of largest real part [k], falling, and unit eigenvectors in rows [k, d]."""
        kappa = self.kappa(lam)
        if self.is_law and self.dense:
            values, vectors = scipy.linalg.eigh(self.jacobian(w, lam), driver="evd")
        elif self.dense or k >= self.dim - 1:
            values, vectors = scipy.linalg.eig(self.jacobian(w, lam))
        else:
            start = np.random.default_rng(0).standard_normal(self.dim)
            ncv = min(self.dim, max(20, 2 * k + 1))
            a = self._operator(w, lam)
            if self.is_law:
                values, vectors = eigsh(a, k=k, which="LA", v0=start, ncv=ncv, tol=1e-13)
            else:
                # float32 networks know the matrix to about 1e-6.
                values, vectors = eigs(a, k=k, which="LR", v0=start, ncv=ncv, tol=1e-12 if self.exact else 1e-5)
        order = np.argsort(-values.real, kind="stable")[:k]
        return kappa * values.real[order], np.stack([_real(vectors[:, i]) for i in order])

    def excess(self, x: np.ndarray, lam: float) -> float:
        """Top eigenvalue of J over kappa, minus one: above zero is unstable."""
        return self.top(x, lam) - 1.0

    def asymmetry(self, x: np.ndarray, lam: float) -> float:
        """|J - J^T| / |J + J^T| (Frobenius), from the matrix or from random bilinear forms."""
        if self.dense:
            j = self.jacobian(x, lam)
            return float(np.linalg.norm(j - j.T) / max(float(np.linalg.norm(j + j.T)), 1e-300))
        v = np.random.default_rng(2).standard_normal((32, self.dim))
        g = v @ self.products(x, v, lam).T
        pairs = np.triu_indices(32, 1)
        return float(np.linalg.norm((g - g.T)[pairs]) / max(float(np.linalg.norm((g + g.T)[pairs])), 1e-300))

    def solve(
        self, x: np.ndarray, lam: float, rhs: np.ndarray, border: tuple[np.ndarray, np.ndarray, float] | None = None
    ) -> np.ndarray:
        """Least-squares solution of (J / kappa - 1) u = rhs, or of that bordered by (column, row, corner).

        Directions along which the matrix vanishes (a ring of fixed points, a pitchfork) are left alone.
        """
        if self.dense:
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

    def contract(self, w: np.ndarray, lam: float) -> np.ndarray | None:
        """The limit of w <- w + share (D(w / kappa) - w), where every step is shorter than the one before.

        Such a limit lies in the basin of the start, and the branch through it cannot have jumped. A stable point can
        have eigenvalues of J / kappa below -1 (networks do, far from their training data): smaller shares calm them.
        """
        for share in SHARES:
            x, size, last = w, math.inf, np.zeros_like(w)
            for _ in range(int(60 / share)):
                f = self.residual(x, lam)
                now = float(np.linalg.norm(f))
                if now <= self.tolerance(x):
                    return x
                # Also where now is NaN. An eigenvalue of 0.8 shortens a step to 1 - 0.2 share.
                if not now <= (1 - 0.2 * share) * size:
                    if now <= 30 * self.tolerance(x):
                        return x  # rounding stops the descent
                    if not f @ last < 0:
                        return None  # slow or diverging, not swinging to and fro: a smaller share cannot help
                    break
                x, size, last = x + share * f, now, f
        return None

    def _difference_solve(self, x: np.ndarray, lam: float, rhs: np.ndarray) -> np.ndarray:
        """(J / kappa - 1) u = rhs to a few per cent, all that a Newton step needs, by central differences.

        A difference takes a tenth of the time of a forward-mode product of a network (Jacobian-free Newton-Krylov,
        Knoll & Keyes 2004).
        """

        def apply(u: np.ndarray) -> np.ndarray:
            h = 1e-2 * self.scale / max(float(np.linalg.norm(u)), 1e-300)
            ends = self._denoised(
                np.stack([x + h * u.reshape(-1), x - h * u.reshape(-1)]) / self.kappa(lam), math.exp(lam)
            )
            return (ends[0] - ends[1]) / (2 * h) - u.reshape(-1)

        a = LinearOperator((self.dim, self.dim), matvec=apply, dtype=np.float64)
        return np.asarray(gmres(a, rhs, rtol=0.03, restart=40, maxiter=2)[0])

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

    def near(self, x: np.ndarray, lam: float) -> np.ndarray | None:
        """The fixed point next to x, within half the scale, or ``None``: Newton with few Jacobians.

        A Jacobian serves as long as each step at least halves the residual: for a network it costs tens of calls.
        """
        start = at = x
        f = self.residual(x, lam)
        now, fresh = float(np.linalg.norm(f)), True
        for _ in range(30):
            if not math.isfinite(now):
                return None
            if now <= self.tolerance(x):
                return x
            step = self.solve(at, lam, -f) if self.dense or self.exact else self._difference_solve(at, lam, -f)
            new = x + step * min(1.0, 0.25 * self.scale / max(float(np.linalg.norm(step)), 1e-300))
            if np.linalg.norm(new - start) > 0.5 * self.scale:
                return None
            f_new = self.residual(new, lam)
            size = float(np.linalg.norm(f_new))
            if size <= 0.5 * now:
                x, f, now, fresh = new, f_new, size, False
            elif fresh:
                # Rounding stops the descent, or nothing is there.
                return x if now <= 30 * self.tolerance(x) else None
            else:
                at, fresh = x, True
        return None

    def settle(self, x: np.ndarray, lam: float, iterations: int = 200, share: float = 1.0) -> np.ndarray:
        """Iterate w <- w + share (D(w / kappa) - w) on rows [n, d], towards stable points; diverging ones go."""
        kappa, sigma = self.kappa(lam), math.exp(lam)
        for _ in range(iterations):
            if not len(x):
                break
            new = self._denoised(x / kappa, sigma)
            if share != 1.0:
                new = x + share * (new - x)
            moved = np.abs(new - x).max(initial=0.0)
            size = np.linalg.norm(new - self.centre, axis=1)
            limit = 1e3 * (self.scale * math.sqrt(self.dim) + np.linalg.norm(self.centre))
            x = new[np.isfinite(size) & (size < limit)]
            if moved < max(1e-9, 10 * self.noise) * self.scale:
                break
        return x


def _real(v: np.ndarray) -> np.ndarray:
    """A unit vector along a complex one, turned so that its largest entry is positive."""
    turned = v / v[np.argmax(np.abs(v))]
    real = np.asarray(turned.real, dtype=np.float64)
    return real / np.linalg.norm(real)


@dataclass(frozen=True)
class Point:
    """A point of a branch with its unit tangent in (x / scale, lam)."""

    x: np.ndarray
    lam: float
    tx: np.ndarray
    tl: float


def _tangent(system: System, x: np.ndarray, lam: float, tx: np.ndarray, tl: float) -> tuple[np.ndarray, float]:
    """The unit tangent that points along (tx, tl)."""
    rhs = np.zeros(system.dim + 1)
    rhs[-1] = 1.0
    t = system.solve(x, lam, rhs, (system.slope(x, lam) / system.scale, tx, tl))
    t = t / max(float(np.linalg.norm(t)), 1e-300)
    return t[:-1], float(t[-1])


def _corrected(system: System, p: Point, ds: float) -> tuple[Point, int] | None:
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
            return Point(x, lam, tx, tl), step
        size = now
        u = system.solve(x, lam, -np.append(f / s, plane), (system.slope(x, lam) / s, p.tx, p.tl))
        x, lam = x + s * u[:-1], lam + float(u[-1])
        if np.linalg.norm(x - x0) / s + abs(lam - lam0) > 2 * abs(ds) + 1e-6:
            return None
    return None


def march(
    system: System, x: np.ndarray, lam: float, sign: int, low: float, high: float, largest: float = 0.25
) -> Iterator[Point]:
    """Points along a branch from (x, lam) until lam leaves [low, high]; sign 1 sets out upwards in lam."""
    slope = system.solve(x, lam, -system.slope(x, lam) / system.scale)
    norm = math.sqrt(1.0 + float(slope @ slope))
    p = Point(x, lam, sign * slope / norm, sign / norm)
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
                yield Point(last, end, q.tx, q.tl)
            return
        p = q
        yield p
        ds = min(largest, length * (1.6 if steps <= 3 else 0.9))


def fold_between(system: System, p: Point, q: Point) -> Point:
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
                best = Point(x, float(cheb.chebval(u, series)), p.tx, 0.0)
        if misfit < 1e-11:
            break
        half *= 0.5
    return best


def central_point(system: System, high: float) -> np.ndarray | None:
    """The single fixed point at high noise."""
    lam = math.log(high)
    first = system.newton(system.centre, lam)
    if first is None and len(x := system.settle(system.centre[None], lam, 50)):
        first = system.newton(x[0], lam)
    return first


def follow(
    system: System, w: np.ndarray, lam: float, to: float
) -> tuple[np.ndarray | None, tuple[np.ndarray, float] | None]:
    """A fixed point at a lower level, followed from (w, lam) in steps of at most a factor 1.25 in sigma.

    Cheaper than `march` and good for networks, whose maps contract at high noise: each step iterates
    w <- D(w / kappa) while that contracts and calls Newton where it does not. A step that moves too far is
    halved; where even short ones do, the branch has ended or cannot be followed, and the iteration says where it falls.

    Returns:
        The point, ``None`` where it was lost, and the last point (w, lam) before the highest jump, ``None`` without.
    """
    longest = math.log(1.25)
    brink: tuple[np.ndarray, float] | None = None
    h = longest
    while abs(lam - to) > 1e-12:
        below = max(lam - h, to)
        new = system.contract(w, below)
        if new is None:
            new = system.near(w, below)
        if new is None and h > longest / 8:
            h = 0.5 * min(h, lam - to)
            continue
        if new is None:
            brink = (w, lam) if brink is None else brink
            fallen = system.settle(w[None], below, share=SHARES[-1])
            new = system.near(fallen[0], below) if len(fallen) else None
            if new is None:
                return None, brink
        w, lam, h = new, below, min(2 * h, longest)
    return w, brink


def loss_of_stability(system: System, p: Point, q: Point) -> tuple[float, np.ndarray]:
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


def distinct(rows: np.ndarray, apart: float, known: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """The rows that lie further than ``apart`` from each other and from those known."""
    kept: list[np.ndarray] = []
    for row in rows:
        if all(np.linalg.norm(row - other) > apart for other in kept + (known or [])):
            kept.append(row)
    return kept


class CentralBranch:
    """The central branch on a range of levels: interpolated and polished anywhere on it."""

    def __init__(self, system: System, first: np.ndarray, lam: float, low: float) -> None:
        self.system = system
        points: list[Point] = []
        self.fold: float | None = None
        for p in march(system, first, lam, -1, low, lam):
            if points and p.tl >= 0:
                self.fold = fold_between(system, points[-1], p).lam
                break
            points.append(p)
        self.lams = np.array([p.lam for p in points])[::-1]
        self.xs = np.stack([p.x for p in points])[::-1]

    def at(self, lam: float) -> np.ndarray | None:
        """The central fixed point at a level, ``None`` beyond its fold."""
        if lam < self.lams[0] - 1e-9:
            return None
        return polished(self.system, self.lams, self.xs, lam)


def polished(system: System, lams: np.ndarray, xs: np.ndarray, lam: float) -> np.ndarray | None:
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
