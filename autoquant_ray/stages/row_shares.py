"""``--sample-rows auto``: the first shards, scored on all rows, say which share the others need.

Which shards are first goes by their position, never by when they are done, and the shares are made
from their parts alone: so they are the same for any number of workers and any pattern of deaths. A
part says which share of the rows it was scored on. One that does not fit, because another shard has
become one of the first, is deleted and made again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from autoquant_ray.arrays import Floats, Mask
from autoquant_ray.distributed.scoring import DrawingTrial
from autoquant_ray.runs.names import SAMPLES, SCORES, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.drawing.shares import MIN_SAMPLES, MIN_SHARDS, choose_shares

logger = logging.getLogger(__name__)


def first_shards(state: RunState) -> list[int]:
    """Shards that are scored on all rows to find out which share the others need.

    The first shards that are not left out, so many that there are samples enough; none where they
    would be more than half of the run's.
    """
    shards = [shard for shard in range(state.num_shards) if shard not in state.left_out]
    num_samples = 0
    for count, shard in enumerate(shards, start=1):
        if count > len(shards) // 2:
            break
        num_samples += state.directory.read_table(part_name(SAMPLES, shard)).num_rows
        if num_samples >= MIN_SAMPLES and count >= MIN_SHARDS:
            return shards[:count]
    logger.info("`sample_rows` auto: all rows are scored, %d shard(s) are few", len(shards))
    return []


def is_trial(table: pa.Table) -> bool:
    """Whether a part says what drawing rows would do."""
    return bool(table.column("drawing_variances").null_count == 0)


def shares_of_run(state: RunState, shards: Sequence[int], has_GF: Mask) -> Floats:
    """Share of the rows on which the other shards are scored, ``(G, F)``.

    Args:
        state: The run.
        shards: From :func:`first_shards`; each has its part.
        has_GF: Groups and formats that a part has rows of, in their order.
    """
    if not shards:
        return np.ones(has_GF.shape)
    trials = [_trial(table, has_GF) for table in Parts(state.directory, SCORES, shards)]
    shares_GF = choose_shares(trials)
    logger.info(
        "`sample_rows` auto: after %d shard(s) on all rows, %.0f%% of the rows on average; all "
        "rows for %.0f%% of the scores",
        len(shards),
        100 * shares_GF[has_GF].mean(),
        100 * (shares_GF[has_GF] == 1).mean(),
    )
    return shares_GF


def drop_other_shares(state: RunState, shards: Sequence[int], shares_K: Floats) -> list[int]:
    """Delete parts that were scored on other shares of the rows; returns the shards that stay.

    Args:
        state: The run.
        shards: Whose parts are whole.
        shares_K: Share of each of a part's rows.
    """
    kept = []
    for shard, table in zip(shards, Parts(state.directory, SCORES, shards), strict=True):
        if np.array_equal(table.column("row_share").to_numpy(), shares_K):
            kept.append(shard)
            continue
        name = part_name(SCORES, shard)
        logger.info("%s was scored on other shares of the rows; it is made again", name)
        state.directory.append_event("part_outdated", part=name)
        state.directory.delete(name)
    return kept


def _trial(table: pa.Table, has_GF: Mask) -> DrawingTrial:
    """What a part says of drawing rows."""
    sums_KN = np.array(table.column("sample_sums").to_pylist(), dtype=np.float64)
    variances_KS = np.array(table.column("drawing_variances").to_pylist(), dtype=np.float64)
    sums_NGF = np.zeros((sums_KN.shape[1], *has_GF.shape))
    variances_SGF = np.zeros((variances_KS.shape[1], *has_GF.shape))
    sums_NGF[:, has_GF] = sums_KN.T
    variances_SGF[:, has_GF] = variances_KS.T
    tokens = table.column("sample_tokens")[0].as_py()
    return DrawingTrial(
        sample_sums_NGF=sums_NGF,
        sample_tokens_N=np.array(tokens, dtype=np.float64),
        variances_SGF=variances_SGF,
    )
