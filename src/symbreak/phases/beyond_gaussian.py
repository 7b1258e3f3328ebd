"""Non-Gaussianity: how far noised data are from a law, in nats, read off denoising losses.

    KL(p_sigma || q_sigma) = integral from sigma up of E|D_p - D_q|^2 / u^3 du
                           >= integral of (loss_q - loss_net) / u^3 du, in expectation, on images not trained on

`added_to_law` says the same of a network that was trained as the residual of a law: what it adds.

Source: derived, from the I-MMSE relation (Guo, Shamai, Verdu 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, Levels, Result, levels, mean_curve, passing_time, share_curve
from symbreak.intervals import mean_interval, percentiles, resampled
from symbreak.laws import Gaussian, Mixture, PrincipalMixture
from symbreak.laws.class_posterior import Labels
from symbreak.laws.cluster_mixture import refitted
from symbreak.laws.law import Law, top_eigenvalue
from symbreak.networks.denoiser import Batches, Denoiser, as_denoiser, images_for
from symbreak.networks.families import denoiser as denoiser_of
from symbreak.networks.residual import LawResidual, law_answer
from symbreak.noise import generator
from symbreak.phases.losses import Losses, between, filled, integral_above, loss_curve, nowhere
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Run, renamed

__all__ = [
    "Added",
    "NonGaussianity",
    "added_to_law",
    "divergence_bound",
    "fitting_error",
    "non_gaussianity",
    "refitting_error",
]

TOP = 20.0  # integrals end at this multiple of the data's largest standard deviation
SPACING = 0.25  # largest step of an integral in log sigma
THRESHOLD = 0.1  # nats
FEW = 10  # images that choose an end, at least
REFITS, REFIT_DRAWS = 6, 128  # of a law, and draws that measure each
MOST_REFITTED = 10_000  # samples, above which a refit is scaled
SOURCE = "integral of denoising losses (derived, I-MMSE)"


@dataclass(frozen=True, kw_only=True)
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

    record = (*Curve.record, "indicator", "quadrature", "law", "images")

    indicator: np.ndarray
    quadrature: np.ndarray
    losses: Losses
    law: str

    @property
    def images(self) -> int:
        """Number of images."""
        return self.losses.images

    def time(
        self, threshold: float = THRESHOLD, resamples: int = 1000, seed: int = 0, fitting: np.ndarray | None = None
    ) -> CriticalTime:
        """The level where it passes a threshold in nats, with a bootstrap interval over images.

        Args:
            threshold: in nats.
            resamples, seed: of the bootstrap.
            fitting: nats [refits, G] at the levels of the losses that the law costs for being fitted to a sample
                (`refitting_error`). They are taken off, and how far they scatter widens the interval; there is no level
                where what is left cannot be told from 0.
        """
        fine, criterion = between(self.losses.sigma), f"non-Gaussianity of {threshold:g} nat"
        nats = _nats(self.losses, self.law, fine)
        curves = np.concatenate([nats.mean(1)[None], resampled(nats, seed, resamples)])
        if fitting is not None:
            alone = np.array([np.interp(np.log(fine), np.log(self.losses.sigma), f) for f in fitting])
            scatter = alone.std(0, ddof=1) * math.sqrt(1 + 1 / len(alone))
            luck = np.random.default_rng([seed, 1]).standard_t(len(alone) - 1, resamples)
            curves -= alone.mean(0) + np.append(0.0, luck)[:, None] * scatter
            if not percentiles(curves[1:])[0].max() > 0:
                reason = (
                    f"it is {nats[0].mean():.3g} nats at sigma {fine[0]:.4g}, and fitting the law alone costs "
                    f"{alone[:, 0].mean():.3g} there: no departure from the law is told apart from 0"
                )
                return CriticalTime(None, criterion=criterion, source=SOURCE, reason=reason)
        return passing_time(fine, curves, threshold, nowhere(fine, curves[0], threshold), criterion, SOURCE)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        return {**super().to_dict(), "time": self.time().to_dict()}


def divergence_bound(losses: Losses, law: str, sigma: Levels | None = None) -> NonGaussianity:
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
    name = f"non-Gaussianity, {law}" if law else "non-Gaussianity"
    c = mean_curve(s, _nats(losses, law, s), name, shape=shape)
    whole = integral_above(gap.mean(1), losses.sigma, at=s)
    indicator = integral_above(losses.apart[law].mean(1) / losses.sigma**2, losses.sigma, at=s)
    # Every second level, the top one among them; the error of the finer rule is a part of the difference.
    half = np.unique(np.append(np.arange(len(losses.sigma) - 1, -1, -2), 0))
    coarse = integral_above(gap[half].mean(1), losses.sigma[half], at=s)
    return c.extended(
        NonGaussianity,
        indicator=indicator.reshape(shape),
        quadrature=np.abs(coarse - whole).reshape(shape),
        losses=losses,
        law=law,
    )


def _excess(losses: Losses, law: str) -> np.ndarray:
    """(loss_law - loss_net) / u^2 [G, N], the integrand over log u."""
    return (losses.of(law) - losses.network) / losses.sigma[:, None] ** 2


def _nats(losses: Losses, law: str, at: np.ndarray) -> np.ndarray:
    """The integral from levels [A] up for every image, [A, N].

    Any upper end gives a bound, for what is left out is a divergence of a step and not negative. Where the network is
    worse than the law an end at the top loses nats: each half of the images chooses the end for the other half,
    where leaving out all above gains more than two errors. An end at the level itself is none: there the integral is
    negative, and says that the network is worse than the law.
    """
    values = integral_above(_excess(losses, law), losses.sigma, at=at)
    tails = integral_above(_excess(losses, law), losses.sigma)  # [G, N]
    half = np.arange(losses.images) % 2
    for chooses in (0, 1):
        some = tails[:, half == chooses]
        if some.shape[1] < FEW:
            continue
        mean, error = some.mean(1), some.std(1, ddof=1) / math.sqrt(some.shape[1])
        lost = np.where(mean + 2 * error < 0, mean, 0.0)
        for i, u in enumerate(at):
            above = np.flatnonzero(losses.sigma >= u * (1 - 1e-9))
            j = int(above[np.argmin(lost[above])])
            if lost[j] < 0 and losses.sigma[j] > u * (1 + 1e-9):
                values[i, half != chooses] -= tails[j, half != chooses]
    return values


def fitting_error(eigenvalues: np.ndarray, count: int, sigma: np.ndarray) -> np.ndarray:
    """Nats [G] that a Gaussian costs for being fitted to n samples, were the data Gaussian: no departure from it.

        E KL = 1/(4 n) [(sum_i r_i)^2 + sum_i r_i^2 + 2 sum_i r_i]        r_i = lambda_i / (lambda_i + sigma^2)

    Source: derived, to first order in 1/n.
    """
    r = eigenvalues / (eigenvalues + np.asarray(sigma)[:, None] ** 2)
    out: np.ndarray = (r.sum(1) ** 2 + (r * r).sum(1) + 2 * r.sum(1)) / (4 * count)
    return out


def refitting_error(law: Gaussian | PrincipalMixture, count: int, sigma: np.ndarray, seed: int = 0) -> np.ndarray:
    """Nats [refits, G] that a law costs for being fitted to n samples, were the data of this law: no departure from it.

    Each refit is to n draws of the law, in its leading components (64 of one Gaussian); its divergence is the integral
    of E|D - D_refit|^2 / u^3 over fresh draws. A fitted law is sharper than the truth and its refits cost less; by how
    much a refit of each refit says, and all are divided by that. In the other components the law is Gaussian, where
    `fitting_error` knows the rest. Above 10,000 samples the divergence of 10,000 is scaled by 10,000 / n.

    Args:
        law: that was fitted.
        count: n.
        sigma: rising levels [G], not more than about 0.3 apart in log sigma; the integral ends at the last.

    Source: derived; a parametric bootstrap with a second one for its bias, Efron 1979.
    """
    n = min(count, MOST_REFITTED)
    if isinstance(law, PrincipalMixture):
        gaussian, truth, prior, clustered = law.gaussian, law.inner, law.prior or 0.0, law.classes is None
    else:
        values = law.eigenvalues[: min(64, law.eigenvectors.shape[1])]
        truth = Mixture.from_parameters(torch.zeros(1, len(values)), torch.diag(values)[None])
        gaussian, prior, clustered = law, 0.0, False

    def cost(of: Mixture, fitted: Mixture) -> np.ndarray:
        losses = loss_curve(of, of.sample(REFIT_DRAWS, 0.0, generator(seed, 32)), sigma, {"refit": fitted}, seed=seed)
        return divergence_bound(losses, "refit").indicator

    once, twice = [], []
    for i in range(REFITS):
        fitted = refitted(truth, n, prior, clustered, seed + i)
        once.append(cost(truth, fitted))
        twice.append(cost(fitted, refitted(fitted, n, prior, clustered, seed + REFITS + i)))
    ratio = np.mean(once, 0) / np.maximum(np.mean(twice, 0), 1e-300)
    all_values = gaussian.eigenvalues.numpy()
    beyond = fitting_error(all_values, count, sigma) - fitting_error(all_values[: truth.dim], count, sigma)
    return np.array(once) * ratio * n / count + beyond


@renamed()
def non_gaussianity(
    denoiser: Law | Denoiser,
    law: Law,
    data: Batches,
    sigma: Levels,
    labels: Labels | None = None,
    seed: int = 0,
    top: float | None = None,
    spacing: float = SPACING,
    run: Run | None = None,
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
            network's highest level. Above it the law is taken for exact. It ends earlier where the network is worse
            than the law above, as other images say.
        spacing: largest step of the integral in log sigma; the network is evaluated once an image and step.
        run: as for `loss_curve`.

    Returns:
        A `NonGaussianity`: ``value`` with a 95 % interval ``low``, ``high`` over images, ``indicator``, ``quadrature``;
        its ``time()`` is the level where it passes 0.1 nat. Negative where the network is worse than the
        law right above.

    Raises:
        InputError: as for `loss_curve`, and for a top below the levels.

    Source: derived, from the I-MMSE relation.
    """
    (s, _), network = levels(sigma), as_denoiser(denoiser)
    images = images_for(network, data, s)
    if top is None:
        top = min(max(_far_above(images), float(s.max())), network.sigma_range[1])
    if not (s.max() <= top and 0 < spacing < math.inf):
        raise InputError(
            f"an integral from sigma {s.max():.4g} to {top:.4g} in steps of {spacing:g}; expected it to rise."
        )
    losses = loss_curve(network, images, filled(s, top, spacing), {"law": law}, labels, seed, run=run)
    return divergence_bound(losses, "law", sigma)


def _far_above(images: torch.Tensor) -> float:
    """The level far above images [N, *S] at which an integral may end."""
    y = (images - images.mean(0)).flatten(1)
    return TOP * math.sqrt(top_eigenvalue(lambda v: ((v.to(y) @ y.T) @ y / len(y)).double(), y.shape[1]))


@dataclass(frozen=True)
class Added(Result):
    """What a network adds to the law that it is the residual of, D = D_law + c_out F, by level.

    Where the law gives way to an isotropic Gaussian at low noise (``fade`` of a `LawResidual`), D_law is what the
    network is added to there.

    Attributes:
        losses: errors of the law (``"law"``) and of the sum (``network``) on the same noised images.
        gain: E|x_0 - D_law|^2 - E|x_0 - D|^2; the interval is of the paired differences.
        share: of the variance of D, what the law's answer explains: 1 - E|D - D_law|^2 / E|D - m|^2, where m is the
            mean of the images, as it is of D(x, sigma) where D is right. Bootstrap intervals over images. It tends to 1
            at low noise, where every answer is nearly x itself.
        score: the same of the score (D - x) / sigma^2 about zero, 1 - E|D - D_law|^2 / E|D - x|^2. Where the network
            adds no nats it says how wrong the network is there, not the law.
        nats: what the network adds above each level, the integral of gain / u^3 du from there to the top. In
            expectation at most KL(p_sigma || q_sigma) - KL(p_top || q_top) of truth p and law q, and that for a
            perfect network (with a fade, of the reverse processes of the two denoisers); negative where the network is
            worse than the law. Intervals over images.
        whole: the share over all levels, each unit of log sigma counting alike, with the ends of its interval.
        net: nats above ``lowest``, with the ends of their interval.
        lowest: where the nats above are most, if what lies below loses some of them beyond its interval; else the
            lowest level.
        lost: nats below ``lowest``, with the ends of their interval, or ``None``.
        between: the levels between which nine tenths of the nats and one tenth are added, ``None`` where the network
            adds none beyond the interval.
    """

    record = ("share", "score", "nats", "whole", "net", "lowest", "lost", "between", "images", "sentence")

    losses: Losses
    gain: Curve
    share: Curve
    score: Curve
    nats: Curve
    whole: tuple[float, float, float]
    net: tuple[float, float, float]
    lowest: float
    lost: tuple[float, float, float] | None
    between: tuple[float, float] | None

    @property
    def images(self) -> int:
        """Number of images."""
        return self.losses.images

    @property
    def sentence(self) -> str:
        """All of it in words."""
        sigma, (share, *ends) = self.losses.sigma, self.whole
        nats = "{:.4g} [{:.4g}, {:.4g}] nats".format(*self.net)
        said = f"The law explains {share:.1%} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}] of the denoiser's variance "
        said += f"above sigma {sigma[0]:.3g}; the network "
        if self.between is None:
            verdict = "is worse than the law" if self.net[2] < 0 else "adds nothing beyond the interval"
            return f"{said}{verdict}: {nats}."
        low, high = self.between
        where = "" if self.lost is None else f" above sigma {self.lowest:.3g}"
        said += f"adds {nats}{where}, most of them (80 %) between {low:.3g} and {high:.3g}"
        inside = self.score.value[(sigma >= low) & (sigma <= high)]
        said += f", where the law explains at least {inside.min():.1%} of the score" if len(inside) else ""
        if self.lost is not None:
            value, first, last = self.lost
            said += f"; below it is worse than the law and loses {-value:.3g} [{-last:.3g}, {-first:.3g}]"
        return said + "."

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records."""
        errors = {"law": self.losses.law("law").to_dict(), "sum": self.losses.mmse.to_dict()}
        return {**errors, "gain": self.gain.to_dict(), **super().to_dict()}


def added_to_law(
    residual: LawResidual,
    images: Batches,
    count: int = 20,
    labels: Labels | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Added:
    """What a network adds to the law that it is the residual of: share of the denoiser's variance, and nats.

    Levels go from twice the lowest one at which the law's error is known, where training begins, to the residual's top
    (or, where it has none, to 20 times the data's largest standard deviation); above it the network adds nothing.

    Args:
        residual: law and network, such as ``residual_of(pipe.unet)`` of `symbreak.networks.residual`.
        images: [N, *S], an `Images` or batches that neither law nor network was fitted on.
        count: levels, at least 4; more where they would lie farther apart than 0.3 in log sigma.
        labels: class [N] of every image, only for a class-conditional network.
        seed: of the noise, the same at every level.
        run: as for `loss_curve`.

    Returns:
        An `Added`; its ``sentence`` says it in words.

    Raises:
        InputError: as for `loss_curve`, and for fewer than 4 levels.

    Source: derived, from the I-MMSE relation.

    >>> import symbreak as sb, torch
    >>> law = sb.Gaussian.fit(torch.randn(64, 2))
    >>> nothing = added_to_law(sb.LawResidual(law, lambda x, sigma: 0 * x, top=1.0), torch.randn(32, 2))
    >>> round(nothing.whole[0], 6), nothing.between
    (1.0, None)
    """
    if count < 4:
        raise InputError(f"{count} levels; expected at least 4.")
    low, high = residual.sigma_range

    def alone(x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        return law_answer(residual.law, x, sigma, class_labels, residual.fade)

    network, law = (denoiser_of(d, shape=tuple(residual.shape), sigma_range=(low, high)) for d in (residual, alone))
    clean = images_for(network, images, np.array([2 * low]))
    top = residual.top if residual.top < math.inf else _far_above(clean)
    if not top > 2 * low:
        raise InputError(f"levels from sigma {2 * low:.4g} to the residual's top, {top:.4g}; expected them to rise.")
    sigma = np.geomspace(2 * low, top, max(count, 1 + math.ceil(math.log(top / (2 * low)) / 0.3)))
    losses = loss_curve(network, clean, sigma, {"law": law}, labels, seed, run=run)
    excess, left = _excess(losses, "law"), losses.apart["law"]
    each = integral_above(excess, sigma)
    nats = mean_curve(sigma, each, "nats that the network adds above a level")
    most = int(np.argmax(nats.value))
    lost = mean_interval(each[0] - each[most]) if nats.low[most] > 0 else None
    if lost is None or not lost[2] < 0:
        most, lost = 0, None
    net = mean_interval(each[most])
    between_levels = None
    if net[1] > 0:
        fine = between(sigma)[::-1]
        risen = np.maximum.accumulate(integral_above(excess.mean(1), sigma, at=fine)) / net[0]
        low, high = np.exp(np.interp([0.9, 0.1], risen, np.log(fine)))
        between_levels = (float(low), float(high))
    share = share_curve(sigma, left, losses.spread, "share of the denoiser that the law explains")
    score = share_curve(sigma, left, losses.moved, "share of the score that the law explains")
    rest, all_of_it = (integral_above(values, sigma)[:1] for values in (left, losses.spread))
    pooled = share_curve(sigma[:1], rest, all_of_it, share.name)
    whole = (float(pooled.value[0]), float(pooled.low[0]), float(pooled.high[0]))
    at, curves = float(sigma[most]), (losses.difference("law"), share, score, nats)
    return Added(losses, *curves, whole, net, at, lost, between_levels)
