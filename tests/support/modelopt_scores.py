"""What ModelOpt itself gives: scores of ``mtq.auto_quantize``, models of ``mtq.quantize``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.utils import named_hparams

from autoquant_ray.plan import VISION_PATTERNS

NOTHING = [{"quantizer_name": "*", "enable": False}]
"""Entries of a configuration that quantizes nothing; more may follow."""


def next_token_loss(model: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens."""
    logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, ids_BS[:, 1:].flatten())


def modelopt_scores(
    model: Any, batches: Sequence[torch.Tensor], presets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Group -> preset -> score, of one search over all presets.

    ``auto_quantize`` reports scores clamped along its formats; here each format's own sum is read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        searched, _ = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 15.0},
            quantization_formats=[getattr(mtq, preset) for preset in presets],
            data_loader=batches,
            forward_step=lambda model, ids_BS: next_token_loss(model, ids_BS),
            loss_func=lambda loss, _: loss,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            disabled_layers=list(VISION_PATTERNS),
            verbose=False,
        )
    return {
        name.removesuffix(".quant_recipe"): {
            preset: hparam.get_score(recipe)
            for recipe in hparam.choices
            for preset in presets
            if str(recipe).startswith(preset)
        }
        for name, hparam in named_hparams(searched, unique=True)
        if name.endswith(".quant_recipe") and len(hparam.choices) > 1
    }


def quantized_by_modelopt(
    model: Any, batches: Sequence[torch.Tensor], entries: Sequence[dict[str, Any]]
) -> Any:
    """A copy of the model, quantized and calibrated on the batches.

    Args:
        model: Stays as it is.
        batches: Token ids ``(B, S)``.
        entries: The configuration's ``quant_cfg``.
    """

    def run(copied: Any) -> None:
        for ids_BS in batches:
            copied(input_ids=ids_BS, use_cache=False)

    config = {"quant_cfg": list(entries), "algorithm": "max"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(copy.deepcopy(model), config, run).requires_grad_(False)
