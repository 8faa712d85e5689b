"""What serving engines accept, read in their public sources: formats, GPUs, fused modules.

A format counts as served on a GPU where the engine computes there what was scored: the same
weights and the same inputs. Engines load more than that: where a GPU lacks the units they keep
inputs in 16 bits, and the note says so. None of this was run; each row names its source.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("vllm", "sglang", "trtllm")
GENERATIONS = ("ampere", "ada", "hopper", "blackwell")
CARDS = {
    "a100": "ampere",
    "rtx4090": "ada",
    "h100": "hopper",
    "h200": "hopper",
    "b200": "blackwell",
}
"""Cards of ``hardware/`` -> their generation."""
FP4_FAMILY = ("NVFP4", "W4A16_NVFP4")
"""Algorithms whose group size vLLM and SGLang take from the first such layer, for all of them."""
READ_IN = "November 2026"

_VLLM = "vllm-project/vllm, vllm/model_executor/layers/quantization/modelopt.py"
_SGLANG = "sgl-project/sglang, python/sglang/srt/layers/quantization/modelopt/schemes"
_TRTLLM = "NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/modules/linear.py (get_quant_method)"
_TRTLLM_GPUS = "docs/source/features/quantization.md (Hardware Support Matrix)"
_FROM_ADA = ("ada", "hopper", "blackwell")
_ONLY_BLACKWELL = ("blackwell",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm of one engine.

    Attributes:
        algo: ModelOpt's ``quant_algo``.
        mixed: Generations on which it is served as one of several formats
            (``MIXED_PRECISION``).
        single: Generations on which it is served as the only format of a checkpoint.
        note: What happens elsewhere; '' where there is nothing to say.
        source: Repository, file and pull request.
        one_scale: Fused layers are computed under one scale for all of their weights: where the
            parts have several, weights are rounded again, or read under another's.
    """

    algo: str
    mixed: tuple[str, ...]
    single: tuple[str, ...]
    note: str
    source: str
    one_scale: bool = False


TABLE: dict[str, tuple[Row, ...]] = {
    "vllm": (
        Row(
            algo="FP8",
            mixed=_FROM_ADA,
            single=_FROM_ADA,
            note="on Ampere the inputs stay in 16 bits (Marlin)",
            source=f"{_VLLM}; pull requests #35047 (mixed), #45306 (Ampere)",
            one_scale=True,
        ),
        Row(
            algo="NVFP4",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="before Blackwell the inputs stay in 16 bits (Marlin), which is W4A16_NVFP4",
            source=f"{_VLLM}; pull requests #35047 (mixed), #45306 (Marlin)",
            one_scale=True,
        ),
        Row(
            algo="W4A16_NVFP4",
            mixed=GENERATIONS,
            single=GENERATIONS,
            note="",
            source=f"{_VLLM} (get_min_capability, MarlinNvFp4LinearKernel); #45306 (Ampere)",
            one_scale=True,
        ),
        Row(
            algo="MXFP8",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="before Blackwell the inputs stay in 16 bits (Marlin); releases before #46756 "
            "leave it unquantized where several formats are mixed",
            source=f"{_VLLM}; pull requests #33786 (single), #46756 (mixed)",
        ),
        Row(
            algo="FP8_PER_CHANNEL_PER_TOKEN",
            mixed=(),
            single=_FROM_ADA,
            note="silently unquantized where several formats are mixed",
            source=f"{_VLLM} (ModelOptFp8PcPtLinearMethod, ModelOptMixedPrecisionConfig)",
        ),
        Row(
            algo="FP8_PB_WO",
            mixed=(),
            single=(),
            note="the inputs are quantized too (FP8 per token); silently unquantized where several "
            "formats are mixed",
            source=f"{_VLLM} (ModelOptFp8PbWoLinearMethod); issue #55496 (mixed)",
        ),
    ),
    "sglang": (
        Row(
            algo="FP8",
            mixed=_ONLY_BLACKWELL,
            single=_FROM_ADA,
            note="a checkpoint of several formats needs Blackwell",
            source=f"{_SGLANG}/modelopt_fp8.py, modelopt_mixed_precision.py (get_min_capability)",
            one_scale=True,
        ),
        Row(
            algo="NVFP4",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="",
            source=f"{_SGLANG}/modelopt_fp4.py, modelopt_mixed_precision.py; pull request #27906",
            one_scale=True,
        ),
        Row(
            algo="W4A16_AWQ",
            mixed=(),
            single=GENERATIONS,
            note="routed experts stay unquantized; silently unquantized where several formats are "
            "mixed",
            source=f"{_SGLANG}/modelopt_w4a16.py",
        ),
        Row(
            algo="W4A16_NVFP4",
            mixed=(),
            single=(),
            note="silently unquantized where several formats are mixed",
            source=f"{_SGLANG}/modelopt_mixed_precision.py; pull request #30078 (closed)",
            one_scale=True,
        ),
        Row(
            algo="MXFP8",
            mixed=(),
            single=(),
            note="silently unquantized where several formats are mixed",
            source=f"{_SGLANG}/modelopt_mixed_precision.py; pull requests #31282 (open), #32740 "
            "(closed)",
        ),
    ),
    "trtllm": (
        Row(
            algo="FP8",
            mixed=_FROM_ADA,
            single=_FROM_ADA,
            note="",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
            one_scale=True,
        ),
        Row(
            algo="NVFP4",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
            one_scale=True,
        ),
        Row(
            algo="W4A16_AWQ",
            mixed=("ampere", "ada", "hopper"),
            single=("ampere", "ada", "hopper"),
            note="",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
        ),
        Row(
            algo="W4A8_AWQ",
            mixed=("ada", "hopper"),
            single=("ada", "hopper"),
            note="",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
        ),
        Row(
            algo="FP8_PER_CHANNEL_PER_TOKEN",
            mixed=("hopper",),
            single=("hopper",),
            note="",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS} (FP8 rowwise)",
        ),
        Row(
            algo="W8A16",
            mixed=(),
            single=(),
            note="accepted by the code, but no GPU is documented for it",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
        ),
        Row(
            algo="W4A8_NVFP4_FP8",
            mixed=(),
            single=(),
            note="accepted by the code, but no GPU is documented for it",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
            one_scale=True,
        ),
        Row(
            algo="W4A8_MXFP4_FP8",
            mixed=(),
            single=(),
            note="accepted by the code, but no GPU is documented for it",
            source=f"{_TRTLLM}; {_TRTLLM_GPUS}",
        ),
        Row(
            algo="W8A8_SQ_PER_CHANNEL",
            mixed=(),
            single=(),
            note="refused by the PyTorch backend (unsupported quant mode)",
            source=_TRTLLM,
        ),
    ),
}

Fused = tuple[tuple[str, tuple[str, ...]], ...]
_COMMON: Fused = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
FUSED: dict[str, Fused] = {
    "vllm": (*_COMMON, ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa"))),
    "sglang": (*_COMMON, ("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa"))),
    "trtllm": (*_COMMON, ("kv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa"))),
}
"""Engine -> (its module, the checkpoint's modules that it fuses into it); from the model classes'
``packed_modules_mapping``, and TensorRT-LLM's ``WeightMode``. Two shards at least must be there."""


def rows_of(engine: str) -> dict[str, Row]:
    """Algorithm -> its row."""
    return {row.algo: row for row in TABLE[engine]}
