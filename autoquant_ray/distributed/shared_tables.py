"""Tables of a run for workers that cannot read its files.

Only the driver needs to reach a run directory. So where workers may be on other machines, or the
files are in an object store, tables go through Ray's object store: one at a time on the driver, and
to a worker when it asks for one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

import pyarrow as pa
import ray


class SharedTables:
    """Tables in Ray's object store, which live as long as this object does on the driver.

    Args:
        references: To each of them, by its number.
    """

    def __init__(self, references: Sequence[ray.ObjectRef[pa.Table]]) -> None:
        self._references = tuple(references)

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> SharedTables:
        """Put tables there, one after the other."""
        return cls([ray.put(table) for table in tables])

    def read(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a table."""
        table: pa.Table = ray.get(self._references[number])
        return table.select(list(columns))


def all_on_this_machine() -> bool:
    """Whether every node of the cluster is the machine of this process."""
    here = socket.gethostname()
    return all(node["NodeManagerHostname"] == here for node in ray.nodes() if node["Alive"])
