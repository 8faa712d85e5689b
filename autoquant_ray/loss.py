"""The vocabulary head and the token loss, a slice of tokens at a time.

Logits of a long step times a large vocabulary would not fit; they exist for one slice only. The
model's own ``forward`` runs for each slice with its base model replaced by the finished hidden
states, so that whatever the model does after the head (scaling, soft caps) is kept.

Shape letters: N predicted tokens, n tokens of a slice, V vocabulary, H hidden, K label draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from autoquant_ray.backward import replaced_forward


class VocabularyLoss:
    """Loss of the summed token cross-entropy and its gradient at the hidden states.

    Args:
        model: A causal language model with a linear head.
        slice_elements: Most logits (tokens times vocabulary) that exist at once.
    """

    def __init__(self, model: Any, slice_elements: int = 2**24) -> None:
        self._model = model
        self._head: torch.nn.Linear = model.get_output_embeddings()
        # Some classes call their decoder directly and pass the base model by.
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        self._bodies = {id(m): m for m in (model.base_model, decoder) if m is not None}.values()
        self._slice_tokens = max(1, slice_elements // self._head.out_features)

    def gradients(
        self,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor | None,
        uniforms_KN: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Back-propagate the loss through the head.

        Args:
            hidden_NH: Final hidden states of the predicting positions.
            targets_N: Next tokens, int64, for labels from the data.
            uniforms_KN: Numbers in [0, 1), float64, that draw labels from the model's own
                distribution by inverting its cumulative sum. Exactly one of the two is given.

        Returns:
            K gradients ``(N, H)`` of the summed loss, and the mean over draws of that loss.
        """
        num_draws = 1 if uniforms_KN is None else len(uniforms_KN)
        gradients = [torch.empty_like(hidden_NH) for _ in range(num_draws)]
        total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        for rows in _slices(len(hidden_NH), self._slice_tokens):
            hidden_nH = hidden_NH[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                logits_nV = self.logits(hidden_nH).float()
                if targets_N is not None:
                    labels_Kn = targets_N[rows][None]
                else:
                    assert uniforms_KN is not None
                    labels_Kn = sample_labels(logits_nV, uniforms_KN[:, rows])
                for draw, labels_n in enumerate(labels_Kn):
                    loss = torch.nn.functional.cross_entropy(logits_nV, labels_n, reduction="sum")
                    keep = draw < num_draws - 1
                    (gradient,) = torch.autograd.grad(loss, hidden_nH, retain_graph=keep)
                    gradients[draw][rows] = gradient
                    total += loss.detach().double() / num_draws
        return gradients, total

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Logits ``(n, V)`` of finished hidden states, as the model itself would give them."""
        output = _BaseOutput(hidden_nH[None])
        with ExitStack() as stack:
            for module in self._bodies:
                stack.enter_context(replaced_forward(module, lambda *_, **__: output))
            logits: torch.Tensor = self._model(input_ids=None, use_cache=False).logits
        return logits[0]

    @torch.no_grad()
    def feed_head(self, hidden_NH: torch.Tensor) -> None:
        """Let hooks on the head see its input, without computing the logits."""
        with replaced_forward(self._head, lambda states: states[..., :1]):
            self.logits(hidden_NH)


class _BaseOutput:
    """What a base model returns, with the hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def sample_labels(logits_nV: torch.Tensor, uniforms_Kn: torch.Tensor) -> torch.Tensor:
    """Draw labels ``(K, n)`` from ``softmax(logits)`` by inverting its cumulative sum."""
    cumulative_nV = torch.softmax(logits_nV.detach(), dim=-1).cumsum(dim=-1)
    totals_n1 = cumulative_nV[:, -1:]
    # Below the total even where a number rounds up to 1, so that no label has probability 0.
    points_nK = uniforms_Kn.T.to(cumulative_nV) * totals_n1
    points_nK = points_nK.minimum(torch.nextafter(totals_n1, torch.zeros_like(totals_n1)))
    labels_nK = torch.searchsorted(cumulative_nV, points_nK.contiguous(), right=True)
    return labels_nK.T


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
