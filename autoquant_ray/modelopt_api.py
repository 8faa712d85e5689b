"""The package's door to ModelOpt, versions 0.47 and 0.48; its exporter has one of its own
(:mod:`autoquant_ray.modelopt_export`).

What ModelOpt does not promise (names with an underscore, modules that its packages do not show, the
text of a warning) is used here and nowhere else, under names that stay when it moves. What it does
promise passes through here too, so that one test can compare the whole list with the installed
version (``tests/unit/test_modelopt_api.py``).

Importing this module imports ModelOpt, torch and transformers: who must be light imports it inside
functions.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization import config as algorithm_configs
from modelopt.torch.quantization._auto_quantize_cost import infer_active_moe_expert_ratio
from modelopt.torch.quantization.algorithms import QuantRecipe, estimate_quant_compression
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.config import (
    QuantizeAlgorithmConfig,
    QuantizeConfig,
    QuantizerAttributeConfig,
)
from modelopt.torch.quantization.conversion import (
    _normalize_fused_experts_quantizer_name as normal_quantizer_name,
)
from modelopt.torch.quantization.conversion import set_quantizer_by_cfg_context
from modelopt.torch.quantization.mode import (
    BaseCalibrateModeDescriptor,
    CalibrateModeRegistry,
    get_modelike_from_algo_cfg,
)
from modelopt.torch.quantization.model_calib import (
    _collect_weight_stats,
    _make_weight_mse_calibrator,
    _run_and_load_max_stats,
)
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    StaticBlockScaleQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.plugins.custom import CUSTOM_MODEL_PLUGINS
from modelopt.torch.quantization.plugins.huggingface import (
    _fused_experts_wrapper_class,
    _QuantAttention,
    _QuantFusedExperts,
    _wraps_nested_attention,
    force_eager_experts_impl_on_the_fly,
    register_fused_experts_on_the_fly,
    register_hf_attentions_on_the_fly,
)
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl
from modelopt.torch.quantization.utils import (
    SHARED_PATTERNS,
    SharedWeightGlobalAmaxState,
    convert_quantization_axis_to_reduce_axis,
    iter_shared_quant_states,
    reduce_amax,
)
from modelopt.torch.quantization.utils.core_utils import (
    enable_weight_access_and_writeback,
    is_quantized_linear,
)
from modelopt.torch.quantization.utils.numeric_utils import fp8_max_for_normalization

try:  # since 0.48
    from modelopt.torch.models.gpt_oss.modeling_ptq import _QuantGptOssExperts
except ImportError:
    from modelopt.torch.quantization.plugins.huggingface import _QuantGptOssExperts

__all__ = [
    "SHARED_PATTERNS",
    "MXFP4QTensor",
    "MXFP8QTensor",
    "NVFP4QTensor",
    "QuantModule",
    "QuantModuleRegistry",
    "QuantRecipe",
    "QuantizeAlgorithmConfig",
    "QuantizeConfig",
    "QuantizerAttributeConfig",
    "ScaleSearch",
    "SharedWeightGlobalAmaxState",
    "StaticBlockQuantizer",
    "StaticBlockScaleQuantizer",
    "TensorQuantizer",
    "algorithm_configs",
    "calibrate",
    "calibrate_anew",
    "enable_weight_access_and_writeback",
    "estimate_quant_compression",
    "experts_layout",
    "experts_shadow",
    "fake_quantize",
    "fp8_max_for_normalization",
    "has_cache_quantizers",
    "infer_active_moe_expert_ratio",
    "is_quantized_linear",
    "is_registered_quant_backend",
    "iter_shared_quant_states",
    "largest_of",
    "mtq",
    "mutates_weights",
    "needs_static_maximum",
    "normal_quantizer_name",
    "plain_attentions",
    "prepare_experts",
    "prepare_quantizers",
    "register_attention",
    "register_calibration",
    "register_quant_backend",
    "scaled_e4m3_impl",
    "set_quantizer_by_cfg_context",
    "shadow_of",
    "switch_input_scaling",
]


# Quantizers


def needs_static_maximum(quantizer: Any) -> bool:
    """Whether ModelOpt calibrates this quantizer's maximum ahead of use."""
    is_constant = quantizer._use_constant_amax or quantizer._constant_amax is not None
    return not (is_constant or quantizer._dynamic or quantizer.is_mx_format)


def largest_of(quantizer: Any, inputs: torch.Tensor) -> Any:
    """The maximum that a quantizer works with: its calibrated one, else that of the inputs."""
    return quantizer._get_amax(inputs)


def fake_quantize(quantizer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize inputs that are in the quantizer's blocks already, by ModelOpt's
    kernels or by the quantizer's backend."""
    quantized: torch.Tensor = quantizer._fake_quantize(inputs)
    return quantized


def switch_input_scaling(quantizer: Any, is_on: bool) -> None:
    """Switch the factors of an input's channels, where a quantizer has them (AWQ, SmoothQuant)."""
    if hasattr(quantizer, "_pre_quant_scale"):
        quantizer._enable_pre_quant_scale = is_on


class StaticBlockQuantizer(StaticBlockScaleQuantizer):
    """ModelOpt's quantizer with stored scales of blocks, whose numbers a subclass gives."""

    def quantized(self, inputs: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize blocks ``(N, B)``; here by ModelOpt's kernel."""
        by_kernel: torch.Tensor = super()._fake_quantize(inputs)
        return by_kernel

    def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.quantized(inputs)


# Calibration of weights


class _MaximaOnDevice(MaxCalibrator):
    """ModelOpt's calibrator by maximum without its three checks, for each of which the host waits.

    A weight that is not finite shows in what is computed with it.
    """

    def collect(self, x: torch.Tensor) -> None:
        """Take the maxima of one tensor."""
        axes = convert_quantization_axis_to_reduce_axis(x, self._axis)
        self._calib_amax = reduce_amax(x, axis=axes).detach()


def load_maxima(quantizer: Any, weight_OI: torch.Tensor) -> None:
    """Calibrate a new quantizer by the maxima of its weight; leaves it enabled.

    Args:
        quantizer: With static maxima.
        weight_OI: The weight, on any device.
    """
    if weight_OI.is_cuda:
        quantizer._calibrator = _MaximaOnDevice(quantizer.num_bits, quantizer._calibrator._axis)
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight_OI)
    quantizer.load_calib_amax()
    quantizer.enable_quant()
    quantizer.disable_calib()


def calibrate_anew(quantizer: Any, weight_OI: torch.Tensor) -> None:
    """Forget what a weight's quantizer has seen, and calibrate it for a weight."""
    quantizer._calibrator.reset()
    _load_maxima(quantizer, weight_OI)


def _load_maxima(quantizer: Any, weight_OI: torch.Tensor) -> None:
    _run_and_load_max_stats(quantizer, partial(_collect_weight_stats, weight=weight_OI))


class ScaleSearch:
    """ModelOpt's search for the multiples of a weight's maxima by which it changes least.

    Args:
        quantizer: The weight's, calibrated by maximum.
        error: ``(values, quantized)`` -> error of each value; None: its square.
        arguments: ``step_size``, ``start_multiplier``, ``stop_multiplier``, ``fp8_scale_sweep``.
    """

    def __init__(
        self,
        quantizer: Any,
        *,
        error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        self._quantizer = quantizer
        self._calibrator: Any = _make_weight_mse_calibrator(
            quantizer, error_func=error, **arguments
        )

    def in_float32(self) -> ScaleSearch:
        """The same with the candidates formed in float32; returns itself."""
        self._calibrator._initial_amax = self._calibrator._initial_amax.float()
        return self

    def best(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The maxima under which the weight changes least; the quantizer keeps those it has."""
        quantizer = self._quantizer
        largest, before = quantizer.amax.clone(), quantizer._calibrator
        quantizer._calibrator = self._calibrator
        _load_maxima(quantizer, weight_OI)
        best: torch.Tensor = quantizer.amax.clone()
        quantizer.amax, quantizer._calibrator = largest, before
        return best

    @property
    def losses(self) -> list[torch.Tensor]:
        """After :meth:`best`, the errors under each candidate, one per maximum."""
        losses: list[torch.Tensor] = self._calibrator._losses_sum
        return losses

    def num_candidates(self, device: torch.device) -> int:
        """How many multiples are tried."""
        return len(self._calibrator._generate_candidates(device))

    def maxima(self, numbers: torch.Tensor) -> torch.Tensor:
        """``maximum * candidate``, as ModelOpt's calibrators form it.

        Args:
            numbers: Of the candidates, int64, one per maximum.
        """
        candidates = self._calibrator._generate_candidates(numbers.device)
        maxima: torch.Tensor = self._calibrator._compute_candidate_amax(candidates[numbers])
        return maxima


# Algorithms of ``mtq.quantize``


def calibrate(
    model: Any, algorithm: str | dict[str, Any], forward_loop: Callable[[Any], Any] | None
) -> None:
    """What ``mtq.calibrate`` does, without its record of modes."""
    ((name, arguments),) = get_modelike_from_algo_cfg(algorithm)
    mode = CalibrateModeRegistry[name]
    mode.convert(model, mode.config_class(**arguments), forward_loop=forward_loop)


def mutates_weights(algorithm: str | dict[str, Any]) -> bool:
    """Whether an algorithm changes weights, not only their quantizers."""
    ((name, _),) = get_modelike_from_algo_cfg(algorithm)
    return bool(CalibrateModeRegistry[name].config_class._mutates_weights)


def register_calibration(
    method: str, arguments: type[QuantizeAlgorithmConfig], function: Callable[..., None]
) -> None:
    """Let ``mtq.quantize`` know an algorithm, once.

    Args:
        method: Its name in a config.
        arguments: Class of its arguments.
        function: Calibrates a model; takes the model, ``forward_loop`` and the arguments.
    """

    class Descriptor(BaseCalibrateModeDescriptor):
        _calib_func = staticmethod(function)
        _supports_layerwise = False

        @property
        def config_class(self) -> type[QuantizeAlgorithmConfig]:
            return arguments

    if f"{method}_calibrate" not in CalibrateModeRegistry:
        CalibrateModeRegistry.register_mode(Descriptor)


# Modules


def experts_layout(module: torch.nn.Module) -> tuple[tuple[str, str], bool] | None:
    """Parameters of fused experts, and whether they are transposed; None for unknown layouts."""
    wrapper = _fused_experts_wrapper_class(module)
    registered = QuantModuleRegistry.get(type(module))
    if registered is not None and issubclass(registered, _QuantGptOssExperts):
        return ("gate_up_proj", "down_proj"), True
    is_other = registered is not None and not issubclass(registered, _QuantFusedExperts)
    return None if is_other or wrapper is None else ((wrapper._first_proj_attr, "down_proj"), False)


def prepare_experts(model: torch.nn.Module) -> None:
    """Make fused experts run expert by expert, the only way that ModelOpt can quantize."""
    force_eager_experts_impl_on_the_fly(model)
    with contextlib.redirect_stdout(io.StringIO()):
        register_fused_experts_on_the_fly(model)


def shadow_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that carries ModelOpt's wrapper and shares parameters and parts with the module."""
    shadow = copy.copy(module)
    shadow.__dict__.update(
        {key: value.copy() for key, value in module.__dict__.items() if isinstance(value, dict)}
    )
    # accelerate's hooks replace the forward of a split model's modules; theirs runs the original.
    for name in ("forward", "_old_forward", "_hf_hook"):
        shadow.__dict__.pop(name, None)
    converted: torch.nn.Module = QuantModuleRegistry.convert(shadow)
    return converted.eval()


def experts_shadow(module: torch.nn.Module, parameters: Sequence[str]) -> torch.nn.Module:
    """A shadow of fused experts (:func:`prepare_experts` must have run) that leaves all as it is.

    Args:
        module: The experts.
        parameters: Names of their weights.
    """
    shadow: Any = shadow_of(module)
    for name in parameters:
        getattr(shadow, f"{name}_input_quantizer").disable()
    if isinstance(shadow, _QuantGptOssExperts):
        # Its weights come quantized, all of a projection together: spares two copies in every run.
        shadow.__dict__["quantize_weight"] = contextlib.nullcontext
        return shadow
    for name in parameters:
        for quantizer in getattr(shadow, f"{name}_weight_quantizers"):
            quantizer.disable()
    return shadow


def has_cache_quantizers(module: Any) -> bool:
    """ModelOpt's own rule, for the wrapper that quantizes what the attention interface is given."""
    kind = type(module)
    if not kind.__name__.endswith("Attention") or _wraps_nested_attention(module):
        return False
    registered = QuantModuleRegistry.get(kind)
    if registered is not None:
        return bool(issubclass(registered, _QuantAttention))
    return bool(_QuantAttention.is_compatible_attention(kind))


def register_attention(module: Any) -> None:
    """Let ModelOpt's registry know the class of an attention, as ``mtq.quantize`` does."""
    if QuantModuleRegistry.get(type(module)) is None:
        with contextlib.redirect_stdout(io.StringIO()):
            mtq.register(type(module), _QuantAttention)


@contextmanager
def plain_attentions() -> Iterator[None]:
    """Inside, ``mtq.quantize`` leaves attentions as they are: it cannot prepare each (Bloom's)."""
    CUSTOM_MODEL_PLUGINS.remove(register_hf_attentions_on_the_fly)
    try:
        yield
    finally:
        CUSTOM_MODEL_PLUGINS.add(register_hf_attentions_on_the_fly)


def prepare_quantizers(model: Any, quant_cfg: Any) -> None:
    """What ``mtq.quantize`` does but for calibration: weights may be on the meta device."""
    mtq.quantize(model, {"quant_cfg": quant_cfg, "algorithm": None})
