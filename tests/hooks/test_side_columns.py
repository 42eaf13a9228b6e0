"""Columns carried beside Megatron's own batch: to every tensor-parallel rank, cut for context parallelism."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from eaft_megatron.data.context_parallel import context_parallel_indices
from eaft_megatron.hooks import LossSettings, install, uninstall
from eaft_megatron.hooks.side_columns import _carrying
from eaft_megatron.testing.cpu import cpu_standins
from eaft_megatron.testing.distributed import run_distributed

NAMES = ("ref_logprob", "sequence_ids")
CU_SEQLENS = torch.tensor([[0, 4, 12, 16, 16, 16]], dtype=torch.int32)  # Megatron repeats the last as padding


def _sample() -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.arange(16).unsqueeze(0),
        "labels": torch.arange(1, 17).unsqueeze(0),
        "ref_logprob": -torch.arange(16.0).unsqueeze(0),
        "sequence_ids": torch.arange(16).unsqueeze(0) + 100,
    }


def _old(iterator, mtp_on_this_rank=False):
    """get_batch_on_this_tp_rank to 0.17: reads the iterator on rank 0 and keeps the keys it knows."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_rank() == 0:
        next(iterator)
    return {name: _sample()[name] for name in ("tokens", "labels")}


def _new(batch, *, packed=False):
    """From 0.18 on: is given the micro-batch, {} on other ranks."""
    return {name: _sample()[name] for name in ("tokens", "labels")} | ({"cu_seqlens": CU_SEQLENS} if packed else {})


def _on_each_rank(folder: str) -> None:
    from megatron.core import parallel_state

    with cpu_standins():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
        cp, first = parallel_state.get_context_parallel_rank(), parallel_state.get_tensor_model_parallel_rank() == 0
        hook = install(LossSettings("sft-kl"))
        cut = context_parallel_indices
        results = []
        for packed in (False, True):
            hook.side = {}
            batch = _carrying(_new, lambda: NAMES, cut)(_sample() if first else {}, packed=packed)
            results.append((hook.side, cut(16, 2, cp, [0, 4, 12, 16] if packed else None)))
            assert set(batch) <= {"tokens", "labels", "cu_seqlens"}
        hook.side = {}
        _carrying(_old, lambda: NAMES, cut)(iter([_sample()]) if first else None)
        results.append((hook.side, cut(16, 2, cp)))
        for side, positions in results:
            for name in NAMES:
                assert torch.equal(side[name], _sample()[name][:, positions]), name
        # An evaluation set without the columns; and a loss that needs none.
        bare = {name: value for name, value in _sample().items() if name not in NAMES}
        _carrying(_new, lambda: NAMES, cut)(bare if first else {})
        assert hook.side == {}
        _carrying(_new, lambda: (), cut)(_sample() if first else {})
        assert hook.side == {}
        uninstall()
        parallel_state.destroy_model_parallel()


def test_every_rank_holds_its_part(tmp_path):
    """TP 2 x CP 2, old and new get_batch, packed or not: the hook's columns are the rank's slice of the sample's."""
    run_distributed(_on_each_rank, 4, str(tmp_path))
