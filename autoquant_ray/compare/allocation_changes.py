"""Which groups would get another format, and what keeping the earlier allocation costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.format import NONE


@dataclass(frozen=True, kw_only=True)
class FormatChange:
    """A group whose format differs; costs and scores are those of the second run.

    Attributes:
        group: Its name.
        before: Format in the first run.
        after: Format in the second run.
        bytes_before: Stored bytes under the earlier format; None if the second run lacks it.
        bytes_after: Stored bytes under the later format.
        score_before: Predicted KL of the earlier format, nats per token; None as above.
        score_after: Predicted KL of the later format.
    """

    group: str
    before: str
    after: str
    bytes_before: float | None
    bytes_after: float
    score_before: float | None
    score_after: float


@dataclass(frozen=True, kw_only=True)
class Regret:
    """What the first run's allocation costs under the second run's scores.

    Attributes:
        kept_nats: Predicted KL of the first run's allocation, nats per token.
        own_nats: Predicted KL of the second run's allocation.
        kept_bytes: Stored bytes of the searched groups under the first run's allocation.
        own_bytes: The same under the second run's allocation.
        nats: ``kept_nats - own_nats``; below 0 where the first allocation was allowed more bytes.
        relative: ``nats / own_nats``; None where that is 0.
    """

    kept_nats: float
    own_nats: float
    kept_bytes: float
    own_bytes: float
    nats: float
    relative: float | None


def format_changes(
    before: Mapping[str, str], after: Mapping[str, str], problem: Problem, scores: Scores
) -> list[FormatChange]:
    """Groups of both allocations whose format differs, the dearest mistake first.

    Args:
        before: Group -> format in the first run.
        after: Group -> format in the second run.
        problem: Groups and costs of the second run.
        scores: Scores of the second run.
    """
    changes = []
    for name, format_ in after.items():
        earlier = before.get(name, format_)
        if earlier == format_:
            continue
        group = problem.groups[name]
        changes.append(
            FormatChange(
                group=name,
                before=earlier,
                after=format_,
                bytes_before=group.cost(earlier, "storage") if earlier in group.rows else None,
                bytes_after=group.cost(format_, "storage"),
                score_before=_score(scores, name, earlier),
                score_after=_score(scores, name, format_) or 0.0,
            )
        )
    return sorted(changes, key=lambda c: -abs((c.score_before or 0.0) - c.score_after))


def regret(
    before: Mapping[str, str], after: Mapping[str, str], problem: Problem, scores: Scores
) -> Regret | None:
    """Regret of keeping the first allocation; None where it does not cover the second run's groups.

    Args:
        As :func:`format_changes`.
    """
    groups = problem.searched
    kept = [_score(scores, group.name, before.get(group.name, "")) for group in groups]
    if None in kept:
        return None
    kept_nats = math.fsum(score for score in kept if score is not None)
    own_nats = math.fsum(_score(scores, g.name, after[g.name]) or 0.0 for g in groups)
    nats = kept_nats - own_nats
    return Regret(
        kept_nats=kept_nats,
        own_nats=own_nats,
        kept_bytes=math.fsum(g.cost(before[g.name], "storage") for g in groups),
        own_bytes=math.fsum(g.cost(after[g.name], "storage") for g in groups),
        nats=nats,
        relative=nats / own_nats if own_nats > 0 else None,
    )


def _score(scores: Scores, group: str, format_: str) -> float | None:
    return 0.0 if format_ == NONE else scores.get((group, format_))
