"""Many parts read or written in order with bounded memory, several at a time.

A run of 10,000 shards has 10,000 small files per stage. One after the other, an object store would
answer each within tens of milliseconds; a few threads hide that. Nothing is kept after it is given
out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import part_name

_THREADS = 8
_AHEAD = 2 * _THREADS

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of a function that waits for files, in the order of the items.

    At most 16 calls are ahead of the result that was asked for. An error is raised in its place.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Parts(Sequence[pa.Table]):
    """The parts of some shards; each is read when it is asked for, and can be read again.

    Args:
        directory: The run.
        folder: Folder of the parts.
        shards: Which shards, in this order.
    """

    def __init__(self, directory: RunDirectory, folder: str, shards: Sequence[int]) -> None:
        self._directory = directory
        self._folder = folder
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Parts(self._directory, self._folder, self._shards[index])
        return self._read(self._shards[index])

    def __iter__(self) -> Iterator[pa.Table]:
        return map_ahead(self._read, self._shards)

    def _read(self, shard: int) -> pa.Table:
        return self._directory.read_table(part_name(self._folder, shard))
