"""The run directory: names of files, atomic writes, ``run.json``, lease, events, hashes.

Imports ``config``, ``formats`` and below. No torch, no Ray; nothing is ever unpickled.

Write through :class:`~autoquant_ray.runs.directory.RunDirectory`, which gives the whole content at
once: leaving ``with`` on a pyarrow output stream by an exception completes the upload, and a
truncated object stays. Find rows of scores by (group, format), never by position. A new event needs
a class in :mod:`~autoquant_ray.runs.events`; a test compares the code's calls with the schema.
"""
