"""Work over a Ray cluster: workers, pool, shard queue, failures, placement, progress, metrics.

Imports ``models``, ``data``, ``plan``, ``config``, ``runs`` and below, and Ray. A worker loads the
scoring core by name when it starts, so that a driver holds no model, and no ModelOpt; what workers
send back must be of classes that are imported without it (:mod:`~autoquant_ray.distributed.
scoring`).

``ray.init`` installs a SIGTERM handler of its own; ``placement`` restores ours. ``ray.cancel`` on
a task that finishes at that moment aborts the driver (Ray 2.60); it is never called.
"""
