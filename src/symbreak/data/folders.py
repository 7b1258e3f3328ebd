"""What is in a folder: pictures or parquet files, its splits, and what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from symbreak.data.pictures import is_picture
from symbreak.runtime.errors import InputError

__all__ = ["Folder", "look_into"]

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
OURS = ("sample.json", "record.json", "report.html")  # beside images that are read on purpose


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Attributes:
        path: the folder, or that of a split in it.
        pictures, shards: files that are read, relative to ``path``; shards are parquet files, which count where no
            pictures are.
        notes: which split was taken, and what was left out.
    """

    path: Path
    pictures: list[Path]
    shards: list[Path]
    notes: tuple[str, ...]


def look_into(path: Path, split: str | None = None) -> Folder:
    """Walk through a folder, linked folders too; hidden ones are left out.

    Args:
        path: the folder.
        split: of a folder whose sub-folders, or whose parquet files, are named after splits; ``None`` takes train.

    Raises:
        InputError: for a folder without pictures, and for a split that it does not have.
    """
    files, notes = _files(path)
    root = str(path)  # for a hundred thousand files paths of text are several times as fast as `Path`
    pictures = [p for p in files if is_picture(p.name) and os.path.isfile(os.path.join(root, p))]
    pictures.sort(key=lambda p: p.parts)
    shards = [] if pictures else sorted(p for p in files if p.suffix.lower() == ".parquet")
    kept = pictures or shards
    left = sorted(set(files) - set(kept) - {Path(name) for name in OURS})
    if left:
        kinds = Counter(p.suffix.lower() or "no suffix" for p in left)
        counted = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common(8))
        notes.append(
            f"{len(left):,} file{'s that are no pictures are' if len(left) > 1 else ' that is no picture is'} left out "
            f"({counted}); the first is {left[0]}."
        )
    if not kept:
        seen = f" {notes[-1]}" if left else ""
        raise InputError(f"{path} holds no images. Expected PNG, JPEG, WebP, BMP, GIF or TIFF files in it.{seen}")
    splits = _splits(kept, bool(shards))
    if not splits:
        if split is not None:
            raise InputError(f"{path} has no splits, so {split!r} cannot be taken. Leave split= (--split) out.")
        return Folder(path, pictures, shards, tuple(notes))
    name = _chosen(path, splits, split)
    told = ", ".join(f"{k} ({len(v):,} files)" for k, v in splits.items())
    notes.append(f"The folder has the splits {told}; {name} is read.")
    if shards:
        return Folder(path, [], splits[name], tuple(notes))
    return Folder(path / name, [p.relative_to(name) for p in splits[name]], [], tuple(notes))


def _files(root: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder, relative to it, and notes on the folders that were left out."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be opened ({error.strerror}). Repair or remove it.")

    files: list[Path] = []
    hidden: list[str] = []
    made: list[str] = []
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder).relative_to(root)
        if folder != str(root) and "sample.json" in names:
            made.append(str(here))
            below.clear()
            continue
        hidden += [str(here / d) for d in below if _hidden(d)]
        above = {os.path.realpath(p) for p in (Path(folder), *Path(folder).parents)}
        below[:] = [
            d
            for d in below
            if not (_hidden(d) or (os.path.islink(os.path.join(folder, d)) and _real(folder, d) in above))
        ]
        files += [here / name for name in names if not name.startswith(".")]
    notes = [
        f"{len(left):,} {what} left out; the first is {sorted(left)[0]}."
        for left, what in (
            (hidden, "hidden folders are"),
            (made, "folders of generated images (with a sample.json) are"),
        )
        if left
    ]
    return files, notes


def _real(folder: str, name: str) -> str:
    return os.path.realpath(os.path.join(folder, name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _splits(files: Sequence[Path], shards: bool) -> dict[str, list[Path]]:
    """Files by split: of pictures the outermost folder is its name, of shards that or the first word of theirs."""
    out: dict[str, list[Path]] = {}
    for file in files:
        name = file.parts[0] if len(file.parts) > 1 else ""
        if shards and name.lower() not in SPLITS:
            name = re.split(r"[^A-Za-z]", file.name)[0]
        if name.lower() not in SPLITS:
            return {}
        out.setdefault(name, []).append(file)
    return out


def _chosen(path: Path, splits: dict[str, list[Path]], split: str | None) -> str:
    """The split that was asked for, by the folder's own name or by a usual one; train without one."""
    wanted = "train" if split is None else split
    name = next((s for s in splits if s == wanted), None)
    name = name or next((s for s in splits if SPLITS[s.lower()] == SPLITS.get(wanted.lower())), None)
    if name is None and split is None and len(splits) == 1:
        return next(iter(splits))
    if name is None:
        raise InputError(f"{path} has no split {wanted!r}. Pass split= (--split) with one of: {', '.join(splits)}.")
    return name
