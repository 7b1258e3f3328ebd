"""The law that a network is trained below: fitted, with what it does not know and where it answers alone.

The law knows its own training images better than others at low noise, where a network would learn to correct what the
law has by heart. So held-out images measure its error, and the network is trained at laws of folds, each fitted without
the images that it is asked about.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from symbreak.data.held_out import HeldOut, held_out
from symbreak.data.images import Images
from symbreak.intervals import proportion
from symbreak.laws import Empirical, Gaussian, PrincipalMixture
from symbreak.laws.law import Law
from symbreak.laws.nearest_neighbours import neighbours
from symbreak.laws.saving import law_hash
from symbreak.moments.one_pass import LowRankMoments
from symbreak.networks.families import denoiser
from symbreak.networks.residual import LawResidual, law_error, law_size
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Network
from symbreak.noise import NoiseLevel, schedule
from symbreak.phases.collapse import collapse_time
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.start.choose import check_range
from symbreak.start.fit import CHOOSERS, FEWEST, cluster_count, gaussian_law, late_start
from symbreak.start.late_start import LateStart, LateStartWarning
from symbreak.start.objectives import noising
from symbreak.start.recipe import Recipe

__all__ = ["TOP", "TrainingLaw", "fading", "training_law"]

TOP = 0.75  # of the leading mode's standard deviation: the level above which the law answers alone
KNOWS = 0.81  # of the noise's squared error: where the law's is larger, it knows little
STEPS = 5  # network evaluations that the start is chosen for
COLLAPSED = 2000  # training images that the collapse level is computed from, and copies are looked for among
DRAWS = 256  # of the law, for copies


@dataclass(frozen=True)
class TrainingLaw:
    """A law and what training below it needs.

    Attributes:
        law: the law that the trained network is added to.
        folds: laws for training, the k-th without the images at positions k modulo their number.
        parts: the images that are trained on, and those kept back.
        fade: sigma below which the law gives way to an isotropic Gaussian, see `law_answer`.
        error: the law's mean squared error per element on those kept back, see `law_error`.
        top: sigma above which the law answers alone.
        collapse: sigma below which the training images can be told apart, ``None`` where there is none.
        copies: how many of 256 draws of the law are copies of training images, with the share's interval; ``held_out``
            says the same of the images kept back.
    """

    law: Any
    folds: tuple[Any, ...]
    parts: HeldOut
    error: torch.Tensor
    fade: float
    top: float
    collapse: float | None
    copies: Values

    def residual(self, network: torch.nn.Module) -> LawResidual:
        """Law and network as one denoiser."""
        return LawResidual(self.law, network, error=self.error, top=self.top, fade=self.fade, second_input=True)

    def start(self, unet: Network) -> LateStart:
        """The late start of a trained network: chosen with the images that were kept back."""
        base = noising()
        holdout, conditional = self.parts.test, bool(unet.config.get("num_class_embeds"))
        start = late_start(
            scheduler("dpm++2m-karras", like=base),
            self.law,
            STEPS,
            denoiser=denoiser(unet, base),
            data=holdout,
            labels=holdout.labels if conditional else None,
            check=False,
        )
        if start.law is None:  # white noise was found cheaper; the law above the level is what the network was made for
            start = late_start(start.full, self.law, STEPS, at=NoiseLevel(self.top), check=False)
        return start.of(holdout)

    def to_dict(self) -> Values:
        """Plain values, for records."""
        return {
            "law": repr(self.law),
            "law_hash": law_hash(self.law),
            "top": self.top,
            "fade": self.fade,
            "folds": len(self.folds),
            "collapse": self.collapse,
            "law_copies": self.copies,
            "law_error": self.error.tolist(),
            "held_out": self.parts.to_dict(),
        }


def training_law(data: Images, recipe: Recipe, law: Law | str) -> TrainingLaw:
    """Fit the law to train below, or take one, and measure it.

    Args:
        data: all images; up to 256 of them are kept back.
        recipe: ``clusters``, ``folds``, ``top`` and ``conditional``.
        law: ``"auto"``, or a law of the data's shape.

    Raises:
        InputError: for too few images, a law of another shape or range, or a top outside of the noise levels.
    """
    if isinstance(law, str) and law != "auto":
        raise InputError(f"law={law!r}; expected 'auto' or a law such as sb.Gaussian.fit(data).")
    if not isinstance(law, str) and tuple(law.shape) != tuple(data.shape):
        raise InputError(
            f"a law of shape {tuple(law.shape)} for data of {tuple(data.shape)}. Fit it on the data, or pass 'auto'."
        )
    if len(data) < 10 * FEWEST:
        raise InputError(
            f"{data.name} has {len(data)} {data.noun}, of which a tenth is kept back to measure with; expected "
            f"at least {10 * FEWEST}. Pass more, or train without a law (without --residual)."
        )
    # the digits' other half is what networks are evaluated on
    parts = held_out(data, None, min(0.1, CHOOSERS / len(data)), fewest=FEWEST, bundled=False)
    held = parts.test.tensor()
    whole: Any = law
    folds: tuple[Any, ...] = (law,)
    if isinstance(law, str):
        whole = _fitted(parts.train, recipe, None)
        index, k = np.arange(len(parts.train)), min(recipe.folds, len(parts.train) // 32)
        rests = [parts.train.take(index[index % k != fold], f"fold {fold}") for fold in range(k)] if k > 1 else []
        folds = tuple(_fitted(rest, recipe, whole) for rest in rests) or (whole,)
    else:
        check_range(held, Gaussian.fit(law.sample(512, generator=torch.Generator().manual_seed(0))))
    low, high = schedule(noising()).sigma_range
    top = recipe.top
    if top is None:
        moments = whole.moments
        values = moments.eigenvalues if isinstance(moments, LowRankMoments) else moments.eigh[0]
        top = min(max(TOP * math.sqrt(float(values[0])), 4 * low), high)
    if not low < top <= high:
        raise InputError(f"a residual below sigma {top:.3g}; the noise levels go from {low:.3g} to {high:.4g}.")
    labels = parts.test.labels if recipe.conditional else None
    error = law_error(whole, held, top, low / 2, labels)
    fade = fading(error), law_size(whole)
    error = law_error(whole, held, top, low / 2, labels, fade) if fade[0] else error
    some = parts.train.subset(min(COLLAPSED, len(parts.train))).tensor()
    collapse = collapse_time(Empirical(some)).sigma
    draws = whole.sample(DRAWS, generator=torch.Generator().manual_seed(0))
    known = {row.numpy().tobytes() for row in some}
    new = torch.tensor([row.numpy().tobytes() not in known for row in held])  # images that come twice are no measure
    copies = {**_copies(draws, some), "held_out": _copies(held[new] if int(new.sum()) >= FEWEST else held, some)}
    # by chance 3^-d of points are that near to one; of few different values as many as of images that nobody copied
    if copies["low"] > 0.01 + max(3.0 ** -math.prod(data.shape), copies["held_out"]["high"]):
        warnings.warn(
            f"{copies['count']} of {copies['of']} draws of the law are copies of training images: so will be what is "
            "sampled from it. Use fewer clusters.",
            LateStartWarning,
            stacklevel=5,
        )
    if recipe.top is not None and collapse is not None and top < collapse:
        warnings.warn(
            f"the law answers alone above sigma {top:.3g}, and below {collapse:.3g} the training images can be told "
            "apart: a law that knows them well would replay them. Take a top above that level, or pass more images.",
            LateStartWarning,
            stacklevel=5,
        )
    return TrainingLaw(whole, folds, parts, error, fade[0], top, collapse, copies)


def fading(error: torch.Tensor) -> float:
    """The level below which the law takes away little of the noise's squared error; 0 where there is none."""
    share = error[1] / error[0] ** 2
    first = int((share < KNOWS).nonzero()[0, 0]) if bool((share < KNOWS).any()) else 0
    if first == 0:
        return 0.0
    (a, b), (low, high) = share[first - 1 : first + 1].tolist(), error[0, first - 1 : first + 1].log().tolist()
    return math.exp(low + (high - low) * (a - KNOWS) / (a - b))


def _copies(draws: torch.Tensor, points: torch.Tensor) -> Values:
    """How many draws lie three times nearer to one training image than to the next other one."""
    points = torch.unique(points, dim=0)  # beside an image that comes twice, a copy is as near to both
    if len(points) < 2:
        return proportion(len(draws), len(draws))
    d, _ = neighbours(draws.to(points), points, 2)
    return proportion(int((d[:, 0] < d[:, 1] / 3).sum()), len(draws))


def _fitted(data: Images, recipe: Recipe, like: Any) -> Gaussian | PrincipalMixture:
    """Clusters, within the classes for a conditional network, or a Gaussian where there are too few images.

    ``like`` is the law of all images, of which a fold takes the number of modes and the prior.
    """
    gaussian = gaussian_law(data)
    k = cluster_count(len(data)) if recipe.clusters is None else recipe.clusters
    known = isinstance(like, PrincipalMixture)
    leading, prior = (like.leading, like.prior) if known else (None, None)
    options: Values = {"leading": leading, "prior": prior, "gaussian": gaussian}
    if recipe.conditional and data.labels is not None and int(data.labels.bincount().max()) >= 2:
        return PrincipalMixture.fit(data, labels=True, components=max(k, len(data.labels.unique())), **options)
    if k < 2 or k > len(data) // 2:
        return gaussian
    return PrincipalMixture.fit(data, components=k, **options)
