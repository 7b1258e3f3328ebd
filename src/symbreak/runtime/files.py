"""Files that appear whole or not at all: written beside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from symbreak.runtime.errors import InputError

if TYPE_CHECKING:  # what needs no tensors goes without torch, whose import takes a second
    import torch

__all__ = [
    "InputError",
    "damaged",
    "digest",
    "file_hash",
    "left_to_another",
    "nameless_file",
    "not_written",
    "output_folder",
    "read_json",
    "read_tensors",
    "readable",
    "try_writing",
    "write_json",
    "write_tensors",
    "write_whole",
]


PART = re.compile(r"\..+\.(\d+)-([0-9a-f]{8})\.part")  # of a file being written: its process, its machine
DAY = 86_400.0
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
LONGEST = 200  # bytes of a file's name that are part of a temporary one
DIGEST = "digest"  # of tensors and metadata, in the metadata of a file of ours
_left: ContextVar[bool] = ContextVar("left", default=False)


@contextmanager
def left_to_another(yes: bool) -> Iterator[None]:
    """Within it nothing is written here, if ``yes``: another process writes the same files."""
    token = _left.set(yes)
    try:
        yield
    finally:
        _left.reset(token)


@contextmanager
def damaged(path: Any, what: str) -> Iterator[None]:
    """Whatever a damaged file makes go wrong while it is taken apart becomes one line of `InputError`.

    Args:
        path: names the file in the message.
        what: what it should hold, with an article.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {str(error)[:80]}"
        raise InputError(f"{path} holds {what} that is broken ({said}). Make it again.") from error


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write`` on a temporary neighbour of ``path``, then rename it into place.

    Does nothing where writing is left to another process, see `left_to_another`.
    """
    path = Path(path)
    if _left.get():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes, of which ours take some.
    name = path.name if len(os.fsencode(path.name)) < LONGEST else f"{zlib.crc32(os.fsencode(path.name)):08x}"
    beside = path.with_name(f".{name}.{os.getpid()}-{_machine()}.part")
    try:
        write(beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def readable(path: Path) -> None:
    """Give a file the permissions of any new file beside it: safetensors writes for the owner alone."""
    plain = path.with_name(f".mode.{os.getpid()}-{_machine()}.part")
    try:
        plain.touch()
        with suppress(OSError):  # a file system without permissions
            path.chmod(stat.S_IMODE(plain.stat().st_mode))
    finally:
        plain.unlink(missing_ok=True)


def nameless_file(folder: Path | None) -> IO[bytes]:
    """A file for this process alone, which goes when it is closed; by default where temporary files are."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # Some file systems know no files without a name: theirs has one for a moment, by which `output_folder` finds it.
    return tempfile.TemporaryFile(dir=folder, prefix=".rows.", suffix=f".{os.getpid()}-{_machine()}.part")


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _clear(folder: Path) -> None:
    """Remove what killed processes left of files they were writing, never that of one which may be alive.

    Of another machine's processes nothing is known: theirs goes when it is a day old.
    """
    for path in list(folder.iterdir()):
        if part := PART.fullmatch(path.name):
            with suppress(OSError):  # another process was quicker, or it is not ours to remove
                dead = part[2] == _machine() and not _alive(int(part[1]))
                if dead or time.time() - path.stat().st_mtime > DAY:
                    path.unlink()


def _alive(process: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere asking is no harmless signal
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is somebody else's
    return True


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
    """Write a safetensors file: the same tensors and metadata give the same bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {**(metadata or {}), DIGEST: _content(whole, dict(metadata or {}))}

    def write(beside: Path) -> None:
        save_file(whole, beside, metadata=about)
        _sort_metadata(beside)
        readable(beside)

    try:
        return write_whole(path, write)
    except SafetensorError as error:  # its own name for a full disk
        raise OSError(f"{path} cannot be written ({str(error)[:160]})") from None


def _content(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    return digest(sorted(metadata.items()), *(part for pair in sorted(tensors.items()) for part in pair))


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # else something was escaped in another way: the order stays
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; anything else, or a changed bit, is one line of `InputError`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist. Expected a .safetensors file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no safetensors file ({str(error)[:80]}).") from None
    written = metadata.pop(DIGEST, None)  # other people's files, and those of before, have none
    if written is not None and written != _content(tensors, metadata):
        raise InputError(f"{path} is damaged: it holds other bits than were written. Make it again, or copy it again.")
    return tensors, metadata


def digest(*parts: Any) -> str:
    """The first 16 hex digits of the SHA-256 of tensors (their bytes and shapes) and of other values (their text)."""
    import torch

    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous()
            sha.update(f"{flat.dtype} {tuple(flat.shape)}".encode())
            sha.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{part!r};".encode())
    return sha.hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def output_folder(path: str | Path) -> Path:
    """An output folder that can be made, cleared of half-written files of killed runs.

    A file in its place raises an error before any work is done.
    """
    path = Path(path)
    blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise InputError(f"{blocked} is a file, but an output folder is needed there. Choose another --out.")
    if path.is_dir():
        _clear(path)
    return path


def try_writing(folder: str | Path) -> None:
    """Write where a folder is or will be, and leave no trace: what cannot be written is known before any work.

    Raises:
        InputError: where it is not allowed.
        OSError: where the disk is full.
    """
    place = output_folder(folder)
    while not place.exists():
        place = place.parent
    try:
        with nameless_file(place) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise not_written(folder, error) from None


def not_written(folder: str | Path, error: OSError) -> Exception:
    """The error for a folder that cannot be written: the machine's where its disk is full, else the user's."""
    if error.errno in FULL:
        return OSError(error.errno, f"{folder} cannot be written ({error.strerror})")
    return InputError(f"{folder} cannot be written ({error.strerror or error}). Choose another folder.")
