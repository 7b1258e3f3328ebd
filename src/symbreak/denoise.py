"""The denoiser contract: d(x, sigma) -> E[x_0 | x_0 + sigma eps = x], and what follows from it.

    score(x) = (D(x) - x) / sigma^2          dD/dx = Cov(x_0 | x) / sigma^2

(Tweedie; Miyasawa 1961, Efron 2011). Laws have one in closed form (`as_denoiser`), trained networks
are adapted to one (`symbreak.adapters.denoiser`). x is a VE state [B, *S], sigma a float or [B].
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

__all__ = ["Denoiser", "LawDenoiser", "as_denoiser", "score"]


@runtime_checkable
class Denoiser(Protocol):
    """Anything that maps (x, sigma) to the posterior mean of x_0.

    Attributes:
        shape: sample shape S.
        sigma_range: levels it can be asked at; outside it raises ValueError.
    """

    shape: tuple[int, ...]

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma."""

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x] [B, *S] for VE states x [B, *S]."""


class LawDenoiser:
    """A law's exact posterior mean as a `Denoiser`."""

    sigma_range = (0.0, float("inf"))

    def __init__(self, law: Any) -> None:
        self.law = law
        self.shape: tuple[int, ...] = tuple(law.shape)

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.law.denoise(x, sigma)
        return out


def as_denoiser(law_or_denoiser: Any) -> Denoiser:
    """A law's denoiser, or the denoiser itself.

    Raises:
        TypeError: for anything that is neither.
    """
    if hasattr(law_or_denoiser, "denoise"):
        return LawDenoiser(law_or_denoiser)
    if isinstance(law_or_denoiser, Denoiser):
        return law_or_denoiser
    raise TypeError(
        f"{type(law_or_denoiser).__name__} is neither a law (it has no .denoise) nor a denoiser (d(x, sigma) with "
        ".shape and .sigma_range). Adapt a network with sb.denoiser(unet, scheduler)."
    )


def score(law_or_denoiser: Any, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """Gradient of the noised log density at VE states x, [B, *S]: (D(x, sigma) - x) / sigma^2."""
    s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    s = s.reshape(-1, *[1] * (x.ndim - 1)) if s.ndim else s
    return (as_denoiser(law_or_denoiser)(x, sigma) - x) / (s * s)
