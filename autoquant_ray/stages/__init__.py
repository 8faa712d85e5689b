"""The stages of a scan, file to file: samples, calibrate, score, aggregate.

A part of the scores has rows of experts that saw no token, and ``sensitivity.parquet`` has not:
rows are looked up by (group, format), never by position.

Imports ``calibrate``, ``allocate``, ``distributed``, ``quantize``, ``plan`` and below, and Ray.
"""
