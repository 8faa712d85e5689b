"""The plan: groups x formats x costs, from the config alone; memory and work estimates.

Imports ``models``, ``runs``, ``config``, ``formats`` and below; torch inside functions, no Ray. A
plan decides nothing: what is chosen from it is an allocation (``allocate``).
"""
