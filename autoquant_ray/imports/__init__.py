"""Plans that other tools made: ModelOpt's manifests, AutoRound's and mlx-lm's files.

Imports ``export``, ``allocate``, ``runs`` and below. Neither torch nor Ray.
"""
