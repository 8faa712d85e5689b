"""What ModelOpt is asked for in the tests of imported manifests."""

from __future__ import annotations

PRESETS = ("INT4_AWQ_CFG", "FP8_DEFAULT_CFG")
BITS = 7.0
UNSEARCHED = "lm_head"
