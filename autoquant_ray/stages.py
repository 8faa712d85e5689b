"""The stages of a scan. Each reads files, writes files, and is skipped when it is up to date.

Nothing here decides how work is spread; the pool does. Nothing here computes a score; the engine
does. A stage's parts (one file per shard) are never recomputed while they are intact.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from autoquant_ray.aggregation import is_complete_part, score_part_rows, sensitivity_rows
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.calibration import Statistics, merge_statistics, to_maxima
from autoquant_ray.config import ScanConfig
from autoquant_ray.data import SampleAssembler, chunk_texts, require_usable
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.tokenization import tokenize_stream
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.errors import StoreError, WorkerError
from autoquant_ray.models import ModelRef
from autoquant_ray.plan import Plan
from autoquant_ray.sensitivity import Maxima
from autoquant_ray.state import RunState
from autoquant_ray.store import CALIBRATION, SAMPLES, SCORES, RunDirectory, part_name
from autoquant_ray.texts import DataSpec, read_texts
from autoquant_ray.tokenizer import TokenizerRef

logger = logging.getLogger(__name__)

_CHUNK_TEXTS = 64
_LOOK_AHEAD = 4


def write_plan(state: RunState, plan: Plan, fingerprint: str) -> None:
    """``plan.parquet``, and the summary that later commands need instead of the model."""
    if state.is_done("plan", fingerprint):
        return
    with state.stage("plan", fingerprint):
        state.values["plan"] = plan.summary()
        state.directory.write_table("plan.parquet", "plan", plan.rows())


def read_samples(config: ScanConfig, ref: ModelRef, scratch: RunDirectory) -> dict[str, Any]:
    """Read, tokenize and cut the data into ``samples/shard-*.parquet`` of a scratch directory.

    Returns:
        Facts about the data for ``run.json``.

    Raises:
        DataError: The data cannot be read or holds no usable sample.
    """
    spec = _data_spec(config)
    digest = hashlib.sha256()
    assembler = SampleAssembler(spec)
    num_shards, num_samples, num_tokens = 0, 0, 0
    for shard in _batched(_samples(assembler, spec, ref), config.shard_samples):
        rows = [{"sample": num_samples + i, "tokens": tokens} for i, tokens in enumerate(shard)]
        scratch.write_table(part_name(SAMPLES, num_shards), "samples", rows)
        for tokens in shard:
            digest.update(np.asarray([len(tokens), *tokens], dtype=np.int32).tobytes())
            num_tokens += len(tokens)
        num_shards, num_samples = num_shards + 1, num_samples + len(shard)
    require_usable(assembler.counts, config.data)
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
        for shard in scratch.list_parts(SAMPLES):
            name = part_name(SAMPLES, shard)
            state.directory.write_bytes(name, scratch.read_bytes(name))
        state.values["dataset"] |= facts


def _data_spec(config: ScanConfig) -> DataSpec:
    """The part of the config that says what to read."""
    return DataSpec(
        source=config.data,
        text_field=config.text_field,
        split=config.split,
        num_samples=config.samples,
        seq_len=config.seq_len,
        pack=config.pack,
    )


def _samples(assembler: SampleAssembler, spec: DataSpec, ref: ModelRef) -> Iterator[list[int]]:
    tokenizer = TokenizerRef(
        model=ref.path, gguf_file=ref.gguf_file, trust_remote_code=ref.trust_remote_code
    )
    chunks = chunk_texts(read_texts(spec), _CHUNK_TEXTS)
    stream = tokenize_stream(
        chunks, tokenizer_ref=tokenizer, pack=spec.pack, look_ahead=_LOOK_AHEAD
    )
    for texts_empty, token_lists in stream:
        yield from assembler.add(token_lists, texts_empty)
        if assembler.is_full:
            return
    yield from assembler.finish()


def _batched(samples: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def calibrate(state: RunState, pool: WorkerPool, plan: Plan, fingerprint: str) -> Maxima:
    """Activation maxima over all shards -> ``calibration.parquet``.

    Skipped when no format quantizes inputs.
    """
    directory = state.directory
    if all(format_.input is None for format_ in plan.formats):
        return {}
    if not state.is_done("calibrate", fingerprint):
        with state.stage("calibrate", fingerprint):

            def write(outcome: Outcome) -> str:
                rows = _statistics_rows(outcome.result)
                return directory.write_table(
                    part_name(CALIBRATION, outcome.task.shard), "calibration", rows
                )

            done = _intact_parts(state, CALIBRATION, lambda _shard, table: table.num_rows > 0)
            tasks = _tasks(state, done)
            outcomes = pool.run(tasks, lambda worker, task: worker.calibrate.remote(task))
            _collect(state, "calibrate", outcomes, len(done), write)
            shards = _intact_parts(state, CALIBRATION, lambda _shard, table: table.num_rows > 0)
            parts = [_read_statistics(state, part_name(CALIBRATION, shard)) for shard in shards]
            merged = _statistics_rows(merge_statistics(parts))
            directory.write_table("calibration.parquet", "calibration", merged)
    return to_maxima(_read_statistics(state, "calibration.parquet"))


def score(state: RunState, pool: WorkerPool, plan: Plan, maxima: Maxima, fingerprint: str) -> None:
    """Sensitivity sums of every shard -> ``scores/shard-*.parquet``."""
    if state.is_done("score", fingerprint):
        return
    import ray

    groups = [group.name for group in plan.searched]
    formats = [format_.name for format_ in plan.formats]
    keys = [(group, format_) for group in groups for format_ in formats]

    def write(outcome: Outcome) -> str:
        shard = outcome.task.shard
        rows = score_part_rows(shard, groups, formats, outcome.result)
        return state.directory.write_table(part_name(SCORES, shard), "scores", rows)

    with state.stage("score", fingerprint):
        shared_maxima = ray.put(maxima)
        done = _intact_parts(state, SCORES, lambda shard, t: is_complete_part(t, shard, keys))
        outcomes = pool.run(
            _tasks(state, done), lambda worker, task: worker.score.remote(task, shared_maxima)
        )
        _collect(state, "score", outcomes, len(done), write)


def aggregate(state: RunState, config: ScanConfig, fingerprint: str) -> None:
    """``sensitivity.parquet`` from the shards' parts."""
    if state.is_done("aggregate", fingerprint):
        return
    directory = state.directory
    with state.stage("aggregate", fingerprint):
        plan_rows = directory.read_table("plan.parquet", "plan").to_pylist()
        left_out = _quarantined(state)
        shards = [s for s in directory.list_parts(SCORES) if s not in left_out]
        parts = (directory.read_table(part_name(SCORES, shard), "scores") for shard in shards)
        rows = sensitivity_rows(parts, plan_rows, config.estimator)
        directory.write_table("sensitivity.parquet", "sensitivity", rows)


def solve_options(config: ScanConfig) -> SolveOptions:
    """The budget of a scan."""
    return SolveOptions(
        bits=config.bits,
        bytes=config.bytes,
        bits_over=config.bits_over,
        cost=config.cost,
        max_formats=config.max_formats,
    )


def check_budget(plan: Plan, config: ScanConfig) -> None:
    """Refuse a budget that cannot be met, before any work.

    Raises:
        InfeasibleBudgetError: With the reachable range.
    """
    Problem(plan.rows(), plan.summary()).check_feasible(solve_options(config))


def _collect(
    state: RunState,
    stage: str,
    outcomes: Iterator[Outcome],
    num_done: int,
    write: Callable[[Outcome], str],
) -> None:
    """Write each shard's part as it arrives; note the quarantined ones."""
    total = int(state.values["dataset"]["num_shards"]) - len(_quarantined(state))
    with progress(stage, total, num_done) as advance:
        for outcome in outcomes:
            shard = outcome.task.shard
            if outcome.reason is not None:
                logger.warning("shard %d is quarantined: %s", shard, outcome.reason)
                state.quarantine(shard, stage, outcome.reason)
            else:
                write(outcome)
                state.directory.append_event("shard_done", stage=stage, shard=shard)
            advance()
    if len(_quarantined(state)) == int(state.values["dataset"]["num_shards"]):
        reason = state.values["quarantined"][0]["reason"]
        raise WorkerError(f"every shard failed, the first with: {reason}")


def _tasks(state: RunState, done: Sequence[int]) -> Iterator[ShardTask]:
    """Shards still to do, read from disk one at a time when a worker is free."""
    skip = set(done) | _quarantined(state)
    for shard in range(int(state.values["dataset"]["num_shards"])):
        if shard in skip:
            continue
        table = state.directory.read_table(part_name(SAMPLES, shard), "samples")
        samples = [np.asarray(t, dtype=np.int32) for t in table.column("tokens").to_pylist()]
        yield ShardTask(
            shard=shard, first_sample=table.column("sample")[0].as_py(), samples=samples
        )


def _intact_parts(
    state: RunState, folder: str, is_complete: Callable[[int, Any], bool]
) -> list[int]:
    """Shards whose part is there and whole; a damaged part is deleted with a warning."""
    intact = []
    for shard in state.directory.list_parts(folder):
        name = part_name(folder, shard)
        try:
            whole = is_complete(shard, state.directory.read_table(name, folder))
        except StoreError:
            whole = False
        if whole:
            intact.append(shard)
        else:
            logger.warning("%s is damaged; shard %d is done again", name, shard)
            state.directory.append_event("part_damaged", part=name)
            state.directory.delete(name)
    return intact


def _quarantined(state: RunState) -> set[int]:
    return {entry["shard"] for entry in state.values["quarantined"]}


def _statistics_rows(statistics: Statistics) -> list[dict[str, Any]]:
    return [
        {"module": module, "statistic": statistic, "value": value}
        for (module, statistic), value in statistics.items()
    ]


def _read_statistics(state: RunState, name: str) -> Statistics:
    rows = state.directory.read_table(name, "calibration").to_pylist()
    return {(row["module"], row["statistic"]): row["value"] for row in rows}
