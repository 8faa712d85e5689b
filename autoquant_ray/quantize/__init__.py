"""Fake quantization through ModelOpt: weights, inputs, experts, attentions.

Imports ``plan``, ``models``, ``formats`` and below, and torch. No Ray.

ModelOpt's quantizers keep state per shape (block reshapes): build a new one for each weight. It
quantizes static NVFP4 weights of fused layers under one scale, found by the layers' names, which a
weight alone does not know (:class:`~autoquant_ray.quantize.weight_search.WeightScales`). Its AWQ
and SmoothQuant divide weights in place, a tied embedding included.
"""
