"""What precedes the decoder layers: embeddings, and a vision tower where there are images.

It runs with the layers' forward replaced, so that the layers compute nothing. Some models add more
of the tower's output between the first layers (DeepStack); what they add is noted. Where the tower
itself is scored, gradients are pulled through it here.

The first step with images runs the vision tower again, for a check of the model. A sum over tokens
must count each token once, so :meth:`Entrance.check` does that before anything watches (a maximum
would not change, a sum does).

Shape letters: B samples, S positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.layers import replaced_forward
from autoquant_ray.score.rerun.forward_state import ForwardState
from autoquant_ray.score.rerun.kept_products import LayerProducts
from autoquant_ray.score.visits import NO_INPUTS, Step

_MOST_OF_ERROR = 250  # characters

Gradients = list[torch.Tensor]
"""One tensor ``(B, S, H)`` per label draw."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer beside the hidden states."""


@dataclass
class Pass:
    """One step between its forward and its backward pass.

    Attributes:
        step: What is run.
        calls: Arguments of each decoder layer beside the hidden states.
        given: What the layers return while :meth:`Entrance.enter` runs.
        added: What comes on top of the output of the layer before, by the layer that it enters.
        inputs: Input of each layer, ``(B, S, H)``, where they are kept.
        hidden_BSH: Output of the last layer that ran.
        leaf: The same with a gradient, between ``finish`` and the backward pass.
        output: Final hidden states with their graph, for as long.
        products: Products that are kept of layers that ran, by the layer's number.
    """

    step: Step
    calls: list[Call] = field(default_factory=list)
    given: torch.Tensor | None = None
    added: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: list[torch.Tensor] = field(default_factory=list)
    hidden_BSH: torch.Tensor | None = None
    leaf: torch.Tensor | None = None
    output: torch.Tensor | None = None
    products: dict[int, LayerProducts] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer inputs."""
        return sum(hidden.nbytes for hidden in (*self.inputs, *self.added.values()))

    def entering(self, number: int, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Input of a layer, from the output of the one before."""
        if number not in self.added:
            return hidden_BSH
        return hidden_BSH + self.added[number].to(hidden_BSH.device)  # a split model has several


def call_base(base: torch.nn.Module, step: Step) -> torch.Tensor:
    """Run a whole base model; its final hidden states ``(B, S, H)``."""
    ids_BS, mask_BS, inputs = step
    output = base(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, **inputs)
    hidden: torch.Tensor = output[0]
    return hidden


@contextmanager
def needing_text_alone(base: torch.nn.Module) -> Iterator[None]:
    """Name the model that does not run here, instead of what stopped in the middle of it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(base).__name__} does not run on text alone and cannot be scored: "
            f"{one_line(error, _MOST_OF_ERROR)}"
        ) from error


def with_gradients(step: Step) -> Step:
    """The step with pixels at which gradients arrive, so that they pass the vision tower."""
    inputs = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in step.inputs.items()
    }
    return step._replace(inputs=inputs)


class Entrance:
    """Runs what precedes the decoder layers of a model.

    Args:
        base: The model without its head.
        layers: Its decoder layers.
        state: What the model keeps between runs.
        num_extra_outputs: Of each layer, beside the hidden states; None where these are alone.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        state: ForwardState,
        num_extra_outputs: Sequence[int | None],
    ) -> None:
        self._base = base
        self._state = state
        self._layers = layers
        self._num_extra_outputs = num_extra_outputs
        self._is_checked = False

    def enter(self, step: Step) -> Pass:
        """Run what precedes the layers, and note the arguments of each layer's call.

        Raises:
            ModelError: With images, the model does more between its layers than to add to their
                output.
        """
        if not step.inputs:
            return self._enter(step, None)[0]
        pass_, final_BSH = self._enter(step, 0.0)
        if not self._is_checked:
            self._require_sums(pass_, final_BSH)
            self._is_checked = True
        return pass_

    @torch.no_grad()
    def check(self, steps: Iterable[Step]) -> None:
        """Run the check that :meth:`enter` makes on its first step with images, ahead of time.

        The check runs the tower several times, which watchers must not count.

        Args:
            steps: Read up to the first with images; not at all after a check.

        Raises:
            ModelError: As :meth:`enter`.
        """
        if self._is_checked:
            return
        first = next((step for step in steps if step.inputs), None)
        if first is not None:
            self.enter(first)

    def _enter(self, step: Step, value: float | None) -> tuple[Pass, torch.Tensor]:
        """As :meth:`enter`; each layer returns its own input, or a tensor filled with a value.

        With a value, the input of a layer is noted where it is not the very tensor returned before.

        Returns:
            The pass, and what the model makes of the last layer's output.
        """
        pass_ = Pass(step)
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stack.enter_context(replaced_forward(layer, self._noting(pass_, number, value)))
            stack.enter_context(self._state.undone(self._base))
            final_BSH = call_base(self._base, step)
        pass_.given = None
        return pass_, final_BSH

    def _require_sums(self, zeros: Pass, final_BSH: torch.Tensor) -> None:
        """Check that what was noted is added to a layer's output, and nothing to the last."""
        ones, _ = self._enter(zeros.step, 1.0)
        _, plain_BSH = self._enter(zeros.step._replace(inputs=NO_INPUTS), 0.0)
        pairs = [(ones.added[n], 1 + zeros.added[n]) for n in ones.added if n in zeros.added]
        pairs.append((final_BSH, plain_BSH))
        is_same = all(torch.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in pairs)
        if not is_same or set(ones.added) != set(zeros.added):
            raise ModelError(
                f"{type(self._base).__name__} cannot be scored with images: it does more to what "
                "its layers give out than adding to it; give data without images"
            )

    def pull(self, step: Step, gradients_at: Mapping[int, Gradients]) -> None:
        """Pull the gradients at all that entered the layers through what precedes them.

        Args:
            step: With images; without, nothing that precedes the layers takes a gradient.
            gradients_at: By the layer that it entered.
        """
        if not step.inputs:
            return
        step = with_gradients(step)
        with torch.enable_grad():
            front, _ = self._enter(step, 0.0)
        assert front.hidden_BSH is not None
        entered = front.added | {0: front.hidden_BSH}
        numbers = [number for number, states in entered.items() if states.requires_grad]
        pixels = [tensor for tensor in step.inputs.values() if tensor.requires_grad]
        num_draws = len(gradients_at[0])
        for draw in range(num_draws):
            torch.autograd.grad(
                [entered[number] for number in numbers],
                pixels,
                [gradients_at[number][draw].to(entered[number].device) for number in numbers],
                retain_graph=draw < num_draws - 1,
            )

    def _noting(self, pass_: Pass, number: int, value: float | None) -> Callable[..., Any]:
        """A layer's forward that computes nothing, and notes what it is called with."""
        extra = self._num_extra_outputs[number]

        def forward(hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            pass_.calls.append((arguments, keywords))
            if number == 0:
                pass_.hidden_BSH = hidden_states
            elif value is not None and hidden_states is not pass_.given:
                pass_.added[number] = hidden_states
            if value is None:
                pass_.given = hidden_states
            elif number == 0:
                pass_.given = torch.full_like(hidden_states, value, requires_grad=False)
            return pass_.given if extra is None else (pass_.given, *[None] * extra)

        return forward
