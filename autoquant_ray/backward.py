"""Forward and backward of the decoder, one layer at a time.

The forward pass keeps only each decoder layer's input. The backward pass visits the layers from
last to first, runs a layer again with a graph, and pulls the gradient through it: gradient
checkpointing by hand, so that hooks see exactly one graph-building pass per layer, several
gradients share one recomputation, and nothing of a layer outlives the visit.

A model whose layers do not form a plain chain (layer i+1 takes layer i's output unchanged) is run
with one ordinary graph instead: same numbers, more memory.

Shape letters: B samples, S positions, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass
class _LayerCall:
    layer: torch.nn.Module
    hidden_BSH: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class LayerwiseBackward:
    """Runs the model without its head, forward and then backward.

    Args:
        model: A causal language model in evaluation mode whose parameters take no gradient.
    """

    def __init__(self, model: Any) -> None:
        self._base = model.base_model
        self._embedding = model.get_input_embeddings()
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else self._base
        self._layers = list(getattr(decoder, "layers", []))
        self._calls: list[_LayerCall] = []
        self._output: torch.Tensor | None = None
        self._last_layer_output: torch.Tensor | None = None
        self.is_layerwise = len(self._layers) > 0 and self._is_chain(model)
        if not self.is_layerwise:
            logger.warning(
                "%s is not a plain chain of decoder layers; scoring keeps one whole graph, which "
                "takes more memory",
                type(model).__name__,
            )

    @torch.no_grad()
    def run_base(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
        """Final hidden states ``(B, S, H)`` without a graph, for calibration."""
        return self._call_base(ids_BS, mask_BS)

    def forward(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
        """Run the base model and remember what the backward pass needs.

        Args:
            ids_BS: Token ids, int64.
            mask_BS: 1 for real tokens, 0 for padding on the right; None if all are real.

        Returns:
            Final hidden states ``(B, S, H)``, detached.
        """
        self._calls.clear()
        if self.is_layerwise:
            with self._recording(), torch.enable_grad():
                self._output = self._call_base(ids_BS, mask_BS)
        else:
            handle = self._embedding.register_forward_hook(_require_gradient)
            try:
                with torch.enable_grad():
                    self._output = self._call_base(ids_BS, mask_BS)
            finally:
                handle.remove()
        return self._output.detach()

    def backward(self, gradients_BSH: list[torch.Tensor]) -> None:
        """Pull gradients of the loss at the final hidden states through all layers.

        Args:
            gradients_BSH: One tensor ``(B, S, H)`` per label draw. Hooks on module outputs fire
                once per draw, in this order.
        """
        assert self._output is not None
        if not self.is_layerwise:
            _pull(self._output, gradients_BSH, [])
            self._output = None
            return
        assert self._last_layer_output is not None
        gradients = _pull(self._output, gradients_BSH, [self._last_layer_output])
        self._output = self._last_layer_output = None
        while self._calls:
            call = self._calls.pop()
            hidden_BSH = call.hidden_BSH.detach().requires_grad_(True)
            with torch.enable_grad():
                output = call.layer(hidden_BSH, *call.arguments, **call.keywords)
            gradients = _pull(_first(output), gradients, [hidden_BSH])

    def _call_base(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
        output = self._base(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        hidden: torch.Tensor = output[0]
        return hidden

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let each layer run without a graph, and note its call."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced_forward(layer, self._recorder(layer, layer.forward)))
            yield

    def _recorder(self, layer: torch.nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def record(hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            self._calls.append(_LayerCall(layer, hidden_states, arguments, keywords))
            with torch.no_grad():
                output = original(hidden_states, *arguments, **keywords)
            if layer is not self._layers[-1]:
                return output
            leaf = _first(output).detach().requires_grad_(True)
            self._last_layer_output = leaf
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        return record

    def _is_chain(self, model: Any) -> bool:
        outputs: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []

        def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else keywords["hidden_states"])

        def after(_: Any, __: Any, output: Any) -> None:
            outputs.append(_first(output))

        handles = []
        for layer in self._layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        device = self._embedding.weight.device
        try:
            self.run_base(torch.zeros(1, 2, dtype=torch.long, device=device), None)
        finally:
            for handle in handles:
                handle.remove()
        links = zip(outputs[:-1], inputs[1:], strict=True)
        return len(outputs) == len(self._layers) and all(out is into for out, into in links)


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


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _require_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_(True)


def _pull(
    output: torch.Tensor, gradients: list[torch.Tensor], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradients at the single input, one per gradient at ``output``; frees the graph."""
    pulled = []
    for position, gradient in enumerate(gradients):
        keep = position < len(gradients) - 1
        if inputs:
            pulled.extend(torch.autograd.grad(output, inputs, gradient, retain_graph=keep))
        else:
            torch.autograd.backward(output, gradient, retain_graph=keep)
    return pulled
