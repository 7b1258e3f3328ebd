"""Classes and clusters of a data set: what the mixtures are fitted to, a Gaussian each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from symbreak.laws.law import flatten
from symbreak.moments.low_rank import Batches
from symbreak.moments.one_pass import Moments
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import from_each, own_rows
from symbreak.runtime.run import padded_blocks

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

__all__ = ["clustered", "coordinates", "kmeans", "labelled"]

PIECE = 2**23  # numbers of the samples whose coordinates are taken at a time


def labelled(batches: Batches, labels: ArrayLike | None) -> tuple[Batches, np.ndarray | None]:
    """A data set that can be walked more than once, and the class [N] of every sample, or ``None``.

    Args:
        batches: `Images`, a tensor [N, *S], or an iterable of batches [B, *S].
        labels: [N] integers; ``True`` takes ``batches.labels``.

    Raises:
        InputError: for ``True`` where the data have no labels.
    """
    if isinstance(batches, torch.Tensor | np.ndarray):
        batches = [batches]
    elif iter(batches) is batches:
        batches = list(batches)
    if labels is True:
        labels = getattr(batches, "labels", None)
        if labels is None:
            raise InputError("labels=True, but the data have no labels. Pass labels=[N] or components=.")
    return batches, None if labels is None else np.asarray(torch.as_tensor(labels).cpu()).reshape(-1)


def kmeans(points: np.ndarray, k: int, seed: int, starts: int = 4) -> KMeans:
    """Fitted k-means of points [N, p], the best of some starts."""
    from sklearn.cluster import KMeans

    return KMeans(k, random_state=seed, n_init=starts).fit(points)


def clustered(batches: Batches, components: int, seed: int, method: str = "k-means", leading: int = 32) -> np.ndarray:
    """A cluster for every sample [N], found on the leading principal components.

    Args:
        batches: see `labelled`.
        components: number of clusters.
        seed: of the clustering.
        method: ``"k-means"``, or ``"em"`` for the most probable component of a Gaussian mixture.
        leading: principal components.
    """
    if components < 1:
        raise InputError(f"{components} components; expected at least 1.")
    if method not in ("k-means", "em"):
        raise InputError(f"unknown method {method!r}. Known: k-means, em.")
    whole = Moments.fit(batches)
    if whole.count < 2 * components:
        raise InputError(f"{whole.count} samples for {components} components; expected at least two each.")
    points = coordinates(batches, whole.mean, whole.eigh[1][:, :leading]).numpy()
    if method == "k-means":
        return np.asarray(kmeans(points, components, seed).labels_)
    from sklearn.mixture import GaussianMixture

    return np.asarray(GaussianMixture(components, random_state=seed, reg_covar=1e-6).fit_predict(points))


def coordinates(batches: Batches, mean: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Coordinates [N, p] float64 of all samples around a mean [*S], batch by batch; ranks share a data set.

    Args:
        batches: of shape [B, *S].
        mean: [*S].
        axes: [d, p]; products are in their dtype: a copy of float32 ones with more digits could fill the memory.

    Raises:
        InputError: for samples of another shape, NaN or infinity.
    """
    parts, flat_mean = [], mean.reshape(-1).to(axes.dtype)
    size = max(1, min(256, PIECE // math.prod(mean.shape)))
    stream, _, shared = own_rows(batches, size)
    tensors = (b if isinstance(b, torch.Tensor) else torch.as_tensor(np.asarray(b)) for b in stream)
    # Products of one size: a row's last bits depend neither on its batch nor on the rank that made it.
    for block, count in padded_blocks(tensors, size):
        rows = flatten(block.float() if block.dtype not in (torch.float32, torch.float64) else block, mean.shape)
        if not bool(torch.isfinite(rows).all()):
            raise InputError("the samples hold NaN or infinity; expected finite numbers.")
        parts.append(((rows.to(axes.dtype) - flat_mean) @ axes).double()[:count])
    each = from_each({"rows": torch.cat(parts).numpy()}, shared)
    return torch.from_numpy(np.concatenate([e["rows"] for e in each]))
