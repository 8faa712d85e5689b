"""What ModelOpt itself gives: scores of ``mtq.auto_quantize``, models of ``mtq.quantize``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.opt.utils import named_hparams

from autoquant_ray.models.quantizable import TOWER_PATTERNS

NOTHING = [{"quantizer_name": "*", "enable": False}]
"""Entries of a configuration that quantizes nothing; more may follow."""


Batch = tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]
"""Token ids, which of them count in the loss (None: all), what the model takes beside them."""


def of_text(ids_BS: torch.Tensor) -> Batch:
    """A batch of plain text."""
    return ids_BS, None, {}


def language_model(model: Any) -> Any:
    """What runs text alone: the whole language model inside of one that cannot, as BLIP-2."""
    parts = (getattr(model, name, None) for name in ("language_model", "text_model"))
    return next((part for part in parts if isinstance(part, transformers.GenerationMixin)), model)


def next_token_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the next tokens."""
    ids_BS, in_loss_BS, inputs = batch
    runs = model if inputs else language_model(model)
    logits = runs(input_ids=ids_BS, use_cache=False, **inputs).logits[:, :-1].flatten(0, 1).float()
    targets = ids_BS[:, 1:].flatten()
    if in_loss_BS is not None:
        targets = torch.where(in_loss_BS[:, 1:].flatten(), targets, -100)
    return torch.nn.functional.cross_entropy(logits, targets)


def summed_by_step(scorer: Any, shards: Sequence[Any], calibration: Any) -> Any:
    """Our sums as ModelOpt's search adds up its own, ``(groups, formats)``: a shard is a step, and
    its loss a mean over tokens.

    Args:
        scorer: Ours.
        shards: Samples of each.
        calibration: Merged calibration.
    """
    scored = [scorer.score(shard, 0, calibration) for shard in shards]
    return sum(scores.sums.elementwise_GF / scores.num_tokens**2 for scores in scored)


def modelopt_scores(
    model: Any, batches: Sequence[Batch], presets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Group -> preset -> score, of one search over all presets.

    ``auto_quantize`` reports scores clamped along its formats; here each format's own sum is read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        searched, _ = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 15.99},  # of all weights, most may be left out
            quantization_formats=[getattr(mtq, preset) for preset in presets],
            data_loader=batches,
            forward_step=next_token_loss,
            loss_func=lambda loss, _: loss,
            num_calib_steps=4 * len(batches),  # AWQ takes a quarter of them
            num_score_steps=len(batches),
            disabled_layers=list(TOWER_PATTERNS),
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


def scores_of_config(model: Any, batches: Sequence[Batch], config: Any) -> dict[str, float]:
    """Group -> score of a search over one configuration; the model is changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 15.0},
            quantization_formats=[config],
            data_loader=batches,
            forward_step=next_token_loss,
            loss_func=lambda loss, _: loss,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            verbose=False,
        )
    return {
        name.removesuffix(".quant_recipe"): stats["scores"][0]
        for name, stats in state["candidate_stats"].items()
        if len(stats["scores"]) == 2
    }


def quantized_by_modelopt(
    model: Any,
    batches: Sequence[torch.Tensor],
    entries: Sequence[dict[str, Any]],
    algorithm: Any = "max",
) -> Any:
    """A copy of the model, quantized and calibrated on the batches.

    Args:
        model: Stays as it is.
        batches: Token ids ``(B, S)``.
        entries: The configuration's ``quant_cfg``.
        algorithm: The configuration's ``algorithm``.
    """

    def run(copied: Any) -> None:
        for ids_BS in batches:
            language_model(copied)(input_ids=ids_BS, use_cache=False)

    config = {"quant_cfg": list(entries), "algorithm": algorithm}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(copy.deepcopy(model), config, run).requires_grad_(False)
