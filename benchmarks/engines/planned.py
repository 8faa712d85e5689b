"""A solution as it was measured: the model with the quantizers that ``evaluate`` runs.

Shape letters: W windows of text, S tokens of a window, T rows of inputs, I in features, O out
features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.export.source import Source
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.modules import UNQUANTIZED, QuantizedLayers
from autoquant_ray.quantize.weight_cache import WeightCache

Array = np.ndarray[Any, Any]


@contextmanager
def planned_model(source: Source, moved: float = 0.0) -> Iterator[Any]:
    """The run's model under a solution, as ``evaluate`` quantizes it; nothing is in 16 bits.

    Args:
        source: The solution.
        moved: Weights that are not quantized change by this relative amount, at random.
    """
    scan = ScanConfig.model_validate(source.state.record.config)
    model: Any = load_model(find_model(scan.model), dtype=scan.dtype, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and source.owner(name) is None:
                parameter *= 1 + moved * torch.randn_like(parameter)
    menu = resolve_formats(scan.formats, device="cpu", custom=scan.custom_formats)
    modules = scored_modules(build_plan(model, menu, scan.disable))
    index = {format_.name: number for number, format_ in enumerate(menu)}
    chosen = {
        scored.group: index[source.formats[scored.planned.name].name]
        if scored.planned.name in source.formats
        else UNQUANTIZED
        for scored in modules
    }
    choice = tuple(chosen[group] for group in sorted(chosen))
    layers = QuantizedLayers(model, [], modules, menu, calibration_of(source.state))
    with layers.quantized(0, choice, WeightCache(2**40)), torch.no_grad():
        yield model


def window_logits(model: Any, ids_WS: Array) -> Array:
    """Logits of windows of tokens, ``(W, S, V)``."""
    with torch.no_grad():
        logits = [model(torch.from_numpy(row)[None]).logits[0] for row in ids_WS]
    return torch.stack(logits).float().numpy()


def text_log_probs(logits_WSV: Array, ids_WS: Array) -> Array:
    """Log-probabilities of each window's next tokens, ``(W, S - 1)``, in nats."""
    log_probs = torch.from_numpy(logits_WSV).double().log_softmax(-1)[:, :-1]
    following = torch.from_numpy(ids_WS)[:, 1:, None]
    return log_probs.gather(-1, following)[..., 0].numpy()
