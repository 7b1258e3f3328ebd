"""Guidance: two denoisers combined into one, with a condition and without; and a network without its condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from symbreak.networks.denoiser import (
    Denoiser,
    Denoises,
    LawDenoiser,
    as_denoiser,
    class_count,
    fixed_class,
    in_words,
    network_of,
    null_label,
)
from symbreak.networks.families import SigmaDenoiser
from symbreak.noise import sigma_of
from symbreak.runtime.errors import InputError

__all__ = ["Guided", "check_classes", "conditional", "guided", "without_condition"]


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


def without_condition(denoiser: Denoises | Denoiser, null: int | None = None) -> Denoiser:
    """A network without its condition, which is the condition of its null class; of a law the law of all classes.

    Args:
        denoiser: class-conditional network as a `Denoiser`, or a law.
        null: label of the null class; by default the one that the denoiser is fixed to, or the network says it has.

    Raises:
        InputError: for a network without classes, or one that does not have or say its null class.
    """
    source = as_denoiser(denoiser)
    if isinstance(source, LawDenoiser):
        if null is not None:
            raise InputError(f"the null class {null} came for a law, which has the law of all classes. Leave it out.")
        return source
    network, count = conditional(source), class_count(source)
    label = fixed_class(source) if null is None else null
    label = null_label(source) if label is None else label
    last = 10 if count is None else count - 1
    if label is None:
        raise InputError(
            "the network does not say which of its classes is the null class, the one without a condition. Pass its "
            f"label, such as null={last} (--null-label {last}), if it was trained with one."
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
        self.condition: Mapping[str, object] = getattr(conditional, "condition", {})
        network = network_of(conditional)
        if network is not None:
            self.unet = network  # by which others know where it runs, its weights and its classes

    def __repr__(self) -> str:
        return in_words(self, f"{self.conditional!r}, scale={self.scale:g}, window={self.window}")

    @property
    def guidance(self) -> dict[str, object]:
        """What decides its answers beside those of the two, as plain values; an end of ``None`` is none."""
        low, high = self.window
        return {"scale": self.scale, "window": [low, None if math.isinf(high) else high]}

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
        s = torch.as_tensor(sigma_of(sigma), dtype=torch.float64).reshape(-1)
        inside = torch.tensor([self.evaluations(v) == 2 for v in s.tolist()], device=x.device)
        if not bool(inside.any()):
            alone: torch.Tensor = self.conditional(x, sigma)
            return alone
        without, with_condition = self._both(x, sigma)
        out = without + self.scale * (with_condition - without)
        return torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), out, with_condition)

    def _both(self, x: torch.Tensor, sigma: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D_u and D_c: one batch of twice the size where both are one network that differs in its conditions' rows."""
        c, u = self.conditional, self.unconditional
        joined = None if self._network_apart() else _joined(u.condition, c.condition, len(x))  # type: ignore[attr-defined]
        if joined is None:
            return u(x, sigma), c(x, sigma)
        twice = torch.as_tensor(sigma_of(sigma))
        both = c.bind(**joined)(torch.cat([x, x]), torch.cat([twice, twice]) if twice.numel() > 1 else sigma)
        without, with_condition = both.chunk(2)
        return without, with_condition

    def _network_apart(self) -> bool:
        c, u = self.conditional, self.unconditional
        of = network_of(c)
        return of is None or of is not network_of(u) or type(c) is not type(u) or not hasattr(c, "bind")


def _joined(first: Mapping[str, object], last: Mapping[str, object], rows: int) -> dict[str, torch.Tensor] | None:
    """Two conditions of rows states each, one after the other; ``None`` where they cannot be put together."""
    if set(first) != set(last):
        return None
    out: dict[str, torch.Tensor] = {}
    for name in first:
        a, b = first[name], last[name]
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape[1:] != b.shape[1:]:
            return None
        if not a.ndim or {len(a), len(b)} - {1, rows}:
            return None
        out[name] = torch.cat([v.to(a).expand(rows, *v.shape[1:]) for v in (a, b)])
    return out


def guided(
    conditional: Denoises | Denoiser,
    unconditional: Denoises | Denoiser | int,
    scale: float | None = None,
    window: tuple[float, float] | None = None,
) -> Guided:
    """Classifier-free guidance as a denoiser, in a window of noise levels.

        D = D_u + w (D_c - D_u)    for low < sigma <= high        D = D_c    elsewhere

    The score follows the same rule: inside the window it is that of p_u^(1 - w) p_c^w at every level.

    Args:
        conditional: law or denoiser D_c, such as ``sb.denoiser(unet, scheduler, class_labels=y)``.
        unconditional: law or denoiser D_u, such as the same network with its null class; or the label of that class.
        scale: w, which has to be passed; 1 is the conditional denoiser alone, which then is the only one evaluated.
        window: (low, high), such as the ``levels`` of `guidance_window`; by default every level.

    Returns:
        A `Denoiser`, of all classes where the conditional one's is not fixed; ``evaluations(sigma)`` says what a level
        costs: two are one batch where both are one network. `generate` and `as_unet` take it in a network's place.

    Raises:
        InputError: for shapes that differ, no level that both know, a scale that is not finite, a window that is upside
            down or outside these levels, or a null class that the network does not have.

    Source: Ho & Salimans 2022, arXiv:2207.12598; the window: Kynkäänniemi et al. 2024, arXiv:2404.07724.

    >>> import symbreak as sb
    >>> both, one = sb.Empirical([[-1.0], [1.0]]), sb.Empirical([[1.0]])
    >>> d = sb.guided(one, both, scale=2.0, window=(0.5, 2.0))
    >>> d.evaluations(1.0), d.evaluations(3.0)
    (2, 1)
    """
    network = not isinstance(conditional, Denoises | Denoiser)
    if network or scale is None:
        null, classes = (f(getattr(conditional, "unet", conditional)) for f in (null_label, class_count))
        label = null if null is not None else "NULL" if classes is None else classes - 1
        what = f"{type(conditional).__name__}, which is no denoiser" if network else "no scale"
        raise InputError(
            f"guided() got {what}; expected the denoiser of a class, the label of the null class, and a scale. Call "
            f"sb.guided(sb.denoiser(unet, scheduler, class_labels=torch.tensor([3])), {label}, scale=2.0)."
        )
    try:
        c = as_denoiser(conditional)
        u = without_condition(c, unconditional) if isinstance(unconditional, int) else as_denoiser(unconditional)
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
    if high <= first or low >= last:
        raise InputError(
            f"a guidance window from sigma {low:g} to {high:g}; the network knows {first:.4g} to {last:.4g}. Choose "
            "one in that range."
        )
    return both
