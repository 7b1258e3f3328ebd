"""A first look at copying: how near generated images lie to training images.

A sample counts as memorized when its nearest training image is less than a third as far as the second
nearest, d_1 / d_2 < 1/3 (Bonnaire et al., arXiv:2505.17638). Held-out real images give the scale.
"""

from __future__ import annotations

from typing import Any

import torch

from symbreak.files import InputError

__all__ = ["nearest", "nearest_summary"]

THRESHOLD = 1 / 3


def nearest(samples: torch.Tensor, train: torch.Tensor, block: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [N, 2] to the two nearest training rows, rising, and the index [N] of the nearest.

    Args:
        samples: [N, *S]; train: [M, *S] with M >= 2. Exact differences in float64, block by block.
    """
    if len(train) < 2 or samples.shape[1:] != train.shape[1:]:
        raise InputError(
            f"samples {tuple(samples.shape)} against training images {tuple(train.shape)}; expected equal sizes and at "
            "least 2 training images."
        )
    y = train.reshape(len(train), -1).double()
    distances, index = [], []
    for part in samples.reshape(len(samples), -1).double().split(block):
        d = torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")
        best = d.topk(2, largest=False)
        distances.append(best.values)
        index.append(best.indices[:, 0])
    return torch.cat(distances), torch.cat(index)


def nearest_summary(samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor | None) -> dict[str, Any]:
    """Median nearest distance and share with d_1/d_2 < 1/3, for samples and for held-out images."""

    def one(x: torch.Tensor) -> dict[str, Any]:
        d, _ = nearest(x, train)
        ratio = d[:, 0] / d[:, 1].clamp_min(1e-12)
        return {
            "count": len(x),
            "median_nearest": float(d[:, 0].median()),
            "memorized": float((ratio < THRESHOLD).double().mean()),
        }

    return {
        "features": "pixels",
        "threshold": THRESHOLD,
        "samples": one(samples),
        "held_out": None if held_out is None else one(held_out),
    }
