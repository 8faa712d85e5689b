"""What serving engines accept of the KV cache: one format for all of it, where a source says so.

A checkpoint names one format of the cache (``kv_cache_quant_algo``) and a scale per attention. So
all caches of an allocation share a format, and none is quantized where some attention's cache is
not searched. Read in the engines' public sources and documents; none of it was run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from autoquant_ray.formats.format import NONE
from autoquant_ray.serving.menus import Served
from autoquant_ray.serving.rules import check_target
from autoquant_ray.serving.table import ENGINES, GENERATIONS, MODELOPT

_FROM_ADA = ("ada", "hopper", "blackwell")
_VLLM = "vllm-project/vllm, docs/features/quantization/quantized_kvcache.md"
_SGLANG = "sgl-project/sglang, docs/advanced_features/quantized_kv_cache.md"
_TRTLLM = "NVIDIA/TensorRT-LLM, docs/source/features/quantization.md"


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One format of the cache in one engine.

    Attributes:
        format: Our name.
        gpus: Generations on which it is served.
        note: What happens elsewhere; '' where there is nothing to say.
        source: Repository, file and pull request.
    """

    format: str
    gpus: tuple[str, ...]
    note: str
    source: str


_TWO_FORMATS = CacheRow(
    format="kv_fp8_nvfp4",
    gpus=(),
    note="no source says that it keeps keys and values in two formats",
    source="NVIDIA/Model-Optimizer 0.48.0rc1, modelopt/torch/export/quant_utils.py (released "
    "runtimes do not yet read its kv_cache_quantized_layers)",
)
CACHE_TABLE: dict[str, tuple[CacheRow, ...]] = {
    "vllm": (
        CacheRow(
            format="kv_fp8",
            gpus=_FROM_ADA,
            note="before Ada it depends on the attention kernel",
            source=f"{_VLLM} (per-tensor scales of the checkpoint)",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=("blackwell",),
            note="data-centre cards only (SM100); see issue #49011 for others",
            source="vllm-project/vllm, pull request #40177",
        ),
        _TWO_FORMATS,
    ),
    "sglang": (
        CacheRow(
            format="kv_fp8",
            gpus=_FROM_ADA,
            note="not by every attention backend",
            source=f"{_SGLANG} (k_scale and v_scale of ModelOpt's checkpoints)",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=(),
            note="its fp4_e2m1 has scales that are powers of two, which is another format",
            source=_SGLANG,
        ),
        _TWO_FORMATS,
    ),
    "trtllm": (
        CacheRow(
            format="kv_fp8",
            gpus=GENERATIONS,
            note="",
            source=f"{_TRTLLM} (Hardware Support Matrix)",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=("blackwell",),
            note="needs a checkpoint that ModelOpt made",
            source=f"{_TRTLLM} of 1.3 (NVFP4 KV Cache)",
        ),
        _TWO_FORMATS,
    ),
}


def served_formats(engine: str, gpu: str | None) -> list[str]:
    """Formats of the cache that an engine serves.

    Args:
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.

    Raises:
        ConfigError: An unknown engine or GPU.
    """
    generation = check_target(engine, gpu)
    rows = CACHE_TABLE[engine]
    return [row.format for row in rows if row.gpus and generation in (None, *row.gpus)]


def with_caches(
    served: Served,
    searched: Mapping[str, Collection[str]],
    *,
    is_whole: bool,
    engine: str,
    gpu: str | None,
) -> Served:
    """What an engine serves together, the KV caches among it.

    Args:
        served: The same for weights.
        searched: Caches for which a format is searched -> the formats that each has.
        is_whole: Whether these are all caches of the model.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
    """
    if not searched:
        return served
    # Only ModelOpt's layout holds scales of caches.
    is_held = is_whole and served.layout == MODELOPT
    candidates = served_formats(engine, gpu) if is_held else []
    names = [name for name in candidates if all(name in menu for menu in searched.values())]
    permitted = {group: frozenset({NONE, *names}) for group in searched}
    tie = tuple(permitted)
    return replace(
        served,
        menu=(*served.menu, *names),
        permitted=served.permitted | permitted,
        ties=(*served.ties, *([tie] if len(tie) > 1 else [])),
    )


def cache_problem(
    caches: Collection[str], chosen: Mapping[str, str], engine: str | None, gpu: str | None
) -> str | None:
    """Why an engine cannot serve the caches of an allocation; None where it can.

    Args:
        caches: Groups that are caches.
        chosen: Group -> format; others stay in 16 bits.
        engine: One of ``ENGINES``; None: any of them.
        gpu: A generation or a card; None: any.
    """
    names = sorted({chosen.get(group, NONE) for group in caches})
    if names in ([], [NONE]):
        return None
    if len(names) > 1:
        return (
            f"the KV cache has {', '.join(names)}, and engines keep all of it in one format; solve "
            "again with --engine"
        )
    engines: Sequence[str] = ENGINES if engine is None else [engine]
    if any(names[0] in served_formats(name, gpu) for name in engines):
        return None
    where = " or ".join(engines) + ("" if gpu is None else f" on {gpu}")
    return f"no source says that {where} serves {names[0]} (docs/engines.md)"
