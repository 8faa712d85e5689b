"""The best of every size under a plan's own constraints, so that it can be compared with the plan.

A plan that is pinned, served by an engine, made for domains or limited in its formats lies above
the frontier of all plans, however well it was solved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from autoquant_ray.allocate.allocation import frontier, frontier_allocations
from autoquant_ray.allocate.domains import solve_domains, wanted_domains
from autoquant_ray.allocate.frontier import (
    NUM_POINTS,
    Loss,
    Point,
    frontier_options,
    mark_knee,
    point_of,
    reachable_bits,
    sweep_points,
)
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.losses import predicted_loss
from autoquant_ray.allocate.options import UNQUANTIZED_BITS, SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import allowed_choices, served_problems, ties_of
from autoquant_ray.allocate.ties import TiedChoices
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.runs.names import FRONTIER_FILE
from autoquant_ray.serving.menus import NotServedError

_ROUNDING = 1e-12  # relative, of a limit that is met exactly
_NUM_SEARCHED = 16  # sizes that are solved one by one, for each report


def constraints_of(run: ScoredRun, options: SolveOptions) -> SolveOptions | None:
    """What a plan had to keep to beside its size; None where that is no more than the frontier has.

    Args:
        run: The run.
        options: Budget and constraints of the plan.
    """
    latency, experts = options.latency, run.problem.experts
    kept = options.replaced(
        bits=UNQUANTIZED_BITS,
        bytes=None,
        bits_over="searched",
        cost="storage",
        latency=None if latency is None or latency.limit_ms is None else latency,
    )
    if experts is None or experts.ties(kept.expert_groups) == experts.ties(None):
        kept = kept.replaced(expert_groups=None)
    return None if kept == frontier_options(run, UNQUANTIZED_BITS) else kept


def loss_of(run: ScoredRun, options: SolveOptions) -> Loss:
    """What the options make least."""
    if not options.domains and not options.worst_domain:
        return partial(predicted_loss, run.scores)
    domains = wanted_domains(run.state)
    if options.worst_domain:
        return lambda formats: max(domains.losses(formats).values())
    return partial(predicted_loss, domains.weighted(options.domains))


def curve_of(run: ScoredRun, options: SolveOptions, formats: Mapping[str, str]) -> list[Point]:
    """Sizes and least losses under a plan's constraints, its own size among them.

    From ``frontier.parquet`` where that is the curve. Else from one sweep along the hulls, whose
    points are the best of their sizes; under a limit on time or formats from a search at each size.
    A search for the worst domain takes seconds: its sizes come from sweeps for several weights of
    the domains, and all but the plan's own are only near the best.

    Args:
        run: The run; where formats of its KV cache are chosen, they are held as in the plan.
        options: Budget and constraints of the plan.
        formats: The plan: searched group -> format.

    Returns:
        Points by size; what they lose is what the plan makes least.
    """
    run = run.with_problem(replace(run.problem, served=None))  # every menu counts, not the plan's
    kept = constraints_of(run, options)
    if kept is not None:
        points = _constrained_points(run, kept)
    else:
        points = _points_of_file(run)
        if len(points) < NUM_POINTS / 2:  # few sizes, or a file of an earlier version
            swept = sweep_points(run.problem, run.scores, ties_of(run.problem, options))
            points = points if len(points) >= len(swept) / 2 else swept
    return _with_size_of(run, options if kept is None else kept, formats, points)


def _points_of_file(run: ScoredRun) -> list[Point]:
    """The exact points of ``frontier.parquet``; none where it holds other sizes.

    Earlier versions wrote as few points as were asked for, and counted a tied head otherwise.
    """
    if not run.state.directory.exists(FRONTIER_FILE):
        return []
    rows = run.state.directory.read_table(FRONTIER_FILE).to_pylist()
    points = [Point(**row) for row in rows]
    ends = reachable_bits(
        run.problem, ties_of(run.problem, frontier_options(run, UNQUANTIZED_BITS))
    )
    stored = [point.effective_bits for point in (points[:1] + points[-1:])]
    return points if points and np.allclose(stored, ends, rtol=1e-9) else []


def _constrained_points(run: ScoredRun, kept: SolveOptions) -> list[Point]:
    hulls = [hull for s in _swept_scores(run, kept) for hull in _hulls(run.problem, s, kept)]
    ends = [cost for tied in hulls for cost, _ in frontier(tied.choices, "storage")]
    is_searched = kept.max_formats is not None or kept.latency is not None
    num_points = _NUM_SEARCHED if is_searched else NUM_POINTS
    limits = (np.linspace(min(ends), max(ends), num_points) * (1 + _ROUNDING)).tolist()
    loss = loss_of(run, kept)
    if is_searched:
        searched = [_best_within(run, kept, limit) for limit in limits]
        allocations = [formats for formats in searched if formats is not None]
    else:
        allocations = _swept(hulls, limits, loss)
    return mark_knee([point_of(run.problem, loss, formats) for formats in allocations])


def _swept_scores(run: ScoredRun, kept: SolveOptions) -> list[Scores]:
    """What sweeps make least: for the worst domain, the loss under several weights of domains."""
    if not kept.domains and not kept.worst_domain:
        return [run.scores]
    domains = wanted_domains(run.state)
    if kept.domains:
        return [domains.weighted(kept.domains)]
    if kept.max_group_kl is not None:  # a group's loss is by equal weights there
        return [domains.weighted(domains.equal_weights)]
    names = list(domains.scores)
    parts = 4 if len(names) <= 4 else 1
    mixtures = itertools.combinations_with_replacement(names, parts)
    weights = [{n: mixture.count(n) / parts for n in names} for mixture in mixtures]
    return [domains.weighted(of) for of in [domains.equal_weights, *weights]]


def _hulls(problem: Problem, scores: Scores, kept: SolveOptions) -> list[TiedChoices]:
    """The choices of each menu that can be served, groups that share a format as one."""
    hulls: list[TiedChoices] = []
    refused = []
    for variant in served_problems(problem, kept):
        try:
            choices, ties = allowed_choices(variant, scores, kept), ties_of(variant, kept)
            hulls.append(TiedChoices(choices, ties))
        except (NotServedError, InfeasibleBudgetError) as error:
            refused.append(error)
    if not hulls:
        raise refused[0]
    return hulls


def _swept(
    hulls: Sequence[TiedChoices], limits: Sequence[float], loss: Loss
) -> list[dict[str, str]]:
    """At each limit the best of all sweeps."""
    best: dict[float, tuple[float, dict[str, str]]] = {}
    for tied in hulls:
        least = frontier(tied.choices, "storage")[0][0]
        within = [limit for limit in limits if limit >= least]
        swept = frontier_allocations(tied.choices, "storage", within)
        for limit, allocation in zip(within, swept, strict=True):
            formats = tied.spread(allocation.formats)
            if limit not in best or loss(formats) < best[limit][0]:
                best[limit] = loss(formats), formats
    return [best[limit][1] for limit in limits]


def _best_within(run: ScoredRun, kept: SolveOptions, limit: float) -> dict[str, str] | None:
    """The best allocation whose groups add at most so many bytes; None where there is none."""
    num_bytes = math.ceil(limit + run.problem.fixed_bytes)
    options = kept.replaced(bits=None, bytes=num_bytes)
    try:
        return solve_domains(run.state, run.problem, run.scores, options).formats
    except (NotServedError, InfeasibleBudgetError):
        return None


def _with_size_of(
    run: ScoredRun, options: SolveOptions, formats: Mapping[str, str], points: Sequence[Point]
) -> list[Point]:
    """A curve with the size of a plan among its points: between two sizes the best is no line.

    The plan keeps to its own constraints, so that the best of its size loses no more.
    """
    loss = loss_of(run, options)
    plan = best = point_of(run.problem, loss, formats)
    stored = plan.weight_bytes - run.problem.fixed_bytes
    within = None if options.worst_domain else _best_within(run, options, stored)
    if within is not None:
        other = point_of(run.problem, loss, within)
        is_smaller = other.weight_bytes <= plan.weight_bytes
        best = other if is_smaller and other.predicted_kl <= plan.predicted_kl else plan
    by_bits = {point.effective_bits: point for point in points}
    same = by_bits.setdefault(best.effective_bits, best)
    if best.predicted_kl < same.predicted_kl:
        by_bits[best.effective_bits] = replace(best, is_knee=same.is_knee)
    curve = [by_bits[bits] for bits in sorted(by_bits)]
    least = itertools.accumulate((point.predicted_kl for point in curve), min)
    return [p for p, kl in zip(curve, least, strict=True) if p.predicted_kl <= kl or p.is_knee]
