"""Forward and backward of the decoder, one layer at a time.

The forward pass keeps only each decoder layer's input. The backward pass visits the layers from
last to first, runs a layer again with a graph, and pulls the gradient through it: gradient
checkpointing by hand, so that hooks see exactly one graph-building pass per layer, several
gradients share one recomputation, and nothing of a layer outlives the visit.

This is exact only for a plain chain: layer i+1 takes layer i's output unchanged, nothing else
carries a gradient from layer to layer (shared keys and values, per-layer inputs), and no linear
runs before the layers. A probe of a few tokens checks that, comparing the gradients at every
layer's input with those of one ordinary graph; any other model is run with one ordinary graph:
same numbers, more memory.

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

_PROBE_TOKENS = 6
_PROBE_TOLERANCE = 0.02


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
        self._layers = _decoder_layers(decoder)
        self._calls: list[_LayerCall] = []
        self._output: torch.Tensor | None = None
        self._last_layer_output: torch.Tensor | None = None
        self.is_layerwise = len(self._layers) > 0 and self._is_chain()
        if self.is_layerwise:
            self.is_layerwise = self._gradients_agree()
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
        for _ in self._pull_layers(gradients):
            pass

    def _pull_layers(self, gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Visit the layers from last to first; yields the gradients at each one's input."""
        while self._calls:
            call = self._calls.pop()
            hidden_BSH = call.hidden_BSH.detach().requires_grad_(True)
            with torch.enable_grad():
                output = call.layer(hidden_BSH, *call.arguments, **call.keywords)
            gradients = _pull(_first(output), gradients, [hidden_BSH])
            yield gradients

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

    def _is_chain(self) -> bool:
        """Whether each layer takes the very output of the one before, and no linear runs first."""
        outputs: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []
        outside: list[torch.nn.Module] = []
        inside = {module for layer in self._layers for module in layer.modules()}

        def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else keywords["hidden_states"])

        with ExitStack() as stack:
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                handle = layer.register_forward_hook(lambda _, __, out: outputs.append(_first(out)))
                stack.callback(handle.remove)
            for module in self._base.modules():
                if isinstance(module, torch.nn.Linear) and module not in inside:
                    handle = module.register_forward_hook(lambda m, _, __: outside.append(m))
                    stack.callback(handle.remove)
            self.run_base(self._probe_ids(), None)
        links = zip(outputs[:-1], inputs[1:], strict=True)
        is_complete = len(outputs) == len(self._layers) and not outside
        return is_complete and all(out is into for out, into in links)

    def _gradients_agree(self) -> bool:
        """Whether layer by layer and one ordinary graph give the same gradients on a probe."""
        ids_BS = self._probe_ids()
        output = self.forward(ids_BS, None)
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(output.shape, generator=generator).to(output)
        assert self._output is not None
        assert self._last_layer_output is not None
        try:
            top = _pull(self._output, [gradient], [self._last_layer_output])
            layerwise = [pulled[0] for pulled in self._pull_layers(top)][::-1]
        except RuntimeError:  # a layer run again found what an earlier run had changed
            return False
        finally:
            self._calls.clear()
            self._output = self._last_layer_output = None
        whole = self._whole_graph_gradients(ids_BS, gradient)
        return len(whole) == len(layerwise) and all(
            _is_close(ours, theirs) for ours, theirs in zip(layerwise, whole, strict=True)
        )

    def _whole_graph_gradients(
        self, ids_BS: torch.Tensor, gradient_BSH: torch.Tensor
    ) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []

        def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else keywords["hidden_states"])
            inputs[-1].retain_grad()

        with ExitStack() as stack, torch.enable_grad():
            stack.callback(self._embedding.register_forward_hook(_require_gradient).remove)
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            self._call_base(ids_BS, None).backward(gradient_BSH)
        return [hidden.grad for hidden in inputs if hidden.grad is not None]

    def _probe_ids(self) -> torch.Tensor:
        count = min(_PROBE_TOKENS, self._embedding.weight.shape[0])
        return torch.arange(count, device=self._embedding.weight.device)[None]


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


def _decoder_layers(decoder: Any) -> list[torch.nn.Module]:
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, torch.nn.ModuleList):
            return list(layers)
    return []


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    difference = torch.linalg.vector_norm((ours - theirs).float())
    return bool(difference <= _PROBE_TOLERANCE * torch.linalg.vector_norm(theirs.float()))


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
