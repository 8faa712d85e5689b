"""The knapsack solved by CBC, which we did not write."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pulp

from autoquant_ray.allocate.knapsack.choices import Choice


def cbc_score(choices: Sequence[Choice], limit: float, scale: float) -> float:
    """The best score within a limit on the storage.

    Args:
        choices: Every (group, format).
        limit: On the summed cost ``storage``.
        scale: Of the objective, which brings it away from CBC's tolerances.
    """
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    names = [f"x{i}" for i in range(len(choices))]
    x = [pulp.LpVariable(name, cat="Binary") for name in names]
    model += pulp.lpSum(c.score * scale * v for c, v in zip(choices, x, strict=True))
    for group in dict.fromkeys(c.group for c in choices):
        model += pulp.lpSum(v for c, v in zip(choices, x, strict=True) if c.group == group) == 1
    costs = (c.costs["storage"] * 1e4 / limit * v for c, v in zip(choices, x, strict=True))
    model += pulp.lpSum(costs) <= 1e4
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, gapAbs=0))
    assert pulp.LpStatus[model.status] == "Optimal"
    return math.fsum(c.score for c, v in zip(choices, x, strict=True) if v.value() > 0.5)
