"""The plan: groups x formats x costs, from the model's skeleton alone.

A group is a set of modules that serving engines fuse and that must share one format; the rules
are ModelOpt's own (``quant_grouping_rules`` of its searcher). Every quantizable weight is either
in a searched group or listed as unsearched with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autoquant_ray.config.expert_groups import LAYER, ExpertGroups, is_apart
from autoquant_ray.errors import ConfigError, ModelError
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.models.context import SampleLimits, limits_of
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.quantizable import (
    PlannedModule,
    expert_place,
    hears,
    other_modules,
    quantizable_modules,
)
from autoquant_ray.models.separate_heads import separate_head
from autoquant_ray.plan.decode_step import step_facts
from autoquant_ray.plan.experts import apart_key, split_experts
from autoquant_ray.plan.fold import Fold, folds_to_json
from autoquant_ray.plan.group import UNQUANTIZED_BITS, PlannedGroup, nothing_stored
from autoquant_ray.plan.group_folds import with_folds
from autoquant_ray.plan.group_key import group_key
from autoquant_ray.plan.kv_caches import cache_modules
from autoquant_ray.plan.reach import IDLE, text_reach
from autoquant_ray.plan.routers import ROUTER, routers
from autoquant_ray.plan.work import flops_per_token
from autoquant_ray.runs.record import LayoutLimit, PlanSummary

if TYPE_CHECKING:
    import torch

_DISABLED = "disabled by"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Groups, formats, and what lies outside the search.

    Attributes:
        groups: In the order of the model; caches last.
        formats: The menu, without ``none``.
        other_bytes: Bytes, at 16 bits, of all parameters outside quantizable modules:
            embeddings, norms, biases, routers; and of stored tables of whole numbers.
        other_modules: Owners of weight matrices that ModelOpt cannot quantize -> elements.
        flops_per_token: Estimated floating-point operations of the scan per token. layer_weights:
        Elements of all parameters of each decoder layer. hidden_size: Width of the states between
        them. step: What a decode step reads besides the groups, see
        :mod:`autoquant_ray.plan.decode_step`.
        experts_apart: Whether every routed expert is a group.
        separate_head: The head, where the config ties it and the files hold another weight for it.
        source_format: Of a checkpoint that is quantized already: how.
        embedding: Name of the input embedding.
        model_type: As the model's config has it.
        carried: Tensors of the files that are not loaded -> bytes that they take in a checkpoint.
        limits: What samples may hold; None of a plan that was made without a model.
        checkpoint_limits: Layout of checkpoints -> why it holds no solution, or only some.
    """

    groups: tuple[PlannedGroup, ...]
    formats: tuple[Format, ...]
    other_bytes: int
    other_modules: dict[str, int]
    flops_per_token: int
    layer_weights: tuple[int, ...]
    hidden_size: int
    step: dict[str, Any]
    experts_apart: bool = False
    separate_head: str | None = None
    source_format: str | None = None
    embedding: str = ""
    model_type: str = ""
    carried: Mapping[str, int] = field(default_factory=dict)
    limits: SampleLimits | None = None
    checkpoint_limits: Mapping[str, LayoutLimit] = field(default_factory=dict)

    @property
    def searched(self) -> list[PlannedGroup]:
        """Groups for which a format is chosen."""
        return [group for group in self.groups if group.is_searched]

    @property
    def folds(self) -> dict[str, Fold]:
        """Linear -> fold of its input, of those that can take factors."""
        return {m.name: g.fold for g in self.searched if g.fold is not None for m in g.modules}

    @property
    def single_experts(self) -> list[str]:
        """Searched groups that are one routed expert each."""
        if not self.experts_apart:
            return []
        return [group.name for group in self.searched if expert_place(group.name) is not None]

    def menu(self, group: PlannedGroup) -> list[Format]:
        """Formats of the run that a group can take, in their order; none if it is not searched."""
        return [f for f in self.formats if group.is_searched and group.takes(f)]

    def choices(self, group: PlannedGroup) -> list[Format | None]:
        """Formats of a group, ``None`` (16 bits) last."""
        return [*self.menu(group), None]

    @property
    def score_keys(self) -> list[tuple[str, str]]:
        """(group, format) of every score, in the order of the files."""
        return [(group.name, f.name) for group in self.searched for f in self.menu(group)]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``plan.parquet``: one per (group, format)."""
        return [
            {
                "group": group.name,
                "format": NONE if format_ is None else format_.name,
                "module_names": [module.name for module in group.modules],
                "num_weights": group.num_weights,
                "weight_bits": group.bits(format_),
                "weight_bytes": group.weight_bytes(format_),
                "modelopt_cost": group.modelopt_cost(format_),
                "is_searched": group.is_searched,
                KV_BYTES: group.kv_bytes(format_) or 0.0,
            }
            for group in self.groups
            for format_ in self.choices(group)
        ]

    def bits_range(self) -> tuple[float, float]:
        """Lowest and highest effective bits; a tied head, better left in 16 bits, adds none."""
        stored = [group for group in self.searched if group.num_stored]
        weights = sum(group.num_stored for group in stored)
        costs = [[g.weight_bytes(f) for f in self.choices(g)] for g in stored]
        low = sum(min(row) for row in costs) * 8 / weights
        return low, sum(max(row) for row in costs) * 8 / weights

    def kv_range(self) -> tuple[float, float]:
        """Lowest and highest bytes that a token of context takes in all caches."""
        costs = [[g.kv_bytes(f) or 0.0 for f in self.choices(g)] for g in self.groups]
        return sum(map(min, costs)), sum(map(max, costs))

    def summary(self) -> PlanSummary:
        """What ``run.json`` keeps so that ``solve`` and ``report`` need no model."""
        folds = folds_to_json(self.folds.values())
        summary: PlanSummary = {
            "formats": [format_.to_json() for format_ in self.formats],
            "modules": {
                module.name: module.to_json() for group in self.groups for module in group.modules
            },
            "unsearched": {g.name: g.reason for g in self.groups if g.reason is not None},
            "tied_groups": [group.name for group in self.groups if group.is_tied],
            "other_bytes": self.other_bytes,
            "other_modules": self.other_modules,
            "flops_per_token": self.flops_per_token,
            "step": self.step,
            "experts": self.single_experts,
            "idle_groups": [g.name for g in self.groups if g.modules[0].is_idle],
        }
        if self.separate_head is not None:
            summary["separate_head"] = self.separate_head
        if self.source_format is not None:
            summary["source_format"] = self.source_format
        if self.carried:
            summary["carried"] = dict(self.carried)
        if self.model_type:
            summary["model_type"] = self.model_type
        if summary["tied_groups"]:
            summary["embedding"] = self.embedding
        if self.checkpoint_limits:
            summary["checkpoint_limits"] = dict(self.checkpoint_limits)
        if self.limits is not None:
            summary["sample_limits"] = self.limits.to_json()
        return {**summary, "folds": folds} if folds else summary


def build_plan(
    model: Any,
    formats: Sequence[Format],
    disable: Sequence[str] = (),
    coverage: str = "lm",
    expert_groups: ExpertGroups = LAYER,
    *,
    search_routers: bool = False,
) -> Plan:
    """Group the quantizable modules of a model and cost every choice.

    Args:
        model: Skeleton on the meta device, or a loaded model.
        formats: The menu.
        disable: Globs of module names to leave in 16 bits.
        coverage: ``lm`` leaves the vision tower in 16 bits, ``full`` searches it too.
        expert_groups: Unless ``layer``, every expert is a group.
        search_routers: Search linears that choose experts too, as ModelOpt does.

    Raises:
        ConfigError: Nothing is left to search but a tied head, a glob matches no module, there is
            no vision tower for ``full``, the experts cannot be told apart, or no group takes
            factors that a format has.
        ModelError: The model has no quantizable module, or no cache for formats of caches.
    """
    modules = list(quantizable_modules(model))
    if not modules:
        raise ModelError(f"{type(model).__name__} has no layer that ModelOpt can quantize")
    if is_apart(expert_groups):
        modules = split_experts(model, modules, formats)
    reach = text_reach(model, modules)
    modules = [replace(m, is_idle=m.name in reach.idle) for m in modules]
    caches = cache_modules(model, formats, modules, reach.is_idle)
    has_images, apart = coverage == "full", is_apart(expert_groups)
    members = [*modules, *caches]
    _require_matches(members, disable)
    if has_images and all(not m.is_idle or hears(m.name) for m in modules):
        raise ConfigError(
            f"{type(model).__name__} has no vision tower that `coverage` full would search; leave "
            "it out"
        )
    left_out = {} if search_routers else dict.fromkeys(routers(model, modules), ROUTER)
    reasons = _reasons(members, left_out | reach.reasons, disable, has_images=has_images)
    grouped = _group(model, members, reasons, experts_apart=apart)
    folded = with_folds(model, grouped, formats)
    groups = tuple(_unless_nothing_fits(group, formats) for group in folded)
    plan = Plan(
        groups=groups,
        formats=tuple(formats),
        other_bytes=_other_bytes(model, groups),
        other_modules=other_modules(model, modules),
        flops_per_token=flops_per_token(model, groups, formats),
        layer_weights=tuple(
            sum(parameter.numel() for parameter in layer.parameters())
            for layer in decoder_layers(model).values()
        ),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        step=step_facts(model, modules, reach.is_idle),
        experts_apart=apart,
        separate_head=separate_head(model),
        embedding=next(n for n, m in model.named_modules() if m is model.get_input_embeddings()),
        model_type=model.config.model_type,
        limits=limits_of(model),
    )
    if not any(group.num_weights for group in plan.searched):
        raise ConfigError("every layer is disabled; nothing is left to search")
    if not any(group.num_stored for group in plan.searched):
        raise nothing_stored([group.name for group in plan.searched if group.is_tied])
    if apart and not plan.single_experts:
        reason = next(g.reason for g in plan.groups if expert_place(g.name) is not None)
        raise ConfigError(
            f"`expert_groups`: no routed expert is searched ({reason}); leave it out, or let "
            "experts take a format such as wint4_afp16"
        )
    return plan


def _require_matches(modules: Sequence[PlannedModule], disable: Sequence[str]) -> None:
    """Refuse a glob that matches no module: it would disable less than the user thinks."""
    for pattern in disable:
        if not any(module.matches(pattern) for module in modules):
            raise ConfigError(
                f"`disable` {pattern!r} matches no layer; names look like {modules[0].name!r}"
            )


def _group(
    model: torch.nn.Module,
    modules: list[PlannedModule],
    reasons: Mapping[str, str],
    *,
    experts_apart: bool,
) -> tuple[PlannedGroup, ...]:
    members: dict[str, list[PlannedModule]] = {}
    keys: dict[str, str] = {}
    for module in modules:
        key = (apart_key(module) if experts_apart else None) or group_key(module.label)
        key = keys.get(module.shared_with or "", key)  # one weight has one format
        keys[module.label] = key
        members.setdefault(key, []).append(module)
    embedding = model.get_input_embeddings()
    tied = {
        name
        for name, module in model.named_modules()
        if embedding is not None and getattr(module, "weight", None) is embedding.weight
    }
    return tuple(
        PlannedGroup(
            name=group[0].label,
            modules=tuple(group),
            reason=_reason_unsearched(group, reasons),
            is_tied=any(module.name in tied for module in group),
        )
        for group in members.values()
    )


def _unless_nothing_fits(group: PlannedGroup, formats: Sequence[Format]) -> PlannedGroup:
    """The group; unsearched where it takes no format of the menu."""
    if not group.is_searched or any(map(group.takes, formats)):
        return group
    return replace(group, reason="takes no format of the menu")


def _reason_unsearched(group: Sequence[PlannedModule], reasons: Mapping[str, str]) -> str | None:
    """Why a group is not searched: the user's reason for any of it, or that of all of it."""
    given = [reasons.get(module.label) for module in group]
    asked = [reason for reason in given if reason is not None and reason.startswith(_DISABLED)]
    if asked or all(given):
        return (asked or given)[0]
    return None


def _reasons(
    modules: Sequence[PlannedModule],
    others: Mapping[str, str],
    disable: Sequence[str],
    *,
    has_images: bool,
) -> dict[str, str]:
    """Module -> why it is left in 16 bits, where it is."""
    reasons: dict[str, str] = {}
    for module in modules:
        pattern = next((p for p in disable if module.matches(p)), None)
        if pattern is not None:
            reasons[module.label] = f"{_DISABLED} {pattern!r}"
        elif module.is_idle and (not has_images or hears(module.name)):
            reasons[module.label] = IDLE
        elif module.kind == "convolution":
            reasons[module.label] = "convolution: not searched"
        elif module.name in others and not module.is_cache:
            reasons[module.label] = others[module.name]
    return reasons


def _other_bytes(model: torch.nn.Module, groups: Sequence[PlannedGroup]) -> int:
    """Bytes outside the groups: at 16 bits, and tables of whole numbers (DeepSeek-V4's experts by
    token) as they are stored. A tied embedding counts here, once."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    quantizable = sum(group.num_stored for group in groups)
    stored = model.state_dict()
    tables: int = sum(
        buffer.nbytes
        for name, buffer in model.named_buffers()
        if name in stored and not buffer.is_floating_point()
    )
    return (total - quantizable) * UNQUANTIZED_BITS // 8 + tables
