"""A network that learns only what a law does not know.

    D(x, sigma) = D_law(x, sigma) + c_out(sigma) F(c_in(sigma) x, sigma)    sigma <= top
    D(x, sigma) = D_law(x, sigma)                                          sigma > top

c_out^2 is the law's mean squared error per element, so that the target (x_0 - D_law) / c_out of F has unit variance at
every level; c_in = (sigma^2 + E x_0^2)^-1/2. EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364) is the case
of an isotropic Gaussian N(0, sigma_data^2 I) as the law. Above the symmetry breaking no network is better than the law
(Raya & Ambrogioni 2023, arXiv:2305.19693), so none is trained there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from symbreak.networks.denoiser import Denoises, denoise_by_class, in_words
from symbreak.noise import generator, sigma_of
from symbreak.runtime.errors import InputError

__all__ = ["LawResidual", "Mlp", "backbone", "law_answer", "law_error", "law_size", "residual_of"]

LOWEST = 0.005  # of the levels at which the law's error is tabulated
LEVELS = 24
TIME = 250.0  # a network of diffusers is told 250 log(sigma): the span of DDPM's thousand steps


def law_answer(
    law: Any,
    x: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor | None = None,
    fade: tuple[float, float] = (0, 1),
) -> torch.Tensor:
    """What a network is added to [B, *S] at levels [B]: the law's answer, or that of a class's own law.

    Where the law has classes, a label [B] that is none of them, as the null class is none, gets the law of all. With
    ``fade`` = (f, v) the answer gives way to that of N(0, v I) below sigma = f, with the weight
    sigma^8 / (sigma^8 + f^8) of the law's.
    """
    out = denoise_by_class(law, x, sigma, labels, null=True)
    if fade[0] > 0:
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        weight = 1 / (1 + (fade[0] / s) ** 8)
        out = weight * out + (1 - weight) * x * (fade[1] / (fade[1] + s * s))
    return out


def law_size(law: Any) -> float:
    """E x_0^2 of an element of x_0; of a law without moments by draws that are always the same."""
    moments = getattr(law, "moments", None)
    if moments is None:
        return float(law.sample(1024, generator=generator(0, 403)).square().mean())
    return (moments.trace + float(moments.mean.square().sum())) / moments.dim


def law_error(
    law: Denoises,
    clean: torch.Tensor,
    top: float,
    lowest: float = LOWEST,
    labels: torch.Tensor | None = None,
    fade: tuple[float, float] = (0, 1),
) -> torch.Tensor:
    """The law's mean squared error per element over its levels, [2, L] float64: sigma and E |x_0 - D_law|^2 / d.

    Args:
        law: the law.
        clean: images [N, *S], best ones that the law was not fitted to.
        top: the highest level.
        lowest: the lowest one.
        labels: classes [N], to ask a law with classes for each class's own answer.
        fade: see `law_answer`.
    """
    noise = torch.randn(clean.shape, generator=generator(0, 401), dtype=torch.float64)
    sigmas = np.geomspace(lowest, top, LEVELS)
    x = clean.double()
    each = [torch.full((len(x),), float(s), dtype=torch.float64) for s in sigmas]
    errors = [float((x - law_answer(law, x + s[0] * noise, s, labels, fade)).square().mean()) for s in each]
    return torch.tensor(np.stack([sigmas, np.maximum(errors, 1e-12)]))


class LawResidual(torch.nn.Module):
    """A law and what a network F adds to it, as one denoiser; see the head of this file.

    Args:
        law: a law of sample shape S, such as `PrincipalMixture`.
        network: F(x, sigma, **condition) -> [B, *S] for x [B, *S] and sigma [B]; a network of diffusers is called as
            ``unet(x, 250 log(sigma))``.
        error: the law's mean squared error per element, [2, L]: sigma and error; by default that of 256 draws of the
            law itself.
        top: the level above which the law answers alone.
        fade: sigma below which the law gives way to an isotropic Gaussian, where it knows little (`law_answer`).
        second_input: whether F also sees the law's answer, as further channels: [B, 2 C, ...].

    Raises:
        InputError: for a top or an error that is not positive, or a network that answers in another shape.

    >>> import symbreak as sb, torch
    >>> law = sb.Gaussian.fit(torch.randn(64, 2))
    >>> d = sb.LawResidual(law, lambda x, sigma: 0 * x, top=1.0)
    >>> bool(torch.equal(d(torch.ones(1, 2), 0.5), law.denoise(torch.ones(1, 2), 0.5)))
    True
    """

    def __init__(
        self,
        law: Any,
        network: Any,
        *,
        error: torch.Tensor | None = None,
        top: float = math.inf,
        fade: float = 0.0,
        second_input: bool = False,
    ) -> None:
        super().__init__()
        self.law, self.network, self.top, self.second_input = law, network, float(top), bool(second_input)
        self.shape: tuple[int, ...] = tuple(law.shape)
        if not self.top > 0:
            raise InputError(f"a residual below sigma {top:g}; expected a level above 0.")
        self.size = law_size(law)
        self.fade = float(fade), self.size
        if error is None:
            draws = law.sample(256, generator=generator(0, 402))
            error = law_error(law, draws, min(self.top, 1e3), fade=self.fade)
        error = torch.as_tensor(error, dtype=torch.float64)
        if error.ndim != 2 or len(error) != 2 or not bool((error > 0).all()) or not bool(torch.isfinite(error).all()):
            raise InputError("the law's error is two rows, sigma and squared error, of numbers above 0.")
        self.error = error
        self._table = error[0].log(), error[1].log() - 2 * error[0].log()
        config = getattr(network, "config", None)
        self.num_class_embeds: int | None = getattr(config, "num_class_embeds", None)
        self.null_label: int | None = getattr(config, "null_label", None)

    def __repr__(self) -> str:
        return in_words(self, f"{self.law!r}, {type(self.network).__name__}, top={self.top:.4g}")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """From the lowest level at which the law's error is known to infinity, where the law answers alone."""
        return float(self.error[0, 0]), math.inf

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """c_out at levels [B]: interpolated in log sigma, with a constant error / sigma^2 beyond the table."""
        # as a sum of hinges, which any transform of torch.func can differentiate and batch
        at, ratio = (v.to(sigma.device) for v in self._table)
        u = sigma.double().log()
        bends = torch.diff(torch.diff(ratio) / torch.diff(at), prepend=at.new_zeros(1), append=at.new_zeros(1))
        log_ratio = ratio[0] + ((u[:, None] - at).clamp_min(0) * bends).sum(1)
        return (u + 0.5 * log_ratio).exp().to(sigma)

    def correction(self, x: torch.Tensor, sigma: torch.Tensor, base: torch.Tensor, **condition: Any) -> torch.Tensor:
        """F [B, *S] for VE states x [B, *S] at levels [B]."""
        column = sigma.reshape(-1, *[1] * (x.ndim - 1))
        c_in = (column**2 + self.size).rsqrt()
        seen = x * c_in
        if self.second_input:
            seen = torch.cat([seen, base / math.sqrt(self.size)], 1)
        weight = next(iter(self.network.parameters()), x) if isinstance(self.network, torch.nn.Module) else x
        seen, level = seen.to(weight), sigma.to(weight)
        if isinstance(self.network, ModelMixin) and not isinstance(self.network, Mlp):
            out = self.network(seen, TIME * level.log(), **condition, return_dict=False)[0]
        else:
            out = self.network(seen, level, **condition)
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(
                f"the residual's network gave {came} for states of {tuple(x.shape)}; expected the same shape."
            )
        return out

    def settings(self) -> dict[str, object]:
        """What a file needs beside law and network: plain values."""
        return {"top": self.top, "fade": self.fade[0], "second_input": self.second_input, "error": self.error.tolist()}

    def forward(
        self, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """E[x_0 | x], [B, *S] for VE states x [B, *S]; sigma a number or [B]."""
        s = torch.as_tensor(sigma_of(sigma), dtype=x.dtype, device=x.device).reshape(-1)
        s = s.expand(len(x)) if len(s) == 1 else s
        base = law_answer(self.law, x, s, class_labels, self.fade)
        inside = s <= self.top * (1 + 1e-6)  # a grid kept in float32 may begin a hair above
        if not bool(inside.any()):
            return base
        condition = {} if class_labels is None else {"class_labels": class_labels[inside]}
        rows = slice(None) if bool(inside.all()) else inside
        f = self.correction(x[rows], s[rows], base[rows], **condition).to(x)
        out = base.clone()
        out[rows] = base[rows] + self.scale(s[rows]).reshape(-1, *[1] * (x.ndim - 1)) * f
        return out


class Mlp(ModelMixin, ConfigMixin):
    """A small network for vectors and signals: F(x, sigma) -> [B, *S] through hidden layers of one width.

    Args:
        shape: sample shape S.
        width: of every hidden layer.
        layers: hidden layers.
        inputs: 2 where the law's answer is a second input.
        num_class_embeds: rows of the class embedding, with that of the null class.
    """

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int] = (2,),
        width: int = 256,
        layers: int = 3,
        inputs: int = 1,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        d = math.prod(shape)
        self.first = torch.nn.Linear(inputs * d + 32, width)
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers - 1))
        self.last = torch.nn.Linear(width, d)
        self.of_class = torch.nn.Embedding(num_class_embeds, width) if num_class_embeds else None

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        angle = sigma.log()[:, None] * torch.linspace(0.25, 4.0, 16, device=x.device, dtype=x.dtype)
        h = self.first(torch.cat([x.flatten(1), angle.sin(), angle.cos()], 1))
        if self.of_class is not None and class_labels is not None:
            h = h + self.of_class(class_labels)
        for layer in self.hidden:
            h = h + layer(torch.nn.functional.silu(h))
        return self.last(torch.nn.functional.silu(h)).reshape(len(x), *self.config.shape)


def residual_of(unet: Any) -> LawResidual | None:
    """The residual behind a network of `as_unet`, where there is one."""
    source = getattr(unet, "source", None)
    return source if isinstance(source, LawResidual) else None


def backbone(unet: Any) -> Any:
    """The network that was trained: that of a residual, or the network itself."""
    residual = residual_of(unet)
    return unet if residual is None else residual.network
