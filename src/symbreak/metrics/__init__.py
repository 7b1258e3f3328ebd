"""Evaluation: arrays in, numbers out."""

from __future__ import annotations

from typing import Any

import torch

from symbreak.data import Images
from symbreak.files import InputError
from symbreak.metrics.features import Extractor, extractor, features
from symbreak.metrics.fid import Distance, distance, floor
from symbreak.metrics.memorization import nearest_summary
from symbreak.moments import Moments

__all__ = ["Distance", "Extractor", "default_extractor", "distance", "evaluate", "extractor", "features", "floor"]


def default_extractor(data: Images) -> str:
    """The extractor for a data set where none is named: the bundled one for the digits, else pixels."""
    return "digits-classifier" if data.name.startswith("digits") and data.shape == (1, 8, 8) else "pixels"


def evaluate(
    samples: torch.Tensor | Images,
    data: Images,
    holdout: Images | None = None,
    *,
    features_in: str | Any | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """How far samples are from held-out images, and whether they copy the training images.

    Args:
        samples: images [N, C, H, W] in [-1, 1], or `Images`.
        data: the training images (the floor and the nearest neighbours are taken from them).
        holdout: images to measure against; without it ``data`` is split in stratified halves.
        features_in: extractor or its name (see `extractor`).
        repeats: parts the samples are cut into for the interval.

    Returns:
        ``distance`` and ``floor`` (each with counts, interval, extractor) and ``neighbours``.

    Raises:
        InputError: where sizes differ or too few samples came.
    """
    x = samples if isinstance(samples, torch.Tensor) else samples.tensor()
    if holdout is None:
        data, holdout = data.split(0.5)
    for name, shape in (("the samples", tuple(x.shape[1:])), ("the held-out images", holdout.shape)):
        if shape != data.shape:
            raise InputError(f"{name} have the shape {shape}, the training images {data.shape}. Resize them.")
    name = features_in or default_extractor(data)
    extract = extractor(name, data) if isinstance(name, str) else name
    reference = Moments.fit([features(extract, holdout)], parts=1)
    real = features(extract, data)
    found = distance(features(extract, [x]), reference, repeats, extract.name)
    return {
        "distance": found.to_dict(),
        "floor": floor(real, reference, found.samples, repeats, extract.name).to_dict(),
        "neighbours": nearest_summary(x, data.tensor(), holdout.tensor()),
    }
