"""A chat template, an image processor and generated images for the small models of the tests."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

TEMPLATE = (
    "{% for m in messages %}w240 {{ {'user': 'w241', 'assistant': 'w242'}[m.role] }} "
    "{% if m.content is string %}{{ m.content }} {% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}w251 w250 w252 {% else %}{{ p.text }} {% endif %}{% endfor %}"
    "{% endif %}w243 {% endfor %}{% if add_generation_prompt %}w240 w242 {% endif %}"
)
"""Messages begin with w240 and a word for their role, and end with w243; an image is w250."""


def with_template(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of a saved model with a chat template, and words that stand for images."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder,
        extra_special_tokens={
            "image_token": "w250",
            "video_token": "w249",
            "vision_start_token": "w251",
            "vision_end_token": "w252",
        },
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def with_processor(model: Path, folder: Path) -> Path:
    """The same with an image processor that keeps small images small."""
    with_template(model, folder)
    config = transformers.AutoConfig.from_pretrained(folder).vision_config
    side = 2 * config.patch_size
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        size={"shortest_edge": side * side, "longest_edge": 16 * side * side},
    )
    processor.save_pretrained(folder)
    return folder


def make_image(seed: int, width: int = 64, height: int = 48) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_pairs(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A JSONL file of prompts and answers, each about an image file beside it."""
    rows: list[dict[str, Any]] = []
    for number, (width, height) in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(make_image(number, width, height))
        words = [f"w{word}" for word in np.random.default_rng(number).integers(0, 200, size=12)]
        rows.append(
            {"prompt": " ".join(words[:4]), "answer": " ".join(words[4:]), "image": f"{number}.png"}
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
