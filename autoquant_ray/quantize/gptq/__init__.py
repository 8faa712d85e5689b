"""GPTQ (https://arxiv.org/abs/2210.17323): a weight's columns are rounded one after the other, and
what a column loses is made up for by the columns that follow.

Imports ``quantize``, ``formats`` and below, and torch. No Ray.
"""
