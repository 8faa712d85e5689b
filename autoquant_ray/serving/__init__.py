"""What serving engines accept: formats by engine and GPU, fused layers, KV caches.

Imports ``formats`` and below. Never torch: the tables are read from the engines' public sources.
"""
