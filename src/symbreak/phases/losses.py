"""Information: what a noised state tells, read off denoising losses.

With x = x_0 + sigma eps and MMSE(sigma) = E|x_0 - D(x, sigma)|^2, totals over dimensions, all in nats:

    entropy rate        dH[x_0 | x_sigma] / dsigma = MMSE / sigma^3                          (I-MMSE)
    entropic grid       equal steps of the integral of MMSE / sigma^2, the rescaled rate     (arXiv:2504.13612)
    non-Gaussianity     KL(p_sigma || q_sigma) = integral from sigma up of E|D_p - D_q|^2 / u^3 du
                        >= integral of (loss_q - loss_net) / u^3 du, in expectation, on images not trained on
    class entropy       H[c | x_sigma] = E[-sum_c p(c | x) log p(c | x)] <= E[-log r(c | x)] for any classifier r

All levels share their noise, so the curves are smooth in sigma, their integrals are those of a spline in
log sigma, and errors of neighbouring levels are correlated. Intervals are over images.

Source: Guo, Shamai, Verdu 2005 (I-MMSE); the bounds on KL are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from scipy.optimize import brentq

from symbreak.critical import CriticalTime, Curve, crossing, levels, mean_curve, passing_time
from symbreak.intervals import resampled
from symbreak.laws.class_posterior import mixture_of, posterior_average
from symbreak.laws.law import top_eigenvalue
from symbreak.networks.denoiser import CHUNK, LawDenoiser, as_denoiser, ask, images_for
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Arrays, Keep, Progress, in_blocks

__all__ = [
    "ClassEntropy",
    "Losses",
    "NonGaussianity",
    "class_entropy",
    "conditional_entropy",
    "divergence_bound",
    "entropic_levels",
    "entropy_rate",
    "integral_above",
    "loss_curve",
    "non_gaussianity",
]

NUMBERS = 2**24  # numbers of one piece of noised images
TOP = 20.0  # integrals end at this multiple of the data's largest standard deviation
SPACING = 0.25  # largest step of an integral in log sigma
FINE = 16  # points between two levels where a crossing is looked for
THRESHOLD = 0.1  # nats
NATS = "integral of denoising losses (derived, I-MMSE)"
STRENGTHS = (
    1e-3,
    1e-2,
    3e-2,
    0.1,
    0.3,
    1.0,
    10.0,
    100.0,
)  # inverse penalties of the logistic regression that are tried
FOLDS = 3
COMPONENTS = 32  # principal components as features, at most


@dataclass(frozen=True)
class Losses:
    """Denoising errors of a network and of laws on the same noised images, squared norms over all pixels.

    Attributes:
        sigma: rising levels [G].
        network: |x_0 - D|^2 [G, N].
        laws: the same of every law, by name.
        apart: |D - D_law|^2 [G, N] of every law.
        spread: |D - centre|^2 [G, N], the centre being the images' mean unless one was given.
        state: |x - x_0|^2 [G, N], the error of the noised image itself.
        through: |A (x_0 - D)|^2 [G, N] of the network (key ``None``) and the laws, where a map A was given.
    """

    sigma: np.ndarray
    network: np.ndarray
    laws: dict[str, np.ndarray]
    apart: dict[str, np.ndarray]
    spread: np.ndarray
    state: np.ndarray
    through: dict[str | None, np.ndarray] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images N."""
        return self.network.shape[1]

    @property
    def mmse(self) -> Curve:
        """Mean error of the network with its 95 % interval: the MMSE, were the network perfect."""
        return mean_curve(self.sigma, self.network, "denoising loss")

    def law(self, name: str) -> Curve:
        """Mean error of a law."""
        return mean_curve(self.sigma, self._own(name), f"denoising loss, {name}")

    def difference(self, name: str) -> Curve:
        """Mean error of a law less the network's; the interval is of the paired differences."""
        return mean_curve(self.sigma, self._own(name) - self.network, f"loss difference, {name}")

    def _own(self, name: str) -> np.ndarray:
        if name not in self.laws:
            raise InputError(
                f"no losses of {name!r}; there are those of {', '.join(map(repr, self.laws)) or 'no law'}."
            )
        return self.laws[name]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records: curves, not single images."""
        return {
            "images": self.images,
            "network": self.mmse.to_dict(),
            "laws": {name: self.law(name).to_dict() for name in self.laws},
            "difference": {name: self.difference(name).to_dict() for name in self.laws},
        }


def loss_curve(
    denoiser: Any,
    images: Any,
    sigma: Any,
    laws: Mapping[str, Any] | None = None,
    labels: Any = None,
    seed: int = 0,
    draws: int = 1,
    centre: torch.Tensor | None = None,
    through: Callable[[torch.Tensor, float], torch.Tensor] | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Losses:
    """Denoising losses of a network, and of laws beside it.

        |x_0 - D(x_0 + sigma eps, sigma)|^2, one eps an image and the same at every level

    Args:
        denoiser: network as a `Denoiser`, or a law.
        images: [N, *S], an `Images` or batches; best ones that neither network nor laws were fitted on.
        sigma: levels [G]; they are sorted.
        laws: laws with ``.denoise``, by name.
        labels: class [N] of every image, only for a class-conditional network (or law); laws with classes then
            answer with the law of that class.
        seed: of the noise.
        draws: noise draws an image, averaged.
        centre: [*S], what `Losses.spread` is measured from.
        through: a map of residuals [B, *S] at a level, whose squared norms are kept too.
        progress, keep: called as progress(done, levels) and keep("loss/<level number>", make).

    Returns:
        `Losses`.

    Raises:
        InputError: for shapes that do not fit, levels outside the network's range, fewer than 2 images, labels of
            another number, or a network that answers NaN.

    >>> from symbreak.laws.mixture import Mixture
    >>> law = Mixture.from_parameters([[-1.0], [1.0]], 0.0)
    >>> losses = loss_curve(law, law.sample(4000, 0.0, generator(0)), [1.0])
    >>> bool(losses.mmse.low[0] < 0.4495995 < losses.mmse.high[0])
    True
    """
    s, laws, network = np.unique(levels(sigma)[0]), dict(laws or {}), as_denoiser(denoiser)
    data = images_for(network, images, s)
    _same_shape(network, laws)
    classes = None if labels is None else _labels(labels, len(data), network)
    if draws < 1:
        raise InputError(f"{draws} noise draws an image; expected at least 1.")
    centre = data.mean(0) if centre is None else centre.to(data)
    size = _piece(data)
    noise = [_noise(data, seed, r) for r in range(draws)] if draws == 1 else None

    def level(u: float) -> Arrays:
        errors, apart = np.zeros((1 + len(laws), len(data))), np.zeros((len(laws), len(data)))
        far = np.zeros((1 + len(laws), len(data))) if through is not None else np.zeros((0, len(data)))
        around = np.zeros((2, len(data)))
        for r in range(draws):
            eps = noise[r] if noise is not None else _noise(data, seed, r)
            for i in range(0, len(data), size):
                rows = slice(i, i + size)
                clean, y = data[rows], None if classes is None else classes[rows]
                x = clean + u * eps[rows]
                net = _mean(network, x, u, y)
                found = [net, *(_mean(law, x, u, y) for law in laws.values())]
                for k, d in enumerate(found):
                    residual = clean - d
                    errors[k, rows] += _energy(residual)
                    if k:
                        apart[k - 1, rows] += _energy(d - net)
                    if through is not None:
                        far[k, rows] += _energy(through(residual, u))
                around[0, rows] += _energy(net - centre)
                around[1, rows] += _energy(x - clean)
        if not np.isfinite(errors[0]).all():
            raise InputError(f"the network answers NaN or infinity at sigma {u:.4g}; expected denoised images.")
        return {"errors": errors / draws, "apart": apart / draws, "around": around / draws, "through": far / draws}

    found = in_blocks("loss", s.tolist(), level, progress, keep)
    errors, apart, around, far = (
        np.stack([f[k] for f in found], axis=1) for k in ("errors", "apart", "around", "through")
    )
    names = list(laws)
    return Losses(
        s,
        errors[0],
        dict(zip(names, errors[1:])),
        dict(zip(names, apart)),
        around[0],
        around[1],
        dict(zip([None, *names], far)),
    )


def integral_above(values: np.ndarray, sigma: np.ndarray, order: int = 3, at: np.ndarray | None = None) -> np.ndarray:
    """Integral over log sigma from every level to the top one, of the spline through the values.

    Args:
        values: [G, ...] at rising levels.
        sigma: [G].
        order: 3 for a cubic spline (from 4 levels on), 1 for straight lines, the trapezoidal rule.
        at: levels [A] to integrate from, by default ``sigma``.
    """
    s = np.log(sigma)
    start = s if at is None else np.log(at)
    if len(s) == 1:
        return np.zeros((len(start), *values.shape[1:]))
    whole = make_interp_spline(s, values, k=order if len(s) > order else 1).antiderivative()
    out: np.ndarray = whole(s[-1]) - whole(start)
    return out


def entropy_rate(losses: Losses, rescaled: bool = False) -> Curve:
    """The rate at which the state loses information on the clean image, in nats per unit of sigma.

        dH[x_0 | x_sigma] / dsigma = MMSE / sigma^3        rescaled: MMSE / sigma^2

    Args:
        losses: of `loss_curve`. A network's loss is above the MMSE: so is the rate.
        rescaled: the rate whose integral has equal steps on the entropic grid.

    Source: I-MMSE (Guo, Shamai, Verdu 2005); arXiv:2504.13612 for the rescaled form.
    """
    power, name = (2, "rescaled entropy rate") if rescaled else (3, "entropy rate")
    c = losses.mmse
    unit = c.sigma**power
    return Curve(c.sigma, c.value / unit, c.low / unit, c.high / unit, name)


def conditional_entropy(losses: Losses, at_lowest: float = 0.0) -> Curve:
    """H[x_0 | x_sigma] less its value at the lowest level, in nats: the integral of the entropy rate.

    For data of finitely many points and a lowest level that tells them apart it is H[x_0 | x_sigma] itself; for data
    with a density only differences have a meaning.

    Args:
        losses: of `loss_curve`, on levels not more than about 0.3 apart in log sigma.
        at_lowest: the entropy at the lowest level, added to all.
    """
    above = integral_above(losses.network / losses.sigma[:, None] ** 2, losses.sigma)
    c = mean_curve(losses.sigma, above[0] - above, "conditional entropy")
    return Curve(c.sigma, c.value + at_lowest, c.low + at_lowest, c.high + at_lowest, c.name)


def entropic_levels(losses: Losses, n: int) -> np.ndarray:
    """The entropic grid: n falling levels [n], equal steps of the integral of MMSE / sigma^2 between them.

    Args:
        losses: of `loss_curve`; its lowest and highest level are the grid's ends.
        n: number of levels, at least 2.

    Raises:
        InputError: for fewer than 2 levels, asked for or measured.

    Source: Stancevic, Handke, Ambrogioni, arXiv:2504.13612.
    """
    if n < 2 or len(losses.sigma) < 2:
        raise InputError(f"{n} levels from losses at {len(losses.sigma)}; expected at least 2 of each.")
    fine = _between(losses.sigma)
    told = integral_above(losses.network.mean(1) / losses.sigma, losses.sigma, at=fine)
    # A spline through a noisy curve may dip below zero between two levels; the integral may not.
    told = np.maximum.accumulate(told[::-1])
    out = np.exp(np.interp(np.linspace(0.0, told[-1], n), told, np.log(fine[::-1])))
    out[[0, -1]] = losses.sigma[[-1, 0]]
    return out


@dataclass(frozen=True)
class NonGaussianity(Curve):
    """How far the data are from a law, in nats: in expectation a lower bound on KL(p_sigma || q_sigma).

    A `Curve`; for a single level its arrays have no axis.

    Attributes:
        indicator: integral of E|D_net - D_law|^2 / u^3: the divergence, were the network perfect. It adds the
            network's error, and is too small for a network shrunk toward the law: no bound.
        quadrature: estimate from above of the integration error of every value.
        losses: what it was computed from, on the finer grid of the integral.
        law: name of the law there.
    """

    indicator: np.ndarray = field(default_factory=lambda: np.zeros(()))
    quadrature: np.ndarray = field(default_factory=lambda: np.zeros(()))
    losses: Losses | None = None
    law: str = ""

    def time(self, threshold: float = THRESHOLD, resamples: int = 1000, seed: int = 0) -> CriticalTime:
        """The level where it passes a threshold in nats, with a bootstrap interval over images."""
        if self.losses is None:
            raise InputError("there are no losses to find a level in. Make it with non_gaussianity.")
        sigma, gap = self.losses.sigma, _excess(self.losses, self.law)
        fine = _between(sigma)
        # Integrals from the fine levels as one matrix [A, G]: each resample is a product.
        weights = integral_above(np.eye(len(sigma)), sigma, at=fine)
        value = weights @ gap.mean(1)
        return passing_time(
            fine,
            np.concatenate([value[None], resampled(gap, seed, resamples) @ weights.T]),
            threshold,
            _nowhere(fine, value, threshold),
            f"non-Gaussianity of {threshold:g} nat",
            NATS,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {
            **super().to_dict(),
            "indicator": self.indicator.tolist(),
            "quadrature": self.quadrature.tolist(),
            "law": self.law,
            "images": None if self.losses is None else self.losses.images,
            "time": None if self.losses is None else self.time().to_dict(),
        }


def divergence_bound(losses: Losses, law: str, sigma: Any = None) -> NonGaussianity:
    """`non_gaussianity` from losses that are there already.

    Args:
        losses: of `loss_curve`; the integral ends at its top level, and its levels should not be more than about 0.3
            apart in log sigma.
        law: name of the law there.
        sigma: levels to integrate from, inside its range; by default all of them.
    """
    s, shape = levels(losses.sigma if sigma is None else sigma)
    low, high = losses.sigma[[0, -1]]
    if s.min() < low * (1 - 1e-9) or s.max() > high * (1 + 1e-9):
        raise InputError(
            f"levels from {s.min():.4g} to {s.max():.4g}; the losses run from {low:.4g} to {high:.4g}. Choose levels "
            "in that range or take losses at more."
        )
    gap = _excess(losses, law)
    c = mean_curve(s, integral_above(gap, losses.sigma, at=s), f"non-Gaussianity, {law}" if law else "non-Gaussianity")
    indicator = integral_above(losses.apart[law].mean(1) / losses.sigma**2, losses.sigma, at=s)
    # Every second level, the top one among them; the error of the finer rule is a part of the difference.
    half = np.unique(np.append(np.arange(len(losses.sigma) - 1, -1, -2), 0))
    coarse = integral_above(gap[half].mean(1), losses.sigma[half], at=s)
    at, value, lower, upper = (a.reshape(shape) for a in (s, c.value, c.low, c.high))
    error = np.abs(coarse - c.value).reshape(shape)
    return NonGaussianity(at, value, lower, upper, c.name, indicator.reshape(shape), error, losses, law)


def non_gaussianity(
    denoiser: Any,
    law: Any,
    data: Any,
    sigma: Any,
    labels: Any = None,
    seed: int = 0,
    top: float | None = None,
    spacing: float = SPACING,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> NonGaussianity:
    """What a start from a law costs at every level, in nats, from denoising losses.

        KL(p_sigma || q_sigma) >= integral from sigma to the top of (loss_law - loss_net) / u^3 du, in expectation

    for any law q, and with equality for a perfect network. Losses are taken on the given levels and on more above and
    between them.

    Args:
        denoiser: network as a `Denoiser`, or a law that takes its place.
        law: a law with ``.denoise``, such as the `Gaussian` of the training images.
        data: images [N, *S], an `Images` or batches that neither network nor law was fitted on.
        sigma: a level, or levels [G].
        labels: class [N] of every image, only for a class-conditional network.
        seed: of the noise, the same at every level.
        top: where the integral ends; by default 20 times the data's largest standard deviation, at most the
            network's highest level. Above it the law is taken for exact.
        spacing: largest step of the integral in log sigma; the network is asked once an image and step.
        progress, keep: as for `loss_curve`.

    Returns:
        A `NonGaussianity`: ``value`` with a 95 % interval ``low``, ``high`` over images, ``indicator``, ``quadrature``;
        its ``time()`` is the level where it passes 0.1 nat. Negative where the network is worse than the law.

    Raises:
        InputError: as for `loss_curve`, and for a top below the levels.

    Source: derived, from the I-MMSE relation.
    """
    (s, _), network = levels(sigma), as_denoiser(denoiser)
    images = images_for(network, data, s)
    if top is None:
        y = (images - images.mean(0)).flatten(1)
        variance = top_eigenvalue(lambda v: ((v.to(y) @ y.T) @ y / len(y)).double(), y.shape[1])
        top = min(max(TOP * math.sqrt(variance), float(s.max())), network.sigma_range[1])
    if not (s.max() <= top and 0 < spacing < math.inf):
        raise InputError(
            f"an integral from sigma {s.max():.4g} to {top:.4g} in steps of {spacing:g}; expected it to rise."
        )
    ends = [*np.unique(s), top]
    parts = [np.geomspace(a, b, 1 + math.ceil(math.log(b / a) / spacing))[:-1] for a, b in pairwise(ends) if b > a]
    grid = np.append(np.concatenate(parts), top) if parts else np.array([top])
    losses = loss_curve(network, images, grid, {"law": law}, labels, seed, progress=progress, keep=keep)
    return divergence_bound(losses, "law", sigma)


@dataclass(frozen=True)
class ClassEntropy(Curve):
    """H[c | x_sigma] in nats: a `Curve`, exact for a law, an upper bound in expectation for a network.

    Attributes:
        total: H[c], the entropy of the classes themselves.
        scores: -log r(c | x) [G, N] of every held-out image; empty where the curve is exact.
        labels: classes [N] of those images.
        law, samples, seed: what the exact curve was computed from.
    """

    total: float = 0.0
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    law: Any = None
    samples: int = 0
    seed: int = 0

    @property
    def bits(self) -> Curve:
        """The curve in bits."""
        bit = math.log(2)
        return Curve(self.sigma, self.value / bit, self.low / bit, self.high / bit, f"{self.name} (bits)")

    def time(self, share: float = 0.5, resamples: int = 1000) -> CriticalTime:
        """The level where it passes a share of H[c]: above it the class is open, below it is decided.

        The interval is a bootstrap over held-out images (the fitted classifiers are kept), or the Monte Carlo error
        of an exact curve, and missing where that has none.
        """
        sigma, value = np.atleast_1d(self.sigma), np.atleast_1d(self.value)
        criterion = f"class entropy at {share:g} H[c]"
        if self.law is not None:
            return self._exact(sigma, value, share, criterion)
        order = np.argsort(sigma)
        n, classes = len(self.labels), np.unique(self.labels)
        shares = resampled((self.labels == classes[:, None]).astype(float), self.seed, resamples)
        return passing_time(
            sigma[order],
            np.concatenate([value[order][None], resampled(self.scores[order], self.seed, resamples)]),
            share * np.append(self.total, _entropy(shares)),
            _nowhere(sigma, value, share * self.total),
            criterion,
            f"derived; classifier on denoised images, {n} held out",
        )

    def _exact(self, sigma: np.ndarray, value: np.ndarray, share: float, criterion: str) -> CriticalTime:
        source, target = "derived", share * self.total
        found = crossing(sigma, value, target)
        if found is None:
            reason = _nowhere(sigma, value, target)
            return CriticalTime(None, criterion=criterion, source=source, reason=reason)

        def gap(log_sigma: float) -> float:
            return (
                float(_exact_entropy(self.law, np.array([math.exp(log_sigma)]), self.samples, self.seed)[0][0]) - target
            )

        inside = np.sort(np.log(sigma))
        i = int(np.clip(np.searchsorted(inside, math.log(found)), 1, len(inside) - 1)) if len(inside) > 1 else 0
        root = math.log(found)
        if i and gap(inside[i - 1]) * gap(inside[i]) < 0:
            root = float(brentq(gap, inside[i - 1], inside[i], xtol=1e-12))
        mean, low, high = _exact_entropy(self.law, np.array([math.exp(root)]), self.samples, self.seed)
        below, above = None, None
        if high[0] > low[0]:
            h = 0.02
            slope = (gap(root + h) - gap(root - h)) / (2 * h)
            below = NoiseLevel(math.exp(root - float(high[0] - mean[0]) / slope))
            above = NoiseLevel(math.exp(root + float(mean[0] - low[0]) / slope))
        return CriticalTime(NoiseLevel(math.exp(root)), below, above, criterion=criterion, source=source)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {**super().to_dict(), "total": self.total, "images": len(self.labels), "time": self.time().to_dict()}


def class_entropy(
    law_or_denoiser: Any,
    sigma: Any,
    images: Any = None,
    labels: Any = None,
    fit_images: Any = None,
    fit_labels: Any = None,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    samples: int = 20000,
    draws: int = 1,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> ClassEntropy:
    """How open the class still is, H[c | x_sigma] in nats.

        law with classes    E[-sum_c p(c | x) log p(c | x)], exact
        network             E[-log r(c | D(x, sigma))] >= H[c | x_sigma], r a logistic regression for every level

    The regression is fitted on features of denoised images of one set and scored on another, its penalty chosen by
    cross-validation on the first. The bound is loose where the features of D do not hold what x tells; a level read off
    it is then too low, and its interval does not hold this.

    Args:
        law_or_denoiser: a `Mixture` or `PrincipalMixture` without images, or a network as a `Denoiser` with them.
        sigma: a level, or levels [G].
        images, labels: held-out images [N, *S] and their classes [N].
        fit_images, fit_labels: images [M, *S] that the regression is fitted on and their classes, others than the
            held-out ones.
        features: denoised images [B, *S] -> features [B, F], e.g. a classifier's logits; by default the leading
            principal coordinates of the images to fit on, at most 32.
        seed: of the noise, which all levels share, or of the law's draws.
        samples: draws of a law that has no quadrature.
        draws: noise draws of every image to fit on.
        progress, keep: called as progress(done, levels) and keep("class-entropy/<level number>", make).

    Returns:
        A `ClassEntropy`; its ``time()`` is where half of H[c] is passed.

    Raises:
        InputError: for a law without classes, labels of another number, a single class, classes with fewer than 3
            images to fit on, or features that are no finite [B, F].

    Source: derived (the cross-entropy of any classifier bounds the conditional entropy from above).

    >>> from symbreak.laws.mixture import Mixture
    >>> found = class_entropy(Mixture.from_parameters([[-1.0], [1.0]], 0.0), [0.5, 1.0, 2.0])
    >>> [round(float(v), 7) for v in found.value]                                    # two points: H[x_0 | x]
    [0.060427, 0.3563164, 0.5817257]
    """
    s, shape = levels(sigma)
    if images is None:
        mixture = mixture_of(getattr(law_or_denoiser, "inner", law_or_denoiser))
        total = float(_entropy((mixture.weights @ _membership(mixture)).numpy()))
        if not total > 0:
            raise InputError("all components are of a single class; expected at least two classes.")
        at, value, low, high = (a.reshape(shape) for a in (s, *_exact_entropy(mixture, s, samples, seed)))
        return ClassEntropy(at, value, low, high, "class entropy", total, law=mixture, samples=samples, seed=seed)
    if labels is None or fit_images is None or fit_labels is None:
        raise InputError("images came without labels=, fit_images= or fit_labels=; the bound needs all of them.")
    network = as_denoiser(law_or_denoiser)
    held, train = (images_for(network, v, s) for v in (images, fit_images))
    classes, code, own = _codes(labels, len(held), fit_labels, len(train))
    features = features or _principal(train)
    target = np.tile(own, draws)

    def level(u: float) -> Arrays:
        def told(x0: torch.Tensor, which: int, r: int) -> np.ndarray:
            size, out = _piece(x0), []
            eps = torch.randn(x0.shape, generator=generator(seed, 31, which, r), dtype=x0.dtype)
            for i in range(0, len(x0), size):
                out.append(_featured(features, _mean(network, x0[i : i + size] + u * eps[i : i + size], u, None)))
            return np.concatenate(out)

        fit, score = np.concatenate([told(train, 1, r) for r in range(draws)]), told(held, 2, 0)
        return {"scores": _scored(fit, target, score, code, len(classes))}

    scores = np.stack([block["scores"] for block in in_blocks("class-entropy", s.tolist(), level, progress, keep)])
    c = mean_curve(s, scores, "class entropy (upper bound)")
    total = float(_entropy(np.bincount(code, minlength=len(classes)) / len(code)))
    at, value, low, high = (a.reshape(shape) for a in (s, c.value, c.low, c.high))
    return ClassEntropy(at, value, low, high, c.name, total, scores, code, seed=seed)


# Denoising


def _same_shape(network: Any, laws: Mapping[str, Any]) -> None:
    for name, law in laws.items():
        if tuple(law.shape) != tuple(network.shape):
            raise InputError(
                f"the law {name!r} has samples of shape {tuple(law.shape)}, the network of {tuple(network.shape)}; "
                "expected one shape."
            )


def _labels(labels: Any, count: int, network: Any) -> torch.Tensor:
    y = (labels.cpu() if isinstance(labels, torch.Tensor) else torch.as_tensor(np.asarray(labels))).reshape(-1)
    if len(y) != count or y.is_floating_point():
        raise InputError(f"{len(y)} labels for {count} images; expected one whole number each.")
    if not (hasattr(network, "bind") or isinstance(network, LawDenoiser)):
        raise InputError(f"labels for {type(network).__name__}, which takes no condition. Leave them out.")
    return y.long()


def _mean(source: Any, x: torch.Tensor, sigma: float, labels: torch.Tensor | None) -> torch.Tensor:
    """D(x, sigma) of a network or law, of every image's own class where labels are given."""
    law = source.law if isinstance(source, LawDenoiser) else source
    if not hasattr(law, "denoise"):
        return ask(source, x, sigma, labels)
    if labels is None or getattr(law, "classes", None) is None:
        found: torch.Tensor = law.denoise(x, sigma)
        return found
    out = torch.empty_like(x)
    for label in labels.unique().tolist():
        rows = labels == label
        out[rows] = law.given(label).denoise(x[rows], sigma)
    return out


def _noise(data: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    return torch.randn(data.shape, generator=generator(seed, 21, draw), dtype=data.dtype)


def _energy(r: torch.Tensor) -> np.ndarray:
    return (r * r).flatten(1).double().sum(1).numpy()


def _piece(data: torch.Tensor) -> int:
    """Images of one piece, by their size only."""
    return max(1, NUMBERS // max(1, data[0].numel()) // CHUNK) * CHUNK


# Curves and levels


def _excess(losses: Losses, law: str) -> np.ndarray:
    """(loss_law - loss_net) / u^2 [G, N], the integrand over log u."""
    out: np.ndarray = (losses._own(law) - losses.network) / losses.sigma[:, None] ** 2
    return out


def _between(sigma: np.ndarray) -> np.ndarray:
    """The levels and `FINE` - 1 more between each two of them."""
    s = np.log(sigma)
    at = np.linspace(0, len(s) - 1, FINE * (len(s) - 1) + 1)
    out = np.exp(np.interp(at, np.arange(len(s)), s))
    out[::FINE] = sigma  # exp(log(s)) may leave the range by its rounding
    return out


def _nowhere(sigma: np.ndarray, value: np.ndarray, threshold: float) -> str:
    """That a curve does not pass a threshold, and where to look for it."""
    first, last = value[np.argmin(sigma)], value[np.argmax(sigma)]
    if min(first, last) <= threshold <= max(first, last):
        way = "between them"
    else:
        nearer_low = abs(first - threshold) < abs(last - threshold)
        way = f"below {sigma.min():.4g}" if nearer_low else f"above {sigma.max():.4g}"
    return (
        f"it is {first:.4g} at sigma {sigma.min():.4g} and {last:.4g} at {sigma.max():.4g} and does not pass "
        f"{threshold:.4g} nats; the range to try is {way}"
    )


# Classes


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis."""
    out: np.ndarray = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return out


def _membership(mixture: Any) -> torch.Tensor:
    """Which component belongs to which class, [K, C] float64; every component is a class of its own without classes."""
    k = mixture.components
    code = torch.arange(k) if mixture.classes is None else mixture.classes.unique(return_inverse=True)[1]
    return torch.nn.functional.one_hot(code).double()


def _exact_entropy(
    mixture: Any, sigma: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H[c | x_sigma] of a mixture and its interval at levels [G]."""
    member = _membership(mixture)

    def openness(log_p: torch.Tensor) -> torch.Tensor:
        if member.shape[0] == member.shape[1]:
            return -(log_p.exp() * log_p).sum(-1)
        p = log_p.exp() @ member
        return -(p * p.clamp_min(1e-300).log()).sum(-1)

    return posterior_average(mixture, sigma, openness, samples, seed)


def _codes(labels: Any, count: int, fit_labels: Any, fit_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, and their number for every held-out image and every image to fit on."""
    y, own = (np.asarray(torch.as_tensor(np.asarray(v))).reshape(-1) for v in (labels, fit_labels))
    for name, v, n in (("labels", y, count), ("fit_labels", own, fit_count)):
        if len(v) != n:
            raise InputError(f"{len(v)} {name} for {n} images; expected one each.")
    classes, members = np.unique(own, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"the images to fit on have a single class, {classes[0]}; expected at least two.")
    if members.min() < FOLDS:
        i = int(members.argmin())
        raise InputError(f"class {classes[i]} has {members[i]} images to fit on; at least {FOLDS} are needed. Drop it.")
    unknown = sorted(set(y.tolist()) - set(classes.tolist()))
    if unknown:
        raise InputError(f"held-out images have the class {unknown[0]}, which no image to fit on has. Add some.")
    return classes, np.searchsorted(classes, y), np.searchsorted(classes, own)


def _principal(data: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Leading principal coordinates of a data set as features."""
    mean = data.mean(0)
    count = max(1, min(COMPONENTS, len(data) // 8, data[0].numel()))
    vectors = torch.linalg.svd((data - mean).flatten(1), full_matrices=False)[2][:count]
    return lambda x: (x.to(mean) - mean).flatten(1) @ vectors.T


def _featured(features: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> np.ndarray:
    out = torch.as_tensor(features(x)).detach().cpu()
    if out.ndim != 2 or len(out) != len(x):
        raise InputError(f"features of shape {tuple(out.shape)} for {len(x)} images; expected [{len(x)}, F].")
    found: np.ndarray = out.double().numpy()
    if not np.isfinite(found).all():
        raise InputError("the features hold NaN or infinity; expected finite numbers.")
    return found


def _scored(fit: np.ndarray, own: np.ndarray, held: np.ndarray, code: np.ndarray, classes: int) -> np.ndarray:
    """-log r(c | features) [N] of held-out images, by a regression with the penalty that cross-validates best."""
    from sklearn.linear_model import LogisticRegression

    centre, scale = fit.mean(0), fit.std(0)
    scale = np.where(scale > 1e-12 * (1e-300 + np.abs(centre)), scale, 1.0)
    fit, held = (fit - centre) / scale, (held - centre) / scale

    def score(model: Any, c: float, train: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odds = model.set_params(C=c).fit(fit[train], own[train]).decision_function(x)
        odds = np.stack([np.zeros_like(odds), odds], 1) if classes == 2 else odds
        out: np.ndarray = -torch.log_softmax(torch.from_numpy(odds), 1).numpy()[np.arange(len(y)), y]
        return out

    # Every class in every fold: rows are dealt in the order of their class.
    fold = np.empty(len(own), dtype=int)
    fold[np.argsort(own, kind="stable")] = np.arange(len(own)) % FOLDS
    models = [LogisticRegression(max_iter=500, tol=1e-3, warm_start=True) for _ in range(FOLDS + 1)]
    best, strength = math.inf, STRENGTHS[0]
    for c in STRENGTHS:
        left_out = ((fold == f, models[f]) for f in range(FOLDS))
        loss = sum(float(score(model, c, ~out, fit[out], own[out]).sum()) for out, model in left_out)
        if loss > 1.02 * best:
            break  # from here on the regression learns its images by heart
        if loss < best:
            best, strength = loss, c
    return score(models[-1], strength, np.ones(len(own), dtype=bool), held, code)
