"""Sampling: seeds -> noise -> starts -> images, over any scheduler.

An image is its seed: its noise comes from ``torch.Generator().manual_seed(seed)``, in the order in which
a diffusers pipeline given a list of generators draws it, and every network call runs on a padded
micro-batch of one fixed size, because a network's rows change by about 1e-6 with the batch they run in.
The same seed therefore gives the same bits whatever its neighbours, on one machine, torch build,
number of threads and micro-batch size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from symbreak.files import InputError
from symbreak.start import LateStart

__all__ = ["generate", "parse_seeds"]


def parse_seeds(text: str) -> list[int]:
    """Seeds from ``"0-99"``, ``"7"`` or ``"1,4,10-12"``.

    >>> parse_seeds("1,4,10-12")
    [1, 4, 10, 11, 12]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            a = int(first)
            b = int(last) if last else a
        except ValueError:
            raise InputError(f"seeds {text!r}; expected numbers and ranges such as 0-99 or 1,4,10-12.") from None
        if b < a or b - a >= 10_000_000:
            raise InputError(f"the seed range {part.strip()} is empty or longer than ten million.")
        seeds.extend(range(a, b + 1))
    return seeds


def check(unet: Any, start: LateStart, seeds: Sequence[int], micro_batch: int) -> tuple[int, int, int]:
    """Refuse what cannot be sampled before anything is done; the shape (C, H, W) of an image."""
    if micro_batch < 1:
        raise InputError(f"a micro-batch of {micro_batch}; expected at least 1.")
    if not seeds:
        raise InputError("no seeds; expected at least one.")
    if not 0 <= min(seeds) <= max(seeds) < 2**63:
        raise InputError(f"seeds from {min(seeds)} to {max(seeds)}; expected 0 to 2^63 - 1.")
    size = unet.config.sample_size
    h, w = (size, size) if isinstance(size, int) else tuple(size)
    shape = (int(unet.config.in_channels), int(h), int(w))
    if start.law is not None and tuple(start.law.shape) != shape:
        raise InputError(
            f"the start's law has the shape {tuple(start.law.shape)}, the network {shape}. Fit it on such data."
        )
    return shape


def batches(
    unet: Any,
    start: LateStart,
    seeds: Sequence[int],
    *,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    device: str | torch.device | None = None,
    **condition: Any,
) -> Iterator[torch.Tensor]:
    """Images [b, C, H, W] of the seeds, one micro-batch after the other; see `generate`."""
    seeds = [int(s) for s in seeds]
    shape = check(unet, start, seeds, micro_batch)
    if clean is not None and len(clean) != len(seeds):
        raise InputError(f"{len(clean)} clean images for {len(seeds)} seeds; expected one each.")
    device = device or getattr(unet, "device", "cpu")
    takes_generator = "generator" in inspect.signature(start.scheduler.step).parameters
    scales = hasattr(start.scheduler, "scale_model_input")  # flow-matching schedulers do not scale
    for first in range(0, len(seeds), micro_batch):
        some = seeds[first : first + micro_batch]
        padded = some + [0] * (micro_batch - len(some))
        generators = [torch.Generator().manual_seed(s) for s in padded]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        if clean is None:
            state = start(noise)
        else:
            base = torch.zeros(micro_batch, *shape, device=device)
            base[: len(some)] = clean[first : first + len(some)].to(device)
            state = start.state(base + start.level.sigma * noise)
        scheduler = start.fresh()
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(state, t) if scales else state
            out = unet(seen, t.to(seen.device).expand(len(seen)), return_dict=False, **condition)[0]
            if out.shape[1] == 2 * shape[0] and type(scheduler).__name__ != "DDPMScheduler":
                out = out[:, : shape[0]]  # only DDPM steps know what to do with a learned variance
            # A list of generators: every image draws its own noise, whoever runs beside it.
            extra = {"generator": generators} if takes_generator else {}
            state = scheduler.step(out, t, state, return_dict=False, **extra)[0]
        yield state[: len(some)].float().cpu()


def generate(
    unet: Any,
    start: LateStart,
    seeds: Sequence[int],
    *,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    device: str | torch.device | None = None,
    clamp: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **condition: Any,
) -> torch.Tensor:
    """Images of the given seeds from a network and a start.

    Args:
        unet: diffusers network (or `as_unet`), called on micro-batches.
        start: from `late_start` or `standard_start`; its ``calls`` is the cost of an image.
        seeds: one integer an image.
        micro_batch: fixed size of every network call; the last one is padded.
        clean: images [N, C, H, W] to noise to the start level instead of drawing from the law
            (the best any law could do there).
        clamp: cut the result to [-1, 1] (pixels).
        progress: called with (images done, images in all).
        **condition: passed to the network.

    Returns:
        Images [N, C, H, W] float32.

    Raises:
        InputError: where the law's shape is not the network's, or seeds and images do not match.
    """
    parts: list[torch.Tensor] = []
    done = 0
    with torch.inference_mode():
        for part in batches(unet, start, seeds, micro_batch=micro_batch, clean=clean, device=device, **condition):
            parts.append(part.clamp(-1, 1) if clamp else part)
            done += len(part)
            if progress is not None:
                progress(done, len(seeds))
    return torch.cat(parts).clone()
