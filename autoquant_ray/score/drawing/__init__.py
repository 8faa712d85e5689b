"""Which rows of a module are scored when not all are, how many, and with what error.

Imports ``distributed`` and below, and torch, but for :mod:`~autoquant_ray.score.drawing.shares`,
which a driver reads. No Ray.
"""
