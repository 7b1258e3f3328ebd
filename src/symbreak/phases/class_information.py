"""Class information: how much a noised state tells of its class in a network's view, and when the class is decided.

    I(c; x_sigma) = integral from sigma to infinity of E|D_c(x) - D_u(x)|^2 / u^3 du                 nats

Of a single condition, such as a prompt, the same integral over its own samples is D(p(x_sigma | c) || p(x_sigma)): the
expected log-ratio of the two laws. Its limit is -log of the share that the condition has of everything.

for a class c that the clean sample decides: D_c is the posterior mean given the class, D_u the one without it, and
MMSE_u - MMSE_c = E|D_c - D_u|^2. At low noise it goes to H[c], which calibrates a network: one that is unsure stays
below, one whose two answers differ by error goes above. Where it rises guidance acts; above D_c and D_u agree, below
the class is fixed.

Source: derived (I-MMSE: Guo, Shamai, Verdu 2005; Verdu 2010 for a single condition); the entropy production of
arXiv:2602.09651.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy

from symbreak.critical import CriticalTime, Curve, Levels, Result, levels, mean_curve, passing_time
from symbreak.data.images import Images
from symbreak.intervals import resampled
from symbreak.laws.class_posterior import Labels, labels_of
from symbreak.laws.law import Law
from symbreak.networks.denoiser import (
    Batches,
    Denoiser,
    LawDenoiser,
    as_denoiser,
    fingerprints,
    fixed_class,
    images_for,
)
from symbreak.networks.guidance import check_classes, conditional, without_condition
from symbreak.phases.losses import between, energy, filled, integral_above, nowhere, pieces, posterior_mean
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run
from symbreak.runtime.shown import LONGEST, shortened

__all__ = ["ConditionInformation", "GuidanceWindow", "condition_information", "guidance_window"]

SPACING = 0.3  # largest step of the integral in log sigma
LOWEST, HIGHEST = 0.01, 10.0  # levels, in units of an element's and of a whole sample's standard deviation
FALLS = (2.0, 8.0)  # powers of 1 / sigma by which the integrand may fall above the highest level
FAR = 0.15  # distance of the limit from H[c], as a share of it, that a note names
SOURCE = "integral of |D_c - D_u|^2 (derived, I-MMSE)"


@dataclass(frozen=True, kw_only=True)
class ConditionInformation(Curve):
    """I(c; x_sigma) in nats, a `Curve` with intervals over images.

    Attributes:
        total: H[c], the entropy of the classes of the images; infinite for a single condition, whose share of
            everything nobody knows.
        grid: rising levels [G] of the integral.
        apart: |D_c - D_u|^2 [G, N] of every image.
        gain: |x_0 - D_u|^2 - |x_0 - D_c|^2 [G, N], the same in expectation were the network perfect.
        notes: what the calibration says, one line each.
    """

    record = (*Curve.record, "total", "limit", "images", "by_losses", "notes")

    total: float
    grid: np.ndarray
    apart: np.ndarray
    gain: np.ndarray
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        of = "" if math.isinf(self.total) else f" of {self.total:.4g}"
        limit, u = self.limit, (float(self.sigma.min()), float(self.sigma.max()))
        parts = (
            f"{self.name}, sigma {u[0]:.4g} .. {u[1]:.4g}",
            f"limit {limit['value']:.4g} [{limit['low']:.4g}, {limit['high']:.4g}]{of} nats",
            f"{self.images} images",
            *self.notes,
        )
        return shortened(f"{type(self).__name__}({', '.join(parts)})", LONGEST)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.apart.shape[1]

    @property
    def limit(self) -> dict[str, float]:
        """I at the lowest level with its interval: ``value``, ``low``, ``high``; H[c] for a perfect network."""
        lowest = mean_curve(self.grid[:1], _above(self.apart, self.grid, self.grid[:1]), self.name)
        return {name: float(getattr(lowest, name)[0]) for name in ("value", "low", "high")}

    @property
    def by_losses(self) -> Curve:
        """The same from the two denoising losses: errors that both answers have alike cancel, the noise is larger."""
        values = _above(self.gain, self.grid, np.atleast_1d(self.sigma))
        return mean_curve(np.atleast_1d(self.sigma), values, "class information, by losses", shape=self.sigma.shape)


@dataclass(frozen=True, kw_only=True)
class GuidanceWindow(Result):
    """The levels between which a class is decided.

    Attributes:
        low: the level where the information has all but reached its limit; below it the class is fixed.
        high: the level where it begins to rise; above it the class makes no difference.
        shares: of the limit, or of H[c] where that is smaller, that is passed at ``high`` and at ``low``.
        notes: those of the information.
    """

    record = ("low", "high", "shares", "notes")

    low: CriticalTime
    high: CriticalTime
    shares: tuple[float, float]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return shortened(f"{type(self).__name__}(high={self.high!r}, low={self.low!r})", LONGEST)

    @property
    def levels(self) -> tuple[float, float]:
        """Both as sigma, what `guided` takes; the upper one is infinite where it lies above all levels measured."""
        high = self.high.sigma
        return self.low.sigma or 0.0, math.inf if high is None else high


def condition_information(
    denoiser: Law | Denoiser,
    data: Batches,
    labels: Labels | None = None,
    sigma: Levels | None = None,
    *,
    null: int | None = None,
    without: Law | Denoiser | None = None,
    seed: int = 0,
    draws: int = 1,
    run: Run | None = None,
) -> ConditionInformation:
    """How much a noised state tells of its class, I(c; x_sigma) in nats, from a class-conditional network.

        integral from sigma to infinity of E|D_c - D_u|^2 / u^3 du

    It costs a conditional and an unconditional evaluation an image and level. Above the highest level the integrand is
    continued by the power with which it falls there.

    Args:
        denoiser: class-conditional network with a null class as a `Denoiser`; or a law with classes.
        data: images [N, *S], best ones that the network was not trained on.
        labels: classes [N]; by default those of the data.
        sigma: a level, or levels [G] at which the information is given; by default from a hundredth of the spread of
            the data to ten times that of a whole sample, as far as the network knows them. The lowest one is where the
            limit is taken.
        null: label of the network's null class; by default the one that the denoiser is fixed to, or the network says
            it has.
        without: D_u of a condition that ``denoiser`` is fixed to, such as the same pipeline with the prompt ``""``.
            Then ``data`` are samples of that condition, without labels, and the curve is
            D(p(x_sigma | c) || p(x_sigma)).
        seed: of the noise, which every level has for itself.
        draws: noise draws an image, averaged.
        run: a finished part a level, and progress in levels.

    Returns:
        A `ConditionInformation`: a `Curve` with ``limit`` beside ``total``, H[c], and ``by_losses``.

    Raises:
        InputError: for a network without classes or without a null class, labels that it does not have, of a single
            class or of another number, levels outside its range, or a network that answers NaN.

    Source: derived (I-MMSE); arXiv:2602.09651.

    >>> import symbreak as sb, torch
    >>> law = sb.Mixture.from_parameters([[-1.0], [1.0]], 0.01)
    >>> law.classes = torch.tensor([0, 1])
    >>> x, y = law.sample_labelled(4000, generator=torch.Generator().manual_seed(0))
    >>> abs(condition_information(law, x, y).limit["value"] / math.log(2) - 1) < 0.03
    True
    """
    source, run = as_denoiser(denoiser), run or Run()
    single, network = without is not None, _network(source, without, labels, null)
    of_all = without_condition(source, null) if without is None else as_denoiser(without)
    if labels is None and isinstance(data, Images) and not single:
        labels = data.labels
    if labels is None and not single:
        raise InputError("no labels came, and the data have none; expected the class of every image.")
    if draws < 1:
        raise InputError(f"{draws} noise draws an image; expected at least 1.")
    requested = None if sigma is None else levels(sigma)
    known = max(network.sigma_range[0], of_all.sigma_range[0]), min(network.sigma_range[1], of_all.sigma_range[1])
    images = images_for(network, data, np.array(known)[:1] if requested is None else requested[0])
    classes = None if labels is None else torch.from_numpy(labels_of(labels, len(images)))
    total = math.inf if classes is None else _entropy_of(classes, source, of_all)
    low, high = _range(images, known)
    start = np.array([low]) if requested is None else requested[0]
    grid = filled(start, max(high, float(start.max())), SPACING)
    s, shape = (grid, grid.shape) if requested is None else requested

    def level(item: tuple[int, float]) -> Arrays:
        i, u = item
        sums = np.zeros((2, len(images)))
        for draw in range(draws):
            # Noise of its own at every level: their errors average out in the integral.
            for rows, clean, x in pieces(images, u, seed, 33, i, draw):
                y = None if classes is None else classes[rows]
                with_condition, alone = posterior_mean(network, x, u, y), posterior_mean(of_all, x, u)
                sums[0, rows] += energy(with_condition - alone)
                sums[1, rows] += energy(clean - alone) - energy(clean - with_condition)
        if not np.isfinite(sums).all():
            raise InputError(f"the network answers NaN or infinity at sigma {u:.4g}; expected denoised images.")
        return {"sums": sums / draws}

    first = network if classes is None or isinstance(network, LawDenoiser) else network.bind(class_labels=classes[:1])
    settings = (*fingerprints(run, of_all, first), null, grid.tolist(), images, classes, seed, draws)
    parts = run.parts("class-information", list(enumerate(grid.tolist())), level, *settings)
    apart, gain = np.stack([part["sums"] for part in parts], axis=1)
    if not apart.any():
        what = "a class" if classes is not None else "the condition"
        raise InputError(f"the network answers the same with {what} as without: its condition says nothing.")
    values, name = _above(apart, grid, s), "class information" if classes is not None else "condition information"
    information = mean_curve(s, values, name, shape=shape).extended(
        ConditionInformation, total=total, grid=grid, apart=apart, gain=gain
    )
    return _noted(information)


def guidance_window(
    information: ConditionInformation, shares: tuple[float, float] = (0.1, 0.9), resamples: int = 1000, seed: int = 0
) -> GuidanceWindow:
    """Where the class is being decided: the levels between which I(c; x_sigma) goes from 10 to 90 % of its limit.

    Or of H[c], where the network's limit is above it: errors at low noise, which the integral adds to all it has.

    A prediction of the interval of levels in which guidance pays, without a scan: above it the conditional and the
    unconditional answer agree, and one evaluation is saved; below it the class is fixed.

    Args:
        information: of `condition_information`.
        shares: of the limit at the upper and at the lower end.
        resamples, seed: of the bootstrap over images.

    Returns:
        A `GuidanceWindow`; its ``levels`` are what `guided` takes as its window.

    Raises:
        InputError: for shares that do not rise between 0 and 1.

    Source: derived; guidance in a limited interval: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    first, last = (float(v) for v in shares)
    if not 0 < first < last < 1:
        raise InputError(f"a guidance window between the shares {first:g} and {last:g}; expected 0 < low < high < 1.")
    fine = between(information.grid)
    nats = _above(information.apart, information.grid, fine)
    curves = np.concatenate([nats.mean(1)[None], resampled(nats, seed, resamples)])

    # A sum of positive parts keeps all errors of the levels below: no class has more information than H[c].
    beyond = information.limit["low"] > information.total
    whole = np.full(len(curves), information.total) if beyond else curves[:, 0]

    def time(share: float) -> CriticalTime:
        thresholds, of = share * whole, "H[c]" if beyond else "its limit"
        why, criterion = nowhere(fine, curves[0], thresholds[0]), f"class information at {share:g} of {of}"
        return passing_time(fine, curves, thresholds, why, criterion, SOURCE)

    return GuidanceWindow(low=time(last), high=time(first), shares=(first, last), notes=information.notes)


def _network(source: Denoiser, without: Law | Denoiser | None, labels: Labels | None, null: int | None) -> Any:
    """The denoiser that is told the condition: of classes, or a single one that it is fixed to."""
    law: Any = source.law if isinstance(source, LawDenoiser) else None
    if without is not None:
        if labels is not None or null is not None:
            raise InputError("labels or a null class came with an unconditional denoiser. Pass one of them.")
        if tuple(as_denoiser(without).shape) != tuple(source.shape):
            raise InputError(
                f"the unconditional denoiser has the shape {tuple(as_denoiser(without).shape)}, the conditional one "
                f"{tuple(source.shape)}; expected one shape."
            )
        return source
    if law is not None and getattr(law, "classes", None) is None:
        raise InputError(f"{type(law).__name__} has no classes; expected a law with classes, or a conditional network.")
    return source if law is not None else conditional(source)


def _entropy_of(classes: torch.Tensor, source: Denoiser, without: Denoiser) -> float:
    """H[c] of the images' classes, which the network or law has."""
    if isinstance(source, LawDenoiser):
        check_classes(classes, source.law, None)
    else:
        check_classes(classes, source, fixed_class(without))
    counts = np.unique(classes.numpy(), return_counts=True)[1]
    if len(counts) < 2:
        raise InputError(f"all images are of the class {int(classes[0])}; expected at least two classes.")
    return float(entropy(counts))


def _range(images: torch.Tensor, known: tuple[float, float]) -> tuple[float, float]:
    """The lowest and the highest level that are of interest, inside a network's range."""
    flat = images.flatten(1).double()
    variance = float(flat.var(0, correction=0).sum())
    if not variance > 0:
        raise InputError("all images are equal; expected data with classes.")
    low = max(known[0], LOWEST * math.sqrt(variance / flat.shape[1]))
    high = min(known[1], HIGHEST * math.sqrt(variance))
    if not low < high:
        raise InputError(
            f"the network knows the levels from sigma {known[0]:.4g} to {known[1]:.4g}, the data are of interest from "
            f"{low:.4g} to {high:.4g}: they are not in its range."
        )
    return low, high


def _above(values: np.ndarray, grid: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The integral of values [G, N] / u^2 over log u from levels [A] to infinity, [A, N].

    Above the grid it is continued by the power with which the mean falls at its end: 2 for classes whose means
    differ, 4 for classes that differ in covariance only.
    """
    rate = values / grid[:, None] ** 2
    power = FALLS[0]
    if len(grid) > 1:
        last, end = np.abs(rate[-2:].mean(1)) + 1e-300
        power = float(np.clip(math.log(last / end) / math.log(grid[-1] / grid[-2]), *FALLS))
    out: np.ndarray = integral_above(rate, grid, at=at) + rate[-1] / power
    return out


def _noted(information: ConditionInformation) -> ConditionInformation:
    """The same with what its calibration says."""
    limit, total, notes = information.limit, information.total, []
    above = float(_above(information.apart, information.grid, information.grid[-1:]).mean())
    if above > 0.1 * limit["value"]:
        notes.append(
            f"{above / limit['value']:.0%} of the {information.name} lies above the highest level, sigma "
            f"{information.grid[-1]:.4g}: it is continued from there."
        )
    inside = limit["low"] <= total <= limit["high"] or math.isinf(total)
    if not inside and abs(limit["value"] / total - 1) > FAR:
        what = "its two answers differ by error" if limit["value"] > total else "it is unsure of the class"
        notes.append(
            f"The class information goes to {limit['value']:.3g} nats at low noise, the classes have {total:.3g}: the "
            f"network is off by {limit['value'] / total - 1:+.0%}; {what}."
        )
    values = {name: getattr(information, name) for name in ("total", "grid", "apart", "gain")}
    return information.extended(ConditionInformation, **values, notes=tuple(notes))
