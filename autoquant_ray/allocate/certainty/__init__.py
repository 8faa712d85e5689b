"""How sure a solution is, and why: resampled shards, error bars, flips, explanations.

Imports ``allocate``, ``allocate.knapsack``, ``runs`` and below. No torch, no Ray.
"""
