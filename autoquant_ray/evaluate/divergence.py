"""What quantization does to a model's predictions, token by token.

For each token, with P the model's distribution and Q the quantized model's:
``KL(P || Q) = sum_v p_v (log p_v - log q_v)`` in nats, the loss ``-log q`` of the text's next
token, and whether P and Q have the same most likely token. Logits are computed for a slice of
tokens at a time, so that those of a whole sample are never in memory.

Shape letters: N predicted tokens, n tokens of a slice, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from autoquant_ray.score.loss import VocabularyLoss


@dataclass(frozen=True, kw_only=True)
class TokenDivergence:
    """Divergence of a quantized model per predicted token.

    Attributes:
        kl_N: KL(P || Q) in nats, float32.
        loss_N: ``-log q`` of the next token in nats, float32.
        agrees_N: Whether both models have the same most likely token, bool.
    """

    kl_N: torch.Tensor
    loss_N: torch.Tensor
    agrees_N: torch.Tensor


@torch.no_grad()
def compare(
    head: VocabularyLoss,
    reference_NH: torch.Tensor,
    others: Sequence[torch.Tensor],
    quantized_heads: Sequence[Callable[[], AbstractContextManager[None]]],
    targets_N: torch.Tensor,
) -> tuple[torch.Tensor, list[TokenDivergence]]:
    """Compare final hidden states of quantized models with those of the unquantized model.

    Args:
        head: Turns hidden states into logits.
        reference_NH: Hidden states of the unquantized model.
        others: Hidden states of each quantized model, ``(N, H)``.
        quantized_heads: Per quantized model, opens a context in which its head is quantized.
        targets_N: Next tokens of the text, int64.

    Returns:
        ``-log p`` of the next token ``(N)``, float32, and the divergence of each model.
    """
    reference_loss: list[torch.Tensor] = []
    slices: list[list[TokenDivergence]] = [[] for _ in others]
    for start in range(0, len(reference_NH), head.slice_tokens):
        rows = slice(start, start + head.slice_tokens)
        targets_n1 = targets_N[rows][:, None].to(reference_NH.device)
        log_p_nV = torch.log_softmax(head.logits(reference_NH[rows]).float(), dim=-1)
        reference_loss.append(-log_p_nV.gather(1, targets_n1)[:, 0])
        p_nV, likeliest_n = log_p_nV.exp(), log_p_nV.argmax(dim=-1)
        for other_NH, quantized_head, parts in zip(others, quantized_heads, slices, strict=True):
            with quantized_head():
                log_q_nV = torch.log_softmax(head.logits(other_NH[rows]).float(), dim=-1)
            parts.append(_slice_divergence(log_p_nV, p_nV, likeliest_n, log_q_nV, targets_n1))
    return torch.cat(reference_loss).cpu(), [_joined(parts) for parts in slices]


def _slice_divergence(
    log_p_nV: torch.Tensor,
    p_nV: torch.Tensor,
    likeliest_n: torch.Tensor,
    log_q_nV: torch.Tensor,
    targets_n1: torch.Tensor,
) -> TokenDivergence:
    """Divergence of the tokens of a slice; overwrites ``log_q_nV``."""
    loss_n = -log_q_nV.gather(1, targets_n1)[:, 0]
    agrees_n = log_q_nV.argmax(dim=-1) == likeliest_n
    # float64: the terms of this sum over a large vocabulary nearly cancel.
    products_nV = log_q_nV.neg_().add_(log_p_nV).mul_(p_nV)
    kl_n = products_nV.sum(dim=-1, dtype=torch.float64).float()
    return TokenDivergence(kl_N=kl_n, loss_N=loss_n, agrees_N=agrees_n)


def _joined(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    return TokenDivergence(
        kl_N=torch.cat([part.kl_N for part in parts]).cpu(),
        loss_N=torch.cat([part.loss_N for part in parts]).cpu(),
        agrees_N=torch.cat([part.agrees_N for part in parts]).cpu(),
    )
