"""Forward and backward of the decoder, one layer at a time.

The forward pass keeps only each decoder layer's input. The backward pass visits the layers from
last to first, runs a layer again with a graph, and pulls the gradient through it: gradient
checkpointing by hand, so that hooks see exactly one graph-building pass per layer, several
gradients share one recomputation, and nothing of a layer outlives the visit. (PyTorch's gradient
checkpointing stops its recomputation early, and skips modules together with their hooks.) A visit
of a layer serves several steps at once, in both directions: what is prepared for a layer (its
quantized weights above all) is prepared once for all of them.

This is exact only for a plain chain: layer i+1 takes layer i's output unchanged, nothing else
carries a gradient from layer to layer (shared keys and values, per-layer inputs), and no linear
runs outside the layers. :func:`chain_links` and :func:`gradients_agree` check that; any other
model is run with one ordinary graph: same numbers, more memory.

With images a vision tower runs before the layers, and some models add more of its output between
the first ones (DeepStack). What is added is noted on the way in, and added again wherever a layer
runs (:meth:`~autoquant_ray.score.entrance.Pass.entering`). Where the tower itself is scored, it is
run again with a graph at the end, and all gradients at its outputs are pulled through it.

Shape letters: B samples, S positions, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from autoquant_ray.errors import ModelError
from autoquant_ray.models.layers import (
    base_model,
    decoder_layers,
    first_output,
    replaced_forward,
    require_gradient,
)
from autoquant_ray.score.entrance import (
    Call,
    Entrance,
    Gradients,
    Pass,
    call_base,
    needing_text_alone,
    with_gradients,
)
from autoquant_ray.score.rerun.forward_state import ForwardState
from autoquant_ray.score.rerun.kept_products import ProductKeeper, giving, recording
from autoquant_ray.score.residence import Residence, Resident
from autoquant_ray.score.visits import NO_INPUTS, Step

logger = logging.getLogger(__name__)

Within = Callable[[int], AbstractContextManager[object]]
"""Opens what a layer runs in, by its number."""


def nothing_else(_number: int) -> AbstractContextManager[object]:
    """A layer runs as the model has it."""
    return nullcontext()


class LayerwiseBackward:
    """Runs the model without its head, forward and then backward.

    Args:
        model: A causal language model in evaluation mode whose parameters take no gradient.
        residence: Where the weights of its decoder layers live.
        reaches_front: Pull gradients through what precedes the layers too: the vision tower.

    Raises:
        ModelError: The layers are offloaded, but the model is not a plain chain of them; or it
            does not run on text alone.
    """

    def __init__(
        self, model: Any, residence: Residence | None = None, *, reaches_front: bool = False
    ) -> None:
        self.reaches_front = reaches_front
        self.base = base_model(model)
        self.embedding = model.get_input_embeddings()
        self.residence = residence or Resident()
        self.layers = list(decoder_layers(model).values())
        self._state = ForwardState(self.base, self.layers)
        with self._state.first_run(self.base), needing_text_alone(self.base):
            links = chain_links(self)
        self._num_extra_outputs: list[int | None] = links or []
        self._entrance = Entrance(self.base, self.layers, self._state, self._num_extra_outputs)
        self.is_layerwise = bool(links)
        if self.is_layerwise:
            self.is_layerwise = gradients_agree(self)
        if not self.is_layerwise and self.residence.is_offloaded:
            raise ModelError(
                f"{type(model).__name__} is not a plain chain of decoder layers and cannot be "
                "offloaded; give `placement` resident"
            )
        if not self.is_layerwise:
            logger.warning(
                "%s is not a plain chain of decoder layers; scoring keeps one whole graph, which "
                "takes more memory",
                type(model).__name__,
            )

    @torch.no_grad()
    def forward(
        self,
        steps: Sequence[Step],
        *,
        keep: bool,
        before_step: Callable[[Step], None] | None = None,
        after_layer: Callable[[], None] | None = None,
        within: Within = nothing_else,
        num_layers: int | None = None,
        keeper: ProductKeeper | None = None,
    ) -> list[Pass]:
        """Run the decoder layers on several steps, layer by layer, without a graph.

        Does nothing yet where the model is not layerwise; :meth:`finish` does it then.

        Args:
            steps: What to run.
            keep: Keep what :meth:`backward` needs.
            before_step: Called each time before a layer runs on a step.
            after_layer: Called when a layer has run on all steps, while its weights are there.
            within: Opened around each layer by its number, while its weights are there.
            num_layers: Stop after so many; None: all.
            keeper: Keeps products for :meth:`backward`; None: nothing does.
        """
        if not self.is_layerwise:
            return [Pass(step) for step in steps]
        passes = [self.enter(step) for step in steps]
        for number in range(len(self.layers[:num_layers])):
            with self.visit_forward(number), within(number):
                for pass_ in passes:
                    if before_step is not None:
                        before_step(pass_.step)
                    assert pass_.hidden_BSH is not None
                    hidden_BSH = pass_.entering(number, pass_.hidden_BSH)
                    if keep:
                        pass_.inputs.append(hidden_BSH)
                    with recording(keeper, pass_.products, number) as leaving:
                        output_BSH = self.run_layer(number, hidden_BSH, pass_.calls[number])
                        pass_.hidden_BSH = leaving(output_BSH)
                    del hidden_BSH, output_BSH
                if after_layer is not None:
                    after_layer()
        return passes

    @contextmanager
    def holding(self, module: torch.nn.Module) -> Iterator[None]:
        """While open, the weights of one module are on the device."""
        for number, layer in enumerate(self.layers):
            if any(module is part for part in layer.modules()):
                with self.residence.visit(number, None):
                    yield
                return
        yield

    def visit_forward(self, number: int) -> AbstractContextManager[None]:
        """A visit of a layer on the way forward, with the next one read ahead."""
        # The layer after the last one is the last one again: the backward pass starts there.
        return self.residence.visit(number, min(number + 1, len(self.layers) - 1))

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Let each layer's forward pass be a visit of its own."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(replaced_forward(layer, self._visitor(number, layer.forward)))
            yield

    def _visitor(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def visit(*arguments: Any, **keywords: Any) -> Any:
            with self.visit_forward(number):
                return original(*arguments, **keywords)

        return visit

    def finish(self, pass_: Pass, *, with_graph: bool) -> torch.Tensor:
        """Final hidden states ``(B, S, H)``, detached: what follows the layers (a norm), or all.

        Args:
            pass_: From :meth:`forward`.
            with_graph: Prepare for :meth:`backward`.
        """
        with ExitStack() as stack, torch.set_grad_enabled(with_graph):
            if self.is_layerwise:
                assert pass_.hidden_BSH is not None
                pass_.leaf = pass_.hidden_BSH.detach().requires_grad_(with_graph)
                for number, layer in enumerate(self.layers):
                    stack.enter_context(replaced_forward(layer, self._giving(pass_.leaf, number)))
            elif with_graph:
                handle = self.embedding.register_forward_hook(require_gradient)
                stack.callback(handle.remove)
            # What the layers give is there already: no vision tower is needed again.
            step = pass_.step._replace(inputs=NO_INPUTS)
            if not self.is_layerwise:
                step = with_gradients(pass_.step) if self.reaches_front else pass_.step
            output = self.call_base(step)
        pass_.output = output if with_graph else None
        return output.detach()

    def backward(
        self,
        passes: Sequence[Pass],
        gradients: Sequence[Gradients],
        within: Within = nothing_else,
        before_pass: Callable[[int], object] = nothing_else,
    ) -> None:
        """Pull gradients of the loss at the final hidden states through all layers.

        Hooks on module outputs fire once per pass and draw, in this order. Empties the passes.

        Args:
            passes: Finished with a graph, their layer inputs kept.
            gradients: Of each pass.
            within: Opened around each layer by its number, while its weights are there.
            before_pass: Called with the position of a pass each time before it goes on.
        """
        for _ in self.pull_layers(passes, gradients, within, before_pass):
            pass

    def pull_layers(
        self,
        passes: Sequence[Pass],
        gradients: Sequence[Gradients],
        within: Within = nothing_else,
        before_pass: Callable[[int], object] = nothing_else,
    ) -> Iterator[list[Gradients]]:
        """Visit the layers from last to first; yields the gradients at each one's inputs."""
        flowing = []
        for index, (pass_, at_output) in enumerate(zip(passes, gradients, strict=True)):
            before_pass(index)
            assert pass_.output is not None
            leaves = [] if pass_.leaf is None else [pass_.leaf]
            flowing.append(_pull(pass_.output, at_output, leaves))
            pass_.output = pass_.leaf = pass_.hidden_BSH = None
        if not self.is_layerwise:
            return
        at_front: list[dict[int, Gradients]] = [{} for _ in passes]
        for number in reversed(range(len(self.layers))):
            with self.residence.visit(number, max(number - 1, 0)), within(number):
                for index, pass_ in enumerate(passes):
                    before_pass(index)
                    hidden_BSH = pass_.inputs.pop().detach().requires_grad_(True)
                    with torch.enable_grad(), giving(pass_.products.pop(number, None)):
                        output = self.run_layer(number, hidden_BSH, pass_.calls.pop())
                    flowing[index] = _pull(output, flowing[index], [hidden_BSH])
                    del output, hidden_BSH
                    if self.reaches_front and (number == 0 or number in pass_.added):
                        at_front[index][number] = flowing[index]
            yield flowing
        if self.reaches_front:
            for index, (pass_, gradients_at) in enumerate(zip(passes, at_front, strict=True)):
                before_pass(index)
                self._entrance.pull(pass_.step, gradients_at)

    def call_base(self, step: Step) -> torch.Tensor:
        """Run the whole base model; its final hidden states ``(B, S, H)``."""
        with self._state.undone(self.base):
            return call_base(self.base, step)

    def run_layer(self, number: int, hidden_BSH: torch.Tensor, call: Call) -> torch.Tensor:
        """Output ``(B, S, H)`` of a layer whose weights are there.

        Args:
            number: The layer's.
            hidden_BSH: Its input.
            call: What it is called with beside that.
        """
        layer, (arguments, keywords) = self.layers[number], call
        with self._state.undone(layer):
            return first_output(layer(hidden_BSH, *arguments, **keywords))

    def check_entrance(self, steps: Iterable[Step]) -> None:
        """Check what precedes the layers; called while nothing watches.

        See :meth:`~autoquant_ray.score.entrance.Entrance.check`.
        """
        if self.is_layerwise:
            self._entrance.check(steps)

    def enter(self, step: Step) -> Pass:
        """Run what precedes the layers.

        See :meth:`~autoquant_ray.score.entrance.Entrance.enter`.
        """
        return self._entrance.enter(step)

    def _giving(self, states_BSH: torch.Tensor, number: int) -> Callable[..., Any]:
        """A layer's forward that computes nothing, and gives out these states."""
        extra = self._num_extra_outputs[number]
        output = states_BSH if extra is None else (states_BSH, *[None] * extra)
        return lambda *_, **__: output


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
        call_base(backward.base, _probe(backward))
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
        (pass_,) = backward.forward([_probe(backward)], keep=True)
        hidden_BSH = backward.finish(pass_, with_graph=True)
        gradient = torch.randn(hidden_BSH.shape, generator=generator).to(hidden_BSH)
        flowing = backward.pull_layers([pass_], [[gradient]])
        layerwise = [gradients[0][0] for gradients in flowing][::-1]
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
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
