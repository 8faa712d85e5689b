"""Conversations -> samples: the chat template's text, its tokens, the processor's images.

The template sees messages and tools as the file has them (:mod:`autoquant_ray.data.template_text`).
Where the template marks the answers itself (``{% generation %}``), its marks count; else
:mod:`autoquant_ray.data.answer_spans` finds them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from autoquant_ray.data.answer_spans import (
    AnswerSpan,
    answer_spans,
    mask_by_offsets,
    mask_by_prefixes,
)
from autoquant_ray.data.conversations import BadSample, Conversation, Message
from autoquant_ray.data.forms import BadChat
from autoquant_ray.data.samples import RichSample
from autoquant_ray.data.template_text import (
    as_template_takes_them,
    refused,
    require_template,
    template_notes,
    write_text,
)
from autoquant_ray.errors import one_line
from autoquant_ray.models.processor import load_processor
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_TENSORS = ("input_ids", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A conversation as a sample.

    Attributes:
        sample: Not cut.
        num_fixed: First tokens that cannot be cut off: those up to the last of an image.
        where: Source and row.
        notes: What to tell of how the template writes it.
    """

    sample: RichSample
    num_fixed: int
    where: str
    notes: tuple[str, ...] = ()


class ConversationEncoder:
    """Makes samples of conversations with a model's own template and processor.

    Args:
        ref: The model's tokenizer.
        loss_on: ``all`` or ``answer``.
    """

    def __init__(self, ref: TokenizerRef, loss_on: str) -> None:
        self._ref = ref
        self._on_answer = loss_on == "answer"
        self._tokenizer = load_tokenizer(ref)
        self._processor: Any = None

    def encode(self, conversation: Conversation | BadSample) -> Encoded | BadSample:
        """The sample of a conversation.

        Bad where an image is not one, the template or the processor refuses the conversation, or
        its answers cannot be told.

        Raises:
            DataError: The model takes no images.
            ModelError: There is no chat template, or no processor.
        """
        if isinstance(conversation, BadSample):
            return conversation
        try:
            if conversation.images:
                return self._encode_images(conversation)
            return self._encode_text(conversation)
        except BadChat as error:
            return BadSample(str(error))

    def _encode_text(self, conversation: Conversation) -> Encoded:
        template = require_template(self._tokenizer, conversation, self._ref.model)
        conversation = as_template_takes_them(self._tokenizer, conversation)
        render = partial(write_text, self._tokenizer, conversation)
        text = render(conversation.messages, False)
        encode = partial(self._tokenizer, add_special_tokens=False, verbose=False)
        has_offsets = self._tokenizer.is_fast
        encoding = encode(text, return_offsets_mapping=has_offsets)
        tokens_T = np.array(encoding["input_ids"], dtype=np.int32)
        in_loss_T = np.ones(len(tokens_T), dtype=np.bool_)
        if self._on_answer:
            spans = self._spans(conversation, template)
            if has_offsets:
                in_loss_T = mask_by_offsets(np.array(encoding["offset_mapping"]), spans)
            else:

                def tokens_of(end: int, _: int) -> npt.NDArray[Any]:
                    return np.array(encode(text[:end])["input_ids"])

                in_loss_T = mask_by_prefixes(tokens_T, spans, len(text), tokens_of, conversation)
        return Encoded(
            sample=RichSample(tokens_T=tokens_T, in_loss_T=in_loss_T, tensors={}),
            num_fixed=0,
            where=conversation.where,
            notes=template_notes(self._tokenizer, conversation, text),
        )

    def _spans(self, conversation: Conversation, template: str) -> list[AnswerSpan]:
        """The answers, by the template's marks where it has some.

        ``apply_chat_template`` would give a mask of tokens, which is wrong where a marked part ends
        with white space that is in no token.
        """
        if not _MARKS_ANSWERS.search(template):
            return answer_spans(partial(write_text, self._tokenizer, conversation), conversation)
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, marked = render_jinja_template(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **conversation.options},
            )
        except Exception as error:  # noqa: BLE001 - a template raises anything
            raise refused(conversation, error) from None
        return [AnswerSpan(start, end, index) for index, (start, end) in enumerate(marked[0])]

    def _encode_images(self, conversation: Conversation) -> Encoded | BadSample:
        if self._processor is None:
            self._processor = load_processor(self._ref)
        images: list[Any] = []
        for file in conversation.images:
            image = _open_image(file.content or b"")
            if isinstance(image, str):
                return BadSample(f"{conversation.where}: image {file.name} cannot be read: {image}")
            images.append(image)
        require_template(self._processor, conversation, self._ref.model)
        conversation = as_template_takes_them(self._processor, conversation)
        render = partial(write_text, self._processor, conversation)
        text = render(conversation.messages, False)
        arrays = self._process(text, images, conversation)
        tokens_T = arrays["input_ids"][0].astype(np.int32)
        token = getattr(self._processor, "image_token_id", None)
        of_images = tokens_T == token
        in_loss_T = ~of_images  # what stands for an image is nothing that a model predicts
        if self._on_answer:

            def tokens_of(end: int, num_messages: int) -> npt.NDArray[Any]:
                held = images[: _num_images(conversation.messages[:num_messages])]
                ids_1T = self._process(text[:end], held, conversation)["input_ids"]
                ids_T: npt.NDArray[Any] = ids_1T[0]
                return ids_T

            spans = answer_spans(render, conversation)
            in_loss_T &= mask_by_prefixes(tokens_T, spans, len(text), tokens_of, conversation)
        tensors = {name: value for name, value in arrays.items() if name not in _NOT_TENSORS}
        # A processor that does not say what stands for its images leaves nothing to cut off.
        fixed = int(np.flatnonzero(of_images)[-1]) + 1 if of_images.any() else len(tokens_T)
        return Encoded(
            sample=RichSample(tokens_T=tokens_T, in_loss_T=in_loss_T, tensors=tensors),
            num_fixed=fixed,
            where=conversation.where,
            notes=template_notes(self._processor, conversation, text),
        )

    def _process(
        self, text: str, images: Sequence[Any], conversation: Conversation
    ) -> dict[str, npt.NDArray[Any]]:
        """Token ids ``(1, T)`` and tensors."""
        first = self._processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if first and text.startswith(first) else {}
        try:
            output = self._processor(
                text=[text], images=list(images) or None, return_tensors="pt", **special
            )
            return {name: value.numpy() for name, value in output.items()}
        except Exception as error:  # noqa: BLE001 - a processor raises anything
            raise BadChat(
                f"{conversation.where}: the model's processor refuses it: {one_line(error, 160)}"
            ) from None


def _num_images(messages: list[Message]) -> int:
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def _open_image(content: bytes) -> Any:
    """The image, in colour; why not, where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError:
        return "it is no image of a known kind"
    except Exception as error:  # noqa: BLE001 - Pillow raises anything for a damaged file
        return one_line(error)
