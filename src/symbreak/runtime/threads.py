"""Work that several threads do ahead of its consumer: results in order, errors where one thread would raise them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["ahead_of"]

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 16  # items of one task: handing over a task costs as much as a tenth of decoding a small picture
Done = tuple[list[Result], Exception | None]


def ahead_of(
    items: Iterable[Item], make: Callable[[Item], Result], threads: int, most: int, chunk: int = CHUNK
) -> Iterator[Result]:
    """make(item) for every item, in order.

    Args:
        items: walked through by the calling thread alone.
        make: called by the threads; should release the GIL where it takes long.
        threads: their number; they end with the iterator, however that ends.
        most: items that may be under way or waiting for the consumer, besides those of one task.
        chunk: items of a task, fewer where ``most`` is small.
    """
    chunk = max(1, min(chunk, most // threads))
    source = iter(items)
    waiting: deque[Future[Done[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, "symbreak")

    def handed_over() -> Iterator[Result]:
        results, error = waiting.popleft().result()
        yield from results
        if error is not None:
            raise error

    try:
        while True:
            # what was read before the source failed comes first
            some, fault = _made(lambda item: item, islice(source, chunk))
            if some:
                waiting.append(pool.submit(_made, make, some))
            if fault is not None or not some:
                break
            if len(waiting) * chunk >= max(most, chunk * threads):
                yield from handed_over()
        while waiting:
            yield from handed_over()
        if fault is not None:
            raise fault
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _made(make: Callable[[Item], Result], items: Iterable[Item]) -> Done[Result]:
    """The results up to the first error, and that."""
    results: list[Result] = []
    try:
        for item in items:
            results.append(make(item))
    except Exception as error:
        return results, error
    return results, None
