"""Models and tokenizers: found, fingerprinted, built on the meta device, loaded.

Imports ``runs``, ``config``, ``formats`` and below; torch inside functions, no Ray. A module's name
in the plan need not be its name in the model: an expert of a fused module lives at
``PlannedModule.path``.
"""
