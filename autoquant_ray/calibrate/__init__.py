"""Statistics of inputs, AWQ's search of scales, and their files.

Imports ``quantize``, ``plan``, ``runs`` and below, and torch.
"""
