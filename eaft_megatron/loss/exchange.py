"""What the ranks tell each other about every token, and what each makes of it: the same numbers on every rank.

A rank's statistics are written into a :class:`Message`, by torch_impl.py or by a kernel. Merged over the ranks they are
:class:`Statistics` of the whole vocabulary, again by either (here in plain torch, in kernels/merging.py on a GPU).

Docstrings count calls and bytes. N is the number of tokens and tp the size of the tensor-parallel group. A logit takes
the 2, 4 or 8 bytes of the logits' own dtype, a sum 4 (8 for float64 logits). Backward, only the linear loss comes here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.plan import Plan, group_rank_and_size

# torch 2.13 renamed it and warns at every use of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Statistics(NamedTuple):
    """Numbers of the whole vocabulary, ``[M]`` each, one for every row looked at, in the compute dtype.

    Attributes:
        maximum: the largest logit.
        sum_exp: sum of exponentials relative to it.
        ce: cross entropy in nats; 0 at ignored tokens, NaN for a target outside the vocabulary.
        entropy: of the top-K distribution, in nats; 0 at ignored tokens. None unless needed.
        sum_p_squared: sum of squared probabilities; 0 at ignored tokens. None unless needed.
    """

    maximum: Tensor
    sum_exp: Tensor
    ce: Tensor
    entropy: Tensor | None
    sum_p_squared: Tensor | None

    @classmethod
    def empty(cls, like: Tensor, dtype: torch.dtype, plan: Plan) -> Statistics:
        """To be filled: a row for each entry of ``like``."""

        def column() -> Tensor:
            return torch.empty(like.shape, dtype=dtype, device=like.device)

        entropy, sum_p_squared = column() if plan.entropy else None, column() if plan.sum_squares else None
        return cls(column(), column(), column(), entropy, sum_p_squared)


@dataclasses.dataclass(frozen=True)
class Message:
    """One rank's statistics of every token, as one block of bytes that a single all-gather moves.

    Logits travel in their own dtype, in which they are exact; sums in the compute dtype, which must not lose a bit. For
    bf16 logits and K = 20 that is 46 bytes a token: 21 logits of 2 bytes and one sum of 4. Sums lie first, then logits,
    each part filled up to 16 bytes so that all of them are aligned on every rank.

    Attributes:
        buffer: uint8 ``[B]``, or ``[tp, B]`` once gathered.
        tokens: N.
        k: largest logits per token.
        sum_count: sums per token: none (then no target's logit either), the sum of exponentials, or that and the sum
            of their squares.
        dtype: of the logits.
    """

    buffer: Tensor
    tokens: int
    k: int
    sum_count: int
    dtype: torch.dtype

    @classmethod
    def empty(cls, tokens: int, k: int, sum_count: int, dtype: torch.dtype, device: torch.device) -> Message:
        """A message to be filled through its views."""
        message = cls(torch.empty(0), tokens, k, sum_count, dtype)
        size = message._logits_begin + _aligned(tokens * message._columns * dtype.itemsize)
        # Never empty: torch would not view a gathered [tp, 0] as another dtype.
        return dataclasses.replace(message, buffer=torch.empty(max(size, 16), dtype=torch.uint8, device=device))

    @property
    def _columns(self) -> int:
        return self.k + (self.sum_count > 0)

    @property
    def _logits_begin(self) -> int:
        return _aligned(self.tokens * self.sum_count * compute_dtype(self.dtype).itemsize)

    @property
    def logits(self) -> Tensor:
        """``[(tp,) N, k (+ 1)]`` view: the k largest, descending, then (in a message with sums) the target's."""
        end = self._logits_begin + self.tokens * self._columns * self.dtype.itemsize
        logits = self.buffer[..., self._logits_begin : end].view(self.dtype)
        return logits.unflatten(-1, (self.tokens, self._columns))

    @property
    def sums(self) -> Tensor:
        """``[(tp,) sum_count, N]`` view: the sums, relative to the rank's own maximum."""
        dtype = compute_dtype(self.dtype)
        end = self.tokens * self.sum_count * dtype.itemsize
        return self.buffer[..., :end].view(dtype).unflatten(-1, (self.sum_count, self.tokens))

    @property
    def topk(self) -> Tensor:
        """``[(tp,) N, k]`` view: the largest logits, descending; -inf where the rank has fewer columns."""
        return self.logits[..., : self.k]

    @property
    def target_logit(self) -> Tensor:
        """``[(tp,) N]`` view; -inf where the rank does not hold the target."""
        return self.logits[..., self.k]

    def start_gather(self, group: dist.ProcessGroup | None) -> Callable[[], Message]:
        """Every rank's message, in rank order, on its way: one all-gather. What it returns waits for the others."""
        arrived = start_all_gather_rows(self.buffer, group)
        return lambda: dataclasses.replace(self, buffer=arrived())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_packed(gathered: Message, target: Tensor, plan: Plan) -> Statistics:
    """Merge every rank's message, in rank order; bitwise equal on every rank.

    The logits travelled in their own dtype, in which they are exact, so no bit of the result depends on it.
    """
    dtype = compute_dtype(gathered.dtype)
    local_topk = gathered.topk.to(dtype)
    topk = _largest_of_all(local_topk, plan.k)
    rescale = _rescale(local_topk[:, :, 0], topk[:, 0])
    sums = [gathered.sums[:, 0] * rescale]
    if plan.sum_squares:
        sums.append(gathered.sums[:, 1] * rescale.square())
    totals = [_sum_in_rank_order(values) for values in sums]
    return _statistics(topk, totals, gathered.target_logit.to(dtype).amax(dim=0), target, plan)


def merge_split(message: Message, target: Tensor, plan: Plan) -> Statistics:
    """Merge the same numbers with an all-gather of the top-K and one all-reduce of the sums, ``[2 (or 3), N]``.

    The weight of an entropy gate is bitwise equal on every rank, since it comes from the gathered values alone; the
    cross entropy is wherever the all-reduce is deterministic.
    """
    dtype = compute_dtype(message.dtype)
    topk = _largest_of_all(all_gather_rows(message.topk, plan.group).to(dtype), plan.k)
    rescale = _rescale(message.topk[:, 0].to(dtype), topk[:, 0])
    # The ranks that do not hold the target send 0, since their -inf would swallow the sum.
    owned = plan.shard.local_index(target)[1] & ~plan.ignored(target)
    sums = [message.sums[0] * rescale, message.target_logit.to(dtype).masked_fill(~owned, 0)]
    if plan.sum_squares:
        sums.append(message.sums[1] * rescale.square())
    total, target_logit, *squares = all_reduce_sum(torch.stack(sums), plan.group)
    return _statistics(topk, [total, *squares], target_logit, target, plan)


def merge_entropy(gathered: Message, k: int) -> Tensor:
    """``[N]``: the entropy alone, of the k largest logits of all ranks."""
    return topk_entropy(_largest_of_all(gathered.topk.to(compute_dtype(gathered.dtype)), k))


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


def all_gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's rows, in rank order: ``[N, ...]`` -> ``[tp, N, ...]``.

    One all-gather; each rank sends its tensor and receives tp times that.
    """
    return start_all_gather_rows(local, group)()


def start_all_gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """:func:`all_gather_rows` on its way while something else is computed: what it returns waits and has the rows."""
    _, size = group_rank_and_size(group)
    if size == 1:
        return lambda: local.unsqueeze(0)
    local = local.contiguous()
    gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
    # As bytes: not every backend knows every dtype.
    handle = _all_gather(gathered.view(torch.uint8), local.view(torch.uint8), group=group, async_op=True)

    def arrived() -> Tensor:
        handle.wait()
        return gathered.view(size, *local.shape)

    return arrived


def all_reduce_sum(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks of the group, in place: one all-reduce of the tensor's own size.

    The result is the same on every rank only where the backend's all-reduce is deterministic.
    """
    _, size = group_rank_and_size(group)
    if size > 1:
        dist.all_reduce(local, op=dist.ReduceOp.SUM, group=group)
    return local


def _statistics(topk: Tensor, sums: list[Tensor], target_logit: Tensor, target: Tensor, plan: Plan) -> Statistics:
    """From the whole vocabulary's ``[N, K]`` largest logits, its sum(s) of exponentials and the target's logit."""
    maximum, sum_exp, ignored = topk[:, 0].clone(), sums[0], plan.ignored(target)
    ce = (maximum - target_logit) + sum_exp.log()
    return Statistics(
        maximum,
        sum_exp,
        ce.masked_fill(ignored, 0).masked_fill(plan.outside_vocabulary(target), float("nan")),
        topk_entropy(topk).masked_fill(ignored, 0) if plan.entropy else None,
        (sums[1] / sum_exp.square()).masked_fill(ignored, 0) if plan.sum_squares else None,
    )


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


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
