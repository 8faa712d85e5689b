"""A solution as the ``quantization`` object of an MLX model's ``config.json``, layer by layer.

Names are those that ``mlx_lm.utils.quantize_model`` (0.32.2) asks for: mostly those of the model's
files, but experts are stacked, a wrapper's parts stand otherwise, and a model whose head is tied
has no head at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.tool_formats import MLX_GROUPS

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
_WRAPPER, _MLX_WRAPPER = "model.language_model.", "language_model.model."
_HEAD, _WRAPPED_HEAD = "lm_head", "language_model.lm_head"
_SPLIT = {"kv_b_proj": ("embed_q", "unembed_out")}
"""Linear of multi-head latent attention -> its parts."""
_BLOCK = ((".mlp.experts", ".block_sparse_moe.experts"),)
_AS_IN_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _BLOCK,
    "minimax": _BLOCK,
    "minimax_m2": _BLOCK,
    "phimoe": _BLOCK,
    "nemotron_h": (("model.layers.", "backbone.layers."), ("model.embed", "backbone.embed")),
}
"""Type of model -> parts of names in memory that stand otherwise in its files, and in MLX."""
_FC = {"up_proj": "fc1", "down_proj": "fc2"}
_WITHOUT_GATE = ("nemotron_h",)
"""Types of models whose experts are two linears."""


def fitting_entry(entry: Any, num_columns: int) -> Any:
    """Parameters of a layer whose rows may be no whole number of groups, which MLX refuses.

    Args:
        entry: Parameters of its quantized layer, or False.
        num_columns: Weights of a row.

    Returns:
        The same with finer groups where these fit; False where none do.
    """
    if not entry or num_columns % entry["group_size"] == 0:
        return entry
    is_affine = entry["mode"] == "affine"
    groups = [
        g for g in MLX_GROUPS if is_affine and g < entry["group_size"] and not num_columns % g
    ]
    return {**entry, "group_size": max(groups)} if groups else False


def mlx_quantization(
    layers: Mapping[str, Any], tied: Mapping[str, str] | None = None, model_type: str = ""
) -> str:
    """The object as JSON: defaults, and an entry of every layer.

    Args:
        layers: Module -> parameters of its quantized layer, False in 16 bits.
        tied: Module that shares its weight with the embedding -> name of the embedding.
        model_type: As the model's config has it; '' where it is not known.

    Raises:
        ConfigError: Nothing is quantized, or modules of several formats are one layer there.
    """
    quantized = [entry for entry in layers.values() if entry]
    if not quantized:
        raise ConfigError(
            "the solution leaves every layer in 16 bits; there is nothing to quantize"
        )
    names: dict[str, Any] = {}
    for module, in_mlx in mlx_names(layers, tied or {}, model_type).items():
        for name in in_mlx:
            if names.setdefault(name, layers[module]) != layers[module]:
                raise ConfigError(
                    f"mlx-lm keeps {name} in one format, and the solution gives {names[name]} and "
                    f"{layers[module]}; solve again with one format for the experts of a layer"
                )
    return json.dumps({**quantized[0], **names}, indent=2) + "\n"


def mlx_names(
    modules: Iterable[str], tied: Mapping[str, str], model_type: str = ""
) -> dict[str, list[str]]:
    """Module -> what MLX calls it: several names where its parts are layers of their own.

    Args:
        modules: All modules of the model, by their names in memory.
        tied: Module that shares its weight with the embedding -> name of the embedding.
        model_type: As the model's config has it.
    """
    listed = list(modules)
    is_wrapped = any(module.startswith(_WRAPPER) for module in listed)
    is_wrapped &= not any(module.startswith("model.layers.") for module in listed)
    names = {module: _names(tied.get(module, module), model_type) for module in listed}
    if is_wrapped and names.get(_HEAD) == [_HEAD]:
        names[_HEAD] = [_WRAPPED_HEAD]
    return names


def _names(module: str, model_type: str) -> list[str]:
    name = module
    for in_memory, in_files in _AS_IN_FILES.get(model_type, ()):
        name = name.replace(in_memory, in_files)
    if name.startswith(_WRAPPER):
        name = _MLX_WRAPPER + name.removeprefix(_WRAPPER)
    parts = (
        _FC if model_type in _WITHOUT_GATE else dict(zip(_EXPERT_PARTS, _EXPERT_PARTS, strict=True))
    )
    start, _, last = name.rpartition(".")
    if last == "experts":
        return [f"{start}.switch_mlp.{part}" for part in parts.values()]
    if last in _SPLIT:
        return [f"{start}.{part}" for part in _SPLIT[last]]
    if (expert := _EXPERT.match(name)) is None:
        return [name]
    return [f"{expert[1].removesuffix('experts')}switch_mlp.{parts.get(expert[2], expert[2])}"]
