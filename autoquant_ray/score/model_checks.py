"""What the scoring core assumes of a loaded model, checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.quantizable import has_plain_forward
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.score.loss import VocabularyLoss


@torch.no_grad()
def require_head(model: Any, loss: VocabularyLoss) -> None:
    """Check that the model's own forward turns finished hidden states into logits.

    Raises:
        ModelError: Its forward does something that the slices of the loss do not provide.
    """
    weight = model.get_output_embeddings().weight
    hidden_nH = weight.new_zeros(2, weight.shape[1])
    try:
        loss.logits(hidden_nH)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be scored: its head does not run on the output of its "
            f"decoder alone ({one_line(error)})"
        ) from None


@torch.no_grad()
def require_linears(
    model: torch.nn.Module,
    modules: Sequence[ScoredModule],
    holding: Callable[[torch.nn.Module], AbstractContextManager[None]],
) -> None:
    """Check that linears with a forward of their own compute a linear's product.

    Args:
        model: The model.
        modules: What will be scored.
        holding: Brings a module's weights to the device.

    Raises:
        ModelError: A linear does not; the message names it.
    """
    for scored in modules:
        module: Any = model.get_submodule(scored.planned.path)
        if scored.planned.kind != "linear" or has_plain_forward(module):
            continue
        with holding(module):
            row = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
            expected = torch.nn.functional.linear(row, module.weight, module.bias)
            is_linear = torch.allclose(module(row), expected, rtol=1e-2, atol=1e-4)
        if not is_linear:
            name = scored.planned.name
            raise ModelError(
                f"{name} ({type(module).__name__}) is a linear with a forward of its own; "
                f"`disable` {name}"
            )
