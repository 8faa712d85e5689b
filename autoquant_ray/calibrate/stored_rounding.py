"""What a run fitted to weights, read from ``rounding.parquet`` where it is used.

The codes of a model take several bytes per weight and format. What the driver holds, and gives to
its workers, says only where they are: each layer's are a row group of the file, and of the layer
in use alone the columns that were asked for are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from autoquant_ray.formats.format import Format
from autoquant_ray.quantize.calibration import Bytes, Fit
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import ROUNDING_FILE

FITTED_COLUMNS = ("multipliers", "codes", "codes_by_unseen_half")
"""Those that take much memory."""

_KEY_COLUMNS = ("module", "part", "format", "damping")

Key = tuple[str, str, str]


class RowGroups(Protocol):
    """Reads the file's row groups, wherever they are; can be pickled."""

    def read(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a row group."""
        ...


class RowGroupsOfFile:
    """Those of a run's file.

    Args:
        uri: The run directory.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._directory: RunDirectory | None = None

    def __reduce__(self) -> Any:
        return RowGroupsOfFile, (self._uri,)

    def read(self, number: int, columns: Sequence[str]) -> pa.Table:
        """As in :class:`RowGroups`.

        Raises:
            StoreError: The file is missing or damaged.
        """
        if self._directory is None:
            self._directory = RunDirectory(self._uri)
        return self._directory.read_row_group(ROUNDING_FILE, number, columns)


class Place(NamedTuple):
    """Where a fit is.

    Attributes:
        group: The row group.
        row: The row in it.
        damping: Of codes; None where there are none.
    """

    group: int
    row: int
    damping: float | None


class StoredRounding(Mapping[Key, Fit]):
    """Fits of weights that are read when they are asked for.

    Args:
        source: Reads row groups.
        places: Where the fits are.
    """

    def __init__(self, source: RowGroups, places: Mapping[Key, Place]) -> None:
        self._source = source
        self._places = places
        self._group = -1
        self._columns: dict[str, Any] = {}

    def __reduce__(self) -> Any:
        return StoredRounding, (self._source, self._places)

    def __getitem__(self, key: Key) -> Fit:
        return _StoredFit(self, self._places[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def groups(self) -> list[int]:
        """Numbers of the row groups."""
        return sorted({place.group for place in self._places.values()})

    def read(self, number: int) -> pa.Table:
        """All fits of a row group."""
        return self._source.read(number, FITTED_COLUMNS)

    def at(self, source: RowGroups) -> StoredRounding:
        """The same fits, read from somewhere else."""
        return StoredRounding(source, self._places)

    def value(self, place: Place, column: str) -> Any:
        """A value of the file; the columns of one row group are kept for the next."""
        if place.group != self._group:
            self._group, self._columns = place.group, {}
        if column not in self._columns:
            self._columns[column] = self._source.read(place.group, [column]).column(column)
        return self._columns[column][place.row]


class _StoredFit:
    """A fit of a file."""

    def __init__(self, rounding: StoredRounding, place: Place) -> None:
        self._rounding = rounding
        self._place = place

    @property
    def multipliers(self) -> Bytes | None:
        value = self._rounding.value(self._place, "multipliers")
        return _bytes(value) if value.is_valid else None

    @property
    def codes(self) -> _StoredCodes | None:
        damping = self._place.damping
        return None if damping is None else _StoredCodes(self._rounding, self._place, damping)


class _StoredCodes:
    """Codes of a file."""

    def __init__(self, rounding: StoredRounding, place: Place, damping: float) -> None:
        self._rounding = rounding
        self._place = place
        self.damping = damping

    @property
    def whole(self) -> Bytes:
        return _bytes(self._rounding.value(self._place, "codes"))

    @property
    def without(self) -> Sequence[Bytes]:
        by_half = self._rounding.value(self._place, "codes_by_unseen_half")
        return [_bytes(value) for value in by_half.values]


def stored_rounding(directory: RunDirectory, formats: Sequence[Format]) -> StoredRounding:
    """What a run fitted to weights.

    Args:
        directory: The run.
        formats: Its menu; fits of other formats are left out.

    Raises:
        StoreError: The file is missing or damaged.
    """
    weight_keys = {format_.name: format_.weight_key for format_ in formats}
    places = {}
    for group in range(directory.num_row_groups(ROUNDING_FILE)):
        table = directory.read_row_group(ROUNDING_FILE, group, _KEY_COLUMNS)
        columns = (table.column(name).to_pylist() for name in _KEY_COLUMNS)
        for row, (module, part, name, damping) in enumerate(zip(*columns, strict=True)):
            if name in weight_keys:
                places[module, part, weight_keys[name]] = Place(group, row, damping)
    # A worker may run in another folder.
    uri = directory.path("").rstrip("/") if directory.is_local else directory.uri
    return StoredRounding(RowGroupsOfFile(uri), places)


def _bytes(value: Any) -> Bytes:
    return np.frombuffer(value.as_buffer(), np.uint8)
