"""What a run directory keeps besides its place: its lease, and files that wait for each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


class Held(Protocol):
    """What a directory needs of its lease."""

    def require(self) -> None:
        """Raise once it is lost."""


@dataclass(kw_only=True)
class FileSet:
    """Files that are written together, and the events that go with them."""

    is_new: bool
    files: dict[str, bytes] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
