"""Benchmark tasks of lm-eval: loading them, asking them, and what the scores say.

Imports ``distributed``, ``config`` and ``errors``. No torch, no Ray, and lm-eval inside functions
only: it is the extra ``tasks``. lm-eval's own ``simple_evaluate`` is not called: it lists all
packages of the machine beside every result.
"""
