"""Chats and images: a template, a processor, rows of data, and samples of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autoquant_ray.data.chat_encoding import ConversationEncoder, Encoded
from autoquant_ray.data.conversations import Conversation
from autoquant_ray.data.samples import RichSample
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows

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


def byte_tokenizer(folder: Path, template: str) -> transformers.PreTrainedTokenizerFast:
    """A saved tokenizer whose tokens are bytes, so that what was written can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


TURNS = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7"},
]


def spec_of(source: Any, **changes: Any) -> DataSpec:
    return DataSpec(**{"source": str(source), "num_samples": 100, "seq_len": 64} | changes)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **changes: Any) -> list[Any]:
    return [content for content, _ in read_rows(spec_of(path, **changes))]


def chat(turns: list[dict[str, Any]] = TURNS) -> Conversation:
    return Conversation(messages=turns, images=(), where="data source d.jsonl line 3")


def encoded(encoder: ConversationEncoder, conversation: Conversation | None = None) -> Encoded:
    sample = encoder.encode(conversation or chat())
    assert isinstance(sample, Encoded)
    return sample


def made(length: int, in_loss: list[int], images: int = 0, fixed: int = 0) -> Encoded:
    tensors: dict[str, Any] = {}
    if images:
        tensors = {
            "mm_token_type_ids": np.ones((1, length), dtype=np.int64),
            "pixel_values": np.full((images, 3), length, dtype=np.float32),
        }
    mask = np.zeros(length, dtype=np.bool_)
    mask[in_loss] = True
    sample = RichSample(tokens_T=np.arange(length, dtype=np.int32), in_loss_T=mask, tensors=tensors)
    return Encoded(sample=sample, num_fixed=fixed, where=f"row of {length}")
