"""Reading the next batch's features in a thread of its own, while the present step runs."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from predictor.cache.store import FeatureStore

_Item = TypeVar("_Item")


def with_next(items: Iterable[_Item]) -> Iterator[tuple[_Item, _Item | None]]:
    """Each item with the one after it, which is taken before it is asked for; None after the last."""
    rest = iter(items)
    present = next(rest, None)
    while present is not None:
        following = next(rest, None)
        yield present, following
        present = following


def moved_beside(store: FeatureStore, rows: list[Tensor]) -> list[Tensor]:
    """Rows as `store.fetch` gave them, on their way to a GPU beside what it computes; elsewhere just moved."""
    device = next((device for device in store.devices if device.type == "cuda"), None)
    if device is None or all(row.is_cuda for row in rows):
        return store.moved(rows)
    present, stream = torch.cuda.current_stream(device), _side_stream(device)
    with torch.cuda.stream(stream):
        moved = store.moved(rows)
    present.wait_stream(stream)
    for row in moved:
        if row.is_cuda:
            row.record_stream(present)  # else its memory could be given to others of the side stream too early
    return moved


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class ReadAhead:
    """One reading under way at a time. Its thread starts with the first, and ends with `close` or with this object."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: tuple[Any, Future[list[Tensor]]] | None = None

    def start(self, key: Any, read: Callable[[], list[Tensor]]) -> None:
        """Begin to read; `take` hands it out. What was read before and not taken is dropped."""
        self.drop()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="frozen-features")
        self._under_way = key, self._thread.submit(read)

    def take(self) -> tuple[Any, list[Tensor]]:
        """The key of what was read, and what was, waited for; None and nothing where nothing was.

        Raises what the reading raised.
        """
        if self._under_way is None:
            return None, []
        (key, reading), self._under_way = self._under_way, None
        return key, reading.result()

    def drop(self) -> None:
        """Wait for what is being read, and drop it, also where it failed."""
        if self._under_way is not None:
            self._under_way[1].exception()
            self._under_way = None

    def close(self) -> None:
        """End the thread."""
        self.drop()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
