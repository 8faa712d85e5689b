"""Scores around a quantized plan: what single changes of it do to the quantized model.

A score says what a format loses while everything else is in 16 bits. Once all layers are
quantized, that may be another number. A *flip* gives one group another format and leaves all
others as the plan has them; it is scored where it would be made, in two steps:

1. by gradients around the plan (:mod:`autoquant_ray.flip_gradients`): every flip, in one forward
   and backward pass, to second order;
2. by measurement: of the flips that the new scores like best, the paired difference to the plan on
   the same tokens. A flip alone need not keep the budget, another one may pay for it.

After either step the budget is solved once more, exactly, with the new scores; after the second
only what was measured can be chosen, so that it trusts nothing beyond. What neither step sees is
how several flips act together, so a plan that comes out is measured like any other before it is
taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from autoquant_ray.allocation import restrict, solve
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.formats import NONE
from autoquant_ray.swaps import Formats, Swaps

if TYPE_CHECKING:
    from autoquant_ray.flip_gradients import FlipSums

Flip = tuple[str, str]
"""(group, its new format)."""


def flip_rows(names: Sequence[str], formats: Sequence[str], sums: FlipSums) -> list[dict[str, Any]]:
    """Rows of a part with the schema ``flips``.

    Args:
        names: Searched groups.
        formats: The menu.
        sums: Of one shard.
    """
    return [
        {
            "group": name,
            "format": format_,
            "slope": float(sums.slope_GF[g, f]),
            "squares": float(sums.squares_GF[g, f]),
            "num_tokens": sums.num_tokens,
        }
        for g, name in enumerate(names)
        for f, format_ in enumerate([*formats, NONE])
    ]


def flip_scores(parts: Iterable[pa.Table]) -> dict[Flip, float]:
    """Predicted change of the plan's KL in nats per token by every flip.

    Args:
        parts: One table per shard, in order.

    Returns:
        Empty where a sum is not finite: the plan breaks the model.
    """
    sums: dict[Flip, list[float]] = {}
    num_tokens = 0
    for part in parts:
        rows = part.to_pylist()
        num_tokens += rows[0]["num_tokens"]
        for row in rows:
            loss = row["slope"] + 0.5 * row["squares"]
            sums.setdefault((row["group"], row["format"]), []).append(loss)
    scores = {flip: math.fsum(losses) / num_tokens for flip, losses in sums.items()}
    return scores if all(map(math.isfinite, scores.values())) else {}


def scores_around(
    scores: Mapping[Flip, float], formats: Formats, differences: Mapping[Flip, float]
) -> dict[Flip, float]:
    """Scores whose differences to the plan's own are those given, and elsewhere what they were.

    As for all scores, 16 bits count as 0: what a group loses is what it would gain by them.

    Args:
        scores: (group, format) -> predicted loss in nats per token, 16 bits left out.
        formats: The plan.
        differences: What flips lose more than the plan, in nats per token; those that are not
            finite are passed over.
    """
    losses = {(group, NONE): 0.0 for group in formats} | dict(scores)
    around = {flip: loss - losses[flip[0], formats[flip[0]]] for flip, loss in losses.items()}
    around |= {
        flip: loss for flip, loss in differences.items() if flip in losses and math.isfinite(loss)
    }
    return {flip: around[flip] - around[flip[0], NONE] for flip in scores if flip[0] in formats}


def choose_flips(swaps: Swaps, formats: Formats, count: int) -> list[Flip]:
    """The moves of the changes that the scores like best, each once.

    Args:
        swaps: Changes that keep the budgets.
        formats: The plan.
        count: How many; fewer where there are not so many.
    """
    flips: dict[Flip, None] = {}
    for flip in itertools.chain.from_iterable(swaps.proposals(formats)):
        if len(flips) == count:
            break
        flips[flip] = None
    return list(flips)


def solve_flips(
    problem: Problem,
    options: SolveOptions,
    formats: Formats,
    differences: Mapping[Flip, float],
) -> dict[str, str]:
    """The best plan within the budget that measured flips lead to; the plan itself if none does.

    Args:
        problem: Groups with their costs.
        options: Budgets and constraints, which the plan keeps.
        formats: The plan: searched group -> format.
        differences: What each flip loses more than the plan, in nats per token; may be negative.
            One that is not finite is never taken.
    """
    losses = dict.fromkeys(formats.items(), 0.0)
    losses |= {flip: loss for flip, loss in differences.items() if math.isfinite(loss)}
    lowest: dict[str, float] = {}
    for (group, _), loss in losses.items():
        lowest[group] = min(loss, lowest.get(group, 0.0))
    nothing = {(group.name, name): 0.0 for group in problem.searched for name in group.rows}
    choices = [
        # The solver takes losses from 0; a constant per group changes no choice.
        replace(choice, score=losses[choice.group, choice.format] - lowest[choice.group])
        for choice in restrict(problem.choices(nothing), options.pins, options.allow)
        if (choice.group, choice.format) in losses
    ]
    found = solve(choices, problem.budgets(options), max_formats=options.max_formats)
    own = -math.fsum(lowest.values())
    return dict(formats) if own <= found.score else found.formats
