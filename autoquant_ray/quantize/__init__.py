"""Fake quantization through ModelOpt: weights, inputs, experts, attentions.

Imports ``plan``, ``models``, ``formats`` and below, and torch.
"""
