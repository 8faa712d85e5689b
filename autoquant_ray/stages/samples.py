"""The stage that turns calibration data into sample shards."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import data_name
from autoquant_ray.data.cutting import DataCounts, require_usable
from autoquant_ray.data.domain_shards import in_turn
from autoquant_ray.data.sample_parts import digest_bytes, rich_part, text_part
from autoquant_ray.data.samples import RichSample, num_predicted, token_ids
from autoquant_ray.errors import ChangedError, DataError
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import DOMAINS_FILE, SAMPLES, part_name
from autoquant_ray.runs.parts import map_ahead
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.sources import Skip, Source, data_specs

logger = logging.getLogger(__name__)


def has_samples(state: RunState, fingerprint: str) -> bool:
    """Whether all sample shards are there."""
    if not state.is_done("shards", fingerprint):
        return False
    has_domains = len(state.values["dataset"].get("domains", {})) > 1
    if has_domains and not state.directory.exists(DOMAINS_FILE):
        return False
    return state.directory.list_parts(SAMPLES) == list(range(state.num_shards))


def read_samples(
    config: ScanConfig, tokenizer: TokenizerRef, scratch: RunDirectory, *, skip: Skip = 0
) -> dict[str, Any]:
    """Read, tokenize and cut the data into ``samples/shard-*.parquet`` of a scratch directory.

    A shard holds samples of one domain. ``domains.parquet`` says which, where there are several.

    Args:
        config: Data, number and length of samples, shard size.
        tokenizer: Of the model.
        scratch: Where the shards are written.
        skip: Leave out as many samples at the start: those that calibration used.

    Returns:
        Facts about the data for ``run.json``.

    Raises:
        DataError: The data cannot be read or holds no usable sample.
    """
    digest = hashlib.sha256()
    num_samples, num_tokens = 0, 0
    rich = Counter[str]()
    told: list[dict[str, Any]] = []
    sources = [
        Source(name, spec, skip, skips_bad=config.skip_bad_samples)
        for name, spec in data_specs(config).items()
    ]
    for domain, shard in in_turn([s.shards(tokenizer, config.shard_samples) for s in sources]):
        lengths_N = np.fromiter(map(len, shard), dtype=np.int32)
        tokens_T = np.concatenate([np.asarray(token_ids(sample)) for sample in shard])
        with_more = [sample for sample in shard if isinstance(sample, RichSample)]
        if with_more:
            table = rich_part(num_samples, with_more)
            rich.update(_rich_facts(with_more))
        else:
            table = text_part(num_samples, lengths_N, tokens_T)
        scratch.write_table(part_name(SAMPLES, len(told)), table)
        digest.update(np.insert(tokens_T, lengths_N.cumsum() - lengths_N, lengths_N).tobytes())
        digest.update(digest_bytes(with_more))
        num_tokens, num_samples = num_tokens + len(tokens_T), num_samples + len(shard)
        sizes = {"num_samples": len(shard), "num_tokens": len(tokens_T)}
        told.append({"shard": len(told), "domain": domain, **sizes})
    counts = _checked_counts(sources, {row["domain"] for row in told}, config)
    facts = {
        "counts": dict(vars(counts)),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "num_shards": len(told),
        "tokens_sha256": digest.hexdigest(),
    }
    facts |= rich
    if reasons := [reason for source in sources for reason in source.reasons]:
        facts["bad_samples"] = reasons
    domains = _domain_facts(told)
    if len(domains) > 1:
        scratch.write_table(DOMAINS_FILE, told)
    return facts | ({"domains": domains} if any(domains) else {})


def _rich_facts(samples: Sequence[RichSample]) -> dict[str, int]:
    return {
        "num_loss_tokens": sum(map(num_predicted, samples)),
        "num_samples_with_images": sum(bool(sample.tensors) for sample in samples),
    }


def _domain_facts(told: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Domain -> samples, tokens and shards, by name."""
    facts: dict[str, dict[str, int]] = {}
    for row in told:
        sizes = {"num_samples": row["num_samples"], "num_tokens": row["num_tokens"]}
        before = facts.get(row["domain"], {})
        facts[row["domain"]] = dict(Counter(before) + Counter(sizes | {"num_shards": 1}))
    return dict(sorted(facts.items()))


def _checked_counts(sources: list[Source], found: set[str], config: ScanConfig) -> DataCounts:
    """The counts of all sources together; checks that there is something to work with."""
    total: Counter[str] = Counter()
    for source in sources:
        require_usable(source.counts, source.spec.source)
        total.update(vars(source.counts))
        if source.name and source.name not in found:
            logger.warning(
                "%s holds no samples after the %d that calibration used; its domain %s is left out",
                source.spec.source,
                source.skipped,
                source.name,
            )
    if not found:
        raise DataError(
            f"{data_name(config.data)} holds no samples after the "
            f"{sum(source.skipped for source in sources)} that calibration used; give other "
            "data with --data, or a larger source"
        )
    return DataCounts(**total)


def keep_samples(
    state: RunState, scratch: RunDirectory, facts: dict[str, Any], fingerprint: str
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
        state.values["dataset"] |= facts


def require_same_chats(state: RunState, fingerprint: str) -> None:
    """Check that a run's chats and images would still become the samples that it holds.

    Args:
        state: The run; one of plain text always passes.
        fingerprint: Of the model's chat template and processor as they are now.

    Raises:
        ChangedError: They were changed.
    """
    if state.values["dataset"].get("chat_fingerprint", fingerprint) != fingerprint:
        raise ChangedError(
            f"the model's chat template or processor changed since {state.directory.uri} was made; "
            "put it back, or scan again"
        )
