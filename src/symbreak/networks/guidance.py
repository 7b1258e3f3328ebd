"""Guidance: two denoisers combined into one, with a condition and without."""

from __future__ import annotations

import math
from typing import Any

import torch

from symbreak.networks.denoiser import Denoiser, Denoises, as_denoiser
from symbreak.noise import sigma_of
from symbreak.runtime.errors import InputError

__all__ = ["Guided", "guided"]


class Guided:
    """Two denoisers as one; see `guided`."""

    def __init__(self, conditional: Any, unconditional: Denoiser, scale: float, window: tuple[float, float]) -> None:
        self.conditional, self.unconditional = conditional, unconditional
        self.scale, self.window = scale, window
        self.shape: tuple[int, ...] = tuple(conditional.shape)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Levels that both of them know."""
        ranges = self.conditional.sigma_range, self.unconditional.sigma_range
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def evaluations(self, sigma: float) -> int:
        """Network evaluations (NFE) that a level costs: 2 where the unconditional denoiser is needed, too."""
        return 2 if self.scale != 1 and self.window[0] < sigma <= self.window[1] else 1

    def bind(self, **condition: object) -> Guided:
        """The same with a condition of the conditional denoiser fixed, e.g. ``bind(class_labels=y)``."""
        return Guided(self.conditional.bind(**condition), self.unconditional, self.scale, self.window)

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        with_condition: torch.Tensor = self.conditional(x, sigma)
        costs = [
            self.evaluations(s) for s in torch.as_tensor(sigma_of(sigma), dtype=torch.float64).reshape(-1).tolist()
        ]
        if 2 not in costs:
            return with_condition
        without = self.unconditional(x, sigma)
        out = without + self.scale * (with_condition - without)
        inside = torch.tensor([cost == 2 for cost in costs], device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(inside, out, with_condition)


def guided(
    conditional: Denoises | Denoiser,
    unconditional: Denoises | Denoiser,
    scale: float,
    window: tuple[float, float] | None = None,
) -> Guided:
    """Classifier-free guidance as a denoiser, in a window of noise levels.

        D = D_u + w (D_c - D_u)    for low < sigma <= high        D = D_c    elsewhere

    The score follows the same rule: inside the window it is that of p_u^(1 - w) p_c^w at every level.

    Args:
        conditional: law or denoiser D_c, such as ``sb.denoiser(unet, scheduler, class_labels=y)``.
        unconditional: law or denoiser D_u, such as the same network with its empty class.
        scale: w; 1 is the conditional denoiser alone, which then is the only one that is evaluated.
        window: (low, high); by default every level.

    Returns:
        A `Denoiser`; ``evaluations(sigma)`` says what a level costs. `as_unet` makes it one that samplers take.

    Raises:
        InputError: for shapes that differ, no level that both know, a scale that is not finite, or a window
            that is upside down.

    Source: Ho & Salimans 2022, arXiv:2207.12598; the window: Kynkäänniemi et al. 2024, arXiv:2404.07724.

    >>> import symbreak as sb
    >>> both, one = sb.Empirical([[-1.0], [1.0]]), sb.Empirical([[1.0]])
    >>> d = sb.guided(one, both, scale=2.0, window=(0.5, 2.0))
    >>> d.evaluations(1.0), d.evaluations(3.0)
    (2, 1)
    """
    try:
        c, u = as_denoiser(conditional), as_denoiser(unconditional)
    except TypeError as error:
        raise InputError(str(error)) from None
    if tuple(c.shape) != tuple(u.shape):
        raise InputError(
            f"the conditional denoiser has the shape {tuple(c.shape)}, the unconditional one {tuple(u.shape)}; "
            "expected one shape."
        )
    if not math.isfinite(scale):
        raise InputError(f"a guidance scale of {scale}; expected a finite number, such as 2.")
    low, high = (0.0, math.inf) if window is None else (float(window[0]), float(window[1]))
    if not 0 <= low < high:
        raise InputError(f"a guidance window from sigma {low:g} to {high:g}; expected 0 <= low < high.")
    both = Guided(c, u, float(scale), (low, high))
    first, last = both.sigma_range
    if not first < last:
        raise InputError(
            f"no level that both denoisers know: the conditional one {c.sigma_range}, the unconditional one "
            f"{u.sigma_range}. Use denoisers of one range."
        )
    return both
