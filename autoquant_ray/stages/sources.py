"""One source of the calibration data: read, tokenized on the cluster, cut into samples."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from autoquant_ray.config.hold_out import HoldOut, num_held_out
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import equal_shares, sources_of
from autoquant_ray.data.chat_samples import ConversationSamples
from autoquant_ray.data.conversations import BadSample, Conversation, load_images
from autoquant_ray.data.cutting import DataCounts, chunk_texts
from autoquant_ray.data.domain_shards import DomainAssembler, shards_by_domain
from autoquant_ray.data.rows import Row
from autoquant_ray.data.samples import RichSample
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows
from autoquant_ray.errors import DataError
from autoquant_ray.models.tokenizer import TokenizerRef

logger = logging.getLogger(__name__)

Skip = int | Mapping[str, int]
"""Samples left out at the start of the data, or of each of several sources, by name."""

SourceSample: TypeAlias = "array[int] | RichSample"
"""A sample of plain text, or of a chat."""

_MIN_CHUNK_TEXTS, _MAX_CHUNK_TEXTS = 64, 1024
_CHUNK_CHATS = 8  # an image is many times its file once it is processed


class Source:
    """One source of the data, read only as far as samples are needed.

    Args:
        name: Domain of all its texts; '' where there are no domains, or the rows name theirs.
        spec: What to read. Its number of samples does not include those that are left out.
        skip: Samples left out at the start.
        skips_bad: Skip chats that cannot be used.
        hold_out: How much to keep of a source of which nothing would be left; None takes all.

    Attributes:
        counts: What happened to the texts read so far.
        num_held_out: Samples kept, once all others were given out.
    """

    def __init__(
        self,
        name: str,
        spec: DataSpec,
        skip: Skip,
        *,
        skips_bad: bool,
        hold_out: HoldOut | None = None,
    ) -> None:
        self.skipped = skip if isinstance(skip, int) else skip.get(name, 0)
        self.name = name
        self.spec = replace(spec, num_samples=spec.num_samples + self.skipped)
        self.counts = DataCounts()
        self.num_held_out = 0
        self._hold_out = hold_out
        self._has_more = False
        self._chats = ConversationSamples(self.spec, self.counts, skips_bad=skips_bad)

    @property
    def reasons(self) -> list[str]:
        """Why chats were skipped."""
        return self._chats.reasons

    def shards(
        self, tokenizer: TokenizerRef, size: int
    ) -> Iterator[tuple[str, list[SourceSample]]]:
        """Shards with their domains, without the samples that are left out."""
        samples = itertools.islice(self._samples(tokenizer), self.skipped, None)
        if self._hold_out is None:
            return shards_by_domain(samples, size)
        return shards_by_domain(self._without_held_out(samples, self._hold_out), size)

    def _without_held_out(
        self, samples: Iterator[tuple[str, SourceSample]], hold_out: HoldOut
    ) -> Iterator[tuple[str, SourceSample]]:
        """All samples, or all but the last ones where nothing of the source follows them."""
        waiting: deque[tuple[str, SourceSample]] = deque()
        most = min(num_held_out(hold_out, self.spec.num_samples), self.spec.num_samples)
        for sample in samples:
            waiting.append(sample)
            if len(waiting) > most:
                yield waiting.popleft()
        if not self._has_more:
            for _ in range(self._hold_back(hold_out)):
                waiting.pop()
        yield from waiting

    def _hold_back(self, hold_out: HoldOut) -> int:
        """How many of all samples of the source are kept; says so."""
        total, name = self.counts.used, self.spec.source
        self.num_held_out = num_held_out(hold_out, total)
        if total and self.num_held_out >= total:
            raise DataError(
                f"data source {name} holds {total} samples, and `hold_out` {hold_out} keeps "
                f"{self.num_held_out} of them for measurements; lower it, or give more data"
            )
        if self.num_held_out:
            self.counts.used -= self.num_held_out
            logger.info(
                "%s holds %d samples: the last %d are kept for evaluate and refine (`hold_out`)",
                *(name, total, self.num_held_out),
            )
        elif total:
            logger.warning(
                "%s holds %d samples, all of which are used: evaluate and refine will need other "
                "data, or keep some here with `hold_out`",
                *(name, total),
            )
        return self.num_held_out

    def _samples(self, tokenizer: TokenizerRef) -> Iterator[tuple[str, SourceSample]]:
        rows = read_rows(self.spec)
        first = next(rows, None)
        rows = itertools.chain([] if first is None else [first], rows)
        if first is not None and isinstance(first[0], Conversation | BadSample):
            yield from self._of_chats(rows, tokenizer)
        else:
            yield from self._of_texts(rows, tokenizer)

    def _of_chats(
        self, rows: Iterator[Row], tokenizer: TokenizerRef
    ) -> Iterator[tuple[str, RichSample]]:
        from autoquant_ray.distributed.encoding import encode_stream
        from autoquant_ray.distributed.tokenization import look_ahead_of

        domains: deque[str] = deque()

        def chats() -> Iterator[Conversation | BadSample]:
            for chat, domain in rows:
                if isinstance(chat, str):
                    raise self._is_mixed()
                domains.append(domain or self.name)
                yield load_images(chat)

        stream = encode_stream(
            chunk_texts(chats(), _CHUNK_CHATS),
            tokenizer_ref=tokenizer,
            loss_on=self.spec.loss_on,
            look_ahead=look_ahead_of(self.spec.num_samples // _CHUNK_CHATS),
        )
        yield from self._chats.take((domains.popleft(), chat) for chat in stream)
        if self._looks_further():
            self._has_more = next(stream, None) is not None

    def _looks_further(self) -> bool:
        """Whether all samples were given out, and it matters if others follow."""
        return self._hold_out is not None and self.counts.used >= self.spec.num_samples

    def _is_mixed(self) -> DataError:
        return DataError(
            f"data source {self.spec.source} holds texts and chats; give each a source of its own"
        )

    def _of_texts(
        self, rows: Iterator[Row], tokenizer: TokenizerRef
    ) -> Iterator[tuple[str, array[int]]]:
        from autoquant_ray.distributed.tokenization import (
            find_opening_tokens,
            look_ahead_of,
            tokenize_stream,
        )

        opening = find_opening_tokens(tokenizer) if self.spec.pack else ()
        assembler: DomainAssembler[array[int]] = DomainAssembler(self.spec, self.counts, opening)
        num_samples = self.spec.num_samples
        # Large chunks cost less per text; small ones waste less where few samples are wanted.
        chunk_size = max(_MIN_CHUNK_TEXTS, min(num_samples // 64, _MAX_CHUNK_TEXTS))
        domains: deque[str] = deque()

        def texts() -> Iterator[str]:
            for text, domain in rows:
                if not isinstance(text, str):
                    raise self._is_mixed()
                domains.append(domain or self.name)
                yield text

        stream = tokenize_stream(
            chunk_texts(texts(), chunk_size),
            tokenizer_ref=tokenizer,
            pack=self.spec.pack,
            look_ahead=look_ahead_of(num_samples // chunk_size),
        )
        for texts_empty, token_lists in stream:
            of_texts = [domains.popleft() for _ in token_lists]
            num_before = self.counts.read
            yield from assembler.add(token_lists, texts_empty, of_texts)
            if assembler.is_full:
                if self._looks_further():
                    taken = self.counts.read - num_before
                    rest = [(texts_empty[taken:], token_lists[taken:])]
                    self._has_more = any(
                        assembler.has_more(lists, empty)
                        for empty, lists in itertools.chain(rest, stream)
                    )
                return
        yield from assembler.finish()


def data_specs(config: ScanConfig) -> dict[str, DataSpec]:
    """The part of the config that says what to read, for each source by name."""
    sources = sources_of(config.data)
    shares = equal_shares(config.samples, len(sources))
    return {
        name: DataSpec(
            source=source,
            read_as=config.read_as,
            text_field=config.text_field,
            split=config.split,
            num_samples=share,
            seq_len=config.seq_len,
            pack=config.pack,
            shuffle_seed=config.data_seed,
            domain_field=config.domain_field,
            loss_on=config.loss_on,
        )
        for (name, source), share in zip(sources.items(), shares, strict=True)
    }
