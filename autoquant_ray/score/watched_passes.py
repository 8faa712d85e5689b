"""Forward passes of whole steps while something watches the inputs of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from autoquant_ray.score.backward import LayerwiseBackward
from autoquant_ray.score.entrance import Pass
from autoquant_ray.score.loss import VocabularyLoss
from autoquant_ray.score.rerun.kept_products import ProductKeeper
from autoquant_ray.score.visits import Step


class Watcher(Protocol):
    """Hooks that watch the inputs of modules, and that must know which tokens are real."""

    def set_mask(self, mask_BS: torch.Tensor | None) -> None:
        """Say which tokens of the next batch are real (1); None means all."""

    def settle(self) -> None:
        """All steps have run through some modules, whose weights are still at hand."""


def run_watched(
    layerwise: LayerwiseBackward,
    head: VocabularyLoss,
    steps: Sequence[Step],
    watcher: Watcher,
    *,
    keep: bool = False,
    num_layers: int | None = None,
    keeper: ProductKeeper | None = None,
) -> list[Pass]:
    """Run steps through the layers and into the head, whose output is not computed.

    Args:
        layerwise: Runs the model.
        head: Of the model.
        steps: Of one visit.
        watcher: Its hooks are in place.
        keep: Keep what the backward pass needs.
        num_layers: Stop after so many layers, where the model can be run layer by layer; more than
            there are, or None: run all of it.
        keeper: Keeps products for the backward pass; None: nothing does.
    """
    stops = layerwise.is_layerwise and (num_layers or len(layerwise.layers) + 1) <= len(
        layerwise.layers
    )
    passes: list[Pass] = layerwise.forward(
        steps,
        keep=keep,
        before_step=lambda step: watcher.set_mask(step.mask_BS),
        after_layer=watcher.settle,
        num_layers=num_layers if stops else None,
        keeper=keeper,
    )
    for pass_ in [] if stops else passes:
        mask_BS = pass_.step.mask_BS
        watcher.set_mask(mask_BS)
        hidden_BSH = layerwise.finish(pass_, with_graph=False)
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        real: Any = slice(None)
        if mask_BS is not None:
            real = mask_BS.reshape(-1).bool().to(hidden_TH.device)
        watcher.set_mask(None)
        head.feed_head(hidden_TH[real])
        if not layerwise.is_layerwise:
            watcher.settle()  # all modules of this step
    watcher.settle()
    return passes
