"""Layouts of quantized checkpoints: which tensors make which weight.

One function per method of ``quant_method``. It takes the config and the headers of the files, and
gives a description and the weights; parts of inputs and caches (``input_scale``, ``k_scale``) are
no business of a weight. What a config says in a way that is not read here raises
:class:`LayoutError`; what it does not explain is found by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autoquant_ray.config.patterns import matching_names
from autoquant_ray.models.packed_weight import (
    CHANNEL,
    FP4,
    INT4_ROWS,
    INT32,
    MXFP4,
    TENSOR,
    PackedWeight,
)
from autoquant_ray.models.stored_tensors import TensorHeader
from autoquant_ray.wording import shown

Headers = Mapping[str, TensorHeader]
Layout = tuple[str, dict[str, PackedWeight]]
"""Description, and parameter -> its parts."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_NVFP4_BLOCK, _MX_BLOCK = 16, 32


class LayoutError(Exception):
    """Why a layout is not read, as the end of a sentence about the model."""


def _read_fp8(config: Mapping[str, Any], headers: Headers) -> Layout:
    """DeepSeek's and Qwen's blocks, and a scale per tensor as Mistral's and AutoFP8's files have.

    The blocks are the config's: transformers (5.14) takes them from the number of scales, which is
    wrong where the last block is not full.
    """
    sizes = config.get("weight_block_size")
    weights = {}
    for name, header in headers.items():
        if header.dtype not in _FLOAT8:
            continue
        stem = name.removesuffix(".weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale")
        scale = next((other for other in names if other in headers), None)
        if scale is None:
            raise LayoutError(f"and its files lack a scale of {name}")
        is_single = headers[scale].shape in ((), (1,), (1, 1))
        weights[name] = PackedWeight(
            numbers=name, scale=scale, block=TENSOR if is_single else _pair(sizes)
        )
    block = "x".join(map(str, sizes)) if sizes else ""
    return f"FP8 in blocks of {block}" if sizes else "FP8 per tensor", weights


def _pair(sizes: Any) -> tuple[int, int]:
    parts = sizes.split("x") if isinstance(sizes, str) else sizes
    if not isinstance(parts, Sequence) or len(parts) != 2:
        raise LayoutError(f"and the size of its blocks, {shown(sizes)}, is no pair of numbers")
    return int(parts[0]), int(parts[1])


def _read_modelopt(config: Mapping[str, Any], headers: Headers) -> Layout:
    """Every algorithm that this project's own export writes, each layer by its algorithm."""
    algo = config.get("quant_algo")
    layers = config.get("quantized_layers") or {}
    if algo is None:
        return "ModelOpt, KV cache only", {}
    if algo == "MIXED_PRECISION":
        algos = {name: str(entry.get("quant_algo")) for name, entry in layers.items()}
    else:
        algos = {}
    unread = sorted({str(algo), *algos.values()} - {*_MODELOPT, "MIXED_PRECISION", "None"})
    if unread:
        raise LayoutError(f"and {', '.join(unread)} is not read here")
    weights = {}
    for scale in headers:
        module, dot, part = scale.rpartition(".weight_scale")
        if dot and not part:
            weights[f"{module}.weight"] = _modelopt_weight(
                module, algos.get(module, str(algo)), headers
            )
    used = sorted(set(algos.values())) if algos else [str(algo)]
    return f"ModelOpt's {', '.join(used)}", weights


_MODELOPT: Mapping[str, tuple[str, tuple[int, int], str]] = {
    "FP8": ("elements", TENSOR, "F8_E4M3"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("elements", CHANNEL, "F8_E4M3"),
    "W8A16": ("elements", CHANNEL, "I8"),
    "W8A8_SQ_PER_CHANNEL": ("elements", CHANNEL, "I8"),
    "MXFP8": ("elements", (1, _MX_BLOCK), "F8_E4M3"),
    "NVFP4": (FP4, (1, _NVFP4_BLOCK), "U8"),
    "W4A16_NVFP4": (FP4, (1, _NVFP4_BLOCK), "U8"),
    "W4A16_AWQ": (INT4_ROWS, (1, 0), "U8"),
}
"""Algorithm -> how its numbers lie, what a scale belongs to, and their stored type."""


def _modelopt_weight(module: str, algo: str, headers: Headers) -> PackedWeight:
    """A layer's weight. Of int4 the block is the one that its scales make, in whole rows."""
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    if f"{module}.pre_quant_scale" in headers:
        raise LayoutError(f"and {module} has factors of its inputs (pre_quant_scale)")
    if algo not in _MODELOPT or name not in headers:
        raise LayoutError(f"and it is not clear what {scale} stands for")
    kind, block, dtype = _MODELOPT[algo]
    header = headers[name]
    if header.dtype != dtype:
        raise LayoutError(f"and {name} is stored as {header.dtype}, which {algo} is not")
    if kind == INT4_ROWS:
        groups = headers[scale].shape[-1]
        if header.shape[-1] % groups:
            raise LayoutError(f"and {groups} scales do not fit the rows of {name}")
        block = (1, header.shape[-1] // groups)
    second = f"{module}.weight_scale_2" if kind == FP4 else None
    return PackedWeight(numbers=name, scale=scale, block=block, kind=kind, global_scale=second)


def _read_compressed(config: Mapping[str, Any], headers: Headers) -> Layout:
    """compressed-tensors: floats, integers and packed integers, and their FP4."""
    sparse = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparse != "dense":
        raise LayoutError(f"and its weights are sparse ({sparse}), which is not read here")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise LayoutError("and its activations are transformed (transform_config)")
    groups = [
        (tuple(group.get("targets") or ()), group["weights"])
        for group in (config.get("config_groups") or {}).values()
        if isinstance(group, Mapping) and group.get("weights")
    ]
    weights = {}
    for scale in headers:
        module, dot, part = scale.rpartition(".weight_scale")
        if dot and not part:
            arguments = _arguments_of(module, groups)
            weights[f"{module}.weight"] = _compressed_weight(module, arguments, headers)
    kinds = {f"{a.get('type', 'int')}{a.get('num_bits', 8)}" for _, a in groups}
    return f"compressed-tensors, {', '.join(sorted(kinds))}", weights


def _arguments_of(
    module: str, groups: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]]
) -> Mapping[str, Any]:
    """How a module's weight is quantized: by its name, else by a pattern, else by its class."""
    by_name = [a for targets, a in groups if module in targets]
    by_pattern = [a for t, a in groups if any(map(_matcher(module), t))]
    by_class = [a for t, a in groups if any("." not in target for target in t)]
    candidates = by_name or by_pattern or by_class or [a for _, a in groups]
    if not candidates or any(other != candidates[0] for other in candidates):
        raise LayoutError(f"and its config_groups do not tell how {module} is quantized")
    return candidates[0]


def _matcher(module: str) -> Callable[[str], bool]:
    def matches(target: str) -> bool:
        pattern = target.removeprefix("re:")
        if pattern == target:
            return False
        try:
            return bool(matching_names(pattern, [module], from_start=True))
        except ValueError as error:
            raise LayoutError(f"and its target {shown(target)} is not read: {error}") from None

    return matches


def _compressed_weight(module: str, arguments: Mapping[str, Any], headers: Headers) -> PackedWeight:
    packed, plain = f"{module}.weight_packed", f"{module}.weight"
    name = packed if packed in headers else plain
    dtype = headers[name].dtype if name in headers else None
    scale, zero_name = f"{module}.weight_scale", f"{module}.weight_zero_point"
    if f"{module}.weight_g_idx" in headers:
        raise LayoutError(f"and the columns of {module} are reordered (weight_g_idx)")
    zero_point = zero_name if zero_name in headers else None
    if zero_point is None and not arguments.get("symmetric", True):
        raise LayoutError(f"and its files lack {zero_name}")
    block, num_bits = _block_of(arguments), int(arguments.get("num_bits", 8))
    if name == packed and dtype == "U8" and arguments.get("type") == "float" and num_bits == 4:
        second = f"{module}.weight_global_scale"
        return PackedWeight(
            numbers=name,
            scale=scale,
            block=block,
            kind=FP4,
            global_scale=second if second in headers else None,
            divides=True,
        )
    if name == packed and dtype == "I32" and num_bits in (2, 4, 8):
        return PackedWeight(
            numbers=name,
            scale=scale,
            block=block,
            kind=INT32,
            num_bits=num_bits,
            zero_point=zero_point,
            stored_shape=f"{module}.weight_shape",
            takes_type=True,
        )
    if name == packed or dtype not in (*_FLOAT8, "I8"):
        raise LayoutError(f"and {name} is stored as {dtype} for {num_bits} bits")
    return PackedWeight(
        numbers=name, scale=scale, block=block, zero_point=zero_point, takes_type=True
    )


def _block_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, from the arguments of a weight's quantization."""
    strategy = arguments.get("strategy")
    size = arguments.get("group_size")
    if strategy is None:
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    if strategy == "block":
        return _pair(arguments.get("block_structure"))
    if strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        return (1, size)
    if strategy not in ("tensor", "channel"):
        raise LayoutError(f"and its strategy {strategy!r} is not read here")
    return TENSOR if strategy == "tensor" else CHANNEL


def _read_mxfp4(config: Mapping[str, Any], headers: Headers) -> Layout:
    """GPT-OSS: experts in blocks of 32, stored as ``(experts, out, blocks, 16 bytes)``."""
    weights = {
        name: PackedWeight(
            numbers=f"{name}_blocks", scale=f"{name}_scales", block=(1, _MX_BLOCK), kind=MXFP4
        )
        for name in _stems(headers, "_blocks")
    }
    return "MXFP4 experts", weights


def _stems(headers: Headers, end: str) -> Iterator[str]:
    return (name.removesuffix(end) for name in headers if name.endswith(end))


LAYOUTS: Mapping[str, Callable[[Mapping[str, Any], Headers], Layout]] = {
    "compressed-tensors": _read_compressed,
    "fp8": _read_fp8,
    "modelopt": _read_modelopt,
    "mxfp4": _read_mxfp4,
}
"""``quant_method`` -> how its layout is read."""
