"""Scores around an allocation: what single changes do to a model that is already quantized.

A score says what a format loses while everything else stays in 16 bits. In a quantized model the
loss of the same change may differ. Here it comes from two sources:

- every *flip*, which gives a single group another format and leaves all other groups as they are,
  is predicted by its slope and curvature around the allocation, from a forward and a backward pass
  (:mod:`autoquant_ray.evaluate.flip_estimates`);
- those with the best predictions are measured in place: the paired difference to the allocation, on
  the same tokens. Two groups whose flips are predicted to interact are measured together.

A prediction only orders what is tried. A flip alone may exceed the budget; another flip can make up
for it. The budget is then solved again, exactly, with the measured differences, and only measured
flips can be chosen. How other flips interact is not measured here; the resulting allocation is
measured like any other before it is accepted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.allocate.ties import solve_tied
from autoquant_ray.evaluate.flip_estimates import Flip
from autoquant_ray.evaluate.swaps import Change, Formats, Swaps
from autoquant_ray.formats.format import NONE


def scores_around(
    scores: Mapping[Flip, float], formats: Formats, differences: Mapping[Flip, float]
) -> dict[Flip, float]:
    """Scores with predicted or measured differences to the allocation where there are any.

    As in all scores, 16 bits count as 0.

    Args:
        scores: (group, format) -> predicted loss in nats per token, 16 bits left out.
        formats: The allocation.
        differences: What flips lose more than the allocation, in nats per token; those that are
            not finite are ignored.
    """
    losses = {(group, NONE): 0.0 for group in formats} | dict(scores)
    around = {flip: loss - losses[flip[0], formats[flip[0]]] for flip, loss in losses.items()}
    around |= {
        flip: loss for flip, loss in differences.items() if flip in losses and math.isfinite(loss)
    }
    return {flip: around[flip] - around[flip[0], NONE] for flip in scores if flip[0] in formats}


def choose_flips(swaps: Swaps, formats: Formats, count: int) -> list[Change]:
    """Distinct moves: first those of the changes with the best predictions, then all others.

    Args:
        swaps: Changes within the budgets.
        formats: The allocation.
        count: Number of moves; fewer are returned if there are no more.

    Returns:
        Flips, and pairs of flips that interact.
    """
    moves: dict[Change, None] = {}
    proposed = itertools.chain.from_iterable(swaps.proposed_moves(formats))
    for move in itertools.chain(proposed, swaps.moves(formats)):
        if len(moves) == count:
            break
        moves[move] = None
    return list(moves)


def solve_flips(
    problem: Problem,
    options: SolveOptions,
    formats: Formats,
    differences: Mapping[Change, float],
) -> dict[str, str]:
    """The best allocation within the budget that measured flips make; unchanged if none is better.

    Differences of different moves add up. Of two groups that were measured together, that
    measurement counts where both take those formats; a group is in one such couple at most, and in
    none where the number of formats is limited.

    Args:
        problem: Groups with their costs.
        options: Budgets and constraints; the allocation satisfies them.
        formats: The allocation: searched group -> format.
        differences: What each flip, or two together, lose more than the allocation, in nats per
            token; may be negative. What is not finite is never chosen.
    """
    finite = {change: loss for change, loss in differences.items() if math.isfinite(loss)}
    losses = {((group, name),): 0.0 for group, name in formats.items()} | finite
    allowed = {(c.group, c.format): c for c in allowed_choices(problem, None, options)}
    units = _units(losses, allowed, {} if options.max_formats is not None else _couples(finite))
    choices, meaning = [], {}
    for unit in units:
        lowest = min(unit.values())  # the solver needs losses of 0 or more
        for change, loss in unit.items():
            if all(flip in allowed for flip in change):
                choice = _choice([allowed[flip] for flip in change], loss - lowest)
                choices.append(choice)
                meaning[choice.group, choice.format] = change
    budgets, most = problem.budgets(options), options.max_formats
    solved = solve_tied(choices, budgets, ties_of(problem, options), max_formats=most)
    unchanged_score = -math.fsum(min(unit.values()) for unit in units)
    if unchanged_score <= solved.score:
        return dict(formats)
    new = dict(itertools.chain.from_iterable(meaning[flip] for flip in solved.formats.items()))
    return {group: new[group] for group in formats}


def _units(
    losses: Mapping[Change, float], flips: Iterable[Flip], couples: Mapping[str, str]
) -> list[dict[Change, float]]:
    """What is chosen together: formats of each group, or of two, with what they lose."""
    menus: dict[str, list[Flip]] = {}
    for flip in flips:
        if (flip,) in losses:
            menus.setdefault(flip[0], []).append(flip)
    followers = set(couples.values())
    return [
        _unit(losses, menus, (group, couples[group]) if group in couples else (group,))
        for group in menus
        if group not in followers
    ]


def _couples(differences: Iterable[Change]) -> dict[str, str]:
    """Group -> the other, of groups that were measured together; the first measurement counts."""
    couples: dict[str, str] = {}
    for change in differences:
        groups = [group for group, _ in change]
        if len(groups) == 2 and not set(groups) & {*couples, *couples.values()}:
            couples[groups[0]] = groups[1]
    return couples


def _unit(
    losses: Mapping[Change, float], menus: Mapping[str, Sequence[Flip]], groups: Sequence[str]
) -> dict[Change, float]:
    """Formats of a group, or of two together, with what they lose."""
    unit = {
        flips: math.fsum(losses[(flip,)] for flip in flips)
        for flips in itertools.product(*(menus[group] for group in groups))
    }
    if len(groups) == 1:
        return unit
    of_both = {c: loss for c, loss in losses.items() if [group for group, _ in c] == list(groups)}
    return unit | of_both


def _choice(parts: Sequence[Choice], score: float) -> Choice:
    """Formats of several groups as one choice."""
    return Choice(
        group=parts[0].group,
        format=" + ".join(part.format for part in parts),
        score=score,
        costs={
            resource: math.fsum(part.costs[resource] for part in parts)
            for resource in parts[0].costs
        },
    )
