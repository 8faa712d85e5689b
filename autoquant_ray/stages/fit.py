"""The stage that fits scales of weights to statistics: layers, not shards, over all workers.

It writes one part per decoder layer, and one for what is outside of them, and merges them in their
order. A layer's part depends on the merged statistics and on nothing else.
"""

from __future__ import annotations

from contextlib import closing

from autoquant_ray.calibrate.files import read_calibration, rounding_rows
from autoquant_ray.distributed.interrupts import stop_on_signal
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.task import LayerTask
from autoquant_ray.errors import Interrupted, WorkerError
from autoquant_ray.formats.smoothed import needs_channel_squares
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.names import ROUNDING, ROUNDING_FILE, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.shards import intact_parts


def fit(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, fingerprint: str
) -> Calibration:
    """Scales of weights -> ``rounding.parquet``; the calibration with them.

    Skipped when no format has any.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; finished layers are kept.
        WorkerError: A layer failed on every worker that tried it.
    """
    directory = state.directory
    if not any(map(needs_channel_squares, plan.formats)):
        return calibration
    if not state.is_done("fit", fingerprint):
        with state.stage("fit", fingerprint):
            layers = range(len(plan.layer_weights) + 1)
            _fit_layers(state, pool, plan, calibration, layers)
            parts = Parts(directory, ROUNDING, layers)
            rows = [row for table in parts for row in table.to_pylist()]
            directory.write_table(ROUNDING_FILE, rows)
    return read_calibration(directory, plan.formats, plan.folds)


def _fit_layers(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, layers: range
) -> None:
    """Write the parts of layers that have none."""
    done = intact_parts(state, ROUNDING, lambda _layer, _table: True)
    missing = [layer for layer in layers if layer not in set(done)]
    shared, num_kept = pool.share(calibration), len(layers) - len(missing)
    with (
        stop_on_signal(pool.grace_s) as stop,
        closing(
            pool.run(
                (LayerTask(shard=layer) for layer in missing),
                lambda worker, task: worker.fit.remote(task, shared),
                stop,
            )
        ) as outcomes,
        progress("fit", len(layers), num_kept) as advance,
    ):
        for outcome in outcomes:
            layer = outcome.task.shard
            if outcome.reason is not None:
                raise WorkerError(f"fitting layer {layer} failed: {outcome.reason}")
            state.require_lease()
            rows = rounding_rows(outcome.result, plan.formats)
            state.directory.write_table(part_name(ROUNDING, layer), rows)
            num_kept += 1
            advance(f"{outcome.num_workers} worker(s)")
    if stop.is_made:
        raise Interrupted(
            f"interrupted: stage fit has {num_kept} of {len(layers)} layers, all kept; go on with "
            "`resume`"
        )
