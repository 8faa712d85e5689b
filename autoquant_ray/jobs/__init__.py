"""Job files, sweeps, and jobs on a Ray cluster.

Imports ``config``, ``runs``, ``allocate`` and the stories; Ray only to talk to a cluster.
"""
