"""The losses that benchmarks/loss.py times: each a function (logits, target, group) -> per-token loss.

``logits`` is ``[N, 1, V_local]`` and may be destroyed, ``target`` ``[N, 1]`` with -100 where a token does not count.
Peers from packages that are not here are listed with the reason, never left out in silence. Not among them: axolotl's
EAFT, which takes hidden states and the output layer's weight instead of logits, so that its time includes the matrix
products.
"""

from __future__ import annotations

import functools
import importlib.util
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


@functools.cache
def _compiled(name: str) -> Callable:
    return torch.compile({"cross entropy": _cross_entropy_formula, "EAFT": _eaft_formula}[name], dynamic=False)


def _cross_entropy_formula(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits.float()
    chosen = wide.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == -100, 0.0, torch.logsumexp(wide, dim=-1) - chosen)


def _eaft_formula(logits: Tensor, target: Tensor) -> Tensor:
    log_q = torch.log_softmax(logits.detach().float().topk(20, dim=-1).values, dim=-1)
    return -(log_q.exp() * log_q).sum(-1) / 3.0 * _cross_entropy_formula(logits, target)


def compiled_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """torch.compile of the plain formula: what a compiler makes of cross entropy."""
    return _compiled("cross entropy")(logits, target)


def compiled_eaft(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """torch.compile of EAFT's plain formula."""
    return _compiled("EAFT")(logits, target)


def transformer_engine(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``--cross-entropy-loss-fusion --cross-entropy-fusion-impl te``: Transformer Engine's parallel cross entropy."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits, target, 0.0, False, group)


def liger(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Liger's cross entropy, one rank; its forward pass writes the gradient over the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def flash_attention(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """flash-attn's cross entropy with its gradient in place: the fewest bytes of any plain cross entropy we know."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits.flatten(0, 1), target.flatten(), inplace_backward=True)[0].view(target.shape)


def eaft(logits: Tensor, target: Tensor, group: dist.ProcessGroup, **options) -> Tensor:
    """Ours, as the Megatron hook calls it."""
    return vocab_parallel_eaft_loss(logits, target, group=group, inplace_backward=True, **options)


PEERS: dict[str, Peer] = {
    "megatron": megatron,
    "megatron fused (native)": megatron_fused,
    "Transformer Engine": transformer_engine,
    "Liger": liger,
    "flash-attn": flash_attention,
    "F.cross_entropy": torch_cross_entropy,
    "torch.compile, cross entropy": compiled_cross_entropy,
    "torch.compile, EAFT": compiled_eaft,
    "EAFT, plain torch": plain_eaft,
    "eaft_megatron": eaft,
    "eaft_megatron, split exchange": partial(eaft, exchange="split"),
    "eaft_megatron, every row": partial(eaft, compact_ignored=False),
    "eaft_megatron, plain torch": partial(eaft, impl="torch"),
}
UNSHARDED_ONLY = {"F.cross_entropy", "EAFT, plain torch"}
SHARDED_ONLY = {"eaft_megatron, split exchange"}
GPU_ONLY = {
    "Transformer Engine": "transformer_engine",
    "Liger": "liger_kernel",
    "flash-attn": "flash_attn",
    "torch.compile, cross entropy": "triton",
    "torch.compile, EAFT": "triton",
    "eaft_megatron, plain torch": "torch",
}
"""Peers that run on a GPU alone, with the module that each of them needs."""


def peers_for(tp: int, ignored: float, device: str = "cpu") -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that make sense, and the names of those that are not installed with the reason.

    On the CPU ranks are real processes: no full-vocabulary loss on shards, no second exchange without shards. On a GPU
    there is one rank, whose shard stands for one of ``tp``: every loss runs on it, and there is no exchange.
    """
    if device == "cuda":
        left_out = SHARDED_ONLY | {"eaft_megatron, every row"}  # the kernels do not need to be told
    else:
        left_out = set(GPU_ONLY) | (SHARDED_ONLY if tp == 1 else UNSHARDED_ONLY)
        if ignored == 0:
            left_out |= {"eaft_megatron, every row"}
    peers, missing = {}, {}
    for name, peer in PEERS.items():
        module = GPU_ONLY.get(name)
        if name in left_out:
            continue
        if module and importlib.util.find_spec(module) is None:
            missing[name] = f"{module} is not installed"
        else:
            peers[name] = peer
    return peers, missing
