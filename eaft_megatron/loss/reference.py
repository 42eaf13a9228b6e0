"""The oracle: EAFT on the full vocabulary, in plain torch, written to be read and not to be fast.

Every fast path of this package is tested against this file, so it imports none of them.
Method: "Entropy-Adaptive Fine-Tuning", arXiv 2601.02151.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_topk_entropy(logits: Tensor, topk: int = 20) -> Tensor:
    """Entropy, in nats, of the distribution over the ``min(topk, V)`` largest logits, renormalised among them.

    Args:
        logits: ``[..., V]`` floating point; -inf means "impossible" and contributes nothing.
        topk: how many of the largest logits to keep.

    Returns:
        ``[...]``, in the dtype of ``logits``.
    """
    largest = logits.topk(min(topk, logits.shape[-1]), dim=-1).values
    # log softmax with log1p: near certainty log_softmax would round the largest's log-probability to 0.
    distance = largest - largest[..., :1]
    log_q = distance - torch.log1p(distance[..., 1:].exp().sum(dim=-1, keepdim=True))
    q = log_q.exp()
    # 0 log 0 = 0; a NaN in log_q stays a NaN.
    return -torch.where(q == 0, torch.zeros_like(q), q * log_q).sum(dim=-1)


def reference_eaft_loss(
    logits: Tensor,
    target: Tensor,
    *,
    topk: int = 20,
    alpha: float = 1.0,
    entropy_norm: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token EAFT loss ``(H / entropy_norm) ** alpha * ce`` with the weight detached (paper, section 3).

    Args:
        logits: ``[..., V]``; give float64 for a reference.
        target: ``[...]`` int64, ``ignore_index`` for tokens that do not count.
        topk: K of the entropy.
        alpha: exponent of the linear gate.
        entropy_norm: None for ``ln(min(topk, V))``; 3.0 is the constant of the authors' released code.
        vocab_size: columns from this one on are padding and do not exist; None for all of them.

    Returns:
        ``(loss, ce, entropy, weight)``, each ``[...]``; zeros at ignored tokens. ``loss`` and ``ce`` are
        differentiable with respect to ``logits``.
    """
    logits = logits[..., :vocab_size]
    if entropy_norm is None:
        entropy_norm = math.log(min(topk, logits.shape[-1]))
    valid = target != ignore_index
    # Ignored rows may hold anything, NaN included: replace them before any arithmetic can see them.
    clean = torch.where(valid.unsqueeze(-1), logits, torch.zeros_like(logits))
    index = torch.where(valid, target, torch.zeros_like(target)).unsqueeze(-1)
    ce = torch.logsumexp(clean, dim=-1) - clean.gather(-1, index).squeeze(-1)
    # torch.logsumexp turns +inf into an infinite, not an undefined, cross entropy; here a broken row is NaN.
    ce = ce + torch.where(torch.isposinf(clean).any(dim=-1), math.nan, 0.0)
    entropy = reference_topk_entropy(clean.detach(), topk)
    weight = (entropy / entropy_norm) ** alpha
    # A target with p = 0 has an infinite loss; where its weight is 0 too, 0 * inf must not become NaN.
    loss = torch.where(torch.isposinf(ce) & (weight == 0), math.inf, weight * ce)
    zero = torch.zeros_like(ce)
    loss, ce, entropy, weight = (torch.where(valid, value, zero) for value in (loss, ce, entropy, weight))
    return loss, ce, entropy, weight
