"""Samples of several domains -> shards that hold one domain each.

A score is a sum over shards, so a shard of one domain belongs to one domain's score and to the
whole. Packing never joins texts of two domains. With a single domain, samples and shards are what
they would be without any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from autoquant_ray.config.sources import MAX_DOMAINS
from autoquant_ray.data.cutting import (
    MIN_SAMPLE_TOKENS,
    DataCounts,
    SampleAssembler,
    Tokens,
)
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError

Item = TypeVar("Item")


class DomainAssembler(Generic[Tokens]):
    """Makes samples of token lists, those of each domain apart, until there are ``num_samples``.

    Args:
        spec: The rules; ``num_samples`` counts all domains together.
        counts: Where to count; None for counts of its own.
        opening: As for :class:`~autoquant_ray.data.cutting.SampleAssembler`.

    Attributes:
        counts: What happened to the input of all domains.
    """

    def __init__(
        self,
        spec: DataSpec,
        counts: DataCounts | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        self.counts = DataCounts() if counts is None else counts
        self._spec = spec
        self._opening = opening
        self._assemblers: dict[str, SampleAssembler[Tokens]] = {}

    @property
    def is_full(self) -> bool:
        """Whether ``num_samples`` have been given out; further input is ignored."""
        return self.counts.used >= self._spec.num_samples

    def add(
        self, token_lists: list[Tokens], texts_empty: list[bool], domains: list[str]
    ) -> list[tuple[str, Tokens]]:
        """Take the next texts.

        Args:
            token_lists: Token ids of each text.
            texts_empty: Whether each text is white space only.
            domains: Domain of each text.

        Returns:
            The samples completed by these texts, with their domains.

        Raises:
            DataError: There are more domains than a run may have.
        """
        samples: list[tuple[str, Tokens]] = []
        for tokens, is_empty, domain in zip(token_lists, texts_empty, domains, strict=True):
            if self.is_full:
                break
            made = self._assembler_of(domain).add([tokens], [is_empty])
            samples += [(domain, sample) for sample in made]
        return samples

    def finish(self) -> list[tuple[str, Tokens]]:
        """Give out what remains of each domain, in the order in which they began."""
        return [
            (domain, sample)
            for domain, assembler in self._assemblers.items()
            for sample in assembler.finish()
        ]

    def has_more(self, token_lists: list[Tokens], texts_empty: list[bool]) -> bool:
        """Whether there is another sample in what remains, or in further texts."""
        return any(assembler.has_window() for assembler in self._assemblers.values()) or any(
            len(tokens) >= MIN_SAMPLE_TOKENS and not is_empty
            for tokens, is_empty in zip(token_lists, texts_empty, strict=True)
        )

    def _assembler_of(self, domain: str) -> SampleAssembler[Tokens]:
        if domain not in self._assemblers:
            require_room(len(self._assemblers), domain, self._spec)
            self._assemblers[domain] = SampleAssembler(self._spec, self.counts, self._opening)
        return self._assemblers[domain]


def require_room(num_domains: int, following: str, spec: DataSpec) -> None:
    """Check that there may be one more domain.

    Args:
        num_domains: Those that there are.
        following: Name of the next.
        spec: Of the data.

    Raises:
        DataError: There may not.
    """
    if num_domains >= MAX_DOMAINS:
        raise DataError(
            f"data source {spec.source}: field {spec.domain_field!r} has more than {MAX_DOMAINS} "
            f"values, the next is {following!r}; name a coarser column with `domain_field`"
        )


def shards_by_domain(
    samples: Iterator[tuple[str, Item]], size: int
) -> Iterator[tuple[str, list[Item]]]:
    """Shards of one domain each, in the order in which they become full; then what remains.

    Args:
        samples: With their domains.
        size: Samples of a full shard.
    """
    waiting: dict[str, list[Item]] = {}
    for domain, sample in samples:
        shard = waiting.setdefault(domain, [])
        shard.append(sample)
        if len(shard) == size:
            yield domain, shard
            waiting[domain] = []
    for domain, shard in waiting.items():
        if shard:
            yield domain, shard


def in_turn(streams: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """One item of each stream after the other, until all are at their end.

    So the first shards of a run, by which a scan may stop, are of all its sources.
    """
    left = list(streams)
    while left:
        still = []
        for stream in left:
            for item in stream:
                yield item
                still.append(stream)
                break
        left = still
