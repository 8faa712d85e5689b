"""How much memory a worker needs under each placement, which placement ``auto`` takes, and what it
keeps of the layers' graphs between forward and backward.

Estimates from the plan alone: the weights are exact, the memory of the work is an upper bound of
its largest parts. They size the pool and pick a placement; no number depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.formats.algorithms import FACTOR_BYTES, SEARCHED_BYTES, SEARCHES
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.integer_pairs import (
    has_integer_pair,
    is_integer_pair,
    multiplies_integers,
)
from autoquant_ray.formats.smoothed import method_of, needs_hessians
from autoquant_ray.models.quantizable import PlannedModule, expert_place
from autoquant_ray.plan.group import UNQUANTIZED_BITS
from autoquant_ray.plan.plan import Plan
from autoquant_ray.plan.work import chunk_rows

if TYPE_CHECKING:
    import torch

    from autoquant_ray.plan.scored_modules import ScoredModule

GIB = 2**30
_PROCESS_BYTES = GIB
_MEMORY_SHARE = 0.9
_LOGITS_BYTES = 2**28
_WORK_COPIES = 3
_LAYERS_HELD = 2
_KEPT_BYTES = 4  # per weight and quantizer: float32, or weight and error in 16 bits

MOMENT_BYTES = GIB
"""Most bytes of second moments of inputs in memory, unless those of one linear or expert are more.
"""

RESULT_BYTES = GIB
"""Most bytes of roundings that a worker gives back together, unless those of one layer are more."""

_MOMENT_BYTES = 2 * 4  # float32, of each half of the data
_CODE_BYTES = 3  # per weight: fitted to all tokens, and without each half
_FACTORS_HELD = 7
"""Of an input of what GPTQ rounds: three dampings by two halves, and the best over all tokens."""

_MATRICES_HELD = 7
"""Of a module that GPTQ rounds: the moments over all tokens, and those that a factor is made of."""

LARGEST_CACHE_BYTES = 2 * GIB
"""Most bytes of quantized weights that a worker keeps where the user gives no number."""

GRAPH_SHARE = 0.2
"""On a CPU ``auto`` takes at most so much beside what a worker needs without."""

_WITH_SMALL = 1.05
"""Sums of the attentions' exponentials and routers' logits come on top."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of one worker.

    Attributes:
        weight_bytes: All weights in the compute type.
        offloaded_bytes: Weights held at once when layers are offloaded: everything outside the
            decoder layers, and two layers (the visited one and the next).
        work_bytes: One module's weight in float32, quantized, and the difference; quantized
            weights that are kept; sums of products of integers, and integer inputs; what GPTQ needs
            and gives; logits of one slice; every decoder layer's input for the tokens of a step, or
            for as many as are kept.
    """

    weight_bytes: int
    offloaded_bytes: int
    work_bytes: int

    def worker_bytes(self, placement: str) -> int:
        """Memory that one worker needs on its device (all its devices for ``split``)."""
        weights = self.offloaded_bytes if placement == "offload" else self.weight_bytes
        return _PROCESS_BYTES + weights + self.work_bytes


def footprint(plan: Plan, config: ScanConfig) -> Footprint:
    """Estimate the memory of a worker.

    Args:
        plan: The plan.
        config: Resolved dtype.
    """
    dtype_bytes = _dtype_bytes(config)
    searched = sum(group.num_weights for group in plan.searched)
    stored = sum(group.added_bytes(None) for group in plan.groups)
    num_weights = round((plan.other_bytes + stored) * 8 / UNQUANTIZED_BITS)
    layers = plan.layer_weights
    largest_layer = max(layers, default=0)
    held = num_weights - sum(layers) + _LAYERS_HELD * largest_layer
    largest = max(module.num_elements for group in plan.searched for module in group.modules)
    takes_integers = config.dtype == "float32" and multiplies_integers(config.difference_dtype)
    if config.weight_cache_gib == "auto":
        room, kept = LARGEST_CACHE_BYTES, largest_layer + max(0, searched - sum(layers))
    else:
        room, kept = round(config.weight_cache_gib * GIB), searched
    cached = min(room, quantized_bytes(kept, plan.formats, takes_integers=takes_integers))
    inputs = held_tokens(plan, config) * _input_bytes(plan, config)
    return Footprint(
        weight_bytes=num_weights * dtype_bytes,
        offloaded_bytes=min(held, num_weights) * dtype_bytes,
        work_bytes=_WORK_COPIES * 4 * largest
        + cached
        + (integer_bytes(plan, config) if takes_integers else 0)
        + searched_bytes(searched, plan.formats)
        + moment_bytes(plan)
        + rounding_bytes(plan)
        + _LOGITS_BYTES
        + inputs,
    )


def held_tokens(plan: Plan, config: ScanConfig) -> int:
    """Tokens of which a worker holds the layers' inputs: a step, or as many as are kept.

    Args:
        plan: The plan.
        config: Resolved dtype.
    """
    width = _input_bytes(plan, config)
    room = round(config.activation_cache_gib * GIB) // max(1, width)
    return max(config.step_tokens, min(room, config.samples * config.seq_len))


def _input_bytes(plan: Plan, config: ScanConfig) -> int:
    """Inputs of all layers for a token."""
    return plan.hidden_size * len(plan.layer_weights) * _dtype_bytes(config)


def _dtype_bytes(config: ScanConfig) -> int:
    """Of a number of the resolved compute type."""
    return 4 if config.dtype == "float32" else 2


def moment_bytes(plan: Plan) -> int:
    """Bytes of second moments of inputs, float32, one for each half of the data, and of their
    factors, while weights are rounded by GPTQ; 0 for a menu without it."""
    modules = _rounded_modules(plan)
    largest = max(map(portion_bytes, modules), default=0)
    moments = sum(_num_portions(module) * portion_bytes(module) for module in modules)
    factor = 4 * widest_input(plan) ** 2
    used = min(FACTOR_BYTES, _FACTORS_HELD * factor)
    held = max(largest, min(MOMENT_BYTES, moments))
    kept = min(FACTOR_BYTES, _FACTORS_HELD * held // 2)  # of all inputs whose moments are there
    return held + _MATRICES_HELD * factor + used + kept


def rounding_bytes(plan: Plan) -> int:
    """Bytes of roundings by GPTQ that a worker holds before it gives them back."""
    sizes = [code_bytes(plan, module.num_elements) for module in _rounded_modules(plan)]
    layer = code_bytes(plan, max(plan.layer_weights, default=0))
    return min(sum(sizes), max(RESULT_BYTES, layer, *sizes, 0))


def code_bytes(plan: Plan, num_weights: int) -> int:
    """Bytes of the roundings of some weights by GPTQ, under all formats of a menu."""
    return sum(map(needs_hessians, plan.formats)) * _CODE_BYTES * num_weights


def portion_bytes(module: PlannedModule) -> int:
    """Bytes of second moments of the input of a linear, or of both inputs of one expert.

    Args:
        module: A linear, an expert, or fused experts.
    """
    return sum(_MOMENT_BYTES * shape[-1] ** 2 for shape in module.shapes)


def widest_input(plan: Plan, *, of_experts: bool = False) -> int:
    """Input channels of the widest weight that GPTQ may round; 0 where it rounds none.

    Args:
        plan: The plan.
        of_experts: Of routed experts only.
    """
    modules = _rounded_modules(plan)
    if of_experts:
        modules = [m for m in modules if m.kind != "linear" or expert_place(m.name) is not None]
    return max((shape[-1] for module in modules for shape in module.shapes), default=0)


def _num_portions(module: PlannedModule) -> int:
    return module.shapes[0][0] if module.kind == "experts" else 1


def _rounded_modules(plan: Plan) -> list[PlannedModule]:
    """What GPTQ may round."""
    return [
        module
        for group in plan.searched
        if any(map(needs_hessians, plan.menu(group)))
        for module in group.modules
        if not module.is_cache
    ]


def quantized_bytes(
    num_weights: int, formats: Sequence[Format], *, takes_integers: bool = False
) -> int:
    """Bytes of weights quantized in every way of a menu, as the weight cache holds them.

    Args:
        num_weights: How many.
        formats: The menu.
        takes_integers: Whether integers are multiplied as such: a byte each, beside what modules
            and formats without integers need.
    """
    specs = {format_.weight_key for format_ in formats if format_.kv is None}
    pairs = {f.weight_key for f in formats if takes_integers and is_integer_pair(f)}
    return (_KEPT_BYTES * len(specs) + len(pairs)) * num_weights


def integer_bytes(plan: Plan, config: ScanConfig) -> int:
    """Bytes of a linear's input as integers, one each, and of sums of their products, four each.

    Args:
        plan: The plan.
        config: Resolved device.
    """
    if not has_integer_pair(plan.formats):
        return 0
    modules = [module for group in plan.searched for module in group.modules]
    shapes = [module.shapes[0] for module in modules if module.kind == "linear"]
    tokens = config.step_tokens
    widest = max((shape[-1] for shape in shapes), default=0)
    sums = [min(tokens, chunk_rows(shape[0], config.device)) * shape[0] for shape in shapes]
    return tokens * widest + 4 * max(sums, default=0)


def searched_bytes(num_weights: int, formats: Sequence[Format]) -> int:
    """Bytes that the results of searched weight scales take, one per block of weights."""
    blocks = {
        format_.weight_key: int((format_.weight.get("block_sizes") or {}).get(-1) or num_weights)
        for format_ in formats
        if method_of(format_) in SEARCHES
    }
    return min(SEARCHED_BYTES, sum(num_weights // block for block in blocks.values()))


def room_for_visit(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    modules: Sequence[ScoredModule],
    formats: Sequence[Format],
    *,
    takes_integers: bool = False,
) -> int:
    """Bytes of the quantized weights of the head and of the largest layer, 2 GiB at most.

    Args:
        model: The model.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu.
        takes_integers: See :func:`quantized_bytes`.
    """
    inside = {module: number for number, layer in enumerate(layers) for module in layer.modules()}
    sizes: dict[int, int] = {}
    for scored in modules:
        number = inside.get(model.get_submodule(scored.planned.path), -1)
        sizes[number] = sizes.get(number, 0) + scored.planned.num_elements
    visited = sizes.pop(-1, 0) + max(sizes.values(), default=0)
    needed = quantized_bytes(visited, formats, takes_integers=takes_integers)
    return min(LARGEST_CACHE_BYTES, needed)


def choose_placement(
    memory: Footprint, *, device_bytes: int, num_gpus: float, can_offload: bool
) -> tuple[str, str]:
    """What ``auto`` means.

    Args:
        memory: The model's footprint.
        device_bytes: Memory of one device that a worker may use; the host's on CPU.
        num_gpus: GPUs that each worker reserves; 0 on CPU.
        can_offload: Whether the weights are in files that can be mapped.

    Returns:
        ``resident``, ``split`` or ``offload``, and the reason with its numbers.
    """
    needed = memory.worker_bytes("resident")
    room = device_bytes * _MEMORY_SHARE
    if needed <= room or not can_offload:
        placement = "resident"
    elif num_gpus >= 2 and needed <= room * int(num_gpus):
        placement = "split"
    else:
        placement = "offload"
    kind = "each GPU" if num_gpus else "the host"
    why = f"resident needs {needed / GIB:.1f} GiB, {kind} has {device_bytes / GIB:.1f} GiB"
    return placement, why


@dataclass(frozen=True, kw_only=True)
class KeptGraphs:
    """What one worker keeps.

    Attributes:
        nbytes: Room for it; None: what the worker's GPU has free once the model is there.
        all_bytes: What all layers take, for the tokens that are held at once.
        visit_bytes: The same for those that go through the layers together: a shard's at most.
        num_layers: Decoder layers.
        reason: Where the number comes from.
    """

    nbytes: int | None
    all_bytes: int
    visit_bytes: int
    num_layers: int
    reason: str

    @property
    def counted_bytes(self) -> int:
        """What the estimate of a worker's memory counts."""
        return min(self.nbytes or 0, self.all_bytes)

    def within(self, spare_bytes: int) -> Self:
        """At most so much, where that is less."""
        if self.nbytes is None or self.nbytes <= spare_bytes:
            return self
        reason = "what the other workers of its node leave"
        return replace(self, nbytes=max(0, spare_bytes), reason=reason)

    def line(self) -> str:
        """For people."""
        if self.nbytes is None:
            return f"graphs of {self.num_layers} layers: as many are kept as {self.reason} holds"
        kept = min(self.counted_bytes, self.visit_bytes)
        count = int(self.num_layers * kept / max(1, self.visit_bytes))
        return (
            f"graphs of {count} of {self.num_layers} layers are kept, {kept / GIB:.2f} of "
            f"{self.visit_bytes / GIB:.2f} GiB ({self.reason})"
        )


def kept_graphs(plan: Plan, config: ScanConfig, memory: Footprint) -> KeptGraphs:
    """What ``keep_graphs`` means for a worker.

    Args:
        plan: The plan.
        config: Resolved device, dtype and placement.
        memory: Of a worker, without graphs.
    """
    token_bytes = _dtype_bytes(config) * _numbers_per_token(plan)
    held = held_tokens(plan, config)
    visited = min(held, max(config.step_tokens, config.shard_samples * config.seq_len))
    if config.keep_graphs != "auto":
        nbytes, reason = round(config.keep_graphs * GIB), "keep_graphs"
    elif config.device != "cuda":
        nbytes = int(GRAPH_SHARE * memory.worker_bytes(config.placement))
        reason = "auto: a fifth of what a worker needs without"
    elif (config.gpus_per_worker or 1) < 1:
        nbytes, reason = 0, "auto: workers share a GPU"
    else:
        nbytes, reason = None, "its GPU's free memory"
    return KeptGraphs(
        nbytes=nbytes,
        all_bytes=held * token_bytes,
        visit_bytes=visited * token_bytes,
        num_layers=len(plan.layer_weights),
        reason=reason,
    )


def _numbers_per_token(plan: Plan) -> int:
    """Results of the products and attentions of all decoder layers for one token."""
    head = plan.step.get("head")
    ratio: float = plan.step.get("active_expert_ratio") or 1.0
    modules = [
        module
        for group in plan.groups
        for module in group.modules
        if module.name != head and not module.is_idle and not module.is_cache
    ]
    attended: int = sum(kind["layers"] * kind["width"] for kind in plan.step.get("attention", ()))
    return round(_WITH_SMALL * (sum(_results(module, ratio) for module in modules) + attended))


def _results(module: PlannedModule, ratio: float) -> float:
    """Numbers that a module gives for a token; of routed experts, those that it visits."""
    width = sum(shape[-2] for shape in module.shapes if len(shape) > 1)
    if module.kind == "experts":
        return width * module.shapes[0][0] * ratio
    return width * ratio if module.kind == "expert" else width
