"""AWQ's scales of input channels, and the candidates that its search compares.

A candidate ``alpha`` gives the scale ``mean|x|^alpha / importance^(1 - alpha)`` of each channel
(Lin et al. 2023, https://arxiv.org/abs/2306.00978, section 3.2, in the form of ``awq_lite`` in
ModelOpt 0.47). The weight is multiplied by it before it is quantized, the input divided. Of all
candidates the one with the smallest squared output error is taken, the first of equals.

ModelOpt's AWQ and SmoothQuant divide weights in place, a tied embedding included. Its AWQ search
runs with fused experts already quantized, and ``mtq.auto_quantize`` calibrates AWQ on a quarter of
its calibration steps: comparisons with it must allow for that.

Where factors are folded, all linears that read an input share them, as if they were one linear with
the rows of all: their importance is that of all rows, their error the sum. One candidate more,
:data:`PLAIN`, has factors of 1.

Shape letters: I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from autoquant_ray.formats.algorithms import ALPHA_STEP
from autoquant_ray.formats.format import Attributes
from autoquant_ray.plan.fold import Fold
from autoquant_ray.quantize.folding import tied_mean

Losses = dict[tuple[str, str, float], float]
"""(module, format, alpha) -> sum of squared output errors over real tokens; of factors that are
folded estimated from some rows."""

PLAIN = -1.0
"""Candidate of shared factors that leaves an input as it is."""

_SMALLEST, _LARGEST = 1e-4, 1e4


def candidate_alphas(algorithm: Attributes | None) -> list[float]:
    """ModelOpt's candidates, in its order and with its float32 values."""
    step = (algorithm or {}).get("alpha_step") or ALPHA_STEP
    return [float(alpha) for alpha in torch.arange(0, 1.0 + step, step)]


def weight_importance(weight_OI: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    """Mean over rows of ``|w|`` relative to the largest of its block, float32 ``(I,)``.

    Args:
        weight_OI: A linear's weight; the arithmetic stays in its dtype, as in ModelOpt.
        attributes: Of the weight quantizer; without blocks along the input, ModelOpt takes the
            whole row as one.
    """
    columns = weight_OI.shape[1]
    size = (attributes.get("block_sizes") or {}).get(-1) or columns
    magnitude_OI = torch.nn.functional.pad(weight_OI.abs(), (0, -columns % size))
    blocks = magnitude_OI.unflatten(1, (-1, size))
    smallest = torch.finfo(weight_OI.dtype).tiny
    relative = blocks / (blocks.amax(dim=2, keepdim=True) + smallest)
    return relative.flatten(1)[:, :columns].mean(dim=0).float()


def channel_scales(mean_I: torch.Tensor, importance_I: torch.Tensor, alpha: float) -> torch.Tensor:
    """Factors of the weight's columns under a candidate, float32 ``(I,)``."""
    smallest = torch.finfo(torch.float32).tiny
    scale_I = mean_I.pow(alpha) / (importance_I.pow(1 - alpha) + smallest)
    scale_I = scale_I.clamp(min=_SMALLEST, max=_LARGEST)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def shared_importance(weights: Sequence[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    """:func:`weight_importance` of all rows of several weights, float32 ``(I,)``.

    Args:
        weights: ``(O, I)`` of all linears that read an input, in the order of its fold.
        attributes: Of their weight quantizers.
    """
    return weight_importance(torch.cat(list(weights)), attributes)


def shared_factors(
    fold: Fold, importance_I: torch.Tensor, mean_I: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Factors of an input's channels that can be folded, float32 ``(I,)``.

    Args:
        fold: The input; channels that one row makes get equal factors, by the mean of what they
            are made from.
        importance_I: From :func:`shared_importance`.
        mean_I: Mean of ``|x|`` over real tokens.
        alpha: The candidate.
    """
    if alpha == PLAIN:
        return torch.ones_like(mean_I, dtype=torch.float32)
    return channel_scales(tied_mean(fold, mean_I), tied_mean(fold, importance_I), alpha)


def merge_losses(parts: Iterable[Losses]) -> Losses:
    """Sum in float64, in the order of the parts; keys sorted."""
    merged: Losses = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = merged.get(key, 0.0) + value
    return dict(sorted(merged.items()))


def shared_losses(losses: Losses, folds: Mapping[str, Fold], formats: Collection[str]) -> Losses:
    """Losses of single linears -> under some formats, those of all that read the same input.

    Args:
        losses: Merged over all shards.
        folds: Linear -> fold of its input.
        formats: Names of formats whose factors are shared.
    """
    return {
        (module, format_, alpha): sum(
            losses[reader, format_, alpha] for reader in folds[module].readers
        )
        if format_ in formats
        else loss
        for (module, format_, alpha), loss in losses.items()
    }


def best_alphas(losses: Losses) -> dict[tuple[str, str], float]:
    """(module, format) -> candidate with the smallest loss; of equals, the smallest candidate."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for (module, format_, alpha), loss in losses.items():
        candidate = (loss, alpha)
        best[module, format_] = min(best.get((module, format_), candidate), candidate)
    return {key: alpha for key, (_, alpha) in best.items()}


def loss_rows(losses: Losses) -> list[dict[str, Any]]:
    """Rows of ``search.parquet``; :func:`losses_of` is the inverse."""
    return [
        {"module": module, "format": format_, "alpha": alpha, "loss": loss}
        for (module, format_, alpha), loss in losses.items()
    ]


def losses_of(table: Any) -> Losses:
    """Losses from a table with the columns of ``search.parquet``."""
    *keys, values = (table.column(name).to_pylist() for name in table.column_names)
    return dict(zip(zip(*keys, strict=True), values, strict=True))
