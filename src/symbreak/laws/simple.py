"""Starts that claim less, or something else, than a law of the noised data: what a late start is compared with.

Each turns white noise z [B, *S] into VE states at a level, as a law's ``transport`` does, and that is all it can do:

    WhiteNoise    x = sqrt(1 + sigma^2) z                       the state of a VP sampler that starts anywhere
    Ball          z -> w uniform in the ball of covariance 1, then a Gaussian law's own map of w
    PowerMap      coordinates w_i of z in the leading modes -> b_i w_i + c_i (w_i^2 - 1) + d_i w_i^3, then the same

The Gaussian's map x = mu + Q sqrt(L + sigma^2) Q^T z is linear in z, so whatever has mean 0 and covariance 1 goes in
and mean and covariance of the noised data come out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize, stats

from symbreak.laws.clusters import coordinates
from symbreak.laws.gaussian import Gaussian
from symbreak.laws.law import flatten
from symbreak.moments.low_rank import Batches
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError

__all__ = ["Ball", "PowerMap", "WhiteNoise", "diagonal", "isotropic", "power_coefficients"]


class WhiteNoise:
    """White noise of variance 1 in the VP frame at any level: the start without a law.

    Args:
        shape: sample shape S.

    Source: the late start that the first figures of arXiv:2305.19693 degrade with.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(shape)

    def transport(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """VE states [B, *S] from white noise [B, *S]."""
        flatten(noise, self.shape)
        return math.sqrt(1 + sigma**2) * noise

    def __repr__(self) -> str:
        return f"WhiteNoise(shape={self.shape})"


class Ball:
    """Uniform in an ellipsoid with the mean and covariance of a Gaussian law; in a ball where that is isotropic.

        w = sqrt(d + 2) F(|z|^2)^(1/d) z / |z|,   F the chi-squared distribution of d degrees

    is uniform in the ball of radius sqrt(d + 2), whose covariance is 1.

    Args:
        gaussian: law whose mean and noised covariance it has.
    """

    def __init__(self, gaussian: Gaussian) -> None:
        self.gaussian, self.shape = gaussian, gaussian.shape

    def transport(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """VE states [B, *S] from white noise [B, *S]."""
        z = flatten(noise, self.shape).double()
        d, squared = z.shape[1], (z * z).sum(1, keepdim=True)
        inside = torch.special.gammainc(torch.full_like(squared, d / 2), squared / 2)
        w = math.sqrt(d + 2) * inside ** (1 / d) * z / squared.clamp_min(1e-300).sqrt()
        return self.gaussian.transport(w.to(noise.dtype).reshape(noise.shape), sigma)

    def __repr__(self) -> str:
        return f"Ball({self.gaussian!r})"


class PowerMap:
    """A learned start of two numbers a mode: skewness and kurtosis of the leading modes matched, beside the covariance.

    Noise adds nothing to the third and fourth cumulant, so at sigma a mode of variance L, skewness g_1 and excess
    kurtosis g_2 has  g_1 r^(3/2)  and  g_2 r^2  with r = L / (L + sigma^2): fitted once, it holds at every level.
    Modes stay independent of one another, which those of images are not.

    Args:
        gaussian: law whose mean and noised covariance it has.
        skewness, kurtosis: [k] of the k leading modes of the clean data, the kurtosis in excess of a Gaussian's 3.

    Source: Fleishman 1978, Psychometrika 43 (the power method); its use at every level derived.
    """

    def __init__(self, gaussian: Gaussian, skewness: ArrayLike, kurtosis: ArrayLike) -> None:
        self.gaussian, self.shape = gaussian, gaussian.shape
        self.skewness, self.kurtosis = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (skewness, kurtosis))
        if not (len(self.skewness) == len(self.kurtosis) <= gaussian.rank):
            raise InputError(
                f"{len(self.skewness)} skewnesses and {len(self.kurtosis)} kurtoses for {gaussian.rank} modes; "
                "expected one each of the leading modes."
            )
        self._coefficients: dict[float, torch.Tensor] = {}

    @classmethod
    def fit(cls, batches: Batches, gaussian: Gaussian, modes: int = 16) -> PowerMap:
        """The map of a data set: sample skewness and kurtosis of its coordinates in the Gaussian's leading modes."""
        k = min(int(modes), gaussian.rank, int((gaussian.eigenvalues > 0).sum()))
        y = coordinates(batches, gaussian.moments.mean, gaussian.eigenvectors[:, :k].double()).numpy()
        return cls(gaussian, stats.skew(y), stats.kurtosis(y))

    def coefficients(self, sigma: float) -> torch.Tensor:
        """b, c, d of every mode [k, 3] at a level."""
        if sigma not in self._coefficients:
            lam = self.gaussian.eigenvalues[: len(self.skewness)].numpy()
            r = lam / (lam + sigma**2)
            pairs = zip(self.skewness * r**1.5, self.kurtosis * r**2)
            self._coefficients[sigma] = torch.from_numpy(np.array([power_coefficients(a, b) for a, b in pairs]))
        return self._coefficients[sigma]

    def transport(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """VE states [B, *S] from white noise [B, *S]."""
        z = flatten(noise, self.shape).double()
        axes = self.gaussian.eigenvectors[:, : len(self.skewness)].to(z)
        w = z @ axes
        b, c, d = self.coefficients(float(sigma)).to(z).T
        moved = z + (b * w + c * (w * w - 1) + d * w**3 - w) @ axes.T
        return self.gaussian.transport(moved.to(noise.dtype).reshape(noise.shape), sigma)

    def __repr__(self) -> str:
        return f"PowerMap({len(self.skewness)} modes, {self.gaussian!r})"


def power_coefficients(skewness: float, kurtosis: float) -> np.ndarray:
    """b, c, d with which b w + c (w^2 - 1) + d w^3 of a standard normal w has variance 1 and the given cumulants.

        b^2 + 6 b d + 2 c^2 + 15 d^2 = 1
        2 c (b^2 + 24 b d + 105 d^2 + 2) = skewness
        24 (b d + c^2 (1 + b^2 + 28 b d) + d^2 (12 + 48 b d + 141 c^2 + 225 d^2)) = excess kurtosis

    Cumulants out of its reach (a kurtosis below about -1.15) are met as nearly as it can, the variance exactly.

    Args:
        skewness: third cumulant of the standardised variable.
        kurtosis: fourth cumulant.

    Source: Fleishman 1978, Psychometrika 43.
    """

    def miss(v: np.ndarray) -> np.ndarray:
        b, c, d = v
        return np.array(
            [
                b * b + 6 * b * d + 2 * c * c + 15 * d * d - 1,
                2 * c * (b * b + 24 * b * d + 105 * d * d + 2) - skewness,
                24 * (b * d + c * c * (1 + b * b + 28 * b * d) + d * d * (12 + 48 * b * d + 141 * c * c + 225 * d * d))
                - kurtosis,
            ]
        )

    b, c, d = optimize.least_squares(miss, [1.0, skewness / 6, kurtosis / 24], xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    out: np.ndarray = np.array([b, c, d]) / math.sqrt(b * b + 6 * b * d + 2 * c * c + 15 * d * d)
    return out


def diagonal(moments: Moments) -> Gaussian:
    """The Gaussian with a data set's mean and the variance of every pixel, no correlations."""
    return Gaussian(Moments(moments.count, moments.mean, torch.diag(moments.cov.diagonal())))


def isotropic(moments: Moments) -> Gaussian:
    """The Gaussian with a data set's mean and its mean pixel variance in every direction."""
    share = float(moments.cov.diagonal().mean())
    return Gaussian(Moments(moments.count, moments.mean, share * torch.eye(moments.dim, dtype=torch.float64)))
