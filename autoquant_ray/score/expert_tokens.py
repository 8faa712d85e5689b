"""How many tokens the routed experts of a model saw, and which of them saw too few.

A group of fused experts has one score for all its experts. What an expert adds to it comes from the
tokens that were routed to it; one that saw none adds nothing, whatever a format does to it. An
expert that is a group of its own has no score then, and stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.quantizable import expert_place
from autoquant_ray.plan.silent_experts import Counts

if TYPE_CHECKING:
    import torch


def routed_tokens(
    inputs: Sequence[torch.Tensor], live_T: torch.Tensor, num_experts: int
) -> torch.Tensor | None:
    """Tokens routed to each expert ``(experts,)``, int64; None where no input holds the routes.

    Args:
        inputs: Inputs of a fused experts module, each with T rows; the first one of integers holds
            the experts of each token.
        live_T: Which tokens count.
        num_experts: Number of experts; a larger index means none.
    """
    routes = [states for states in inputs if not states.is_floating_point()]
    if not routes:
        return None
    chosen_TK = routes[0].long().clamp(max=num_experts)
    live_TK = live_T.to(chosen_TK)[:, None].expand_as(chosen_TK)
    counts = chosen_TK.new_zeros(num_experts + 1)  # no bincount: the host would wait for its size
    return counts.scatter_add_(0, chosen_TK.flatten(), live_TK.flatten())[:num_experts]


class TokenCounts:
    """Adds up the tokens with a gradient that each routed expert saw.

    Of experts made of linears, those that reach the first linear of each.

    Args:
        modules: Modules with their entries in the plan: one each, or all single experts.
    """

    def __init__(self, modules: Iterable[tuple[Sequence[Any], Any]]) -> None:
        self._names: dict[str, list[tuple[str, int | None]]] = {}
        self._num_experts: dict[str, int] = {}
        self._linears: dict[str, str] = {}
        groups: dict[int, str] = {}
        places: set[Any] = set()
        for entries, module in modules:
            first = entries[0].planned
            group = groups.setdefault(entries[0].group, first.name)
            place = expert_place(first.name)
            if first.kind == "linear" and place is not None and place not in places:
                places.add(place)
                self._linears[first.name] = group
            if first.kind in ("experts", "expert"):
                self._names[first.path] = [
                    (entry.planned.name, entry.planned.expert) for entry in entries
                ]
                self._num_experts[first.path] = len(getattr(module, first.parameters[0]))
        self._counts: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, inputs: Sequence[torch.Tensor], gradients_TO: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Count the tokens of a module, if it has experts.

        Args:
            name: The module.
            inputs: Its inputs.
            gradients_TO: Gradients at its output, one per label draw.

        Returns:
            Which tokens have a gradient ``(T,)``; nothing for a module without experts.
        """
        import torch

        if name not in self._names and name not in self._linears:
            return torch.empty(0, dtype=torch.bool)
        live_T = torch.stack([g.ne(0).any(dim=1) for g in gradients_TO]).any(dim=0)
        if name in self._linears:
            counts: torch.Tensor | None = live_T.sum()[None]
        else:
            counts = routed_tokens(inputs, live_T, self._num_experts[name])
        if counts is not None:
            before = self._counts.get(name)
            self._counts[name] = counts if before is None else before + counts
        return live_T

    def by_name(self) -> dict[str, Counts]:
        """Group -> tokens of its experts; of a single expert, a list of one."""
        counts_of: dict[str, Counts] = {}
        for path, names in self._names.items():
            if path not in self._counts:
                continue
            numbers: Counts = self._counts[path].tolist()
            for name, expert in names:
                counts_of[name] = numbers if expert is None else [numbers[expert]]
        for name, group in self._linears.items():
            count = int(self._counts[name]) if name in self._counts else 0
            counts_of.setdefault(group, []).append(count)
        return counts_of

    def forget(self) -> None:
        """Start from zero."""
        self._counts = {}
