"""The stages before scores: statistics of inputs over all shards, and AWQ's search with them.

Both write one part per shard and merge the parts in the order of the shards. Statistics of single
channels are large (12 bytes per input channel of every linear whose formats need them, at most)
and lie in separate files, written before the shard's scalars: a shard with scalars is complete.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from autoquant_ray.calibrate.files import (
    channel_rows,
    channels_of_table,
    maxima_of_table,
    maxima_rows,
    missing_files,
    read_calibration,
)
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.formats.smoothed import needs_calibration, needs_channels, needs_search
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.awq import Losses, loss_rows, losses_of, merge_losses
from autoquant_ray.quantize.calibration import Calibration, merge_calibrations
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    CALIBRATION,
    CALIBRATION_FILE,
    CHANNELS,
    CHANNELS_FILE,
    SEARCH,
    SEARCH_FILE,
    part_name,
)
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.shards import Work, collect, intact_parts, tasks_of
from autoquant_ray.wording import few

_MOST_NAMES = 4

logger = logging.getLogger(__name__)


def calibrate(state: RunState, pool: WorkerPool, plan: Plan, fingerprint: str) -> Calibration:
    """Statistics of inputs -> ``calibration.parquet``, and ``channels.parquet`` where needed.

    Skipped when no format needs any.
    """
    directory = state.directory
    if not needs_calibration(plan.formats):
        return Calibration()
    has_channels = any(map(needs_channels, plan.formats))
    there = not has_channels or directory.is_intact(CHANNELS_FILE)
    if not (there and state.is_done("calibrate", fingerprint)):
        with state.stage("calibrate", fingerprint):

            def is_complete(shard: int, table: Any) -> bool:
                if has_channels:
                    directory.read_table(part_name(CHANNELS, shard))
                return bool(table.num_rows > 0)

            done = intact_parts(state, CALIBRATION, is_complete)
            work = Work(
                stage="calibrate",
                tasks=tasks_of(state, done),
                submit=lambda worker, task: worker.calibrate.remote(task),
                num_done=len(done),
                write=partial(_write_calibration, directory, has_channels),
            )
            collect(state, pool, work)
            shards = intact_parts(state, CALIBRATION, lambda _shard, table: table.num_rows > 0)
            # Read in the order of the shards, a few at a time: sums do not depend on arrival.
            if has_channels:
                tables = Parts(directory, CHANNELS, shards)
                channels = merge_calibrations(map(channels_of_table, tables))
                channels = _with_enough_tokens(state, channels)
                directory.write_table(CHANNELS_FILE, channel_rows(channels))
            tables = Parts(directory, CALIBRATION, shards)
            merged = merge_calibrations(map(maxima_of_table, tables))
            directory.write_table(CALIBRATION_FILE, maxima_rows(merged))
    return read_calibration(directory, plan.formats, plan.folds)


def _with_enough_tokens(state: RunState, channels: Calibration) -> Calibration:
    """Statistics without those that rest on few tokens; the log says which."""
    least = state.config["min_expert_tokens"]
    enough, names = channels.with_enough_tokens(least)
    if names:
        logger.warning(
            "%d expert(s) saw fewer than %d tokens (`min_expert_tokens`), so their weights are "
            "scaled by maximum, not by the weighted search: %s",
            len(names),
            least,
            few(names, _MOST_NAMES),
        )
    return enough


def search_scales(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, fingerprint: str
) -> Calibration:
    """Losses of AWQ's candidates -> ``search.parquet``; the calibration with the best of them.

    Skipped when no format needs it.
    """
    directory = state.directory
    if not any(map(needs_search, plan.formats)):
        return calibration
    if not state.is_done("search", fingerprint):
        with state.stage("search", fingerprint):
            shared = pool.share(calibration)
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
    return read_calibration(directory, plan.formats, plan.folds)


def is_calibrated(state: RunState, plan: Plan, *, has_rounding: bool = True) -> bool:
    """Whether every merged file that the formats of a run need is there.

    Args:
        state: The run.
        plan: Its plan.
        has_rounding: Whether what was fitted to weights is among them.
    """
    return not missing_files(state.directory, plan.formats, has_rounding=has_rounding)


def _write_calibration(directory: RunDirectory, has_channels: bool, outcome: Outcome) -> str:
    shard, calibration = outcome.task.shard, outcome.result
    if has_channels:
        directory.write_table(part_name(CHANNELS, shard), channel_rows(calibration))
    rows = maxima_rows(calibration)
    return directory.write_table(part_name(CALIBRATION, shard), rows)


def _write_losses(directory: RunDirectory, name: str, losses: Losses) -> str:
    return directory.write_table(name, loss_rows(losses))
