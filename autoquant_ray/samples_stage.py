"""The stage that turns calibration data into sample shards."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from autoquant_ray.config import ScanConfig
from autoquant_ray.data import SampleAssembler, chunk_texts, require_usable
from autoquant_ray.distributed.tokenization import look_ahead_of, tokenize_stream
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.errors import DataError
from autoquant_ray.parts import map_ahead
from autoquant_ray.schemas import SCHEMAS
from autoquant_ray.state import RunState
from autoquant_ray.store import SAMPLES, RunDirectory, part_name
from autoquant_ray.texts import DataSpec, read_texts
from autoquant_ray.tokenizer import TokenizerRef

Int32s = npt.NDArray[np.int32]

_MIN_CHUNK_TEXTS, _MAX_CHUNK_TEXTS = 64, 1024


def has_samples(state: RunState, fingerprint: str) -> bool:
    """Whether all sample shards are there."""
    if not state.is_done("shards", fingerprint):
        return False
    return state.directory.list_parts(SAMPLES) == list(range(state.num_shards))


def read_samples(
    config: ScanConfig, tokenizer: TokenizerRef, scratch: RunDirectory, *, skip: int = 0
) -> dict[str, Any]:
    """Read, tokenize and cut the data into ``samples/shard-*.parquet`` of a scratch directory.

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
    spec = _data_spec(config)
    spec = replace(spec, num_samples=spec.num_samples + skip)
    digest = hashlib.sha256()
    assembler: SampleAssembler[array[int]] = SampleAssembler(spec)
    num_shards, num_samples, num_tokens = 0, 0, 0
    samples = itertools.islice(_samples(assembler, spec, tokenizer), skip, None)
    for shard in _batched(samples, config.shard_samples):
        lengths_N = np.fromiter(map(len, shard), dtype=np.int32)
        tokens_T = np.frombuffer(b"".join(shard), dtype=np.int32)
        table = _sample_part(num_samples, lengths_N, tokens_T)
        scratch.write_table(part_name(SAMPLES, num_shards), "samples", table)
        digest.update(np.insert(tokens_T, lengths_N.cumsum() - lengths_N, lengths_N).tobytes())
        num_tokens += len(tokens_T)
        num_shards, num_samples = num_shards + 1, num_samples + len(shard)
    require_usable(assembler.counts, config.data)
    if not num_samples:
        raise DataError(
            f"{config.data} holds no samples after the {skip} that calibration used; give other "
            "data with --data, or a larger source"
        )
    return {
        "counts": dict(vars(assembler.counts)),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "num_shards": num_shards,
        "tokens_sha256": digest.hexdigest(),
    }


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


def _data_spec(config: ScanConfig) -> DataSpec:
    """The part of the config that says what to read."""
    return DataSpec(
        source=config.data,
        text_field=config.text_field,
        split=config.split,
        num_samples=config.samples,
        seq_len=config.seq_len,
        pack=config.pack,
        shuffle_seed=config.data_seed,
    )


def _sample_part(first_sample: int, lengths_N: Int32s, tokens_T: Int32s) -> pa.Table:
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), lengths_N.cumsum(dtype=np.int32)])
    columns = {
        "sample": np.arange(first_sample, first_sample + len(lengths_N)),
        "tokens": pa.ListArray.from_arrays(offsets, tokens_T),
    }
    return pa.table(columns, schema=SCHEMAS["samples"])


def _samples(
    assembler: SampleAssembler[array[int]], spec: DataSpec, tokenizer: TokenizerRef
) -> Iterator[array[int]]:
    # Large chunks cost less per text; small ones waste less where few samples are wanted.
    chunk_size = max(_MIN_CHUNK_TEXTS, min(spec.num_samples // 64, _MAX_CHUNK_TEXTS))
    stream = tokenize_stream(
        chunk_texts(read_texts(spec), chunk_size),
        tokenizer_ref=tokenizer,
        pack=spec.pack,
        look_ahead=look_ahead_of(spec.num_samples // chunk_size),
    )
    for texts_empty, token_lists in stream:
        yield from assembler.add(token_lists, texts_empty)
        if assembler.is_full:
            return
    yield from assembler.finish()


def _batched(samples: Iterator[array[int]], size: int) -> Iterator[list[array[int]]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch
