"""Is everything there? Class composition and its entropy, precision and recall, density, coverage, Vendi score.

Precision is the share of samples that lie within the real data's neighbourhoods, recall the share of real
images that lie within the samples' (Kynkäänniemi et al., arXiv:1904.06991); a neighbourhood reaches to a
point's k-th nearest neighbour in its own set. Density and coverage (Naeem et al., arXiv:2002.09797, the authors'
``prdc``) and the Vendi score (Friedman & Dieng, arXiv:2210.02410, the authors' ``vendi-score``) come from optional
packages. All depend on the counts, which are therefore said.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from scipy import stats

from symbreak.intervals import jackknife, mean_interval
from symbreak.laws.class_posterior import class_of
from symbreak.metrics.extractors import BATCH, device_of
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import from_each, own_rows
from symbreak.runtime.run import padded_blocks

__all__ = [
    "class_counts",
    "class_entropy",
    "composition",
    "density_coverage",
    "entropy_interval",
    "precision_recall",
    "vendi_score",
]

BLOCK = 1024
DENSE_ROWS = 2000  # prdc forms whole matrices of distances
CLASSES = "classes"  # the name of the only attribute of a classifier that gives no names


def class_entropy(labels: torch.Tensor, classes: int) -> float:
    """Shannon entropy in bits of class labels [N] of 0 .. classes - 1; log2(classes) is the largest."""
    if len(labels) == 0:
        raise InputError("no labels; the entropy of nothing is not defined.")
    return _entropy(torch.bincount(labels, minlength=classes).numpy())


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def entropy_interval(counts: Any, confidence: float = 0.95) -> dict[str, float]:
    """Entropy in bits of a law from counts of its classes, corrected for the count, with an interval.

        H = H_plug-in + (K - 1) / (2 N ln 2)        K classes that occur (Miller-Madow)
        Var = (sum p log2(p)^2 - H^2) / N + (K - 1) / (2 N^2 ln(2)^2)

    The first term of the variance is the delta method's; it vanishes where all classes are equally frequent, and the
    second, that of the chi-squared error there, takes its place.

    Args:
        counts: [K] how often each class occurred.
        confidence: nominal coverage.

    Returns:
        ``value``, ``low``, ``high`` in bits, cut to 0 .. log2(len(counts)), and ``plug_in``.

    Raises:
        InputError: where all counts are 0.

    >>> entropy_interval([50, 50])["plug_in"]
    1.0
    """
    n = np.asarray(counts, dtype=np.float64)
    total = n.sum()
    if not total > 0:
        raise InputError("no labels; the entropy of nothing is not defined.")
    share = n[n > 0] / total
    plug_in = _entropy(n)
    extra = len(share) - 1
    variance = max(0.0, float((share * np.log2(share) ** 2).sum()) - plug_in**2) / total
    variance += extra / (2 * total**2 * math.log(2) ** 2)
    most = math.log2(len(n))
    value = plug_in + extra / (2 * total * math.log(2))
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    low, value, high = (min(max(0.0, v), most) for v in (value - half, value, value + half))
    return {"value": value, "low": low, "high": high, "plug_in": plug_in}


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    found = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


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
    found: dict[str, np.ndarray] = {}
    own, _, shared = own_rows(batches, BATCH)
    where = device_of(classify)
    for block, rows in padded_blocks([own] if isinstance(own, torch.Tensor) else own, BATCH):
        with torch.inference_mode():
            out = classify(block.to(where))
        by_name = out if isinstance(out, Mapping) else {CLASSES: out}
        for name, values in by_name.items():
            labels = class_of(lambda _, v=values: v, block)[:rows]  # type: ignore[misc]
            if len(labels) and labels.min() < 0:
                raise InputError(f"classify gave the class {labels.min()}; expected classes of 0 or more.")
            width = values.shape[1] if getattr(values, "ndim", 1) == 2 else 0
            had = found.get(name, np.zeros(0, np.int64))
            counts = np.bincount(labels, minlength=max(width, len(had)))
            counts[: len(had)] += had
            found[name] = counts
    if not found:
        raise InputError("no images to classify; expected at least one.")
    each = from_each(found, shared)
    widths = {name: max(len(one[name]) for one in each) for name in found}
    return {
        name: sum((np.pad(one[name], (0, width - len(one[name]))) for one in each), np.zeros(width, np.int64))
        for name, width in widths.items()
    }


def composition(
    train: dict[str, np.ndarray], samples: dict[str, np.ndarray], names: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """The composition table: for every attribute each class's share and the entropy in bits, in two columns.

    Args:
        train, samples: what `class_counts` gave of the training images and of the samples.
        names: names of the classes by attribute, where known.

    Returns:
        One dictionary an attribute: ``attribute``; ``rows`` of ``class``, ``train`` and ``samples`` (count, share and
        its Wilson interval); ``entropy`` of both columns (`entropy_interval`) and the largest possible.
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
                "entropy": {side: entropy_interval(n) for side, n in columns.items()} | {"largest": math.log2(k)},
                "counts": {side: int(n.sum()) for side, n in columns.items()},
            }
        )
    return tables


def _share(hits: int, count: int) -> dict[str, Any]:
    low, high = share_interval(hits, count)
    return {"count": hits, "share": hits / count, "share_low": low, "share_high": high}


def precision_recall(found: torch.Tensor, real: torch.Tensor, k: int = 3) -> dict[str, Any]:
    """Precision and recall of features [N, F] against real ones [M, F].

    Distances are formed in blocks of 1,024 x M. The intervals are Wilson's, of the points given the neighbourhoods.

    Raises:
        InputError: with k or fewer rows on either side.
    """
    if min(len(found), len(real)) <= k:
        raise InputError(f"{len(found)} samples and {len(real)} real images; expected more than k = {k} of each.")
    a, b = found.double(), real.double()
    out: dict[str, Any] = {}
    for name, points, by in (("precision", a, b), ("recall", b, a)):
        hits = _covered(points, by, k)
        low, high = share_interval(hits, len(points))
        out |= {name: hits / len(points), f"{name}_low": low, f"{name}_high": high}
    return {**out, "k": k, "samples": len(a), "reference": len(b)}


def _covered(points: torch.Tensor, by: torch.Tensor, k: int) -> int:
    """How many points lie within the k-th neighbour distance of any row of ``by``."""
    # The nearest of a row in its own set is itself.
    reach = torch.cat([torch.cdist(part, by).kthvalue(k + 1, dim=1).values for part in by.split(BLOCK)])
    return sum(int((torch.cdist(part, by) <= reach).any(1).sum()) for part in points.split(BLOCK))


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{what}: not installed. pip install 'symbreak[diversity]'.") from None


def density_coverage(
    found: torch.Tensor, real: torch.Tensor, k: int = 5, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Density and coverage of features [N, F] against real ones [M, F], by the authors' package ``prdc``.

    Both sets are cut into ``repeats`` disjoint random parts of one size, at most 2,000 rows (the package forms whole
    matrices of distances); the mean over the parts has a Student-t interval.

    Raises:
        InputError: without ``prdc``, or with k or fewer rows a part.
    """
    prdc = _package("prdc", "density and coverage")
    size = min(len(found) // repeats, len(real) // repeats, DENSE_ROWS)
    if size <= k:
        raise InputError(
            f"{len(found)} samples and {len(real)} real images in {repeats} parts; expected more than k = {k} a part."
        )
    orders = [
        torch.randperm(len(z), generator=generator(seed, 19, side))[: size * repeats].split(size)
        for side, z in enumerate((found, real))
    ]
    values = []
    for a, b in zip(*orders):
        with redirect_stdout(io.StringIO()):  # the package prints
            one = prdc.compute_prdc(real[b].double().numpy(), found[a].double().numpy(), nearest_k=k)
        values.append((float(one["density"]), float(one["coverage"])))
    out: dict[str, Any] = {}
    for name, column in zip(("density", "coverage"), np.array(values).T):
        mean, low, high = mean_interval(column)
        most = 1.0 if name == "coverage" else math.inf  # a share
        out |= {name: mean, f"{name}_low": max(0.0, low), f"{name}_high": min(most, high)}
    return {**out, "k": k, "repeats": repeats, "samples": size, "reference": size}


def vendi_score(found: torch.Tensor, parts: int = 5, seed: int = 0) -> dict[str, Any]:
    """Vendi score of features [N, F] by ``vendi-score``: how many clearly different samples there seem to be.

        exp(-sum_i l_i log l_i)        l the eigenvalues of the cosine similarities, divided by N

    It grows with the count, so it is comparable at equal counts only. The interval is a jackknife over random parts.

    Raises:
        InputError: without ``vendi-score``, or with fewer than 2 rows a part.
    """
    vendi = _package("vendi_score.vendi", "the Vendi score")
    x = found.double().numpy()
    parts = min(parts, len(x) // 2)
    if parts < 2:
        raise InputError(f"{len(x)} samples for a Vendi score; expected at least 4.")

    order = torch.randperm(len(x), generator=generator(seed, 20, 0)).numpy()
    groups = np.array_split(order, parts)
    value = float(vendi.score_dual(x))
    left_out = np.array([float(vendi.score_dual(np.delete(x, group, axis=0))) for group in groups])
    low, high = jackknife(value, left_out)
    return {"value": value, "low": low, "high": high, "parts": parts, "samples": len(x)}
