"""Budgets to formats: the problem, its options, the search, the allocation, its manifests.

Imports ``allocate.knapsack``, ``plan``, ``serving``, ``runs``, ``config``, ``formats`` and below.
No torch, no Ray.
"""
