"""Which linears choose experts: they stay in 16 bits, as engines run them.

Most families have a module of another kind for that, which is no linear. Where it is a plain
linear, ModelOpt quantizes it like any other; here that takes ``search_routers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from autoquant_ray.models.quantizable import PlannedModule, expert_place

ROUTER = "router: it chooses or weighs experts; search_routers searches it too"
_EXPERTS, _ROUTER = "experts", "router"


def routers(model: Any, modules: Sequence[PlannedModule]) -> set[str]:
    """The linears that choose experts, or weigh them.

    They go by that name, or stand beside experts in their block and give a number for each of them,
    or a single one.

    Args:
        model: A skeleton, or a loaded model.
        modules: Its modules that can be quantized.
    """
    sizes: dict[str, set[int]] = {}
    for block, size in _blocks(model, modules):
        if not block.rpartition(".")[2].isdigit():  # a layer: its attention may be as wide
            sizes.setdefault(block, {1}).add(size)
    return {
        module.name
        for module in modules
        if module.kind == "linear"
        and (
            _is_named_router(module.name)
            or any(
                module.shapes[0][0] in counts and module.name.startswith(f"{block}.")
                for block, counts in sizes.items()
                if expert_place(module.name) is None
            )
        )
    }


def _is_named_router(name: str) -> bool:
    return any(part == _ROUTER or part.startswith(f"{_ROUTER}_") for part in name.split("."))


def _blocks(model: Any, modules: Sequence[PlannedModule]) -> Iterator[tuple[str, int]]:
    """Names of the modules that hold experts, and how many these are."""
    counts: dict[str, set[int]] = {}
    for module in modules:
        if (place := expert_place(module.name)) is not None:
            counts.setdefault(place[0], set()).add(place[1])
    for owner, numbers in counts.items():
        yield owner.rpartition(".")[0], len(numbers)
    convolutions = {module.path for module in modules if module.kind == "convolution"}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3 and name not in convolutions:
                yield _owner(name).rpartition(".")[0], parameter.shape[0]


def _owner(name: str) -> str:
    """The module named experts that a module is or is part of; the module itself without one."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(_EXPERTS) + 1]) if _EXPERTS in parts else name
