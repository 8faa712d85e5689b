"""Groups as a report shows them: a row per group, and totals per format and per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant_ray.allocate.group_choices import GroupChoices
from autoquant_ray.formats.algorithms import MAX
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import Rounding

ScoresWithErrors = Mapping[str, Mapping[str, tuple[float, float | None]]]
"""Group -> format -> (score, standard error or None)."""

METHOD_HEADS = ("Method", "Groups", "Weights", "Predicted loss", "Saved against plain rounding")
_NOT_SCORED = "plain not scored"


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A group with its chosen format.

    Attributes:
        modules: Names of its layers.
        chosen: The chosen format; ``none`` for 16 bits.
        num_bytes: Stored bytes in that format, scales included; 0 where they are the embedding's.
        num_bits: Stored bits per weight.
        share: Share of the predicted loss; None for an unsearched group.
        sensitivity: Largest score over the menu; None for an unsearched group.
        scores: Format -> (score, standard error or None).
        kept: Share of the resamples in which the group keeps its format; None where unknown.
        note: Why the group is not searched.
        rounding: How the chosen format rounds weights; None for 16 bits, for a cache, and where no
            format of the menu names a method.
    """

    name: str
    modules: list[str]
    num_weights: int
    chosen: str
    num_bytes: float
    num_bits: float
    share: float | None
    sensitivity: float | None
    scores: Mapping[str, tuple[float, float | None]]
    kept: float | None
    note: str | None
    rounding: Rounding | None = None

    @property
    def method(self) -> str | None:
        """How its weights are rounded, if that is a question."""
        return None if self.rounding is None else self.rounding.method

    @property
    def loss(self) -> float | None:
        """Score of the chosen format; None where it has none, as 16 bits."""
        entry = self.scores.get(self.chosen)
        return None if entry is None else entry[0]

    @property
    def saved(self) -> float | None:
        """Score of the chosen format rounded plainly minus its own; None where either lacks."""
        plain = None if self.rounding is None else self.scores.get(self.rounding.plain or "")
        return None if plain is None or self.loss is None else plain[0] - self.loss

    @property
    def saved_text(self) -> str:
        """The same for a table; a dash where nothing could be saved."""
        if self.method in (None, MAX):
            return "-"
        return _NOT_SCORED if self.saved is None else f"{self.saved:.4e}"


def group_rows(
    groups: Sequence[GroupChoices],
    formats: Mapping[str, str],
    scores: ScoresWithErrors,
    kept: Mapping[str, float],
    unsearched: Mapping[str, str],
    *,
    rounded: Mapping[str, Rounding],
) -> list[GroupRow]:
    """Rows of all groups, the most sensitive first, unsearched ones last.

    Args:
        groups: All groups of the plan.
        formats: Group -> chosen format.
        scores: Measured scores.
        kept: Group -> share of the resamples in which it keeps its format.
        unsearched: Group -> why it is not searched.
        rounded: Format -> how it rounds weights; empty for a menu without methods.
    """
    losses = {group.name: _loss(group.name, formats, scores) for group in groups}
    total = math.fsum(losses.values())
    shares = {name: loss / total if total > 0 else 0.0 for name, loss in losses.items()}
    rows = [
        GroupRow(
            name=group.name,
            modules=group.module_names,
            num_weights=group.num_weights,
            chosen=formats[group.name],
            num_bytes=group.cost(formats[group.name], "storage"),
            num_bits=group.rows[formats[group.name]]["weight_bits"],
            share=None if group.name in unsearched else shares[group.name],
            sensitivity=max((s for s, _ in scores.get(group.name, {}).values()), default=None),
            scores=scores.get(group.name, {}),
            kept=kept.get(group.name),
            note=unsearched.get(group.name),
            rounding=rounded.get(formats[group.name]),
        )
        for group in groups
    ]
    return sorted(rows, key=lambda row: (row.sensitivity is None, -(row.sensitivity or 0.0)))


def _loss(group: str, formats: Mapping[str, str], scores: ScoresWithErrors) -> float:
    """Predicted loss of a group in its chosen format; 16 bits lose nothing."""
    entry = scores.get(group, {}).get(formats[group])
    return 0.0 if entry is None else entry[0]


@dataclass(frozen=True, kw_only=True)
class MixRow:
    """How much of the model is in a format.

    Attributes:
        share: Share of all weights that can be quantized, 0 to 1.
        num_bits: Stored bits per weight, on average.
        lost: Share of the predicted loss.
    """

    format: str
    num_groups: int
    share: float
    num_bits: float
    num_bytes: float
    lost: float


def readable(format_: str) -> str:
    """A format as people read it."""
    return "16 bits" if format_ == NONE else format_


def format_mix(rows: Sequence[GroupRow]) -> list[MixRow]:
    """Formats in use, the one with most weights first."""
    by_format: dict[str, list[GroupRow]] = {}
    for row in rows:
        by_format.setdefault(row.chosen, []).append(row)
    weights = sum(row.num_weights for row in rows)
    mix = [
        MixRow(
            format=name,
            num_groups=len(of_format),
            share=sum(row.num_weights for row in of_format) / weights,
            num_bits=math.fsum(row.num_bits * row.num_weights for row in of_format)
            / max(1, sum(row.num_weights for row in of_format)),
            num_bytes=math.fsum(row.num_bytes for row in of_format),
            lost=math.fsum(row.share or 0.0 for row in of_format),
        )
        for name, of_format in by_format.items()
    ]
    return sorted(mix, key=lambda row: -row.share)


@dataclass(frozen=True, kw_only=True)
class MethodSection:
    """The section of a report that says what methods of rounding saved.

    Attributes:
        text: What is compared, and the total.
        rows: Cells under ``METHOD_HEADS``, the method that saved most first.
        is_per_layer: Whether tables of layers say it too: not where a format's name has but the
            method that it always has.
    """

    text: str
    rows: list[tuple[str, ...]]
    is_per_layer: bool


def method_section(
    rows: Sequence[GroupRow], unit: str, *, is_per_layer: bool
) -> MethodSection | None:
    """Totals per method; None where methods are no question.

    Args:
        rows: Rows of all groups.
        unit: Of the scores.
        is_per_layer: As in the section.
    """
    by_method: dict[str, list[GroupRow]] = {}
    for row in rows:
        if row.method is not None and row.loss is not None:
            by_method.setdefault(row.method, []).append(row)
    if not by_method:
        return None
    chosen = [row for row in rows if row.method not in (None, MAX) and row.saved is not None]
    loss, saved = math.fsum(row.loss or 0.0 for row in chosen), _saved(chosen)
    text = (
        "How the weights of each group are rounded. What that saves was not scored: the menu has "
        f"none of these formats rounded plainly (NAME:{MAX})."
    )
    if chosen:
        text = (
            "How the weights of each group are rounded, and what that saves: the score of the same "
            f"format rounded plainly ({MAX}) minus the score of the chosen one, in {unit}. "
            f"Together {saved:.4g}: rounded plainly in the same formats, these groups would be "
            f"predicted to lose {loss + saved:.4g} in place of {loss:.4g}."
        )
    ranked = sorted(by_method.items(), key=lambda item: -_saved(item[1]))
    return MethodSection(
        text=text, rows=[_method_cells(*item) for item in ranked], is_per_layer=is_per_layer
    )


def _saved(rows: Sequence[GroupRow]) -> float:
    return math.fsum(row.saved or 0.0 for row in rows)


def _method_cells(method: str, rows: Sequence[GroupRow]) -> tuple[str, ...]:
    """Cells of a method under ``METHOD_HEADS``."""
    unknown = sum(row.saved is None for row in rows)
    saved = f"{_saved(rows):.4g}"
    if method == MAX:
        saved = "-"
    elif unknown == len(rows):
        saved = _NOT_SCORED
    elif unknown:
        saved += f" ({_NOT_SCORED} for {unknown} groups)"
    return (
        method,
        f"{len(rows)}",
        f"{sum(row.num_weights for row in rows):,}",
        f"{math.fsum(row.loss or 0.0 for row in rows):.4g}",
        saved,
    )
