"""The run directory: names of files, atomic writes, ``run.json``, lease, events, hashes.

Imports ``config``, ``formats`` and below. Nothing here computes; nothing is ever unpickled.
"""
