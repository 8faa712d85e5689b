"""The scoring core, and the scorer that a worker runs.

Imports ``calibrate``, ``quantize``, ``plan``, ``models`` and below, and torch; never Ray.
"""
