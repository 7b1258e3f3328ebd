"""One answer from many processes: blocks of work are dealt to the ranks in turn and added up on all of them.

Every block is made by one rank from its own seed, whatever the number of ranks; the sum over ranks adds zeros to
it, so one process and many give the same bits. Without an initialised ``torch.distributed`` there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["dealt", "rank_of"]


def rank_of() -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def dealt(
    count: int,
    shape: tuple[int, ...],
    make: Callable[[int], np.ndarray],
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """[count, *shape] float64: make(i) for every block i, each made on one rank, known on all.

    Args:
        count: blocks.
        shape: of each block's float64 array.
        make: block -> array; it depends on nothing but the block.
        progress: called with (blocks of this rank done, blocks of this rank).
    """
    rank, ranks = rank_of()
    out = np.zeros((count, *shape))
    own = range(rank, count, ranks)
    for done, i in enumerate(own):
        block = make(i)
        if block.shape != tuple(shape):
            raise ValueError(f"block {i} has the shape {block.shape}; expected {tuple(shape)}.")
        out[i] = block
        if progress is not None:
            progress(done + 1, len(own))
    if ranks > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        whole = torch.from_numpy(out).to(device)
        dist.all_reduce(whole)
        out = whole.cpu().numpy()
    return out
