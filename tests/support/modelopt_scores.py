"""Scores of ModelOpt's own ``mtq.auto_quantize``, to compare ours with."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import torch

Batch = tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]
"""Token ids, which of them count in the loss (None: all), what the model takes beside them."""


def modelopt_scores(model: Any, batches: list[Batch], preset: str) -> dict[str, float]:
    """Scores of one format, searched alone so that ModelOpt's clamp cannot act."""

    def forward_step(model: Any, batch: Batch) -> Any:
        ids, _, inputs = batch
        return model(input_ids=ids, use_cache=False, **inputs)

    def loss_func(output: Any, batch: Batch) -> torch.Tensor:
        ids, in_loss, _ = batch
        logits, targets = output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        if in_loss is not None:
            targets = torch.where(in_loss[:, 1:].flatten(), targets, -100)
        return torch.nn.functional.cross_entropy(logits, targets)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 15.0},
            quantization_formats=[getattr(mtq, preset)],
            data_loader=batches,
            forward_step=forward_step,
            loss_func=loss_func,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            disabled_layers=["*visual*"],
            verbose=False,
        )
    return {
        name.removesuffix(".quant_recipe"): stats["scores"][0]
        for name, stats in state["candidate_stats"].items()
        if len(stats["scores"]) == 2
    }
