"""A megatron-core model into a Hugging Face folder that transformers loads."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eaft_megatron.files import incomplete_folder
from eaft_megatron.models.architecture import find_entry, is_copy_of_embedding
from eaft_megatron.models.chunks import parameters, sizes_of, unwrap
from eaft_megatron.models.config_fields import is_tied, model_sizes
from eaft_megatron.models.hf_config import architecture_of, read_hf_config
from eaft_megatron.models.hf_writer import SafetensorsWriter, carry_files, check_output, finish_shards, write_config
from eaft_megatron.ranks import first_failure, on_rank_0

if TYPE_CHECKING:
    from eaft_megatron.megatron_map import GPTModel


@torch.no_grad()
def save_hf_weights(
    model: nn.Module | list[nn.Module],
    hf_config_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write output_dir: safetensors shards, index, and hf_config_dir's config and tokenizer files.

    model: as for `load_hf_weights`. dtype: of the tensors written; None keeps each parameter's own. config.json says
    which (torch_dtype / dtype); the vocabulary's padding rows are left behind.

    Collective: every rank of the job calls it, with paths on a file system they share. One gather per parameter over
    the tensor-parallel group; the first tensor-parallel rank of each pipeline stage (data-parallel rank 0) writes.
    All goes into a hidden folder beside output_dir that is renamed at the very end: what an interrupted export leaves
    behind (.NAME.incomplete-*) has no config.json until it is complete, and may be deleted.

    Raises:
        ValueError: on every rank, before anything is written: output_dir exists and is not empty, hf_config_dir
            describes another model, or an unsupported dtype.
        RuntimeError: on every rank, when writing failed on one (its message is quoted); nothing is left behind.
    """
    chunks, output = unwrap(model), Path(output_dir).absolute()
    hf_config: dict = {}
    refusal = None
    try:
        hf_config = read_hf_config(hf_config_dir)
        check_output(output, dtype)
        _check_same_model(chunks, hf_config)
    except ValueError as error:
        refusal = str(error)
    if refusal := first_failure(refusal):
        raise ValueError(refusal)
    folder = incomplete_folder(output, on_rank_0(lambda: uuid.uuid4().hex[:8]))
    failure = first_failure(_on_rank_0(lambda: folder.mkdir(parents=True)))
    failure = failure or first_failure(_write_stage(chunks, hf_config, folder, dtype))
    failure = failure or first_failure(
        _on_rank_0(lambda: _finish(chunks, hf_config, Path(hf_config_dir), folder, output, dtype))
    )
    if failure:
        _on_rank_0(lambda: shutil.rmtree(folder))
        raise RuntimeError(f"export to {output} failed: {failure}")


def hf_tensors(
    chunks: list[GPTModel], hf_config: dict, value: Callable[[nn.Parameter], Tensor] = Tensor.detach
) -> Iterator[list[tuple[str, Tensor]]]:
    """This pipeline stage's Hugging Face tensors, parameter by parameter; empty lists on tensor-parallel ranks > 0.

    A collective over the tensor-parallel group. value: what to take of a parameter (its gradient, say).
    """
    from eaft_megatron.megatron_map import parallel_state

    tied, sizes = is_tied(hf_config), sizes_of(chunks[0], hf_config)
    table = architecture_of(hf_config).table(tied)
    group = parallel_state.get_tensor_model_parallel_group()
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, layer, parameter in parameters(chunks):
        item = find_entry(table, name)
        if is_copy_of_embedding(item, tied):
            continue
        shards = _gather(value(parameter), group) if item.kind.partition else [value(parameter)]
        yield list(zip(item.names(layer), item.kind.to_hf(shards, sizes), strict=True)) if first else []


def _gather(tensor: Tensor, group: Any) -> list[Tensor]:
    """The group's tensors in rank order, on its first rank; an empty list elsewhere."""
    size = dist.get_world_size(group)
    if size == 1:
        return [tensor]
    first = dist.get_rank(group) == 0
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)] if first else None
    dist.gather(tensor.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or []


def _check_same_model(chunks: list[GPTModel], hf_config: dict) -> None:
    config, sizes = chunks[0].config, sizes_of(chunks[0], hf_config)
    described = model_sizes(hf_config, sizes.padded_vocab)
    if config.num_layers != hf_config["num_hidden_layers"] or sizes != described:
        raise ValueError(
            f"hf_config_dir describes another model: {described}, {hf_config['num_hidden_layers']} layers; "
            f"the one to save: {sizes}, {config.num_layers} layers"
        )
    table = architecture_of(hf_config).table(is_tied(hf_config))
    for name, _, _ in parameters(chunks):
        find_entry(table, name)


def _write_stage(chunks: list[GPTModel], hf_config: dict, folder: Path, dtype: torch.dtype | None) -> str | None:
    """This rank's part of the gathering and writing. Returns the error instead of raising it: a rank that leaves
    the loop early would leave its tensor-parallel peers waiting."""
    from eaft_megatron.megatron_map import parallel_state

    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return None
    writer = SafetensorsWriter(folder, parallel_state.get_pipeline_model_parallel_rank(), dtype)
    error = None
    for tensors in hf_tensors(chunks, hf_config):
        for name, tensor in tensors:
            error = error or _try(partial(writer.add, name, tensor))
    return error or _try(writer.flush)


def _finish(
    chunks: list[GPTModel], hf_config: dict, source: Path, folder: Path, output: Path, dtype: torch.dtype | None
) -> None:
    """Rank 0, once all shards lie in folder."""
    config, sizes = chunks[0].config, sizes_of(chunks[0], hf_config)
    finish_shards(folder, architecture_of(hf_config).hf_shapes(is_tied(hf_config), config.num_layers, sizes))
    carry_files(source, folder)
    saved = str(dtype or config.params_dtype).removeprefix("torch.")
    fields = [name for name in ("torch_dtype", "dtype") if name in hf_config] or ["torch_dtype"]
    write_config(folder, {**hf_config, **dict.fromkeys(fields, saved)})
    os.rename(folder, output)  # an empty folder of that name is replaced


def _try(action: Callable[[], Any]) -> str | None:
    """None, or what went wrong."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _on_rank_0(action: Callable[[], Any]) -> str | None:
    return _try(action) if not dist.is_initialized() or dist.get_rank() == 0 else None
