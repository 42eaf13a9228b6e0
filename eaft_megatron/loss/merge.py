"""From the shards' statistics to the whole vocabulary's: the same arithmetic, in the same order, on every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.collectives import all_gather_rows, all_reduce_sum
from eaft_megatron.loss.message import Message


class Merged(NamedTuple):
    """Statistics over the whole vocabulary.

    Attributes:
        topk: ``[N, K]`` the K largest logits, descending.
        sum_exp: ``[N]`` sum of exponentials relative to ``topk[:, 0]``.
        target_logit: ``[N]``; meaningless where no rank holds the target.
        sum_exp_squared: ``[N]`` sum of squared exponentials, or None.
    """

    topk: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    sum_exp_squared: Tensor | None


def merge_packed(gathered: Message, k_local: int, k: int, dtype: torch.dtype) -> Merged:
    """Merge every rank's message, from a single all-gather; bitwise equal on every rank.

    The logits among the statistics travel in their own dtype (they are exact in it, so no bit of the result depends on
    it); ``dtype`` is the one to compute in.
    """
    values = gathered.values.to(dtype)  # [tp, N, k_local + 1]
    topk = _largest_of_all(values[:, :, :k_local], k)
    rescale = _rescale(values[:, :, 0], topk[:, 0])
    squares = _sum_in_rank_order(gathered.sums[:, 1] * rescale.square()) if gathered.rows > 1 else None
    return Merged(
        topk=topk,
        sum_exp=_sum_in_rank_order(gathered.sums[:, 0] * rescale),
        target_logit=values[:, :, k_local].amax(dim=0),
        sum_exp_squared=squares,
    )


def merge_split(
    local: Tensor,
    k_local: int,
    k: int,
    owned: Tensor,
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Merge the same statistics with an all-gather of the top-K and one all-reduce of the sums.

    The weight of an entropy gate is bitwise equal on every rank, since it comes from the gathered values alone; the
    cross entropy is wherever the all-reduce is deterministic. ``owned``: ``[N]``, whether this rank holds the target.
    ``dtype``: that of the logits, in which they travel; None for the statistics' own.
    """
    topk = merge_topk(local[:, :k_local], k, group, dtype=dtype)
    rescale = _rescale(local[:, 0], topk[:, 0])
    # The ranks that do not hold the target send 0, since their -inf would swallow the sum.
    sums = [local[:, k_local] * rescale, local[:, k_local + 1].masked_fill(~owned, 0)]
    if local.shape[1] > k_local + 2:
        sums.append(local[:, k_local + 2] * rescale.square())
    total = all_reduce_sum(torch.stack(sums), group)
    return Merged(topk, total[0], total[1], total[2] if len(sums) > 2 else None)


def merge_topk(local: Tensor, k: int, group: dist.ProcessGroup | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """``[N, k]`` largest logits of all ranks, descending, from each rank's ``[N, k_local]``: one all-gather.

    ``dtype``: as in :func:`merge_split`.
    """
    narrow = local.to(dtype or local.dtype).contiguous()
    gathered = all_gather_rows(narrow.view(torch.uint8), group)  # as bytes: not every backend knows every dtype
    return _largest_of_all(gathered.view(narrow.dtype).to(local.dtype), k)


def topk_entropy(topk: Tensor) -> Tensor:
    """Entropy in nats of ``softmax(topk)``, from ``[N, K]`` logits in descending order: ``[N]``.

    With ``d_i = T_i - T_1`` and ``e_i = exp(d_i)`` over i >= 2, ``H = log1p(sum e) + sum(-d e) / (1 + sum e)``: every
    term is non-negative, so nothing cancels and H is never slightly negative, which a power would turn into NaN.
    """
    distance = topk[:, 1:] - topk[:, :1]
    e = distance.exp()
    rest = e.sum(dim=1) + (topk[:, 0] - topk[:, 0])  # adds 0, or NaN where the maximum is not finite
    # p log p = 0 at p = 0, where the distance may be -inf. NaN survives in `rest`.
    moment = torch.where(e > 0, -distance * e, 0).sum(dim=1)
    return torch.log1p(rest) + moment / (1 + rest)


def _largest_of_all(gathered: Tensor, k: int) -> Tensor:
    """``[tp, N, k_local]`` -> ``[N, k]``, descending. Which rank a value came from leaves no trace."""
    tp, tokens, k_local = gathered.shape
    if tp == 1:
        return gathered[0].contiguous()
    merged = gathered.transpose(0, 1).reshape(tokens, tp * k_local)
    return merged.topk(k, dim=1).values


def _rescale(local_maximum: Tensor, maximum: Tensor) -> Tensor:
    """exp(local maximum - global maximum); 0 for a shard of nothing but -inf."""
    return torch.where(local_maximum == float("-inf"), 0, (local_maximum - maximum).exp())


def _sum_in_rank_order(values: Tensor) -> Tensor:
    """``[tp, N]`` -> ``[N]``, always adding rank 0 first, rank 1 next: no reduction order left to chance."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
