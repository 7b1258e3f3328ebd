"""One encoded picture to an array, as every viewer shows it: upright, in sRGB, its transparency laid on black.

Only formats that are announced here are opened: Pillow knows others, of which one starts Ghostscript.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from itertools import compress, count, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from symbreak.data.images import Raw
from symbreak.runtime.ranks import from_each, rank_of, shares

__all__ = [
    "DECISIONS",
    "MAX_PIXELS",
    "Encoded",
    "Seen",
    "attempt",
    "can_be_opened",
    "is_colour",
    "is_picture",
    "what_is_decided",
]

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
    "profile": "with a colour profile other than sRGB, from which they are converted to it",
}
LOOKED = 1 << len(DECISIONS)  # beside a bit for each decision: the header was looked at
Encoded = bytes | Path | Image.Image | None


class Seen:
    """What reading saw of each picture of a source beside its pixels, so that no file is opened again for it.

    Attributes:
        decided: uint8 [N], a bit for each of `DECISIONS` in their order, and ``LOOKED``.
        hashes: uint8 [N, 32], SHA-256 of files' bytes; ``hashed`` [N] says of which.
    """

    def __init__(self, count: int, files: bool) -> None:
        self.decided = np.zeros(count, np.uint8)
        self.hashes = np.zeros((count if files else 0, 32), np.uint8)
        self.hashed = np.zeros(count if files else 0, bool)

    def whole(self) -> bool:
        """Whether every header was looked at."""
        return bool(self.decided.all())

    def bytes_of(self, index: int, path: Path) -> bytes:
        """The bytes of a file, whose hash is remembered where the source is made of files."""
        content = path.read_bytes()
        if len(self.hashed) and not self.hashed[index]:
            self.hashes[index] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
            self.hashed[index] = True
        return content

    def hash(self, index: int, path: Path) -> None:
        """Read a file for its hash, if it was not read yet; and its header with it."""
        if not self.hashed[index]:
            content = self.bytes_of(index, path)
            if not self.decided[index]:
                self.decided[index] = look(content, _is_targa(path))


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
    return os.path.splitext(name)[1].lower() in _suffixes()


_quiet_lock = threading.Lock()
_quiet_pictures = 0  # that are open now
_quiet_filters: list[object] = []  # while there are some


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of odd tags in a picture that can be read; those of bombs are errors.

    ``warnings.catch_warnings`` is not for threads: the last to leave would bring back what the first one set.
    """
    global _quiet_pictures
    with _quiet_lock:
        _quiet_pictures += 1
        if _quiet_pictures == 1:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            _quiet_filters[:] = warnings.filters[:2]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_pictures -= 1
            if _quiet_pictures == 0:
                for one in _quiet_filters:
                    with suppress(ValueError):
                        warnings.filters.remove(one)  # type: ignore[attr-defined]


@contextmanager
def _opened(data: bytes | Path | Image.Image, targa: bool = False) -> Iterator[Image.Image]:
    """A picture, its pixels not yet decoded."""
    if isinstance(data, Image.Image):
        yield data
        return
    targa = targa or (isinstance(data, Path) and _is_targa(data))
    source = data if isinstance(data, Path) else io.BytesIO(data)
    with _quiet(), Image.open(source, formats=TARGA if targa else _formats()) as picture:
        yield picture


def _is_targa(path: Path) -> bool:
    return path.suffix.lower() in (".tga", ".icb", ".vda", ".vst")


def attempt(data: Encoded, seen: Seen | None = None, index: int = 0) -> Raw:
    """One picture as [C, H, W] uint8, or the error in its place; what else was seen of it is noted in ``seen``."""
    if isinstance(data, Path) and seen is not None:
        with suppress(Exception):  # the path is tried below, for an error that names it
            return _decoded(seen.bytes_of(index, data), _is_targa(data), seen, index)
    try:
        return _decoded(data, False, seen, index) if data else ValueError("no bytes")
    except Exception as error:  # Pillow raises a dozen types for a broken file; all mean "unusable"
        return error


def _decoded(data: bytes | Path | Image.Image, targa: bool, seen: Seen | None, index: int) -> np.ndarray:
    """Decode one picture to [C, H, W] uint8; greyscale keeps one channel, everything else becomes RGB."""
    with _opened(data, targa) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit pixels; save it with 8 bits, or pass an array with its range")
        # of formats whose headers can be looked at without moving about in the file
        if seen is not None and (picture.format == "JPEG" or (picture.format == "PNG" and "exif" not in picture.info)):
            seen.decided[index] = _decisions(picture)
        picture.load()  # what some formats know of orientation and transparency stands behind the pixels
        upright = ImageOps.exif_transpose(picture) if _turned(picture) else picture
        if upright.mode.startswith("I;16"):
            array = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)  # convert would clip
        else:
            array = np.asarray(_flat(upright))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _turned(picture: Image.Image) -> bool:
    if picture.format == "JPEG" and not ("exif" in picture.info or "xmp" in picture.info):
        return False  # looking for what is not there takes as long as a fifth of decoding a small picture
    with suppress(Exception):  # a broken tag is none
        return picture.getexif().get(ORIENTATION, 1) in range(2, 9)
    return False


@lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings pictures of a colour profile to sRGB; ``None`` for sRGB itself, greys and what cannot be read."""
    if mode not in ("RGB", "RGBA", "CMYK"):
        return None
    with suppress(Exception):  # a broken profile is none
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target)
    return None


def _profiled(picture: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = picture.info.get("icc_profile")
    return _to_srgb(profile, picture.mode) if isinstance(profile, bytes) and profile else None


def _flat(picture: Image.Image) -> Image.Image:
    """The picture in L or RGB of sRGB; where it is transparent, black shows."""
    transform = _profiled(picture)
    picture = picture if transform is None else transform.apply(picture)
    mode = "L" if picture.mode in GREY else "RGB"
    if not picture.has_transparency_data:
        return picture if picture.mode == mode else picture.convert(mode)
    whole = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, (0, 0, 0, 255)), whole).convert("RGB").convert(mode)


def can_be_opened(data: Encoded) -> bool:
    """Whether bytes look like a picture, from their header alone."""
    with suppress(Exception):
        if data:
            with _opened(data):
                return True
    return False


def is_colour(encoded: Iterator[Encoded]) -> bool:
    """Whether a colour picture is among some, from their headers alone."""
    for data in encoded:
        with suppress(Exception):
            if data:
                with _opened(data) as picture:
                    if picture.mode not in GREY:
                        return True
    return False


def _decisions(picture: Image.Image) -> int:
    """What reading will decide about one picture, from its header: the bits of `Seen.decided`."""
    bits = LOOKED
    with suppress(Exception):  # what is broken is told when it is read
        for bit, kind in enumerate(_decided(picture)):
            bits |= kind << bit
    return bits


def _decided(picture: Image.Image) -> Iterator[bool]:
    """Whether each of `DECISIONS` is taken."""
    yield picture.mode in GREY
    # a PNG's pixels would be decoded to look behind them for a tag
    yield (picture.format != "PNG" or "exif" in picture.info) and _turned(picture)
    yield picture.has_transparency_data
    yield getattr(picture, "n_frames", 1) > 1
    yield picture.mode.startswith("I;16")
    yield picture.mode in ("CMYK", "YCbCr", "LAB", "HSV")
    yield _profiled(picture) is not None


def look(data: Encoded, targa: bool = False) -> int:
    """What reading will decide about one picture, the bits of `Seen.decided`; its pixels are not decoded."""
    with suppress(Exception):
        if data:
            with _opened(data, targa) as picture:
                return _decisions(picture)
    return LOOKED


def what_is_decided(
    encoded: Callable[[int], Iterator[Encoded]], seen: Seen, colour: bool, name_of: Callable[[int], str]
) -> tuple[str, ...]:
    """What reading decides about single pictures, counted over all of them: one sentence a kind.

    The headers of pictures that were not read yet are read; processes share the work.
    """
    number = len(seen.decided)
    edges, rank = shares(number), rank_of()[0]
    shared = len(edges) > 2
    first, last = (edges[rank], edges[rank + 1]) if shared else (0, number)
    unseen = seen.decided[first:last] == 0
    if unseen.any():
        for i, data in compress(zip(count(first), islice(encoded(first), last - first)), unseen):
            seen.decided[i] = look(data)
    taken = seen.decided[first:last, None] >> np.arange(len(DECISIONS)) & 1
    taken[:, 0] &= colour  # grey ones are none among grey ones
    firsts = np.where(taken.any(0), first + taken.argmax(0), number)
    parts = from_each({"n": np.stack([taken.sum(0), firsts], 1).astype(np.int64)}, shared)
    table = np.stack([p["n"] for p in parts])
    return tuple(
        f"{n:,} of {number:,} pictures {'is' if n == 1 else 'are'} {text} (first: {name_of(int(i))})."
        for text, n, i in zip(DECISIONS.values(), table[..., 0].sum(0), table[..., 1].min(0), strict=True)
        if n
    )
