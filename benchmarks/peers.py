"""The losses that benchmarks/loss.py times: each a function (logits, target, group) -> per-token loss.

``logits`` is ``[N, 1, V_local]`` and may be destroyed, ``target`` ``[N, 1]`` with -100 where a token does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eaft_megatron import vocab_parallel_eaft_loss

Peer = Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]


def megatron(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """megatron-core's plain cross entropy: what users run today. It knows no ignored tokens."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, target.clamp(min=0))


def megatron_fused(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``--cross-entropy-loss-fusion --cross-entropy-fusion-impl native``."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return fused_vocab_parallel_cross_entropy(logits, target.clamp(min=0), group)


def torch_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """F.cross_entropy on float32 logits, as Hugging Face's trainer computes it. Unsharded only."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def plain_eaft(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """EAFT the obvious way, as single-GPU trainers do: a float32 copy, the valid rows copied out, torch.topk."""
    wide, flat = logits.float().flatten(0, 1), target.flatten()
    loss = F.cross_entropy(wide, flat, reduction="none")
    valid = flat != -100
    with torch.no_grad():
        log_q = torch.log_softmax(wide.detach()[valid].topk(20, dim=-1).values, dim=-1)
        weight = torch.zeros_like(loss).masked_scatter(valid, -(log_q.exp() * log_q).sum(-1) / 3.0)
    return (weight * loss).view(target.shape)


def eaft(logits: Tensor, target: Tensor, group: dist.ProcessGroup, **options) -> Tensor:
    """Ours, as the Megatron hook calls it."""
    return vocab_parallel_eaft_loss(logits, target, group=group, inplace_backward=True, **options)


PEERS: dict[str, Peer] = {
    "megatron": megatron,
    "megatron fused (native)": megatron_fused,
    "F.cross_entropy": torch_cross_entropy,
    "EAFT, plain torch": plain_eaft,
    "eaft_megatron": eaft,
    "eaft_megatron, split exchange": partial(eaft, exchange="split"),
    "eaft_megatron, every row": partial(eaft, compact_ignored=False),
}
UNSHARDED_ONLY = {"F.cross_entropy", "EAFT, plain torch"}
SHARDED_ONLY = {"eaft_megatron, split exchange"}
EAFT_PEERS = {"EAFT, plain torch", "eaft_megatron", "eaft_megatron, split exchange", "eaft_megatron, every row"}


def peers_for(tp: int, ignored: float) -> dict[str, Peer]:
    """Those that make sense: no full-vocabulary loss on shards, no second exchange without shards."""
    left_out = SHARDED_ONLY if tp == 1 else UNSHARDED_ONLY
    if ignored == 0:
        left_out = left_out | {"eaft_megatron, every row"}
    return {name: peer for name, peer in PEERS.items() if name not in left_out}
