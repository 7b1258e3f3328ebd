"""Class entropy: how open the class of a noised state still is, in nats.

    law with classes    H[c | x_sigma] = E[-sum_c p(c | x) log p(c | x)], exact
    network             H[c | x_sigma] <= E[-log r(c | D(x, sigma))] for any classifier r

Source: derived (the cross-entropy of any classifier bounds the conditional entropy from above).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Levels, crossing, curve, levels, mean_curve, passing_time, root_time
from symbreak.intervals import resampled
from symbreak.laws.class_posterior import Labels, by_class, features_of, labels_of, mixture_of, posterior_average
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.networks.denoiser import Batches, Denoiser, as_denoiser, fingerprints, images_for
from symbreak.phases.losses import nowhere, pieces, posterior_mean
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run, renamed

__all__ = ["ClassEntropy", "class_entropy", "class_entropy_bound"]

STRENGTHS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)  # inverse penalties of the regression that are tried
FOLDS = 3
COMPONENTS = 32  # principal components as features, at most
BOUND = "class_entropy_bound(network, sigma, images, labels, fit_images, fit_labels)"


@dataclass(frozen=True, kw_only=True)
class ClassEntropy(Curve):
    """H[c | x_sigma] in nats: a `Curve`, exact for a law, an upper bound in expectation for a network.

    Attributes:
        total: H[c], the entropy of the classes themselves.
        seed: of the draws, or of the bootstrap.
        scores: -log r(c | x) [G, N] of every held-out image; empty where the curve is exact.
        labels: classes [N] of those images.
        law, samples: what the exact curve was computed from.
    """

    record = (*Curve.record, "total", "images")

    total: float
    seed: int
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    law: Mixture | None = None
    samples: int = 0

    @property
    def images(self) -> int:
        """Number of held-out images."""
        return len(self.labels)

    @property
    def bits(self) -> Curve:
        """The curve in bits."""
        return self.map(lambda v: v / math.log(2), f"{self.name} (bits)")

    def time(self, share: float = 0.5, resamples: int = 1000) -> CriticalTime:
        """The level where it passes a share of H[c]: above it the class is open, below it is decided.

        The interval is a bootstrap over held-out images (the fitted classifiers are kept), or the Monte Carlo error
        of an exact curve, and missing where that has none.
        """
        order = np.argsort(np.atleast_1d(self.sigma))
        sigma, value = np.atleast_1d(self.sigma)[order], np.atleast_1d(self.value)[order]
        target, criterion = share * self.total, f"class entropy at {share:g} H[c]"
        why = nowhere(sigma, value, target)
        if self.law is not None:
            near = crossing(sigma, value, target)
            if near is None:
                return CriticalTime(None, criterion=criterion, source="derived", reason=why)
            i = int(np.clip(np.searchsorted(sigma, near), 1, max(1, len(sigma) - 1)))
            ends = math.log(sigma[i - 1]), math.log(sigma[min(i, len(sigma) - 1)])
            average = partial(_exact, self.law, samples=self.samples, seed=self.seed)
            return root_time(average, target, ends, criterion=criterion, source="derived")
        members = (self.labels == np.unique(self.labels)[:, None]).astype(float)
        totals = np.append(self.total, _entropy(resampled(members, self.seed, resamples)))
        curves = np.concatenate([value[None], resampled(self.scores[order], self.seed, resamples)])
        source = f"derived; classifier on denoised images, {self.images} held out"
        return passing_time(sigma, curves, share * totals, why, criterion, source)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {**super().to_dict(), "time": self.time().to_dict()}


@renamed(**dict.fromkeys(("images", "labels", "fit_images", "fit_labels", "features", "draws"), BOUND))
def class_entropy(law: Law, sigma: Levels, samples: int = 20000, seed: int = 0) -> ClassEntropy:
    """How open the class of a law's noised state still is, H[c | x_sigma] in nats, exactly.

    Of a network see `class_entropy_bound`.

    Args:
        law: a `Mixture` or `PrincipalMixture`.
        sigma: a level, or levels [G].
        samples: draws of a law that has no quadrature.
        seed: of the draws, which all levels share.

    Returns:
        A `ClassEntropy`; its ``time()`` is where half of H[c] is passed.

    Raises:
        InputError: for a law without classes, or with a single one.

    Source: derived.

    >>> law = Mixture.from_parameters([[-1.0], [1.0]], 0.0)
    >>> [round(float(v), 7) for v in class_entropy(law, [0.5, 1.0, 2.0]).value]      # two points: H[x_0 | x]
    [0.060427, 0.3563164, 0.5817257]
    """
    s, shape = levels(sigma)
    mixture = mixture_of(getattr(law, "inner", law))
    total = float(_entropy(mixture.class_weights.numpy()))
    if not total > 0:
        raise InputError("all components are of a single class; expected at least two classes.")
    exact = curve(s, shape, *_exact(mixture, s, samples, seed), name="class entropy")
    return exact.extended(ClassEntropy, total=total, law=mixture, samples=samples, seed=seed)


def class_entropy_bound(
    denoiser: Law | Denoiser,
    sigma: Levels,
    images: Batches,
    labels: Labels,
    fit_images: Batches,
    fit_labels: Labels | None,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    draws: int = 1,
    run: Run | None = None,
) -> ClassEntropy:
    """A bound from above on how open the class still is in a network's view, in nats.

        E[-log r(c | D(x, sigma))] >= H[c | x_sigma], r a logistic regression for every level

    The regression is fitted on features of denoised images of one set and scored on another, its penalty chosen by
    cross-validation on the first. The bound is loose where the features of D do not hold what x tells; a level read off
    it is then too low, and its interval does not hold this.

    Args:
        denoiser: a network as a `Denoiser`, or a law.
        sigma: a level, or levels [G].
        images, labels: held-out images [N, *S] and their classes [N].
        fit_images, fit_labels: images [M, *S] that the regression is fitted on and their classes, others than the
            held-out ones.
        features: denoised images [B, *S] -> features [B, F], e.g. a classifier's logits; by default the leading
            principal coordinates of the images to fit on, at most 32.
        seed: of the noise, which all levels share.
        draws: noise draws of every image to fit on.
        run: a finished part a level, and progress in levels.

    Returns:
        A `ClassEntropy`; its ``time()`` is where half of H[c] is passed.

    Raises:
        InputError: for labels of another number, a single class, classes with fewer than 3 images to fit on, or
            features that are no finite [B, F].

    Source: derived (the cross-entropy of any classifier bounds the conditional entropy from above).
    """
    (s, shape), network = levels(sigma), as_denoiser(denoiser)
    scored, fitted = (images_for(network, v, s) for v in (images, fit_images))
    classes, code, target = _codes(labels_of(labels, len(scored)), labels_of(fit_labels, len(fitted), "fit_labels"))
    look = features or _principal(fitted)

    def level(u: float) -> Arrays:
        def seen(data: torch.Tensor, *key: int) -> np.ndarray:
            parts = (features_of(look, posterior_mean(network, x, u)) for _, _, x in pieces(data, u, seed, 31, *key))
            return np.concatenate(list(parts))

        fit = np.concatenate([seen(fitted, 1, draw) for draw in range(draws)])
        return {"scores": _scored(fit, target, seen(scored, 2, 0), code, len(classes))}

    run = run or Run()
    known = features and features_of(features, fitted[:32]).tolist()
    data = (scored, torch.from_numpy(code), fitted, torch.from_numpy(target))
    settings = (*fingerprints(run, network), *data, known, s.tolist(), seed, draws)
    parts = run.parts("class-entropy", s.tolist(), level, *settings)
    scores = np.stack([part["scores"] for part in parts])
    bound = mean_curve(s, scores, "class entropy (upper bound)", shape=shape)
    total = float(_entropy(np.bincount(code, minlength=len(classes)) / len(code)))
    return bound.extended(ClassEntropy, total=total, scores=scores, labels=code, seed=seed)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis."""
    out: np.ndarray = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return out


def _exact(mixture: Mixture, sigma: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H[c | x_sigma] of a mixture and its interval at levels [G]."""
    openness = by_class(mixture, lambda log_p: -(log_p.exp() * log_p).sum(-1))
    return posterior_average(mixture, sigma, openness, samples, seed)


def _codes(labels: np.ndarray, fit_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, and their number for every held-out image and every image to fit on."""
    classes, members = np.unique(fit_labels, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"the images to fit on have a single class, {classes[0]}; expected at least two.")
    if members.min() < FOLDS:
        i = int(members.argmin())
        raise InputError(f"class {classes[i]} has {members[i]} images to fit on; at least {FOLDS} are needed. Drop it.")
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise InputError(f"held-out images have the class {unknown[0]}, which no image to fit on has. Add some.")
    return classes, np.searchsorted(classes, labels), np.searchsorted(classes, fit_labels)


def _principal(data: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Leading principal coordinates of a data set as features."""
    mean = data.mean(0)
    count = max(1, min(COMPONENTS, len(data) // 8, data[0].numel()))
    vectors = torch.linalg.svd((data - mean).flatten(1), full_matrices=False)[2][:count]
    return lambda x: (x.to(mean) - mean).flatten(1) @ vectors.T


def _scored(fit: np.ndarray, target: np.ndarray, seen: np.ndarray, code: np.ndarray, classes: int) -> np.ndarray:
    """-log r(c | features) [N] of held-out images, by a regression with the penalty that cross-validates best.

    Args:
        fit: features [draws M, F] of M images, draw after draw.
        target: classes [M].
        seen, code: features [N, F] and classes [N] of the held-out images.
        classes: their number.
    """
    from sklearn.linear_model import LogisticRegression

    centre, scale = fit.mean(0), fit.std(0)
    scale = np.where(scale > 1e-12 * (1e-300 + np.abs(centre)), scale, 1.0)
    fit, seen = (fit - centre) / scale, (seen - centre) / scale

    def score(model: LogisticRegression, c: float, train: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odds = model.set_params(C=c).fit(fit[train], target[train]).decision_function(x)
        odds = np.stack([np.zeros_like(odds), odds], 1) if classes == 2 else odds
        out: np.ndarray = -torch.log_softmax(torch.from_numpy(odds), 1).numpy()[np.arange(len(y)), y]
        return out

    # Every class in every fold, and all draws of an image in one: images go to the folds in the order of their class.
    fold, draws = np.empty(len(target), dtype=int), len(fit) // len(target)
    fold[np.argsort(target, kind="stable")] = np.arange(len(target)) % FOLDS
    fold, target = np.tile(fold, draws), np.tile(target, draws)
    models = [LogisticRegression(max_iter=500, tol=1e-3, warm_start=True) for _ in range(FOLDS + 1)]
    best, strength = math.inf, STRENGTHS[0]
    for c in STRENGTHS:
        left_out = ((fold == f, models[f]) for f in range(FOLDS))
        loss = sum(float(score(model, c, ~out, fit[out], target[out]).sum()) for out, model in left_out)
        if loss > 1.02 * best:
            break  # from here on the regression learns its images by heart
        if loss < best:
            best, strength = loss, c
    return score(models[-1], strength, np.ones(len(target), dtype=bool), seen, code)
