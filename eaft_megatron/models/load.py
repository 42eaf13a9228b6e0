"""Hugging Face safetensors into a megatron-core model, each rank reading its own part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from eaft_megatron.models.architecture import find_entry
from eaft_megatron.models.chunks import parameters, sizes_of, unwrap
from eaft_megatron.models.config_fields import is_tied
from eaft_megatron.models.hf_config import architecture_of, read_hf_config
from eaft_megatron.models.hf_files import HFTensors


@torch.no_grad()
def load_hf_weights(model: nn.Module | list[nn.Module], hf_dir: str | Path) -> None:
    """Fill every parameter of this rank's model from hf_dir (config.json and one or many *.safetensors).

    model: a GPTModel, or the list of this rank's virtual-pipeline chunks; wrappers (DDP, Float16Module) are looked
    through. Tensor by tensor, in slices: at no time more than one parameter beyond the model is in memory. Values are
    converted to each parameter's dtype. No communication; call it on every rank, and before building an optimizer
    (or call its reload_model_params afterwards: it keeps float32 copies of its own).

    Raises:
        ValueError: before anything is filled: a tensor missing, left over or of the wrong shape (named, with its
            file), a parameter without an entry in the weight table, or a config.json that does not fit the model.
            Every rank checks the whole folder, so all ranks raise or none.
    """
    from eaft_megatron.megatron_map import parallel_state

    chunks = unwrap(model)
    hf_config = read_hf_config(hf_dir)
    architecture, tied, sizes = architecture_of(hf_config), is_tied(hf_config), sizes_of(chunks[0], hf_config)
    table = architecture.table(tied)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    with HFTensors(hf_dir) as tensors:
        tensors.check(architecture.hf_shapes(tied, chunks[0].config.num_layers, sizes))
        plan = [(name, layer, find_entry(table, name), parameter) for name, layer, parameter in parameters(chunks)]
        for name, layer, item, parameter in plan:
            sources = [tensors[hf_name] for hf_name in item.names(layer)]
            value = item.kind.to_megatron(sources, tp_rank, tp_size, sizes)
            assert value.shape == parameter.shape, f"{name}: {tuple(value.shape)} for {tuple(parameter.shape)}"
            parameter.copy_(value)
