"""The denoiser contract: d(x, sigma) -> E[x_0 | x_0 + sigma eps = x], and what follows from it.

    score(x) = (D(x) - x) / sigma^2          dD/dx = Cov(x_0 | x) / sigma^2

(Tweedie; Miyasawa 1961, Efron 2011). Laws have one in closed form (`as_denoiser`), trained networks
are adapted to one (`symbreak.networks.families.denoiser`). x is a VE state [B, *S], sigma a float or [B].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from symbreak.noise import generator, sigma_of
from symbreak.runtime.files import InputError, digest
from symbreak.runtime.identity import Identity, of_device, of_scheduler, weights_hash
from symbreak.runtime.ranks import agreed
from symbreak.runtime.run import Run
from symbreak.runtime.shown import LONGEST, brief, shortened

__all__ = [
    "Batches",
    "Denoiser",
    "Denoises",
    "LawDenoiser",
    "as_denoiser",
    "ask",
    "class_count",
    "denoise_by_class",
    "fingerprint",
    "fingerprints",
    "fixed_class",
    "images_for",
    "in_words",
    "network_of",
    "null_label",
    "of_network",
    "open_classes",
    "score",
]

Batches: TypeAlias = torch.Tensor | np.ndarray | Iterable[torch.Tensor]  # images [N, *S], `Images` or batches
CHUNK = 64  # states of one call: a fixed size, so that results do not depend on how many states come


@runtime_checkable
class Denoiser(Protocol):
    """Anything that maps (x, sigma) to the posterior mean of x_0.

    Attributes:
        shape: sample shape S.
        sigma_range: levels at which it can be evaluated; outside it raises ValueError.
    """

    shape: tuple[int, ...]

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma."""

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x], [B, *S] for VE states x [B, *S]."""


@runtime_checkable
class Denoises(Protocol):
    """What a law has that makes it a `Denoiser`: its exact posterior mean."""

    shape: tuple[int, ...]

    def denoise(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + sigma eps = x], [B, *S]."""


class LawDenoiser:
    """A law's exact posterior mean as a `Denoiser`."""

    def __init__(self, law: Denoises, sigma_range: tuple[float, float] = (0.0, float("inf"))) -> None:
        self.law, self.sigma_range = law, sigma_range
        self.shape: tuple[int, ...] = tuple(law.shape)

    def __repr__(self) -> str:
        return in_words(self, repr(self.law))

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        return self.law.denoise(x, sigma)


def in_words(denoiser: Denoiser, what: str, condition: Mapping[str, object] | None = None) -> str:
    """A denoiser in a line: what it is, its shape, the levels that it knows, and what it is told."""
    low, high = denoiser.sigma_range
    told = "".join(f", {name}={brief(value)}" for name, value in (condition or {}).items())
    levels = f"sigma {low:.4g} .. {high:.4g}"
    return shortened(f"{type(denoiser).__name__}({what}, shape={tuple(denoiser.shape)}, {levels}{told})", LONGEST)


def as_denoiser(law_or_denoiser: Denoises | Denoiser) -> Denoiser:
    """A law's denoiser, or the denoiser itself.

    Raises:
        TypeError: for anything that is neither.
    """
    if isinstance(law_or_denoiser, Denoises):
        return LawDenoiser(law_or_denoiser)
    if isinstance(law_or_denoiser, Denoiser):
        return law_or_denoiser
    raise TypeError(
        f"{type(law_or_denoiser).__name__} is neither a law (it has no .denoise) nor a denoiser (d(x, sigma) with "
        ".shape and .sigma_range). Adapt a network with sb.denoiser(unet, scheduler)."
    )


def images_for(denoiser: Denoiser, data: Batches, sigma: np.ndarray, least: int = 2) -> torch.Tensor:
    """Images [N, *S] to noise and to ask a denoiser about, float32 unless they are float64.

    Args:
        denoiser: a `Denoiser`.
        data: a tensor or array [N, *S], an `Images` or batches.
        sigma: levels at which it will be evaluated.
        least: smallest number of images.

    Raises:
        InputError: for no images, too few, another shape than the denoiser's, NaN, or levels outside its range.
    """
    if isinstance(data, str):
        raise InputError(f"data={data!r} is a name; expected images. Pass sb.images({data!r}).")
    if isinstance(data, torch.Tensor | np.ndarray):
        whole = torch.as_tensor(data).cpu()
    else:
        batches = [torch.as_tensor(batch).cpu() for batch in data]
        whole = torch.cat(batches) if batches else torch.zeros(0)
    if len(whole) < least:
        raise InputError(f"{len(whole)} images; expected at least {least}, better 256.")
    if tuple(whole.shape[1:]) != tuple(denoiser.shape):
        raise InputError(
            f"images of shape {tuple(whole.shape[1:])} for a network of {tuple(denoiser.shape)}; expected one shape."
        )
    whole = whole if whole.dtype == torch.float64 else whole.float()
    if not bool(torch.isfinite(whole).all()):
        raise InputError("the images hold NaN or infinity; expected finite numbers.")
    low, high = denoiser.sigma_range
    if sigma.min() < low * (1 - 1e-9) or sigma.max() > high * (1 + 1e-9):
        raise InputError(
            f"levels from sigma {sigma.min():.4g} to {sigma.max():.4g}; the network knows {low:.4g} to {high:.4g}. "
            "Choose levels in that range."
        )
    return whole


def ask(
    denoiser: Any, x: torch.Tensor, sigma: float, labels: torch.Tensor | None = None, rows: int = CHUNK
) -> torch.Tensor:
    """D(x, sigma) [B, *S] in pieces of ``rows``, on the network's own device, answered in the dtype of x.

    Args:
        denoiser: a `Denoiser`.
        x: VE states [B, *S].
        sigma: level.
        labels: class [B] of every state, for a class-conditional network.
        rows: states of one call; the last call may have fewer.
    """
    weight = next(iter(getattr(denoiser, "unet", torch.nn.Identity()).parameters()), x)
    done = []
    for i in range(0, len(x), rows):
        of_class = denoiser
        if labels is not None:
            of_class = denoiser.bind(class_labels=labels[i : i + rows].to(weight.device))
        done.append(of_class(x[i : i + rows].to(weight.device), sigma).to(x))
    return done[0] if len(done) == 1 else torch.cat(done)


def denoise_by_class(
    law: Any, x: torch.Tensor, sigma: float | torch.Tensor, labels: torch.Tensor | None, null: bool = False
) -> torch.Tensor:
    """A law's posterior mean [B, *S], of every state's own class where it has classes and labels [B] come.

    Args:
        law: a law; one with classes has ``given(label)``.
        x: VE states [B, *S].
        sigma: level, or levels [B].
        labels: classes [B].
        null: whether a label that is no class of the law stands for none, and gets the law of all.

    Raises:
        InputError: for a label that is no class of the law, without ``null``.
    """
    classes = getattr(law, "classes", None)
    if labels is None or classes is None:
        whole: torch.Tensor = law.denoise(x, sigma)
        return whole
    there, out = set(classes.tolist()), torch.empty_like(x)
    for label in labels.unique().tolist():
        rows = (labels == label).to(x.device)
        own = law.given(label) if label in there or not null else law
        out[rows] = own.denoise(x[rows], sigma[rows] if isinstance(sigma, torch.Tensor) and sigma.ndim else sigma)
    return out


def fingerprint(denoiser: Denoiser) -> str:
    """A digest of what a denoiser answers to fixed states: names and weights do not tell all of them apart.

    At a low, a middle and a high level of its range, and to the first classes of a class-conditional network. A guided
    one asks its unconditional denoiser inside its window only, which may lie between these levels: so it counts itself.
    """
    low, high = denoiser.sigma_range
    low, high = max(low, 1e-3), min(high, 1e3)
    x, classes = torch.randn(4, *denoiser.shape, generator=generator(0, 97)), open_classes(denoiser)
    y = None if classes is None or not hasattr(denoiser, "bind") else torch.arange(4) % classes
    guidance, without = (_of(denoiser, name) for name in ("guidance", "unconditional"))
    guided = () if without is None else (json.dumps(guidance), fingerprint(without))
    with torch.inference_mode():
        levels = (low**w * high ** (1 - w) for w in (0.8, 0.5, 0.2))
        return digest(*(ask(denoiser, s * x, s, y) for s in levels), *guided)


def of_network(denoiser: Denoiser, scheduler: Any = None) -> Identity:
    """What decides the answers of a network or a law: weights, device, answers, and all settings of its scheduler.

    Names and paths do not count. The answers are the first process's: machines may differ in the last bits.
    """
    network = network_of(denoiser)
    guidance = _of(denoiser, "guidance")
    return {
        **({} if guidance is None else {"guidance": guidance}),
        "weights": None if network is None else weights_hash(network),
        "answers": agreed(lambda: fingerprint(denoiser)),
        "device": "cpu" if network is None else of_device(network),
        "scheduler": {} if scheduler is None else of_scheduler(scheduler),
    }


def network_of(denoiser: object) -> torch.nn.Module | None:
    """The network behind a denoiser; none behind a law or a plain function."""
    inner = getattr(denoiser, "unet", getattr(denoiser, "model", None))
    return inner if isinstance(inner, torch.nn.Module) else None


def _of(denoiser: object, name: str) -> Any:
    """What a denoiser, or the network behind it, has under a name; else ``None``."""
    return getattr(denoiser, name, getattr(network_of(denoiser), name, None))


def class_count(network: object) -> int | None:
    """Rows of the class embedding of a network or of a denoiser's, the null class's among them, where it says."""
    return _said(network, "num_class_embeds")


def open_classes(denoiser: object) -> int | None:
    """The same of a denoiser whose class is still open; ``None`` where it is fixed."""
    return None if "class_labels" in getattr(denoiser, "condition", {}) else class_count(denoiser)


def fixed_class(denoiser: object) -> int | None:
    """The class that a denoiser is fixed to, where it is a single one."""
    label = getattr(denoiser, "condition", {}).get("class_labels")
    if not isinstance(label, torch.Tensor) or label.numel() != 1 or label.is_floating_point():
        return None
    return int(label)


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


def fingerprints(run: Run, *sources: Denoises | Denoiser) -> list[str]:
    """What tells the finished parts of these laws or denoisers from others'; nothing where none are kept."""
    if run.folder is None:
        return []
    # Networks may differ in the last bits between machines: the first one's answers count.
    return list(agreed(lambda: [f"{hasattr(v, 'denoise')} {fingerprint(as_denoiser(v))}" for v in sources]))


def score(law_or_denoiser: Denoises | Denoiser, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """Gradient of the noised log density at VE states x, [B, *S]: (D(x, sigma) - x) / sigma^2."""
    s = torch.as_tensor(sigma_of(sigma), dtype=x.dtype, device=x.device)
    s = s.reshape(-1, *[1] * (x.ndim - 1)) if s.ndim else s
    return (as_denoiser(law_or_denoiser)(x, sigma) - x) / (s * s)
