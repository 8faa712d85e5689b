"""Every family of the installed transformers, tried with a small model: rows of a table.

The columns of a family that is tried by hand (:mod:`families`) and of these agree; what differs is
that a config is made from the family's defaults, and that a reason stands where something is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from families import random_model
from family_checks import (
    PAGE,
    Family,
    reason,
    table_row,
    try_export,
    try_padding,
    try_parity,
    try_plan,
    try_scan,
)
from tiny_configs import TEXT_TOKENS, tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from autoquant_ray.errors import AutoQuantError

START, END = (
    "<!-- all families: made by docs/update_families.py --all -->\n",
    "<!-- end of all -->\n",
)
COLUMNS = ("model type", "plan", "scan", "padding", "parity", "export", "notes")
WITHOUT_TEXT = {
    "diffusion_gemma": "writes blocks of tokens by diffusion, not one token after the other",
    "evolla": "is registered as a language model by its name alone: no class takes its config",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "writes codes of sound",
    "musicgen_melody": "writes codes of sound",
    "vision-encoder-decoder": "an encoder of images and a decoder that reads its states",
}
"""Families that are no language model by themselves."""
_NOTHING = ""


def all_families() -> list[str]:
    """Model types that transformers loads as a causal language model, with images or without."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def family_row(name: str) -> str:
    """Try a family; its row of the table."""
    cells, notes = _cells(name)
    return table_row([f"`{name}`", *cells, *[_NOTHING] * (5 - len(cells)), "; ".join(notes)])


def _cells(name: str) -> tuple[list[str], list[str]]:
    """What its columns say, as far as it comes, and its notes."""
    with tempfile.TemporaryDirectory() as folder:
        if name in WITHOUT_TEXT:
            return [], [f"not tried: {WITHOUT_TEXT[name]}"]
        try:
            model = small_model(name)
        except Exception as error:  # noqa: BLE001  whatever transformers says
            return [], [f"no small model: {reason(error)}"]
        model.save_pretrained(folder)
        family = Family(name, Path(folder), model, num_ids=TEXT_TOKENS)
        cells: list[str] = []
        for step in (try_plan, try_scan, try_padding, try_parity, try_export):
            cell, goes_on = _try(step, family)
            cells.append(cell.replace(f" {folder} ", " "))
            if not goes_on:
                break
        return cells, family.notes


def small_model(name: str) -> Any:
    """A random model of a family in float32, evaluation mode; nothing in it is all zeros."""
    kind = transformers.CONFIG_MAPPING[name]
    sees_images = kind in transformers.AutoModelForImageTextToText._model_mapping
    return random_model(tiny_config(kind), sees_images=sees_images)


def _try(step: Callable[[Family], str], family: Family) -> tuple[str, bool]:
    """A cell, and whether what follows makes sense."""
    try:
        return step(family), True
    except AutoQuantError as error:
        return f"refused: {reason(error)}", step is try_parity
    except AssertionError as error:
        return f"no: {reason(error)}", step is not try_plan
    except Exception as error:  # noqa: BLE001  whatever stops a family is what its row says
        return f"no: {type(error).__name__}: {reason(error)}", step is not try_plan


def update(page: str, rows: Mapping[str, str]) -> str:
    """The page with these rows; other families keep theirs, and the text around the table stays.

    Args:
        page: Markdown.
        rows: Family -> its row.
    """
    before, _, rest = page.partition(START)
    table, _, after = rest.partition(END)
    kept = {row.split("`")[1]: row for row in table.splitlines() if row.startswith("| `")}
    kept |= rows
    names = sorted(kept)
    lines = [summary([kept[name] for name in names]), "", table_row(COLUMNS)]
    lines += ["|---" * len(COLUMNS) + "|", *(kept[name] for name in names), ""]
    return f"{before}{START}{chr(10).join(lines)}{END}{after}"


def summary(rows: Sequence[str]) -> str:
    """A sentence that counts the rows by what they say."""
    cells = [dict(zip(COLUMNS, row.strip("| ").split(" | "), strict=False)) for row in rows]
    yes = {name: sum(c.get(name, "").startswith("yes") for c in cells) for name in COLUMNS[1:6]}
    refused = sum("refused: " in row for row in rows)
    built = sum("no small model: " in row or "not tried: " in row for row in rows)
    return (
        f"{len(rows)} families: {yes['scan']} are scanned (padded as alone: {yes['padding']}; "
        f"equal to ModelOpt or autograd: {yes['parity']}; exported in FP8: {yes['export']}), "
        f"{refused} are refused, {built} were not tried."
    )


def write_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Write rows into the page, each as soon as it is there.

    Args:
        rows: Family and its row.
    """
    for name, row in rows:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(update(page, {name: row}), encoding="utf-8")
