"""Attentions run again with quantized keys and values, as ``mtq.quantize`` would run them.

A *shadow* of the attention carries ModelOpt's wrapper, which quantizes what the attention interface
is given: keys and values after the rotary embedding. It shares the parts of the module in the
model, so projections that run under a format of their own do so here too, and the model stays as
it was loaded.

Shape letters: B samples, S positions, H heads, D width of a head, T = B * S tokens, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoquant_ray.errors import WorkerError
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import register_attention, shadow_of
from autoquant_ray.models.layers import first_output
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.quantize.quantizers import disabled_quantizer, make_input_quantizer

PARTS = ("k_bmm", "v_bmm")
"""Keys and values, as ModelOpt's quantizers are called."""

_OTHERS = ("q_bmm", "p_bmm")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an attention, without its graph.

    Attributes:
        arguments, keywords: Of its ``forward``; no cache is passed on.
        hidden: Hidden states that it was given.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    hidden: torch.Tensor

    @classmethod
    def of(cls, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
        """Take over what a forward hook is given."""
        kept = {**keywords, **{k: None for k in keywords if k.startswith("past_key_value")}}
        if "use_cache" in kept:
            kept["use_cache"] = False
        detached: Any = _mapped(torch.Tensor.detach, (arguments, kept))
        hidden = detached[0][0] if arguments else detached[1]["hidden_states"]
        return cls(arguments=detached[0], keywords=detached[1], hidden=hidden)

    def in_float32(self) -> Call:
        """The same with all floating-point tensors in float32."""
        arguments, keywords, hidden = _mapped(
            _as_float32, (self.arguments, dict(self.keywords), self.hidden)
        )
        return Call(arguments=arguments, keywords=keywords, hidden=hidden)


class CachedAttention:
    """A shadow of one attention.

    Args:
        module: The attention in the model.
        planned: Its entry in the plan.
    """

    def __init__(self, module: torch.nn.Module, planned: PlannedModule) -> None:
        register_attention(module)
        self._module = module
        self._planned = planned
        self._shadow: Any = shadow_of(module)
        self._resting = dict(self._shadow._parameters)
        self._set({part: disabled_quantizer() for part in (*PARTS, *_OTHERS)})

    def run(
        self, format_: Format, maxima: Mapping[str, float], arguments: Any, keywords: Any
    ) -> Any:
        """What the attention returns under a format of the cache.

        Args:
            format_: The format.
            maxima: ``k_bmm_amax`` and ``v_bmm_amax`` of this attention.
            arguments, keywords: Of its ``forward``.
        """
        like = next(self._module.parameters())
        self._quantize(format_, maxima, like[:0])
        return self._run(arguments, keywords)

    @torch.no_grad()
    def run_and_collect(
        self, arguments: Any, keywords: Any, real_BS: torch.Tensor | None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """What the attention returns, and the maxima of its keys and values.

        Args:
            arguments, keywords: Of its ``forward``.
            real_BS: Tokens that count; None: all.

        Raises:
            WorkerError: Its keys and values are not those of the plan.
        """
        recorders = [_Recorder(real_BS) for _ in PARTS]
        self._set(dict(zip(PARTS, recorders, strict=True)))
        output = self._run(arguments, keywords)
        seen = tuple(recorder.shape for recorder in recorders)
        if seen != self._planned.cached:
            raise WorkerError(
                f"{self._planned.name} caches keys and values of (heads, width) {seen}, the plan "
                f"has {self._planned.cached}; `disable` {self._planned.label}"
            )
        maxima = {f"{part}_amax": r.maximum for part, r in zip(PARTS, recorders, strict=True)}
        return output, {key: value for key, value in maxima.items() if value is not None}

    @torch.no_grad()
    def differences(
        self,
        call: Call,
        output: torch.Tensor | None,
        formats: Sequence[Format],
        maxima: Mapping[str, float],
    ) -> list[torch.Tensor]:
        """``Y_f - Y`` in float32 under each format, all else exact.

        In 16 bits the difference of two rounded outputs would be partly rounding: there the
        attention runs in float32.

        Args:
            call: What the attention was called with.
            output: What it gave then; None, or in 16 bits: it is run again.
            formats: Formats of the cache.
            maxima: As in :meth:`run`.
        """
        is_single = call.hidden.dtype == torch.float32
        if not is_single:
            call = call.in_float32()

        def run() -> torch.Tensor:
            return first_output(self._run(call.arguments, call.keywords, as_float32=not is_single))

        if output is None or not is_single:
            self._set({part: disabled_quantizer() for part in PARTS})
            output = run()
        differences = []
        for format_ in formats:
            self._quantize(format_, maxima, call.hidden[:0])
            differences.append(run() - output)
        return differences

    def _quantize(self, format_: Format, maxima: Mapping[str, float], like: torch.Tensor) -> None:
        self._set(
            {
                part: make_input_quantizer(attributes, maxima.get(f"{part}_amax"), like)
                for part, attributes in zip(PARTS, format_.kv_parts, strict=True)
            }
        )

    def _set(self, quantizers: Mapping[str, Any]) -> None:
        for part, quantizer in quantizers.items():
            setattr(self._shadow, f"{part}_quantizer", quantizer)

    def _run(self, arguments: Any, keywords: Any, *, as_float32: bool = False) -> Any:
        """Run with the parameters that the module has now (offloaded: only during a visit)."""
        self._shadow._parameters.update(self._module._parameters)
        try:
            if not as_float32:
                return self._shadow(*arguments, **keywords)
            tensors = {
                name: _as_float32(tensor)
                for name, tensor in (
                    *self._shadow.named_parameters(),
                    *self._shadow.named_buffers(),
                )
                if "bmm_quantizer" not in name
            }
            return torch.func.functional_call(self._shadow, tensors, arguments, dict(keywords))
        finally:
            self._shadow._parameters.update(self._resting)  # keeps no layer


class _Recorder(torch.nn.Module):
    """Stands in for a quantizer and notes the largest absolute value of real tokens."""

    def __init__(self, real_BS: torch.Tensor | None) -> None:
        super().__init__()
        self._real_BS = real_BS
        self.maximum: torch.Tensor | None = None
        self.shape: tuple[int, int] | None = None

    def forward(self, states_BHSD: torch.Tensor) -> torch.Tensor:
        largest_BS = states_BHSD.abs().amax(dim=(1, 3))
        largest = largest_BS if self._real_BS is None else largest_BS[self._real_BS]
        if largest.numel():
            self.maximum = largest.amax()
        self.shape = (states_BHSD.shape[1], states_BHSD.shape[3])
        return states_BHSD


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value in which every tensor is changed; inside tuples, lists and mappings too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return value
