"""The stages before scores: statistics of inputs over all shards, and AWQ's search with them.

Both write one part per shard and merge the parts in the order of the shards. Statistics of single
channels are large (12 bytes per input channel of every linear whose formats need them, at most)
and lie in files of their own, written before the shard's scalars: where these are, all are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from autoquant_ray.awq import Losses, loss_rows, losses_of, merge_losses
from autoquant_ray.calibration import Statistics, merge_statistics, to_maxima
from autoquant_ray.channel_statistics import CHANNELS, Channels
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.errors import StoreError
from autoquant_ray.formats import Format
from autoquant_ray.parts import Parts
from autoquant_ray.plan import Plan
from autoquant_ray.run_files import (
    CALIBRATION,
    CALIBRATION_FILE,
    CHANNELS_FILE,
    SEARCH,
    SEARCH_FILE,
    part_name,
)
from autoquant_ray.sensitivity import Maxima
from autoquant_ray.smoothed_formats import is_smoothed, needs_calibration, needs_search
from autoquant_ray.smoothing import with_alphas
from autoquant_ray.stages import Work, collect, intact_parts, tasks_of
from autoquant_ray.state import RunState
from autoquant_ray.store import RunDirectory


def calibrate(state: RunState, pool: WorkerPool, plan: Plan, fingerprint: str) -> Maxima:
    """Statistics of inputs -> ``calibration.parquet``, and ``channels.parquet`` where needed.

    Skipped when no format needs any.
    """
    directory = state.directory
    if not needs_calibration(plan.formats):
        return {}
    has_channels = any(map(is_smoothed, plan.formats))
    there = not has_channels or directory.exists(CHANNELS_FILE)
    if not (there and state.is_done("calibrate", fingerprint)):
        with state.stage("calibrate", fingerprint):

            def is_complete(shard: int, table: Any) -> bool:
                if has_channels:
                    directory.read_table(part_name(CHANNELS, shard), CHANNELS)
                return bool(table.num_rows > 0)

            done = intact_parts(state, CALIBRATION, is_complete)
            work = Work(
                stage="calibrate",
                tasks=tasks_of(state, done),
                submit=lambda worker, task: worker.calibrate.remote(task),
                num_done=len(done),
                write=partial(_write_statistics, directory, has_channels),
            )
            collect(state, pool, work)
            shards = intact_parts(state, CALIBRATION, lambda _shard, table: table.num_rows > 0)
            # Read in the order of the shards, a few at a time: sums do not depend on arrival.
            if has_channels:
                channels = merge_statistics(map(_channels, Parts(directory, CHANNELS, shards)))
                directory.write_table(CHANNELS_FILE, CHANNELS, _channel_rows(channels))
            merged = merge_statistics(map(_scalars, Parts(directory, CALIBRATION, shards)))
            directory.write_table(CALIBRATION_FILE, CALIBRATION, _scalar_rows(merged))
    return read_maxima(directory)


def search_scales(
    state: RunState, pool: WorkerPool, plan: Plan, maxima: Maxima, fingerprint: str
) -> Maxima:
    """Losses of AWQ's candidates -> ``search.parquet``; the calibration with the best of them.

    Skipped when no format needs it.
    """
    directory = state.directory
    if not any(map(needs_search, plan.formats)):
        return maxima
    if not state.is_done("search", fingerprint):
        with state.stage("search", fingerprint):
            shared = pool.share(maxima)
            done = intact_parts(state, SEARCH, lambda _shard, _table: True)
            work = Work(
                stage="search",
                tasks=tasks_of(state, done),
                submit=lambda worker, task: worker.search.remote(task, shared),
                num_done=len(done),
                write=lambda outcome: _write_losses(
                    directory, part_name(SEARCH, outcome.task.shard), outcome.result
                ),
            )
            collect(state, pool, work)
            shards = intact_parts(state, SEARCH, lambda _shard, _table: True)
            losses = merge_losses(map(losses_of, Parts(directory, SEARCH, shards)))
            _write_losses(directory, SEARCH_FILE, losses)
    return read_maxima(directory)


def is_calibrated(state: RunState, plan: Plan) -> bool:
    """Whether every merged file that the formats of a run need is there."""
    return not _missing(state.directory, plan.formats)


def maxima_of(state: RunState) -> Maxima:
    """Merged calibration of a scanned run: everything that its formats need.

    Raises:
        StoreError: A file is missing, or damaged.
    """
    directory = state.directory
    formats = [Format.from_json(entry) for entry in state.values["plan"]["formats"]]
    for name in _missing(directory, formats):
        raise StoreError(
            f"{directory.path(name)} does not exist, and formats of the run need it; scan with "
            "--resume, which makes it again"
        )
    return read_maxima(directory) if needs_calibration(formats) else {}


def _missing(directory: RunDirectory, formats: Sequence[Format]) -> list[str]:
    needed = {
        CALIBRATION_FILE: needs_calibration(formats),
        CHANNELS_FILE: any(map(is_smoothed, formats)),
        SEARCH_FILE: any(map(needs_search, formats)),
    }
    return [name for name, is_needed in needed.items() if is_needed and not directory.exists(name)]


def read_maxima(directory: RunDirectory) -> Maxima:
    """Merged calibration of a run: maxima, channels, and the best of AWQ's candidates.

    Raises:
        StoreError: ``calibration.parquet`` is missing, or a file is damaged.
    """
    merged = _scalars(directory.read_table(CALIBRATION_FILE, CALIBRATION))
    if directory.exists(CHANNELS_FILE):
        merged |= _channels(directory.read_table(CHANNELS_FILE, CHANNELS))
    maxima = to_maxima(merged)
    if directory.exists(SEARCH_FILE):
        maxima = with_alphas(maxima, losses_of(directory.read_table(SEARCH_FILE, SEARCH)))
    return maxima


def _write_statistics(directory: RunDirectory, has_channels: bool, outcome: Outcome) -> str:
    shard, found = outcome.task.shard, outcome.result
    if has_channels:
        name = part_name(CHANNELS, shard)
        directory.write_table(name, CHANNELS, _channel_rows(found))
    return directory.write_table(part_name(CALIBRATION, shard), CALIBRATION, _scalar_rows(found))


def _write_losses(directory: RunDirectory, name: str, losses: Losses) -> str:
    return directory.write_table(name, SEARCH, loss_rows(losses))


def _scalar_rows(statistics: Statistics) -> list[dict[str, Any]]:
    return [
        {"module": module, "statistic": statistic, "value": value}
        for (module, statistic), value in statistics.items()
        if statistic != CHANNELS
    ]


def _channel_rows(statistics: Statistics) -> list[dict[str, Any]]:
    return [
        value.row(module)
        for (module, statistic), value in sorted(statistics.items())
        if statistic == CHANNELS
    ]


def _scalars(table: Any) -> Statistics:
    modules, names, values = (table.column(name).to_pylist() for name in table.column_names)
    return dict(zip(zip(modules, names, strict=True), values, strict=True))


def _channels(table: Any) -> Statistics:
    columns = (table.column(name) for name in ("module", "largest", "sum", "num_tokens"))
    return {
        (module.as_py(), CHANNELS): Channels.of_row(largest, sum_, num_tokens.as_py())
        for module, largest, sum_, num_tokens in zip(*columns, strict=True)
    }
