"""Experts that were chosen apart, as exports see them: one module again where a layer's agree.

Checkpoints and other tools hold a layer's experts in one format each. Where a solution gives all
of them the same, it is that of the fused module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.wording import few

Facts = Mapping[str, Mapping[str, Any]]
"""Module -> ``prefixes``, ``shapes`` and, of a single expert, ``expert``: as in ``run.json``."""

_MOST_NAMES = 3
_LINEARS = {"gate_up_proj_": ("gate_proj_", "up_proj_")}


def fuse_experts(
    chosen: Mapping[str, str], group_of: Mapping[str, str], modules: Facts
) -> tuple[dict[str, str], dict[str, str], dict[str, Mapping[str, Any]]]:
    """Formats, groups and facts of modules, experts of one format under their module's name.

    Args:
        chosen: Module -> name of its format.
        group_of: Module -> its group.
        modules: Module -> its facts.

    Returns:
        The same three; experts of a layer with several formats stay apart.
    """
    formats = dict(chosen)
    groups, facts = dict(group_of), dict(modules)
    fused: dict[str, str] = {}
    for path, singles in _layers(chosen, modules).items():
        used = {chosen[name] for name in singles}
        if len(used) > 1:
            continue
        first = modules[singles[0]]
        facts[path] = {
            "prefixes": first["prefixes"],
            "shapes": [[len(singles), *shape] for shape in first["shapes"]],
        }
        groups[path] = path
        fused |= dict.fromkeys(singles, path)
    formats = {fused.get(name, name): format_ for name, format_ in formats.items()}
    return (
        formats,
        {name: group for name, group in groups.items() if name not in fused},
        {name: values for name, values in facts.items() if name not in fused},
    )


def unfused_names(chosen: Mapping[str, str], modules: Facts) -> dict[str, str]:
    """The same with the linears of single experts, for tools that split fused experts into them.

    Args:
        chosen: Module -> name of its format.
        modules: Module -> its facts.
    """
    names: dict[str, str] = {}
    for name, format_ in chosen.items():
        facts = modules.get(name, {})
        linears = [_LINEARS.get(p, (p,)) for p in facts["prefixes"]] if "expert" in facts else []
        single_names = [
            f"{name}.{linear.removesuffix('_')}" for several in linears for linear in several
        ]
        names |= dict.fromkeys(single_names or [name], format_)
    return names


def require_fused(chosen: Mapping[str, str], modules: Facts, what: str) -> None:
    """Check that no layer has experts of several formats.

    Args:
        chosen: Module -> name of its format, from :func:`fuse_experts`.
        modules: Module -> its facts, likewise.
        what: What cannot hold them.

    Raises:
        ConfigError: One has; names layers and remedies.
    """
    mixed = _layers(chosen, modules)
    if mixed:
        raise ConfigError(
            f"{what} holds the experts of a layer in one format, and the solution gives several in "
            f"{few(list(mixed), _MOST_NAMES)}; solve again with `engine`, or, where every expert "
            "saw a token, with `expert_groups` layer"
        )


def _layers(chosen: Mapping[str, str], modules: Facts) -> dict[str, list[str]]:
    """Fused module -> its single experts among these modules."""
    layers: dict[str, list[str]] = {}
    for name in chosen:
        if "expert" in modules.get(name, ()):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers
