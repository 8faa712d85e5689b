"""What a comparison of two runs found, and the verdict on it.

``same``: every number that both runs have is equal. ``noise``: numbers differ, but no more than
error bars explain, or by too little to matter. ``drift``: the score of at least one group moved
significantly *and* by at least :data:`MIN_CHANGE`; groups came or went without the config asking
for it; equal scores gave a worse allocation; or the runs have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from autoquant_ray.compare.allocation_changes import FormatChange, Regret
from autoquant_ray.compare.run_changes import Change
from autoquant_ray.config.stage_fields import STAGE_FIELDS
from autoquant_ray.notebook import facts_html

Verdict = Literal["same", "noise", "drift"]
Test = Literal["paired", "unpaired", "none"]

_CHOOSES_GROUPS = {"disable", "coverage", "expert_groups"}  # fields of the config

MIN_CHANGE = 0.1
"""A score that moved by less than this share, up or down, is no drift, however sure the move."""
MIN_REGRET = 0.01
"""Below this share of the predicted KL, the earlier allocation loses nothing worth a change."""


@dataclass(frozen=True, kw_only=True)
class MovedGroup:
    """A group whose score moved, by its format that moved most.

    Attributes:
        group: Its name.
        format: The format that moved most.
        before: Its score in the first run, nats per token.
        after: Its score in the second run.
        change: ``after / before - 1``; None where before is 0.
        z: Difference over both standard errors.
        p_value: Probability of such a difference by chance, before the correction for many tests.
        num_formats: Formats of the group that moved.
    """

    group: str
    format: str
    before: float
    after: float
    change: float | None
    z: float
    p_value: float
    num_formats: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """What a comparison found.

    Attributes:
        verdict: ``same``, ``noise`` or ``drift``.
        reasons: Why, in sentences.
        before: Facts about the first run: run_id, uri, predicted_kl_nats, and so on.
        after: Facts about the second run.
        changes: What the runs were made from, where it differs.
        changed_weights: Groups whose weights differ; None where the runs do not tell.
        spearman: Format -> rank correlation of the groups' scores; None where undefined.
        test: ``paired`` by shards, ``unpaired``, or ``none`` where a run has no error bars.
        significance: False discovery rate of the moved groups.
        num_tested: (group, format) pairs that were tested.
        moved: Groups that moved; those whose weights changed first, then by size of the change.
        only_before: Searched groups that the second run lacks.
        only_after: Searched groups that the first run lacks.
        format_changes: Groups that would get another format.
        regret: Of keeping the first run's allocation; None where the scores do not say.
    """

    verdict: Verdict
    reasons: list[str]
    before: dict[str, Any]
    after: dict[str, Any]
    changes: list[Change]
    changed_weights: list[str] | None
    spearman: dict[str, float | None]
    test: Test
    significance: float
    num_tested: int
    moved: list[MovedGroup]
    only_before: list[str]
    only_after: list[str]
    format_changes: list[FormatChange]
    regret: Regret | None

    def to_json(self) -> dict[str, Any]:
        """What ``compare --json`` prints; an infinite z is null, JSON has none."""
        values = asdict(self)
        for row in values["moved"]:
            row["z"] = row["z"] if math.isfinite(row["z"]) else None
        return values

    def __repr__(self) -> str:
        """The verdict and how much moved; tables of all groups would hide them."""
        return (
            f"Comparison({self.verdict!r}, {len(self.moved)} groups moved, "
            f"{len(self.format_changes)} formats change)"
        )

    def _repr_html_(self) -> str:
        return facts_html(
            f"Comparison: {self.verdict}",
            [
                *(("Reason", reason) for reason in self.reasons),
                *((group.group, _worded(group)) for group in self.moved),
                *((c.group, f"{c.before} would become {c.after}") for c in self.format_changes),
            ],
        )


def _worded(group: MovedGroup) -> str:
    return f"{group.format}: {group.before:.4g} became {group.after:.4g} nats per token"


def judged(comparison: Comparison, *, is_equal: bool) -> Comparison:
    """The comparison with its verdict and the reasons.

    Args:
        comparison: Without them.
        is_equal: Whether all scores that both runs have are equal.
    """
    groups = [*comparison.only_before, *comparison.only_after]
    is_reallocated = bool(comparison.format_changes) and not _has_changed(comparison, "allocate")
    alarms = [*_moves(comparison), *_groups(comparison), *_allocations(comparison, is_equal)]
    if not comparison.spearman:
        alarms.append("The runs have no score in common, so that nothing can be compared.")
    if alarms:
        return replace(comparison, verdict="drift", reasons=alarms)
    if is_equal and not groups and not is_reallocated:
        return replace(
            comparison, verdict="same", reasons=["All scores are equal to the last bit."]
        )
    reasons = [*_no_alarm(comparison, is_equal), *_weights(comparison)]
    return replace(comparison, verdict="noise", reasons=reasons)


def describe_changes(changes: Sequence[Change]) -> str:
    """What the runs were made from, where it differs, as one sentence."""
    if not changes:
        return "Model, data, formats, config and versions are the same."
    names = {"model": "the model", "data": "the data", "formats": "the menu of formats"}
    named = {c.kind: f" ({c.before} -> {c.after})" for c in changes if c.name == "name"}
    kinds = dict.fromkeys(change.kind for change in changes)
    parts = [f"{names[kind]}{named.get(kind, '')}" for kind in kinds if kind in names]
    for kind in ("config", "versions"):
        parts += [str(change) for change in changes if change.kind == kind]
    return f"Changed: {', '.join(parts)}."


def _moves(comparison: Comparison) -> list[str]:
    moved = comparison.moved
    if not moved:
        return []
    verb = "group" if len(moved) == 1 else "groups"
    return [
        f"The score of {len(moved)} {verb} moved by {MIN_CHANGE:.0%} or more and by more than "
        f"error bars explain: {_first([group.group for group in moved])}.",
        *_weights(comparison),
    ]


def _weights(comparison: Comparison) -> list[str]:
    """Whose weights changed, as a sentence; nothing where none did, or the runs do not tell."""
    names = comparison.changed_weights
    if not names:
        return []
    return [f"The weights of {len(names)} group(s) changed: {_first(names)}."]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _groups(comparison: Comparison) -> list[str]:
    """Groups that came or went, unless the config or the menu says which there are."""
    if any(
        change.kind == "formats" or change.name in _CHOOSES_GROUPS for change in comparison.changes
    ):
        return []
    named = (("are gone", comparison.only_before), ("are new", comparison.only_after))
    return [
        f"{len(groups)} searched group(s) {what}: {_first(groups)}."
        for what, groups in named
        if groups
    ]


def _allocations(comparison: Comparison, is_equal: bool) -> list[str]:
    """Equal scores and an equal budget must not give an allocation that is worth another."""
    loss = comparison.regret
    is_other_problem = _has_changed(comparison, "plan") or _has_changed(comparison, "allocate")
    if not is_equal or loss is None or is_other_problem:
        return []
    distance = abs(loss.relative or 0.0)
    if distance < MIN_REGRET:
        return []
    return [f"Equal scores gave another allocation, {distance:.1%} apart in predicted KL."]


def _no_alarm(comparison: Comparison, is_equal: bool) -> list[str]:
    if is_equal:
        return ["All scores that both runs have are equal."]
    if comparison.test == "none":
        return [
            "Scores differ, but a run of a single shard has no error bars, so that a move cannot "
            "be told from noise; make shards smaller with shard_samples."
        ]
    return [
        f"Of {comparison.num_tested} scores none moved by more than its error bars explain and by "
        f"{MIN_CHANGE:.0%} or more."
    ]


def _has_changed(comparison: Comparison, stage: str) -> bool:
    return any(
        change.kind == "formats" or (change.kind == "config" and change.name in STAGE_FIELDS[stage])
        for change in comparison.changes
    )
