"""Opens GGUF files; what they say of a model, against the config that transformers makes of it.

transformers 5.14 reads a list of metadata for each architecture and leaves the others at the
defaults of the family: Phi-3's sliding window, the widths of Qwen's experts, the size of Qwen3's
heads. Here every entry that changes what a model computes is set, or refused where the family has
no such thing. Names of the metadata are those of the GGUF specification and of llama.cpp
(``src/llama-arch.cpp``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.wording import shown

Parameters = Mapping[str, Any]
"""Name without the architecture -> value."""

_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.key_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "logit_scale": ("logit_scale",),
    "attention.clamp_kqv": ("clip_qkv",),
}
"""Entry of the metadata -> how configs name it."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
"""Values that say no more than a model without the entry does. Of entries that have none here,
those in ``_ATTRIBUTES`` are refused with every value, the others are not looked at."""

_NEEDLESS = frozenset({"expert_feed_forward_length", "expert_shared_feed_forward_length"})
"""Entries of sizes that a family may have under other names: wrong ones do not fit the tensors."""

_SAME = 1e-3  # relative; files hold float32


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The reader of a file, to be used within the context; making it takes seconds.

    Raises:
        ModelError: The file cannot be read, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(f"GGUF file {file} needs the package gguf: pip install gguf") from None
    try:
        yield gguf.GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"GGUF file {file} cannot be read: {one_line(error)}") from None


def apply_parameters(config: Any, parameters: Parameters) -> None:
    """Set what transformers left at a default.

    Args:
        config: As transformers made it of a file; changed in place.
        parameters: Of the file.

    Raises:
        ModelError: The file says what the family of transformers does not have.
    """
    text = config.get_text_config()
    for name in {**_ATTRIBUTES, **_NEUTRAL}:
        value = parameters.get(name)
        if value is None or _says_nothing(name, value, text, parameters):
            continue
        place = next((a for a in _ATTRIBUTES.get(name, ()) if hasattr(text, a)), None)
        if place is None:
            raise ModelError(
                f"GGUF metadata: {name} is {shown(value)}, which {text.model_type} of transformers "
                "does not have; convert the model to safetensors"
            )
        before = getattr(text, place)
        if not _is_same(before, value):
            setattr(text, place, type(before)(value) if isinstance(before, int | float) else value)


def require_single_file(split: Parameters) -> None:
    """Check that a file is no part of a model, of which transformers reads no other.

    Args:
        split: What it says under ``split``.

    Raises:
        ModelError: It is.
    """
    if (count := split.get("count", 0)) > 1:
        raise ModelError(
            f"it is part {split.get('no', 0) + 1} of {count} of a GGUF model, which transformers "
            "does not read; join them: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )


def _says_nothing(name: str, value: Any, config: Any, parameters: Parameters) -> bool:
    """Whether an entry is of no consequence for this model."""
    if not isinstance(value, bool | int | float):
        return True  # of each layer: read with the layers, or by shapes
    if value in _NEUTRAL.get(name, ()):
        return True
    head = _head_size(config)
    if name == "attention.scale":
        return head is not None and _is_same(value, 1 / math.sqrt(head))
    if name == "attention.sliding_window":
        is_off = getattr(config, "use_sliding_window", True) is False
        return is_off or value <= 0 or value >= parameters.get("context_length", math.inf)
    if name == "attention.key_length":
        # Gemma 4 has two sizes, which transformers reads.
        return hasattr(config, "global_head_dim") or _is_same(value, head)
    return name in _NEEDLESS and not any(hasattr(config, a) for a in _ATTRIBUTES[name])


def _head_size(config: Any) -> int | None:
    size = getattr(config, "head_dim", None)
    if size is None and getattr(config, "num_attention_heads", None):
        size = config.hidden_size // config.num_attention_heads
    return size


def _is_same(before: Any, value: Any) -> bool:
    if before is None:
        return False
    return bool(before == value) or math.isclose(before, value, rel_tol=_SAME)
