"""What ModelOpt's quantizers call for numbers that its own kernels do not make here.

Imports ``formats`` and the top level, and torch. No Ray. Each module registers its function with
ModelOpt, under its hook for such functions, when it is imported.
"""
