"""Per-token columns on their way through an untouched ``get_batch``.

Megatron-LM reads a micro-batch on tensor-parallel rank 0 and broadcasts the keys it knows. The columns that a loss
needs beside them ("ref_logprob", "sample_weight", "sequence_ids") are taken from the batch there, broadcast to the
other tensor-parallel ranks of the last pipeline stage, cut for context parallelism, and laid before the loss hook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.hooks.loss_hook import installed
from eaft_megatron.megatron_map import get_batch_module

_INTEGER = ("sequence_ids",)

Cut = Callable[[int, int, int, Any], Tensor]
"""(positions, context-parallel size, rank, cu_seqlens or None) -> the positions that this rank holds."""


def rebind_get_batch(columns: Callable[[], Sequence[str]], cut: Cut) -> bool:
    """Rebind ``get_batch_on_this_tp_rank`` where a script is going to import it from: before the script runs.

    Args:
        columns: names of the columns to carry; asked at each micro-batch, for the flags may not be parsed yet.
        cut: which positions a context-parallel rank holds.

    Returns:
        Whether this Megatron-LM has that function.
    """
    module = get_batch_module()
    if module is None:
        return False
    module.get_batch_on_this_tp_rank = _carrying(module.get_batch_on_this_tp_rank, columns, cut)
    return True


def _carrying(original: Callable, columns: Callable[[], Sequence[str]], cut: Cut) -> Callable:
    @functools.wraps(original)
    def with_columns(source: Any, *args: Any, **kwargs: Any):
        names, hook = columns(), installed()
        if not names or hook is None or not _on_last_stage():
            return original(source, *args, **kwargs)
        seen: dict[str, Any] = {}
        if isinstance(source, dict):  # from 0.18 on: the micro-batch itself, empty where this rank reads none
            seen.update(source)
        elif source is not None:
            source = _Watched(source, seen)
        batch = original(source, *args, **kwargs)
        hook.side = _spread(seen, names, _positions_of(batch), batch.get("cu_seqlens"), cut)
        return batch

    return with_columns


class _Watched:
    """An iterator that also shows what it gave last."""

    def __init__(self, iterator: Iterator, seen: dict[str, Any]) -> None:
        self._iterator, self._seen = iterator, seen

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._seen.clear()
        self._seen.update(item)
        return item


def _positions_of(batch: dict[str, Any]) -> torch.Size:
    """``[b, s]`` of a micro-batch, before it is cut for context parallelism."""
    return next(batch[name].shape for name in ("labels", "tokens", "loss_mask") if batch.get(name) is not None)


def _spread(seen: dict[str, Any], names: Sequence[str], shape: torch.Size, cu_seqlens: Any, cut: Cut) -> dict:
    """The columns ``[b, s / cp]`` on every tensor-parallel rank: one broadcast each.

    A micro-batch without them (an evaluation set, which shows the plain cross entropy) gives {}; the first broadcast,
    of one number, tells.
    """
    from eaft_megatron.megatron_map import parallel_state

    device = torch.device("cuda", torch.cuda.current_device())
    source, group = (
        parallel_state.get_tensor_model_parallel_src_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    has_columns = torch.tensor([all(name in seen for name in names)], dtype=torch.int64, device=device)
    torch.distributed.broadcast(has_columns, source, group=group)
    if not bool(has_columns):
        return {}
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    spread = {}
    for name in names:
        dtype = torch.int64 if name in _INTEGER else torch.float32
        if name in seen:
            column = seen[name].to(device=device, dtype=dtype).contiguous()
        else:
            column = torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(column, source, group=group)
        if cu_seqlens is not None:
            column = column.reshape(1, -1)  # packed micro-batches of several samples become one row
        if size > 1:
            positions = cut(column.shape[1], size, rank, _bounds(cu_seqlens, shape[1]))
            column = column.index_select(1, positions.to(device))
        spread[name] = column
    return spread


def _bounds(cu_seqlens: Tensor | None, length: int) -> list[int] | None:
    """Where packed sequences end, ascending, each once: Megatron repeats the last one as padding.

    Several packs of ``length`` positions in a micro-batch (``cu_seqlens`` ``[b, n]``) stand one behind the other.
    """
    if cu_seqlens is None:
        return None
    packs = cu_seqlens.reshape(-1, cu_seqlens.shape[-1]).tolist()
    return sorted({number * length + bound for number, pack in enumerate(packs) for bound in pack})


def _on_last_stage() -> bool:
    from eaft_megatron.megatron_map import parallel_state

    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
