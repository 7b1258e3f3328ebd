"""Is everything there? Precision and recall, density and coverage, Vendi score.

Precision is the share of samples that lie within the real data's neighbourhoods, recall the share of real
images that lie within the samples' (Kynkäänniemi et al., arXiv:1904.06991); a neighbourhood reaches to a
point's k-th nearest neighbour in its own set. Density and coverage (Naeem et al., arXiv:2002.09797, the authors'
``prdc``) and the Vendi score (Friedman & Dieng, arXiv:2210.02410, the authors' ``vendi-score``) come from optional
packages. All depend on the counts, which the results therefore name.
"""

from __future__ import annotations

import importlib
import io
import math
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch

from symbreak.intervals import jackknife, mean_interval, proportion
from symbreak.noise import generator
from symbreak.runtime.files import InputError
from symbreak.runtime.plain import Values, plain
from symbreak.runtime.run import renamed

__all__ = ["density_coverage", "precision_recall", "vendi_score"]

BLOCK = 1024
BLOCKS = 10  # of a jackknife
FEW = 20  # rows a part below which coverage's interval covers less than 90 %
DENSE_ROWS = 2000  # prdc forms whole matrices of distances


@renamed(found="samples=...")
def precision_recall(samples: torch.Tensor, real: torch.Tensor, k: int = 3, seed: int = 0) -> Values:
    """Precision and recall of features [N, F] against real ones [M, F].

    Distances are formed in blocks of 1,024 x M. The intervals leave out one of up to 10 random blocks of the samples,
    and one of the real images, at a time (`jackknife`); where all points lie inside, or none does, that says
    nothing, so they hold at least the Clopper-Pearson interval of the points given the neighbourhoods.

    Args:
        samples, real: features of more than k rows each; for an interval 2 (k + 1) of them, else the ends are ``None``.
        k: the neighbour that a neighbourhood reaches to.
        seed: of the blocks.

    Raises:
        InputError: with k or fewer rows on either side.
    """
    if min(len(samples), len(real)) <= k:
        raise InputError(f"{len(samples)} samples and {len(real)} real images; expected more than k = {k} of each.")
    blocks = min(BLOCKS, min(len(samples), len(real)) // (k + 1))
    sides: list[tuple[torch.Tensor, list[int]]] = []
    for side, z in enumerate((samples, real)):
        order = torch.randperm(len(z), generator=generator(seed, 26, side))
        parts = [part.sort().values for part in order.tensor_split(max(1, blocks))]
        sides.append((z.double()[torch.cat(parts)], [len(part) for part in parts]))
    out: Values = {}
    for name, (points, sizes), by in (("precision", sides[0], sides[1]), ("recall", sides[1], sides[0])):
        inside = _covered(points, *by, k).double()
        count, hits = len(inside), float(inside[:, 0].sum())
        value, low, high = hits / count, math.nan, math.nan
        if blocks > 1:
            groups = torch.stack([part.sum() for part in inside[:, 0].split(sizes)]).numpy()
            without_points = (hits - groups) / (count - np.array(sizes))
            exact = proportion(hits, count)
            low, high = jackknife(value, without_points, inside[:, 1:].mean(0).numpy())
            low, high = min(max(0.0, low), exact["low"]), max(min(1.0, high), exact["high"])
        out |= {name: value, f"{name}_low": low, f"{name}_high": high}
    values: Values = plain({**out, "k": k, "blocks": blocks, "samples": len(samples), "reference": len(real)})
    return values


def _covered(points: torch.Tensor, by: torch.Tensor, sizes: list[int], k: int) -> torch.Tensor:
    """Whether points [N] lie within the k-th neighbour distance of any row of ``by``: of all, and without each block.

    Returns:
        [N, 1 + blocks], the blocks being consecutive rows of ``by``.
    """
    whole, left_out = [], []
    for part in by.split(BLOCK):
        # The nearest of a row in its own set is itself. What is nearest in every block says what is without any one.
        near = [d.topk(min(k + 1, d.shape[1]), 1, largest=False).values for d in torch.cdist(part, by).split(sizes, 1)]
        whole.append(torch.cat(near, 1).kthvalue(k + 1, 1).values)
        rest = [torch.cat(near[:b] + near[b + 1 :], 1) for b in range(len(near))] if len(near) > 1 else []
        left_out.append([z.kthvalue(k + 1, 1).values for z in rest])
    reach = [torch.cat(whole)]
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for b in range(len(sizes) if len(sizes) > 1 else 0):
        reach.append(torch.where(block == b, -1.0, torch.cat([rows[b] for rows in left_out])))
    return torch.cat(
        [torch.stack([(d <= r).any(1) for r in reach], 1) for d in (torch.cdist(p, by) for p in points.split(BLOCK))]
    )


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{what}: not installed. pip install 'symbreak[diversity]'.") from None


@renamed(found="samples=...")
def density_coverage(samples: torch.Tensor, real: torch.Tensor, k: int = 5, repeats: int = 5, seed: int = 0) -> Values:
    """Density and coverage of features [N, F] against real ones [M, F], by the authors' package ``prdc``.

    Both sets are cut into ``repeats`` disjoint random parts of one size, at most 2,000 rows (the package forms whole
    matrices of distances); the mean over the parts has a Student-t interval, from 20 rows a part on; below,
    ``None`` and the ``reason``.

    Raises:
        InputError: without ``prdc``, or with fewer than k + 2 rows a part.
    """
    prdc = _package("prdc", "density and coverage")
    size = min(len(samples) // repeats, len(real) // repeats, DENSE_ROWS)
    if size < k + 2:  # the package asks for one neighbour more
        raise InputError(
            f"{len(samples)} samples and {len(real)} real images in {repeats} parts; expected k + 2 = {k + 2} a part."
        )
    orders = [
        torch.randperm(len(z), generator=generator(seed, 19, side))[: size * repeats].split(size)
        for side, z in enumerate((samples, real))
    ]
    values = []
    for a, b in zip(*orders):
        with redirect_stdout(io.StringIO()):  # the package prints
            one = prdc.compute_prdc(real[b].double().numpy(), samples[a].double().numpy(), nearest_k=k)
        values.append((float(one["density"]), float(one["coverage"])))
    out: Values = {}
    for name, column in zip(("density", "coverage"), np.array(values).T):
        mean, low, high = mean_interval(column)
        most = 1.0 if name == "coverage" else math.inf  # a share
        out |= {name: mean, f"{name}_low": max(0.0, low), f"{name}_high": min(most, high)}
    if size < FEW:
        said = f"{size} images a part; an interval needs {FEW}: of fewer, the parts' values are too far from normal."
        out |= {"density_low": None, "density_high": None, "coverage_low": None, "coverage_high": None, "reason": said}
    return {**out, "k": k, "repeats": repeats, "samples": size, "reference": size}


@renamed(found="samples=...")
def vendi_score(samples: torch.Tensor, parts: int = 5, seed: int = 0) -> Values:
    """Vendi score of features [N, F] by ``vendi-score``: how many clearly different samples there seem to be.

        exp(-sum_i l_i log l_i)        l the eigenvalues of the cosine similarities, divided by N

    It grows with the count, so it is comparable at equal counts only. The interval is a jackknife over random parts.

    Raises:
        InputError: without ``vendi-score``, or with fewer than 2 rows a part.
    """
    vendi = _package("vendi_score.vendi", "the Vendi score")
    x = samples.double().numpy()
    parts = min(parts, len(x) // 2)
    if parts < 2:
        raise InputError(f"{len(x)} samples for a Vendi score; expected at least 4.")

    order = torch.randperm(len(x), generator=generator(seed, 20, 0)).numpy()
    groups = np.array_split(order, parts)
    if len(x) < x.shape[1]:  # in the space that the rows span they have the same similarities, and fewer eigenvalues
        x = np.asarray(np.linalg.qr(x.T, mode="r")).T
    value = float(vendi.score_dual(x))
    left_out = np.array([float(vendi.score_dual(np.delete(x, group, axis=0))) for group in groups])
    low, high = jackknife(value, left_out)
    return {"value": value, "low": low, "high": high, "parts": parts, "samples": len(x)}
