"""From config.json to megatron-core's TransformerConfig, and the checks that must come before any allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eaft_megatron.megatron_map import kv_groups_can_be_shared
from eaft_megatron.models.config_fields import heads_and_groups
from eaft_megatron.models.hf_config import architecture_of

if TYPE_CHECKING:
    from eaft_megatron.megatron_map import TransformerConfig

# With one of these the layers need not divide evenly; megatron-core checks them itself.
_UNEVEN_PIPELINE = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, make_vocab_size_divisible_by: int = 128) -> int:
    """Rows of megatron's embedding: vocab_size rounded up to a multiple of the other two together.

    The rule of megatron.training.tokenizer (`--make-vocab-size-divisible-by`).
    """
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(
    hf_config: dict,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    params_dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> TransformerConfig:
    """megatron-core's TransformerConfig for a model described by `read_hf_config`.

    overrides: any further TransformerConfig field, stronger than what is derived here. Derived beyond the
    architecture: pipeline_dtype, bf16/fp16 from params_dtype; perform_initialization False (weights get loaded);
    use_cpu_initialization where there is no GPU.

    Raises:
        ValueError: the parallel sizes do not fit the model; the message names the flag and the sizes that do.
    """
    architecture = architecture_of(hf_config)
    architecture.check(hf_config)
    check_tensor_parallel(hf_config, tensor_model_parallel_size)
    if not any(overrides.get(name) for name in _UNEVEN_PIPELINE):
        check_pipeline(hf_config, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size)
    from eaft_megatron.megatron_map import TransformerConfig

    fields = {
        **architecture.transformer_fields(hf_config),
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_pipeline_model_parallel_size,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    return TransformerConfig(**{**fields, **overrides})


def check_tensor_parallel(hf_config: dict, size: int) -> None:
    """ValueError unless every split that tensor parallelism needs is an even one."""
    problems = _tensor_parallel_problems(hf_config, size)
    if problems:
        sizes = range(1, hf_config["num_attention_heads"] + 1)
        fitting = [n for n in sizes if not _tensor_parallel_problems(hf_config, n)]
        raise ValueError(f"--tensor-model-parallel-size {size}: {'; '.join(problems)}: use {_or(fitting)}")


def _tensor_parallel_problems(hf_config: dict, size: int) -> list[str]:
    heads, groups, head_dim = heads_and_groups(hf_config)
    if size < 1:
        return ["it must be at least 1"]
    problems = []
    if heads % size:
        problems.append(f"{heads} attention heads do not divide by {size}")
    elif groups % size and (size % groups or not kv_groups_can_be_shared()):
        problems.append(f"{groups} KV heads can neither be divided by {size} nor shared evenly")
    elif (heads + 2 * groups) * head_dim % size:
        problems.append(f"the fused query-key-value projection does not divide by {size}")
    if hf_config["intermediate_size"] % size:
        problems.append(f"intermediate_size {hf_config['intermediate_size']} does not divide by {size}")
    return problems


def check_pipeline(hf_config: dict, size: int, virtual: int | None) -> None:
    """ValueError unless the layers divide evenly over the stages (and model chunks per stage)."""
    layers = hf_config["num_hidden_layers"]
    if size < 1 or layers % size:
        fitting = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ValueError(
            f"--pipeline-model-parallel-size {size}: {layers} layers do not divide by {size}: use {_or(fitting)}"
        )
    if virtual is None:
        return
    per_stage = layers // size
    if virtual < 1 or per_stage % virtual:
        fitting = [n for n in range(1, per_stage + 1) if per_stage % n == 0]
        raise ValueError(
            f"virtual_pipeline_model_parallel_size {virtual}: {per_stage} layers per pipeline stage do not divide "
            f"by {virtual}: use {_or(fitting)} (--num-layers-per-virtual-pipeline-stage {per_stage} or a divisor)"
        )


def _or(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
