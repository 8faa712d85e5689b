"""Which experts share a format: all of a layer, clusters of them, or none (``--expert-groups``).

Fused experts share the quantizer of their inputs, in ModelOpt and in every engine. So an expert
that is a group of its own takes only formats that leave inputs in 16 bits. Where experts are made
of linears, as in some models with code of their own, it takes all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autoquant_ray.errors import ConfigError
from autoquant_ray.models.quantizable import PlannedModule, expert_place

if TYPE_CHECKING:
    import torch

    from autoquant_ray.formats.format import Format


def split_experts(
    model: torch.nn.Module, modules: Sequence[PlannedModule], formats: Sequence[Format]
) -> list[PlannedModule]:
    """The modules of a plan with fused experts told apart.

    Args:
        model: Skeleton or loaded model.
        modules: Its quantizable modules.
        formats: The menu.

    Raises:
        ConfigError: There are no experts; they cannot be told apart; no format of the menu leaves
            inputs in 16 bits.
    """
    split = [single for module in modules for single in _split(model, module)]
    if all(expert_place(module.name) is None for module in split):
        raise ConfigError(
            f"{type(model).__name__} has no routed experts to tell apart; leave out `expert_groups`"
        )
    is_fused = len(split) > len(modules)
    of_weights = [format_ for format_ in formats if format_.kv is None]
    if is_fused and all(format_.input is not None for format_ in of_weights):
        raise ConfigError(
            "`expert_groups` needs a format that leaves inputs in 16 bits, because experts share "
            f"the quantizer of their inputs, and {', '.join(f.name for f in of_weights)} "
            f"quantize{'s' if len(of_weights) == 1 else ''} them; add one such as wint4_afp16"
        )
    return split


def apart_key(module: PlannedModule) -> str | None:
    """What the modules of one expert have in common; None for other modules."""
    place = expert_place(module.name)
    return None if place is None else f"{place[0]}.{place[1]}"


def _split(model: torch.nn.Module, module: PlannedModule) -> Iterator[PlannedModule]:
    if module.kind != "experts":
        yield module
        return
    owner = model.get_submodule(module.name)
    others = [name for name, _ in owner.named_parameters(recurse=False)]
    if module.is_transposed:
        raise ConfigError(
            f"{module.name} ({type(owner).__name__}) is quantized by ModelOpt as one tensor, so "
            "that its experts cannot be told apart; leave out `expert_groups`"
        )
    if set(others) != set(module.parameters):
        raise ConfigError(
            f"{module.name} ({type(owner).__name__}) has parameters beside its experts' weights "
            f"({', '.join(sorted(set(others) - set(module.parameters)))}), so that its experts "
            "cannot be told apart; leave out `expert_groups`"
        )
    for number in range(module.shapes[0][0]):
        yield replace(
            module,
            name=f"{module.name}.{number}",
            kind="expert",
            shapes=tuple(shape[1:] for shape in module.shapes),
            expert=number,
            shared_with=None if module.shared_with is None else f"{module.shared_with}.{number}",
        )
