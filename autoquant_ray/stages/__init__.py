"""The stages of a scan, file to file: samples, calibrate, score, aggregate.

Imports ``calibrate``, ``allocate``, ``distributed``, ``quantize``, ``plan`` and below, and Ray.
"""
