"""A solution as a recipe for tools that quantize by themselves: llama.cpp, AutoRound, mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from autoquant_ray.errors import FormatError
from autoquant_ray.export.llama_cpp import llama_cpp_command, written_type
from autoquant_ray.export.mlx import fitting_entry, mlx_quantization
from autoquant_ray.export.tool_formats import COUNTERPARTS, SIXTEEN_BITS, counterpart
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.wording import few

TOOLS = tuple(COUNTERPARTS)
LLAMA_CPP, AUTO_ROUND, MLX = TOOLS
_MAX_NAMED = 5
_MAX_LAYERS = 2

Shapes = Mapping[str, Mapping[str, Any]]
"""Module -> its facts, ``shapes`` among them, as in ``run.json``."""


def make_recipe(
    chosen: Mapping[str, str],
    formats: Iterable[Format],
    tool: str,
    *,
    tied: Mapping[str, str] | None = None,
    modules: Shapes | None = None,
    is_quantized: bool = False,
    model_type: str = "",
) -> str:
    """The text of a recipe.

    Args:
        chosen: Module -> name of its format.
        formats: Those of the run.
        tool: One of ``TOOLS``.
        tied: Module that shares its weight with the embedding -> name of the embedding, which
            llama.cpp and mlx-lm store once.
        modules: Shapes of weights, on which the tool's formats depend; None: rows fit all of them.
        is_quantized: Whether the model is a GGUF file, which may be quantized already.
        model_type: As the model's config has it; '' where it is not known.

    Raises:
        FormatError: The tool has no counterpart of formats that are used; names them.
        ConfigError: It has no name for a module, or one for modules whose formats differ.
    """
    layers = {
        module: _fitting(entry, module, modules or {}, tool)
        for module, entry in _layers(chosen, formats, tool).items()
    }
    if tool == LLAMA_CPP:
        return llama_cpp_command(layers, tied or {}, is_quantized=is_quantized)
    if tool == AUTO_ROUND:
        return json.dumps(layers, indent=2) + "\n"
    return mlx_quantization(layers, tied, model_type)


def recipe_notes(
    chosen: Mapping[str, str],
    formats: Iterable[Format],
    tool: str,
    *,
    tied: Mapping[str, str],
    modules: Shapes,
) -> list[str]:
    """In which respects the tool makes something else than what was scored.

    Args:
        chosen: Module -> name of its format.
        formats: Those of the run.
        tool: One of ``TOOLS``.
        tied: Module that shares its weight with the embedding -> name of the embedding.
        modules: Shapes of weights.
    """
    sixteen_bits, formats = SIXTEEN_BITS[tool], list(formats)
    layers = _layers(chosen, formats, tool)
    quantized = {name: entry for name, entry in layers.items() if entry != sixteen_bits}
    notes = [
        f"note: {tool} stores one matrix for {name} and {embedding}, so its recipe quantizes the "
        "embedding too, which was not scored; keep the head in 16 bits with solve --pin "
        f"'{name}=none'"
        for name, embedding in tied.items()
        if name in quantized and tool != AUTO_ROUND
    ]
    notes += [
        f"note: {tool} leaves {name} in 16 bits, because it shares its weight with {embedding}; "
        f"plan it so with solve --pin '{name}=none'"
        for name, embedding in tied.items()
        if name in quantized and tool == AUTO_ROUND
    ]
    others: dict[tuple[str, str], list[str]] = {}
    scored_so = {f.name for f in formats if gguf_type_of(f.weight) is not None}
    for name, entry in quantized.items():
        if chosen[name] in scored_so:  # with the type that such rows get
            continue
        fitting = _fitting(entry, name, modules, tool)
        if fitting == sixteen_bits or (tool == LLAMA_CPP and fitting != entry):
            written = "16 bits" if fitting == sixteen_bits else str(fitting)
            others.setdefault((str(chosen[name]), written), []).append(name)
    notes += [
        f"note: {tool} has no counterpart of {format_} for rows of this many weights: {len(names)} "
        f"layers get {written} ({few(names, _MAX_LAYERS)})"
        for (format_, written), names in others.items()
    ]
    if any("nvfp4" in (entry, _mode(entry)) for entry in quantized.values()):
        notes.append(
            f"note: {tool} rounds to nvfp4 without a scale per tensor, so weights far below 1 lose "
            "more than was scored"
        )
    return notes


def _layers(chosen: Mapping[str, str], formats: Iterable[Format], tool: str) -> dict[str, Any]:
    """Module -> what the tool calls its format.

    Raises:
        FormatError: It has no counterpart of formats that are used; names them.
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
    return {module: counterparts[name] for module, name in chosen.items()}


def _fitting(entry: Any, module: str, modules: Shapes, tool: str) -> Any:
    """What a module gets whose rows the tool may not be able to divide into blocks."""
    fit = {LLAMA_CPP: written_type, MLX: fitting_entry}.get(tool)
    if fit is None:
        return entry
    shapes = modules.get(module, {}).get("shapes", ())
    others = [other for shape in shapes if (other := fit(entry, shape[-1])) != entry]
    return SIXTEEN_BITS[tool] if SIXTEEN_BITS[tool] in others else [*others, entry][0]


def _mode(entry: Any) -> str | None:
    return entry.get("mode") if isinstance(entry, dict) else None
