"""Samples and steps: which tokens form a sample, which samples share a step.

That depends on the data and the :class:`~autoquant_ray.data.texts.DataSpec` alone, never on how
texts were chunked or where they were tokenized.

Not here: chats and images (:mod:`autoquant_ray.data.chat_encoding`), and the distribution of the
tokenization over a cluster (:mod:`autoquant_ray.distributed.tokenization`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError
from autoquant_ray.wording import fitted

Tokens = TypeVar("Tokens", list[int], "array[int]")
"""Token ids of one text or sample: a list, or an array of C ints, which is a ninth of the size."""

MIN_SAMPLE_TOKENS = 2  # a sample of one token predicts nothing


@dataclass
class DataCounts:
    """What happened to the input; texts after the last sample count nowhere.

    Attributes:
        read: Texts consumed.
        used: Samples given out; with ``pack`` these are windows. All else counts samples that a
            scan keeps for measurements too.
        empty: Texts of white space only. With ``pack`` the line ends of such lines of a text
            file still belong to the running text.
        too_short: Samples skipped because they had fewer than 2 tokens.
        cut: Samples that were cut to ``seq_len``.
        no_answer: Chats of whose answers nothing was left within ``seq_len``.
        bad: Chats that were skipped because they cannot be used: an image is damaged, the template
            refuses them, or they hold no messages.
    """

    read: int = 0
    used: int = 0
    empty: int = 0
    too_short: int = 0
    cut: int = 0
    no_answer: int = 0
    bad: int = 0


class _Sized(Protocol):
    def __len__(self) -> int: ...


Text = TypeVar("Text", bound=_Sized)
"""A text, or a conversation, whose length is that of its texts and images."""


def chunk_texts(
    texts: Iterator[Text], chunk_size: int, max_characters: int = 2**20
) -> Iterator[list[Text]]:
    """Group texts into lists of ``chunk_size``; shorter at the end, and where texts are long.

    Args:
        texts: Read no further than needed.
        chunk_size: Texts per list at most.
        max_characters: A list ends with the text that reaches this length in total.
    """
    chunk: list[Text] = []
    num_characters = 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if len(chunk) == chunk_size or num_characters >= max_characters:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def tokenize_chunk(
    tokenizer: Callable[..., Any], texts: list[str], *, pack: bool
) -> list[list[int]]:
    """Tokenize texts without padding or truncation.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        texts: Texts; an empty one gives no tokens, not even special ones.
        pack: Leave out special tokens: those before a text open every window instead
            (:func:`opening_tokens`).

    Returns:
        One list of token ids per text.
    """
    filled = [text for text in texts if text]
    if not filled:
        return [[] for _ in texts]
    # verbose: a text longer than the model's context is cut or chopped later, so no warning.
    encoding = tokenizer(
        filled, add_special_tokens=not pack, return_attention_mask=False, verbose=False
    )
    token_lists = iter(encoding["input_ids"])
    return [list(next(token_lists)) if text else [] for text in texts]


def opening_tokens(tokenizer: Callable[..., Any]) -> list[int]:
    """Special tokens that a tokenizer puts before a text, such as BOS.

    A model that was trained with them sees them first wherever it is served, and some lose much
    without: Gemma-3 270M 3.1 nats per token with BOS and 4.2 without, on the same 511 tokens.
    """
    plain, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


class SampleAssembler(Generic[Tokens]):
    """Makes samples of token lists that arrive in order, until there are ``num_samples``.

    Works on lists and on arrays; samples are of the kind that came in.

    Args:
        spec: The rules: number and length of samples, packed or not.
        counts: Where to count, shared with other assemblers; None for counts of its own.
        opening: Tokens that every window of a packed text begins with; cut where they would leave
            no room for one of text.

    Attributes:
        counts: What happened to the input so far.
    """

    def __init__(
        self,
        spec: DataSpec,
        counts: DataCounts | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        self.counts = DataCounts() if counts is None else counts
        self._spec = spec
        self._opening = opening[: spec.seq_len - 1] if spec.pack else ()
        self._window: Tokens | None = None

    @property
    def is_full(self) -> bool:
        """Whether ``num_samples`` have been given out; further input is ignored."""
        return self.counts.used >= self._spec.num_samples

    def add(self, token_lists: list[Tokens], texts_empty: list[bool]) -> list[Tokens]:
        """Take the next texts.

        Args:
            token_lists: Token ids of each text.
            texts_empty: Whether each text is white space only.

        Returns:
            The samples completed by these texts, each of 2 to ``seq_len`` token ids.
        """
        samples: list[Tokens] = []
        for tokens, is_empty in zip(token_lists, texts_empty, strict=True):
            if self.is_full:
                break
            self.counts.read += 1
            self.counts.empty += is_empty
            if self._spec.pack:
                samples += self._chop(tokens)
            elif not is_empty:
                samples += self._take(tokens)
        return samples

    def finish(self) -> list[Tokens]:
        """Give out what remains: with ``pack``, the last window if it has 2 tokens or more."""
        rest, self._window = self._window, None
        return self._take(self._opened(rest)) if rest and not self.is_full else []

    def has_window(self) -> bool:
        """Whether what remains of a packed text would be a sample."""
        return self._window is not None and len(self._window) >= MIN_SAMPLE_TOKENS

    def _chop(self, tokens: Tokens) -> list[Tokens]:
        running = self._window + tokens if self._window else tokens
        size = self._spec.seq_len - len(self._opening)
        num_windows = min(len(running) // size, self._spec.num_samples - self.counts.used)
        self._window = running[num_windows * size :]
        self.counts.used += num_windows
        return [self._opened(running[i * size : (i + 1) * size]) for i in range(num_windows)]

    def _opened(self, window: Tokens) -> Tokens:
        opened = window[:0]
        opened.extend(self._opening)
        return opened + window

    def _take(self, tokens: Tokens) -> list[Tokens]:
        if len(tokens) < MIN_SAMPLE_TOKENS:
            self.counts.too_short += 1
            return []
        self.counts.used += 1
        self.counts.cut += len(tokens) > self._spec.seq_len
        return [tokens[: self._spec.seq_len]]


def require_usable(counts: DataCounts, source: str, reasons: Sequence[str] = ()) -> None:
    """Check that the data gave at least one sample.

    Args:
        counts: What became of the input.
        source: For the message.
        reasons: Why chats cannot be used.

    Raises:
        DataError: It gave none; the message says what became of the texts.
    """
    if counts.used == 0:
        if counts.no_answer or counts.bad:
            why = f" ({fitted(reasons[0], 200)})" if reasons else ""
            raise DataError(
                f"data source {source} holds no usable sample: of {counts.read} chats read, "
                f"{counts.no_answer} have no answer within `seq_len` and {counts.bad} cannot be "
                f"used{why}; raise `seq_len`, or give others"
            )
        why = "it has no row"
        if counts.read:
            why = (
                f"of {counts.read} texts read, {counts.empty} are empty and {counts.too_short} "
                f"have fewer than {MIN_SAMPLE_TOKENS} tokens"
            )
        raise DataError(
            f"data source {source} holds no usable sample: {why}; give texts of at "
            f"least {MIN_SAMPLE_TOKENS} tokens"
        )


def pack_steps(lengths: Sequence[int], step_tokens: int) -> list[list[int]]:
    """Group samples of similar length into steps, longest first.

    Args:
        lengths: Tokens of each sample.
        step_tokens: Tokens, padding included, that a step may hold. A longer sample is a step of
            its own.

    Returns:
        Positions of the samples of each step; every position occurs once.
    """
    steps: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if steps and (len(steps[-1]) + 1) * lengths[steps[-1][0]] <= step_tokens:
            steps[-1].append(position)
        else:
            steps.append([position])
    return steps
