"""U-turns: a real image is noised to sigma and denoised again. What of it survives?

Source: Sclocchi, Favero, Wyart 2024, arXiv:2402.16991.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Levels, Result, mean_curve
from symbreak.laws.class_posterior import Labels, class_of, classes_by_name, features_of, labels_of
from symbreak.laws.law import Law
from symbreak.networks.denoiser import Batches, Denoiser, images_for
from symbreak.phases.branches import Attributes, Branches, Classify, Paths, Tell, by_attribute, stacked
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["UTurns", "u_turns", "u_turns_by_attribute"]

SOURCE = "arXiv:2402.16991, class change at half of 1 - sum_c p_c pi_c"


@dataclass(frozen=True)
class UTurns(Result):
    """Measured U-turns.

    Attributes:
        classes: share of U-turns that end in another class than that of the image, with bootstrap intervals.
        features: squared feature distance to the image over that of two random images, likewise.
        crossing: level at which the class change passes half of its limit.
        limit: class change at large sigma, 1 - sum_c p_c pi_c (p of the images, pi of the sampler).
        changed, distance: [N, G], averaged over the turns of each image.
        calls: states given to the denoiser.
    """

    record = ("classes", "features", "crossing", "limit", "images", "calls")

    classes: Curve
    features: Curve
    crossing: CriticalTime
    limit: float
    changed: np.ndarray
    distance: np.ndarray
    calls: int

    @property
    def images(self) -> int:
        """Number of images N."""
        return len(self.changed)


@renamed(**dict.fromkeys(("turns", "sigma_start", "sigma_end", "dtype", "resamples"), "paths=sb.Paths(...)"))
def u_turns(
    law_or_denoiser: Law | Denoiser,
    images: Batches,
    sigma: Levels,
    classify: Classify | None = None,
    labels: Labels | None = None,
    features: Callable[[torch.Tensor], object] | None = None,
    steps: int = 40,
    seeds: int = 0,
    paths: Paths | None = None,
    run: Run | None = None,
) -> UTurns:
    """Real images noised to sigma and denoised again: what of them survives?

        x = x_0 + sigma eps, back to x_0' by the reverse SDE;  P(c' != c) = 1 - phi(sigma) where the network is exact

    Args:
        law_or_denoiser: a law, or a denoiser d(x, sigma).
        images: [N, *S], or `Images`.
        sigma: level, or levels [G], at which images turn back.
        classify: as for `clones`.
        labels: classes [N] of the images, in the classifier's numbers; by default classify(images), so that a
            classifier's mistakes are no changes.
        features: images [B, *S] -> [B, F]; by default the pixels. A distance is normalised by the mean squared
            distance of two of the images: it tends to 1 where nothing survives.
        steps, seeds, paths, run: as for `clones`; the bootstrap resamples images. ``paths.turns`` are the U-turns of
            each image at each level.

    Returns:
        `UTurns`. Beside the U-turns one fresh sample is drawn for each of them, for the sampler's own class shares
        and so the limit of large sigma.

    Raises:
        InputError: for images of another shape than the network's, labels of the wrong length, or as `clones`.

    Source: arXiv:2402.16991.
    """
    branches = Branches(law_or_denoiser, sigma, steps, paths)
    x, judge = images_for(branches.denoiser, images, branches.s).to(branches.dtype), branches.classifier(classify)
    origin = class_of(judge, x) if labels is None else labels_of(labels, len(x))
    arrays = _ends(branches, x, judge, features, seeds, run, class_of)
    return _measured(branches, origin, arrays["labels"], arrays["distance"], branches.weights(len(x), seeds))


def u_turns_by_attribute(
    law_or_denoiser: Law | Denoiser,
    images: Batches,
    sigma: Levels,
    classify: Attributes,
    steps: int = 40,
    seeds: int = 0,
    paths: Paths | None = None,
    run: Run | None = None,
) -> dict[str, UTurns]:
    """Which attributes of real images survive noise? One set of `u_turns` serves them all.

    Args:
        law_or_denoiser, images, sigma, steps, seeds, paths, run: as for `u_turns`.
        classify: images [B, *S] float32 -> by the attribute's name classes [B] or scores [B, K]. What it says of the
            images themselves is where they begin, so that its mistakes are no changes.

    Returns:
        `UTurns` by attribute; they share their trajectories, and so the distance in pixels.

    Raises:
        InputError: as `u_turns`.

    Source: arXiv:2402.16991.
    """
    branches = Branches(law_or_denoiser, sigma, steps, paths)
    x = images_for(branches.denoiser, images, branches.s).to(branches.dtype)
    origin = classes_by_name(classify, x)
    arrays = _ends(branches, x, classify, None, seeds, run, classes_by_name)
    w, distance = branches.weights(len(x), seeds), arrays["distance"]
    return {
        name: _measured(branches, origin[name], labels, distance, w) for name, labels in by_attribute(arrays).items()
    }


def _ends(
    branches: Branches,
    x: torch.Tensor,
    judge: Classify | Attributes,
    features: Callable[[torch.Tensor], object] | None,
    seeds: int,
    run: Run | None,
    read: Callable[..., np.ndarray | dict[str, np.ndarray]],
) -> Arrays:
    """Classes [1 + G, turns N] of a fresh sample and of the ends of each U-turn, and feature distances [G, turns N]."""
    s, turns, n = branches.s, branches.paths.turns, len(x)
    if turns < 1:
        raise InputError(f"{turns} turns of each image; expected at least 1.")
    seen = features_of(features or _pixels, x.float())
    scale = 2 * float(seen.var(axis=0, ddof=1).sum())
    if not scale > 0:
        raise InputError("all images have the same features; expected images that differ.")

    def make(rows: np.ndarray, g: torch.Generator, tell: Tell) -> Arrays:
        clean = x[torch.from_numpy(rows % n)]

        def join(j: int, trunks: torch.Tensor) -> torch.Tensor:
            return clean + float(s[j]) * torch.randn(clean.shape, generator=g, dtype=clean.dtype)

        back = branches.images(len(clean), g, tell, join)
        moved = [features_of(features or _pixels, some.float()) - seen[rows % n] for some in back[1:]]
        return {
            **stacked([read(judge, some) for some in back]),
            "distance": np.stack([(a**2).sum(1) / scale for a in moved]),
        }

    return branches.measure(run, "u_turns", n * turns, make, judge, features, x, seeds=seeds)


def _measured(
    branches: Branches, origin: np.ndarray, labels: np.ndarray, distance: np.ndarray, w: np.ndarray
) -> UTurns:
    """What the classes of the images and of the ends say, see `_ends`, with the weights of `Branches.weights`."""
    s, n, turns, count = branches.s, len(origin), branches.paths.turns, len(branches.s)
    ends = labels.reshape(1 + count, turns, n)
    changed = (ends[1:] != origin).mean(1).T
    distance = distance.reshape(count, turns, n).mean(1).T
    classes = np.unique(np.append(ends, origin))
    data = np.stack([origin == c for c in classes], axis=1).astype(float)
    model = np.stack([(ends[0] == c).mean(0) for c in classes], axis=1)
    limit = 1 - ((w @ data) * (w @ model)).sum(1) / n**2
    crossing = branches.halfway(
        1 - w @ changed / n, 1 - limit / 2, classes, "the share of kept classes", criterion="u-turn", source=SOURCE
    )
    return UTurns(
        classes=mean_curve(s, changed.T, "class change of U-turns", w, branches.shape),
        features=mean_curve(s, distance.T, "feature change of U-turns", w, branches.shape),
        crossing=crossing,
        limit=float(limit[0]),
        changed=changed,
        distance=distance,
        calls=n * turns * branches.cost,
    )


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)
