"""Fréchet distances between sets of images, in named features, with intervals.

A Fréchet distance of n samples is biased upward by a term that falls with n, so a number is only
comparable at equal counts; the floor, real images against real images at the same counts, says how
low it can go. (Chong & Forsyth, arXiv:1911.07023.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from symbreak.critical import mean_interval
from symbreak.files import InputError
from symbreak.moments import Moments, frechet_distance
from symbreak.noise import generator

__all__ = ["Distance", "distance", "floor"]


@dataclass(frozen=True)
class Distance:
    """Fréchet distance of repeats of samples to one reference.

    Attributes:
        values: one distance a repeat.
        mean, low, high: their mean and 95 % Student-t interval (NaN for a single repeat).
        pooled: distance of all repeats' samples together (less biased, no interval).
        samples: images a repeat.
        reference: images in the reference.
        extractor: name of the features.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    pooled: float
    samples: int
    reference: int
    extractor: str

    def to_dict(self) -> dict[str, object]:
        """Plain values; an interval that does not exist is ``None``."""
        single = len(self.values) < 2
        return {
            "values": list(self.values),
            "mean": self.mean,
            "low": None if single else self.low,
            "high": None if single else self.high,
            "pooled": self.pooled,
            "repeats": len(self.values),
            "samples": self.samples,
            "reference": self.reference,
            "extractor": self.extractor,
        }


def distance(found: torch.Tensor, reference: Moments, repeats: int, extractor: str) -> Distance:
    """Fréchet distance of features [N, F], cut into consecutive repeats of N // repeats rows.

    Raises:
        InputError: with fewer than 2 samples a repeat.
    """
    size = len(found) // repeats if repeats > 0 else 0
    if size < 2:
        raise InputError(f"{len(found)} samples in {repeats} repeats; expected at least 2 samples a repeat.")
    parts = [Moments.fit([part], parts=1) for part in found[: size * repeats].split(size)]
    values = tuple(frechet_distance(m, reference) for m in parts)
    pooled = frechet_distance(Moments.fit([found[: size * repeats]], parts=1), reference)
    mean, low, high = mean_interval(np.array(values))
    return Distance(values, mean, low, high, pooled, size, reference.count, extractor)


def floor(real: torch.Tensor, reference: Moments, samples: int, repeats: int, extractor: str) -> Distance:
    """The distance of real images to the reference at the same counts: the level that nothing real beats.

    Args:
        real: features [N, F] of images that are not in the reference.
        samples: images a repeat; where ``real`` holds fewer, all of it is used and the counts say so.
        repeats: at most; only as many as fit without sharing images.
    """
    size = min(samples, len(real))
    disjoint = min(repeats, len(real) // size)
    order = torch.randperm(len(real), generator=generator(7, 0))
    whole = frechet_distance(Moments.fit([real], parts=1), reference)
    # Repeats that share images are not independent: as many as fit without sharing, and no interval for one.
    result = distance(real[order[: size * disjoint]], reference, disjoint, extractor)
    return replace(result, pooled=whole)
