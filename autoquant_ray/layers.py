"""Which modules of a model are its decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def decoder_layers(model: Any) -> dict[str, torch.nn.Module]:
    """The decoder layers with their dotted names, in order; empty if the model has no list of them.

    Args:
        model: A causal language model, loaded or a skeleton.
    """
    import torch

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, torch.nn.ModuleList):
            names = {id(module): full for full, module in model.named_modules()}
            return {names[id(layer)]: layer for layer in layers}
    return {}
