"""Validated descriptions of a scan and of an evaluation, and the way people write their values.

Imports ``serving``, ``formats`` and below. No torch, no Ray. A field is declared once; flags and
YAML follow from it. What can change a number is a field (``cpus_per_worker``: threads change the
last bits of a sum), and none of them may be derived from the number of workers.
"""
