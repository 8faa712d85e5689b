"""Which groups of a plan take formats whose factors are folded (``awq``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import has_free_rows, takes_factors
from autoquant_ray.models.quantizable import modules_of_several
from autoquant_ray.plan.find_folds import find_folds
from autoquant_ray.plan.fold import ROWS, Fold
from autoquant_ray.plan.group import PlannedGroup
from autoquant_ray.wording import few

if TYPE_CHECKING:
    import torch

_MOST_NAMES = 4

logger = logging.getLogger(__name__)


def with_folds(
    model: torch.nn.Module, groups: Sequence[PlannedGroup], formats: Sequence[Format]
) -> tuple[PlannedGroup, ...]:
    """The groups with the folds of their inputs; as they are where no format has factors.

    Rows of a linear may be divided only if every format that it may get leaves its rows free, and
    values of an attention only if its cache stays in 16 bits: others are scaled as they were.

    Args:
        model: A skeleton, or a loaded model.
        groups: Of the plan.
        formats: The menu.

    Raises:
        ConfigError: No group at all can take factors.
    """
    names = [format_.name for format_ in formats if takes_factors(format_)]
    if not names:
        return tuple(groups)
    linears = [
        g
        for g in groups
        if g.is_searched and not g.is_shared and all(m.kind == "linear" for m in g.modules)
    ]
    shared = modules_of_several(model)
    folds = find_folds(model, [[module.name for module in group.modules] for group in linears])
    owners = {module.name: group for group in groups for module in group.modules}
    cached = tuple(f"{g.modules[0].name}." for g in groups if g.is_cache and g.is_searched)
    usable: dict[str, Fold] = {}
    reasons: dict[str, str] = {}
    for group in groups:
        fold = folds.get(group.name)
        if group.is_shared or (fold is not None and fold.producer in shared):
            reasons[group.name] = "their weights, or what makes their inputs, serve several layers"
        elif fold is None:
            reasons[group.name] = "their inputs cannot be folded"
        elif fold.producer.startswith(cached):
            reasons[group.name] = "their caches are searched"
        elif fixed := _fixing(fold, owners, formats):
            reasons[group.name] = f"{fixed} scales the rows before them together: leave it out"
        else:
            usable[group.name] = fold
    if not usable:
        raise ConfigError(
            f"`formats` {names[0]}: no layer of this model has an input into whose source factors "
            "can be folded; leave it out, or use another method such as weighted"
        )
    searched = [g.name for g in groups if g.is_searched and not g.is_cache]
    _log_reasons(searched, reasons)
    return tuple(replace(group, fold=usable.get(group.name)) for group in groups)


def _log_reasons(searched: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Say which groups take no factors, and why.

    Args:
        searched: All groups of weights for which a format is chosen.
        reasons: Group that takes none -> why.
    """
    for reason in dict.fromkeys(reasons.values()):
        without = [name for name in searched if reasons.get(name) == reason]
        if without:
            logger.info(
                "awq: %d of %d groups take no factors (%s): %s",
                len(without),
                len(searched),
                reason,
                few(without, _MOST_NAMES),
            )


def _fixing(fold: Fold, owners: dict[str, PlannedGroup], formats: Sequence[Format]) -> str | None:
    """A format under which what makes the input may not be divided; None if there is none."""
    owner = owners.get(fold.producer)
    if fold.kind != ROWS or owner is None or not owner.is_searched:
        return None
    weights = [f for f in formats if f.weight and (takes_factors(f) or owner.takes(f))]
    return next((f.name for f in weights if not has_free_rows(f)), None)
