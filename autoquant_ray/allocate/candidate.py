"""An allocation with a name: what it costs and is predicted to lose."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.losses import allocation_key, average_bits, model_bytes, predicted_loss
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search

logger = logging.getLogger(__name__)
SOLUTION, UNQUANTIZED = "solution", "16 bits"
AT_SIZE_OF = "at the size of "
"""Before a rival's name: what the run's scores choose at its size."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An allocation with a name.

    Attributes:
        name: ``solution``, ``16 bits``, ``uniform FORMAT``, ``modelopt``, ``random NUMBER``,
            ``solution NAME``, ``file NAME`` or ``at the size of file NAME``.
        formats: Searched group -> format.
        predicted_kl: Summed score in nats per token.
        weight_bytes: Of the whole model.
        effective_bits: Average stored bits over the searched groups.
    """

    name: str
    formats: dict[str, str]
    predicted_kl: float
    weight_bytes: float
    effective_bits: float

    @property
    def key(self) -> str:
        """Digest of the formats: equal allocations are measured once."""
        return allocation_key(self.formats)


def make_candidate(
    problem: Problem, scores: Scores, name: str, formats: Mapping[str, str]
) -> Candidate:
    """Name an allocation and state what it costs and is predicted to lose.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        name: Its name.
        formats: Searched group -> format.
    """
    return Candidate(
        name=name,
        formats=dict(formats),
        predicted_kl=predicted_loss(scores, formats),
        weight_bytes=model_bytes(problem, formats),
        effective_bits=average_bits(problem.searched, formats),
    )


def without_domains(options: SolveOptions) -> SolveOptions:
    """What is measured is the loss on all of the data; domains have no say in that."""
    if options.domains or options.worst_domain:
        logger.warning(
            "measurements lower the KL of the data as a whole, not by the domains that the "
            "solution was solved for; the new allocation may give some of their gain back"
        )
    return options.replaced(domains={}, worst_domain=False)


def as_allocation(
    problem: Problem, scores: Scores, options: SolveOptions, candidate: Candidate
) -> Allocation:
    """What measurement chose, as an allocation; its gap is that of its predicted loss."""
    best = search(problem, scores, options)
    predicted = candidate.predicted_kl
    gap = max(0.0, predicted - best.score) / predicted if predicted else 0.0
    return replace(best, formats=candidate.formats, score=predicted, optimality_gap=gap)
