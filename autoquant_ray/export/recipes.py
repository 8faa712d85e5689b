"""A solution as a recipe for tools that quantize by themselves: llama.cpp, AutoRound, mlx-lm.

Names are the tool's own: llama.cpp's tensor names come from the maps of its package ``gguf``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from autoquant_ray.errors import ConfigError, FormatError
from autoquant_ray.export.tool_formats import COUNTERPARTS, SIXTEEN_BITS, counterpart
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.wording import few

TOOLS = tuple(COUNTERPARTS)
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_FUSED_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_WRAPPERS = ("model.language_model.", "language_model.model.")
_MAX_NAMED = 5


def make_recipe(chosen: Mapping[str, str], formats: Iterable[Format], tool: str) -> str:
    """The text of a recipe.

    Args:
        chosen: Module -> name of its format.
        formats: Those of the run.
        tool: One of ``TOOLS``.

    Raises:
        FormatError: The tool has no counterpart of formats that are used; names them.
        ConfigError: It has no name for a module, or one for modules whose formats differ.
    """
    counterparts = {NONE: SIXTEEN_BITS[tool]}
    counterparts |= {format_.name: counterpart(format_, tool) for format_ in formats}
    used = dict.fromkeys(chosen.values())
    missing = [name for name in used if counterparts[name] is None]
    if missing:
        available = [n for n, entry in counterparts.items() if entry is not None]
        raise FormatError(
            f"{tool} has no counterpart of {few(missing, _MAX_NAMED)}; of this run's formats it "
            f"has {', '.join(available)}: solve again with --allow '*={','.join(available)}'"
        )
    layers = {module: counterparts[name] for module, name in chosen.items()}
    if tool == "llama.cpp":
        return _llama_cpp(layers)
    if tool == "auto-round":
        return json.dumps(layers, indent=2) + "\n"
    return _mlx(layers)


def _llama_cpp(layers: Mapping[str, str]) -> str:
    """One option of ``llama-quantize`` per tensor; its names are regular expressions."""
    names = _TensorNames(layers)
    lines: dict[str, str] = {}
    for module, type_ in layers.items():
        tensors = names.of(module)
        if tensors is None and type_ != SIXTEEN_BITS["llama.cpp"]:
            raise ConfigError(
                f"llama.cpp has no tensor for {module}, by the maps of gguf; keep it in 16 bits "
                f"with --pin, or use another tool"
            )
        for tensor in tensors or ():
            if lines.setdefault(tensor, type_) != type_:
                raise ConfigError(
                    f"llama.cpp keeps {tensor} in one type, and the solution gives {lines[tensor]} "
                    f"and {type_}; solve again with one format for the experts of a layer"
                )
    return "".join(
        f"--tensor-type ^{re.escape(tensor)}\\.weight$={type_}\n" for tensor, type_ in lines.items()
    )


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
        self._maps = (gguf.get_tensor_name_map(a, num_blocks) for a in architectures)
        self._seen: list[Any] = []

    def of(self, module: str) -> list[str] | None:
        """The tensors that hold a module; None where llama.cpp has none."""
        name = module
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name = "model." + name.removeprefix(wrapper)
        names = [name]
        if name.endswith(".experts"):
            names = [f"{name}.{part}" for part in _FUSED_EXPERTS]
        elif expert := _EXPERT.match(name):
            names = [f"{expert[1]}.{expert[2]}"]
        tensors = [self._find(part) for part in names]
        return None if None in tensors else [str(tensor) for tensor in tensors]

    def _find(self, name: str) -> str | None:
        for number, tensor_names in enumerate(self._seen):
            if (tensor := tensor_names.get_name(name)) is not None:
                self._seen.insert(0, self._seen.pop(number))
                return str(tensor)
        for tensor_names in self._maps:
            self._seen.append(tensor_names)
            if (tensor := tensor_names.get_name(name)) is not None:
                return str(tensor)
        return None


def _mlx(layers: Mapping[str, Any]) -> str:
    """The ``quantization`` object of an MLX model's ``config.json``, every layer by its name."""
    quantized = [entry for entry in layers.values() if entry]
    if not quantized:
        raise ConfigError(
            "the solution leaves every layer in 16 bits; there is nothing to quantize"
        )
    names: dict[str, Any] = {}
    for module, entry in layers.items():
        for name in _mlx_names(module):
            if names.setdefault(name, entry) != entry:
                raise ConfigError(
                    f"mlx-lm keeps {name} in one format, and the solution gives {names[name]} and "
                    f"{entry}; solve again with one format for the experts of a layer"
                )
    return json.dumps({**quantized[0], **names}, indent=2) + "\n"


def _mlx_names(module: str) -> list[str]:
    """MLX stacks the experts of a layer in ``switch_mlp``, and puts a wrapper's parts otherwise."""
    name = module
    if name.startswith(_WRAPPERS[0]):
        name = _WRAPPERS[1] + name.removeprefix(_WRAPPERS[0])
    if name.endswith(".experts"):
        start = name.removesuffix("experts")
        return [f"{start}switch_mlp.{part}" for part in _FUSED_EXPERTS]
    expert = _EXPERT.match(name)
    return [f"{expert[1].removesuffix('experts')}switch_mlp.{expert[2]}" if expert else name]
