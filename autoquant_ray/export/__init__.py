"""Checkpoints for serving engines; recipes for other tools.

Imports ``calibrate``, ``quantize``, ``allocate``, ``serving``, ``runs`` and below; torch in four
files, no Ray. A format is exported only if its name in the checkpoint says all of it
(``serving.layer_formats``), and what was written is read back before anybody may use it.
"""
