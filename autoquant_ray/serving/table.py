"""What serving engines accept, read in their public sources: formats, GPUs, fused modules.

A format counts as served on a GPU where the engine computes there what was scored: the same
weights and the same inputs. Engines load more than that: where a GPU lacks the units they keep
inputs in 16 bits, and the note says so. None of this was run; each row names its source.
"""

from __future__ import annotations

from autoquant_ray.serving.compressed_table import COMPRESSED_TABLE
from autoquant_ray.serving.row import GENERATIONS, Row

__all__ = ["GENERATIONS", "Row"]

ENGINES = ("vllm", "sglang", "trtllm")
SERVE = {
    "vllm": "vllm serve",
    "sglang": "python -m sglang.launch_server --model-path",
    "trtllm": "trtllm-serve",
}
"""Engine -> the command that serves a folder, which stands behind it."""
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

_VLLM = "vllm-project/vllm 0.33.0 (the same in 0.32.0), quantization/modelopt.py"
_SGLANG = "sgl-project/sglang 0.5.23, python/sglang/srt/layers/quantization/modelopt_quant.py"
_TRTLLM = (
    "NVIDIA/TensorRT-LLM after 1.2.1 (ed53795), tensorrt_llm/_torch/modules/linear.py "
    "(get_quant_method)"
)
_TRTLLM_GPUS = "docs/source/features/quantization.md of 1.2.1 (Hardware Support Matrix)"
_FROM_ADA = ("ada", "hopper", "blackwell")
_ONLY_BLACKWELL = ("blackwell",)


TABLE: dict[str, tuple[Row, ...]] = {
    "vllm": (
        Row(
            algo="FP8",
            mixed=_FROM_ADA,
            single=_FROM_ADA,
            note="on Ampere the inputs stay in 16 bits (Marlin)",
            source=f"{_VLLM} (KFp8StaticTensor)",
            one_scale=True,
        ),
        Row(
            algo="NVFP4",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="before Blackwell the inputs stay in 16 bits (Marlin), which is W4A16_NVFP4",
            source=f"{_VLLM} (KNvfp4Static, KNvfp4Dynamic)",
            one_scale=True,
        ),
        Row(
            algo="W4A16_NVFP4",
            mixed=GENERATIONS,
            single=GENERATIONS,
            note="",
            source=f"{_VLLM} (resolve; get_min_capability)",
            one_scale=True,
        ),
        Row(
            algo="MXFP8",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="before Blackwell the inputs stay in 16 bits (Marlin)",
            source=f"{_VLLM} (KMxfp8Static)",
        ),
        Row(
            algo="FP8_PER_CHANNEL_PER_TOKEN",
            mixed=_FROM_ADA,
            single=_FROM_ADA,
            note="not for routed experts, which stay unquantized",
            source=f"{_VLLM} (LINEAR_ALGOS, ModelOptMixedPrecisionConfig.get_quant_method)",
            experts=False,
        ),
        Row(
            algo="FP8_PB_WO",
            mixed=(),
            single=(),
            note="the inputs are quantized too (FP8 in blocks of 128), alone and mixed",
            source=f"{_VLLM} (KFp8Block128)",
        ),
    ),
    "sglang": (
        Row(
            algo="FP8",
            mixed=_FROM_ADA,
            single=_FROM_ADA,
            note="on Ampere the inputs stay in 16 bits (Marlin)",
            source=f"{_SGLANG} (ModelOptFp8Config, ModelOptMixedPrecisionConfig)",
            one_scale=True,
        ),
        Row(
            algo="NVFP4",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="before Blackwell the inputs stay in 16 bits (Marlin), which is W4A16_NVFP4",
            source=f"{_SGLANG} (ModelOptFp4LinearMethod)",
            one_scale=True,
        ),
        Row(
            algo="W4A16_NVFP4",
            mixed=GENERATIONS,
            single=GENERATIONS,
            note="",
            source=f"{_SGLANG} (ModelOptNvFp4A16LinearMethod; get_min_capability)",
            one_scale=True,
        ),
        Row(
            algo="MXFP8",
            mixed=_ONLY_BLACKWELL,
            single=_ONLY_BLACKWELL,
            note="needs compute capability 10.0; not for the head, where it stands alone",
            source=f"{_SGLANG}, fp8.py (get_min_capability)",
        ),
        Row(
            algo="FP8_PB_WO",
            mixed=(),
            single=(),
            note="refused alone (ModelOptFp8Config only supports regular FP8); mixed, the inputs "
            "are quantized too (FP8 in blocks)",
            source=f"{_SGLANG} (_BLOCK_FP8_ALGOS)",
        ),
        Row(
            algo="W4A16_AWQ",
            mixed=(),
            single=(),
            note="refused alone (ModelOptFp8Config only supports regular FP8); silently "
            "unquantized where several formats are mixed",
            source=f"{_SGLANG}; python/sglang/srt/configs/model_config.py "
            "(_parse_modelopt_quant_config)",
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


MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"
LAYOUTS = (MODELOPT, COMPRESSED_TENSORS)
"""How a checkpoint is written."""


def layouts_of(engine: str) -> list[str]:
    """Layouts of which it is known what the engine does with them, the preferred first."""
    return [MODELOPT, *([COMPRESSED_TENSORS] if engine in COMPRESSED_TABLE else [])]


def rows_of(engine: str, layout: str = MODELOPT) -> dict[str, Row]:
    """Algorithm, or scheme, -> its row."""
    table = TABLE if layout == MODELOPT else COMPRESSED_TABLE
    return {row.algo: row for row in table.get(engine, ())}
