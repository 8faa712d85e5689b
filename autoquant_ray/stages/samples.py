"""The stage that turns calibration data into sample shards."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoquant_ray.config.hold_out import HoldOut
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import data_name
from autoquant_ray.data.cutting import DataCounts, require_usable
from autoquant_ray.data.domain_shards import in_turn
from autoquant_ray.data.sample_parts import digest_bytes, rich_part, text_part
from autoquant_ray.data.samples import (
    RichSample,
    Sample,
    num_predicted,
    require_within,
    token_ids,
)
from autoquant_ray.errors import ChangedError, DataError
from autoquant_ray.models.context import SampleLimits
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import DOMAINS_FILE, SAMPLES, part_name
from autoquant_ray.runs.parts import map_ahead
from autoquant_ray.runs.record import DatasetFacts
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.sources import Skip, Source, data_specs

logger = logging.getLogger(__name__)


def has_samples(state: RunState, fingerprint: str) -> bool:
    """Whether all sample shards are there and whole."""
    if not state.is_done("shards", fingerprint):
        return False
    has_domains = len(state.record.dataset.get("domains", {})) > 1
    if has_domains and not state.directory.is_intact(DOMAINS_FILE):
        return False
    return are_whole(state.directory, SAMPLES, state.record.dataset["num_shards"])


def are_whole(directory: RunDirectory, folder: str, num_shards: int) -> bool:
    """Whether a folder holds the samples of all shards, no file of which is cut.

    Args:
        directory: The run.
        folder: Of samples.
        num_shards: How many there must be.
    """
    shards = directory.list_parts(folder)
    names = (part_name(folder, shard) for shard in shards)
    return shards == list(range(num_shards)) and all(map_ahead(directory.is_intact, names))


def hold_out_of(state: RunState, config: ScanConfig, fingerprint: str) -> HoldOut:
    """How much of the data to keep; samples that are lost come back as they were."""
    entry = state.record.stages.get("shards")
    was_made = entry is not None and entry.get("fingerprint") == fingerprint
    had_all = was_made and "num_held_out" not in state.record.dataset
    return 0 if had_all and "num_samples" in state.record.dataset else config.hold_out


def read_samples(
    config: ScanConfig,
    tokenizer: TokenizerRef,
    scratch: RunDirectory,
    *,
    skip: Skip = 0,
    limits: SampleLimits | None = None,
    hold_out: HoldOut | None = None,
) -> DatasetFacts:
    """Read, tokenize and cut the data into ``samples/shard-*.parquet`` of a scratch directory.

    A shard holds samples of one domain. ``domains.parquet`` says which, where there are several.

    Args:
        config: Data, number and length of samples, shard size.
        tokenizer: Of the model.
        scratch: Where the shards are written.
        skip: Leave out as many samples at the start: those that calibration used.
        limits: What the model has room for; None where that is unknown.
        hold_out: How much to keep of a source that would be used up; None uses it up.

    Returns:
        Facts about the data for ``run.json``.

    Raises:
        DataError: The data cannot be read, holds no usable sample, or one that the model has no
            room for.
    """
    sources = [
        Source(name, spec, skip, skips_bad=config.skip_bad_samples, hold_out=hold_out)
        for name, spec in data_specs(config).items()
    ]
    written = _WrittenShards(scratch)
    for domain, samples in in_turn([s.shards(tokenizer, config.shard_samples) for s in sources]):
        if limits is not None:
            require_within(samples, limits, data_name(config.data))
        written.add(domain, samples)
    domains = written.domains()
    counts = _checked_counts(sources, set(domains), config)
    facts = written.facts(counts)
    if num_held_out := sum(source.num_held_out for source in sources):
        facts["num_held_out"] = num_held_out
    if reasons := [reason for source in sources for reason in source.reasons]:
        facts["bad_samples"] = reasons
    if len(domains) > 1:
        scratch.write_table(DOMAINS_FILE, written.rows)
    if any(domains):
        facts["domains"] = domains
    return facts


class _WrittenShards:
    """Shards of samples as they are written, and what is counted of them.

    Args:
        scratch: Where the shards are written.

    Attributes:
        rows: Of ``domains.parquet``: one per shard.
    """

    def __init__(self, scratch: RunDirectory) -> None:
        self.rows: list[dict[str, Any]] = []
        self._scratch = scratch
        self._digest = hashlib.sha256()
        self._totals = Counter[str]()
        self._rich_totals = Counter[str]()

    def add(self, domain: str, samples: Sequence[Sample]) -> None:
        """Write the next shard: samples of one domain."""
        lengths_N = np.fromiter(map(len, samples), dtype=np.int32)
        tokens_T = np.concatenate([np.asarray(token_ids(sample)) for sample in samples])
        first_sample, shard = self._totals["num_samples"], len(self.rows)
        rich_samples = [sample for sample in samples if isinstance(sample, RichSample)]
        if rich_samples:
            table = rich_part(first_sample, rich_samples)
            self._rich_totals.update(_rich_facts(rich_samples))
        else:
            table = text_part(first_sample, lengths_N, tokens_T)
        self._scratch.write_table(part_name(SAMPLES, shard), table)
        lengths_and_tokens = np.insert(tokens_T, lengths_N.cumsum() - lengths_N, lengths_N)
        self._digest.update(lengths_and_tokens.tobytes())
        self._digest.update(digest_bytes(rich_samples))
        sizes = {"num_samples": len(samples), "num_tokens": len(tokens_T)}
        self._totals.update(sizes)
        self.rows.append({"shard": shard, "domain": domain, **sizes})

    def facts(self, counts: DataCounts) -> DatasetFacts:
        """What ``run.json`` says of the samples, whatever their domains."""
        facts: DatasetFacts = {
            "counts": dict(vars(counts)),
            "num_samples": self._totals["num_samples"],
            "num_tokens": self._totals["num_tokens"],
            "num_shards": len(self.rows),
            "tokens_sha256": self._digest.hexdigest(),
        }
        if self._rich_totals:
            facts["num_loss_tokens"] = self._rich_totals["num_loss_tokens"]
            facts["num_samples_with_images"] = self._rich_totals["num_samples_with_images"]
        return facts

    def domains(self) -> dict[str, dict[str, int]]:
        """Domain -> samples, tokens and shards, by name; '' where the data has none."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            sizes = {"num_samples": row["num_samples"], "num_tokens": row["num_tokens"]}
            before = totals.get(row["domain"], {})
            totals[row["domain"]] = dict(Counter(before) + Counter(sizes | {"num_shards": 1}))
        return dict(sorted(totals.items()))


def _rich_facts(samples: Sequence[RichSample]) -> dict[str, int]:
    return {
        "num_loss_tokens": sum(map(num_predicted, samples)),
        "num_samples_with_images": sum(bool(sample.tensors) for sample in samples),
    }


def _checked_counts(sources: list[Source], domains: set[str], config: ScanConfig) -> DataCounts:
    """The counts of all sources together; checks that there is something to work with.

    Args:
        sources: All that were read.
        domains: Of the samples that were found.
        config: Names the data in the error.
    """
    total: Counter[str] = Counter()
    for source in sources:
        require_usable(source.counts, source.spec.source, source.reasons)
        total.update(vars(source.counts))
        if source.name and source.name not in domains:
            logger.warning(
                "%s holds no samples after the %d that calibration used; its domain %s is left out",
                source.spec.source,
                source.skipped,
                source.name,
            )
    if not domains:
        raise DataError(
            f"{data_name(config.data)} holds no samples after the "
            f"{sum(source.skipped for source in sources)} that calibration used; give other "
            "data with `data`, or a larger source"
        )
    return DataCounts(**total)


def keep_samples(
    state: RunState, scratch: RunDirectory, facts: DatasetFacts, fingerprint: str
) -> None:
    """Move finished sample shards from the scratch directory into the run."""
    with state.stage("shards", fingerprint):

        def keep(shard: int) -> str:
            name = part_name(SAMPLES, shard)
            return state.directory.write_bytes(name, scratch.read_bytes(name))

        for _ in map_ahead(keep, scratch.list_parts(SAMPLES)):
            pass
        if scratch.exists(DOMAINS_FILE):
            state.directory.write_bytes(DOMAINS_FILE, scratch.read_bytes(DOMAINS_FILE))
        state.record.dataset |= facts


def require_same_chats(state: RunState, fingerprint: str) -> None:
    """Check that a run's chats and images would still become the samples that it holds.

    Args:
        state: The run; one of plain text always passes.
        fingerprint: Of the model's chat template and processor as they are now.

    Raises:
        ChangedError: They were changed.
    """
    if state.record.dataset.get("chat_fingerprint", fingerprint) != fingerprint:
        raise ChangedError(
            f"the model's chat template or processor changed since {state.directory.uri} was made; "
            "put it back, or scan again"
        )
