"""How an engine finds the format of each of its modules: its own rules, played through on names.

An engine builds modules of its own, some of which hold several modules of the checkpoint, and looks
each up among the names that the checkpoint lists. A module that is not found is served in 16 bits
without a word, whatever its bytes are. The rules are those of ``_resolve_quant_algo`` (vLLM 0.33.0
and SGLang 0.5.23), ``apply_layerwise_quant_config`` (TensorRT-LLM) and, for checkpoints of
compressed-tensors, ``find_matched_target`` (vLLM 0.33.0); sources stand beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from autoquant_ray.serving.table import COMPRESSED_TENSORS, FUSED, MODELOPT

Algos = Mapping[str, str]
"""Module of the checkpoint -> its ``quant_algo``; only the quantized ones, in their order."""

EXPERTS = "experts"
_HEAD = "lm_head"
_WRAPPERS = ("model.language_model.", "language_model.model.")
_VISION = ("visual", "vision_tower", "vision_model")


@dataclass(frozen=True)
class EngineModule:
    """A module of an engine.

    Attributes:
        parent: What stands before its name in the checkpoint's naming, without a dot at its end.
        name: Its own last part.
        members: Modules of the checkpoint that it holds.
        is_wrapped: The checkpoint's language model is within a wrapper.
        is_missing_parts: The checkpoint has not all of the modules that it may hold.
    """

    parent: str
    name: str
    members: tuple[str, ...]
    is_wrapped: bool = False
    is_missing_parts: bool = False

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
    shards = {(fused, part): len(parts) for fused, parts in FUSED[engine] for part in parts}
    is_wrapped = any(name.startswith(_WRAPPERS) for name in names)
    return [
        EngineModule(
            parent,
            part,
            tuple(held),
            is_wrapped,
            len(held) < shards.get((part, held[0].rpartition(".")[2]), 0),
        )
        for (parent, part), held in members.items()
    ]


def served_algo(
    module: EngineModule, algos: Algos, engine: str, layout: str = MODELOPT
) -> str | None:
    """The algorithm under which an engine serves a module of a checkpoint that lists its layers.

    Args:
        module: From :func:`engine_modules`, without members that disagree.
        algos: What the checkpoint lists.
        engine: One of ``ENGINES``.
        layout: Of the checkpoint.
    """
    if layout == COMPRESSED_TENSORS:
        return _compressed(module, algos)
    return _RULES[engine](module, algos)


def is_kept_whole(module: EngineModule, engine: str, algo: str) -> bool:
    """Whether an engine keeps a module in 16 bits although the checkpoint's one format covers it.

    TensorRT-LLM makes its head's weights before formats are known (``_torch/modules/embedding.py``,
    ``LMHead``); SGLang's head takes the linears' branch, which ``Fp8Config`` of ``fp8.py`` does not
    have, by which it reads MXFP8 alone. vLLM leaves towers of images out.

    Args:
        module: Of the engine.
        engine: One of ``ENGINES``.
        algo: The one format.
    """
    if engine == "vllm":
        return any(part in module.path for part in _VISION)
    is_kept = engine == "trtllm" or (engine == "sglang" and algo == "MXFP8")
    return is_kept and module.name == _HEAD


def _place(name: str, names: set[str], engine: str) -> tuple[str, str]:
    """Parent and last part of the engine's module that holds a module."""
    parts = name.split(".")
    if EXPERTS in parts:
        end = parts.index(EXPERTS)
        return ".".join(parts[:end]), EXPERTS
    parent, _, part = name.rpartition(".")
    for fused, shards in FUSED[engine]:
        present = [shard for shard in shards if f"{parent}.{shard}" in names]
        if part in shards and len(present) > 1:
            return parent, fused
    return parent, part


def missing_parts(names: Iterable[str], kept: Iterable[str]) -> list[str]:
    """What vLLM's fused modules would hold beside layers in 16 bits, if the checkpoint had it.

    Args:
        names: All linear modules of the checkpoint.
        kept: Those in 16 bits.
    """
    present, missing = set(names), []
    for name in kept:
        parent, _, part = name.rpartition(".")
        for _, shards in FUSED["vllm"]:
            others = [f"{parent}.{shard}" for shard in shards]
            if part in shards and sum(other in present for other in others) > 1:
                missing += [other for other in others if other not in present]
    return list(dict.fromkeys(missing))


def _vllm(module: EngineModule, algos: Algos) -> str | None:
    """vLLM after its pull requests #46756 and #47318: ``quantization/modelopt.py``."""
    algo = _listed(module, algos)
    if algo is None and module.name == EXPERTS:  # "...moe.experts" listed beside, not below
        algo = _first(algos, lambda key: key.startswith(f"{module.parent}."))
    return algo


def _sglang(module: EngineModule, algos: Algos) -> str | None:
    """SGLang: ``modelopt_quant.py``, ``ModelOptMixedPrecisionConfig``."""
    return _listed(module, algos)


def _compressed(module: EngineModule, algos: Algos) -> str | None:
    """vLLM's compressed-tensors: all parts of a fused module must be listed, and the first counts.

    Names without a dot are not mapped to those of a wrapper's parts (``apply_vllm_mapper``), so
    that such a model's head is not found. Experts have the scheme of the first of them.
    """
    if any(part in module.path for part in _VISION):
        return None
    if module.path == _HEAD and module.is_wrapped:
        return None
    if module.is_missing_parts:
        return None
    return _listed(module, algos)


def _listed(module: EngineModule, algos: Algos) -> str | None:
    """By its own name, by those of its shards, or by the first name below it.

    Both engines map ``model.language_model.`` to ``language_model.model.`` in the list and in their
    own names, so that the checkpoint's naming can stand for both here.
    """
    if module.path in algos:
        return algos[module.path]
    shards = [algos[member] for member in module.members if member in algos]
    if shards and module.name != EXPERTS:
        return shards[0]
    return _first(algos, lambda key: key.startswith(f"{module.path}."))


def _trtllm(module: EngineModule, algos: Algos) -> str | None:
    """TensorRT-LLM: ``_torch/models/modeling_utils.py``; names of a language model are its own."""
    if module.name == _HEAD:
        return None
    parent = _without_wrapper(module.parent)
    path = f"{parent}.{module.name}"
    if module.name == EXPERTS:
        return _first(algos, lambda key: path in key)
    if module.name == "qkv_proj":
        return _first(algos, lambda key: f"{parent}.q_proj" in key)
    if module.name == "gate_up_proj":
        ends = (f"{parent}.gate_proj", f"{parent}.gate_up_proj")
        return _first(algos, lambda key: any(end in key for end in ends))
    return algos.get(path)


def _without_wrapper(parent: str) -> str:
    """``model.language_model.layers.0`` -> ``model.layers.0``: the list keeps the long name."""
    for wrapper in _WRAPPERS:
        if parent.startswith(wrapper):
            return "model." + parent.removeprefix(wrapper)
    return parent


def _first(algos: Algos, is_match: Callable[[str], bool]) -> str | None:
    return next((algo for key, algo in algos.items() if is_match(key)), None)


_RULES = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}
