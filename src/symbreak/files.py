"""Files that appear whole or not at all (write beside, then rename), and the error for wrong input."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from symbreak.parallel import rank_of

__all__ = [
    "InputError",
    "digest",
    "file_hash",
    "output_folder",
    "read_json",
    "read_tensors",
    "write_json",
    "write_tensors",
    "write_whole",
]


class InputError(ValueError):
    """The input is wrong; the message is one line: what came, what was expected, what to do."""


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write`` on a temporary neighbour of ``path``, then rename it into place.

    Of ranks that work together the first one writes.
    """
    path = Path(path)
    if rank_of()[0]:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON with sorted keys: the same value gives the same bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is one line of `InputError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} cannot be read. Check the path.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON. Expected a file that symbreak wrote.") from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    def write(beside: Path) -> None:
        save_file(whole, beside, metadata=dict(metadata or {}))
        _sort_metadata(beside)

    return write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that changes from process to process; one content is to be one file."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= size:
                stream.seek(8)
                stream.write(text.ljust(size))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; anything else is one line of `InputError`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist. Expected a .safetensors file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is no safetensors file ({str(error)[:80]}).") from None


def digest(*parts: Any) -> str:
    """The first 16 hex digits of the SHA-256 of tensors (their bytes and shapes) and of other values (their text)."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous()
            found.update(f"{flat.dtype} {tuple(flat.shape)}".encode())
            found.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(f"{part!r};".encode())
    return found.hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def output_folder(path: str | Path) -> Path:
    """An output folder that can be made; a file in its place is refused before any work is done."""
    path = Path(path)
    blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise InputError(f"{blocked} is a file, but an output folder is needed there. Choose another --out.")
    return path
