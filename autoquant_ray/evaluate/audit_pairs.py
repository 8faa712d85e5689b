"""Which scores an audit measures, and how it uses the measurements.

A score predicts the KL divergence of a (group, format) pair alone. An audit measures it for some
pairs, and solves the budget again with the measured losses.

**Which pairs.** Two lists, alternating until there are enough:

- the most uncertain: ``min(p, 1 - p) * standard error of the score``, with p the share of the
  resamples of the shards whose allocation holds the pair
  (:mod:`autoquant_ray.allocate.certainty.solution`): the loss at stake if the sample was
  unrepresentative, in nats per token. A pair that no resample or every resample chooses is not
  uncertain, however large its error;
- the most costly: the pairs of the allocation, in order of their share of the predicted loss.

When both are exhausted, the other allowed pairs follow, ordered by the difference between their
score and that of the chosen format. Ties are broken by the order of the plan.

**Which scale.** Predictions are of second order and come from the calibration data; measurements
are exact and come from other data. The two may differ by a common factor. Mixed without correction,
every measured pair would look better, or worse, than every unmeasured pair, and the allocation
would change for no reason. An allocation does not change when all scores are multiplied by the same
number, so scores of unmeasured pairs are multiplied by the median of measured / predicted, and
measured losses are used as they are. The median is robust against the few pairs whose prediction
fails, which are what an audit looks for. The correction does not cover a factor that differs
between formats, nor the selection effect: pairs in the allocation tend to be there because their
score came out too low.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.allocate.ties import solve_tied
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import AuditedPair
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import AUDIT_FILE

Pair = tuple[str, str]
"""(group, format)."""


def choose_pairs(
    origin: StartingPoint,
    stderrs: Mapping[Pair, float | None],
    shares: Mapping[Pair, float],
    count: int,
) -> list[Pair]:
    """The pairs that matter most to an allocation, by the rule above; deterministic.

    Args:
        origin: The allocation; pairs that its constraints forbid are never measured.
        stderrs: Standard errors of the scores; None where there is a single shard.
        shares: Share of the resamples whose allocation holds the pair; empty where unknown.
        count: Number of pairs; fewer are returned if there are no more.
    """
    scores, formats = origin.scores, origin.formats
    allowed = [
        (choice.group, choice.format)
        for choice in allowed_choices(origin.problem, scores, origin.options)
        if choice.format != NONE
    ]

    def at_stake(pair: Pair) -> float:
        share = shares.get(pair, 0.0)
        return min(share, 1 - share) * (stderrs.get(pair) or 0.0)

    def distance(pair: Pair) -> float:
        chosen_format = formats[pair[0]]
        chosen_score = 0.0 if chosen_format == NONE else scores[pair[0], chosen_format]
        return abs(scores[pair] - chosen_score)

    uncertain = sorted((p for p in allowed if at_stake(p) > 0), key=at_stake, reverse=True)
    chosen = [pair for pair in allowed if formats[pair[0]] == pair[1]]
    costly = sorted(chosen, key=scores.__getitem__, reverse=True)
    rest = sorted(allowed, key=distance)
    return list(dict.fromkeys([*_in_turn(uncertain, costly), *rest]))[:count]


def _in_turn(first: Iterable[Pair], second: Iterable[Pair]) -> list[Pair]:
    """Alternate between two lists without repeating a pair; then the rest of the longer list."""
    taken: dict[Pair, None] = {}
    queues = [iter(first), iter(second)]
    while queues:
        for queue in list(queues):
            pair = next((p for p in queue if p not in taken), None)
            if pair is None:
                queues.remove(queue)
            else:
                taken[pair] = None
    return list(taken)


def median_ratio(pairs: Sequence[AuditedPair]) -> float | None:
    """Median of measured / predicted; None if no pair has a ratio."""
    ratios = [pair.ratio for pair in pairs if pair.ratio is not None]
    return float(np.median(ratios)) if ratios else None


def audited_scores(scores: Mapping[Pair, float], pairs: Sequence[AuditedPair]) -> dict[Pair, float]:
    """Measured losses where there are any, elsewhere predictions rescaled to match them.

    Args:
        scores: (group, format) -> predicted loss in nats per token.
        pairs: The measurements. A pair that breaks the model gets a larger loss than any allocation
            without such a pair, so that it is chosen only where nothing else meets the budget.
    """
    factor = median_ratio(pairs) or 1.0
    rescaled = {pair: factor * score for pair, score in scores.items()}
    rescaled |= {(p.group, p.format): p.measured for p in pairs if p.measured < math.inf}
    broken = [(p.group, p.format) for p in pairs if p.measured == math.inf]
    largest: dict[str, float] = {}
    for pair, score in rescaled.items():
        if pair not in broken:
            largest[pair[0]] = max(score, largest.get(pair[0], 0.0))
    worst = 1.0 + 2.0 * math.fsum(largest.values())
    return rescaled | dict.fromkeys(broken, worst)


def solve_again(origin: StartingPoint, pairs: Sequence[AuditedPair]) -> dict[str, str]:
    """The best allocation within the same budget and constraints, by the audited scores.

    Args:
        origin: The audited allocation; it is returned where nothing else is better.
        pairs: The measurements.

    Returns:
        Searched group -> format.
    """
    problem, options, formats = origin.problem, origin.options, origin.formats
    audited = audited_scores(origin.scores, pairs)
    choices, budgets = allowed_choices(problem, audited, options), problem.budgets(options)
    solved = solve_tied(
        choices, budgets, ties_of(problem, options), max_formats=options.max_formats
    )
    score_before = math.fsum(audited[g, f] for g, f in formats.items() if f != NONE)
    return dict(formats) if score_before <= solved.score else solved.formats


def write_pairs(
    directory: RunDirectory, solution: str, data_key: str, pairs: Sequence[AuditedPair]
) -> str:
    """Replace an audited solution's rows of ``audit.parquet``; returns the path of the file."""
    kept = []
    if directory.exists(AUDIT_FILE):
        before = directory.read_table(AUDIT_FILE).to_pylist()
        kept = [row for row in before if row["solution"] != solution]
    labels = {"solution": solution, "data_key": data_key}
    rows = [vars(pair) | {"ratio": pair.ratio} | labels for pair in pairs]
    return directory.write_table(AUDIT_FILE, [*kept, *rows])
