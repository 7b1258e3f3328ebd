"""One encoded picture to an array, as every viewer shows it: upright, its transparency laid on black.

Only formats that are announced here are opened: Pillow knows others, of which one starts Ghostscript.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from symbreak.data.images import Raw
from symbreak.runtime.ranks import from_each, rank_of, shares

__all__ = ["DECISIONS", "MAX_PIXELS", "Encoded", "attempt", "is_colour", "is_picture", "what_is_decided"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "PCX", "SGI", "QOI", "DDS", "ICO")
TARGA = ("TGA",)  # has no signature, so only where a file's name says so
MAX_PIXELS = 64 * 2**20  # an image beyond this is a bomb or a mistake
ORIENTATION = 0x112  # EXIF tag
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
DECISIONS = {  # about single pictures, in the order in which they are told
    "grey": "grey among colour ones, and read as RGB; mode= (--mode) says otherwise",
    "turned": "turned upright, as their EXIF orientation says",
    "clear": "in a format with transparency, which is laid on black",
    "pages": "in a file with several pages or frames, of which the first is read",
    "deep": "in 16 bits, of which the upper 8 are read",
    "space": "in another colour space (such as CMYK), and converted to RGB",
}
Encoded = bytes | Path | Image.Image | None


@cache
def _formats() -> tuple[str, ...]:
    """The announced formats that this Pillow was built with."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


@cache
def _suffixes() -> frozenset[str]:
    known = (*_formats(), *TARGA)
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in known) | {".jfif", ".jpe"}


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture which is read."""
    return Path(name).suffix.lower() in _suffixes()


@contextmanager
def _opened(data: bytes | Path | Image.Image) -> Iterator[Image.Image]:
    """A picture, its pixels not yet decoded."""
    if isinstance(data, Image.Image):
        yield data
        return
    targa = isinstance(data, Path) and data.suffix.lower() in (".tga", ".icb", ".vda", ".vst")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags in a picture that can be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        source = data if isinstance(data, Path) else io.BytesIO(data)
        with Image.open(source, formats=TARGA if targa else _formats()) as picture:
            yield picture


def attempt(data: Encoded) -> Raw:
    """One picture as [C, H, W] uint8, or the error in its place."""
    try:
        return _decoded(data) if data else ValueError("no bytes")
    except Exception as error:  # Pillow raises a dozen types for a broken file; all mean "unusable"
        return error


def _decoded(data: bytes | Path | Image.Image) -> np.ndarray:
    """Decode one picture to [C, H, W] uint8; greyscale keeps one channel, everything else becomes RGB."""
    with _opened(data) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit pixels; save it with 8 bits, or pass an array with its range")
        picture.load()  # what some formats know of orientation and transparency stands behind the pixels
        upright = ImageOps.exif_transpose(picture) if _turned(picture) else picture
        if upright.mode.startswith("I;16"):
            array = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)  # convert would clip
        else:
            array = np.asarray(_flat(upright))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _turned(picture: Image.Image) -> bool:
    with suppress(Exception):  # a broken tag is none
        return picture.getexif().get(ORIENTATION, 1) in range(2, 9)
    return False


def _flat(picture: Image.Image) -> Image.Image:
    """The picture in L or RGB; where it is transparent, black shows."""
    mode = "L" if picture.mode in GREY else "RGB"
    if not picture.has_transparency_data:
        return picture.convert(mode)
    whole = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, (0, 0, 0, 255)), whole).convert("RGB").convert(mode)


def is_colour(encoded: Iterator[Encoded]) -> bool:
    """Whether a colour picture is among some, from their headers alone."""
    for data in encoded:
        with suppress(Exception):
            if data:
                with _opened(data) as picture:
                    if picture.mode not in GREY:
                        return True
    return False


def _decisions(data: Encoded, colour: bool) -> Iterator[str]:
    """What reading will decide about one picture, from its header."""
    if not data:
        return
    with suppress(Exception), _opened(data) as picture:  # what is broken is told when it is read
        if colour and picture.mode in GREY:
            yield "grey"
        # a PNG's pixels would be decoded to look behind them for a tag
        if (picture.format != "PNG" or "exif" in picture.info) and _turned(picture):
            yield "turned"
        if picture.has_transparency_data:
            yield "clear"
        if getattr(picture, "n_frames", 1) > 1:
            yield "pages"
        if picture.mode.startswith("I;16"):
            yield "deep"
        if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            yield "space"


def what_is_decided(
    encoded: Callable[[int], Iterator[Encoded]], count: int, colour: bool, name_of: Callable[[int], str]
) -> tuple[str, ...]:
    """What reading decides about single pictures, counted over all of them: one sentence a kind.

    Headers alone are read; processes share the work.
    """
    edges, rank = shares(count), rank_of()[0]
    shared = len(edges) > 2
    first, last = (edges[rank], edges[rank + 1]) if shared else (0, count)
    counts: Counter[str] = Counter()
    firsts: dict[str, int] = {}
    for i, data in enumerate(islice(encoded(first), last - first), first):
        for kind in _decisions(data, colour):
            counts[kind] += 1
            firsts.setdefault(kind, i)
    parts = from_each({"n": np.array([[counts[k], firsts.get(k, count)] for k in DECISIONS], np.int64)}, shared)
    table = np.stack([p["n"] for p in parts])
    return tuple(
        f"{n:,} of {count:,} pictures {'is' if n == 1 else 'are'} {text} (first: {name_of(int(i))})."
        for text, n, i in zip(DECISIONS.values(), table[..., 0].sum(0), table[..., 1].min(0), strict=True)
        if n
    )
