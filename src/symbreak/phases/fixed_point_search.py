"""Fixed points of a flow: solved at one level, followed along the noise level, and all of them on a grid.

Every flow and frame has a drift proportional to D(x, sigma) - kappa x, with D the denoiser and x the VE state (a state
of the VP frame is alpha x), q = alpha-bar, per unit beta in VP:

    VP, reverse SDE        x/2 + score        kappa = (1 + q) / 2      gain = 1 / (1 - q)
    VP, probability flow   x/2 + score/2      kappa = q                gain = 1 / (2 (1 - q))
    VE, both flows         score              kappa = 1                gain = 1 / sigma^2

A fixed point solves D(x) = kappa x. The drift's Jacobian there is gain (J - kappa), J = dD/dx = Cov(x_0 | x) / sigma^2,
so it is unstable where the top eigenvalue of J exceeds kappa. The unknown here is the clean state w = kappa x = D that
the point belongs to, and lam = log sigma the parameter:

    F(w, lam) = D(w / kappa, e^lam) - w = 0        dF/dw = J / kappa - 1

Newton solves it at one level. `march` follows a branch by pseudo-arclength (Keller 1977) and passes through its folds;
`follow` goes down in steps that contract, which costs a network a hundredth of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.optimize import brentq, root
from scipy.sparse.linalg import LinearOperator, eigs, eigsh, gmres
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from symbreak.critical import Levels, levels
from symbreak.laws.law import Law, is_law
from symbreak.networks.denoiser import Denoiser, as_denoiser
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError

__all__ = [
    "SOURCE",
    "Branch",
    "FixedPoints",
    "Point",
    "System",
    "Track",
    "central_point",
    "checked_flow",
    "distinct",
    "fixed_points",
    "fold_between",
    "follow",
    "level_at",
    "loss_of_stability",
    "march",
    "pieces",
    "rates",
    "wells_at",
]

SOURCE = "arXiv:2305.19693, stability of the drift's fixed points"
DENSE = 1024  # up to this dimension a law's Jacobian is a matrix, above it products
DENSE_NETWORK = 256  # a network's columns cost more than the few products that its leading eigenvalues need
CHUNK = 256  # Jacobian columns a call
SHARES = (1.0, 0.5, 0.25, 0.1)  # of a step of the fixed-point iteration
LONGEST = math.log(1.25)  # step of `follow` in log sigma


def checked_flow(flow: str, frame: str) -> None:
    """Raises an `InputError` for a flow or frame that there is not."""
    if flow not in ("sde", "ode"):
        raise InputError(f"unknown flow {flow!r}. Pass flow='sde' or flow='ode' (probability flow).")
    if frame not in ("vp", "ve"):
        raise InputError(f"unknown frame {frame!r}. Pass frame='vp' or frame='ve'.")


def rates(flow: str, frame: str, sigma: float) -> tuple[float, float]:
    """kappa and gain of the drift gain (D - kappa x), the table above."""
    s2 = sigma * sigma
    if frame == "ve":
        return 1.0, 1.0 / s2
    if flow == "sde":
        return 0.5 * (1.0 + 1.0 / (1.0 + s2)), (1.0 + s2) / s2
    return 1.0 / (1.0 + s2), 0.5 * (1.0 + s2) / s2


def level_at(lam: float, frame: str) -> NoiseLevel:
    """The level sigma = e^lam of a frame."""
    return NoiseLevel(math.exp(lam), None if frame == "vp" else 1.0)  # type: ignore[arg-type]


def _numbers(x: torch.Tensor) -> Any:
    """``x.tolist()`` by single numbers."""
    return x.item() if x.ndim == 0 else [_numbers(row) for row in x.unbind()]


class _Differentiable(TorchFunctionMode):
    """What a forward-mode derivative refuses: group norm of a strided input, such as attention gives; and in torch 2.6
    ``tolist`` of a tensor that was made inside it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        if func is torch.Tensor.tolist:
            return _numbers(args[0])
        return func(*args, **(kwargs or {}))


class System:
    """F(w, lam) = D(w / kappa, e^lam) - w as numpy vectors [d], with its Jacobian J / kappa - 1.

    At a fixed point w = D, the clean state it belongs to: it stays on the data's scale at every level, where
    the state itself grows like sigma^2 for the probability flow of data that are not centred.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        guess: of the central fixed point's clean state [*S] at high noise; by default a law's mean, or zero.

    Attributes:
        low, high: levels between which is looked.
        centre: where the search for the central point starts [d].
        scale: a length of the data: it sets steps and tolerances only.
        noise: rounding of D relative to the scale; ``exact`` where that is float64's.
    """

    def __init__(
        self, law_or_denoiser: Law | Denoiser, flow: str, frame: str, guess: torch.Tensor | None = None
    ) -> None:
        checked_flow(flow, frame)
        self.source, self.flow, self.frame = law_or_denoiser, flow, frame
        self.denoiser = as_denoiser(law_or_denoiser)
        self.shape = tuple(self.denoiser.shape)
        self.dim = math.prod(self.shape)
        self.law = law_or_denoiser if is_law(law_or_denoiser) else None
        self.is_law = self.law is not None
        self.dense = self.dim <= (DENSE if self.is_law else DENSE_NETWORK)
        weights = getattr(getattr(law_or_denoiser, "unet", None), "parameters", tuple)
        self.device = next((p.device for p in weights()), torch.device("cpu"))
        self._measure_network() if self.law is None else self._measure_law(self.law)
        if guess is not None:
            x0 = torch.as_tensor(guess)
            if tuple(x0.shape) != self.shape:
                raise InputError(f"x0 has the shape {tuple(x0.shape)}; expected one state of shape {self.shape}.")
            self.centre = x0.detach().cpu().double().reshape(-1).numpy()
        self.noise = self._rounding()
        self.exact = self.noise < 1e-11
        self._cached: tuple[bytes, float, np.ndarray] | None = None

    def _measure_law(self, law: Law) -> None:
        draws = law.sample(256, 0.0, generator(0, 256)).double().reshape(256, -1)
        # The exact mean where it is cheap: a law's moments hold a matrix [d, d].
        moments = getattr(law, "moments", None) if self.dim <= DENSE else None
        mean = draws.mean(0) if moments is None else moments.mean.reshape(-1)
        self.centre = mean.double().cpu().numpy()
        spread = (draws - draws.mean(0)).cpu().numpy()
        # Root of the top eigenvalue of the draws' covariance.
        self.scale = math.sqrt(max(float(np.linalg.eigvalsh(spread @ spread.T)[-1]) / 256, 1e-300))
        self.low, self.high = min(1e-3, 1e-3 * self.scale), 100.0 * max(self.scale, 0.1)
        self.low = max(self.low, 1e-5 * self.scale)

    def _measure_network(self) -> None:
        self.low, self.high = self.denoiser.sigma_range
        if not (0 < self.low < self.high < math.inf):
            self.low, self.high = max(self.low, 1e-3), min(self.high, 1e3)
        self.centre = np.zeros(self.dim)
        # How far apart it sends noise of low and middle levels.
        z = np.random.default_rng(1).standard_normal((4, self.dim))
        z = np.concatenate([z, -z])
        reach = [self._denoised(v * z, v) for v in np.geomspace(self.low, self.high, 5)[1:4]]
        self.scale = max(0.5 * max(float(np.linalg.norm(r - r.mean(0), axis=1).max()) for r in reach), 1e-6)

    def _rounding(self) -> float:
        """Size of D's rounding, relative to the scale: second differences over a tiny step."""
        a, v = np.random.default_rng(1).standard_normal((2, self.dim))
        v *= 1e-7 * self.scale / np.linalg.norm(v)
        # Away from the centre, where numbers are small and floats exact.
        base = self.centre + 0.3 * self.scale * a / np.linalg.norm(a)
        sigma = math.sqrt(self.low * self.high)
        at = [self._denoised(base + k * v, sigma) for k in (-1, 0, 1)]
        return float(np.linalg.norm(at[0] - 2 * at[1] + at[2])) / self.scale

    def starts(self, starts: torch.Tensor | None, n: int = 64) -> np.ndarray:
        """Clean samples [n, d] from which to look for wells; by default a law's draws."""
        if starts is None:
            if self.law is None:
                raise InputError("a denoiser has no samples to look for wells from. Pass starts=, e.g. 64 samples.")
            starts = self.law.sample(n, 0.0, generator(0, n))
        x = torch.as_tensor(starts)
        if x.ndim == 0 or len(x) == 0 or tuple(x.shape[1:]) != self.shape:
            raise InputError(f"starts of shape {tuple(x.shape)}; expected clean samples [n, *S], S = {self.shape}.")
        return x.detach().cpu().double().reshape(len(x), -1).numpy()

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=self.device).reshape(-1, *self.shape)

    @torch.no_grad()
    def _denoised(self, x: np.ndarray, sigma: float) -> np.ndarray:
        out = self.denoiser(self.tensor(x), sigma).detach().double().cpu().numpy().reshape(-1, self.dim)
        return out if x.ndim == 2 else out[0]

    def kappa(self, lam: float) -> float:
        return rates(self.flow, self.frame, math.exp(lam))[0]

    def residual(self, w: np.ndarray, lam: float) -> np.ndarray:
        """F for one clean state [d], or for rows [n, d]."""
        return self._denoised(w / self.kappa(lam), math.exp(lam)) - w

    def slope(self, w: np.ndarray, lam: float) -> np.ndarray:
        """dF / dlam by central differences: it steers predictors and correctors, not the answer."""
        h = 1e-5 if self.exact else 1e-2
        low, high = math.log(self.low), math.log(self.high)
        a, b = (lam - h, lam + h) if self.is_law else (max(lam - h, low), min(lam + h, high))
        return (self.residual(w, b) - self.residual(w, a)) / (b - a)

    def products(self, w: np.ndarray, v: np.ndarray, lam: float) -> np.ndarray:
        """J v / kappa for rows v [K, d], J = dD/dx at x = w / kappa."""
        sigma, kappa, out = math.exp(lam), self.kappa(lam), []
        for i in range(0, len(v), CHUNK):
            rows = self.tensor(v[i : i + CHUNK])
            at = self.tensor(w / kappa).expand(rows.shape).contiguous()
            if self.law is not None:
                jv = self.law.posterior_covariance(at, rows, sigma) / sigma**2
            else:
                # Flash attention has no forward-mode derivative; weights need none.
                with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Differentiable():
                    jv = torch.func.jvp(lambda z: self.denoiser(z, sigma), (at,), (rows,))[1]
            out.append(jv.detach().double().cpu().numpy().reshape(len(rows), self.dim))
        return np.concatenate(out) / kappa

    def jacobian(self, w: np.ndarray, lam: float) -> np.ndarray:
        """J / kappa [d, d], the last one kept."""
        key = w.tobytes()
        if self._cached is None or self._cached[0] != key or self._cached[1] != lam:
            j = self.products(w, np.eye(self.dim), lam).T
            self._cached = (key, lam, 0.5 * (j + j.T) if self.is_law else j)
        return self._cached[2]

    def leading(self, w: np.ndarray, lam: float, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The k eigenvalues of J / kappa of largest real part [k], falling, and unit eigenvectors in rows [k, d].

        From the matrix, or above `DENSE` by Lanczos (laws) or Arnoldi (networks).
        """
        if self.is_law and self.dense:
            top = (self.dim - k, self.dim - 1)
            values, vectors = scipy.linalg.eigh(self.jacobian(w, lam), subset_by_index=top)
        elif self.dense or k >= self.dim - 1:
            values, vectors = scipy.linalg.eig(self.jacobian(w, lam))
        else:
            square = (self.dim, self.dim)
            a = LinearOperator(square, matvec=lambda v: self.products(w, v.reshape(1, -1), lam)[0], dtype=np.float64)
            find, which = (eigsh, "LA") if self.is_law else (eigs, "LR")
            # float32 networks know the matrix to about 1e-6.
            tol = 1e-13 if self.is_law else 1e-12 if self.exact else 1e-5
            start = np.random.default_rng(0).standard_normal(self.dim)
            values, vectors = find(a, k=k, which=which, v0=start, ncv=min(self.dim, max(20, 2 * k + 1)), tol=tol)
        order = np.argsort(-values.real, kind="stable")[:k]
        return values.real[order], np.stack([_real(vectors[:, i]) for i in order])

    def excess(self, w: np.ndarray, lam: float) -> float:
        """Top eigenvalue (real part) of J over kappa, minus one: above zero is unstable."""
        return float(self.leading(w, lam)[0][0]) - 1.0

    @property
    def neutral(self) -> float:
        """|excess| below which a direction counts as neutral."""
        return max(1e-9, 100 * self.noise)

    def continuum(self, w: np.ndarray, lam: float) -> tuple[int, np.ndarray]:
        """Neutral directions of a fixed point, and the eigenvalues of J / kappa that were looked at, falling.

        Along a ring of fixed points there is one, on a sphere of them d - 1. Above `DENSE` only the top eigenvalue
        is looked at: one direction stands for any number.
        """
        if not self.dense:
            values = self.leading(w, lam)[0]
        else:
            j = self.jacobian(w, lam)
            values = np.sort(scipy.linalg.eigvalsh(j) if self.is_law else scipy.linalg.eigvals(j).real)[::-1]
        return int((np.abs(values - 1.0) < self.neutral).sum()), values

    def asymmetry(self, w: np.ndarray, lam: float) -> float:
        """|J - J^T| / |J + J^T| (Frobenius), from the matrix or from random bilinear forms; zero for a law."""
        if self.is_law:
            return 0.0
        if self.dense:
            j = self.jacobian(w, lam)
            return float(np.linalg.norm(j - j.T) / max(float(np.linalg.norm(j + j.T)), 1e-300))
        v = np.random.default_rng(2).standard_normal((32, self.dim))
        g = v @ self.products(w, v, lam).T
        pairs = np.triu_indices(32, 1)
        return float(np.linalg.norm((g - g.T)[pairs]) / max(float(np.linalg.norm((g + g.T)[pairs])), 1e-300))

    def _difference(self, w: np.ndarray, u: np.ndarray, lam: float) -> np.ndarray:
        """J u / kappa of a network by central differences, in a tenth of the time of a forward-mode product."""
        h = 1e-2 * self.scale / max(float(np.linalg.norm(u)), 1e-300)
        ends = self._denoised(np.stack([w + h * u, w - h * u]) / self.kappa(lam), math.exp(lam))
        return (ends[0] - ends[1]) / (2 * h)

    def solve(
        self,
        w: np.ndarray,
        lam: float,
        rhs: np.ndarray,
        border: tuple[np.ndarray, np.ndarray, float] | None = None,
        still: np.ndarray | None = None,
    ) -> np.ndarray:
        """Least-squares solution of (J / kappa - 1) u = rhs, or of that bordered by (column, row, corner).

        Directions along which the matrix vanishes (a ring of fixed points, a pitchfork) are left alone. A Newton step
        of a large float32 network is solved to a few per cent, which is all it needs (Knoll & Keyes 2004). Of the
        matrix, directions ``still`` in rows [m, d] are made as stable as can be: nothing moves along them.
        """
        if self.dense:
            a = self.jacobian(w, lam) - np.eye(self.dim)
            if still is not None:
                a = a - still.T @ still
            if border is not None:
                a = np.block([[a, border[0][:, None]], [border[1][None, :], np.array([[border[2]]])]])
            driver = "gelsd" if self.dim <= 64 else "gelsy"
            return np.asarray(scipy.linalg.lstsq(a, rhs, cond=1e-11, lapack_driver=driver)[0])
        n, rough = self.dim + (border is not None), not self.exact and border is None

        def apply(u: np.ndarray) -> np.ndarray:
            u = u.reshape(-1)
            v = u[: self.dim]
            out = (self._difference(w, v, lam) if rough else self.products(w, v[None], lam)[0]) - v
            return out if border is None else np.append(out + border[0] * u[-1], border[1] @ v + border[2] * u[-1])

        rtol, restart, cycles = (0.03, 40, 2) if rough else (1e-12 if self.exact else 1e-4, 60, 4)
        a = LinearOperator((n, n), matvec=apply, dtype=np.float64)
        return np.asarray(gmres(a, rhs, rtol=rtol, restart=restart, maxiter=cycles)[0])

    def tolerance(self, w: np.ndarray) -> float:
        """|F| below which a point counts as fixed."""
        rounding = 4e-16 * (float(np.linalg.norm(w)) + math.sqrt(self.dim) * self.scale)
        return max(4 * rounding, 1e-14 * self.scale, 30 * self.noise * self.scale)

    def newton(self, w: np.ndarray, lam: float, within: float = math.inf) -> np.ndarray | None:
        """The fixed point near w at a fixed level, ``None`` where there is none.

        Args:
            w: where to start [d].
            lam: log sigma.
            within: how far the point may lie from w. Where that is finite, steps have to halve the residual, and a
                network's Jacobian serves as long as they do: it costs tens of evaluations.
        """
        start, at, size = w, w, math.inf
        near, f = math.isfinite(within), self.residual(w, lam)
        longest = 0.25 * self.scale if near else 2.0 * self.scale * math.sqrt(self.dim)
        for _ in range(30 if near else 20):
            now = float(np.linalg.norm(f))
            if not math.isfinite(now):
                return None
            # Also where rounding stops the descent.
            if now <= self.tolerance(w) or (0.5 * size <= now <= (30 if near else 1e3) * self.tolerance(w)):
                return w
            step = self.solve(at, lam, -f)
            reach = float(np.linalg.norm(step))
            if not math.isfinite(reach):
                return None
            new = w + step * min(1.0, longest / max(reach, 1e-300))
            if np.linalg.norm(new - start) > within:
                return None
            f_new = self.residual(new, lam)
            halved = float(np.linalg.norm(f_new)) <= 0.5 * now
            if near and not halved:
                if at is w:
                    return w if now <= 30 * self.tolerance(w) else None
                at = w
                continue
            w, f, size = new, f_new, math.inf if near else now
            at = at if near and not self.is_law else w
        return w if not near and float(np.linalg.norm(f)) <= 1e3 * self.tolerance(w) else None

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

    def settle(self, w: np.ndarray, lam: float, iterations: int = 200, share: float = 1.0) -> np.ndarray:
        """Iterate w <- w + share (D(w / kappa) - w) on rows [n, d], towards stable points; diverging ones go."""
        limit = 1e3 * (self.scale * math.sqrt(self.dim) + np.linalg.norm(self.centre))
        for _ in range(iterations if len(w) else 0):
            step = share * self.residual(w, lam)
            w = w + step
            size = np.linalg.norm(w - self.centre, axis=1)
            w = w[np.isfinite(size) & (size < limit)]
            if not len(w) or np.abs(step).max() < max(1e-9, 10 * self.noise) * self.scale:
                break
        return w


def _real(v: np.ndarray) -> np.ndarray:
    """A unit vector along a complex one, turned so that its largest entry is positive."""
    turned = v / v[np.argmax(np.abs(v))]
    real = np.asarray(turned.real, dtype=np.float64)
    return real / np.linalg.norm(real)


@dataclass(frozen=True)
class Point:
    """A point of a branch with its unit tangent in (w / scale, lam), and neutral directions along which it stays."""

    w: np.ndarray
    lam: float
    tw: np.ndarray
    tl: float
    still: np.ndarray | None = None


def _corrected(system: System, p: Point, ds: float) -> tuple[Point, int] | None:
    """The point of the branch on the plane at arclength ds beyond p, and the Newton steps it took."""
    s = system.scale
    w0, lam0 = p.w + ds * s * p.tw, p.lam + ds * p.tl
    w, lam, size = w0, lam0, math.inf
    for step in range(10):
        f = system.residual(w, lam)
        plane = float(p.tw @ (w - w0)) / s + p.tl * (lam - lam0)
        now = float(np.linalg.norm(f))
        if not math.isfinite(now):
            return None
        border = (system.slope(w, lam) / s, p.tw, p.tl)
        done = now <= system.tolerance(w) or (now >= 0.5 * size and now <= 1e3 * system.tolerance(w))
        if done and abs(plane) < 1e-10:
            t = system.solve(w, lam, np.append(np.zeros(system.dim), 1.0), border, p.still)
            t = t / max(float(np.linalg.norm(t)), 1e-300)
            return Point(w, lam, t[:-1], float(t[-1]), p.still), step
        size = now
        u = system.solve(w, lam, -np.append(f / s, plane), border, p.still)
        w, lam = w + s * u[:-1], lam + float(u[-1])
        if np.linalg.norm(w - w0) / s + abs(lam - lam0) > 2 * abs(ds) + 1e-6:
            return None
    return None


def march(
    system: System, w: np.ndarray, lam: float, sign: int, low: float, high: float, largest: float = 0.25
) -> Iterator[Point]:
    """Points along a branch from (w, lam) until lam leaves [low, high]; sign 1 sets out upwards in lam."""
    still = None
    if system.dense and system.continuum(w, lam)[0]:
        # A ring or sphere of fixed points: the march keeps to its side of it.
        values, vectors = system.leading(w, lam, system.dim)
        still = vectors[np.abs(values - 1.0) < system.neutral]
    slope = system.solve(w, lam, -system.slope(w, lam) / system.scale, still=still)
    norm = math.sqrt(1.0 + float(slope @ slope))
    p = Point(w, lam, sign * slope / norm, sign / norm, still)
    yield p
    ds = 0.2 * largest
    for _ in range(4000):
        beyond = (high - p.lam if p.tl > 0 else p.lam - low) / max(abs(p.tl), 1e-12)
        if beyond <= 1e-9:
            return
        length = min(ds, beyond)
        answer = _corrected(system, p, length)
        turned = answer is not None and float(answer[0].tw @ p.tw) + answer[0].tl * p.tl < 0.9
        if answer is None or (turned and length > 1e-4):
            ds = 0.5 * length
            if ds < 1e-6:
                return
            continue
        q, steps = answer
        if q.lam > high + 1e-6 or q.lam < low - 1e-6:
            end = high if q.lam > high else low
            share = (end - p.lam) / (q.lam - p.lam)
            last = system.newton(p.w + share * (q.w - p.w), end)
            if last is not None:
                yield Point(last, end, q.tw, q.tl, still)
            return
        p = q
        yield p
        ds = min(largest, length * (1.6 if steps <= 3 else 0.9))


def fold_between(system: System, p: Point, q: Point) -> Point:
    """The point between p and q where the branch turns back in lam (its tangent has no lam component).

    At a pitchfork the equations are singular right at the turn, so lam is interpolated there from points
    around it, along whose arclength it is smooth.
    """
    ds = float(p.tw @ (q.w - p.w)) / system.scale + p.tl * (q.lam - p.lam)
    best = p if abs(p.tl) < abs(q.tl) else q

    def turn(length: float) -> float:
        answer = _corrected(system, p, length) if length > 0 else None
        return p.tl if answer is None else answer[0].tl

    try:
        middle = float(brentq(turn, 0.0, ds, xtol=1e-4, rtol=1e-3))
    except ValueError:
        return best  # the ends do not bracket: the turn lies at one of them
    angles = np.cos(np.pi * (np.arange(10) + 0.5) / 10)  # an even number: none of them at the turn
    half, degree = (min(0.08, ds), 9) if system.exact else (0.5 * ds, 2)
    cheb, misfit = np.polynomial.chebyshev, math.inf
    for _ in range(5):
        points = [a[0] for u in angles if (a := _corrected(system, p, middle + half * float(u))) is not None]
        if len(points) == len(angles):
            series = cheb.chebfit(angles, [r.lam for r in points], degree)
            roots = cheb.chebroots(cheb.chebder(series))
            inside = roots[(np.abs(roots.imag) < 1e-9) & (np.abs(roots.real) < 1)].real
            # The last terms hold what the series leaves out (half too large) or rounding (too small).
            left = float(np.abs(series[-2:]).max()) if system.exact else 0.0
            if len(inside) and left < misfit:
                u = float(inside[np.argmin(np.abs(inside))])
                shape = cheb.chebfit(angles, np.stack([r.w for r in points]), degree)
                w, misfit = np.asarray(cheb.chebval(u, shape)), left
                best = Point(w, float(cheb.chebval(u, series)), p.tw, 0.0)
        if misfit < 1e-11:
            break
        half *= 0.5
    return best


@dataclass
class Track:
    """Points of a branch by their level, single-valued in lam: {lam: w}.

    Attributes:
        system: whose branch.
        points: lam -> w.
        central: whether it comes from high noise.
        fold: lam of the fold at one of its ends, ``None`` without.
    """

    system: System
    points: dict[float, np.ndarray]
    central: bool = False
    fold: float | None = None

    def __contains__(self, lam: float) -> bool:
        return min(self.points) - 1e-9 <= lam <= max(self.points) + 1e-9

    def at(self, lam: float) -> np.ndarray | None:
        """The branch's point at a level, by Newton from the points around it; ``None`` where that leaves the branch."""
        lams = np.array(sorted(self.points))
        i = int(np.clip(np.searchsorted(lams, lam), 1, max(len(lams) - 1, 1)))
        below, above = self.points[lams[i - 1]], self.points[lams[min(i, len(lams) - 1)]]
        share = 0.0 if len(lams) == 1 else (lam - lams[i - 1]) / max(lams[i] - lams[i - 1], 1e-300)
        guess = below + float(np.clip(share, 0.0, 1.0)) * (above - below)
        w = self.system.newton(guess, lam)
        far = 2 * np.linalg.norm(above - below) + 0.05 * self.system.scale
        return None if w is None or np.linalg.norm(w - guess) > far else w


def pieces(system: System, points: Iterable[Point], central: bool = False) -> Iterator[Track]:
    """A march cut into tracks at its folds, which end one and begin the next; only the first can be central."""
    track, before = Track(system, {}, central), None
    for p in points:
        if before is not None and (before.tl > 0) != (p.tl > 0):
            fold = fold_between(system, before, p)
            track.points[fold.lam], track.fold = fold.w, fold.lam
            yield track
            track = Track(system, {fold.lam: fold.w}, False, fold.lam)
        track.points[p.lam] = p.w
        before = p
    if track.points:
        yield track


def loss_of_stability(
    track: Track, low: float, high: float, values: dict[float, float]
) -> tuple[float, dict[float, float]]:
    """log sigma at which the top eigenvalue crosses between two levels of a track, and its excess where it was seen.

    Points are added to the track. Excesses that are known may be given.
    """
    system, seen = track.system, dict(values)

    def excess(lam: float) -> float:
        if lam not in seen:
            w = track.at(lam)
            if w is None:
                above = min(known for known in track.points if known >= lam)
                w = follow(system, track.points[above], above, lam)[0]
                w = track.points[above] if w is None else w
            track.points[lam] = w
            seen[lam] = system.excess(w, lam)
        return seen[lam]

    # A float32 network knows its top eigenvalue to about 1e-5 at best.
    lam = float(brentq(excess, low, high, xtol=1e-13 if system.exact else 1e-5, rtol=8.9e-16))
    excess(lam)
    return lam, seen


def central_point(system: System, top: float) -> tuple[np.ndarray | None, float]:
    """The central fixed point at the highest level at which it is found, and log sigma of that.

    A law's is looked for at ``system.high`` only. A float32 network has none where its rounding is larger than what
    holds the point: levels down to lam = ``top`` are tried.
    """
    lam = max(math.log(system.high), top)

    def solved(lam: float) -> np.ndarray | None:
        w = system.newton(system.centre, lam)
        if w is None and len(rows := system.settle(system.centre[None], lam, 50)):
            w = system.newton(rows[0], lam)
        if w is None and system.dense:
            # A point that repels all around it, far from the mean: a trust region finds it.
            near = root(
                system.residual, system.centre, (lam,), jac=lambda x, lam: system.jacobian(x, lam) - np.eye(len(x))
            )
            w = system.newton(near.x, lam)
        return w

    w = solved(lam) if system.exact or lam <= top else None
    while w is None and lam > top:
        w = system.contract(system.centre, lam)
        if w is None:
            lam = max(lam - LONGEST, top)
            w = solved(lam) if lam == top else None
    return w, lam


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
    brink: tuple[np.ndarray, float] | None = None
    h, within = LONGEST, 0.5 * system.scale
    while abs(lam - to) > 1e-12:
        below = max(lam - h, to)
        new = system.contract(w, below)
        if new is None:
            new = system.newton(w, below, within)
        if new is None and h > LONGEST / 8:
            h = 0.5 * min(h, lam - to)
            continue
        if new is None:
            brink = brink or (w, lam)
            fallen = system.settle(w[None], below, share=SHARES[-1])
            new = system.newton(fallen[0], below, within) if len(fallen) else None
            if new is None:
                return None, brink
        w, lam, h = new, below, min(2 * h, LONGEST)
    return w, brink


def distinct(rows: Iterable[np.ndarray], apart: float, known: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """The rows that lie further than ``apart`` from each other and from those known."""
    new: list[np.ndarray] = []
    for row in rows:
        if all(np.linalg.norm(row - other) > apart for other in [*new, *known]):
            new.append(row)
    return new


def _one_continuum(system: System, w: np.ndarray, lam: float, others: Iterable[np.ndarray]) -> bool:
    """Whether a fixed point lies on one ring or sphere of them with another: then both have one spectrum."""
    directions, values = system.continuum(w, lam)
    return directions > 0 and any(np.allclose(values, system.continuum(v, lam)[1], atol=1e-6) for v in others)


def _is_new(system: System, w: np.ndarray, lam: float, known: Sequence[np.ndarray]) -> bool:
    return bool(distinct([w], 1e-4 * system.scale, known)) and not _one_continuum(system, w, lam, known)


def wells_at(
    system: System, starts: np.ndarray, lam: float, known: Sequence[np.ndarray], most: int = 24
) -> list[np.ndarray]:
    """Stable fixed points at a level, reached from the starts and not among those known; one of each continuum."""
    new: list[np.ndarray] = []
    again = 0
    for x in distinct(system.settle(starts, lam), 1e-2 * system.scale, known)[:most]:
        w, others = system.newton(x, lam), [*known, *new]
        if w is None or not distinct([w], 1e-4 * system.scale, others):
            continue
        if _one_continuum(system, w, lam, others):
            again += 1
            if again == 3:
                break  # most starts lie on it
        elif system.excess(w, lam) < system.neutral:
            new.append(w)
    return new


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
        continuum: dimension of the continuum of fixed points that the branch stands for: 0 for isolated points, 1 for
            a ring, d - 1 for a sphere; one point of it is followed. Above d = 1,024 "at least 1".
    """

    sigma: np.ndarray
    points: torch.Tensor
    eigenvalue: np.ndarray
    central: bool
    fold: float | None
    continuum: int = 0

    @property
    def exists(self) -> np.ndarray:
        """Whether there is a point at each level [G]."""
        return np.isfinite(self.eigenvalue)

    @property
    def stable(self) -> np.ndarray:
        """Whether the point at each level exists and is stable [G]; neutral ones (on a ring) count."""
        return self.exists & (np.nan_to_num(self.eigenvalue, nan=1.0) <= 1e-9)

    def __repr__(self) -> str:
        span = self.sigma[self.exists]
        text = f"{'central' if self.central else 'branch'}, sigma {span.min():.4g} to {span.max():.4g}"
        text += f", stable at {int(self.stable.sum())} of {len(span)} levels"
        if self.continuum:
            text += f", one point of a {'ring' if self.continuum == 1 else f'continuum of dimension {self.continuum}'}"
        return text if self.fold is None else f"{text}, fold at {self.fold:.6g}"


@dataclass(frozen=True)
class FixedPoints:
    """All branches of fixed points that were found on a grid of levels; the central one comes first."""

    sigma: np.ndarray
    branches: tuple[Branch, ...]
    flow: str
    frame: str

    def __repr__(self) -> str:
        return "\n  ".join([f"fixed points, {self.flow}, {self.frame}:", *map(repr, self.branches)])

    def at(self, i: int) -> tuple[torch.Tensor, np.ndarray]:
        """Points [K, *S] and top eigenvalues [K] at the i-th level."""
        here = [b for b in self.branches if b.exists[i]]
        shape = self.branches[0].points.shape[1:]
        points = torch.stack([b.points[i] for b in here]) if here else torch.zeros(0, *shape, dtype=torch.float64)
        return points, np.array([b.eigenvalue[i] for b in here])


def fixed_points(
    law_or_denoiser: Law | Denoiser,
    sigma: Levels,
    flow: str = "sde",
    frame: str = "vp",
    starts: torch.Tensor | None = None,
    x0: torch.Tensor | None = None,
) -> FixedPoints:
    """The fixed points of a flow on a grid of levels: all branches that are found, with their stability.

    The central branch is continued from high noise. Others are looked for at up to 16 levels of the grid,
    from clean samples (which settle in the wells) and from the middles between points already found
    (which lead to saddles); each is followed in both directions by arclength, through its folds. Of a ring or sphere
    of fixed points one point is followed, see `Branch.continuum`.

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        sigma: a level, or levels [G].
        flow: ``"sde"`` or ``"ode"``.
        frame: ``"vp"`` or ``"ve"``.
        starts: clean samples [n, *S] to look from; by default draws of the law.
        x0: a guess of the clean state E[x_0 | x*], [*S] of the central fixed point.

    Returns:
        `FixedPoints`; points are states of the frame named. The search is by sampling: a branch whose
        basin no start meets is not found.

    Raises:
        InputError: for sigma <= 0, an unknown flow or frame, or ``starts`` of another shape.

    Source: arXiv:2305.19693.

    >>> from symbreak.laws import Sphere
    >>> fixed_points(Sphere(3), [0.2, 0.3, 2.0])
    fixed points, sde, vp:
      central, sigma 0.2 to 2, stable at 1 of 3 levels
      branch, sigma 0.2 to 0.3, stable at 2 of 2 levels, one point of a continuum of dimension 2, fold at 0.622435
    """
    checked_flow(flow, frame)
    grid = levels(sigma)[0]
    system = System(law_or_denoiser, flow, frame, x0)
    rows = system.starts(starts) if starts is not None or system.is_law else system.centre[None]
    lams = np.log(grid)
    low, high = float(lams.min()), float(lams.max())
    top = max(high, math.log(system.high)) if system.is_law else math.log(system.high)
    first = central_point(system, top)[0]
    tracks = [] if first is None else list(pieces(system, march(system, first, top, -1, low, top), central=True))
    for lam in np.unique(lams)[:: max(1, math.ceil(len(np.unique(lams)) / 16))].tolist():
        known = _known(tracks, lam)
        for w in _unknown(system, rows, lam, known):
            # A branch followed meanwhile may pass here.
            if _is_new(system, w, lam, _known(tracks, lam)):
                tracks += _both_ways(system, w, lam, low, high, tracks)
    tracks.sort(key=lambda track: not track.central)
    return FixedPoints(grid, tuple(b for t in tracks if (b := _on_grid(t, grid)).exists.any()), flow, frame)


def _known(tracks: Sequence[Track], lam: float) -> list[np.ndarray]:
    """The points of tracks at a level."""
    return [w for track in tracks if lam in track and (w := track.at(lam)) is not None]


def _unknown(system: System, starts: np.ndarray, lam: float, known: list[np.ndarray]) -> list[np.ndarray]:
    """Wells at a level beside the points known, and what lies between any two points."""
    new = wells_at(system, starts, lam, known)
    around = [*known, *new][:8]
    for i, a in enumerate(around):
        for b in around[:i]:
            w = system.newton(0.5 * (a + b), lam)
            if w is not None and _is_new(system, w, lam, [*known, *new]):
                new.append(w)
    return new


def _both_ways(
    system: System, w: np.ndarray, lam: float, low: float, high: float, tracks: Sequence[Track]
) -> list[Track]:
    """The tracks of the branch through a point, inside a range of levels, on no continuum with those known."""
    if high == low:
        return [Track(system, {lam: w})]
    up = list(march(system, w, lam, 1, low, high, 0.1)) if high > lam else []
    down = list(march(system, w, lam, -1, low, high, 0.1)) if lam > low else []
    back = [Point(p.w, p.lam, -p.tw, -p.tl, p.still) for p in reversed(down[1:] if up else down)]
    new: list[Track] = []
    for track in pieces(system, [*back, *up]):
        lowest = min(track.points)
        # Through the fold of a ring the march continues along its other side.
        if not _one_continuum(system, track.points[lowest], lowest, _known([*tracks, *new], lowest)):
            new.append(track)
    return new


def _on_grid(track: Track, grid: np.ndarray) -> Branch:
    """A track at the requested levels, as states of its frame."""
    system, continuum = track.system, 0
    points, values = np.full((len(grid), system.dim), math.nan), np.full(len(grid), math.nan)
    for i in np.argsort(-grid, kind="stable"):
        lam, sigma = math.log(grid[i]), float(grid[i])
        w = track.at(lam) if lam in track else None
        if w is not None:
            kappa, gain = rates(system.flow, system.frame, sigma)
            points[i] = (NoiseLevel(sigma).alpha if system.frame == "vp" else 1.0) * w / kappa
            # The lowest level decides: a fold is neutral, too.
            continuum, spectrum = system.continuum(w, lam)
            values[i] = gain * kappa * (spectrum[0] - 1.0)
    shaped = torch.from_numpy(points.reshape(len(grid), *system.shape))
    fold = None if track.fold is None else math.exp(track.fold)
    return Branch(grid, shaped, values, track.central, fold, continuum)
