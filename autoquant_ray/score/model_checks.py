"""What the scoring core assumes of a loaded model, checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.context import plain_context
from autoquant_ray.models.quantizable import has_plain_forward
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.score.backward import LayerwiseBackward
from autoquant_ray.score.loss import VocabularyLoss
from autoquant_ray.score.visits import make_step

_PREFIX = (1, 2, 3, 4, 5, 1, 2)
_ENDINGS = ((3, 4, 5, 1, 2), (5, 5, 4, 3, 1))
"""Token ids; none is 0, which pads."""
_LARGEST, _LARGEST_IN_FEW_BITS = 1e-4, 0.02
_ABOVE_NOISE = 4
_MOST_OF_ERROR = 250  # characters

logger = logging.getLogger(__name__)


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
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be scored: its head does not run on the output of its "
            f"decoder alone ({one_line(error)})"
        ) from None


def require_gradients(backward: LayerwiseBackward) -> None:
    """Check that a model that is run as one graph gives gradients in evaluation mode.

    Reformer, which does not keep what its layers give, has none.

    Args:
        backward: Runs the model; nothing watches.

    Raises:
        ModelError: It gives none.
    """
    if backward.is_layerwise:
        return
    step = make_step([_ids(backward, _PREFIX)], backward.embedding.weight.device)
    try:
        passes = backward.forward([step], keep=True)
        hidden_BSH = backward.finish(passes[0], with_graph=True)
        backward.backward(passes, [[torch.ones_like(hidden_BSH)]])
    except AssertionError as error:
        raise ModelError(
            f"{type(backward.base).__name__} gives no gradients in evaluation mode and cannot be "
            f"scored: {one_line(error, _MOST_OF_ERROR)}"
        ) from error


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


def joint_context(model: Any, backward: LayerwiseBackward) -> int | None:
    """Tokens up to which a sample may share a step with samples of another length; None: all may.

    Args:
        model: The model.
        backward: Runs it; nothing watches.

    Raises:
        ModelError: The model is not causal.
    """
    return plain_context(model.config) if _pads_exactly(backward) else 0


@torch.no_grad()
def _pads_exactly(backward: LayerwiseBackward) -> bool:
    """Whether a sample that is padded beside a longer one is answered as it is alone.

    Runs of another shape differ in their last bits, of which some models make more (HRM); with
    numbers of few bits, a step without padding shows how much. The tokens are few and fixed, so all
    workers find the same.

    Args:
        backward: Runs the model; nothing watches it.

    Raises:
        ModelError: Not even a longer sample's first tokens are: the model attends to later tokens.
    """
    device, kind = backward.embedding.weight.device, type(backward.base).__name__
    prefix, *both = (_ids(backward, [*_PREFIX, *ending]) for ending in ((), *_ENDINGS))
    steps = [make_step(samples, device) for samples in ([prefix], both, [prefix, both[1]])]
    passes = backward.forward(steps, keep=False)
    alone, together, padded = (backward.finish(pass_, with_graph=False) for pass_ in passes)
    prefixes_BSH = [states[0, : len(prefix)].float() for states in (alone, together, padded)]
    has_few_bits = alone.dtype != torch.float32
    largest = _LARGEST_IN_FEW_BITS if has_few_bits else _LARGEST
    of_ending = _difference(together[1, : len(prefix)].float(), prefixes_BSH[1])
    if of_ending > largest:
        raise ModelError(
            f"{kind} is not causal: what it makes of a token depends on the tokens after it (by "
            f"{of_ending:.0%}), so its loss on text says nothing of how it writes; it cannot be "
            "scored"
        )
    noise, difference = (_difference(states, prefixes_BSH[0]) for states in prefixes_BSH[1:])
    if difference <= max(largest, _ABOVE_NOISE * noise if has_few_bits else 0.0):
        return True
    logger.warning(
        "%s answers a sample otherwise where it is padded (by %.1g): each step holds samples of "
        "equal length",
        kind,
        difference,
    )
    return False


def _ids(backward: LayerwiseBackward, ids: Sequence[int]) -> list[int]:
    """Ids that the vocabulary has."""
    return [token % backward.embedding.weight.shape[0] for token in ids]


def _difference(states: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what is expected."""
    size = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(states - expected) / size)
