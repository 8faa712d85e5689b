"""Checkpoints for serving engines; recipes for other tools.

Imports ``score``, ``allocate``, ``quantize``, ``serving`` and below; torch in three files, never
Ray.
"""
