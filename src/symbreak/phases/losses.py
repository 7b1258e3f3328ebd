"""Denoising losses of a network, and what follows from them about the information of a noised state, in nats.

With x = x_0 + sigma eps and MMSE(sigma) = E|x_0 - D(x, sigma)|^2, totals over dimensions:

    entropy rate        dH[x_0 | x_sigma] / dsigma = MMSE / sigma^3                          (I-MMSE)
    entropic grid       equal steps of the integral of MMSE / sigma^2, the rescaled rate     (arXiv:2504.13612)

All levels share their noise, so the curves are smooth in sigma, their integrals are those of a spline in
log sigma, and errors of neighbouring levels are correlated. Intervals are over images.

Source: Guo, Shamai, Verdu 2005 (I-MMSE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline

from symbreak.critical import Curve, Levels, levels, mean_curve
from symbreak.laws.class_posterior import Labels, labels_of
from symbreak.laws.law import Law, is_law
from symbreak.networks.denoiser import (
    CHUNK,
    Batches,
    Denoiser,
    LawDenoiser,
    as_denoiser,
    ask,
    denoise_by_class,
    fingerprints,
    images_for,
)
from symbreak.noise import generator
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Arrays, Run, renamed
from symbreak.runtime.shown import Shown

__all__ = [
    "Losses",
    "between",
    "conditional_entropy",
    "energy",
    "entropic_levels",
    "entropy_rate",
    "filled",
    "integral_above",
    "loss_curve",
    "nowhere",
    "pieces",
    "posterior_mean",
]

NUMBERS = 2**24  # numbers of one piece of noised images
FINE = 16  # points between two levels where a crossing is looked for


@dataclass(frozen=True)
class Losses(Shown):
    """Denoising errors of a network and of laws on the same noised images, squared norms over all pixels.

    Attributes:
        sigma: rising levels [G].
        network: |x_0 - D|^2 [G, N].
        laws: the same of every law, by name.
        apart: |D - D_law|^2 [G, N] of every law.
        spread: |D - centre|^2 [G, N], the centre being the mean of the images unless one was passed.
        state: |x - x_0|^2 [G, N], the error of the noised image itself.
        moved: |D - x|^2 [G, N], the squared score times sigma^4.
        through: |A (x_0 - D)|^2 [G, N] of the network (key ``None``) and the laws, where a map A was passed.
    """

    sigma: np.ndarray
    network: np.ndarray
    laws: dict[str, np.ndarray]
    apart: dict[str, np.ndarray]
    spread: np.ndarray
    state: np.ndarray
    moved: np.ndarray
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
        return mean_curve(self.sigma, self.of(name), f"denoising loss, {name}")

    def difference(self, name: str) -> Curve:
        """Mean error of a law less the network's; the interval is of the paired differences."""
        return mean_curve(self.sigma, self.of(name) - self.network, f"loss difference, {name}")

    def of(self, name: str) -> np.ndarray:
        """Errors of a law [G, N]."""
        if name not in self.laws:
            there = ", ".join(map(repr, self.laws)) or "no law"
            raise InputError(f"no losses of {name!r}; there are those of {there}.")
        return self.laws[name]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for records: curves, not single images."""
        return {
            "images": self.images,
            "network": self.mmse.to_dict(),
            "laws": {name: self.law(name).to_dict() for name in self.laws},
            "difference": {name: self.difference(name).to_dict() for name in self.laws},
        }


@renamed()
def loss_curve(
    denoiser: Law | Denoiser,
    images: Batches,
    sigma: Levels,
    laws: Mapping[str, Law | Denoiser] | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    draws: int = 1,
    centre: torch.Tensor | None = None,
    through: Callable[[torch.Tensor, float], torch.Tensor] | None = None,
    run: Run | None = None,
) -> Losses:
    """Denoising losses of a network, and of laws beside it.

        |x_0 - D(x_0 + sigma eps, sigma)|^2, one eps an image and the same at every level

    Args:
        denoiser: network as a `Denoiser`, or a law.
        images: [N, *S], an `Images` or batches; best ones that neither network nor laws were fitted on.
        sigma: levels [G]; they are sorted.
        laws: laws with ``.denoise``, or other denoisers, by name.
        labels: class [N] of every image, only for a class-conditional network (or law); laws with classes then
            answer with the law of that class.
        seed: of the noise.
        draws: noise draws an image, averaged.
        centre: [*S], what `Losses.spread` is measured from.
        through: a map of residuals [B, *S] at a level, whose squared norms are kept too.
        run: a finished part a level, and progress in levels.

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
    s, network = np.unique(levels(sigma)[0]), as_denoiser(denoiser)
    others: dict[str | None, Law | Denoiser] = dict((laws or {}).items())
    sources = {None: network} | others
    data = images_for(network, images, s)
    for name, law in sources.items():
        if tuple(law.shape) != tuple(network.shape):
            raise InputError(
                f"the law {name!r} has samples of shape {tuple(law.shape)}, the network of {tuple(network.shape)}; "
                "expected one shape."
            )
    classes = None if labels is None else torch.from_numpy(labels_of(labels, len(data)))
    if classes is not None and not (hasattr(network, "bind") or isinstance(network, LawDenoiser)):
        raise InputError(f"labels for {type(network).__name__}, which takes no condition. Leave them out.")
    if draws < 1:
        raise InputError(f"{draws} noise draws an image; expected at least 1.")
    centre = data.mean(0) if centre is None else centre.to(data)

    def level(u: float) -> Arrays:
        # By source: error, distance from the network, error through the map; then the three that need no law.
        sums, around = np.zeros((3, len(sources), len(data))), np.zeros((3, len(data)))
        for draw in range(draws):
            for rows, clean, x in pieces(data, u, seed, 21, draw):
                y = None if classes is None else classes[rows]
                means = [posterior_mean(source, x, u, y) for source in sources.values()]
                for k, mean in enumerate(means):
                    sums[0, k, rows] += energy(clean - mean)
                    sums[1, k, rows] += energy(mean - means[0])
                    if through is not None:
                        sums[2, k, rows] += energy(through(clean - mean, u))
                around[0, rows] += energy(means[0] - centre)
                around[1, rows] += energy(x - clean)
                around[2, rows] += energy(means[0] - x)
        if not np.isfinite(sums[0, 0]).all():
            raise InputError(f"the network answers NaN or infinity at sigma {u:.4g}; expected denoised images.")
        return {"sums": sums / draws, "around": around / draws}

    run = run or Run()
    mapped = None if through is None else through(data[:4], float(s[0]))
    who = (*sources, *fingerprints(run, *sources.values()))
    settings = (*who, s.tolist(), data, classes, seed, draws, centre, mapped, 3)  # rows of `around`
    parts = run.parts("loss", s.tolist(), level, *settings)
    errors, apart, far = np.stack([part["sums"] for part in parts], axis=2)
    spread, state, moved = np.stack([part["around"] for part in parts], axis=1)
    names = list(laws or {})
    of, away = dict(zip(names, errors[1:])), dict(zip(names, apart[1:]))
    mapped_errors = {} if through is None else dict(zip(sources, far))
    return Losses(s, errors[0], of, away, spread, state, moved, mapped_errors)


def filled(sigma: np.ndarray, top: float, spacing: float) -> np.ndarray:
    """Rising levels from the lowest of some to a top, those among them, no step above ``spacing`` in log sigma."""
    ends = [*np.unique(sigma), top]
    steps = [np.geomspace(a, b, 1 + math.ceil(math.log(b / a) / spacing))[:-1] for a, b in pairwise(ends) if b > a]
    return np.append(np.concatenate(steps), top) if steps else np.array([top])


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
    return losses.mmse.map(lambda v: v / losses.sigma**power, name)


def conditional_entropy(losses: Losses, at_lowest: float = 0.0) -> Curve:
    """H[x_0 | x_sigma] less its value at the lowest level, in nats: the integral of the entropy rate.

    For data of finitely many points and a lowest level that tells them apart it is H[x_0 | x_sigma] itself; for data
    with a density only differences have a meaning.

    Args:
        losses: of `loss_curve`, on levels not more than about 0.3 apart in log sigma.
        at_lowest: the entropy at the lowest level, added to all.
    """
    above = integral_above(losses.network / losses.sigma[:, None] ** 2, losses.sigma)
    name = "conditional entropy"
    return mean_curve(losses.sigma, above[0] - above, name).map(lambda v: v + at_lowest, name)


def entropic_levels(losses: Losses, n: int) -> np.ndarray:
    """The entropic grid: n falling levels [n], equal steps of the integral of MMSE / sigma^2 between them.

    Args:
        losses: of `loss_curve`; its lowest and highest level are the grid's ends.
        n: number of levels, at least 2.

    Raises:
        InputError: for fewer than 2 levels, requested or measured.

    Source: Stancevic, Handke, Ambrogioni, arXiv:2504.13612.
    """
    if n < 2 or len(losses.sigma) < 2:
        raise InputError(f"{n} levels from losses at {len(losses.sigma)}; expected at least 2 of each.")
    fine = between(losses.sigma)
    above = integral_above(losses.network.mean(1) / losses.sigma, losses.sigma, at=fine)
    # A spline through a noisy curve may dip below zero between two levels; the integral may not.
    above = np.maximum.accumulate(above[::-1])
    out = np.exp(np.interp(np.linspace(0.0, above[-1], n), above, np.log(fine[::-1])))
    out[[0, -1]] = losses.sigma[[-1, 0]]
    return out


def pieces(
    data: torch.Tensor, sigma: float, seed: int, *key: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Images and the same images noised, in pieces whose size depends on theirs only: (rows, x_0, x)."""
    size = max(1, NUMBERS // max(1, data[0].numel()) // CHUNK) * CHUNK
    eps = torch.randn(data.shape, generator=generator(seed, *key), dtype=data.dtype)
    for i in range(0, len(data), size):
        rows = slice(i, i + size)
        yield rows, data[rows], data[rows] + sigma * eps[rows]


def posterior_mean(
    source: Law | Denoiser, x: torch.Tensor, sigma: float, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """D(x, sigma) of a network or law, of every image's own class where labels are given."""
    law: Any = source.law if isinstance(source, LawDenoiser) else source
    return denoise_by_class(law, x, sigma, labels) if is_law(law) else ask(source, x, sigma, labels)


def energy(r: torch.Tensor) -> np.ndarray:
    """Squared norms [B] of residuals [B, *S]."""
    return (r * r).flatten(1).double().sum(1).numpy()


def between(sigma: np.ndarray) -> np.ndarray:
    """The levels and `FINE` - 1 more between each two of them."""
    s = np.log(sigma)
    at = np.linspace(0, len(s) - 1, FINE * (len(s) - 1) + 1)
    out = np.exp(np.interp(at, np.arange(len(s)), s))
    out[::FINE] = sigma  # exp(log(s)) may leave the range by its rounding
    return out


def nowhere(sigma: np.ndarray, value: np.ndarray, threshold: float) -> str:
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
