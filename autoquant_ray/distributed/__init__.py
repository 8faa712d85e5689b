"""Work over a Ray cluster: workers, pool, shard queue, failures, placement, progress, metrics.

Imports ``models``, ``data``, ``config``, ``runs`` and below, and Ray. A worker loads the scoring
core by name when it starts, so that a driver holds neither torch nor a model.
"""
