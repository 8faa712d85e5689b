"""The largest absolute input of every module, over real tokens only; of an attention whose cache is
quantized, the largest key and value.

Formats that scale channels, or weight errors by them, also need records of every channel:
:mod:`autoquant_ray.calibrate.channels`, :mod:`autoquant_ray.calibrate.expert_channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from autoquant_ray.calibrate.channels import ChannelCollector
from autoquant_ray.calibrate.expert_channels import ExpertChannels
from autoquant_ray.calibrate.input_rows import TokenMask
from autoquant_ray.calibrate.transfer import on_host
from autoquant_ray.formats.format import Format
from autoquant_ray.models.layers import replaced_forward
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.attention import CachedAttention
from autoquant_ray.quantize.calibration import (
    Calibration,
    ModuleCalibration,
    calibration_of_maxima,
)
from autoquant_ray.quantize.experts import FusedExperts


class ActivationMaxima:
    """Collects the input maxima of modules while batches run forward.

    Args:
        model: The model.
        modules: Modules whose inputs are watched.
        formats: The menu, for what some formats need beside maxima.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format] = (),
    ) -> None:
        self._channels = ChannelCollector(modules, formats)
        self._of_experts = ExpertChannels(model, modules, formats)
        # Inputs of single experts stay in 16 bits.
        watched = [m.planned for m in modules if m.planned.expert is None]
        self._modules = [(planned, model.get_submodule(planned.name)) for planned in watched]
        self._experts = {
            planned.name: FusedExperts(module, planned)
            for planned, module in self._modules
            if planned.kind == "experts"
        }
        self._attentions = {
            planned.name: CachedAttention(module, planned)
            for planned, module in self._modules
            if planned.is_cache
        }
        self._maxima: dict[tuple[str, str], torch.Tensor] = {}
        self._mask = TokenMask()
        # Projections that share an input (q, k and v) are called with the very same tensor.
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def changes_forward(self) -> bool:
        """Whether outputs may differ in the last bits while maxima are collected.

        The experts run in ModelOpt's order, and only on real tokens.
        """
        return bool(self._experts)

    @property
    def adds_products(self) -> bool:
        """Whether the layers multiply more while maxima are collected than they would without."""
        return self._of_experts.runs_experts

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While open, forward passes are watched; call :meth:`set_mask` before each."""
        self._maxima = {}
        self._channels.clear()
        self._of_experts.clear()
        with ExitStack() as stack:
            for planned, module in self._modules:
                if planned.kind == "experts":
                    replacement = self._experts_forward(planned.name)
                    stack.enter_context(replaced_forward(module, replacement))
                elif planned.is_cache:
                    attention = self._attention_forward(planned.name)
                    stack.enter_context(replaced_forward(module, attention))
                else:
                    handle = module.register_forward_pre_hook(self._linear_hook(planned))
                    stack.callback(handle.remove)
            for handle in self._of_experts.watch(self._mask.matching):
                stack.callback(handle.remove)
            yield
        self._last = None
        self._channels.release()

    def set_mask(self, mask_BS: torch.Tensor | None) -> None:
        """Say which tokens of the next batch are real (1); None means all."""
        self._mask.set(mask_BS)

    def settle(self) -> None:
        """Nothing to do: every input is reduced at once."""

    def calibration(self) -> Calibration:
        """What was seen since :meth:`collecting` was entered."""
        wide = {key: value.double() for key, value in self._maxima.items()}
        maxima = {key: float(value) for key, value in on_host(wide).items()}
        modules = dict(calibration_of_maxima(maxima).modules)
        for name, channels in self._channels.channels().items():
            modules[name] = replace(modules.get(name, ModuleCalibration()), channels=channels)
        for name, experts in self._of_experts.experts().items():
            modules[name] = replace(modules.get(name, ModuleCalibration()), experts=experts)
        return Calibration(modules)

    def _linear_hook(self, planned: PlannedModule) -> Callable[..., None]:
        name = planned.name
        sees_tokens = not planned.is_idle  # the rows of a tower are no tokens: all are real

        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._last is None or self._last[0] is not arguments[0]:
                maxima = self._row_maxima(arguments[0].detach(), is_masked=sees_tokens)
                self._last = (arguments[0], maxima)
            self._update((name, "input_amax"), self._last[1])
            if self._channels.wants(name):
                states = arguments[0]
                self._channels.add(name, states, self._mask if sees_tokens else None)

        return hook

    def _row_maxima(self, states: torch.Tensor, *, is_masked: bool) -> torch.Tensor:
        """Largest absolute value of each row; where tokens are masked, of each real one."""
        states_TI = states.reshape(-1, states.shape[-1])
        largest_T = torch.linalg.vector_norm(states_TI, ord=float("inf"), dim=1)
        return self._mask.rows_of(largest_T) if is_masked else largest_T

    def _experts_forward(self, name: str) -> Callable[..., torch.Tensor]:
        def forward(*arguments: torch.Tensor, **keywords: torch.Tensor) -> torch.Tensor:
            inputs = (*arguments, *keywords.values())
            places_R = self._mask.places(inputs[0])
            chosen = tuple(map(self._mask.rows_of, inputs))
            output, maxima = self._experts[name].run_and_collect(chosen)
            for statistic, value in maxima.items():
                self._update((name, statistic), value[None])
            if places_R is None:
                return output
            whole = output.new_zeros(len(inputs[0]), output.shape[-1])
            return whole.index_copy_(0, places_R, output)

        return forward

    def _attention_forward(self, name: str) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            hidden_BSH = arguments[0] if arguments else keywords["hidden_states"]
            real_T = self._mask.matching(hidden_BSH.flatten(0, 1))
            real_BS = None if real_T is None else real_T.view(hidden_BSH.shape[:2])
            output, maxima = self._attentions[name].run_and_collect(arguments, keywords, real_BS)
            for statistic, value in maxima.items():
                self._update((name, statistic), value[None])
            return output

        return forward

    def _update(self, key: tuple[str, str], values: torch.Tensor) -> None:
        if len(values) == 0:
            return
        seen = values.amax()
        self._maxima[key] = torch.maximum(self._maxima[key], seen) if key in self._maxima else seen
