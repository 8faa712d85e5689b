"""Two runs and many nights: comparison, drift, nightly jobs, history, the site.

Imports ``jobs``, ``report``, ``allocate``, ``runs`` and below. No torch, no Ray in its own files.
"""
