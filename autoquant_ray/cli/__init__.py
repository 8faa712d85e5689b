"""The command line: a file per command or family of commands, and what they print.

Imports every package, most of them only when a command runs: ``--help``, ``solve`` and ``report``
start without torch and Ray. HiGHS may write to file descriptor 1, which ``--json`` must keep clean
(:func:`~autoquant_ray.cli.edge.only_ours_on_stdout`).
"""
