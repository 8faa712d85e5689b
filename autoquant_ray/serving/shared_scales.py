"""Which layers have one scale for all of their weights, because engines compute them as one.

Checkpoints hold q, k and v (gate and up, ...) apart. Where a format has one scale for a whole
weight, and an engine one for the fused module, the engine takes the largest of the parts' scales:
FP8 weights are rounded again to it, NVFP4 blocks are read under it although they were rounded under
another. So the parts have one scale from the start.
"""

from __future__ import annotations

from collections.abc import Iterable

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.numbers import is_static_nvfp4
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.layer_formats import layer_algo
from autoquant_ray.serving.table import ENGINES, FUSED, rows_of

MODELOPT_SHARES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers to which ModelOpt itself gives one second scale where their NVFP4 weights are static
(``SHARED_PATTERNS`` of ``modelopt/torch/quantization/utils/shared_input.py``)."""


def shares_scale(format_: Format, engine: str | None = None) -> bool:
    """Whether fused layers have a scale in common under a format, where it has one per weight.

    Args:
        format_: The format.
        engine: One of ``ENGINES``, whose table decides; None, or a format that it does not know:
            they have.
    """
    algo = layer_algo(format_)
    row = None if engine is None or algo is None else rows_of(engine).get(algo.algo)
    return row is None or row.one_scale


def needs_sharing(format_: Format, layers: Iterable[str]) -> bool:
    """Whether ModelOpt gives layers that engines fuse other scales than they are to have.

    Args:
        format_: Theirs.
        layers: From :func:`fused_layers`.
    """
    parts = {name.rpartition(".")[2] for name in layers}
    if not format_.has_shared_scale or is_smoothed(format_) or len(parts) < 2:
        return False
    is_shared = any(parts <= set(shards) for shards in MODELOPT_SHARES)
    return not (is_shared and is_static_nvfp4(format_.weight))


def fused_layers(names: Iterable[str], engine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Linear -> all that are computed as one with it, itself among them, in the order given.

    Args:
        names: All linears of a model.
        engine: One of ``ENGINES``; None: together in any of them.
    """
    names = list(names)
    present = set(names)
    engines = ENGINES if engine is None else (engine,)
    shards_of = dict.fromkeys(shards for name in engines for _, shards in FUSED[name])
    together: dict[str, set[str]] = {name: {name} for name in names}
    for name in names:
        parent, dot, part = name.rpartition(".")
        for shards in shards_of:
            if part not in shards:
                continue
            for shard in shards:
                other = f"{parent}{dot}{shard}"
                if other in present and together[other] is not together[name]:
                    together[name] |= together[other]
                    for member in together[name]:
                        together[member] = together[name]
    order = {name: number for number, name in enumerate(names)}
    return {name: tuple(sorted(together[name], key=order.__getitem__)) for name in names}
