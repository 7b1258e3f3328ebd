"""Averages over the posterior p(k | x) of a noised mixture's components, or its classes, x = x_0 + sigma eps.

Two Gaussians with a common covariance C need one dimension only: with z^2 = D^T (C + sigma^2)^-1 D / 4, D the
difference of the means, the log odds of a state drawn from either class are Gaussian,

    log p(1 | x) / p(2 | x) ~ N(log(w_1 / w_2) +- 2 z^2, 4 z^2),

and averages are quadratures. Any other mixture is averaged over draws, class by class, with the same draws
at every level; a labelled data set over its own noised samples. Source: derived; for equal weights arXiv:2402.18491.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from symbreak.laws.empirical import Empirical
from symbreak.laws.law import Law
from symbreak.laws.mixture import Mixture
from symbreak.noise import generator
from symbreak.runtime.files import InputError

__all__ = [
    "Labels",
    "by_class",
    "class_draws",
    "class_of",
    "classes_by_name",
    "features_of",
    "labels_of",
    "mixture_of",
    "posterior_average",
    "separation",
]

Labels: TypeAlias = torch.Tensor | np.ndarray | Sequence[int]  # classes [N]
NUMBERS = 2**23  # numbers of one block of draws


def mixture_of(law: object) -> Mixture:
    """The law, if it is a mixture.

    Raises:
        InputError: for a law without classes.
    """
    if isinstance(law, Mixture):
        return law
    raise InputError(f"{type(law).__name__} has no classes; expected a Mixture.")


def by_class(law: Law, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of log posteriors of classes [..., C] as one of those of a mixture's components [..., K]."""
    if not isinstance(law, Mixture):
        return value
    member = law.membership
    if member.shape[0] == member.shape[1]:  # a sum over classes does not ask for their order
        return value
    return lambda log_p: value((log_p.exp() @ member).clamp_min(1e-300).log())


def class_of(classify: Callable[[torch.Tensor], Any], images: torch.Tensor) -> np.ndarray:
    """Classes [B] of images [B, *S]: integers, or the largest of scores [B, K].

    Raises:
        InputError: for NaN, fractions, or another shape.
    """
    with torch.no_grad():
        out = classify(images.float())
    a = out.detach().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)
    n = len(images)
    if not (np.issubdtype(a.dtype, np.number) or a.dtype == bool):
        raise InputError(f"classify gave {a.dtype}; expected integer classes [{n}] or scores [{n}, K].")
    if not np.isfinite(a).all():
        bad = int((~np.isfinite(a)).reshape(len(a), -1).any(1).sum()) if a.ndim else 1
        raise InputError(f"classify gave NaN or infinity for {bad} of {n} images; expected a class for each.")
    if a.ndim == 2 and a.shape[0] == n and a.shape[1] > 1:
        return np.asarray(a.argmax(1), dtype=np.int64)
    if a.shape != (n,):
        raise InputError(
            f"classify gave the shape {a.shape} for {n} images; expected classes [{n}] or scores [{n}, K]."
        )
    whole = a.astype(np.int64)
    if not (whole == a).all():
        raise InputError(f"classify gave fractions ({float(a[whole != a][0]):g}); expected integer classes [{n}].")
    return whole


def classes_by_name(
    classify: Callable[[torch.Tensor], Mapping[str, Any]], images: torch.Tensor
) -> dict[str, np.ndarray]:
    """Classes [B] of images [B, *S] by each of several attributes, each as `class_of` reads them."""
    with torch.no_grad():
        out = classify(images.float())
    return {name: class_of(lambda _, v=values: v, images) for name, values in out.items()}  # type: ignore[misc]


def features_of(features: Callable[[torch.Tensor], Any], images: torch.Tensor) -> np.ndarray:
    """Features [B, F] float64 of images [B, *S].

    Raises:
        InputError: for NaN or another number of rows.
    """
    with torch.no_grad():
        out = features(images)
    a = out.detach().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)
    n = len(images)
    if a.ndim < 1 or len(a) != n:
        raise InputError(f"features gave the shape {a.shape} for {n} images; expected [{n}, F].")
    flat = a.reshape(n, -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise InputError("features gave NaN or infinity; expected numbers.")
    return flat


def labels_of(labels: Labels | None, n: int, name: str = "labels") -> np.ndarray:
    """Labels [n] of n images as int64.

    Raises:
        InputError: for another number of them, or numbers that are not whole.
    """
    a = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if a.shape != (n,):
        raise InputError(f"{name} of shape {a.shape} for {n} images; expected one label an image.")
    if not np.issubdtype(a.dtype, np.integer):
        raise InputError(f"{name} of {a.dtype}; expected integers, one class number an image.")
    return a.astype(np.int64)


def separation(law: Mixture, sigma: np.ndarray) -> np.ndarray | None:
    """z at levels [G] for two components with a common covariance, else ``None``."""
    if law.components != 2:
        return None
    values, floor, q = law.eigenvalues, law.floor, law.vectors
    if not (torch.equal(values[0], values[1]) and torch.equal(floor[0], floor[1])):
        return None
    if values.shape[1] and not torch.equal(q[0], q[1]) and bool((values[0] != floor[0]).any()):
        return None
    gap = law.means[0] - law.means[1]
    along = ((gap @ q[0]) ** 2).numpy()
    beside = max(0.0, float(gap @ gap) - float(along.sum())) if q.shape[2] < law.dim else 0.0
    s2 = np.asarray(sigma, dtype=np.float64)[:, None] ** 2
    total = (along / (values[0].numpy() + s2)).sum(1) + beside / (float(floor[0]) + s2[:, 0])
    return 0.5 * np.sqrt(total)


def class_draws(
    law: Mixture, components: Sequence[int], samples: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clean draws of some components and white noise for them, in blocks of [B, *S] float64, B fixed by d."""
    block, out, k = max(1, NUMBERS // law.dim), [], int(components[0])
    one, some = (k, law) if len(components) == 1 else (None, law.restricted(torch.as_tensor(components)))
    for i in range(0, samples, block):
        g = generator(seed, k, i)
        clean = some.sample(min(block, samples - i), 0.0, g, component=one)
        out.append((clean, torch.randn(clean.shape, generator=g, dtype=torch.float64)))
    return out


def posterior_average(
    law: Law,
    sigma: np.ndarray,
    value: Callable[[torch.Tensor], torch.Tensor],
    samples: int,
    seed: int,
    labels: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E value(log p(. | x)) over the noised law: mean and 95 % interval at levels [G].

    Args:
        law: a mixture, or an `Empirical` law with labels.
        sigma: levels [G].
        value: log posteriors of the components (see `by_class`), or the labels, [..., K] -> [...].
        samples: draws in all, shared out by weight (at least 16 a class); unused by the quadrature.
        seed: of the draws, which every level shares: its errors are correlated with its neighbours'.
        labels: class [N] of every point of an `Empirical` law.

    Raises:
        InputError: for a law without classes, or labels that do not fit it.
    """
    if isinstance(law, Empirical) and labels is not None:
        return _labelled_average(law, labels, sigma, value, samples, seed)
    mixture = mixture_of(law)
    w = mixture.weights.numpy()
    z = separation(mixture, sigma)
    if z is not None and (w > 0).all():
        out = np.array([_quadrature(min(float(s), 200.0), w, value) for s in z])
        return out, out.copy(), out.copy()
    mean, variance = np.zeros(len(sigma)), np.zeros(len(sigma))
    for k in range(mixture.components):
        if w[k] == 0:
            continue
        n = max(16, round(samples * float(w[k])))
        sums = np.zeros((2, len(sigma)))
        for clean, noise in class_draws(mixture, [k], n, seed):
            for i, s in enumerate(sigma):
                posterior = mixture.responsibilities(clean + float(s) * noise, float(s)).double()
                v = value(posterior.clamp_min(1e-300).log())
                sums[:, i] += [float(v.sum()), float((v * v).sum())]
        average = sums[0] / n
        mean += w[k] * average
        variance += w[k] ** 2 * np.maximum(sums[1] / n - average**2, 0.0) / (n - 1)
    half = 1.959963984540054 * np.sqrt(variance)
    return mean, mean - half, mean + half


def _labelled_average(
    law: Empirical,
    labels: torch.Tensor,
    sigma: np.ndarray,
    value: Callable[[torch.Tensor], torch.Tensor],
    samples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p(c | x) is the posterior weight of all points of class c; x are noised points, no more than there are."""
    y = torch.as_tensor(labels).reshape(-1)
    if len(y) != len(law):
        raise InputError(f"{len(y):,} labels for {len(law):,} points; expected one label a point.")
    names, code = y.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(code, len(names)).double()
    g = generator(seed, 17)
    chosen = torch.randperm(len(law), generator=g)[:samples]
    clean = law.points.reshape(len(law), *law.shape)[chosen].double()
    noise = torch.randn(clean.shape, generator=g, dtype=torch.float64)
    block, values = max(1, NUMBERS // len(law)), np.zeros((len(sigma), len(chosen)))
    for i in range(0, len(chosen), block):
        part = slice(i, i + block)
        for j, s in enumerate(sigma):
            weights = law.posterior_weights(clean[part] + float(s) * noise[part], float(s)).double()
            values[j, part] = value((weights @ member).clamp_min(1e-300).log()).numpy()
    mean = values.mean(1)
    half = 1.959963984540054 * values.std(1, ddof=1) / math.sqrt(len(chosen)) if len(chosen) > 1 else math.nan
    return mean, mean - half, mean + half


def _quadrature(z: float, w: np.ndarray, value: Callable[[torch.Tensor], torch.Tensor]) -> float:
    # The trapezoid rule is exponentially exact here: poles of the posterior lie at distance pi / (2 z).
    h = min(0.05, 0.3 / max(z, 1e-12))
    y = torch.arange(-math.ceil(12 / h), math.ceil(12 / h) + 1, dtype=torch.float64) * h
    density = torch.exp(-0.5 * y * y) * (h / math.sqrt(2 * math.pi))
    out = 0.0
    for sign, weight in ((1.0, w[0]), (-1.0, w[1])):
        odds = math.log(w[0] / w[1]) + sign * 2 * z * z + 2 * z * y
        log_p = torch.nn.functional.logsigmoid(torch.stack([odds, -odds], dim=-1))
        out += float(weight) * float((density * value(log_p)).sum())
    return out
