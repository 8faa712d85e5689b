"""What serving engines accept of the KV cache: one format for all of it, where a source says so.

Released engines read one format of the cache (``kv_cache_quant_algo``) and a scale per attention.
So all caches of an allocation share a format, and none is quantized where some attention's cache is
not searched. Read in the engines' public sources and documents; none of it was run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import without_method
from autoquant_ray.serving.menus import Served
from autoquant_ray.serving.rules import check_target
from autoquant_ray.serving.table import ENGINES, GENERATIONS, MODELOPT

_FROM_ADA = ("ada", "hopper", "blackwell")
_VLLM = "vllm-project/vllm 0.32.0"
_SGLANG = "sgl-project/sglang 0.5.23, python/sglang/srt"
_TRTLLM = "NVIDIA/TensorRT-LLM"
_SIXTEEN_BITS = "unknown to it: all caches stay in 16 bits"


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One format of the cache in one engine.

    Attributes:
        format: Our name.
        gpus: Generations on which it is served.
        note: What happens elsewhere; '' where there is nothing to say.
        source: Repository, release and file.
        mixed: Whether its scales are read where the weights have several formats too.
    """

    format: str
    gpus: tuple[str, ...]
    note: str
    source: str
    mixed: bool = True


CACHE_TABLE: dict[str, tuple[CacheRow, ...]] = {
    "vllm": (
        CacheRow(
            format="kv_fp8",
            gpus=_FROM_ADA,
            note="before Ada it depends on the attention kernel; some kernels (FlashAttention 3, "
            "FlashInfer on Hopper and SM100) quantize the queries too",
            source=f"{_VLLM}, utils/torch_utils.py (get_kv_cache_quant_algo_string), quantization/"
            "kv_cache.py (BaseKVCacheMethod), v1/attention/backends/fa_utils.py, flashinfer.py",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=("blackwell",),
            note="by FlashInfer alone, and only where the weights have one format: of several "
            "(modelopt_mixed) it reads no scales of caches; data-centre cards (SM100) quantize the "
            "queries to FP8, others refuse heads of 64 and attention sinks",
            source=f"{_VLLM}, v1/attention/backends/flashinfer.py (supports_kv_cache_dtype, "
            "supports_combination), quantization/modelopt.py (from_config)",
            mixed=False,
        ),
        CacheRow(
            format="kv_fp8_nvfp4",
            gpus=(),
            note=f"{_SIXTEEN_BITS}, with a warning",
            source=f"{_VLLM}, utils/torch_utils.py (MODELOPT_TO_VLLM_KV_CACHE_DTYPE_MAP)",
        ),
    ),
    "sglang": (
        CacheRow(
            format="kv_fp8",
            gpus=_FROM_ADA,
            note="not by every attention backend",
            source=f"{_SGLANG}/mem_cache/kv_cache_dtype.py (configure_kv_cache_dtype), "
            "layers/quantization/modelopt_quant.py (ModelOptFp8KVCacheMethod)",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=(),
            note="all caches stay in 16 bits; with --kv-cache-dtype nvfp4, on Blackwell, it "
            "takes the scales of a checkpoint for others than ModelOpt's",
            source=f"{_SGLANG}/mem_cache/kv_cache_dtype.py (configure_kv_cache_dtype), layers/"
            "quantization/fp4_kv_cache_quant_method.py (NVFP4KVCacheMethod.load_scales_from_model)",
        ),
        CacheRow(
            format="kv_fp8_nvfp4",
            gpus=(),
            note=_SIXTEEN_BITS,
            source=f"{_SGLANG}/mem_cache/kv_cache_dtype.py (configure_kv_cache_dtype)",
        ),
    ),
    "trtllm": (
        CacheRow(
            format="kv_fp8",
            gpus=GENERATIONS,
            note="",
            source=f"{_TRTLLM} 1.2.1, docs/source/features/quantization.md (Hardware Support "
            "Matrix)",
        ),
        CacheRow(
            format="kv_nvfp4",
            gpus=("blackwell",),
            note="needs a checkpoint that ModelOpt made",
            source=f"{_TRTLLM} 1.3.0rc27, docs/source/features/quantization.md (NVFP4 KV Cache)",
        ),
        CacheRow(
            format="kv_fp8_nvfp4",
            gpus=(),
            note="refused: no QuantAlgo has the name",
            source=f"{_TRTLLM} after 1.2.1 (008e0af), tensorrt_llm/_torch/model_config.py "
            "(_build_modelopt_quant_config)",
        ),
    ),
}
"""Engine -> its rows. None of these releases reads formats by layer: vLLM and SGLang keep all
caches in 16 bits then, where their options say nothing else, and TensorRT-LLM has no such mode."""


def served_formats(engine: str, gpu: str | None, *, is_mixed: bool = False) -> list[str]:
    """Formats of the cache that an engine serves.

    Args:
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        is_mixed: Whether the weights beside it have several formats.

    Raises:
        ConfigError: An unknown engine or GPU.
    """
    generation = check_target(engine, gpu)
    return [
        row.format
        for row in CACHE_TABLE[engine]
        if row.gpus and generation in (None, *row.gpus) and (row.mixed or not is_mixed)
    ]


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
    is_mixed = len({without_method(name) for name in served.menu}) > 1
    candidates = served_formats(engine, gpu, is_mixed=is_mixed) if is_held else []
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
    weights = {without_method(name) for group, name in chosen.items() if group not in caches}
    is_mixed = len(weights - {NONE}) > 1
    engines: Sequence[str] = ENGINES if engine is None else [engine]
    if any(names[0] in served_formats(name, gpu, is_mixed=is_mixed) for name in engines):
        return None
    where = " or ".join(engines) + ("" if gpu is None else f" on {gpu}")
    beside = " beside several formats of weights" if is_mixed else ""
    return (
        f"no source says that {where} serves {names[0]}{beside} (docs/engines.md); take another "
        "format of the KV cache, engine or GPU"
    )
