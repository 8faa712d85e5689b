"""Scores and allocations that other tools made: ModelOpt's manifests, AutoRound, mlx-lm.

Imports ``export``, ``solve``, ``allocate``, ``runs`` and below. No torch, no Ray.
"""
