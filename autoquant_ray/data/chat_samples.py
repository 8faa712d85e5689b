"""Encoded conversations -> samples of a run: cut to length, counted, bad ones refused or skipped.

What :mod:`autoquant_ray.data.cutting` and :mod:`autoquant_ray.data.domain_shards` do for plain
text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from autoquant_ray.data.chat_encoding import Encoded
from autoquant_ray.data.conversations import BadSample
from autoquant_ray.data.cutting import MIN_SAMPLE_TOKENS, DataCounts
from autoquant_ray.data.domain_shards import require_room
from autoquant_ray.data.samples import RichSample, num_predicted
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError

logger = logging.getLogger(__name__)

_MAX_REASONS = 20


class ConversationSamples:
    """Makes samples of encoded conversations, until there are ``num_samples``.

    Args:
        spec: The rules; ``num_samples`` counts all domains together.
        counts: Where to count.
        skips_bad: Skip what cannot be used, instead of stopping there.

    Attributes:
        reasons: Why the first 20 of the skipped ones cannot be used.
    """

    def __init__(self, spec: DataSpec, counts: DataCounts, *, skips_bad: bool) -> None:
        self.reasons: list[str] = []
        self._spec = spec
        self._counts = counts
        self._skips_bad = skips_bad
        self._notes: set[str] = set()
        self._domains: set[str] = set()

    def take(
        self, encoded: Iterable[tuple[str, Encoded | BadSample]]
    ) -> Iterator[tuple[str, RichSample]]:
        """The samples with their domains.

        Args:
            encoded: Domain and conversation; read no further than needed.

        Raises:
            DataError: A bad one that is not to be skipped, or more domains than a run may have.
        """
        for domain, result in encoded:
            self._counts.read += 1
            if domain not in self._domains:
                require_room(len(self._domains), domain, self._spec)
                self._domains.add(domain)
            sample = self._usable(result)
            if sample is not None:
                self._counts.used += 1
                yield domain, sample
            if self._counts.used >= self._spec.num_samples:
                return

    def _usable(self, encoded: Encoded | BadSample) -> RichSample | None:
        if isinstance(encoded, BadSample):
            self._skip(encoded.reason)
            return None
        self._tell(encoded)
        seq_len, sample = self._spec.seq_len, encoded.sample
        if encoded.num_fixed > seq_len:
            self._skip(
                f"{encoded.where}: its images end at token {encoded.num_fixed} of {len(sample)}, "
                f"after `seq_len` {seq_len}; raise it, or give smaller images"
            )
            return None
        if len(sample) < MIN_SAMPLE_TOKENS:
            self._counts.too_short += 1
            return None
        cut = sample.cut(seq_len)
        if not num_predicted(cut):
            self._counts.no_answer += 1
            return None
        self._counts.cut += len(sample) > seq_len
        return cut

    def _tell(self, encoded: Encoded) -> None:
        """Tell each note on the template once."""
        for note in encoded.notes:
            if note not in self._notes:
                self._notes.add(note)
                logger.warning("%s: the model's chat template %s", encoded.where, note)

    def _skip(self, reason: str) -> None:
        if not self._skips_bad:
            raise refused_sample(reason)
        self._counts.bad += 1
        if len(self.reasons) < _MAX_REASONS:
            self.reasons.append(reason)
            logger.warning("skipped: %s", reason)


def refused_sample(reason: str) -> DataError:
    """The error for a chat that cannot be used, and is not to be skipped."""
    return DataError(f"{reason}; skip such samples with `skip_bad_samples`")
