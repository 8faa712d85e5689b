"""The stages of a scan, file to file: samples, calibrate, score, aggregate.

Imports ``score``, ``calibrate``, ``distributed``, ``allocate`` and below, and Ray.
"""
