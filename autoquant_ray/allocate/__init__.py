"""Budgets to formats: the problem, its options, the search, losses, manifests.

Imports ``plan``, ``serving``, ``runs``, ``config``, ``formats`` and below. Neither torch nor Ray.
"""
