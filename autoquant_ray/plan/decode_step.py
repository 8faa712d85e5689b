"""What a decode step reads and computes besides the groups of the plan, from the skeleton alone.

Kept in ``run.json`` so that a plan's speed can be predicted without the model. Attention is
described by the projections of each decoder layer: what a layer keeps per token is as wide as its
``k_proj`` and ``v_proj``. Layers without them (latent attention, fused projections, recurrent
states) are not described.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.layers import decoder_layers, layer_config
from autoquant_ray.models.quantizable import PlannedModule

if TYPE_CHECKING:
    import torch

_BYTES = 2  # of a 16-bit number
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_NESTED_CONFIGS = ("text_config", "language_config")
NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Where ModelOpt looks for the number of experts in a config."""

_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def is_routed_expert(name: str) -> bool:
    """Whether a module or parameter belongs to experts of which a token visits some.

    ModelOpt's rule (``is_routed_moe_module_name``): below ``experts``, and not a shared expert.
    """
    return "shared_expert" not in name and _EXPERTS.search(name) is not None


def step_facts(
    model: Any, modules: Sequence[PlannedModule], is_idle: Callable[[str], bool]
) -> dict[str, Any]:
    """The ``step`` object of the plan's summary.

    Args:
        model: The skeleton.
        modules: All modules of the plan's groups.
        is_idle: Whether a module is not run while text is decoded (a vision tower).

    Returns:
        ``active_expert_ratio`` (share of the routed experts that a token visits, ModelOpt's own
        ``infer_active_moe_expert_ratio``; None where the config names none), ``other_bytes`` and
        ``other_expert_bytes`` (16-bit bytes outside the groups that a step reads; embeddings, of
        which it reads a row per token, are left out), ``head`` (the output head's name),
        ``layers`` (number of decoder layers), and
        ``attention``: layers of one kind with ``layers`` (their number), ``kv_bytes`` (read per
        cached token by each), ``width`` (of its attended values) and ``window`` (most tokens that
        it looks back; None: all).
    """
    import torch

    planned = {f"{module.path}.{name}" for module in modules for name in module.parameters}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    sizes: Counter[bool] = Counter()
    for name, parameter in model.named_parameters():
        if name not in planned and id(parameter) not in embeddings and not is_idle(name):
            sizes[is_routed_expert(name)] += parameter.numel()
    head = model.get_output_embeddings()
    return {
        "active_expert_ratio": _active_expert_ratio(model),
        "other_bytes": sizes[False] * _BYTES,
        "other_expert_bytes": sizes[True] * _BYTES,
        "head": next((n for n, module in model.named_modules() if module is head), None),
        "layers": len(decoder_layers(model)),
        "attention": _attention(model),
    }


def _active_expert_ratio(model: Any) -> float | None:
    """As ModelOpt says; it is not imported for a model none of whose configs counts experts."""
    parts = [config for m in model.modules() if (config := getattr(m, "config", None)) is not None]
    nested = [getattr(part, name, None) for part in parts for name in _NESTED_CONFIGS]
    configs = {id(config): config for config in (*parts, *nested) if config is not None}.values()
    if not any(hasattr(config, name) for config in configs for name in NUM_EXPERTS):
        return None
    from autoquant_ray.modelopt_api import infer_active_moe_expert_ratio

    ratio: float | None = infer_active_moe_expert_ratio(model)
    return ratio


def _attention(model: Any) -> list[dict[str, Any]]:
    config = model.config.get_text_config()
    kinds: Counter[tuple[int, int, int | None]] = Counter()
    for number, layer in enumerate(decoder_layers(model).values()):
        kept = [shape[0] for shape in _projections(layer, "k_proj", "v_proj")]
        window = _window(layer_config(config, number), number)
        width = sum(shape[1] for shape in _projections(layer, "o_proj", "out_proj"))
        shared = [kind for kind in kinds if kind[1:] == (width, window)]
        if len(kept) == 2:
            kinds[_BYTES * sum(kept), width or kept[1], window] += 1
        elif _projections(layer, "q_proj") and shared:  # reads what an earlier layer keeps
            kinds[shared[-1]] += 1
    return [
        {"layers": count, "kv_bytes": kept, "width": width, "window": window}
        for (kept, width, window), count in kinds.items()
    ]


def _projections(layer: torch.nn.Module, *names: str) -> list[tuple[int, int]]:
    """Weight shapes ``(out, in)`` of a layer's self-attention projections with such last names."""
    return [
        tuple(module.weight.shape)
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in names
        and "cross" not in name
        and "linear_attn" not in name
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
    ]


def _window(config: Any, number: int) -> int | None:
    """Most tokens that a layer looks back, as transformers' configs say it."""
    types = getattr(config, "layer_types", None)
    if types and number < len(types):
        name = _WINDOWS.get(types[number])
        return None if name is None else getattr(config, name, None)
    is_used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if is_used else None
