"""Scores by their definition: ``mtq.quantize`` makes the quantized modules, autograd the gradients.

Each quantized module runs on the exact model's inputs; the graph is one ordinary graph.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from modelopt_scores import NOTHING, next_token_loss, of_text, quantized_by_modelopt

from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import plain_attentions
from autoquant_ray.models.layers import require_gradient
from autoquant_ray.plan.group import PlannedGroup


def autograd_scores(
    model: Any,
    batches: Sequence[torch.Tensor],
    groups: Sequence[PlannedGroup],
    formats: Sequence[Format],
) -> dict[str, dict[str, float]]:
    """Group -> format -> score."""
    group_of = {module.name: group.name for group in groups for module in group.modules}
    calls = [_calls(model, set(group_of), ids_BS) for ids_BS in batches]
    scores = {group.name: dict.fromkeys((f.name for f in formats), 0.0) for group in groups}
    for format_ in formats:
        entries = [
            entry
            for group in groups
            for module in group.modules
            for prefix in module.quantizer_prefixes
            for entry in quantizer_entries(f"{module.name}.{prefix}", format_)
        ]
        with plain_attentions():
            quantized = quantized_by_modelopt(model, batches, [*NOTHING, *entries])
        for call in itertools.chain(*calls):
            with torch.no_grad():
                changed = quantized.get_submodule(call.module)(*call.arguments, **call.keywords)
            score = ((changed - call.output) * call.gradient).double().square().sum()
            scores[group_of[call.module]][format_.name] += float(score)
    return scores


@dataclasses.dataclass
class _Call:
    """One call of a module, and the gradient of the loss at its output."""

    module: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor
    gradient: Any = None


def _calls(model: Any, names: set[str], ids_BS: torch.Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def keep(name: str, _: Any, arguments: Any, keywords: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:  # of a constant input, as Zaya's first delayed value
            return
        # A model may add to the output in place.
        call = _Call(name, arguments, keywords, output.detach().clone())
        output.register_hook(lambda gradient: setattr(call, "gradient", gradient))
        calls.append(call)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True)
        for name in names
    ]
    handles.append(model.get_input_embeddings().register_forward_hook(require_gradient))
    with torch.enable_grad():
        next_token_loss(model, of_text(ids_BS)).backward()
    for handle in handles:
        handle.remove()
    return calls
