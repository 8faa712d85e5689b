"""What serving engines accept: formats by engine and GPU, fused layers, KV caches, and why.

Imports ``formats`` and below. No torch, no Ray: the tables come from the engines' public sources,
and none of the engines is installed. ModelOpt names a format after its weights and drops the rest;
only what :mod:`~autoquant_ray.serving.layer_formats` names can be exported.
"""
