"""The late start: a shorter schedule, and a law that is good enough at its first level.

Above the symmetry breaking the noised data are nearly Gaussian, so a sampler need not start from white
noise at the top: it starts at level s from  x = mu + Q sqrt(L + s^2) Q^T z, z ~ N(0, I), and spends its
steps below (Raya & Ambrogioni 2023, arXiv:2305.19693). Nothing else about the sampler changes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from symbreak.critical import CriticalTime
from symbreak.cut import SUPPORTED, LateStart, check_scheduler, check_steps, cut, standard_start
from symbreak.files import InputError
from symbreak.noise import NoiseLevel, Schedule, schedule
from symbreak.phases.speciation import speciation_time

__all__ = ["SUPPORTED", "LateStart", "LateStartWarning", "late_start", "standard_start"]


class LateStartWarning(UserWarning):
    """A late start is legal but outside the range where theory vouches for it."""


def _resolve(at: Any, law: Any, full: Schedule) -> NoiseLevel:
    """The level that ``at`` means."""
    if isinstance(at, str):
        if at != "speciation":
            raise InputError(f"at={at!r}; expected 'speciation', a level, a CriticalTime or a step.")
        at = speciation_time(law)
    if isinstance(at, CriticalTime):
        if at.level is None:
            raise InputError(
                f"there is no {at.criterion} time to start at: {at.reason} Pass a level or a step instead."
            )
        at = at.level
    if isinstance(at, (int, float, np.integer, np.floating)) and not isinstance(at, bool):
        at = full.level(float(at))
    if not isinstance(at, NoiseLevel):
        raise InputError(f"at={at!r}; expected 'speciation', a NoiseLevel, a CriticalTime or a step.")
    full.time(at)  # raises outside the schedule
    if not 0 < at.sigma < float("inf"):
        raise InputError(f"a late start at sigma {at.sigma:g}; expected a finite level above 0.")
    return at


def late_start(
    scheduler: Any,
    law: Any,
    steps: int = 5,
    at: NoiseLevel | CriticalTime | str | int | float = "speciation",
    check: bool = True,
) -> LateStart:
    """Cut a scheduler so that it begins at a level, and start there from a law.

    Args:
        scheduler: a diffusers scheduler (`SUPPORTED` lists the classes); it is not changed.
        law: a law with ``.transport(noise, sigma)``, such as `Gaussian`.
        steps: num_inference_steps below the start; ``.calls`` says how many network calls they cost.
        at: ``"speciation"`` (spectral), a `NoiseLevel`, a `CriticalTime`, or a step of the schedule.
        check: warn where the level lies below the spectral speciation level.

    Returns:
        A `LateStart`: ``start(noise)`` is the state that ``start.scheduler.step`` expects first.

    Raises:
        InputError: for a scheduler that cannot be cut, a level outside the schedule, or more steps
            than the cut schedule has.

    Warns:
        LateStartWarning: where the start is later than the spectral speciation level.

    Source: arXiv:2305.19693 (Gaussian late start).
    """
    check_scheduler(scheduler)
    if not hasattr(law, "transport"):
        raise InputError(f"{type(law).__name__} is no law to start from: it has no .transport(noise, sigma).")
    check_steps(steps)
    try:
        asked = _resolve(at, law, schedule(scheduler))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    start = cut(scheduler, law, steps, asked)
    if check and hasattr(law, "moments"):
        spectral = speciation_time(law)
        if spectral.sigma is not None and start.level.sigma < spectral.sigma * (1 - 0.02):
            note = (
                f"The start at sigma {start.level.sigma:.4g} lies below the spectral speciation level "
                f"{spectral.sigma:.4g}: the data are no longer Gaussian there; "
                "compare non-Gaussianity before you rely on it."
            )
            start = replace(start, notes=(*start.notes, note))
            warnings.warn(note, LateStartWarning, stacklevel=2)
    return start
