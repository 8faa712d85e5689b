"""Formats: names, ModelOpt's quantizer attributes, methods of rounding, bits on disk.

Imports only the top level. No torch, no Ray: a format is plain data. JSON turns the integer keys of
block axes into strings, so read and write them with the two conversions of
:mod:`~autoquant_ray.formats.format`.
"""
