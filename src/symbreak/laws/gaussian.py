"""The Gaussian law N(mu, Sigma) under noise: everything in closed form.

With Sigma = Q L Q^T and x = x_0 + sigma eps, every map below acts on modes, y = Q^T (x - mu):

    denoise  y -> L / (L + sigma^2) y            law of x: N(mu, Q (L + sigma^2) Q^T)
    probability flow  y(sigma) = sqrt((L + sigma^2) / (L + sigma_from^2)) y(sigma_from)

(Wang & Vastola, arXiv:2412.09726, for the flow). Of low rank, Sigma = Q L Q^T + f (I - Q Q^T): a function of the
eigenvalues then acts as x -> g(f) x + Q (g(L) - g(f)) Q^T x, at the cost of two products with Q [d, r].
"""

from __future__ import annotations

import math

import scipy.fft
import torch

from symbreak.laws.law import ExactLaw, fresh, rows_of
from symbreak.moments.covariance import Covariance, Gain, Parameters, posterior, root, shrink, solve
from symbreak.moments.low_rank import Batches, Certificate, project_moments
from symbreak.moments.one_pass import LowRankMoments, Moments
from symbreak.runtime.files import InputError

__all__ = ["Gaussian"]

CHUNK = 2**26  # numbers [B, d] of a low-rank law handled at a time
LARGEST = 2**30  # numbers of a basis of cosines, 4.3 GB


class Gaussian(ExactLaw):
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
        self.covariance = Covariance(self.eigenvectors, self.eigenvalues, torch.tensor(self.floor, dtype=torch.float64))
        self._mean = Parameters(moments.mean.reshape(-1))

    @classmethod
    def fit(cls, batches: Batches, rank: int | None = None) -> Gaussian:
        """The Gaussian with the moments of a stream of batches [B, *S]; with ``rank``, of a sketch of them."""
        return cls(Moments.fit(batches) if rank is None else Moments.fit(batches, rank=rank))

    @classmethod
    def low_frequency(cls, batches: Batches, size: int = 8) -> Gaussian:
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
    def rank(self) -> int:
        """Number of eigenpairs r."""
        return len(self.eigenvalues)

    def certificate(self, sigma: float) -> Certificate:
        """What the truncation to this rank loses at a level, against the empirical covariance; 0 for a full law."""
        if isinstance(self.moments, LowRankMoments):
            return self.moments.certificate(sigma, self.floor)
        return Certificate(0.0, float(sigma), self.rank, 0, 0.0, 0.0, self.moments.count, 0.0)

    def _map(self, flat: torch.Tensor, gain: Gain, s2: torch.Tensor, centred: bool = False) -> torch.Tensor:
        """mu + g(Sigma) (x - mu) of rows, some at a time; ``centred`` leaves mu out on both sides."""
        covariance, (mean,) = self.covariance.like(flat), self._mean.like(flat)
        size = max(1, len(flat) if self.rank == self.dim else CHUNK // self.dim)
        done = []
        for i in range(0, max(1, len(flat)), size):
            part = slice(i, i + size)
            out = covariance.apply(gain, rows_of(s2, part), flat[part] if centred else flat[part] - mean)
            done.append(out if centred else out + mean)
        return done[0] if len(done) == 1 else torch.cat(done)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """n draws of x_0 + sigma eps, [n, *S] float64."""
        g = fresh(generator)
        z = torch.randn(n, self.dim, generator=g, dtype=torch.float64, device=g.device)
        s2 = torch.tensor(float(sigma) ** 2, dtype=torch.float64, device=g.device)
        return (self._map(z, root, s2, centred=True) + self._mean.like(z)[0]).reshape(n, *self.shape)

    def _denoise(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return self._map(flat, shrink, s2)

    def _score(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return -self._map(flat - self._mean.like(flat)[0], solve, s2, centred=True)

    def _log_prob(self, flat: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        # Float64: where modes have no spread, rounding of y counts against sigma.
        covariance, (mean,) = self.covariance.like(flat, torch.float64), self._mean.like(flat, torch.float64)
        size, done = max(1, CHUNK // (2 * self.dim)), []
        for i in range(0, max(1, len(flat)), size):
            part = slice(i, i + size)
            done.append(covariance.log_density(flat[part].double() - mean, rows_of(s2, part)))
        return torch.cat(done)

    def _covary(self, flat: torch.Tensor, v: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """The same at every x."""
        return self._map(v.to(flat.dtype), posterior, s2, centred=True)

    def transport(
        self, noise: torch.Tensor, sigma: float, sigma_from: float | None = None, steps: int | None = None
    ) -> torch.Tensor:
        """Carry noise along the law's probability flow to level sigma, deterministically.

            mu + Q sqrt(L + sigma^2) Q^T z                                   from pure noise z ~ N(0, I)
            mu + Q sqrt((L + sigma^2) / (L + sigma_from^2)) Q^T (x - mu)      from a state x at sigma_from

        Args:
            noise: [B, *S]; white noise, or VE states at ``sigma_from``.
            sigma: target level.
            sigma_from: level of the states; ``None`` for pure noise (the limit of infinite sigma).
            steps: unused, the map is exact; other laws take Runge-Kutta steps.

        Returns:
            VE states [B, *S] at sigma. From white noise their law is exactly that of x_0 + sigma eps.
        """
        flat, s2 = self._flat(noise, sigma)
        if sigma_from is None:
            return (self._map(flat, root, s2, centred=True) + self._mean.like(flat)[0]).reshape(noise.shape)
        before = float(sigma_from) ** 2
        return self._map(flat, lambda v, s2: ((v + s2) / (v + before)).sqrt(), s2).reshape(noise.shape)

    def __repr__(self) -> str:
        rank = "" if self.rank == self.dim else f"rank {self.rank}, "
        return f"Gaussian({rank}shape={self.shape}, top eigenvalue {float(self.eigenvalues[0]):.4g})"


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
    channels, each = math.prod(shape[:-2]), one.shape[1]
    out = torch.zeros(channels, height * width, modes)
    for c in range(channels):
        out[c, :, c * each : (c + 1) * each] = one
    return out.reshape(channels * height * width, -1)
