"""Which modules of a model are its decoder layers, and small tools to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another ``forward`` while the context is open."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def first_output(output: Any) -> torch.Tensor:
    """The hidden states of a layer's output, which may be a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def require_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook that lets gradients begin at a module's output."""
    return output.detach().requires_grad_(True)
