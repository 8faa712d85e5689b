"""Which modules of a model are its decoder layers, and small tools to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

    decoder = text_decoder(model)
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, torch.nn.ModuleList):
            names = {id(module): full for full, module in model.named_modules()}
            return {names[id(layer)]: layer for layer in layers}
    return {}


def layer_configs(config: Any) -> list[Any]:
    """What a config says of each decoder layer, or itself alone where it says the same of all.

    From 5.18 on, transformers lets sizes differ between layers (Gemma 4's heads), and raises where
    such a size is read of the whole.
    """
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return [config.per_layer_config[number] for number in range(config.num_hidden_layers)]


def layer_config(config: Any, number: int | None) -> Any:
    """What a config says of a decoder layer; itself where the layer has no number."""
    is_of_all = number is None or not getattr(config, "is_heterogeneous", False)
    return config if is_of_all else config.per_layer_config[number]


def set_decoder_layers(model: Any, layers: Iterable[torch.nn.Module]) -> None:
    """Give a model, which has decoder layers, others in their place."""
    import torch

    path, _, attribute = next(iter(decoder_layers(model))).rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(path), attribute, torch.nn.ModuleList(layers))


def keep_first_of_kind(model: Any) -> None:
    """Leave as many of a model's first decoder layers as have one of each kind."""
    kinds: dict[frozenset[tuple[str, type]], int] = {}
    layers = [*decoder_layers(model).values()]
    for number, layer in enumerate(layers):
        kinds.setdefault(frozenset((name, type(m)) for name, m in layer.named_modules()), number)
    if kinds:
        set_decoder_layers(model, layers[: 1 + max(kinds.values())])


def base_model(model: Any) -> Any:
    """What runs before the head; where the class names no such part (Llama 4), what embeds."""
    owner = head_owner(model)
    if owner.base_model is not owner:
        return owner.base_model
    embedding = model.get_input_embeddings()
    return next(part for part in owner.children() if embedding in set(part.modules()))


def text_decoder(model: Any) -> Any:
    """What runs text in the base model; some classes call it and pass the base model by.

    A class that has none gives itself, or what bears that name: ModernBERT's decoder is its head.
    """
    owner = head_owner(model)
    decoder = owner.get_decoder() if hasattr(owner, "get_decoder") else owner
    is_none = decoder is owner or decoder is owner.get_output_embeddings()
    return base_model(model) if is_none else decoder


def head_owner(model: Any) -> Any:
    """The innermost module that runs the head: the model, or a language model inside it."""
    head = model.get_output_embeddings()
    owners = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    return [owner for owner in owners if owner.get_output_embeddings() is head][-1]


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another ``forward`` while the context is open."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original


def first_output(output: Any) -> torch.Tensor:
    """The hidden states of a layer's output, which may be a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def require_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook that lets gradients begin at a module's output.

    Some models change in place what their embedding gives, which a leaf of the graph does not let.
    """
    return output.detach().requires_grad_(True).clone()
