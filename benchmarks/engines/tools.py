"""The real tools: what each reads, how it is installed, and what it should call each format.

Kinds are written from the tools' own words, as the scripts of ``in_tools`` print them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

IN_16_BITS = "16 bits"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that reads exports.

    Attributes:
        script: File of ``in_tools`` that runs in the tool's environment.
        cases: Keys of ``cases.CASES``.
        kind: What it calls a layer of a format whose rows have so many weights.
        packages: What pip installs for it; none: it runs in this environment, in a process without
            this package.
        unwanted: Packages that pip brings along and that must go.
    """

    script: str
    cases: tuple[str, ...]
    kind: Callable[[str, int], str]
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()


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


def compressed_tensors_kind(format_: str, columns: int) -> str:
    """Arguments of weights and of inputs."""
    return _COMPRESSED_TENSORS.get(format_, IN_16_BITS)


def mlx_kind(format_: str, columns: int) -> str:
    """Mode, bits and group; int8 per channel has groups there."""
    if format_ == "none":
        return IN_16_BITS
    if format_ == "wfp4_afp16":
        return "nvfp4 4 g16"
    group = 64 if "_g64_" in format_ else next(g for g in (128, 64, 32) if columns % g == 0)
    return f"affine {format_[4]} g{group}"


TOOLS = {
    "transformers": Tool(
        script="with_transformers.py",
        cases=("compressed-tensors", "compressed-tensors, integers"),
        kind=compressed_tensors_kind,
    ),
    "mlx-lm": Tool(
        script="with_mlx.py",
        cases=("mlx-lm",),
        kind=mlx_kind,
        packages=("mlx[cpu]==0.32.2", "mlx-lm==0.32.2"),
    ),
}
