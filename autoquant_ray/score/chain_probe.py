"""Is a model a plain chain of decoder layers? Two checks on a probe of a few tokens.

:func:`chain_links` looks at which tensor goes where, :func:`gradients_agree` compares the gradients
at every layer's input with those of one ordinary graph.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from autoquant_ray.models.layers import first_output, require_gradient
from autoquant_ray.score.step import Step

if TYPE_CHECKING:
    from autoquant_ray.score.backward import LayerwiseBackward

_PROBE_TOKENS = 6
_PROBE_TOLERANCE = 0.02


def chain_links(backward: LayerwiseBackward) -> list[int | None] | None:
    """Check that each layer takes the very output of the one before, and no linear runs outside.

    Returns:
        None if not. Else per layer how many outputs it has beside the hidden states; None where it
        returns these alone.
    """
    outputs: list[Any] = []
    inputs: list[torch.Tensor] = []
    outside: list[torch.nn.Module] = []
    inside = {module for layer in backward.layers for module in layer.modules()}

    def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.append(arguments[0] if arguments else keywords["hidden_states"])

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(backward.visiting())
        for layer in backward.layers:
            handle = layer.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            handle = layer.register_forward_hook(lambda _, __, out: outputs.append(out))
            stack.callback(handle.remove)
        for module in backward.base.modules():
            if isinstance(module, torch.nn.Linear) and module not in inside:
                handle = module.register_forward_hook(lambda m, _, __: outside.append(m))
                stack.callback(handle.remove)
        backward.call_base(_probe(backward))
    if len(outputs) != len(backward.layers) or outside:
        return None
    links = zip(outputs[:-1], inputs[1:], strict=True)
    if not all(first_output(out) is into for out, into in links):
        return None
    return [len(out) - 1 if isinstance(out, tuple) else None for out in outputs]


def gradients_agree(backward: LayerwiseBackward) -> bool:
    """Whether layer by layer and one ordinary graph give the same gradients on a probe."""
    generator = torch.Generator().manual_seed(0)
    try:
        (one,) = backward.forward([_probe(backward)], keep=True)
        hidden_BSH = backward.finish(one, with_graph=True)
        gradient = torch.randn(hidden_BSH.shape, generator=generator).to(hidden_BSH)
        flowing = backward.pull_layers([one], [[gradient]])
        layerwise = [gradients[0][0] for gradients in flowing][::-1]
    except (RuntimeError, TypeError, ValueError, AttributeError):
        # A layer run again found what an earlier run had changed, or needs an extra output.
        return False
    whole = _whole_graph_gradients(backward, gradient)
    return len(whole) == len(layerwise) and all(
        _is_close(ours, theirs) for ours, theirs in zip(layerwise, whole, strict=True)
    )


def _whole_graph_gradients(
    backward: LayerwiseBackward, gradient_BSH: torch.Tensor
) -> list[torch.Tensor]:
    inputs: list[torch.Tensor] = []

    def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.append(arguments[0] if arguments else keywords["hidden_states"])
        inputs[-1].retain_grad()

    with ExitStack() as stack, torch.enable_grad():
        stack.callback(backward.embedding.register_forward_hook(require_gradient).remove)
        for layer in backward.layers:
            handle = layer.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(backward.visiting())
        stack.enter_context(backward.residence.saving_names())
        backward.call_base(_probe(backward)).backward(gradient_BSH)
    return [hidden.grad for hidden in inputs if hidden.grad is not None]


def _probe(backward: LayerwiseBackward) -> Step:
    count = min(_PROBE_TOKENS, backward.embedding.weight.shape[0])
    return Step(torch.arange(count, device=backward.embedding.weight.device)[None])


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    difference = torch.linalg.vector_norm((ours - theirs).float())
    return bool(difference <= _PROBE_TOLERANCE * torch.linalg.vector_norm(theirs.float()))
