"""Statistics of inputs, AWQ's search of scales, their files; what ``mtq.quantize`` takes of a run.

Imports ``quantize``, ``plan``, ``runs`` and below, and torch. No Ray.

A sum over tokens must count each token once, while maxima do not mind: nothing may watch while a
model runs a second time for a check. ModelOpt's own AWQ search differs in two ways: it runs with
fused experts already quantized, and in ``mtq.auto_quantize`` on a quarter of the steps.
"""
