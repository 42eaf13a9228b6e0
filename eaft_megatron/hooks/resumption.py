"""What a Megatron-LM run may take over from a checkpoint: the same loss, and the vocabulary recorded beside it."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

from eaft_megatron.checkpoint_files import HF_SUBFOLDER, RECORD
from eaft_megatron.files import replacing
from eaft_megatron.hooks.arguments import loss_arguments

_STARTS = ("load", "pretrained_checkpoint")  # Megatron's arguments that name weights


def guard_resumption() -> None:
    """Where a checkpoint is resumed (--load without --finetune), have the loss flags compared with the checkpoint's."""
    from eaft_megatron.megatron_map import checkpointing, training

    check = checkpointing.check_checkpoint_args
    if hasattr(check, "_compares_loss_flags"):
        return

    @functools.wraps(check)
    def checking(checkpoint_args: argparse.Namespace, *rest: Any, **kwargs: Any):
        refuse_another_loss(checkpoint_args, training.get_args())
        return check(checkpoint_args, *rest, **kwargs)

    checking._compares_loss_flags = True  # type: ignore[attr-defined]
    checkpointing.check_checkpoint_args = checking


def refuse_another_loss(before: argparse.Namespace, now: argparse.Namespace) -> None:
    """``ValueError`` if the run that wrote a checkpoint had other loss flags; checkpoints without any pass."""
    if not hasattr(before, "loss_type") or not hasattr(now, "loss_type"):
        return
    data = getattr(before, "sft_data_sha256", None), getattr(now, "sft_data_sha256", None)
    if data[0] != data[1]:
        raise ValueError(
            "--load: the checkpoint was trained on other data than --sft-data, or with another --seed or packing, so "
            "the number of samples consumed means nothing here: give the same, or start from its weights (--finetune)"
        )
    gates = getattr(before, "eaft_own_gate", None), getattr(now, "eaft_own_gate", None)
    if gates[0] != gates[1]:
        raise ValueError(
            f"--load: the checkpoint was trained with {_said(gates[0])}, this run has {_said(gates[1])}: give the same "
            "gate, or start anew from its weights with --finetune"
        )
    plain = gates == (None, None) and before.loss_type == now.loss_type == "sft"
    names = ("loss_type",) if plain else loss_arguments()
    for name in names:
        old, new = getattr(before, name, None), getattr(now, name)
        if old != new:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--load: the checkpoint was trained with {flag} {old}, this run has {new}: give the same loss flags, "
                "or start anew from its weights with --finetune"
            )


def _said(own_gate: str | None) -> str:
    return "no gate of its own" if own_gate is None else f"the gate {own_gate}"


def carry_record(args: argparse.Namespace) -> None:
    """Copy what `eaft-megatron convert` recorded beside the weights that the run starts from to --save, on rank 0.

    A later `--load` of that folder then finds the true vocabulary, and `convert to-hf` the model's configuration.
    """
    save = getattr(args, "save", None)
    sources = [Path(folder) for name in _STARTS if (folder := getattr(args, name, None))]
    sources = [folder for folder in sources if (folder / RECORD).is_file()]
    if getattr(args, "rank", 0) != 0 or not save or not sources or (Path(save) / RECORD).exists():
        return
    Path(save).mkdir(parents=True, exist_ok=True)
    if (sources[0] / HF_SUBFOLDER).is_dir():
        shutil.copytree(sources[0] / HF_SUBFOLDER, Path(save) / HF_SUBFOLDER, dirs_exist_ok=True)
    with replacing(Path(save) / RECORD) as partial:
        shutil.copyfile(sources[0] / RECORD, partial)


def true_vocab_size(args: argparse.Namespace) -> int | None:
    """``--true-vocab-size``, or what `eaft-megatron convert` recorded beside the weights that the run starts from.

    Raises:
        ValueError: the two differ.
    """
    given = args.true_vocab_size
    for name in _STARTS:
        folder = getattr(args, name, None)
        if not folder or not (record := Path(folder) / RECORD).is_file():
            continue
        recorded = json.loads(record.read_text())["true_vocab_size"]
        if given not in (None, recorded):
            raise ValueError(f"--true-vocab-size {given}, but {record} says {recorded}: remove the flag")
        if given is None and getattr(args, "rank", 0) == 0:
            print(f"--true-vocab-size {recorded}, from {record}", flush=True)
        given = recorded
    return given
