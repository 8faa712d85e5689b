"""Scores of ModelOpt's ``mtq.auto_quantize``, as it measures them, before it clamps them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.utils import named_hparams


def next_token_loss(model: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens."""
    logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, ids_BS[:, 1:].flatten())


def modelopt_scores(
    model: Any, batches: list[torch.Tensor], presets: tuple[str, ...]
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
            disabled_layers=["*visual*", "*vision_tower*"],
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
