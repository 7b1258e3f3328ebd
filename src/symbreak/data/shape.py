"""Images of one size and one number of channels: cropped in the middle, resized, grey or in colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from symbreak.data.images import BYTES, Images, Item, Raw, Unfit, is_count
from symbreak.data.pictures import DECISIONS
from symbreak.runtime.errors import InputError

__all__ = ["shaped", "to_fit"]

GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # ITU-R 601, as Pillow


def to_fit(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """How data of one shape are read in another, to end a message with, without its full stop.

    >>> to_fit((1, 20, 20), (3, 28, 28))
    'Resize them (--size 28) and read them in colour (--mode RGB)'
    """
    ways = []
    if len(shape) != 3 or len(expected) != 3 or shape[1:] != expected[1:]:
        square = len(expected) == 3 and expected[1] == expected[2]
        ways.append(f"resize them (--size {expected[1]})" if square else "resize them")
    if len(shape) == len(expected) == 3 and shape[0] != expected[0]:
        modes = {1: "in grey (--mode L)", 3: "in colour (--mode RGB)"}
        ways.append(f"read them {modes.get(expected[0], f'with {expected[0]} channels')}")
    said = " and ".join(ways)
    return said[:1].upper() + said[1:]


def shaped(images: Images, size: int | None, crop: int | str | None, mode: str | None, told: bool = True) -> Images:
    """Images that are cropped, then resized, then grey or in colour.

    Args:
        images: of any size.
        size: pixels of both sides; the filter is Pillow's antialiased bicubic one.
        crop: ``"center"`` for the largest square in the middle, or the pixels of its sides.
        mode: ``"RGB"`` or ``"L"``.
        told: whether the selection's history says so.

    Raises:
        InputError: for a crop that is larger than the first image.
    """
    if isinstance(crop, str) and crop.isdecimal():
        crop = int(crop)
    if not (crop in (None, "center") or is_count(crop)):
        raise InputError(f"crop {crop!r}; expected center or a number of pixels.")
    c, h, w = images.shape
    if crop is not None and not isinstance(crop, str) and crop > min(h, w):
        raise InputError(f"a crop of {crop} pixels, but the first image of {images.name} is {h} x {w}. Crop less.")
    if (size, crop, mode) == (None, None, None) or ((size, crop) == (None, None) and not told and mode is None):
        return images
    if crop is not None:
        h = w = min(h, w) if isinstance(crop, str) else crop
    h, w = (h, w) if size is None else (size, size)
    channels = {"RGB": 3, "L": 1, None: c}[mode]
    # 0 and 1, or 0 .. 16, would be rounded to themselves between
    integer = images.integer and (size is None or images.range == BYTES)

    def items(start: int) -> Iterator[Item]:
        return (partial(_load, load, size, crop, mode, integer) for load in images._items(start))

    said = " ".join(f"{k} {v}" for k, v in (("crop", crop), ("size", size), ("mode", mode)) if v is not None)
    notes = images.remarks
    if size is not None and crop is None and images.shape[1] != images.shape[2]:
        notes = (*notes, f"The first image of {images.shape[1]} x {images.shape[2]} pixels is squeezed into a square.")
    looked = images._looked
    if told and mode is not None:  # what the default would have done is no decision any more
        looked = partial(_without_default, looked)
    return replace(
        images,
        shape=(channels, h, w),
        _items=items,
        integer=integer,
        pad=None,
        history=(*images.history, said) if told else images.history,
        remarks=notes,
        _looked=looked,
    )


def _without_default(looked: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(note for note in looked() if DECISIONS["grey"] not in note)


def _load(load: Item, size: int | None, crop: int | str | None, mode: str | None, integer: bool) -> Raw:
    raw = load()
    if isinstance(raw, Exception):
        return raw
    raw = raw if integer else raw.astype(np.float32)
    if crop is not None:
        _, h, w = raw.shape
        side = min(h, w) if isinstance(crop, str) else crop
        if side > min(h, w):
            return Unfit(f"is {h} x {w}, smaller than the crop of {side}")
        top, left = (h - side) // 2, (w - side) // 2
        raw = raw[:, top : top + side, left : left + side]
    if size is not None and raw.shape[1:] != (size, size):
        raw = _resized(raw, size)
    if mode == "RGB" and len(raw) == 1:
        raw = np.repeat(raw, 3, 0)
    if mode == "L" and len(raw) == 3:
        raw = _grey(raw)
    return raw


def _resized(raw: np.ndarray, size: int) -> np.ndarray:
    """[C, H, W] with sides of ``size`` pixels; floats do not leave the range that they were in."""
    layers = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in raw]
    out = np.stack(layers)
    return out if raw.dtype == np.uint8 else out.clip(raw.min(), raw.max())


def _grey(raw: np.ndarray) -> np.ndarray:
    if raw.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(raw.transpose(1, 2, 0))).convert("L"))[None]
    return (raw * GREY).sum(0, keepdims=True)
