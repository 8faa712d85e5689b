"""The command line: a file per command or family of commands, and what they print.

May import every package, most of them only when a command runs.
"""
