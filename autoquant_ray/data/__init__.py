"""Calibration data: rows to texts and chats, to tokens, to samples and shards.

Imports ``models``, ``runs``, ``config`` and below. No torch, no Ray. A shard depends on the data
and the seed alone, never on the number of workers.
"""
