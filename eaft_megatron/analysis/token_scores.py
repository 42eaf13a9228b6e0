"""The scores of a batch, from logits that may be sharded over the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.gates import SFTGate
from eaft_megatron.loss.probability_gates import DEFTGate
from eaft_megatron.loss.vocab_parallel import vocab_parallel_token_loss, vocab_parallel_topk_entropy

LOGPROB, TOPK_ENTROPY, ENTROPY, SUM_P_SQUARED = "ref_logprob", "topk_entropy", "entropy", "sum_p_squared"
_CHUNK = {"cpu": 1 << 20}  # logits of a rank that the full entropy looks at together: on a CPU they stay in cache
IGNORED = -100


def score_logits(
    logits: Tensor,
    target: Tensor,
    columns: dict[str, int | None],
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Each of ``columns`` for one batch, ``[b, s]`` float32, the same on every rank of ``group``.

    Args:
        logits: ``[b, s, V_local]``, this rank's columns.
        target: ``[b, s]`` int64 token ids, ``IGNORED`` where there is none; those get 0.
        columns: name -> K of a top-K entropy; None for ``ref_logprob``, the full ``entropy`` and ``sum_p_squared``.
        vocab_size: the true vocabulary; columns beyond it are padding.
        group: tensor-parallel process group.
    """
    first = columns.get(TOPK_ENTROPY) or 20
    gate = DEFTGate() if SUM_P_SQUARED in columns else SFTGate()  # the one that has the squares added up
    _, stats = vocab_parallel_token_loss(
        logits, target, gate, group=group, topk=first, vocab_size=vocab_size, return_stats=True
    )
    assert stats.entropy is not None
    scores = {}
    for name, topk in columns.items():
        if name == LOGPROB:
            values = -stats.ce
        elif name == SUM_P_SQUARED:
            assert stats.sum_p_squared is not None
            values = stats.sum_p_squared
        elif name == ENTROPY:
            values = full_entropy(logits, vocab_size=vocab_size, group=group)
        elif topk is None or topk == first:
            assert stats.entropy is not None, "the gate is asked for statistics"
            values = stats.entropy
        else:
            assert topk is not None
            values = vocab_parallel_topk_entropy(logits, group=group, topk=topk, vocab_size=vocab_size)
        scores[name] = values.float().masked_fill(target == IGNORED, 0)
    return scores


@torch.no_grad()
def full_entropy(logits: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy, in nats, of the softmax over the whole true vocabulary: ``log S - (1 / S) sum e^z' z'``, with
    ``z' = z - max z`` and ``S = sum e^z'``.

    Two all-reduces of a few numbers a token; the float32 copy is of a few tokens at a time.

    Args:
        logits: ``[..., V_local]``, rank r holding columns ``r * V_local`` onwards.

    Returns:
        ``[...]`` float32 (float64 for float64 logits).
    """
    width = logits.shape[-1]
    begin = 0 if group is None else dist.get_rank(group) * width
    true_columns = max(min(vocab_size - begin, width), 0)  # a rank may hold padding alone
    rows = logits.reshape(-1, width)[:, :true_columns]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    entropy = torch.empty(len(rows), dtype=dtype, device=logits.device)
    size = max(_CHUNK.get(logits.device.type, 1 << 24) // width, 1)
    for part, out in zip(rows.split(size), entropy.split(size), strict=True):
        part = part.to(dtype)
        maximum = part.amax(-1) if true_columns else torch.full_like(out, -torch.inf)
        if group is not None:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        shifted = (part - maximum.unsqueeze(-1)).clamp_(min=-1e30)  # finite: 0 log 0 = 0
        exponentials = shifted.exp()
        sums = torch.stack([exponentials.sum(-1), exponentials.mul_(shifted).sum(-1)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        out.copy_(sums[0].log() - sums[1] / sums[0])
    # Rounding may leave a certain token a few 1e-8 below 0.
    return entropy.clamp_(min=0).reshape(logits.shape[:-1])
