"""Measured losses: evaluate, audit, refine, and the rivals of a solution.

Imports ``stages``, ``score``, ``imports``, ``allocate`` and below; torch in two files; Ray.
"""
