"""Find a group by what people type: its name, that of one of its modules, or a part of either."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from autoquant_ray.errors import ConfigError

_MAX_NAMED = 5


def find_group(name: str, groups: Mapping[str, Sequence[str]]) -> str:
    """The one group that a name means.

    A whole name goes before a fragment, and a fragment of whole parts (``1.mlp.down_proj``) before
    one that ends within a part, so that layer 1 can be told from layer 11.

    Args:
        name: A group's name, a module's name, or a fragment that fits one group only.
        groups: Group -> names of its modules.

    Raises:
        ConfigError: No group fits, or several do; names the nearest.
    """
    if name in groups:
        return name
    group_of = {module: group for group, modules in groups.items() for module in modules}
    if name in group_of:
        return group_of[name]
    names = {group: {group, *modules} for group, modules in groups.items()}
    for start in (".", ""):
        fragment = f"{start}{name}{start}"
        matches = [
            group
            for group, aliases in names.items()
            if name and any(fragment in f"{start}{alias}{start}" for alias in aliases)
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"{name!r} fits {len(matches)} groups; give one of: {_few(matches)}")
    everything = sorted({*groups, *group_of})
    close = difflib.get_close_matches(name, everything, n=_MAX_NAMED, cutoff=0.4)
    raise ConfigError(f"no group or module is named {name!r}; closest: {_few(close or everything)}")


def refuse_parts(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Say of a name that should be a group's, and is one of its other modules', which group.

    Args:
        names: What should be names of groups.
        groups: Group -> names of its modules.

    Raises:
        ConfigError: For the first such name.
    """
    owners = {module: group for group, modules in groups.items() for module in modules}
    for name in names:
        if name not in groups and name in owners:
            raise ConfigError(f"{name} shares its format with {owners[name]}; name that group")


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > _MAX_NAMED else ""
    return ", ".join(listed[:_MAX_NAMED]) + more
