"""Which attentions keep keys and values that ModelOpt can quantize, and what a token takes there.

ModelOpt wraps attentions of transformers whose module calls the attention interface
(``register_hf_attentions_on_the_fly``). Left out are those whose cache holds something else than
what its quantizers see: latent attention (DeepSeek), which caches what keys and values are made of;
layers that read an earlier layer's cache; states that are no keys and values (Mamba, linear
attention), which ModelOpt does not wrap, or wraps and never calls; a run of few tokens shows which
it calls. Vision towers keep no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from autoquant_ray.errors import ModelError
from autoquant_ray.formats.format import Format
from autoquant_ray.models.layers import layer_config
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.reach import called_caches

_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
_FUSED = ("qkv_proj", "query_key_value", "qkv", "c_attn")


def cache_modules(
    model: Any,
    formats: Sequence[Format],
    modules: Sequence[PlannedModule],
    is_idle: Callable[[str], bool],
) -> list[PlannedModule]:
    """The attentions whose keys and values can be quantized, in the model's order.

    Args:
        model: The skeleton, or a loaded model.
        formats: The menu; without formats of the KV cache there are none.
        modules: All others that can be quantized.
        is_idle: Whether a module does not run on text.

    Raises:
        ModelError: There are such formats, and the model has no such attention.
    """
    asked = [format_.name for format_ in formats if format_.kv is not None]
    if not asked:
        return []
    from autoquant_ray.modelopt_api import has_cache_quantizers

    caches = []
    for name, module in model.named_modules():
        if is_idle(name) or not has_cache_quantizers(module):
            continue
        cached = _cached_shapes(module, model.config.get_text_config())
        if cached is not None:
            caches.append(
                PlannedModule(name=name, kind="attention", parameters=(), shapes=(), cached=cached)
            )
    called = called_caches(model, modules, [cache.name for cache in caches])
    caches = [cache for cache in caches if cache.name in called]
    if not caches:
        raise ModelError(
            f"{type(model).__name__} has no attention whose cached keys and values ModelOpt can "
            f"quantize; leave {', '.join(asked)} out of the formats"
        )
    return caches


def _cached_shapes(module: Any, config: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """``(heads, width)`` of the keys and of the values that a token adds; None: it adds none."""
    parts = dict(module.named_children())
    if any(name in parts for name in _LATENT) or getattr(module, "is_kv_shared_layer", False):
        return None
    if "past_key_values" not in inspect.signature(type(module).forward).parameters:
        return None
    of_layer = layer_config(getattr(module, "config", config), getattr(module, "layer_idx", None))
    width = getattr(module, "head_dim", None) or getattr(of_layer, "head_dim", None)
    width = int(width or of_layer.hidden_size // of_layer.num_attention_heads)
    keys, values = (getattr(parts.get(n), "out_features", None) for n in ("k_proj", "v_proj"))
    if keys is None:
        if not any(name in parts for name in _FUSED):
            return None
        heads = getattr(module, "num_key_value_heads", None) or of_layer.num_key_value_heads
        return (heads, width), (heads, width)
    heads = keys // width
    # Some models take the keys for values too, and have no projection of their own for them.
    return (heads, width), (heads, (values or keys) // heads)
