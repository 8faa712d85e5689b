"""How long an exact allocation takes, from choices in memory to a proven optimum.

Scores follow size x 4^-bits with lognormal noise (sd 1.5), weights come in a few sizes, as in
real models. Prints one line per case and the machine as the last line of JSON.

    python benchmarks/allocation.py
"""

from __future__ import annotations

import json
import time

import numpy as np
from machine import describe_machine

from autoquant_ray.allocation import Budget, Choice, frontier, frontier_allocation, solve

SIZES = (2**20, 2**22, 3 * 2**21, 2**24)


def main() -> None:
    """Time the cases."""
    for num_groups, num_formats in ((250, 13), (2_000, 13), (50_000, 12)):
        choices, weights = make_choices(num_groups, num_formats)
        for bits in (4.5, 6.0, 8.0):
            limit = bits * weights / 8
            budget = Budget(
                resource="storage", limit=limit, unit_per_bit=weights / 8, description=f"{bits}"
            )
            start = time.perf_counter()
            allocation = solve(choices, [budget])
            seconds = time.perf_counter() - start
            print(
                f"{num_groups} x {num_formats} at {bits} bits: {seconds:.3f} s, "
                f"gap {allocation.optimality_gap:.1e}"
            )
    choices, weights = make_choices(250, 13)
    start = time.perf_counter()
    for bits in np.linspace(4, 16, 200):
        frontier_allocation(choices, "storage", float(bits) * weights / 8)
    print(f"250 x 13, 200 budgets one by one: {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    points = frontier(choices, "storage")
    print(f"250 x 13, whole frontier ({len(points)} points): {time.perf_counter() - start:.3f} s")
    print(json.dumps(describe_machine()))


def make_choices(num_groups: int, num_formats: int, seed: int = 0) -> tuple[list[Choice], int]:
    """Choices of all groups, and their weights in total."""
    generator = np.random.default_rng(seed)
    bits = np.linspace(4, 16, num_formats)
    weights = generator.choice(SIZES, size=num_groups)
    noise = generator.lognormal(0.0, 1.5, size=(num_groups, num_formats))
    scores = 1e-9 * weights[:, None] * 4.0**-bits * noise
    scores[:, -1] = 0.0
    choices = [
        Choice(
            group=f"group{g}",
            format=f"format{f}",
            score=float(scores[g, f]),
            costs={"storage": float(weights[g] * bits[f] / 8)},
        )
        for g in range(num_groups)
        for f in range(num_formats)
    ]
    return choices, int(weights.sum())


if __name__ == "__main__":
    main()
