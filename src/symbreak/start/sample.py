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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import alone, dealt, rank_of, shares
from symbreak.runtime.rows import HELD, Shards
from symbreak.runtime.run import Arrays, Keep, unkept
from symbreak.start.late_start import LateStart

__all__ = ["generate", "generate_shards", "parse_seeds"]

KEPT = 256  # images of a kept block, about


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
        if b < a or len(seeds) + b - a >= 10_000_000:
            raise InputError(f"the seed range {part.strip()} is empty, or makes more than ten million seeds.")
        seeds.extend(range(a, b + 1))
    return seeds


def check(unet: Any, start: LateStart, seeds: Sequence[int], micro_batch: int) -> tuple[int, int, int]:
    """Refuse what cannot be sampled before anything is done; the shape (C, H, W) of an image."""
    if not seeds:
        raise InputError("no seeds; expected at least one.")
    if not 0 <= min(seeds) <= max(seeds) < 2**63:
        raise InputError(f"seeds from {min(seeds)} to {max(seeds)}; expected 0 to 2^63 - 1.")
    return check_shape(unet, start, micro_batch)


def check_shape(unet: Any, start: LateStart, micro_batch: int) -> tuple[int, int, int]:
    """The shape (C, H, W) of an image; refuse a start whose law has another one."""
    if micro_batch < 1:
        raise InputError(f"a micro-batch of {micro_batch}; expected at least 1.")
    size = unet.config.sample_size
    h, w = (size, size) if isinstance(size, int) else tuple(size)
    shape = (int(unet.config.in_channels), int(h), int(w))
    if start.law is not None and tuple(start.law.shape) != shape:
        raise InputError(
            f"the start's law has the shape {tuple(start.law.shape)}, the network {shape}. Fit it on such data."
        )
    return shape


def check_labels(unet: Any, labels: Any, count: int) -> torch.Tensor | None:
    """Class labels [count] that the network knows, or ``None`` for a network without classes.

    Raises:
        InputError: for labels the network does not have, one too few or too many, none for a network that
            needs them, or some for a network that has no classes.
    """
    classes = getattr(unet.config, "num_class_embeds", None)
    if labels is None:
        if classes:
            raise InputError(f"the network has {classes} classes, but no labels came. Pass one class a sample.")
        return None
    if not classes:
        raise InputError("class labels came for a network without classes. Leave them out.")
    y = torch.as_tensor(labels).detach().cpu()
    if y.ndim == 0:
        y = y.expand(count)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"class labels of the type {y.dtype}; expected whole numbers.")
    if tuple(y.shape) != (count,):
        raise InputError(f"class labels of shape {tuple(y.shape)} for {count} samples; expected one each.")
    if count and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise InputError(f"class labels from {int(y.min())} to {int(y.max())}; the network knows 0 to {classes - 1}.")
    return y.long()


def precision(unet: Any) -> torch.dtype:
    """The dtype of states: float64 for a float64 network, else float32."""
    weight = next(iter(unet.parameters()), None)
    return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32


def _rows(call: Callable[..., torch.Tensor], micro_batch: int, *rows: torch.Tensor | None) -> torch.Tensor:
    """``call`` over rows, always on ``micro_batch`` of them: the last ones are padded with copies of a row."""
    parts = []
    n = len(rows[0])  # type: ignore[arg-type]
    for first in range(0, n, micro_batch):
        own = min(micro_batch, n - first)
        index = torch.arange(first, first + micro_batch)
        index[own:] = first
        parts.append(call(*(None if r is None else r[index.to(r.device)] for r in rows))[:own])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def integrate(
    unet: Any,
    start: LateStart,
    noise: torch.Tensor,
    generator: Any = None,
    *,
    labels: torch.Tensor | None = None,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    each: Callable[[int, Any, torch.Tensor], torch.Tensor] | None = None,
    **condition: Any,
) -> torch.Tensor:
    """The sampler's loop: white noise [n, *S] -> the state after the last step.

    The start and the network run on padded micro-batches; the scheduler, which acts on every number by
    itself, steps all rows at once.

    Args:
        unet: the network.
        start: the start.
        noise: [n, *S] on the device and in the dtype of the states.
        generator: for samplers that draw noise: one generator a row, or one for all.
        labels: classes [n], for the start and the network.
        micro_batch: fixed size of every network call.
        clean: images [n, *S] to noise to the start level instead of drawing from the law.
        each: called after every step with its index, the network's time and the state; returns the state
            to go on with.
        **condition: passed to the network.
    """
    n, channels = len(noise), noise.shape[1]
    if labels is not None:
        labels = labels.to(noise.device)
    if clean is None:
        state = _rows(lambda z, y: start(z, y), micro_batch, noise, labels)
    else:
        state = start.state(clean.to(noise) + start.level.sigma * noise)
    scheduler = start.fresh()
    # A list of generators: every image draws its own noise, whoever runs beside it.
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    scales = hasattr(scheduler, "scale_model_input")  # flow-matching schedulers do not scale
    weight = next(iter(unet.parameters()), noise)

    def network(seen: torch.Tensor, y: torch.Tensor | None, t: torch.Tensor) -> torch.Tensor:
        given = condition if y is None else {**condition, "class_labels": y}
        time = t.to(seen.device).expand(len(seen))
        out: torch.Tensor = unet(seen.to(weight.dtype), time, return_dict=False, **given)[0]
        return out.to(state.dtype)

    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(state, t) if scales else state
        out = _rows(lambda x, y, t=t: network(x, y, t), micro_batch, seen, labels)
        if out.shape[1] == 2 * channels and type(scheduler).__name__ != "DDPMScheduler":
            out = out[:, :channels]  # only DDPM steps know what to do with a learned variance
        state = scheduler.step(out, t, state, return_dict=False, **extra)[0]
        if each is not None:
            state = each(i, t, state)
            if state.shape != noise.shape:
                raise InputError(f"a step gave states of {tuple(state.shape)}; expected {(n, *noise.shape[1:])}.")
    return state


def generate(
    unet: Any,
    start: LateStart,
    seeds: Sequence[int],
    labels: Any = None,
    *,
    micro_batch: int = 64,
    clean: torch.Tensor | None = None,
    device: str | torch.device | None = None,
    clamp: bool = True,
    keep: Keep | None = None,
    progress: Callable[[int, int], None] | None = None,
    **condition: Any,
) -> torch.Tensor:
    """Images of the given seeds from a network and a start.

    Args:
        unet: diffusers network (or `as_unet`), called on micro-batches.
        start: from `late_start` or `standard_start`; its ``calls`` is the cost of an image.
        seeds: one integer an image.
        labels: class [N] of every image (or one for all), for class-conditional networks; the start and
            the network both get them.
        micro_batch: fixed size of every network call; the last one is padded.
        clean: images [N, C, H, W] to noise to the start level instead of drawing from the law
            (the best any law could do there).
        clamp: cut the result to [-1, 1] (pixels).
        keep: ``keep(key, make)`` gives stored images of a block of seeds, or stores those that make() gives, e.g.
            `Blocks.keep` under the settings that decide them.
        progress: called with (images done, images in all).
        **condition: passed to the network.

    Ranks share the micro-batches, and all of them get all images (`symbreak.runtime.ranks`).

    Returns:
        Images [N, C, H, W] float32.

    Raises:
        InputError: where the law's shape is not the network's, seeds and images do not match, or labels
            are missing, too many, or not the network's.
    """
    seeds = [int(s) for s in seeds]
    shape = check(unet, start, seeds, micro_batch)
    # Who hands the network its classes directly keeps them from the start, and answers for them.
    known = None if "class_labels" in condition else check_labels(unet, labels, len(seeds))
    if clean is not None and len(clean) != len(seeds):
        raise InputError(f"{len(clean)} clean images for {len(seeds)} seeds; expected one each.")
    device = device or getattr(unet, "device", "cpu")
    size = micro_batch if keep is None else micro_batch * max(1, KEPT // micro_batch)

    def images(some: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds[some]]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        state = integrate(
            unet,
            start,
            noise.to(device, precision(unet)),
            generators,
            labels=None if known is None else known[some],
            micro_batch=micro_batch,
            clean=None if clean is None else clean[some],
            **condition,
        )
        return state.clamp(-1, 1).float().cpu() if clamp else state.float().cpu()

    def fresh(first: int) -> Arrays:
        parts, stop = [], min(first + size, len(seeds))
        for at in range(first, stop, micro_batch):
            if progress is not None and at > first:
                progress(at, len(seeds))
            with torch.inference_mode():
                parts.append(images(slice(at, min(at + micro_batch, stop))))
        return {"x": torch.cat(parts).numpy()}

    def ended(blocks: int, _: int) -> None:
        if progress is not None:
            progress(min(blocks * size, len(seeds)), len(seeds))

    starts = range(0, len(seeds), size)
    found = dealt(starts, lambda first: (keep or unkept)(f"images/{first}", partial(fresh, first)), ended)
    return torch.from_numpy(np.concatenate([part["x"] for part in found]))


def generate_shards(
    unet: Any,
    start: LateStart,
    seeds: Sequence[int],
    *,
    micro_batch: int = 64,
    keep: Keep | None = None,
    memory: int = HELD,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """Images of the given seeds, the same as those of `generate`, of which every rank makes and holds a part.

    Args:
        unet, start, seeds, micro_batch, keep, progress: see `generate`.
        memory, folder: see `Shards`.
    """
    check(unet, start, seeds, micro_batch)
    size = micro_batch * max(1, KEPT // micro_batch)
    edges = shares(len(seeds), size)
    kept = keep or unkept
    if len(edges) == 2:  # too few for every rank to have some: they share the micro-batches
        whole = generate(unet, start, seeds, micro_batch=micro_batch, keep=keep, progress=progress)
        return Shards([whole.numpy()], edges, memory, folder)
    first, last = edges[rank_of()[0] :][:2]

    def own() -> Iterator[np.ndarray]:
        for at in range(first, last, size):
            some = seeds[at : min(at + size, last)]

            def under(_: str, make: Callable[[], Arrays], at: int = at) -> Arrays:
                return kept(f"images/{at}", make)

            with alone():
                x = generate(unet, start, some, micro_batch=micro_batch, keep=under)
            if progress is not None:
                progress(len(seeds) * (at + len(some) - first) // (last - first), len(seeds))
            yield x.numpy()

    return Shards(own(), edges, memory, folder)
