"""Formats: names, ModelOpt quantizer attributes, calibration algorithms, stored bits.

Imports only the top level (errors, wording, arrays). Never torch: formats are plain data.
"""
