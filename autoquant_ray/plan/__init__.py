"""The plan: groups x formats x costs, from the config alone; memory and work estimates.

Imports ``models``, ``runs``, ``config``, ``formats`` and below; torch only inside functions.
"""
