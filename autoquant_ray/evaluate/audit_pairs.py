"""Which scores an audit measures, and what it makes of the measurements.

A score predicts the KL divergence of one (group, format) pair alone. An audit measures it for some
pairs, and solves the budget again with what was measured.

**Which pairs.** Two lists, taken from in turn until there are enough:

- the most uncertain: ``min(p, 1 - p) * standard error of the score``, with p the share of the
  resamples of the shards whose plan holds the pair
  (:mod:`autoquant_ray.allocate.certainty.solution`): what is at stake if the sample misled, in nats
  per token. A pair that no resample or every resample chooses is not uncertain, however wide its
  error;
- the most costly: the plan's own pairs, those with the largest share of the predicted loss first.

When both are used up, the other allowed pairs follow, those next to the format of the plan first:
ordered by how much their score differs from the chosen one's. Ties go by the order of the plan.

**Which scale.** Predictions come from the calibration data and are of second order, measurements
come from other data and are not. Both may be apart by a common factor; put side by side as they
are, every measured pair would then look better, or worse, than every unmeasured one, and the plan
would move for no reason. An allocation does not change when all scores are multiplied by one
number, so the pairs that were not measured are multiplied by the median of measured / predicted,
and the measured ones stay as they are. The median, so that the few pairs for which the prediction
fails, for which the audit is made, do not move the others. It cannot correct a factor that differs
between formats, nor that pairs which are in the plan because their score came out too low are
found too low here (they are what the audit is for).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.allocate.ties import solve_tied
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import AuditedPair
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import AUDIT_FILE

Pair = tuple[str, str]
"""(group, format)."""


def choose_pairs(
    problem: Problem,
    scores: Mapping[Pair, float],
    stderrs: Mapping[Pair, float | None],
    shares: Mapping[Pair, float],
    options: SolveOptions,
    formats: Mapping[str, str],
    count: int,
) -> list[Pair]:
    """The pairs that matter most to a plan, by the rule above; deterministic.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        stderrs: Their standard errors; None where there is a single shard.
        shares: Share of the resamples whose plan holds the pair; empty where it is not known.
        options: Constraints of the plan; a pair that they forbid is never measured.
        formats: The plan: searched group -> format.
        count: How many; fewer where there are not so many.
    """
    allowed = [
        (choice.group, choice.format)
        for choice in allowed_choices(problem, scores, options)
        if choice.format != NONE
    ]

    def at_stake(pair: Pair) -> float:
        share = shares.get(pair, 0.0)
        return min(share, 1 - share) * (stderrs.get(pair) or 0.0)

    def distance(pair: Pair) -> float:
        own = formats[pair[0]]
        return abs(scores[pair] - (0.0 if own == NONE else scores[pair[0], own]))

    uncertain = sorted((p for p in allowed if at_stake(p) > 0), key=at_stake, reverse=True)
    chosen = [pair for pair in allowed if formats[pair[0]] == pair[1]]
    costly = sorted(chosen, key=scores.__getitem__, reverse=True)
    rest = sorted(allowed, key=distance)
    return list(dict.fromkeys([*_in_turn(uncertain, costly), *rest]))[:count]


def _in_turn(first: Iterable[Pair], second: Iterable[Pair]) -> list[Pair]:
    """One from each list in turn, each pair once; the longer one goes on alone."""
    taken: dict[Pair, None] = {}
    lists = [iter(first), iter(second)]
    while lists:
        for one in list(lists):
            pair = next((p for p in one if p not in taken), None)
            if pair is None:
                lists.remove(one)
            else:
                taken[pair] = None
    return list(taken)


def median_ratio(pairs: Sequence[AuditedPair]) -> float | None:
    """Median of measured / predicted over the pairs that have a ratio; None if none has."""
    ratios = [pair.ratio for pair in pairs if pair.ratio is not None]
    return float(np.median(ratios)) if ratios else None


def audited_scores(scores: Mapping[Pair, float], pairs: Sequence[AuditedPair]) -> dict[Pair, float]:
    """Measured losses where there are any, predictions brought to their scale elsewhere.

    Args:
        scores: (group, format) -> predicted loss in nats per token.
        pairs: What was measured. A pair that breaks the model gets more than any plan without
            such a pair can lose, so that it is taken only where nothing else meets the budget.
    """
    factor = median_ratio(pairs) or 1.0
    found = {pair: factor * score for pair, score in scores.items()}
    found |= {(p.group, p.format): p.measured for p in pairs if p.measured < math.inf}
    broken = [(p.group, p.format) for p in pairs if p.measured == math.inf]
    largest: dict[str, float] = {}
    for pair, score in found.items():
        if pair not in broken:
            largest[pair[0]] = max(score, largest.get(pair[0], 0.0))
    worst = 1.0 + 2.0 * math.fsum(largest.values())
    return found | dict.fromkeys(broken, worst)


def solve_again(
    problem: Problem,
    scores: Mapping[Pair, float],
    pairs: Sequence[AuditedPair],
    options: SolveOptions,
    formats: Mapping[str, str],
) -> dict[str, str]:
    """The plan within the same budget and constraints, by the audited scores.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        pairs: What was measured.
        options: Budgets and constraints.
        formats: The plan that was audited; it stays where nothing else is better.

    Returns:
        Searched group -> format.
    """
    audited = audited_scores(scores, pairs)
    choices, budgets = allowed_choices(problem, audited, options), problem.budgets(options)
    found = solve_tied(choices, budgets, ties_of(problem, options), max_formats=options.max_formats)
    own = math.fsum(audited[g, f] for g, f in formats.items() if f != NONE)
    return dict(formats) if own <= found.score else found.formats


def write_pairs(
    directory: RunDirectory, solution: str, data_key: str, pairs: Sequence[AuditedPair]
) -> str:
    """Replace an audited solution's rows of ``audit.parquet``, those of others stay; its path."""
    kept = []
    if directory.exists(AUDIT_FILE):
        before = directory.read_table(AUDIT_FILE, "audit").to_pylist()
        kept = [row for row in before if row["solution"] != solution]
    labels = {"solution": solution, "data_key": data_key}
    rows = [vars(pair) | {"ratio": pair.ratio} | labels for pair in pairs]
    return directory.write_table(AUDIT_FILE, "audit", [*kept, *rows])
