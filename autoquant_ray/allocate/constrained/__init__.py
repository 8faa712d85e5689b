"""The frontier under the constraints of a plan, which the plan's report draws.

Imports ``allocate``, ``serving``, ``runs`` and below. No torch, no Ray.
"""
