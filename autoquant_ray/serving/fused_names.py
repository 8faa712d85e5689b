"""How an engine finds the format of each of its modules: its own rules, played through on names.

An engine builds modules of its own, some of which hold several modules of the checkpoint, and looks
each up among the names that the checkpoint lists. A module that is not found is served in 16 bits
without a word, whatever its bytes are. The rules are those of ``_resolve_quant_algo`` (vLLM and
SGLang) and ``apply_layerwise_quant_config`` (TensorRT-LLM); sources stand beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from autoquant_ray.serving.table import FUSED

Algos = Mapping[str, str]
"""Module of the checkpoint -> its ``quant_algo``; only the quantized ones, in their order."""

_EXPERTS = "experts"
_HEAD = "lm_head"
_VISION = ("visual", "vision_tower", "vision_model")


@dataclass(frozen=True)
class EngineModule:
    """A module of an engine.

    Attributes:
        parent: What stands before its name in the checkpoint's naming, without a dot at its end.
        name: Its own last part.
        members: Modules of the checkpoint that it holds.
    """

    parent: str
    name: str
    members: tuple[str, ...]

    @property
    def path(self) -> str:
        """Its whole name, in the checkpoint's naming."""
        return f"{self.parent}.{self.name}" if self.parent else self.name


def engine_modules(names: Iterable[str], engine: str) -> list[EngineModule]:
    """The modules that an engine makes of a checkpoint's.

    Args:
        names: All linear modules of the checkpoint; fused experts count as one module.
        engine: One of ``ENGINES``.
    """
    names = list(names)
    present = set(names)
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        members.setdefault(_place(name, present, engine), []).append(name)
    return [EngineModule(parent, part, tuple(held)) for (parent, part), held in members.items()]


def served_algo(module: EngineModule, algos: Algos, engine: str) -> str | None:
    """The algorithm under which an engine serves a module of a checkpoint of several formats.

    Args:
        module: From :func:`engine_modules`, without members that disagree.
        algos: What the checkpoint lists.
        engine: One of ``ENGINES``.
    """
    return _RULES[engine](module, algos)


def is_kept_whole(module: EngineModule, algo: str | None, engine: str) -> bool:
    """Whether an engine keeps a module in 16 bits although the checkpoint's one format covers it.

    SGLang quantizes linears, which its head is not, and no routed experts under W4A16_AWQ
    (``get_quant_method``); TensorRT-LLM makes its head's weights before formats are known
    (``_torch/modules/embedding.py``, ``LMHead``). vLLM leaves towers of images out.
    """
    if engine == "vllm":
        return any(part in module.path for part in _VISION)
    is_left = engine == "sglang" and algo == "W4A16_AWQ" and module.name == _EXPERTS
    return module.name == _HEAD or is_left


def _place(name: str, names: set[str], engine: str) -> tuple[str, str]:
    """Parent and last part of the engine's module that holds a module."""
    parts = name.split(".")
    if _EXPERTS in parts:
        end = parts.index(_EXPERTS)
        return ".".join(parts[:end]), _EXPERTS
    parent, _, part = name.rpartition(".")
    for fused, shards in FUSED[engine]:
        present = [shard for shard in shards if f"{parent}.{shard}" in names]
        if part in shards and len(present) > 1:
            return parent, fused
    return parent, part


def _vllm(module: EngineModule, algos: Algos) -> str | None:
    """vLLM after its pull requests #46756 and #47318: ``quantization/modelopt.py``."""
    algo = _listed(module, algos)
    if algo is None and module.name == _EXPERTS:  # "...moe.experts" listed beside, not below
        algo = _first(algos, lambda key: key.startswith(f"{module.parent}."))
    return algo


def _sglang(module: EngineModule, algos: Algos) -> str | None:
    """SGLang: ``modelopt/schemes/modelopt_mixed_precision.py``."""
    return None if module.name == _HEAD else _listed(module, algos)


def _listed(module: EngineModule, algos: Algos) -> str | None:
    """By its own name, by those of its shards, or by the first name below it.

    Both engines map ``model.language_model.`` to ``language_model.model.`` in the list and in their
    own names, so that the checkpoint's naming can stand for both here.
    """
    if module.path in algos:
        return algos[module.path]
    shards = [algos[member] for member in module.members if member in algos]
    if shards and module.name != _EXPERTS:
        return shards[0]
    return _first(algos, lambda key: key.startswith(f"{module.path}."))


def _trtllm(module: EngineModule, algos: Algos) -> str | None:
    """TensorRT-LLM: ``_torch/models/modeling_utils.py``; names of a language model are its own."""
    if module.name == _HEAD:
        return None
    parent = _without_wrapper(module.parent)
    path = f"{parent}.{module.name}"
    if module.name == _EXPERTS:
        return _first(algos, lambda key: path in key)
    if module.name == "qkv_proj":
        return _first(algos, lambda key: f"{parent}.q_proj" in key)
    if module.name == "gate_up_proj":
        ends = (f"{parent}.gate_proj", f"{parent}.gate_up_proj")
        return _first(algos, lambda key: any(end in key for end in ends))
    return algos.get(path)


def _without_wrapper(parent: str) -> str:
    """``model.language_model.layers.0`` -> ``model.layers.0``: the list keeps the long name."""
    for wrapper in ("model.language_model.", "language_model.model."):
        if parent.startswith(wrapper):
            return "model." + parent.removeprefix(wrapper)
    return parent


def _first(algos: Algos, is_match: Callable[[str], bool]) -> str | None:
    return next((algo for key, algo in algos.items() if is_match(key)), None)


_RULES = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}
