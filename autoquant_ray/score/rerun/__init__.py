"""What lets a decoder layer run twice alike: the state of its modules put back, its products kept.

Imports torch, and nothing of this package.
"""
