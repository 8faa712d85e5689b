"""Charts of a report: numbers in, places in pixels or a library's data out.

Imports ``allocate``, ``formats`` and below; knows nothing of runs and files. No torch, no Ray.
"""
