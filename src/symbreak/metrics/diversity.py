"""Is everything there? Class entropy, and precision and recall of features.

Precision is the share of samples that lie within the real data's neighbourhoods, recall the share of real
images that lie within the samples' (Kynkäänniemi et al., arXiv:1904.06991); a neighbourhood reaches to a
point's k-th nearest neighbour in its own set. Both depend on the counts, which are therefore said.
"""

from __future__ import annotations

from typing import Any

import torch

from symbreak.files import InputError

__all__ = ["class_entropy", "precision_recall"]

BLOCK = 1024


def class_entropy(labels: torch.Tensor, classes: int) -> float:
    """Shannon entropy in bits of class labels [N] of 0 .. classes - 1; log2(classes) is the largest."""
    if len(labels) == 0:
        raise InputError("no labels; the entropy of nothing is not defined.")
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def precision_recall(found: torch.Tensor, real: torch.Tensor, k: int = 3) -> dict[str, Any]:
    """Precision and recall of features [N, F] against real ones [M, F].

    Raises:
        InputError: with k or fewer rows on either side.
    """
    if min(len(found), len(real)) <= k:
        raise InputError(f"{len(found)} samples and {len(real)} real images; expected more than k = {k} of each.")
    a, b = found.double(), real.double()
    return {
        "precision": _covered(a, b, k),
        "recall": _covered(b, a, k),
        "k": k,
        "samples": len(a),
        "reference": len(b),
    }


def _covered(points: torch.Tensor, by: torch.Tensor, k: int) -> float:
    """Share of points that lie within the k-th neighbour distance of any row of ``by``."""
    # The nearest of a row in its own set is itself.
    reach = torch.cat([torch.cdist(part, by).kthvalue(k + 1, dim=1).values for part in by.split(BLOCK)])
    inside = torch.cat([(torch.cdist(part, by) <= reach).any(1) for part in points.split(BLOCK)])
    return float(inside.double().mean())
