"""Two runs and many nights: comparison, drift, nightly jobs, history, site.

Imports ``jobs``, ``report``, ``allocate``, ``runs`` and below. Neither torch nor Ray of its own.
"""
