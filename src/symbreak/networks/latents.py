"""Latents: images as a latent diffusion network sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from symbreak.data.images import Images
from symbreak.data.samples import samples
from symbreak.runtime.files import InputError
from symbreak.runtime.run import padded_blocks

__all__ = ["Latents", "decode", "encode"]


class Latents:
    """The latents of images as a stream that can be walked again and again; see `encode`."""

    def __init__(self, vae: Any, data: Any, batch: int, sample: bool, seed: int) -> None:
        self.vae, self.data, self.batch, self.sample, self.seed = vae, data, batch, sample, seed
        self.labels = getattr(data, "labels", None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        batches = (torch.as_tensor(some).float() for some in self.data)
        for images, rows in padded_blocks(batches, self.batch):
            yield self._encode(images, rows, generator)

    def images(self) -> Images:
        """All of them as a data set of values that are no pixels, with its labels."""
        return samples(torch.cat(list(self)), labels=self.labels)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        """Latents of the first n images, of one fixed number, so that a latent does not depend on its neighbours."""
        channels = getattr(self.vae.config, "in_channels", None)
        if images.ndim != 4 or (channels is not None and images.shape[1] != channels):
            raise InputError(
                f"images of shape {tuple(images.shape)} for an autoencoder of {channels} channels; expected "
                f"[B, {channels}, H, W]."
            )
        if not float(images.abs().max()) <= 1 + 1e-3:
            raise InputError(
                f"images from {float(images.min()):g} to {float(images.max()):g}; an autoencoder takes [-1, 1]."
            )
        weight = next(iter(self.vae.parameters()), images)
        out = self.vae.encode(images.to(weight.device, weight.dtype))
        law = getattr(out, "latent_dist", None)
        z = (out.latents if law is None else law.mean)[:n].float().cpu()
        if self.sample:
            if law is None:
                raise InputError(f"{type(self.vae).__name__} has no latent law to draw from. Leave sample out.")
            z = z + law.std[:n].float().cpu() * torch.randn(z.shape, generator=generator)
        return _scaled(z, self.vae.config)


def _scaled(z: torch.Tensor, config: object) -> torch.Tensor:
    """Raw latents -> those that the diffusion network sees."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        column = [1, -1] + [1] * (z.ndim - 2)
        z = (z - torch.tensor(mean).reshape(column)) / torch.tensor(std).reshape(column)
    shift, scale = getattr(config, "shift_factor", None), getattr(config, "scaling_factor", None)
    return (z - (0.0 if shift is None else shift)) * (1.0 if scale is None else scale)


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Latents as a diffusion network makes them -> images [N, C, H, W] in [-1, 1], float32; the inverse of `encode`.

    Args:
        vae: a diffusers autoencoder, such as ``pipe.vae``.
        latents: [N, c, h, w].
        batch: fixed size of every call of the autoencoder; the last one is padded.

    Raises:
        InputError: for latents of other channels than the autoencoder's.
    """
    config, weight = vae.config, next(iter(vae.parameters()), latents)
    channels = getattr(config, "latent_channels", None)
    if channels is not None and latents.shape[1] != channels:
        raise InputError(f"latents of {latents.shape[1]} channels for an autoencoder of {channels}. Pass its own.")
    # The inverse of an affine map, from what it does to 0 and to 1.
    zero = _scaled(torch.zeros(1, *latents.shape[1:]), config)
    slope = _scaled(torch.ones(1, *latents.shape[1:]), config) - zero
    out = []
    for z, rows in padded_blocks(iter([(latents.float().cpu() - zero) / slope]), batch):
        made = vae.decode(z.to(weight.device, weight.dtype))
        out.append(getattr(made, "sample", made)[:rows].float().cpu())
    return torch.cat(out).clamp(-1, 1)


def encode(vae: Any, data: Any, batch: int = 16, sample: bool = False, seed: int = 0) -> Latents:
    """Images as the latents that a latent diffusion network sees, e.g. to fit a start there.

        z = (mean of q(z | x) - shift_factor) scaling_factor

    Args:
        vae: a diffusers autoencoder, such as ``pipe.vae``.
        data: `Images`, a tensor [N, C, H, W] or batches of them that can be walked again, in [-1, 1].
        batch: fixed size of every call of the autoencoder; the last one is padded.
        sample: draw from q(z | x), as training does, instead of taking its mean.
        seed: of these draws.

    Returns:
        An iterable of batches [B, c, h, w], float32, made as it is walked; it carries the data's ``labels``.

    Raises:
        InputError: for data that can be walked only once, are not in [-1, 1] or do not have the autoencoder's
            channels.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch}; expected at least 1.")
    if isinstance(data, torch.Tensor):
        data = [data]
    elif iter(data) is data:
        raise InputError(
            "the images come from a generator, which can be walked once. Pass a list, a tensor or sb.images."
        )
    return Latents(vae, data, int(batch), sample, seed)
