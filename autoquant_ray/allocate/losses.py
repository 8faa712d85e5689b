"""Facts of an allocation: predicted loss, bits, bytes of the model, whether it is uniform."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.group_choices import GroupChoices
from autoquant_ray.allocate.options import BITS_PER_BYTE
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import without_method


def chosen_formats(problem: Problem, allocation: Allocation) -> dict[str, str]:
    """Format of every group, unsearched ones included, in the model's order."""
    return {name: allocation.formats.get(name, NONE) for name in problem.groups}


def allocation_key(formats: Mapping[str, str]) -> str:
    """Digest of searched group -> format: equal allocations have equal keys."""
    text = json.dumps(sorted(formats.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def average_bits(
    groups: Sequence[GroupChoices],
    formats: Mapping[str, str],
    resource: str = "storage",
    bits_per_unit: float = BITS_PER_BYTE,
) -> float:
    """Average bits per weight of groups under the given formats, by one of the costs.

    By ``storage``, which is effective bits: bytes that the groups add to the model over the number
    of their weights that are stored on their own.
    """
    cost = math.fsum(group.cost(formats[group.name], resource) for group in groups)
    return cost * bits_per_unit / float(sum(group.weights(resource) for group in groups))


def predicted_loss(scores: Mapping[tuple[str, str], float], formats: Mapping[str, str]) -> float:
    """Summed scores of the formats; 16 bits lose nothing.

    Args:
        scores: (group, format) -> nats per token.
        formats: Group -> format; groups without a score may be there in 16 bits.
    """
    return math.fsum(scores[group, name] for group, name in formats.items() if name != NONE)


def model_bytes(problem: Problem, formats: Mapping[str, str]) -> float:
    """Bytes of the whole model's weights; groups without a format stay in 16 bits."""
    return problem.other_bytes + math.fsum(
        group.cost(formats.get(group.name, NONE), "storage") for group in problem.groups.values()
    )


def sizes(problem: Problem, formats: Mapping[str, str]) -> tuple[float, float]:
    """Effective bits and bytes of the whole model, as above, where many are asked for.

    Args:
        problem: Groups with their costs.
        formats: Searched group -> format.
    """
    menus = problem.menus
    stored = menus.chosen_costs("storage", formats)
    bits = math.fsum(stored) * BITS_PER_BYTE / menus.weights("storage")
    return bits, problem.other_bytes + math.fsum([*stored, *problem.unsearched_bytes])


def uniform_format(problem: Problem, formats: Mapping[str, str]) -> str | None:
    """The format, without its method, of all quantized weights; None where they have several.

    Args:
        problem: Groups; caches do not count.
        formats: Group -> format.
    """
    names = {
        without_method(format_)
        for group, format_ in formats.items()
        if format_ != NONE and not problem.groups[group].is_cache
    }
    return names.pop() if len(names) == 1 else None
