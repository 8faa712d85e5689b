"""Models and tokenizers: found, fingerprinted, built on the meta device, loaded.

Imports ``runs``, ``config``, ``formats`` and below; torch only inside functions.
"""
