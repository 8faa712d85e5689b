"""How long an allocation takes, from choices in memory, and how far from proven best it may be.

Weights come in a few sizes, as in real models; in ``experts`` 24 of 25 groups have one size.
Scores follow size x 4^-bits with lognormal noise (sd 1.5), or with noise of a millionth, or spread
over twelve orders of magnitude; or they depend on the format alone, up to a thousandth. Prints one
line per case and the machine as the last line of JSON.

    python benchmarks/knapsack.py
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import numpy.typing as npt
from machine import describe_machine

from autoquant_ray.allocate.allocation import (
    Budget,
    frontier,
    frontier_allocation,
    frontier_allocations,
    solve,
)
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.resolve import Resolver

Floats = npt.NDArray[np.float64]

SIZES = (2**20, 2**22, 3 * 2**21, 2**24)
BUDGETS = (4.5, 6.0, 8.0)
CASES = [
    (250, 13, "noisy", "few"),
    (2_000, 13, "noisy", "few"),
    (50_000, 12, "noisy", "few"),
    (50_000, 12, "noisy", "experts"),
    (50_000, 12, "nearly equal", "few"),
    (50_000, 12, "nearly equal", "experts"),
    (50_000, 12, "same for all sizes", "experts"),
    (50_000, 12, "twelve orders", "few"),
    (50_000, 12, "twelve orders", "experts"),
]


def main() -> None:
    """Time the cases."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for num_groups, num_formats, law, sizes in CASES:
        scores_GF, costs_GF = make_arrays(num_groups, num_formats, law, sizes)
        choices = make_choices(scores_GF, costs_GF)
        for bits in BUDGETS:
            time_solve(f"{num_groups} x {num_formats}, {law}, {sizes} sizes", choices, bits)
        del choices
    for num_groups in (250, 500):
        time_frontier(*make_arrays(num_groups, 13, "noisy", "few"))
    print(json.dumps(describe_machine()))


def time_solve(name: str, choices: list[Choice], bits: float) -> None:
    """Solve for one budget."""
    unit = sum(c.costs["storage"] for c in choices if c.format == "f0") / 4
    budget = Budget(
        resource="storage", limit=bits * unit, unit_per_bit=unit, description=f"--bits {bits}"
    )
    start = time.perf_counter()
    allocation = solve(choices, [budget])
    seconds = time.perf_counter() - start
    print(f"{name}, {bits} bits: {seconds:.3f} s, gap {allocation.optimality_gap:.1e}", flush=True)


def time_frontier(scores_GF: Floats, costs_GF: Floats) -> None:
    """Many budgets, the whole frontier, and one budget for many resampled scores."""
    choices = make_choices(scores_GF, costs_GF)
    name, unit = f"{len(scores_GF)} x {scores_GF.shape[1]}", float(costs_GF[:, 0].sum()) / 4
    limits = (np.linspace(4, 16, 200) * unit).tolist()
    start = time.perf_counter()
    for limit in limits:
        frontier_allocation(choices, "storage", limit)
    print(f"{name}, 200 budgets one by one: {time.perf_counter() - start:.3f} s")
    start = time.perf_counter()
    frontier_allocations(choices, "storage", limits)
    print(f"{name}, 200 budgets at once: {time.perf_counter() - start:.3f} s")
    start = time.perf_counter()
    points = frontier(choices, "storage")
    print(f"{name}, whole frontier ({len(points)} points): {time.perf_counter() - start:.3f} s")
    noise_BGF = np.random.default_rng(1).lognormal(0.0, 0.2, (200, *scores_GF.shape))
    start = time.perf_counter()
    resolver = Resolver(
        Knapsack(
            scores_GF=np.zeros_like(scores_GF),
            costs_RGF=costs_GF[None],
            limits_R=np.array([6 * unit]),
        )
    )
    plan_G = resolver.solve(scores_GF)
    for noise_GF in noise_BGF:
        resolver.solve(scores_GF * noise_GF, plan_G)
    print(
        f"{name}, 200 resamples, exactly solved, at 6.0 bits: {time.perf_counter() - start:.3f} s"
    )


def make_arrays(num_groups: int, num_formats: int, law: str, sizes: str) -> tuple[Floats, Floats]:
    """Scores and costs (G, F) of 4 to 16 bits; the last format loses nothing."""
    generator = np.random.default_rng(0)
    bits_F = np.linspace(4, 16, num_formats)
    sizes_G1 = generator.choice(SIZES, size=(num_groups, 1)).astype(float)
    if sizes == "experts":
        sizes_G1[np.arange(num_groups) % 25 != 0] = 3 * 2**19
    scores_GF = 1e-9 * sizes_G1 * 4.0**-bits_F
    shape = scores_GF.shape
    if law == "noisy":
        scores_GF *= generator.lognormal(0.0, 1.5, shape)
    elif law == "nearly equal":
        scores_GF *= 1 + 1e-6 * generator.random(shape)
    elif law == "same for all sizes":
        scores_GF = 1e-3 * 4.0**-bits_F * (1 + 1e-3 * generator.random(shape))
    elif law == "twelve orders":
        scores_GF *= 10.0 ** generator.uniform(-12, 0, shape)
    scores_GF[:, -1] = 0.0
    return scores_GF, sizes_G1 * bits_F / 8


def make_choices(scores_GF: Floats, costs_GF: Floats) -> list[Choice]:
    """The same as choices."""
    return [
        Choice(
            group=f"group{g}",
            format=f"f{f}",
            score=float(score),
            costs={"storage": float(costs_GF[g, f])},
        )
        for (g, f), score in np.ndenumerate(scores_GF)
    ]


if __name__ == "__main__":
    main()
