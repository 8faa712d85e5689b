"""Writes the table of ``model-families.md``: ``python docs/update_families.py``.

Tries every family, which takes about a minute. A test fails when a family's row differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from families import FAMILIES
from family_checks import PAGE, family_row, update

if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [family_row(family) for family in FAMILIES]
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
