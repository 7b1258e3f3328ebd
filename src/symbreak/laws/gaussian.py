"""The Gaussian law N(mu, Sigma) under noise: everything in closed form.

With Sigma = Q L Q^T and x = x_0 + sigma eps, every map below acts on modes, y = Q^T (x - mu):

    denoise  y -> L / (L + sigma^2) y            law of x: N(mu, Q (L + sigma^2) Q^T)
    probability flow  y(sigma) = sqrt((L + sigma^2) / (L + sigma_from^2)) y(sigma_from)

(Wang & Vastola, arXiv:2412.09726, for the flow). Of low rank, Sigma = Q L Q^T + f (I - Q Q^T): a function of the
eigenvalues then acts as x -> g(f) x + Q (g(L) - g(f)) Q^T x, at the cost of two products with Q [d, r].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import scipy.fft
import torch

from symbreak.laws.law import Parameters, column, flatten, fresh, level
from symbreak.moments.low_rank import Certificate, project_moments
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.runtime.files import InputError

__all__ = ["Gaussian"]

CHUNK = 2**26  # numbers [B, d] of a low-rank law handled at a time
LARGEST = 2**30  # numbers of a basis of cosines, 4.3 GB
PANEL = 2**24  # numbers of Q converted at a time where x has more digits than Q

Gain = Callable[[torch.Tensor], torch.Tensor]


class Gaussian:
    """The Gaussian with given moments.

    Args:
        moments: `Moments` of the data, of any sample shape [*S], or `LowRankMoments`.
        rank: eigenpairs to keep; by default all that the moments hold.
        floor: variance of a direction outside them, by default their mean variance: the law with the least
            divergence from the data's Gaussian.

    Attributes:
        eigenvalues: [r] float64, falling.
        eigenvectors: [d, r].
        floor: variance in the d - r other directions; 0 where r = d.

    >>> law = Gaussian(Moments(2, [0.0], [[3.0]]))
    >>> law.denoise(torch.tensor([[4.0]]), sigma=1.0).item()
    3.0
    """

    def __init__(self, moments: Moments | LowRankMoments, rank: int | None = None, floor: float | None = None) -> None:
        if rank is not None and (isinstance(moments, LowRankMoments) or rank < moments.dim):
            moments = moments.truncate(rank)
        self.moments = moments
        self.shape: tuple[int, ...] = moments.shape
        self.floor = 0.0
        if isinstance(moments, LowRankMoments):
            self.eigenvalues, self.eigenvectors = moments.eigenvalues, moments.vectors
            self.floor = moments.floor if floor is None else float(floor)
        else:
            self.eigenvalues, self.eigenvectors = moments.eigh
        if floor is not None and (floor < 0 or moments.dim == len(self.eigenvalues)):
            raise InputError(f"floor is {floor:g} at rank {len(self.eigenvalues)}; expected >= 0 and a rank below d.")
        self._whole = Parameters(moments.mean.reshape(-1), self.eigenvalues)
        self._basis = Parameters(self.eigenvectors)

    @classmethod
    def fit(cls, batches: Iterable[torch.Tensor], rank: int | None = None) -> Gaussian:
        """The Gaussian with the moments of a stream of batches [B, *S]; with ``rank``, of a sketch of them."""
        return cls(Moments.fit(batches) if rank is None else Moments.fit(batches, rank=rank))

    @classmethod
    def low_frequency(cls, batches: Iterable[torch.Tensor], size: int = 8) -> Gaussian:
        """A full covariance of the lowest frequencies, one variance for everything else; one pass.

        Of every channel the ``size`` x ``size`` lowest coefficients of the orthonormal cosine transform (DCT-II) are
        kept, with their covariance over all channels; the other directions have their mean variance. This is
        what images show longest under noise, so it serves images and latents that are too large for a covariance.
        The certificate is as for a sketch: R is exact, l bounded by random vectors in the same pass.

        Args:
            batches: [B, C, H, W] or [B, H, W]; they may come only once. From H and W on, ``size`` keeps everything:
                the full Gaussian. Memory is 8 (C size^2 + 50) d bytes.
            size: coefficients a side, at least 1.

        Source: the low frequencies' leak in diffusion starts is arXiv:2309.15842; covariance and certificate derived.
        """
        if int(size) != size or size < 1:
            raise InputError(f"size is {size}; expected a whole number of at least 1.")
        return cls(project_moments(batches, lambda shape: _cosines(shape, int(size))))

    @property
    def dim(self) -> int:
        """Number of elements d of one sample."""
        return self.moments.dim

    @property
    def rank(self) -> int:
        """Number of eigenpairs r."""
        return len(self.eigenvalues)

    def certificate(self, sigma: float) -> Certificate:
        """What the truncation to this rank loses at a level, against the empirical covariance; 0 for a full law."""
        if isinstance(self.moments, LowRankMoments):
            return self.moments.certificate(sigma, self.floor)
        return Certificate(0.0, float(sigma), self.rank, 0, 0.0, 0.0, self.moments.count, 0.0)

    def _mean(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._whole.like(x, dtype)[0]

    def _vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Q on the device of x, in its dtype or, of a sketch, with fewer digits: a copy could fill the memory."""
        (q,) = self._basis.like(x, x.dtype if x.dtype == torch.float32 else self.eigenvectors.dtype)
        return q

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        return flatten(x, self.shape)

    def _map(self, x: torch.Tensor, gain: Gain, centred: bool = False) -> torch.Tensor:
        """mu + g(Sigma) (x - mu) for a function g of the eigenvalues; ``centred`` leaves mu out on both sides."""
        flat, mean = self._flat(x), self._mean(x)
        if self.rank == self.dim:
            q = self._vectors(x).to(x.dtype)
            values = self._whole.like(x, torch.float64)[1]
            y = ((flat if centred else flat - mean) @ q) * gain(values).to(x.dtype)
            out = y @ q.T
            return (out if centred else out + mean).reshape(x.shape)
        values = self._whole.like(x, torch.float64)[1]
        outside = gain(torch.full((1,), self.floor, dtype=torch.float64, device=x.device))
        inside = (gain(values) - outside).to(x.dtype)
        outside = outside.to(x.dtype)
        size = max(1, CHUNK // self.dim)
        done = []
        for i in range(0, len(flat), size):
            part = flat[i : i + size] if centred else flat[i : i + size] - mean
            # A level of its own for every sample gives a row of factors each.
            here, there = (f[i : i + size] if f.ndim == 2 and len(f) > 1 else f for f in (inside, outside))
            y = self._coordinates(part) * here
            done.append(_joined([there * part[:, c] + y @ q.T for c, q in self._panels(part)], 1))
            if not centred:
                done[-1] = done[-1] + mean
        return (_joined(done, 0) if done else flat.clone()).reshape(x.shape)

    def _panels(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Q in the dtype of x, some of its rows at a time where they have to be converted."""
        q = self._vectors(x)
        size = self.dim if q.dtype == x.dtype else max(1, PANEL // max(1, self.rank))
        for a in range(0, self.dim, size):
            yield slice(a, a + size), q[a : a + size].to(x.dtype)

    def _coordinates(self, centred: torch.Tensor) -> torch.Tensor:
        """Q^T of rows [B, d], [B, r]."""
        return sum((centred[:, c] @ q for c, q in self._panels(centred)), centred.new_zeros(()))

    def _squared_level(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """sigma^2, [] or [B, 1], float64 on the device of x."""
        return column(level(sigma, x) ** 2)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""
        g = fresh(generator)
        z = torch.randn(n, *self.shape, generator=g, dtype=torch.float64, device=g.device)
        out = self._map(z, lambda v: (v + float(sigma) ** 2).sqrt(), centred=True)
        return out + self._mean(z).reshape(self.shape)

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]; sigma a float or [B]."""
        s2 = self._squared_level(x, sigma)
        return self._map(x, lambda v: v / (v + s2))

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Gradient of `log_prob`, [B, *S]."""
        s2 = self._squared_level(x, sigma)
        centred = self._flat(x) - self._mean(x)
        return self._map(centred.reshape(x.shape), lambda v: -1.0 / (v + s2), centred=True)

    def log_prob(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """log density of x_0 + sigma eps at x, [B], nats."""
        s2 = self._squared_level(x, sigma)
        # Float64: where modes have no spread, rounding of y counts against sigma.
        mean, values = self._whole.like(x, torch.float64)
        if self.rank == self.dim:
            (q,) = self._basis.like(x, torch.float64)
            y = (self._flat(x).double() - mean) @ q
            total = values + s2
            return -0.5 * ((y * y / total).sum(-1) + total.log().sum(-1) + self.dim * math.log(2 * math.pi))
        flat, total, outside = self._flat(x), values + s2, self.floor + s2
        size, squares, lengths = max(1, CHUNK // self.dim), [], []
        for i in range(0, len(flat), size):
            y = length = mean.new_zeros(())
            for c, q in self._panels(mean):
                part = flat[i : i + size, c].double() - mean[c]
                y, length = y + part @ q, length + (part * part).sum(-1, keepdim=True)
            squares.append(y * y)
            lengths.append(length)
        z2, rest = _joined(squares, 0), _joined(lengths, 0)
        quadratic = (z2 / total).sum(-1) + ((rest - z2.sum(-1, keepdim=True)) / outside).sum(-1)
        log_det = total.log().sum(-1) + (self.dim - self.rank) * (outside.log().sum(-1) if s2.ndim else outside.log())
        return -0.5 * (quadratic + log_det + self.dim * math.log(2 * math.pi))

    def posterior_covariance(self, x: torch.Tensor, v: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Cov(x_0 | x_0 + sigma eps = x) v, [B, *S], for v of the shape of x; the same at every x."""
        if v.shape != x.shape:
            raise InputError(f"vectors of shape {tuple(v.shape)} for states of {tuple(x.shape)}; expected the same.")
        s2 = self._squared_level(x, sigma)
        return self._map(v.to(x.dtype), lambda e: e * s2 / (e + s2), centred=True)

    def transport(self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

            mu + Q sqrt(L + sigma^2) Q^T z                                   from pure noise z ~ N(0, I)
            mu + Q sqrt((L + sigma^2) / (L + sigma_from^2)) Q^T (x - mu)      from a state x at sigma_from

        Args:
            noise: [B, *S]; white noise, or VE states at ``sigma_from``.
            sigma: target level.
            sigma_from: level of the states given; ``None`` for pure noise (the limit of infinite sigma).

        Returns:
            VE states [B, *S] at sigma. From white noise their law is exactly that of x_0 + sigma eps.
        """
        s2 = self._squared_level(noise, sigma)
        if sigma_from is None:
            mean = self._mean(noise).reshape(self.shape)
            return self._map(noise, lambda v: (v + s2).sqrt(), centred=True) + mean
        return self._map(noise, lambda v: ((v + s2) / (v + float(sigma_from) ** 2)).sqrt())

    def __repr__(self) -> str:
        rank = "" if self.rank == self.dim else f"rank {self.rank}, "
        return f"Gaussian({rank}shape={self.shape}, top eigenvalue {float(self.eigenvalues[0]):.4g})"


def _joined(parts: list[Any], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _cosines(shape: tuple[int, ...], size: int) -> torch.Tensor:
    """The lowest cosines [d, C k^2] of every channel, orthonormal in columns, float32."""
    if len(shape) < 2:
        raise InputError(f"samples of shape {shape}; low frequencies need images [C, H, W] or [H, W].")
    height, width = shape[-2:]
    modes = math.prod(shape[:-2]) * min(size, height) * min(size, width)
    if math.prod(shape) * modes > LARGEST:
        raise InputError(
            f"{modes} cosines of {math.prod(shape):,} pixels take {4e-9 * math.prod(shape) * modes:.0f} GB; at most "
            f"{4e-9 * LARGEST:.0f} GB are held. Ask for a smaller size."
        )
    # Row j of the inverse transform of the identity is basis function j.
    rows, columns = (
        torch.from_numpy(scipy.fft.idct(torch.eye(min(size, n), n).double().numpy(), axis=1, norm="ortho"))
        for n in (height, width)
    )
    one = torch.einsum("ah,bw->hwab", rows, columns).reshape(height * width, -1).float()
    channels, own = math.prod(shape[:-2]), one.shape[1]
    out = torch.zeros(channels, height * width, modes)
    for c in range(channels):
        out[c, :, c * own : (c + 1) * own] = one
    return out.reshape(channels * height * width, -1)
