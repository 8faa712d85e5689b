"""Solving by domains, and who pays for an allocation.

With ``KL_d(x)`` the predicted loss of allocation x in nats per token of domain d, ``--domains``
minimises ``sum_d w_d * KL_d(x)``: a knapsack like any other, with weighted scores.
``--worst-domain`` minimises ``max_d KL_d(x)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoquant_ray.allocate import allocation as allocations
from autoquant_ray.allocate.allocation import Allocation, Budget, without_scores
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.knapsack.choices import Choices
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.worst import solve_worst
from autoquant_ray.allocate.losses import predicted_loss
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, best_served, search, ties_of
from autoquant_ray.arrays import Floats
from autoquant_ray.errors import ConfigError, StoreError
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.names import (
    DOMAIN_SCORES_FILE,
    DOMAINS_FILE,
    remedy_of,
)
from autoquant_ray.runs.state import RunState
from autoquant_ray.wording import few


def solve_domains(
    state: RunState, problem: Problem, scores: Scores, options: SolveOptions
) -> Allocation:
    """Choose formats for the least of what the options ask for.

    Args:
        state: The run.
        problem: Its groups with their costs.
        scores: (group, format) -> nats per token of the whole data.
        options: Budget, constraints and domains.

    Returns:
        The allocation; its score is what was made least.

    Raises:
        InfeasibleBudgetError: With the reachable range.
        ConfigError: The run has no such domain, or none at all; or as ``Problem.solve``.
    """
    if not options.domains and not options.worst_domain:
        return search(problem, scores, options)
    return solve_for(wanted_domains(state), problem, options)


def wanted_domains(state: RunState) -> DomainScores:
    """The scores of a run's domains, which an allocation is made for.

    Raises:
        ConfigError: The run has none.
    """
    domains = read_domain_scores(state)
    if domains is None and state.directory.exists(DOMAINS_FILE):
        raise ConfigError(
            f"{state.directory.uri} has scores of fewer than two domains: of the others no shard "
            "was scored, or no gradient was seen; score more samples"
        )
    if domains is None:
        raise ConfigError(
            f"{state.directory.uri} has no scores by domain; scan with `domain_field` FIELD, or "
            "with two `data` NAME=SOURCE or more"
        )
    return domains


def solve_for(domains: DomainScores, problem: Problem, options: SolveOptions) -> Allocation:
    """The same with scores at hand, for options that name domains or the worst one.

    Raises:
        InfeasibleBudgetError, ConfigError: As :func:`solve_domains`.
    """
    if options.domains:
        return search(problem, domains.weighted(options.domains), options)
    return best_served(problem, options, lambda variant: _solve_worst(variant, domains, options))


def domain_summary(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    formats: Mapping[str, str],
) -> dict[str, Any]:
    """What ``solution`` in ``manifest.json`` says about domains; nothing where there are none.

    ``domains``: name -> ``num_tokens``, ``weight`` (null unless the allocation was solved for
    weights), ``predicted_kl_nats``, and ``equal_kl_nats``: the same of the allocation that weighs
    all domains alike under the same budget and constraints. ``predicted_kl_nats`` stays that of all
    tokens, whatever was made least; ``score`` is what was.

    Args:
        state: The run.
        problem: Its groups with their costs.
        scores: (group, format) -> nats per token of the whole data.
        options: What the allocation was solved for.
        formats: The allocation: group -> format.
    """
    domains = read_domain_scores(state)
    if domains is None:
        return {}
    equal = search(problem, domains.weighted(domains.equal_weights), options).formats
    own_losses, equal_losses = domains.losses(formats), domains.losses(equal)
    summaries = {
        name: {
            "num_tokens": domains.num_tokens[name],
            "weight": options.domains.get(name, 0.0) if options.domains else None,
            "predicted_kl_nats": own_losses[name],
            "equal_kl_nats": equal_losses[name],
        }
        for name in domains.scores
    }
    return {"domains": summaries, "predicted_kl_nats": predicted_loss(scores, formats)}


def _solve_worst(problem: Problem, domains: DomainScores, options: SolveOptions) -> Allocation:
    equal = domains.weighted(domains.equal_weights)
    if ties := ties_of(problem, options):
        whom = "clusters of experts" if options.engine is None else options.engine
        raise ConfigError(
            f"`worst_domain` cannot be solved for {whom}: one format for {few(ties[0], 2)}; weigh "
            "the domains with `domains`"
        )
    choices = allowed_choices(problem, equal, options).with_used_formats()
    budgets = problem.budgets(options)
    knapsack, scores_DGF = _domain_arrays(choices, budgets, domains)
    limit = allocations.format_limit(choices.formats, options.max_formats)
    answer = solve_worst(knapsack, scores_DGF, limit)
    if answer is None:
        return search(problem, equal, options)  # raises, with the reachable range
    taken_GF = np.arange(len(choices.formats)) == answer.columns_G[:, None]
    allocation = allocations.solve(choices.keep(taken_GF), budgets)
    return replace(allocation, score=answer.score, optimality_gap=answer.gap)


def _domain_arrays(
    choices: Choices, budgets: Sequence[Budget], domains: DomainScores
) -> tuple[Knapsack, Floats]:
    """A knapsack without losses, and the loss of every choice in each domain (D, G, F)."""
    cells = np.argwhere(choices.has_GF).tolist()
    keys = [(choices.groups[row], choices.formats[column]) for row, column in cells]
    scores_DGF = np.full((len(domains.scores), *choices.has_GF.shape), np.inf)
    for scores_GF, scores in zip(scores_DGF, domains.scores.values(), strict=True):
        scores_GF[choices.has_GF] = [0.0 if key[1] == NONE else scores[key] for key in keys]
    return without_scores(choices, budgets), scores_DGF


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """The scores of several domains.

    Attributes:
        scores: Domain -> scores on its tokens.
        num_tokens: Domain -> predicted tokens behind them.
    """

    scores: Mapping[str, Scores]
    num_tokens: dict[str, int]

    @property
    def equal_weights(self) -> dict[str, float]:
        """Every domain counts alike, however many tokens it has."""
        return dict.fromkeys(self.scores, 1 / len(self.scores))

    def weighted(self, weights: Mapping[str, float]) -> Scores:
        """``sum_d w_d * score_d`` for every (group, format).

        Args:
            weights: Domain -> weight; a domain without one counts nothing.

        Raises:
            ConfigError: A domain that the run does not have.
        """
        self.require(weights)
        first = next(iter(self.scores.values()))
        return {
            key: math.fsum(weight * self.scores[name][key] for name, weight in weights.items())
            for key in first
        }

    def losses(self, formats: Mapping[str, str]) -> dict[str, float]:
        """Predicted KL of each domain under an allocation, in nats per token of that domain.

        Args:
            formats: Searched group -> format; further groups in 16 bits may be there too.
        """
        return {domain: predicted_loss(scores, formats) for domain, scores in self.scores.items()}

    def require(self, names: Mapping[str, float]) -> None:
        """Check that domains exist.

        Raises:
            ConfigError: One does not.
        """
        for name in names:
            if name not in self.scores:
                domains = ", ".join(self.scores)
                raise ConfigError(
                    f"`domains`: the run has no scores of a domain {name!r}; it has: {domains}"
                )


def read_domain_scores(state: RunState) -> DomainScores | None:
    """The scores of a run's domains; None where it has fewer than two.

    Raises:
        StoreError: A file is damaged or lost.
    """
    if not state.directory.exists(DOMAIN_SCORES_FILE):
        if state.directory.exists(DOMAINS_FILE):
            lost = state.directory.path(DOMAIN_SCORES_FILE)
            raise StoreError(f"{lost} is lost; {remedy_of(DOMAIN_SCORES_FILE)}")
        return None
    table = state.directory.read_table(DOMAIN_SCORES_FILE)
    scores: dict[str, dict[tuple[str, str], float]] = {}
    num_tokens: dict[str, int] = {}
    for row in table.select(["domain", "group", "format", "score", "num_tokens"]).to_pylist():
        scores.setdefault(row["domain"], {})[row["group"], row["format"]] = row["score"]
        num_tokens[row["domain"]] = row["num_tokens"]
    return DomainScores(scores=scores, num_tokens=num_tokens) if len(scores) > 1 else None
