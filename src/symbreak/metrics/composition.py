"""What a set of images is made of: how often each class occurs, and the entropy of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from symbreak.intervals import DRAWS_A_CLASS, entropy_interval, proportion
from symbreak.laws.class_posterior import class_of
from symbreak.metrics.extractors import BATCH, device_of
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.ranks import from_each, own_rows
from symbreak.runtime.run import padded_blocks

__all__ = ["CLASSES", "class_counts", "class_entropy", "composition"]

CLASSES = "classes"  # the name of the only attribute of a classifier that gives no names


def class_entropy(labels: torch.Tensor, classes: int) -> float:
    """Shannon entropy in bits of class labels [N] of 0 .. classes - 1; log2(classes) is the largest."""
    return entropy_interval(torch.bincount(labels, minlength=classes).numpy())["plug_in"]


def class_counts(classify: Callable[[torch.Tensor], Any], batches: Iterable[torch.Tensor]) -> dict[str, np.ndarray]:
    """How often a classifier gives each class: for every attribute counts [K].

    Args:
        classify: images [B, C, H, W] -> classes [B] or scores [B, K] (the largest, the dominant attribute, counts), or
            a dictionary of such by the attribute's name.
        batches: the images, which ranks share where they are `Images` or one tensor; the classifier sees them in padded
            batches of 256.

    Raises:
        InputError: for NaN, fractions, negative classes or another shape.
    """
    totals: dict[str, np.ndarray] = {}
    part, _, shared = own_rows(batches, BATCH)
    where = device_of(classify)
    for block, rows in padded_blocks([part] if isinstance(part, torch.Tensor) else part, BATCH):
        with torch.inference_mode():
            out = classify(block.to(where))
        by_name = out if isinstance(out, Mapping) else {CLASSES: out}
        for name, values in by_name.items():
            labels = class_of(lambda _, v=values: v, block)[:rows]  # type: ignore[misc]
            if len(labels) and labels.min() < 0:
                raise InputError(f"classify gave the class {labels.min()}; expected classes of 0 or more.")
            width = values.shape[1] if getattr(values, "ndim", 1) == 2 else 0
            before = totals.get(name, np.zeros(0, np.int64))
            totals[name] = np.bincount(labels, minlength=max(width, len(before)))
            totals[name][: len(before)] += before
    if not totals:
        raise InputError("no images to classify; expected at least one.")
    each = from_each(totals, shared)
    widths = {name: max(len(one[name]) for one in each) for name in totals}
    return {
        name: sum((np.pad(one[name], (0, width - len(one[name]))) for one in each), np.zeros(width, np.int64))
        for name, width in widths.items()
    }


def composition(
    train: dict[str, np.ndarray], samples: dict[str, np.ndarray], names: Mapping[str, list[str]]
) -> list[Values]:
    """The composition table: for every attribute each class's share and the entropy in bits, in two columns.

    Args:
        train, samples: what `class_counts` gave of the training images and of the samples.
        names: names of the classes by attribute, where known.

    Returns:
        One dictionary an attribute: ``attribute``; ``rows`` of ``class``, ``train`` and ``samples`` (count, share and
        its Clopper-Pearson interval); ``entropy`` of both columns (`entropy_interval`) and the largest possible.
    """
    tables = []
    for attribute, left in train.items():
        right = samples[attribute]
        known = names.get(attribute, [])
        k = max(len(left), len(right), len(known))
        columns = {"train": np.pad(left, (0, k - len(left))), "samples": np.pad(right, (0, k - len(right)))}
        rows = [
            {
                "class": known[c] if c < len(known) else str(c),
                **{side: _share(int(n[c]), int(n.sum())) for side, n in columns.items()},
            }
            for c in range(k)
        ]
        tables.append(
            {
                "attribute": attribute,
                "rows": rows,
                "entropy": {side: _entropy(n) for side, n in columns.items()} | {"largest": math.log2(k)},
                "counts": {side: int(n.sum()) for side, n in columns.items()},
            }
        )
    return tables


def _share(hits: int, count: int) -> Values:
    share = proportion(hits, count)
    return {"count": hits, "share": share["share"], "share_low": share["low"], "share_high": share["high"]}


def _entropy(counts: np.ndarray) -> Values:
    """An entropy with its interval, or why it has none."""
    entropy: Values = plain(entropy_interval(counts))
    if entropy["low"] is None:
        few = f"{counts.sum():,} images of {len(counts):,} classes; an interval needs {DRAWS_A_CLASS} a class"
        entropy["reason"] = f"{few}. The entropy of classes that hardly occur is not seen."
    return entropy
