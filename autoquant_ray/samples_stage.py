"""The stage that turns calibration data into sample shards."""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from autoquant_ray.config import ScanConfig
from autoquant_ray.data import DataCounts, chunk_texts, require_usable
from autoquant_ray.data_sources import data_name, equal_shares, sources_of
from autoquant_ray.distributed.tokenization import look_ahead_of, tokenize_stream
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.domain_shards import DomainAssembler, in_turn, shards_by_domain
from autoquant_ray.errors import DataError
from autoquant_ray.parts import map_ahead
from autoquant_ray.run_files import DOMAINS_FILE, SAMPLES, part_name
from autoquant_ray.schemas import SCHEMAS
from autoquant_ray.state import RunState
from autoquant_ray.store import RunDirectory
from autoquant_ray.texts import DataSpec, read_rows
from autoquant_ray.tokenizer import TokenizerRef

logger = logging.getLogger(__name__)

Skip = int | Mapping[str, int]
"""Samples left out at the start of the data, or of each of several sources, by name."""

Int32s = npt.NDArray[np.int32]

_MIN_CHUNK_TEXTS, _MAX_CHUNK_TEXTS = 64, 1024


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
    told: list[dict[str, Any]] = []
    sources = [_Source(name, spec, skip) for name, spec in _data_specs(config).items()]
    for domain, shard in in_turn([s.shards(tokenizer, config.shard_samples) for s in sources]):
        lengths_N = np.fromiter(map(len, shard), dtype=np.int32)
        tokens_T = np.frombuffer(b"".join(shard), dtype=np.int32)
        table = _sample_part(num_samples, lengths_N, tokens_T)
        scratch.write_table(part_name(SAMPLES, len(told)), "samples", table)
        digest.update(np.insert(tokens_T, lengths_N.cumsum() - lengths_N, lengths_N).tobytes())
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
    domains = _domain_facts(told)
    if len(domains) > 1:
        scratch.write_table(DOMAINS_FILE, "domains", told)
    return facts | ({"domains": domains} if any(domains) else {})


def _domain_facts(told: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Domain -> samples, tokens and shards, by name."""
    facts: dict[str, dict[str, int]] = {}
    for row in told:
        sizes = {"num_samples": row["num_samples"], "num_tokens": row["num_tokens"]}
        before = facts.get(row["domain"], {})
        facts[row["domain"]] = dict(Counter(before) + Counter(sizes | {"num_shards": 1}))
    return dict(sorted(facts.items()))


class _Source:
    """One source of the data, read as far as its samples are wanted.

    Args:
        name: Domain of all its texts; '' where they are of none, or say it themselves.
        spec: What to read; samples that are left out come on top.
        skip: Samples left out at the start.
    """

    def __init__(self, name: str, spec: DataSpec, skip: Skip) -> None:
        self.skipped = skip if isinstance(skip, int) else skip.get(name, 0)
        self.name = name
        self.spec = replace(spec, num_samples=spec.num_samples + self.skipped)
        self._assembler: DomainAssembler[array[int]] = DomainAssembler(self.spec)

    @property
    def counts(self) -> DataCounts:
        """What happened to the texts read so far."""
        return self._assembler.counts

    def shards(self, tokenizer: TokenizerRef, size: int) -> Iterator[tuple[str, list[array[int]]]]:
        """Shards with their domains, without the samples that are left out."""
        samples = itertools.islice(self._samples(tokenizer), self.skipped, None)
        return shards_by_domain(samples, size)

    def _samples(self, tokenizer: TokenizerRef) -> Iterator[tuple[str, array[int]]]:
        num_samples = self.spec.num_samples
        # Large chunks cost less per text; small ones waste less where few samples are wanted.
        chunk_size = max(_MIN_CHUNK_TEXTS, min(num_samples // 64, _MAX_CHUNK_TEXTS))
        domains: deque[str] = deque()

        def texts() -> Iterator[str]:
            for text, domain in read_rows(self.spec):
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
            yield from self._assembler.add(token_lists, texts_empty, of_texts)
            if self._assembler.is_full:
                return
        yield from self._assembler.finish()


def _checked_counts(sources: list[_Source], found: set[str], config: ScanConfig) -> DataCounts:
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


def read_tasks(directory: RunDirectory, folder: str, shards: Iterable[int]) -> Iterator[ShardTask]:
    """Shards as workers take them, read one at a time when the next one is wanted.

    Args:
        directory: The run.
        folder: Folder of the sample parts.
        shards: Their numbers.
    """
    for shard in shards:
        table = directory.read_table(part_name(folder, shard), "samples")
        yield ShardTask(
            shard=shard,
            first_sample=table.column("sample")[0].as_py(),
            samples=[row.values.to_numpy() for row in table.column("tokens")],
        )


def _data_specs(config: ScanConfig) -> dict[str, DataSpec]:
    """The part of the config that says what to read, for each source by name."""
    sources = sources_of(config.data)
    shares = equal_shares(config.samples, len(sources))
    return {
        name: DataSpec(
            source=source,
            text_field=config.text_field,
            split=config.split,
            num_samples=share,
            seq_len=config.seq_len,
            pack=config.pack,
            shuffle_seed=config.data_seed,
            domain_field=config.domain_field,
        )
        for (name, source), share in zip(sources.items(), shares, strict=True)
    }


def _sample_part(first_sample: int, lengths_N: Int32s, tokens_T: Int32s) -> pa.Table:
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), lengths_N.cumsum(dtype=np.int32)])
    columns = {
        "sample": np.arange(first_sample, first_sample + len(lengths_N)),
        "tokens": pa.ListArray.from_arrays(offsets, tokens_T),
    }
    return pa.table(columns, schema=SCHEMAS["samples"])
