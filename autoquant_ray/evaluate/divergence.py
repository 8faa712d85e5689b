"""What quantization does to a model's predictions, token by token.

For a token with distribution P of the model and Q of the quantized model:
``KL(P || Q) = sum_v p_v (log p_v - log q_v)`` in nats, the loss ``-log q`` of the text's next
token, and whether both find the same token likeliest. Logits exist for a slice of tokens only.

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
    """Per predicted token, on the CPU.

    Attributes:
        kl_N: KL(P || Q) in nats, float32.
        loss_N: ``-log q`` of the next token in nats, float32.
        agrees_N: Whether both have the same likeliest token, bool.
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
    """Compare final hidden states of quantized models with those of the model.

    Args:
        head: Turns hidden states into logits.
        reference_NH: Hidden states of the model.
        others: Those of each quantized model, ``(N, H)``.
        quantized_heads: For each of them, opens a context in which its head is quantized.
        targets_N: Next tokens of the text, int64.

    Returns:
        ``-log p`` of the next token ``(N)``, float32, and the divergence of each model.
    """
    reference_loss: list[torch.Tensor] = []
    columns: list[list[list[torch.Tensor]]] = [[[], [], []] for _ in others]
    for start in range(0, len(reference_NH), head.slice_tokens):
        rows = slice(start, start + head.slice_tokens)
        targets_n1 = targets_N[rows][:, None].to(reference_NH.device)
        log_p_nV = torch.log_softmax(head.logits(reference_NH[rows]).float(), dim=-1)
        reference_loss.append(-log_p_nV.gather(1, targets_n1)[:, 0])
        p_nV, likeliest_n = log_p_nV.exp(), log_p_nV.argmax(dim=-1)
        for other_NH, quantized_head, (kl, loss, agrees) in zip(
            others, quantized_heads, columns, strict=True
        ):
            with quantized_head():
                log_q_nV = torch.log_softmax(head.logits(other_NH[rows]).float(), dim=-1)
            loss.append(-log_q_nV.gather(1, targets_n1)[:, 0])
            agrees.append(log_q_nV.argmax(dim=-1) == likeliest_n)
            # A sum over a large vocabulary of terms that nearly cancel.
            products_nV = log_q_nV.neg_().add_(log_p_nV).mul_(p_nV)
            kl.append(products_nV.sum(dim=-1, dtype=torch.float64).float())
    divergences = [
        TokenDivergence(
            kl_N=torch.cat(kl).cpu(), loss_N=torch.cat(loss).cpu(), agrees_N=torch.cat(agrees).cpu()
        )
        for kl, loss, agrees in columns
    ]
    return torch.cat(reference_loss).cpu(), divergences
