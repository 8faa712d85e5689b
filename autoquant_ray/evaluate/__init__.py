"""Measured losses: evaluating, auditing and refining a solution, and its rivals.

Imports ``stages``, ``score``, ``imports``, ``report``, ``allocate`` and below; torch in three
files; Ray.
"""
