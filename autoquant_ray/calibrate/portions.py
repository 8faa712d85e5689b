"""Weights that GPTQ rounds, in portions whose second moments of inputs have room beside each other.

A layer's may be many: each of 128 experts has two inputs, and each input has (channels)^2 numbers
for each half of the data. So what is in memory together is counted in linears and experts, not in
layers; a pass over the data gives the moments of one block of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from autoquant_ray.calibrate.hessians import HessianCollector, RoutedExperts
from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import PlannedModule, expert_place
from autoquant_ray.plan.memory import portion_bytes
from autoquant_ray.quantize.experts import FusedExperts


class Portion(NamedTuple):
    """A linear, or experts of a fused module.

    Attributes:
        layer: The layer; the number of layers stands for what is outside of them.
        planned: The module's entry in the plan.
        module: The module in the model.
        formats: By GPTQ, the first of each that round alike.
        experts: Numbers of experts; of a linear none.
    """

    layer: int
    planned: PlannedModule
    module: Any
    formats: Sequence[Format]
    experts: tuple[int, ...] = ()

    def weights(self) -> Iterator[tuple[str, str | None]]:
        """Names of the weights, and of the routed experts that they are of; None for others."""
        planned = self.planned
        if planned.kind == "linear":
            place = expert_place(planned.name)
            yield planned.name, None if place is None else f"{place[0]}.{place[1]}"
        for parameter in planned.parameters if self.experts else ():
            for number in self.experts:
                yield f"{planned.path}.{parameter}.{number}", f"{planned.path}.{number}"


Block = Sequence[Portion]
"""Portions whose second moments are in memory together."""


def smallest_portions(
    layer: int, planned: PlannedModule, module: Any, formats: Sequence[Format]
) -> Iterator[Portion]:
    """A linear, or each of the experts that an entry of the plan has.

    Arguments as in :class:`Portion`.
    """
    whole = Portion(layer, planned, module, formats)
    if planned.kind == "linear":
        yield whole
    elif planned.expert is not None:
        yield whole._replace(experts=(planned.expert,))
    else:
        yield from (whole._replace(experts=(number,)) for number in range(planned.shapes[0][0]))


def blocks_of(portions: Iterable[Portion], room: int) -> list[list[Portion]]:
    """Portions as they fit in memory together; experts of a module in a block become one portion.

    Args:
        portions: The smallest, in order.
        room: Bytes of second moments; a single portion may need more.
    """
    blocks: list[list[Portion]] = []
    left = 0
    for portion in portions:
        size = portion_bytes(portion.planned)
        if not blocks or size > left:
            blocks.append([])
            left = room
        left -= size
        block = blocks[-1]
        if block and portion.experts and block[-1].planned is portion.planned:
            block[-1] = portion._replace(experts=block[-1].experts + portion.experts)
        else:
            block.append(portion)
    return blocks


def collector_of(block: Block) -> HessianCollector:
    """What sums the second moments that a block needs."""
    linears: dict[str, Any] = {}
    experts: dict[str, RoutedExperts] = {}
    for portion in block:
        planned, module = portion.planned, portion.module
        if planned.kind == "linear":
            linears[planned.name] = module
        elif (others := experts.get(planned.path)) is not None:  # single experts of one module
            numbers = (*others.numbers, *portion.experts)
            experts[planned.path] = others._replace(numbers=numbers)
        else:
            routed = RoutedExperts(module, FusedExperts(module, planned), portion.experts)
            experts[planned.path] = routed
    return HessianCollector(linears, experts)
