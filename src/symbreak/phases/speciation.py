"""Speciation: the noise level at which the classes of a data set become distinguishable.

Spectral criterion (Biroli, Bonnaire, de Bortoli, Mézard 2024, arXiv:2402.18491): with Lambda the top
eigenvalue of the data covariance, Lambda exp(-2 tau_S) = 1, that is tau_S = 1/2 log Lambda and
sigma_S^2 = Lambda - 1. It depends on the data's scale: [0, 1] instead of [-1, 1] shifts tau by -ln 2.
"""

from __future__ import annotations

import math
from typing import Any

from symbreak.critical import CriticalTime
from symbreak.files import InputError
from symbreak.moments import Moments
from symbreak.noise import NoiseLevel

__all__ = ["ladder", "speciation_time"]

SPECTRAL = "arXiv:2402.18491, Lambda exp(-2 tau) = 1"


def _spectral(value: float, low: float, high: float, scale: float) -> CriticalTime:
    """The spectral time of one eigenvalue, in units where the data are multiplied by ``scale``."""

    def level(v: float) -> NoiseLevel | None:
        v = v * scale**2
        return None if math.isnan(v) else NoiseLevel(math.sqrt(max(v - 1.0, 0.0)))

    if value * scale**2 <= 1.0:
        reason = (
            f"the top eigenvalue {value * scale**2:.4g} is at most 1: the noise of the VP process hides this mode "
            "at every level."
        )
        return CriticalTime(None, criterion="spectral", source=SPECTRAL, reason=reason)
    return CriticalTime(level(value), level(low), level(high), criterion="spectral", source=SPECTRAL)


def speciation_time(law_or_moments: Any, criterion: str = "spectral", scale: float = 1.0) -> CriticalTime:
    """The speciation level of a law or of measured moments.

    Args:
        law_or_moments: `Moments`, or a law with ``.moments``.
        criterion: ``"spectral"``.
        scale: factor on the data; 0.5 gives the value for images in [0, 1].

    Returns:
        A `CriticalTime`; its interval comes from the jackknife of the moments. No level, with a
        reason, where the top eigenvalue is at most 1.

    Raises:
        InputError: for an unknown criterion.

    >>> import torch
    >>> data = torch.tensor([[-2.0], [2.0]]).repeat(500, 1)
    >>> round(speciation_time(Moments.fit([data])).level.ou_time, 3)
    0.694
    """
    if criterion != "spectral":
        raise InputError(f"unknown speciation criterion {criterion!r}. Known: spectral.")
    moments = law_or_moments if isinstance(law_or_moments, Moments) else law_or_moments.moments
    top = moments.spectrum(1)
    return _spectral(float(top.values[0]), float(top.low[0]), float(top.high[0]), scale)


def ladder(moments: Moments, modes: int = 10, scale: float = 1.0) -> list[CriticalTime]:
    """The spectral time of each of the leading modes: the order in which they are decided."""
    s = moments.spectrum(modes)
    return [_spectral(float(v), float(a), float(b), scale) for v, a, b in zip(s.values, s.low, s.high)]
