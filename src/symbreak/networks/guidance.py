"""Guidance: two denoisers combined into one, with a condition and without; and a network without its condition."""

from __future__ import annotations

import math
from typing import Any

import torch

from symbreak.networks.denoiser import Denoiser, Denoises, LawDenoiser, as_denoiser, network_of
from symbreak.networks.families import SigmaDenoiser
from symbreak.noise import sigma_of
from symbreak.runtime.errors import InputError

__all__ = ["Guided", "check_classes", "class_count", "conditional", "guided", "null_label", "unconditional"]


def conditional(denoiser: Denoiser) -> Any:
    """A denoiser that takes classes, as one that ``bind(class_labels=...)`` fixes them for.

    Raises:
        InputError: for a network without classes.
    """
    if not hasattr(denoiser, "bind") and class_count(denoiser) is not None:
        return SigmaDenoiser(denoiser, tuple(denoiser.shape), denoiser.sigma_range, {})
    network = network_of(denoiser)
    known = not hasattr(network, "config") or class_count(denoiser) is not None
    if not hasattr(denoiser, "bind") or not known:
        name = type(denoiser if network is None else network).__name__
        raise InputError(f"{name} is a network without classes; expected a class-conditional one.")
    return denoiser


def class_count(network: object) -> int | None:
    """Rows of a network's class embedding, the null class's among them; ``None`` where it does not say."""
    return _said(network, "num_class_embeds")


def null_label(network: object) -> int | None:
    """The label of a network's null class, which stands for no condition; ``None`` where it does not say."""
    return _said(network, "null_label")


def _said(network: Any, name: str) -> int | None:
    """What a network, that of a denoiser, or its config says of itself."""
    for source in (network, network_of(network)):
        value = getattr(getattr(source, "config", source), name, None)
        if value is not None:
            return int(value)
    return None


def check_classes(labels: torch.Tensor, network: object, null: int | None = None) -> None:
    """Labels that a network or a law does not have, or that are the null class, raise an error."""
    classes, count = getattr(network, "classes", None), class_count(network)
    values = labels.unique().tolist()
    if classes is not None:
        known = set(classes.tolist())
        bad, there = [v for v in values if v not in known], f"the law's classes are {sorted(known)}"
    else:
        bad = [v for v in values if v < 0 or (count is not None and v >= count)]
        there = "expected 0 or more" if count is None else f"the network knows 0 to {count - 1}"
    if bad:
        raise InputError(f"the class {bad[0]}, but {there}.")
    if null is not None and null in values:
        raise InputError(f"some labels are {null}, the null class, which stands for no condition. Leave them out.")


def unconditional(denoiser: Denoises | Denoiser, null: int | None = None) -> Denoiser:
    """A network without its condition, which is the condition of its null class; of a law the law of all classes.

    Args:
        denoiser: class-conditional network as a `Denoiser`, or a law.
        null: label of the null class; by default the one that the network says it has.

    Raises:
        InputError: for a network without classes, or one that does not have or say its null class.
    """
    source = as_denoiser(denoiser)
    if isinstance(source, LawDenoiser):
        if null is not None:
            raise InputError(f"the null class {null} came for a law, which has the law of all classes. Leave it out.")
        return source
    network, count = conditional(source), class_count(source)
    label = null_label(source) if null is None else null
    last = 10 if count is None else count - 1
    if label is None:
        raise InputError(
            f"the network does not say which of its classes is the null class, the one without a condition. Pass its "
            f"label, such as {last}, if it was trained with one."
        )
    if isinstance(label, bool) or int(label) != label or not 0 <= label <= (label if count is None else last):
        raise InputError(f"the null class {label}; expected a label of the network, from 0 to {last}.")
    out: Denoiser = network.bind(class_labels=torch.tensor([int(label)]))
    return out


class Guided:
    """Two denoisers as one; see `guided`."""

    def __init__(self, conditional: Any, unconditional: Denoiser, scale: float, window: tuple[float, float]) -> None:
        self.conditional, self.unconditional = conditional, unconditional
        self.scale, self.window = scale, window
        self.shape: tuple[int, ...] = tuple(conditional.shape)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Levels that both of them know."""
        ranges = self.conditional.sigma_range, self.unconditional.sigma_range
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def evaluations(self, sigma: float) -> int:
        """Network evaluations (NFE) that a level costs: 2 where the unconditional denoiser is needed, too."""
        return 2 if self.scale != 1 and self.window[0] < sigma <= self.window[1] else 1

    def bind(self, **condition: object) -> Guided:
        """The same with a condition of the conditional denoiser fixed, e.g. ``bind(class_labels=y)``."""
        return Guided(self.conditional.bind(**condition), self.unconditional, self.scale, self.window)

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        with_condition: torch.Tensor = self.conditional(x, sigma)
        costs = [
            self.evaluations(s) for s in torch.as_tensor(sigma_of(sigma), dtype=torch.float64).reshape(-1).tolist()
        ]
        if 2 not in costs:
            return with_condition
        without = self.unconditional(x, sigma)
        out = without + self.scale * (with_condition - without)
        inside = torch.tensor([cost == 2 for cost in costs], device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(inside, out, with_condition)


def guided(
    conditional: Denoises | Denoiser,
    unconditional: Denoises | Denoiser,
    scale: float,
    window: tuple[float, float] | None = None,
) -> Guided:
    """Classifier-free guidance as a denoiser, in a window of noise levels.

        D = D_u + w (D_c - D_u)    for low < sigma <= high        D = D_c    elsewhere

    The score follows the same rule: inside the window it is that of p_u^(1 - w) p_c^w at every level.

    Args:
        conditional: law or denoiser D_c, such as ``sb.denoiser(unet, scheduler, class_labels=y)``.
        unconditional: law or denoiser D_u, such as the same network with its empty class.
        scale: w; 1 is the conditional denoiser alone, which then is the only one that is evaluated.
        window: (low, high); by default every level.

    Returns:
        A `Denoiser`; ``evaluations(sigma)`` says what a level costs. `as_unet` makes it one that samplers take.

    Raises:
        InputError: for shapes that differ, no level that both know, a scale that is not finite, or a window
            that is upside down.

    Source: Ho & Salimans 2022, arXiv:2207.12598; the window: Kynkäänniemi et al. 2024, arXiv:2404.07724.

    >>> import symbreak as sb
    >>> both, one = sb.Empirical([[-1.0], [1.0]]), sb.Empirical([[1.0]])
    >>> d = sb.guided(one, both, scale=2.0, window=(0.5, 2.0))
    >>> d.evaluations(1.0), d.evaluations(3.0)
    (2, 1)
    """
    try:
        c, u = as_denoiser(conditional), as_denoiser(unconditional)
    except TypeError as error:
        raise InputError(str(error)) from None
    if tuple(c.shape) != tuple(u.shape):
        raise InputError(
            f"the conditional denoiser has the shape {tuple(c.shape)}, the unconditional one {tuple(u.shape)}; "
            "expected one shape."
        )
    if not math.isfinite(scale):
        raise InputError(f"a guidance scale of {scale}; expected a finite number, such as 2.")
    low, high = (0.0, math.inf) if window is None else (float(window[0]), float(window[1]))
    if not 0 <= low < high:
        raise InputError(f"a guidance window from sigma {low:g} to {high:g}; expected 0 <= low < high.")
    both = Guided(c, u, float(scale), (low, high))
    first, last = both.sigma_range
    if not first < last:
        raise InputError(
            f"no level that both denoisers know: the conditional one {c.sigma_range}, the unconditional one "
            f"{u.sigma_range}. Use denoisers of one range."
        )
    return both
