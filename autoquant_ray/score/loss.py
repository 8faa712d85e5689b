"""The vocabulary head and the token loss, a slice of tokens at a time.

Logits of a long step times a large vocabulary would not fit; they exist for one slice only. The
model's own ``forward`` runs for each slice with its base model replaced by the finished hidden
states, so that whatever the model does after the head (scaling, soft caps) is kept.

Shape letters: N predicted tokens, n tokens of a slice, V vocabulary, H hidden, K label draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from inspect import signature
from typing import Any

import numpy as np
import torch

from autoquant_ray.models.layers import base_model, head_owner, replaced_forward, text_decoder

_BLOCK = 256  # of the vocabulary, where labels are drawn


class VocabularyLoss:
    """Loss of the summed token cross-entropy and its gradient at the hidden states.

    Args:
        model: A causal language model with a linear head.
        slice_elements: Most logits (tokens times vocabulary) that exist at once.
    """

    def __init__(self, model: Any, slice_elements: int = 2**24) -> None:
        self._model = head_owner(model)
        # Some forwards embed what they are given themselves (Qwen2.5-Omni's): states are embedded.
        self._takes_states = "inputs_embeds" in signature(type(self._model).forward).parameters
        self._head: torch.nn.Linear = model.get_output_embeddings()
        self._bodies = {
            id(body): body for body in (base_model(model), text_decoder(model))
        }.values()
        self.slice_tokens = max(1, slice_elements // self._head.out_features)

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
        for rows in _slices(len(hidden_NH), self.slice_tokens):
            hidden_nH = hidden_NH[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                logits_nV = self.logits(hidden_nH).float()
            probabilities_nV = torch.softmax(logits_nV.detach(), dim=-1)
            if targets_N is not None:
                labels_Kn = targets_N[rows][None].to(logits_nV.device)
            else:
                assert uniforms_KN is not None
                labels_Kn = sample_labels(probabilities_nV, uniforms_KN[:, rows])
            losses_Kn = _token_losses(logits_nV.detach(), probabilities_nV, labels_Kn)
            total += losses_Kn.mean(0).sum().to(total.device)
            pulled = _pull_through_head(logits_nV, hidden_nH, probabilities_nV, labels_Kn)
            for gradient_NH, pulled_nH in zip(gradients, pulled, strict=True):
                gradient_NH[rows] = pulled_nH
            del logits_nV, probabilities_nV
        return gradients, total

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Logits ``(n, V)`` of finished hidden states, as the model itself would give them."""
        output = _BaseOutput(hidden_nH[None])
        with ExitStack() as stack:
            for module in self._bodies:
                stack.enter_context(replaced_forward(module, lambda *_, **__: output))
            states = {"inputs_embeds": hidden_nH[None].detach()} if self._takes_states else {}
            logits: torch.Tensor = self._model(input_ids=None, use_cache=False, **states).logits
        return logits.flatten(0, 1)  # not [0]: its backward would copy the gradient into zeros

    @torch.no_grad()
    def feed_head(self, hidden_NH: torch.Tensor) -> None:
        """Let hooks on the head see its input, without computing the logits."""
        with replaced_forward(self._head, lambda states: states[..., :1]):
            self.logits(hidden_NH)


def _pull_through_head(
    logits_nV: torch.Tensor,
    hidden_nH: torch.Tensor,
    probabilities_nV: torch.Tensor,
    labels_Kn: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Gradients ``(n, H)`` of the loss under each draw of labels; uses up the probabilities."""
    for draw, labels_n in enumerate(labels_Kn):
        is_last = draw == len(labels_Kn) - 1
        # Hooks on the head may hold a gradient until they have seen those of all draws.
        gradient_nV = probabilities_nV if is_last else probabilities_nV.clone()
        label_n1 = gradient_nV.gather(1, labels_n[:, None])
        gradient_nV.scatter_(1, labels_n[:, None], label_n1 - 1)  # p - onehot
        (pulled_nH,) = torch.autograd.grad(
            logits_nV, hidden_nH, gradient_nV, retain_graph=not is_last
        )
        yield pulled_nH


class _BaseOutput:
    """What a base model returns, with the hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _token_losses(
    logits_nV: torch.Tensor, probabilities_nV: torch.Tensor, labels_Kn: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy ``(K, n)``, float64; by the likeliest token, so that nothing underflows."""
    labels_nK = labels_Kn.T
    behind_nK = logits_nV.amax(dim=-1).double()[:, None] - logits_nV.gather(1, labels_nK).double()
    return (behind_nK - probabilities_nV.amax(dim=-1).double().log()[:, None]).T


def draw_uniforms(
    seed: int, position: int, num_draws: int, num_tokens: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(draws, tokens)`` numbers in [0, 1) that belong to one sample alone.

    Args:
        seed: Seed of the scan.
        position: The sample's position in the data set.
        num_draws: Label draws.
        num_tokens: Predicted tokens of the sample.
    """
    return np.random.default_rng([seed, position]).random((num_draws, num_tokens))


def sample_labels(probabilities_nV: torch.Tensor, uniforms_Kn: torch.Tensor) -> torch.Tensor:
    """Draw labels ``(K, n)`` by inverting the cumulative distribution, block by block.

    Args:
        probabilities_nV: Rows that sum to about 1, float32.
        uniforms_Kn: Numbers in [0, 1), float64.
    """
    num_rows, vocabulary = probabilities_nV.shape
    size = min(_BLOCK, vocabulary)
    num_whole = vocabulary // size
    whole_nV = probabilities_nV[:, : num_whole * size]
    sums_nb = whole_nV.reshape(num_rows, num_whole, size).sum(dim=-1)
    if num_whole * size < vocabulary:
        rest_n1 = probabilities_nV[:, num_whole * size :].sum(dim=-1, keepdim=True)
        sums_nb = torch.cat([sums_nb, rest_n1], dim=1)
    cumulative_nb = sums_nb.double().cumsum(dim=1)
    points_nK = _below(uniforms_Kn.T.to(cumulative_nb) * cumulative_nb[:, -1:], cumulative_nb)
    blocks_nK = torch.searchsorted(cumulative_nb, points_nK.contiguous(), right=True)
    blocks_nK.clamp_(max=cumulative_nb.shape[1] - 1)  # where a row is NaN
    before_nK = (cumulative_nb - sums_nb).gather(1, blocks_nK)
    labels = []
    for block_n, point_n in zip(blocks_nK.T, (points_nK - before_nK).T, strict=True):
        columns_nv = block_n[:, None] * size + torch.arange(size, device=block_n.device)
        inside_nv = probabilities_nV.gather(1, columns_nv.clamp(max=vocabulary - 1)).double()
        inside_nv = inside_nv.masked_fill_(columns_nv >= vocabulary, 0.0).cumsum(dim=1)
        point_n1 = _below(point_n[:, None].clamp(min=0.0), inside_nv)
        labels.append(block_n * size + torch.searchsorted(inside_nv, point_n1, right=True)[:, 0])
    return torch.stack(labels).clamp_(max=vocabulary - 1)


def _below(points_nK: torch.Tensor, cumulative_nV: torch.Tensor) -> torch.Tensor:
    """Keep points under the total where rounding reached it: no label has probability 0."""
    totals_n1 = cumulative_nV[:, -1:]
    return points_nK.minimum(torch.nextafter(totals_n1, torch.zeros_like(totals_n1)))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
