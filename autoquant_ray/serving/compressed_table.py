"""What vLLM accepts of checkpoints of compressed-tensors: schemes by GPU, read in its sources.

Read in releases 0.32.0 and 0.33.0, where these files decide the same:
``vllm/model_executor/layers/quantization/compressed_tensors``. Every layer has the scheme of the
group that names it, so it makes no difference whether a checkpoint has one scheme or several.
SGLang and TensorRT-LLM read such a checkpoint with one format only (SGLang's pull request #16282,
TensorRT-LLM's #17725), and what they do there is not in a table.
"""

from __future__ import annotations

from autoquant_ray.serving.row import GENERATIONS, Row

_SOURCE = (
    "vllm-project/vllm 0.33.0 (the same in 0.32.0), quantization/compressed_tensors: "
    "compressed_tensors.py (_get_scheme_from_parts)"
)
_TO_HOPPER = ("ampere", "ada", "hopper")
_FROM_ADA = ("ada", "hopper", "blackwell")
_ONLY_BLACKWELL = ("blackwell",)
_NO_EXPERTS = "not for routed experts (compressed_tensors_moe.py)"


def _row(
    scheme: str,
    gpus: tuple[str, ...],
    source: str,
    note: str = "",
    *,
    blocks: tuple[int, ...] = (),
    one_scale: bool = False,
    experts: bool = True,
) -> Row:
    return Row(
        algo=scheme,
        mixed=gpus,
        single=gpus,
        note=note,
        source=f"{_SOURCE}, {source}",
        blocks=blocks,
        one_scale=one_scale,
        experts=experts,
    )


COMPRESSED_TABLE: dict[str, tuple[Row, ...]] = {
    "vllm": (
        _row(
            "W4A16",
            GENERATIONS,
            "compressed_tensors_wNa16.py; marlin_utils.py (MARLIN_SUPPORTED_GROUP_SIZES)",
            blocks=(32, 64, 128),
        ),
        _row("W8A16", GENERATIONS, "compressed_tensors_wNa16.py"),
        _row(
            "W8A8_INT8",
            _TO_HOPPER,
            "compressed_tensors_w8a8_int8.py; docs/features/quantization/int8.md",
            f"no int8 kernel on Blackwell; {_NO_EXPERTS}",
            experts=False,
        ),
        _row(
            "W8A8_INT8_PER_TOKEN",
            _TO_HOPPER,
            "compressed_tensors_w8a8_int8.py; docs/features/quantization/int8.md",
            "no int8 kernel on Blackwell",
        ),
        _row(
            "W8A8_FP8",
            _FROM_ADA,
            "compressed_tensors_w8a8_fp8.py (process_fp8_weight_tensor_strategy)",
            "on Ampere the inputs stay in 16 bits (Marlin)",
            one_scale=True,
        ),
        _row(
            "W8A8_FP8_PER_CHANNEL_PER_TOKEN",
            _FROM_ADA,
            "compressed_tensors_w8a8_fp8.py",
            "on Ampere the inputs stay in 16 bits (Marlin)",
        ),
        _row(
            "W8A16_FP8",
            GENERATIONS,
            "compressed_tensors_w8a16_fp8.py (convert_to_channelwise)",
            _NO_EXPERTS,
            experts=False,
        ),
        _row(
            "W4A8_FP8",
            (),
            "compressed_tensors_w4a8_fp8.py; kernels/linear/mixed_precision/cutlass.py",
            "Hopper's kernel rounds the scales of blocks to FP8, which is another format",
        ),
        _row(
            "W4A8_INT8",
            (),
            "compressed_tensors_wNa8.py; kernels/linear/mixed_precision/humming.py",
            "the inputs are quantized by the Humming kernels only, which come apart from vLLM; "
            "others keep them in 16 bits",
        ),
        _row(
            "NVFP4",
            _ONLY_BLACKWELL,
            "compressed_tensors_w4a4_nvfp4.py",
            "before Blackwell the inputs stay in 16 bits (Marlin), which is W4A16_NVFP4",
            one_scale=True,
        ),
        _row("W4A16_NVFP4", GENERATIONS, "compressed_tensors_w4a4_nvfp4.py", one_scale=True),
        _row(
            "MXFP8",
            _ONLY_BLACKWELL,
            "compressed_tensors_w8a8_mxfp8.py",
            "before Blackwell the inputs stay in 16 bits (Marlin)",
        ),
        _row(
            "MXFP4",
            _ONLY_BLACKWELL,
            "compressed_tensors_w4a4_mxfp4.py",
            "needs FlashInfer and a data-centre card (SM100); elsewhere the inputs stay in 16 bits",
        ),
    ),
}
"""Engine -> its rows; engines without a table are not searched for this layout."""
