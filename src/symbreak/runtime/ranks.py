"""Work shared among processes: the ranks compute items in turn, and every rank gets all results.

An item is computed on one rank from its own seed, so one process and many give the same bits. What is not shared is
computed on every rank, so that all ranks take the same decisions. Ranks are those of ``torch.distributed``, started by
``accelerate launch`` or ``torchrun``. They share work only inside `over_ranks`: outside it a call on one rank waits for
no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from symbreak.runtime.files import InputError, left_to_another

__all__ = [
    "Arrays",
    "agreed",
    "alone",
    "from_each",
    "from_first",
    "joined",
    "map_over_ranks",
    "over_ranks",
    "own_rows",
    "rank_of",
    "shares",
    "summed",
    "usable",
]

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]
ERROR = "error"
PATIENCE = timedelta(days=7)  # ranks wait for what one of them does; launchers watch for dead ones
_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def over_ranks() -> Iterator[tuple[int, int]]:
    """Context in which the ranks of ``torch.distributed`` share the work; all of them must make the same calls.

    Yields:
        This process's rank and the number of ranks; (0, 1) where no group of processes was started. Files are written
        by the first rank, but for what one rank computes for all.
    """
    token = _together.set(True)
    try:
        place = rank_of()
        with left_to_another(place[0] > 0):
            yield place
    finally:
        _together.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process works alone and waits for no other."""
    token = _together.set(False)
    try:
        with left_to_another(False):
            yield
    finally:
        _together.reset(token)


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """`over_ranks` for a process that a launcher started: joins the group that the environment names, and leaves it.

    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK are as torchrun sets them; without them there is one rank.

    Yields:
        Rank and number of ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        with over_ranks() as place:
            yield place
        return
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            raise InputError(
                f"{here} processes for {torch.cuda.device_count()} GPUs; expected one each. Start fewer, or hide the "
                "GPUs with CUDA_VISIBLE_DEVICES= to use the CPU."
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        with over_ranks() as place:
            yield place
        dist.barrier()  # no rank leaves while another one still needs it
    finally:
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))


def usable(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        InputError: for one that is not there.
    """
    try:
        there = torch.device(device)
        torch.zeros(1, device=there)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device} here ({str(error).splitlines()[0][:80]}). Pass cpu.") from None
    return there


def rank_of() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside `over_ranks`."""
    if _together.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shares(count: int, multiple: int = 1) -> list[int]:
    """Where the ranks' parts of ``count`` rows begin, and ``count``: multiples of ``multiple``.

    ``[0, count]`` for one rank, and for rows too few for all of them to have some: every rank takes the whole.
    """
    ranks, blocks = rank_of()[1], -(-count // multiple)
    if blocks < ranks:
        return [0, count]
    return [min(count, multiple * (blocks * r // ranks)) for r in range(ranks + 1)]


def own_rows(stream: Any, multiple: int = 1) -> tuple[Any, int, bool]:
    """The part of a data set that this rank reads, the position of its first row, and whether ranks share it.

    A data set is a tensor, or anything with a length and ``rows(first, last)``, such as `Images`; another stream, and
    one too short for all ranks to have rows of it, every rank reads as a whole. Parts begin at multiples of
    ``multiple``, or where the stream has ``edges`` of its own.
    """
    whole = isinstance(stream, torch.Tensor)
    edges = getattr(stream, "edges", None) or (
        shares(len(stream), multiple) if whole or hasattr(stream, "rows") else [0, 0]
    )
    if len(edges) == 2:
        return stream, 0, False
    if rank_of()[1] == 1:
        raise RuntimeError("one rank alone requested rows that several ranks hold; make the call on all ranks")
    first, last = edges[rank_of()[0]], edges[rank_of()[0] + 1]
    return (stream[first:last] if whole else stream.rows(first, last)), first, True


def map_over_ranks(
    items: Sequence[Item], make: Callable[[Item], Arrays], progress: Callable[[int, int], None] | None = None
) -> list[Arrays]:
    """make(item) for every item: each is computed on one rank, and every rank gets all results.

    Args:
        items: what the arrays are made of.
        make: item -> arrays, which depend only on the item.
        progress: called with (about how many are done, of how many).

    Raises:
        InputError: on all ranks, if one of them raised it.
    """
    rank, ranks = rank_of()
    if ranks == 1:
        out = []
        for done, item in enumerate(items, 1):
            out.append(make(item))
            if progress is not None:
                progress(done, len(items))
        return out
    made: dict[str, torch.Tensor] = {}
    wrong = None
    for i in range(rank, len(items), ranks):
        try:
            with alone():
                made |= {f"{i}/{k}": torch.from_numpy(np.array(v, order="C")) for k, v in make(items[i]).items()}
        except InputError as error:  # without this the others would wait for the items of this process
            wrong, made = error, {ERROR: torch.tensor(list(str(error).encode()), dtype=torch.uint8)}
            break
        if progress is not None:
            progress(min(i + ranks - rank, len(items)), len(items))
    out = [{} for _ in items]
    for key, value in (pair for payload in _gathered(save(made)) for pair in load(payload).items()):
        if key == ERROR:
            wrong = wrong or InputError(value.numpy().tobytes().decode())
            continue
        index, _, name = key.partition("/")
        out[int(index)][name] = value.numpy()
    if wrong is not None:
        raise wrong
    return out


def from_each(arrays: Arrays, shared: bool = True) -> list[Arrays]:
    """Every rank's arrays, by rank; this rank's alone where nothing is shared."""
    return map_over_ranks(range(rank_of()[1]), lambda _: arrays) if shared else [arrays]


def summed(*arrays: torch.Tensor) -> None:
    """Add what all ranks hold into every rank's tensors, in place."""
    if rank_of()[1] > 1:
        for a in arrays:
            there = a.to(_device())
            dist.all_reduce(there)
            if there is not a:
                a.copy_(there)


def from_first(*arrays: torch.Tensor) -> None:
    """Put the first rank's numbers into every rank's tensors, in place."""
    for a in arrays:
        if rank_of()[0]:
            a.zero_()
    summed(*arrays)


def agreed(make: Callable[[], Any]) -> Any:
    """The first rank's make(), a value fit for JSON, on every rank: for what may differ between them."""
    if rank_of()[1] == 1:
        return make()
    (first,) = map_over_ranks([0], lambda _: {"text": np.frombuffer(json.dumps(make()).encode(), np.uint8)})
    return json.loads(first["text"].tobytes())


def _device() -> torch.device:
    """Where collective calls want their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _gathered(payload: bytes) -> list[bytes]:
    """What every rank has to say, by rank, without pickling."""
    rank, device = dist.get_rank(), _device()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[rank] = len(payload)
    dist.all_reduce(sizes)
    out = []
    for source, size in enumerate(sizes.tolist()):  # one after the other: no rank holds them all padded
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        if source == rank and size:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if size:
            dist.broadcast(buffer, source)
        out.append(buffer.cpu().numpy().tobytes())
    return out
