"""What reports and model cards say of benchmark tasks.

Imports ``allocate`` and ``wording``; reads nothing.
"""
