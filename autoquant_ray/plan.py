"""The plan: groups x formats x costs, from the model's skeleton alone.

A group is a set of modules that serving engines fuse and that must share one format; the rules
are ModelOpt's own (``quant_grouping_rules`` of its searcher). Every quantizable weight is either
in a searched group or listed as unsearched with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError, ModelError
from autoquant_ray.formats import NONE, Format
from autoquant_ray.layers import decoder_layers
from autoquant_ray.quantizable import (
    PlannedModule,
    is_of_tower,
    other_modules,
    quantizable_modules,
    sees_images,
)
from autoquant_ray.smoothed_formats import is_smoothed, num_search_products
from autoquant_ray.step_facts import step_facts
from autoquant_ray.stored_size import format_bits

if TYPE_CHECKING:
    import torch

UNQUANTIZED_BITS = 16

_TOWER_UNSEARCHED = "vision or audio tower: not searched with --coverage lm, or takes no images"


@dataclass(frozen=True, kw_only=True)
class PlannedGroup:
    """Modules that share one format; named after the first of them.

    Attributes:
        reason: Why the group is not searched; None for a searched group.
        is_tied: Its weight is the input embedding too (a tied head).
    """

    name: str
    modules: tuple[PlannedModule, ...]
    reason: str | None
    is_tied: bool

    @property
    def is_searched(self) -> bool:
        """Whether a format is chosen for this group."""
        return self.reason is None

    def takes(self, format_: Format) -> bool:
        """Whether a format is a choice here; scaled channels would change a tied embedding."""
        return not (self.is_tied and is_smoothed(format_))

    @property
    def num_weights(self) -> int:
        """Number of weight elements in the group."""
        return sum(module.num_weights for module in self.modules)

    def weight_bytes(self, format_: Format | None) -> float:
        """Stored bytes under a format (scales included); None: 16 bits."""
        if format_ is None:
            return self.num_weights * UNQUANTIZED_BITS / 8
        shapes = (shape for module in self.modules for shape in module.shapes)
        return sum(format_bits(format_, shape) for shape in shapes) / 8

    def modelopt_cost(self, format_: Format | None) -> float:
        """ModelOpt's cost: weights times its compression, in 16-bit weight equivalents."""
        return self.num_weights * (1.0 if format_ is None else format_.modelopt_compression)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Groups, formats, and what lies outside the search.

    Attributes:
        groups: In the order of the model.
        formats: The menu, without ``none``.
        other_bytes: Bytes, at 16 bits, of all parameters outside quantizable modules:
            embeddings, norms, biases, routers.
        other_modules: Owners of weight matrices that ModelOpt cannot quantize -> elements.
        flops_per_token: Estimated floating-point operations of the scan per token.
        layer_weights: Elements of all parameters of each decoder layer.
        hidden_size: Width of the states between them.
        step: What a decode step reads besides the groups, see :mod:`autoquant_ray.step_facts`.
    """

    groups: tuple[PlannedGroup, ...]
    formats: tuple[Format, ...]
    other_bytes: int
    other_modules: dict[str, int]
    flops_per_token: int
    layer_weights: tuple[int, ...]
    hidden_size: int
    step: dict[str, Any]

    @property
    def searched(self) -> list[PlannedGroup]:
        """Groups for which a format is chosen."""
        return [group for group in self.groups if group.is_searched]

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
                "weight_bits": group.weight_bytes(format_) * 8 / group.num_weights,
                "weight_bytes": group.weight_bytes(format_),
                "modelopt_cost": group.modelopt_cost(format_),
                "is_searched": group.is_searched,
            }
            for group in self.groups
            for format_ in self.choices(group)
        ]

    def bits_range(self) -> tuple[float, float]:
        """Lowest and highest average stored bits over the searched groups."""
        weights = sum(group.num_weights for group in self.searched)
        costs = [[g.weight_bytes(f) for f in self.choices(g)] for g in self.searched]
        low = sum(min(row) for row in costs) * 8 / weights
        return low, sum(max(row) for row in costs) * 8 / weights

    def summary(self) -> dict[str, Any]:
        """What ``run.json`` keeps so that ``solve`` and ``report`` need no model."""
        return {
            "formats": [format_.to_json() for format_ in self.formats],
            "modules": {
                module.name: {
                    "prefixes": list(module.quantizer_prefixes),
                    "shapes": [list(shape) for shape in module.shapes],
                }
                for group in self.groups
                for module in group.modules
            },
            "unsearched": {g.name: g.reason for g in self.groups if g.reason is not None},
            "tied_groups": [group.name for group in self.groups if group.is_tied],
            "other_bytes": self.other_bytes,
            "other_modules": self.other_modules,
            "flops_per_token": self.flops_per_token,
            "step": self.step,
            "idle_groups": [group.name for group in self.groups if is_of_tower(group.name)],
        }


def build_plan(
    model: Any, formats: Sequence[Format], disable: Sequence[str] = (), coverage: str = "lm"
) -> Plan:
    """Group the quantizable modules of a model and cost every choice.

    Args:
        model: Skeleton on the meta device, or a loaded model.
        formats: The menu.
        disable: Globs of module names to leave in 16 bits.
        coverage: ``lm`` leaves the vision tower in 16 bits, ``full`` searches it too.

    Raises:
        ConfigError: Nothing is left to search, a glob matches no module, or there is no vision
            tower for ``full``.
        ModelError: The model has no quantizable module.
    """
    modules = list(quantizable_modules(model))
    if not modules:
        raise ModelError(f"{type(model).__name__} has no layer that ModelOpt can quantize")
    for pattern in disable:
        if not any(fnmatch.fnmatch(module.name, pattern) for module in modules):
            raise ConfigError(
                f"--disable {pattern!r} matches no layer; names look like {modules[0].name!r}"
            )
    if coverage == "full" and not any(sees_images(module.name) for module in modules):
        raise ConfigError(
            f"{type(model).__name__} has no vision tower that --coverage full would search; leave "
            "it out"
        )
    found = _group(model, modules, disable, has_images=coverage == "full")
    groups = tuple(_unless_nothing_fits(group, formats) for group in found)
    plan = Plan(
        groups=groups,
        formats=tuple(formats),
        other_bytes=_other_bytes(model, groups),
        other_modules=other_modules(model, modules),
        flops_per_token=_flops_per_token(model, groups, formats),
        layer_weights=tuple(
            sum(parameter.numel() for parameter in layer.parameters())
            for layer in decoder_layers(model).values()
        ),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        step=step_facts(model, modules, is_of_tower),
    )
    if not plan.searched:
        raise ConfigError("every layer is disabled; nothing is left to search")
    return plan


def _group(
    model: torch.nn.Module,
    modules: list[PlannedModule],
    disable: Sequence[str],
    *,
    has_images: bool,
) -> tuple[PlannedGroup, ...]:
    members: dict[str, list[PlannedModule]] = {}
    for module in modules:
        members.setdefault(_group_key(module.name), []).append(module)
    embedding = model.get_input_embeddings()
    tied = {
        name
        for name, module in model.named_modules()
        if embedding is not None and getattr(module, "weight", None) is embedding.weight
    }
    return tuple(
        PlannedGroup(
            name=group[0].name,
            modules=tuple(group),
            reason=_reason_unsearched(group, disable, has_images=has_images),
            is_tied=any(module.name in tied for module in group),
        )
        for group in members.values()
    )


def _unless_nothing_fits(group: PlannedGroup, formats: Sequence[Format]) -> PlannedGroup:
    """The group; unsearched where it takes no format of the menu."""
    if not group.is_searched or any(map(group.takes, formats)):
        return group
    return replace(group, reason="takes no format of the menu")


def _group_key(name: str) -> str:
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

    searcher = AutoQuantizeGradientSearcher()
    searcher.model = None
    for rule in searcher.quant_grouping_rules:
        key = searcher._apply_quant_group_rule(name, rule)
        if key is not None:
            return str(key)
    return name


def _reason_unsearched(
    group: list[PlannedModule], disable: Sequence[str], *, has_images: bool
) -> str | None:
    for module in group:
        for pattern in disable:
            if fnmatch.fnmatch(module.name, pattern):
                return f"disabled by {pattern!r}"
        if is_of_tower(module.name) and not (has_images and sees_images(module.name)):
            return _TOWER_UNSEARCHED
        if module.kind == "convolution":
            return "convolution: not searched"
    return None


def _other_bytes(model: torch.nn.Module, groups: Sequence[PlannedGroup]) -> int:
    """Bytes at 16 bits outside the groups; a tied embedding counts here, once."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    quantizable = sum(group.num_weights for group in groups if not group.is_tied)
    return (total - quantizable) * UNQUANTIZED_BITS // 8


def _flops_per_token(model: Any, groups: Sequence[PlannedGroup], formats: Sequence[Format]) -> int:
    """Matrix products of a scan per token: calibration, forward, recompute, backward, formats.

    Routed experts count by the share of them that a token visits. AWQ's search is one more forward
    pass, and a product per candidate.
    """
    num_candidates = sum(map(num_search_products, formats))
    num_passes = 4 + (1 if num_candidates else 0)
    text_config = model.config.get_text_config()
    visited = getattr(text_config, "num_experts_per_tok", None) or 1
    total = 0.0
    for group in groups:
        for module in group.modules:
            share = min(1.0, visited / module.shapes[0][0]) if module.kind == "experts" else 1.0
            products = num_passes + (len(formats) if group.is_searched else 0)
            if group.is_searched and module.kind == "linear":
                products += num_candidates
            total += 2 * module.num_weights * share * products
    return round(total)
