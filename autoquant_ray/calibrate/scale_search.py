"""AWQ's search on a shard: the squared output error of every linear under every candidate.

The inputs of a layer's linears are gathered while steps run forward, and evaluated just before the
visit of the layer ends: each candidate's weight is then quantized once for all steps of the visit.
The losses of steps are added in their order, so that the grouping of steps changes no number.
Linears that read one input and share its factors have a loss each, under the same candidates.

Factors that are folded are judged by some rows of each weight.

Shape letters: T rows (tokens), I in features, O out features, R some of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from autoquant_ray.calibrate.input_rows import InputRows
from autoquant_ray.errors import not_finite
from autoquant_ray.formats.format import Format, attributes_key
from autoquant_ray.formats.smoothed import needs_search, takes_factors
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.awq import (
    PLAIN,
    Losses,
    candidate_alphas,
    channel_scales,
    shared_factors,
    shared_importance,
    weight_importance,
)
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.input_factors import candidate_error, shared_error, squared_norm


class ScaleSearch:
    """Measures candidates while batches run forward.

    Args:
        model: The model.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu; a module without a format that needs a search is left alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
    ) -> None:
        self._modules: dict[str, torch.nn.Module] = {}
        self._menus: dict[str, list[list[Format]]] = {}
        for scored in modules:
            by_candidates: dict[str, list[Format]] = {}
            for format_ in scored.menu(formats):
                if needs_search(format_) and scored.planned.kind == "linear":
                    by_candidates.setdefault(_candidates_key(format_), []).append(format_)
            if by_candidates:
                name = scored.planned.name
                self._modules[name] = model.get_submodule(name)
                self._menus[name] = list(by_candidates.values())
        self._model = model
        self._layers = layers
        self._calibration = Calibration()
        self._rows = InputRows()
        self._gathered: dict[str, list[torch.Tensor]] = {}
        self._losses: Losses = {}

    @property
    def token_bytes(self) -> int:
        """Bytes per token of the gathered inputs of the layer that has most of them."""
        number_of = {m: n for n, layer in enumerate(self._layers) for m in layer.modules()}
        sizes: dict[int, int] = {}
        for module in self._modules.values():
            number = number_of.get(module, -1)
            sizes[number] = sizes.get(number, 0) + module.weight[0].nbytes
        return max(sizes.values(), default=0)

    @contextmanager
    def searching(self, calibration: Calibration) -> Iterator[None]:
        """While open, forward passes are measured; call :meth:`set_mask` before each.

        Args:
            calibration: Merged over all shards.
        """
        self._calibration, self._losses = calibration, {}
        with ExitStack() as stack:
            for name, module in self._modules.items():
                if calibration.of(name).channels is not None:
                    handle = module.register_forward_pre_hook(self._hook(name))
                    stack.callback(handle.remove)
            yield
        self._gathered = {}
        self._rows.release()

    def set_mask(self, mask_BS: torch.Tensor | None) -> None:
        """Say which tokens of the next batch are real (1); None means all."""
        self._rows.mask.set(mask_BS)

    def losses(self) -> Losses:
        """Losses since :meth:`searching` was entered.

        Raises:
            NonFiniteError: One is NaN or infinite.
        """
        for (module, format_, alpha), loss in self._losses.items():
            if not math.isfinite(loss):
                raise not_finite(f"the error of {module} under {format_}, {alpha=}, is {loss}")
        return self._losses

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            self._gathered.setdefault(name, []).append(self._rows.of(name, arguments[0])[1])

        return hook

    @torch.no_grad()
    def settle(self) -> None:
        """Measure what was gathered; called while the weights of these modules are at hand."""
        self._rows.release()
        for name, inputs in self._gathered.items():
            for formats in self._menus[name]:
                self._add_losses(name, inputs, formats)
        self._gathered = {}

    def _add_losses(
        self, name: str, inputs: Sequence[torch.Tensor], formats: Sequence[Format]
    ) -> None:
        """Add the losses of a linear under formats whose candidates are the same.

        No tensor is kept beyond the call: on the CPU each would sit in memory that the large ones
        have left, and nothing as large would fit there again.
        """
        alphas = self._alphas(formats[0])
        keys = [(name, formats[0].name, alpha) for alpha in alphas]
        sums_C = torch.tensor(
            [self._losses.get(key, 0.0) for key in keys],
            dtype=torch.float64,
            device=inputs[0].device,
        )
        for number, error_OI in enumerate(self._errors(name, formats[0], alphas)):
            for states_TI in inputs:
                sums_C[number] += squared_norm(states_TI, error_OI)
        for alpha, loss in zip(alphas, sums_C.tolist(), strict=True):
            self._losses |= {(name, format_.name, alpha): loss for format_ in formats}

    def _alphas(self, format_: Format) -> list[float]:
        """The candidates of a format."""
        alphas = candidate_alphas(format_.algorithm)
        return [PLAIN, *alphas] if takes_factors(format_) else alphas

    def _errors(
        self, name: str, format_: Format, alphas: Sequence[float]
    ) -> Iterator[torch.Tensor]:
        """The error of a linear's weight under each candidate, in its dtype: ``(O, I)``; of some
        rows, ``(R, I)``, where factors are folded."""
        weight_OI: Any = self._modules[name].weight
        channels = self._calibration.of(name).channels
        assert channels is not None  # it has a hook
        mean_I = torch.from_numpy(channels.mean_I).to(weight_OI.device)
        attributes = format_.weight
        if takes_factors(format_):
            fold = self._calibration.folds[name]
            weights: list[Any] = [self._model.get_submodule(n).weight for n in fold.readers]
            importance_I = shared_importance(weights, attributes)
            for alpha in alphas:
                factors_I = shared_factors(fold, importance_I, mean_I, alpha)
                yield shared_error(weight_OI, attributes, factors_I).to(weight_OI.dtype)
            return
        importance_I = weight_importance(weight_OI, attributes)
        for alpha in alphas:
            scale_I = channel_scales(mean_I, importance_I, alpha)
            yield candidate_error(weight_OI, attributes, scale_I)


def _candidates_key(format_: Format) -> str:
    """Equal for formats whose candidates are the same, and plainly rounded alike."""
    alphas = candidate_alphas(format_.algorithm)
    return f"{attributes_key(format_.weight)} {takes_factors(format_)} {alphas}"
