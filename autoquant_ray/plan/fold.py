"""Where the factors of an input go: what AWQ's factors are folded into.

The weights of all linears that read an input are multiplied by a factor per input channel, and
what makes the input is divided by it: the weight and bias of a norm, or rows of a linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROWS, NORM, SHIFTED_NORM = "rows", "norm", "shifted norm"
"""What makes an input: rows of a linear; a norm that multiplies by ``weight``, or by
``1 + weight``."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """An input whose channels can take factors.

    Attributes:
        readers: The linears that read it: all modules of a group, and nothing else in the model.
        producer: The module that makes it.
        kind: ``ROWS``, ``NORM`` or ``SHIFTED_NORM``.
        start: First row of the producer that makes a channel.
        width: Channels that come from as many consecutive rows.
        repeat: How often these channels come again before those of the next rows: the query heads
            that share a key head. Channels of one row have equal factors.
    """

    readers: tuple[str, ...]
    producer: str
    kind: str
    start: int
    width: int
    repeat: int

    def rows(self, num_channels: int) -> list[int]:
        """The row of the producer, or the element of the norm, that makes each channel.

        Args:
            num_channels: Of the input.
        """
        span = self.width * self.repeat
        return [
            self.start + (channel // span) * self.width + channel % self.width
            for channel in range(num_channels)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``run.json``; :meth:`from_json` is the inverse."""
        return asdict(self) | {"readers": list(self.readers)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fold:
        """Read back what :meth:`to_json` wrote."""
        return cls(**value | {"readers": tuple(value["readers"])})


def fold_of_rows(
    readers: Sequence[str], producer: str, kind: str, rows: Sequence[int]
) -> Fold | None:
    """The fold whose channels come from these rows; None where they have another order."""
    start, num_channels = rows[0], len(rows)
    repeat = num_channels // len(set(rows))
    run = next((n for n, row in enumerate(rows) if row != start + n), num_channels)
    width = num_channels if repeat == 1 else run
    fold = Fold(
        readers=tuple(readers),
        producer=producer,
        kind=kind,
        start=start,
        width=width,
        repeat=repeat,
    )
    return fold if fold.rows(num_channels) == list(rows) else None


def folds_to_json(folds: Iterable[Fold]) -> list[dict[str, Any]]:
    """Every fold once, for the plan's summary."""
    return [fold.to_json() for fold in dict.fromkeys(folds)]


def folds_of_summary(summary: Mapping[str, Any]) -> dict[str, Fold]:
    """Linear -> fold of its input, from a plan's summary."""
    folds = map(Fold.from_json, summary.get("folds", ()))
    return {reader: fold for fold in folds for reader in fold.readers}
