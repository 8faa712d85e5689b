"""Folds the factors of an input into the weights around it, so that nothing is left of them.

Shape letters: I in features, O out features, P output channels of what makes the input.
"""

from __future__ import annotations

from typing import Any

import torch

from autoquant_ray.errors import ModelError
from autoquant_ray.plan.fold import ROWS, SHIFTED_NORM, Fold


@torch.no_grad()
def fold_factors(model: torch.nn.Module, fold: Fold, factors_I: torch.Tensor) -> None:
    """Multiply the weights of all linears that read an input, and divide what makes it.

    The model's outputs stay the same, up to rounding.

    Args:
        model: Loaded; it is changed in place.
        fold: The input.
        factors_I: Positive; equal where the fold has one row for several channels.

    Raises:
        ModelError: A weight that would be multiplied is the input embedding too.
    """
    embedding: Any = model.get_input_embeddings()
    for name in fold.readers:
        weight_OI: Any = model.get_submodule(name).weight
        if weight_OI is getattr(embedding, "weight", None):
            raise ModelError(
                f"{name} has the input embedding's weight, which takes no factors; give it a copy"
            )
        weight_OI.copy_((weight_OI.float() * factors_I.to(weight_OI.device)).to(weight_OI.dtype))
    divide_producer(model, fold, factors_I)


@torch.no_grad()
def divide_producer(model: torch.nn.Module, fold: Fold, factors_I: torch.Tensor) -> None:
    """Divide the channels of what makes an input, in place.

    Args:
        model: Loaded.
        fold: The input.
        factors_I: As above.
    """
    module: Any = model.get_submodule(fold.producer)
    weight = module.weight
    divisor_P = producer_divisor(fold, factors_I, len(weight)).to(weight.device)
    shift = 1.0 if fold.kind == SHIFTED_NORM else 0.0
    by_row = divisor_P[:, None] if fold.kind == ROWS else divisor_P
    weight.copy_(((weight.float() + shift) / by_row - shift).to(weight.dtype))
    divide_bias(module, divisor_P)


@torch.no_grad()
def divide_bias(module: Any, divisor_P: torch.Tensor | None) -> None:
    """Divide a bias, where there is one, in place; None divides nothing."""
    bias = getattr(module, "bias", None)
    if bias is not None and divisor_P is not None:
        bias.copy_((bias.float() / divisor_P.to(bias.device)).to(bias.dtype))


def divide_maxima(quantizer: Any, divisor_O: torch.Tensor) -> None:
    """Divide the maxima of a weight's quantizer as the weight's rows, which keep their numbers.

    Args:
        quantizer: Calibrated; its maxima are per row or per block of a row.
        divisor_O: Of each row.
    """
    largest = quantizer.amax
    by_row = divisor_O[:, None].to(largest.device)
    divided = largest.float().reshape(len(by_row), -1) / by_row
    quantizer.amax = divided.reshape(largest.shape).to(largest.dtype)


def producer_divisor(fold: Fold, factors_I: torch.Tensor, num_channels: int) -> torch.Tensor:
    """What each output channel of a fold's producer is divided by, float32 ``(P,)``.

    Args:
        fold: The input.
        factors_I: Of its channels.
        num_channels: P.
    """
    divisor_P = torch.ones(num_channels)
    divisor_P[torch.tensor(fold.rows(len(factors_I)))] = factors_I.float().cpu()
    return divisor_P


def tied_mean(fold: Fold, values_I: torch.Tensor) -> torch.Tensor:
    """The mean of the channels that one row makes, for each of them; float32 ``(I,)``.

    Args:
        fold: The input.
        values_I: A number per channel.
    """
    if fold.repeat == 1:
        return values_I
    by_head = values_I.float().reshape(-1, fold.repeat, fold.width)
    return by_head.mean(dim=1, keepdim=True).expand_as(by_head).reshape(-1)
