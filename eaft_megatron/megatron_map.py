"""The map of Megatron: every symbol of megatron-core and Megatron-LM that this package touches, and every difference
between releases that it knows. No other module names one.

``from eaft_megatron.megatron_map import parallel_state`` imports it from where the map says, when it is asked for.
tests/test_megatron_map.py walks the map: the installed megatron-core, and each tag of a Megatron-LM clone
(``make check-megatron``). The module itself needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

Release = tuple[int, int]
"""megatron-core's (major, minor)."""

OLDEST: Release = (0, 12)
CORE = "megatron.core"


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A module, or what it holds.

    Attributes:
        module: its dotted name.
        name: of what the module holds, dotted for a class's method; "" for the module itself.
        parameters: those that we give by name or look up in a call; of a class, its constructor's or its fields.
        exactly: whether it takes these parameters and no others, as what we put in its place does.
        since: the first release that has it.
        until: the first that has it no more; None: it has not gone.
        built: compiled when a checkout is first used, so that its source does not show it.
    """

    module: str
    name: str = ""
    parameters: tuple[str, ...] = ()
    exactly: bool = False
    since: Release = OLDEST
    until: Release | None = None
    built: bool = False

    def is_in(self, release: Release) -> bool:
        """Whether a release is expected to have it, with these parameters."""
        return self.since <= release and (self.until is None or release < self.until)

    def find(self) -> Any:
        """The thing itself.

        Raises:
            ImportError: no such module, as for any import.
            AttributeError: the installed release does not have it; the message names it.
        """
        value = importlib.import_module(self.module)
        for part in self.name.split(".") if self.name else ():
            value = getattr(value, part)
        return value


def _holding(module: str, name: str = "", *, key: str = "", **members: tuple[str, ...]) -> dict[str, Symbol]:
    """A module or class under ``key``, and what is used through it: member -> parameters."""
    key = key or name or module.rpartition(".")[2]
    prefix = f"{name}." if name else ""
    held = {f"{key}.{member}": Symbol(module, prefix + member, given) for member, given in members.items()}
    return {key: Symbol(module, name), **held}


def _names(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_LOSS_ARGUMENTS = ("labels", "loss_mask", "packed_seq_params")
_STAGE = ("ignore_virtual",)
_MODEL_ARGUMENTS = _names(
    "config transformer_layer_spec vocab_size max_sequence_length pre_process post_process parallel_output "
    "share_embeddings_and_output_weights position_embedding_type rotary_percent rotary_base rope_scaling "
    "rope_scaling_factor seq_len_interpolation_factor"
)
_CONFIGURATION = _names(
    "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size normalization "
    "layernorm_epsilon gated_linear_unit activation_func add_bias_linear add_qkv_bias qk_layernorm "
    "rotary_interleaved hidden_dropout attention_dropout init_method_std tensor_model_parallel_size "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size params_dtype pipeline_dtype bf16 fp16 "
    "perform_initialization use_cpu_initialization calculate_per_token_loss recompute_granularity "
    "recompute_method recompute_num_layers overlap_p2p_comm batch_p2p_comm variable_seq_lengths "
    "moe_token_dispatcher_type deallocate_pipeline_outputs"
)

SYMBOLS: dict[str, Symbol] = {
    # Which ranks there are
    **_holding(
        "megatron.core.parallel_state",
        destroy_global_memory_buffer=(),
        destroy_model_parallel=(),
        get_context_parallel_rank=(),
        get_context_parallel_world_size=(),
        get_data_parallel_group=("with_context_parallel",),
        get_data_parallel_rank=("with_context_parallel",),
        get_data_parallel_world_size=(),
        get_pipeline_model_parallel_rank=(),
        get_pipeline_model_parallel_world_size=(),
        get_tensor_model_parallel_group=(),
        get_tensor_model_parallel_rank=(),
        get_tensor_model_parallel_src_rank=(),
        get_tensor_model_parallel_world_size=(),
        get_virtual_pipeline_model_parallel_world_size=(),
        initialize_model_parallel=(
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        ),
        is_pipeline_first_stage=_STAGE,
        is_pipeline_last_stage=_STAGE,
        set_virtual_pipeline_model_parallel_rank=(),
        _EMBEDDING_GLOBAL_RANKS=(),
        _POSITION_EMBEDDING_GLOBAL_RANKS=(),
    ),
    "model_parallel_cuda_manual_seed": Symbol(
        "megatron.core.tensor_parallel.random", "model_parallel_cuda_manual_seed"
    ),
    # The model and its loss
    "LanguageModule": Symbol("megatron.core.models.common.language_module.language_module", "LanguageModule"),
    "LanguageModule.compute_language_model_loss": Symbol(
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule.compute_language_model_loss",
        ("self", "labels", "logits"),
        exactly=True,
    ),
    "GPTModel": Symbol("megatron.core.models.gpt.gpt_model", "GPTModel", _MODEL_ARGUMENTS),
    "GPTModel.forward": Symbol("megatron.core.models.gpt.gpt_model", "GPTModel.forward", _LOSS_ARGUMENTS),
    "GPTModel._postprocess": Symbol(
        "megatron.core.models.gpt.gpt_model", "GPTModel._postprocess", _LOSS_ARGUMENTS, since=(0, 13)
    ),
    "GPTModel takes vp_stage": Symbol("megatron.core.models.gpt.gpt_model", "GPTModel", ("vp_stage",), since=(0, 13)),
    "MambaModel": Symbol("megatron.core.models.mamba.mamba_model", "MambaModel"),
    "MambaModel.forward": Symbol("megatron.core.models.mamba.mamba_model", "MambaModel.forward", ("labels",)),
    "MambaModel.forward takes loss_mask": Symbol(
        "megatron.core.models.mamba.mamba_model", "MambaModel.forward", _LOSS_ARGUMENTS, since=(0, 17)
    ),
    "HybridModel": Symbol("megatron.core.models.hybrid.hybrid_model", "HybridModel", since=(0, 18)),
    "HybridModel.forward": Symbol(
        "megatron.core.models.hybrid.hybrid_model", "HybridModel.forward", _LOSS_ARGUMENTS, since=(0, 18)
    ),
    "hybrid_stack_spec": Symbol("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec", since=(0, 18)),
    "MLPLayer": Symbol("megatron.core.ssm.mlp_layer", "MLPLayer"),
    "DotProductAttention": Symbol("megatron.core.transformer.dot_product_attention", "DotProductAttention"),
    "ColumnParallelLinear": Symbol("megatron.core.tensor_parallel", "ColumnParallelLinear"),
    "ColumnParallelLinear.forward": Symbol(
        "megatron.core.tensor_parallel",
        "ColumnParallelLinear.forward",
        ("self", "input_", "weight", "runtime_gather_output"),
        exactly=True,
    ),
    "ColumnParallelLinear._forward_impl": Symbol(
        "megatron.core.tensor_parallel", "ColumnParallelLinear._forward_impl", since=(0, 14)
    ),
    "TransformerConfig": Symbol("megatron.core.transformer", "TransformerConfig", _CONFIGURATION),
    **_holding(
        "megatron.core.transformer.transformer_block",
        TransformerBlockSubmodules=("layer_specs", "layer_norm"),
        get_num_layers_to_build=(),
    ),
    "get_num_layers_to_build takes vp_stage": Symbol(
        "megatron.core.transformer.transformer_block", "get_num_layers_to_build", ("vp_stage",), since=(0, 13)
    ),
    "ModuleSpec": Symbol("megatron.core.transformer.spec_utils", "ModuleSpec", ("module", "params", "submodules")),
    "IdentityOp": Symbol("megatron.core.transformer.identity_op", "IdentityOp"),
    "TransformerLayer": Symbol("megatron.core.transformer.transformer_layer", "TransformerLayer"),
    "TransformerLayerSubmodules": Symbol(
        "megatron.core.transformer.transformer_layer",
        "TransformerLayerSubmodules",
        ("input_layernorm", "self_attention", "pre_mlp_layernorm"),
    ),
    "Float16Module": Symbol("megatron.core.transformer.module", "Float16Module"),
    **_holding("megatron.core.models.gpt.gpt_layer_specs", HAVE_TE=()),
    "get_gpt_layer_local_spec": Symbol(
        "megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec", ("qk_layernorm", "normalization")
    ),
    "get_gpt_layer_with_transformer_engine_spec": Symbol(
        "megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_with_transformer_engine_spec", ("qk_layernorm",)
    ),
    "TENorm": Symbol("megatron.core.extensions.transformer_engine", "TENorm"),
    # Training with megatron-core alone
    "DistributedDataParallel": Symbol("megatron.core.distributed", "DistributedDataParallel"),
    "DistributedDataParallelConfig": Symbol(
        "megatron.core.distributed",
        "DistributedDataParallelConfig",
        ("grad_reduce_in_fp32", "overlap_grad_reduce", "use_distributed_optimizer"),
    ),
    "finalize_model_grads": Symbol("megatron.core.distributed", "finalize_model_grads"),
    "OptimizerConfig": Symbol(
        "megatron.core.optimizer",
        "OptimizerConfig",
        _names(
            "optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad bf16 "
            "params_dtype use_distributed_optimizer"
        ),
    ),
    "get_megatron_optimizer": Symbol("megatron.core.optimizer", "get_megatron_optimizer"),
    "get_standard_config_overrides": Symbol("megatron.core.optimizer", "get_standard_config_overrides", since=(0, 16)),
    "OptimizerParamScheduler": Symbol(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler",
        _names(
            "init_lr max_lr min_lr lr_warmup_steps lr_decay_steps lr_decay_style start_wd end_wd "
            "wd_incr_steps wd_incr_style use_checkpoint_opt_param_scheduler"
        ),
    ),
    "get_forward_backward_func": Symbol("megatron.core.pipeline_parallel", "get_forward_backward_func"),
    **_holding("megatron.core.dist_checkpointing", save=(), load=(), load_common_state_dict=()),
    "destroy_rerun_state_machine": Symbol("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    "RerunDataIterator": Symbol("megatron.core.rerun_state_machine", "RerunDataIterator"),
    **_holding("megatron.core.package_info", MAJOR=(), MINOR=()),
    # Megatron-LM's training loop
    **_holding(
        "megatron.training.training",
        build_pretraining_data_loader=(),
        evaluate=(),
        evaluate_and_print_results=("prefix", "data_iterator", "model", "iteration"),
        get_args=(),
        get_tensorboard_writer=(),
        get_wandb_writer=(),
        initialize_megatron=("allow_no_cuda",),
        is_last_rank=(),
        pretrain=("forward_step_func", "train_valid_test_dataset_provider"),
        print_rank_last=(),
        save_checkpoint=(),
        setup_model_and_optimizer=(),
        train_step=(),
    ),
    "training_package": Symbol("megatron.training"),
    "training_package.pretrain": Symbol("megatron.training", "pretrain"),
    **_holding("megatron.training.arguments", add_megatron_arguments=("parser",), validate_args=("args",)),
    **_holding("megatron.training.initialize", initialize_megatron=("allow_no_cuda",)),
    # It calls validate_args under the name that it imported, and builds CUDA extensions
    "initialize.validate_args": Symbol("megatron.training.initialize", "validate_args", until=(0, 18)),
    "initialize.fused_kernels": Symbol("megatron.training.initialize", "fused_kernels.load", until=(0, 17)),
    **_holding("megatron.training.checkpointing", check_checkpoint_args=("checkpoint_args",)),
    "training_utils": Symbol("megatron.training.utils"),
    "training_utils.get_batch_on_this_tp_rank": Symbol(
        "megatron.training.utils", "get_batch_on_this_tp_rank", until=(0, 18)
    ),
    "core_utils": Symbol("megatron.core.utils"),
    "core_utils.get_batch_on_this_tp_rank": Symbol("megatron.core.utils", "get_batch_on_this_tp_rank", since=(0, 18)),
    **_holding(
        "megatron.training.theoretical_memory_usage",
        compute_weight_and_optimizer_memory=(),
        compute_activation_memory=("num_microbatches",),
    ),
    # What the CPU stand-ins replace
    **_holding("megatron.core.datasets.utils", key="dataset_utils", compile_helpers=()),
    "megatron_datasets": Symbol("megatron.core.datasets"),
    "helpers_cpp": Symbol("megatron.core.datasets.helpers_cpp", built=True),
    "gpt_models": Symbol("megatron.core.models.gpt"),
    **_holding("megatron.core.pipeline_parallel.p2p_communication", _p2p_ops=()),
    **_holding(
        "megatron.core.tensor_parallel.random", key="rng_tracker", _get_cuda_rng_state=(), _set_cuda_rng_state=()
    ),
    **_holding("megatron.core.optimizer.distrib_optimizer", HAVE_APEX_OR_TE=(), quantize_param_shard=()),
    **_holding(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        state_dict=(),
        load_state_dict=(),
        sharded_state_dict=("is_loading",),
        _set_main_param_and_optimizer_states=(),
        _get_main_param_and_optimizer_states=(),
    ),
    "DistributedOptimizer.checkpoint_fully_reshardable_formats": Symbol(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.checkpoint_fully_reshardable_formats",
        since=(0, 15),
    ),
    "fused_softmax": Symbol("megatron.core.fusions.fused_softmax"),
    "torch_norm": Symbol("megatron.core.transformer.torch_norm"),
    **_holding("megatron.core.fusions.fused_softmax", "FusedScaleMaskSoftmax", is_kernel_available=()),
    **_holding("megatron.core.transformer.torch_norm", "WrappedTorchNorm", __new__=()),
}

# What releases do differently, beyond having a symbol or not: the first that does it.
CHECKS_THE_FIRST_LOSS: Release = (0, 14)
"""Its rerun state machine looks for NaN in the first iteration of a process too."""
READS_PACKED_BOUNDARIES: Release = (0, 17)
"""Under --sft it hands the boundaries of packed rows on in the shape that attention reads."""
PACKED_BOUNDARIES_ON_EVERY_STAGE: Release = (0, 18)
"""Every pipeline stage and context-parallel rank learns them."""
SEVERAL_PACKS_IN_A_MICRO_BATCH: Release = (0, 19)
"""It wants the boundaries padded to one length for it."""


def __getattr__(name: str) -> Any:
    if name not in SYMBOLS or not name.isidentifier():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return SYMBOLS[name].find()


def release() -> Release:
    """That of the megatron-core which is imported."""
    package_info = SYMBOLS["package_info"].find()
    return package_info.MAJOR, package_info.MINOR


def has(key: str) -> bool:
    """Whether what is imported has a symbol of the map; an error inside of its module is an error still."""
    try:
        SYMBOLS[key].find()
    except AttributeError:
        return False
    except ModuleNotFoundError as error:
        if error.name is None or not f"{SYMBOLS[key].module}.".startswith(f"{error.name}."):
            raise
        return False
    return True


def training_loop_missing() -> str | None:
    """The first package of Megatron-LM's training loop that cannot be found; nothing of it is imported."""
    return next((name for name in ("megatron", "megatron.training") if importlib.util.find_spec(name) is None), None)


def is_core_installed() -> bool:
    """Whether ``import megatron.core`` would find something; its parent package is imported to find out."""
    return training_loop_missing() != "megatron" and importlib.util.find_spec(CORE) is not None


def language_models() -> list[type]:
    """The causal language models that there are; a name that only stands for another of them is left out."""
    names = [name for name in ("GPTModel", "MambaModel", "HybridModel") if has(name)]
    return [model for name in names if "forward" in vars(model := SYMBOLS[name].find())]


def comes_with_megatron(spec: list[str] | None) -> bool:
    """Whether ``--spec`` names layers of megatron-core, as no ``--spec`` does."""
    return not spec or spec[0].startswith(f"{CORE}.")


def hybrid_rotary_source() -> str:
    """How the hybrid model of this release (MambaModel before 0.18) is built, as text: what its embedding is given."""
    return inspect.getsource(SYMBOLS["HybridModel" if has("HybridModel") else "MambaModel"].find().__init__)


def loss_caller(model: type) -> str:
    """The method of a language model that is given the loss mask and calls the loss: of 0.12's GPTModel, forward."""
    return "_postprocess" if hasattr(model, "_postprocess") else "forward"


def get_batch_module() -> Any:
    """Where scripts import ``get_batch_on_this_tp_rank`` from; None: this release has no such function."""
    holders = (holder for holder in ("training_utils", "core_utils") if has(f"{holder}.get_batch_on_this_tp_rank"))
    return next((SYMBOLS[holder].find() for holder in holders), None)


def validate_args_modules() -> list[Any]:
    """The modules that call ``validate_args`` under a name of their own, arguments first."""
    holders = ["arguments", *(["initialize"] if has("initialize.validate_args") else [])]
    return [SYMBOLS[holder].find() for holder in holders]


@functools.cache
def kv_groups_can_be_shared() -> bool:
    """Whether several tensor-parallel ranks may use one KV group (0.16 and later): its own configuration is asked."""
    sizes = {"num_layers": 1, "hidden_size": 2, "num_attention_heads": 2}
    try:
        SYMBOLS["TransformerConfig"].find()(**sizes, num_query_groups=1, tensor_model_parallel_size=2)
    except ValueError:
        return False
    return True


def stage_argument(function: Callable, vp_stage: int | None) -> dict[str, int | None]:
    """vp_stage as an argument; megatron-core 0.12 wants it in a global instead, as its own get_model sets it."""
    if "vp_stage" in inspect.signature(function).parameters:
        return {"vp_stage": vp_stage}
    if vp_stage is not None:
        SYMBOLS["parallel_state"].find().set_virtual_pipeline_model_parallel_rank(vp_stage)
    return {}
