"""From a recipe to what torchrun runs: the entrypoint and its flags."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from eaft_megatron.checkpoint_files import HF_SUBFOLDER, RECORD
from eaft_megatron.hooks.settings import LossSettings
from eaft_megatron.launch.recipe import Recipe, loss_keys
from eaft_megatron.launch.time_limit import check_time
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.models.pretrain_flags import pretrain_flags

PLACEHOLDER = "UNKNOWN"
"""Stands in a dry run's command for what only files that are not there could tell."""
_KEEP_LAST = 3  # of a 32B model one takes 459 GB
_ALIKE = ("--padded-vocab-size", "--transformer-impl", "--spec")  # follow from TP and the implementation


@dataclasses.dataclass(frozen=True)
class Command:
    """What torchrun runs.

    Attributes:
        argv: behind torchrun's own flags: ``-m MODULE ...``.
        train_iters: when training is done; None where that is not known yet.
        missing: what is not there and has to be before the run starts; each names the key and the way out.
    """

    argv: list[str]
    train_iters: int | None
    missing: list[str]


def run_folder(recipe: Recipe) -> Path:
    """Where everything of this run goes."""
    return Path(recipe.run_dir).absolute() / recipe.name


def build_command(recipe: Recipe) -> Command:
    """The command of a recipe.

    Raises:
        ValueError: values that contradict each other, the model, or the checkpoint.
    """
    _check(recipe)
    missing: list[str] = []
    train_iters = _train_iters(recipe, missing)
    shown = PLACEHOLDER if train_iters is None else str(train_iters)
    flags = _train_flags(recipe, shown, missing) if recipe.entrypoint == "train" else _gpt_flags(recipe, shown, missing)
    head = ["-m", "eaft_megatron.train"]
    if recipe.entrypoint == "pretrain_gpt":
        head = ["-m", "eaft_megatron.run", str(_megatron_lm(recipe, missing) / "pretrain_gpt.py")]
    return Command([*head, *flags, *recipe.flags], train_iters, missing)


def data_parallel_size(recipe: Recipe) -> int:
    """Copies of the model; ``ValueError`` where the sizes do not divide."""
    layout, ranks = recipe.parallel, recipe.parallel.nodes * recipe.parallel.processes_per_node
    model = layout.tensor * layout.pipeline * layout.context
    if min(layout.nodes, layout.processes_per_node, layout.tensor, layout.pipeline, layout.context) < 1:
        raise ValueError("parallel: every size must be >= 1")
    if ranks % model:
        raise ValueError(
            f"parallel: {layout.nodes} nodes x {layout.processes_per_node} processes do not divide by tensor "
            f"{layout.tensor} x pipeline {layout.pipeline} x context {layout.context} = {model}"
        )
    return ranks // model


def _check(recipe: Recipe) -> None:
    check_time(recipe.slurm)
    stretch = recipe.optimization.micro_batch_size * data_parallel_size(recipe)
    if stretch < 1 or recipe.optimization.global_batch_size % stretch:
        raise ValueError(
            f"optimization.global_batch_size {recipe.optimization.global_batch_size} must be a multiple of "
            f"micro_batch_size x data-parallel size = {stretch}: use fewer nodes or more model parallelism"
        )
    if recipe.parallel.tensor > recipe.parallel.processes_per_node:
        raise ValueError(
            f"parallel.tensor {recipe.parallel.tensor} spans nodes of {recipe.parallel.processes_per_node} processes: "
            "tensor parallelism belongs within a node; use pipeline or context for more"
        )
    if recipe.entrypoint == "train":
        for name, value, plain in (
            ("parallel.context", recipe.parallel.context, 1),
            ("memory.precision_aware_optimizer", recipe.memory.precision_aware_optimizer, False),
            ("memory.optimizer_cpu_offload", recipe.memory.optimizer_cpu_offload, False),
            ("checkpoint.keep_every", recipe.checkpoint.keep_every, None),
        ):
            if value != plain:
                raise ValueError(f"{name}: {value} is for entrypoint pretrain_gpt: remove it")
    elif recipe.data.jsonl:
        raise ValueError("data.jsonl is for entrypoint train: run `eaft-megatron prepare`, and name data.sft_data")
    elif recipe.checkpoint.export_hf:
        raise ValueError("checkpoint.export_hf is for entrypoint train: use `eaft-megatron convert to-hf` afterwards")
    if recipe.checkpoint.keep_last is not None and recipe.checkpoint.keep_last < 1:
        raise ValueError(f"checkpoint.keep_last must be >= 1, got {recipe.checkpoint.keep_last}")
    if recipe.checkpoint.keep_last is not None and recipe.checkpoint.keep_every is not None:
        raise ValueError("checkpoint.keep_last and checkpoint.keep_every: give one of them")
    if recipe.data.sft_data and recipe.data.jsonl:
        raise ValueError("data.sft_data and data.jsonl: give one of them")
    loss_settings(recipe)


def loss_settings(recipe: Recipe) -> LossSettings:
    """What the ``loss`` section says; ``ValueError`` names the flag that is wrong or belongs to another method."""
    keys = loss_keys()
    return LossSettings(**{keys[key].name: value for key, value in recipe.loss.items()})


def _loss_flags(recipe: Recipe, true_vocab_size: int | None) -> list[str]:
    flags, keys = [], loss_keys()
    for key, value in recipe.loss.items():
        if keys[key].kind is not bool:
            flags += [keys[key].flag, str(value)]
        elif value:
            flags.append(keys[key].flag)
    if true_vocab_size is not None and recipe.loss["type"] != "sft":
        flags += ["--true-vocab-size", str(true_vocab_size)]
    return flags


def _train_iters(recipe: Recipe, missing: list[str]) -> int | None:
    """``train_iters`` as given, else epochs x samples / batch: samples are packs, or rows where nothing is packed."""
    wanted = recipe.optimization
    if wanted.train_iters is not None:
        return wanted.train_iters
    if not recipe.data.sft_data:
        missing.append("data.sft_data: no data named; or give optimization.train_iters")
        return None
    folder = Path(recipe.data.sft_data)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        manifest = folder / "train" / "manifest.json"  # a folder that was split
    if not manifest.is_file():
        missing.append(f"data.sft_data: no {folder}/manifest.json, so the number of steps is not known (`prepare`)")
        return None
    record = json.loads(manifest.read_text(encoding="utf-8"))
    packing = record.get("packing")
    if packing and packing["seq_length"] != recipe.data.seq_length:
        raise ValueError(
            f"data.seq_length {recipe.data.seq_length}, but {manifest} is packed to {packing['seq_length']}: change "
            "one of them (`eaft-megatron prepare --repack`)"
        )
    samples = packing["packs"] if packing else record["rows"]
    return max(1, math.ceil(wanted.epochs * samples / wanted.global_batch_size))


def _megatron_lm(recipe: Recipe, missing: list[str]) -> Path:
    path = recipe.megatron_lm or os.environ.get("MEGATRON_LM_PATH")
    if not path:
        missing.append("megatron_lm: no Megatron-LM checkout named, and MEGATRON_LM_PATH is not set")
        return Path(PLACEHOLDER)
    if not (Path(path) / "pretrain_gpt.py").is_file():
        missing.append(f"megatron_lm: {path} has no pretrain_gpt.py")
    return Path(path).absolute()


def _model_flags(recipe: Recipe, missing: list[str]) -> tuple[list[str], int]:
    """(flags, true vocabulary): of the checkpoint where it is there, and the recipe must agree; else of the recipe."""
    model, ours = recipe.model, None
    layout: dict[str, Any] = {
        "transformer_impl": recipe.model.transformer_impl,
        "tensor_model_parallel_size": recipe.parallel.tensor,
    }
    if model.config is not None:
        architecture_of(model.config)  # names the ones that are known
        ours = pretrain_flags(model.config, **layout)
    record = Path(model.checkpoint or PLACEHOLDER) / RECORD
    if not record.is_file():
        missing.append(f"model.checkpoint: {record} is not there: `eaft-megatron convert to-megatron` makes it")
        if ours is None or model.config is None:
            raise ValueError(f"model.config is missing, and there is no {record} to take the model's flags from")
        return ours, model.config["vocab_size"]
    written = json.loads(record.read_text(encoding="utf-8"))
    if written["pretrain_gpt_flags"] is None:
        raise ValueError(f"model.checkpoint: pretrain_gpt.py cannot build this model: {written['flags_refused']}")
    if ours is not None:
        _refuse_disagreement(_paired(ours), _paired(written["pretrain_gpt_flags"]), record)
    config = json.loads((record.parent / HF_SUBFOLDER / "config.json").read_text(encoding="utf-8"))
    return pretrain_flags(config, **layout), written["true_vocab_size"]


def _paired(flags: list[str]) -> dict[str, list[str]]:
    """Flag -> its values."""
    paired: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            last = paired.setdefault(word, [])
        else:
            last.append(word)
    return paired


def _refuse_disagreement(recipe: dict, recorded: dict, record: Path) -> None:
    for flag in [*recorded, *recipe]:
        if flag not in _ALIKE and recipe.get(flag) != recorded.get(flag):
            raise ValueError(
                f"model.config means {flag} {_said(recipe, flag)}, but {record} says {_said(recorded, flag)}: the "
                "checkpoint is right; correct the recipe, or remove model.config"
            )


def _said(flags: dict[str, list[str]], flag: str) -> str:
    return "is not set" if flag not in flags else " ".join(flags[flag]) or "is set"


def _common_flags(recipe: Recipe, train_iters: str) -> list[str]:
    """What Megatron-LM and eaft_megatron.train spell alike."""
    wanted, layout, folder = recipe.optimization, recipe.parallel, run_folder(recipe)
    flags = [
        *("--seq-length", recipe.data.seq_length),
        *("--micro-batch-size", wanted.micro_batch_size, "--global-batch-size", wanted.global_batch_size),
        *("--train-iters", train_iters, "--lr", wanted.lr, "--min-lr", wanted.min_lr),
        *("--lr-decay-style", wanted.schedule, "--lr-warmup-fraction", wanted.warmup_ratio),
        *("--weight-decay", wanted.weight_decay, "--clip-grad", wanted.clip_grad),
        *("--adam-beta1", wanted.adam_beta1, "--adam-beta2", wanted.adam_beta2, "--adam-eps", wanted.adam_eps),
        *("--seed", wanted.seed, *(["--bf16"] if wanted.bf16 else [])),
        *("--tensor-model-parallel-size", layout.tensor, "--pipeline-model-parallel-size", layout.pipeline),
        *(["--use-distributed-optimizer"] if recipe.memory.distributed_optimizer else []),
        *_recompute_flags(recipe.memory.recompute),
        *("--save", folder / "checkpoints", "--load", folder / "checkpoints"),
        *("--save-interval", recipe.checkpoint.save_interval, "--exit-signal-handler"),
        *("--log-interval", recipe.log.interval, "--tensorboard-dir", folder / "tensorboard"),
    ]
    if recipe.checkpoint.keep_every is None:
        flags += ["--save-keep-last", recipe.checkpoint.keep_last or _KEEP_LAST]
    if recipe.data.sft_data:
        flags += ["--sft-data", Path(recipe.data.sft_data).absolute()]
    return list(map(str, flags))


def _recompute_flags(recompute: str) -> list[str]:
    if recompute == "none":
        return []
    full = ["--recompute-method", "uniform", "--recompute-num-layers", "1"] if recompute == "full" else []
    return ["--recompute-granularity", recompute, *full]


def _evaluates(recipe: Recipe) -> bool:
    """Whether there is a set to evaluate: one named, or one that `prepare --valid-fraction` set aside."""
    from eaft_megatron.data.prepared import evaluation_folders

    return bool(recipe.data.eval) or bool(recipe.data.sft_data and evaluation_folders(recipe.data.sft_data))


def _gpt_flags(recipe: Recipe, train_iters: str, missing: list[str]) -> list[str]:
    model, true_vocab_size = _model_flags(recipe, missing)
    checkpoint = Path(recipe.model.checkpoint or PLACEHOLDER).absolute()
    flags = [
        *model,
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(checkpoint / HF_SUBFOLDER)),
        # Resumed from --load where that holds a checkpoint, else fine-tuned from these weights.
        *("--pretrained-checkpoint", str(checkpoint)),
        *_common_flags(recipe, train_iters),
        *("--context-parallel-size", str(recipe.parallel.context)),
        *(["--sequence-parallel"] if recipe.parallel.tensor > 1 else []),
        *("--calculate-per-token-loss", "--optimizer", "adam", "--ckpt-format", "torch_dist"),
        *("--eval-interval", str(recipe.log.eval_interval or train_iters)),
        *("--eval-iters", str(recipe.log.eval_iters if _evaluates(recipe) else 0)),
        *("--distributed-timeout-minutes", "30"),
    ]
    if recipe.memory.distributed_optimizer:
        flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    if recipe.memory.precision_aware_optimizer:
        flags += ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
    if recipe.memory.optimizer_cpu_offload:
        flags += ["--optimizer-cpu-offload"]
    if recipe.model.transformer_impl == "transformer_engine":
        # Packed samples: attention stays within each row of a pack.
        flags += ["--sft", "--no-create-attention-mask-in-dataloader"]
    if recipe.checkpoint.async_save:
        # Without the persistent worker Megatron switches async saving off again, in a line of its log.
        flags += ["--async-save", "--use-persistent-ckpt-worker"]
        if _knows(recipe, "async_strategy"):  # 0.17 on: its default needs nvidia-resiliency-ext
            flags += ["--async-strategy", "mcore"]
    if recipe.checkpoint.keep_every:
        flags += ["--save-retain-interval", str(recipe.checkpoint.keep_every)]
    for name, folder in recipe.data.eval.items():
        flags += ["--sft-eval-data", f"{name}={Path(folder).absolute()}"]
    return flags + _loss_flags(recipe, true_vocab_size)


def _knows(recipe: Recipe, flag: str) -> bool:
    """Whether the Megatron-LM checkout has a flag of this name; False where there is no checkout."""
    folder = Path(recipe.megatron_lm or os.environ.get("MEGATRON_LM_PATH") or PLACEHOLDER) / "megatron" / "training"
    return any(flag in path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


def _train_flags(recipe: Recipe, train_iters: str, missing: list[str]) -> list[str]:
    if not recipe.model.hf:
        raise ValueError("model.hf is missing: entrypoint train starts from a Hugging Face folder")
    if not (Path(recipe.model.hf) / "config.json").is_file():
        missing.append(f"model.hf: {recipe.model.hf} has no config.json")
    folder, impl = run_folder(recipe), recipe.model.transformer_impl
    flags = ["--hf-model", str(Path(recipe.model.hf).absolute()), *_common_flags(recipe, train_iters)]
    flags += ["--run-dir", str(folder), "--stop-file", str(folder / "stop"), "--transformer-impl", impl]
    flag = "--sft-eval-data"
    if recipe.data.jsonl:
        flag = "--eval-data"
        flags += ["--data", str(Path(recipe.data.jsonl).absolute())]
    for name, path in recipe.data.eval.items():
        flags += [flag, f"{name}={Path(path).absolute()}"]
    if recipe.log.eval_interval and _evaluates(recipe):
        flags += ["--eval-interval", str(recipe.log.eval_interval)]
    if recipe.checkpoint.export_hf:
        flags += ["--export-hf", str(folder / "hf")]
    return flags + _loss_flags(recipe, None)
