"""Collects the gradients at a module's output until the module can be scored.

A forward pass is followed by one backward pass per draw of labels. When the gradients of all draws
are there, the module is scored with what it was called with. Until then a model may change the
module's output in place (it adds a residual to it), but not its input: that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autoquant_ray.errors import changed_input
from autoquant_ray.score.drawing.row_sampling import name_seed
from autoquant_ray.score.drawing.rows import as_rows

OnGradients = Callable[[torch.Tensor | None, list[torch.Tensor], tuple[int, ...]], None]
"""Scores a module: its output if that is still as it was, gradients of all draws, seed of rows."""

Inputs = tuple[torch.Tensor, ...]
"""What a module was called with, as rows, without graphs."""


class GradientBook:
    """The gradients of one module.

    Args:
        name: The module's.
        label: What leaves it out of the search; with the seed it seeds the draws of rows.
        num_draws: Backward passes that follow each forward pass.
        seed: Non-negative integers.
        hides_output: Score the module without its output, as if that had been changed.
    """

    def __init__(
        self,
        name: str,
        label: str,
        num_draws: int,
        seed: tuple[int, ...],
        *,
        hides_output: bool = False,
    ) -> None:
        self._hides_output = hides_output
        self._name = name
        self._label = label
        self._num_draws = num_draws
        self._seed = (*seed, name_seed(label))
        self._num_calls = 0

    def forward_hook(self, score_of: Callable[[Inputs], OnGradients]) -> Callable[..., None]:
        """A forward hook with keywords that scores each call of the module whose output is tensors.

        Args:
            score_of: Called at each call, in their order; gives what scores it later.
        """

        def hook(
            _: torch.nn.Module,
            arguments: tuple[Any, ...],
            keywords: dict[str, Any],
            output: torch.Tensor,
        ) -> None:
            if not output.requires_grad:
                return
            inputs = tuple(as_rows(value.detach()) for value in (*arguments, *keywords.values()))
            self.open(output, as_rows(output.detach()), inputs, score_of(inputs))

        return hook

    def open(
        self,
        output: torch.Tensor,
        kept: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        score: OnGradients,
    ) -> None:
        """Score a call of the module as soon as the gradients at its output are there.

        Args:
            output: What the module gave, with its graph.
            kept: The same without.
            inputs: What it was called with, without graphs.
            score: Called without recording a graph; may empty the list of gradients.
        """
        versions = [tensor._version for tensor in (kept, *inputs)]
        gradients: list[torch.Tensor] = []

        def on_gradient(gradient: torch.Tensor) -> None:
            gradients.append(as_rows(gradient))
            if len(gradients) < self._num_draws:
                return
            seed = (*self._seed, self._num_calls)
            self._num_calls += 1
            kept_version, *input_versions = [tensor._version for tensor in (kept, *inputs)]
            if input_versions != versions[1:]:
                raise changed_input(self._name, self._label)
            is_usable = kept_version == versions[0] and not self._hides_output
            with torch.no_grad():
                score(kept if is_usable else None, gradients, seed)
            gradients.clear()

        output.register_hook(on_gradient)
