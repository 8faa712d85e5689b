"""Ray workers that are forked from one process which has torch and ModelOpt imported.

Imports ``distributed`` (its settings of memory) and below. No Ray: it reads a process' environment
when it is imported, which is another one in every process that is forked. No torch at once either:
what is imported before a fork is named by who asks for it.
"""
