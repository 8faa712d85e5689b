"""The scores of each domain of a run: written from its shards' parts, and read back.

A domain's score is made of the shards that hold it exactly as the whole run's is made of all of
them, so that it is what a scan of this domain alone would find under the same input maxima.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant_ray.allocate.losses import predicted_loss
from autoquant_ray.errors import ConfigError
from autoquant_ray.runs.names import (
    DOMAIN_SCORES_FILE,
)
from autoquant_ray.runs.state import RunState

logger = logging.getLogger(__name__)

Scores = dict[tuple[str, str], float]
"""(group, format) -> nats per token."""


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """The scores of several domains.

    Attributes:
        scores: Domain -> scores on its tokens.
        num_tokens: Domain -> predicted tokens behind them.
    """

    scores: dict[str, Scores]
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
                known = ", ".join(self.scores)
                raise ConfigError(
                    f"--domains: the run has no scores of a domain {name!r}; it has: {known}"
                )


def read_domain_scores(state: RunState) -> DomainScores | None:
    """The scores of a run's domains; None where it has fewer than two.

    Raises:
        StoreError: A file is damaged.
    """
    if not state.directory.exists(DOMAIN_SCORES_FILE):
        return None
    table = state.directory.read_table(DOMAIN_SCORES_FILE, "domain_sensitivity")
    scores: dict[str, Scores] = {}
    num_tokens: dict[str, int] = {}
    for row in table.select(["domain", "group", "format", "score", "num_tokens"]).to_pylist():
        scores.setdefault(row["domain"], {})[row["group"], row["format"]] = row["score"]
        num_tokens[row["domain"]] = row["num_tokens"]
    return DomainScores(scores=scores, num_tokens=num_tokens) if len(scores) > 1 else None
