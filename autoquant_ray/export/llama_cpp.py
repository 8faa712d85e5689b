"""A solution as a command of llama.cpp's ``llama-quantize``, tensor by tensor.

What the tool does with it was read in release b11434 (``tools/quantize/quantize.cpp``,
``src/llama-quant.cpp``) and is tested with a build of it: ``--tensor-type`` counts only where the
final type is itself quantized, the first pattern that fits a tensor wins, and the embedding follows
``--token-embedding-type`` alone. So the final type is ``Q8_0``, which would take whatever is not
named: the last pattern fits every tensor and keeps it in 16 bits.

Names come from the maps of the package ``gguf``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.tool_formats import SIXTEEN_BITS
from autoquant_ray.formats.gguf_types import GGUF_TYPES, fitting_type

STAYS: str = SIXTEEN_BITS["llama.cpp"]
"""Type of a tensor that stays in 16 bits."""

_FINAL_TYPE = "Q8_0"
_EMBEDDING = "token_embd"
_FLOAT_BLOCKS = {"nvfp4": 64, "mxfp4": 32}
"""Types that have none in their place where rows are no whole number of blocks."""
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_FUSED_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_WRAPPERS = ("model.language_model.", "language_model.model.", "language_model.")
_IN_FILES = (("model.layers.", "backbone.layers."), (".block_sparse_moe.", ".mlp."))
"""Part of a name in memory -> what the maps of ``gguf``, which know names of files, may have."""
_SPLIT = "kv_b_proj"  # of multi-head latent attention


def written_type(type_: str, num_columns: int) -> str:
    """What ``llama-quantize`` makes of a tensor that is to have a type.

    Args:
        type_: As a recipe would name it.
        num_columns: Weights of a row.

    Returns:
        The type itself where rows are whole blocks, else the one that the tool takes for it;
        :data:`STAYS` where it would quantize nothing, or stop.
    """
    if type_ in GGUF_TYPES:
        return fitting_type(type_, num_columns) or STAYS
    return type_ if num_columns % _FLOAT_BLOCKS.get(type_, 1) == 0 else STAYS


def llama_cpp_command(
    layers: Mapping[str, str], tied: Iterable[str] = (), *, is_quantized: bool = False
) -> str:
    """The command, on one line, with an option of each tensor.

    Args:
        layers: Module -> type of its tensors.
        tied: Those of the modules that share their weight with the embedding, which a GGUF file
            holds once.
        is_quantized: Whether the model is a GGUF file, which may be quantized already: the tool
            starts from such a file only where it is told to.

    Raises:
        ConfigError: No tensor for a module that is quantized, or modules of several types in one.
    """
    names = _TensorNames(layers)
    types: dict[str, str] = {}
    for module, type_ in layers.items():
        tensors = [_EMBEDDING] if module in tied else names.of(module)
        if tensors is None and type_ != STAYS:
            raise ConfigError(
                f"llama.cpp has no tensor for {module}, by the maps of gguf; keep it in 16 bits "
                f"with --pin, or use another tool"
            )
        for tensor in tensors or ():
            if types.setdefault(tensor, type_) != type_:
                raise ConfigError(
                    f"llama.cpp keeps {tensor} in one type, and the solution gives {types[tensor]} "
                    f"and {type_}; solve again with one format for the experts of a layer"
                )
    pairs = [(rf"^{re.escape(tensor)}\.weight$", type_) for tensor, type_ in types.items()]
    options: list[tuple[str, ...]] = [("--allow-requantize",)] if is_quantized else []
    options += [("--token-embedding-type", types.get(_EMBEDDING, STAYS))]
    options += [("--tensor-type", f"{name}={type_}") for name, type_ in [*pairs, (".*", STAYS)]]
    words = ["llama-quantize", *(word for option in options for word in option)]
    return shlex.join([*words, "in.gguf", "out.gguf", _FINAL_TYPE]) + "\n"


class _TensorNames:
    """Names of tensors in GGUF files, by the maps of all architectures that ``gguf`` has.

    Args:
        modules: All modules of the model.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        try:
            import gguf
        except ImportError:
            raise ConfigError(
                "recipes for llama.cpp need the package gguf, which knows its names: pip install "
                "gguf"
            ) from None
        numbers = [int(part) for name in modules for part in name.split(".") if part.isdigit()]
        num_blocks = max(numbers, default=0) + 1
        # MMPROJ is a file of its own.
        architectures = [a for a in gguf.MODEL_ARCH if a != gguf.MODEL_ARCH.MMPROJ]
        self._maps = (_map_apart(gguf, a, num_blocks) for a in architectures)
        self._seen: list[Any] = []

    def of(self, module: str) -> list[str] | None:
        """The tensors that hold a module; None where llama.cpp has none."""
        name = module
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                rest = name.removeprefix(wrapper)
                name = rest if rest == "lm_head" else "model." + rest
        names = [name]
        if name.endswith(".experts"):
            names = [f"{name}.{part}" for part in _FUSED_EXPERTS]
        elif expert := _EXPERT.match(name):
            names = [f"{expert[1]}.{expert[2]}"]
        tensors = [self._find(part) for part in names]
        if None in tensors:
            return None
        if name.endswith(_SPLIT):  # converters write it whole, or its two parts
            start = str(tensors[0]).rpartition(".")[0]
            tensors += [f"{start}.attn_k_b", f"{start}.attn_v_b"]
        return [str(tensor) for tensor in tensors]

    def _find(self, name: str) -> str | None:
        others = [name.replace(in_memory, in_files) for in_memory, in_files in _IN_FILES]
        return self._look_up(tuple(dict.fromkeys([name, *others])))

    def _look_up(self, names: Sequence[str]) -> str | None:
        for number, tensor_names in enumerate(self._seen):
            if (tensor := _first(tensor_names, names)) is not None:
                self._seen.insert(0, self._seen.pop(number))
                return tensor
        for tensor_names in self._maps:
            self._seen.append(tensor_names)
            if (tensor := _first(tensor_names, names)) is not None:
                return tensor
        return None


def _map_apart(gguf: Any, architecture: Any, num_blocks: int) -> Any:
    """The map of an architecture, made without changing those of the others.

    gguf 0.19 writes the names that only this architecture has into a table which the maps of all
    architectures made later, those of transformers included, are read from.
    """
    shared = gguf.TensorNameMap
    table = dict(shared.block_mappings_cfg)
    return type(shared.__name__, (shared,), {"block_mappings_cfg": table})(architecture, num_blocks)


def _first(tensor_names: Any, names: Sequence[str]) -> str | None:
    """The tensor of the first of several names that a map has."""
    tensors = (tensor_names.get_name(name) for name in names)
    return next((str(tensor) for tensor in tensors if tensor is not None), None)
