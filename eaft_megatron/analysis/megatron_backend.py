"""Scoring with megatron-core: tensor and pipeline parallel, the windows shared out over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.analysis.scoring import Batch, Team
from eaft_megatron.analysis.token_scores import score_logits
from eaft_megatron.installed import choose_transformer_impl
from eaft_megatron.models import build_model, load_hf_weights, read_hf_config, transformer_config
from eaft_megatron.ranks import on_rank_0


class MegatronTeam(Team):
    """The processes of an initialised ``parallel_state``."""

    def __init__(self) -> None:
        from eaft_megatron.megatron_map import parallel_state

        self.leads = dist.get_rank() == 0
        self.writes = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        self.share = (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())

    def agree(self, function: Callable[[], Any]) -> Any:
        return on_rank_0(function)

    def wait(self) -> None:
        dist.barrier()


class MegatronBackend:
    """A Hugging Face folder in megatron-core, in the layout of the initialised ``parallel_state``.

    Args:
        folder: a local Hugging Face folder of an architecture that ``convert`` knows.
        dtype: of the weights and of what is computed; the scores are float32.
        device: of this process.
        transformer_impl: "auto" takes Transformer Engine where it is installed, else "local".
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype, device: torch.device, transformer_impl: str = "auto"
    ) -> None:
        from eaft_megatron.megatron_map import parallel_state

        hf_config = read_hf_config(folder)
        self.vocab_size = hf_config["vocab_size"]
        self.device = device
        self.group = parallel_state.get_tensor_model_parallel_group()
        config = transformer_config(
            hf_config,
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
            params_dtype=dtype,
            variable_seq_lengths=True,  # the stages tell each other the shape of each batch
            moe_token_dispatcher_type="alltoall",  # no experts here, but the default is refused with the line above
        )
        model = build_model(
            hf_config,
            config,
            transformer_impl=choose_transformer_impl(transformer_impl),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        load_hf_weights(model, folder)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def run(
        self, parts: list[Batch], columns: dict[str, int | None], tick: Callable[[int], None]
    ) -> list[dict[str, Tensor]] | None:
        """The columns of each batch, on the CPU: on the last stage's first rank; None on the others."""
        from eaft_megatron.megatron_map import get_forward_backward_func, parallel_state

        if not parts:
            return []
        outputs = get_forward_backward_func()(
            forward_step_func=partial(self._step, columns, tick),
            data_iterator=iter(parts),
            model=self.model,
            num_microbatches=len(parts),
            seq_length=parts[0].tokens.shape[1],
            micro_batch_size=len(parts[0].rows),
            forward_only=True,
            collect_non_loss_data=True,
        )
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return outputs if parallel_state.is_pipeline_last_stage() and first else None

    def _step(
        self, columns: dict[str, int | None], tick: Callable[[int], None], iterator: Iterator[Batch], model: Any
    ) -> tuple[Tensor, Callable]:
        part = next(iterator)
        tokens = part.tokens.to(self.device)
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        output = model(tokens, positions, None)
        tick(int((part.target >= 0).sum()))
        return output, partial(self._statistics, part, columns)

    def _statistics(
        self, part: Batch, columns: dict[str, int | None], logits: Tensor, non_loss_data: bool = True
    ) -> dict[str, Tensor]:
        target = part.target.to(self.device)
        scores = score_logits(logits, target, columns, vocab_size=self.vocab_size, group=self.group)
        return {name: values.cpu() for name, values in scores.items()}
