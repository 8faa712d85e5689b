"""Validated descriptions of a scan and an evaluation, and how people write their values.

Imports ``serving``, ``formats`` and below. A field is declared once; command line and files follow.
"""
