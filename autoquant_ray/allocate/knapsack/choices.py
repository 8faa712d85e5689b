"""What may be chosen: formats of groups with their scores and costs, as arrays.

A model with its experts apart has hundreds of thousands of (group, format), so they stand in arrays
with a row per group and a column per format; :class:`Choice` is a single cell. Nothing here knows
models, bits or files.

Shapes: G groups, F formats, K choices.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.arrays import Floats, Mask
from autoquant_ray.errors import ConfigError, ScoreError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One format of one group.

    Attributes:
        score: Quality lost, in nats per token, >= 0.
        costs: Cost per resource, in the resource's own unit, >= 0.
    """

    group: str
    format: str
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """Every allowed (group, format).

    Attributes:
        groups: Names of the rows; every group has a format.
        formats: Names of the columns; some may be no group's.
        has_GF: Which group has which format.
        scores_GF: Nats per token; inf where a group lacks a format.
        costs: Resource -> costs (G, F) in its own unit; 0 where a group lacks a format.
    """

    groups: Sequence[str]
    formats: Sequence[str]
    has_GF: Mask
    scores_GF: Floats
    costs: Mapping[str, Floats]

    @classmethod
    def of(cls, choices: Iterable[Choice]) -> Choices:
        """Lay single choices out.

        Raises:
            ConfigError: One occurs twice.
            ScoreError: One lacks a cost that another has.
        """
        listed = list(choices)
        rows = {g: i for i, g in enumerate(dict.fromkeys(c.group for c in listed))}
        columns = {f: i for i, f in enumerate(dict.fromkeys(c.format for c in listed))}
        at_K2 = np.array([(rows[c.group], columns[c.format]) for c in listed], dtype=np.intp)
        at = tuple(at_K2.reshape(-1, 2).T)
        has_GF = np.zeros((len(rows), len(columns)), dtype=np.bool_)
        has_GF[at] = True
        if has_GF.sum() < len(listed):
            pairs = Counter((c.group, c.format) for c in listed)
            (group, format_), _ = pairs.most_common(1)[0]
            raise ConfigError(f"group {group!r} has format {format_!r} more than once")
        scores_GF = np.full(has_GF.shape, np.inf)
        scores_GF[at] = [c.score for c in listed]
        costs: dict[str, Floats] = {}
        for resource in dict.fromkeys(name for c in listed for name in c.costs):
            for choice in listed:
                if resource not in choice.costs:
                    raise _bad_cost(choice.group, choice.format, resource, None)
            costs[resource] = np.zeros(has_GF.shape)
            costs[resource][at] = [c.costs[resource] for c in listed]
        return cls(
            groups=list(rows),
            formats=list(columns),
            has_GF=has_GF,
            scores_GF=scores_GF,
            costs=costs,
        )

    def __len__(self) -> int:
        return int(self.has_GF.sum())

    def __iter__(self) -> Iterator[Choice]:
        for row, column in np.argwhere(self.has_GF).tolist():
            yield Choice(
                group=self.groups[row],
                format=self.formats[column],
                score=float(self.scores_GF[row, column]),
                costs={name: float(cost_GF[row, column]) for name, cost_GF in self.costs.items()},
            )

    def formats_of(self, row: int) -> list[str]:
        """Formats of the group of a row."""
        return [self.formats[column] for column in np.flatnonzero(self.has_GF[row]).tolist()]

    def keep(self, mask_GF: Mask) -> Choices:
        """The choices that a mask leaves; a group that it leaves none is left out."""
        has_GF = self.has_GF & mask_GF
        if (has_GF == self.has_GF).all():
            return self
        rows = np.flatnonzero(has_GF.any(axis=1))
        kept_GF = has_GF[rows]
        return Choices(
            groups=[self.groups[row] for row in rows.tolist()],
            formats=self.formats,
            has_GF=kept_GF,
            scores_GF=np.where(kept_GF, self.scores_GF[rows], np.inf),
            costs={n: np.where(kept_GF, cost_GF[rows], 0.0) for n, cost_GF in self.costs.items()},
        )

    def first_left_out(self, kept: Choices) -> int | None:
        """Row of the first group that :meth:`keep` has left no format; None where all have some."""
        left = set(kept.groups)
        return next((row for row, group in enumerate(self.groups) if group not in left), None)

    def with_used_formats(self) -> Choices:
        """The same without columns that no group has, in the order in which groups name them."""
        first_F = np.where(self.has_GF.any(axis=0), self.has_GF.argmax(axis=0), len(self.groups))
        order = np.argsort(first_F, kind="stable")[: int((first_F < len(self.groups)).sum())]
        if len(order) == len(self.formats) and (np.diff(order) > 0).all():
            return self
        return replace(
            self,
            formats=[self.formats[column] for column in order.tolist()],
            has_GF=self.has_GF[:, order],
            scores_GF=np.ascontiguousarray(self.scores_GF[:, order]),
            costs={name: cost_GF[:, order] for name, cost_GF in self.costs.items()},
        )

    def require_numbers(self, resources: Iterable[str]) -> None:
        """Refuse a score or a cost that is missing, negative or not finite.

        Raises:
            ScoreError: For the first such group and format.
        """
        columns = {name: self.costs.get(name) for name in resources}
        bad_GF = self.has_GF & ~_is_number(self.scores_GF)
        for cost_GF in columns.values():
            bad_GF |= self.has_GF if cost_GF is None else self.has_GF & ~_is_number(cost_GF)
        if not bad_GF.any():
            return
        row, column = np.argwhere(bad_GF)[0].tolist()
        group, format_ = self.groups[row], self.formats[column]
        score = float(self.scores_GF[row, column])
        if not 0 <= score < math.inf:
            named = f"group {group!r}, format {format_!r}"
            raise ScoreError(f"{named}: the score must be finite and >= 0, not {score}")
        for resource, cost_GF in columns.items():
            cost = None if cost_GF is None else float(cost_GF[row, column])
            if cost is None or not 0 <= cost < math.inf:
                raise _bad_cost(group, format_, resource, cost)


AnyChoices = Sequence[Choice] | Choices
"""Single choices, or all of them as arrays."""


def as_choices(choices: AnyChoices) -> Choices:
    """Arrays of choices.

    Raises:
        ConfigError, ScoreError: As :meth:`Choices.of`.
    """
    return choices if isinstance(choices, Choices) else Choices.of(choices)


def restrict(
    choices: AnyChoices, pins: Mapping[str, str], allow: Mapping[str, Sequence[str]]
) -> Choices:
    """Keep the choices that the user's constraints leave.

    Args:
        choices: All choices.
        pins: Group -> the one format that it must get.
        allow: Pattern (``fnmatch``) of group names -> formats allowed there. A group that several
            patterns match gets only what all of them allow. ``none`` is a format like any other.

    Raises:
        ConfigError: A group, a format or a pattern is unknown, or a group has no format left.
    """
    table = as_choices(choices)
    rows = {group: row for row, group in enumerate(table.groups)}
    columns = {f: n for n, f in enumerate(table.formats) if table.has_GF[:, n].any()}
    mask_GF = np.ones(table.has_GF.shape, dtype=np.bool_)
    for pattern, names in allow.items():
        matched = fnmatch.filter(table.groups, pattern)
        if not matched:
            complaint = f"no group matches the pattern {pattern!r}"
            raise ConfigError(_unknown(complaint, pattern, table.groups))
        for name in names:
            _check_exists(f"format {name!r} allowed for {pattern!r}", name, columns)
        allowed_F = np.isin(np.arange(len(table.formats)), [columns[name] for name in names])
        mask_GF[[rows[group] for group in matched]] &= allowed_F
    for group, name in pins.items():
        _check_exists(f"pinned group {group!r}", group, rows)
        of_group = table.formats_of(rows[group])
        _check_exists(f"format {name!r} pinned for group {group!r}", name, of_group)
        mask_GF[rows[group]] &= np.arange(len(table.formats)) == columns[name]
    kept = table.keep(mask_GF)
    row = table.first_left_out(kept)
    if row is not None:
        constraints = "the pinned and allowed formats; allow one of its formats"
        raise ConfigError(f"group {table.groups[row]!r} has no format left after {constraints}")
    return kept


def _is_number(values_GF: Floats) -> Mask:
    numbers_GF: Mask = (values_GF >= 0) & (values_GF < np.inf)
    return numbers_GF


def _bad_cost(group: str, format_: str, resource: str, cost: float | None) -> ScoreError:
    named = f"group {group!r}, format {format_!r}"
    return ScoreError(f"{named}: the cost {resource!r} must be finite and >= 0, not {cost}")


def _check_exists(subject: str, name: str, valid_names: Iterable[str]) -> None:
    if name not in (names := set(valid_names)):
        raise ConfigError(_unknown(f"{subject} does not exist", name, names))


def _unknown(complaint: str, name: str, valid_names: Iterable[str]) -> str:
    names = sorted(valid_names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f"{complaint}; closest: {', '.join(close)}"
