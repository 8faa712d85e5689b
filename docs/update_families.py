"""Writes the tables of ``model-families.md``.

``python docs/update_families.py`` tries the families that are tested, which takes about a minute.
``--all`` tries every family of the installed transformers, some 240, in about 18 minutes of one
core; ``--only`` tries some of them, and leaves the rows of the others.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import every_family
import family_checks
from families import FAMILIES


def main() -> None:
    """Read the arguments, try the families, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every family of transformers")
    parser.add_argument("--only", metavar="TYPE,...", help="with --all: these model types only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    arguments = parser.parse_args()
    _be_quiet()
    if not arguments.all:
        rows = [family_checks.family_row(family) for family in FAMILIES]
        page = family_checks.PAGE.read_text(encoding="utf-8")
        family_checks.PAGE.write_text(family_checks.update(page, rows), encoding="utf-8")
        return
    names = every_family.all_families()
    if arguments.only:
        asked = arguments.only.split(",")
        if unknown := sorted(set(asked) - set(names)):
            parser.error(f"--only {unknown[0]}: not a model type of the installed transformers")
        names = asked
    if arguments.jobs == 1:
        every_family.write_rows((name, every_family.family_row(name)) for name in names)
        return
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, _be_quiet) as pool:
        every_family.write_rows(pool.imap_unordered(_named_row, names))


def _named_row(name: str) -> tuple[str, str]:
    return name, every_family.family_row(name)


def _be_quiet() -> None:
    """One thread per process; what libraries remark on a model stands in its row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
