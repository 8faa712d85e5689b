"""Calibration data: rows to texts and chats, to tokens, to samples and shards.

Imports ``models``, ``runs``, ``config`` and below. A shard depends on the data alone, never on
workers.
"""
