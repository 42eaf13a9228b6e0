"""Checkpoints in megatron-core's torch_dist format, laid out as Megatron-LM lays them out.

A checkpoint is written into a folder of another name and renamed when it is whole; only then does the tracker file
name it. What a killed run leaves behind is never taken for a checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eaft_megatron.checkpoint_files import RELEASE, TRACKER, iteration_name, iteration_of, newest_checkpoint
from eaft_megatron.files import replace_folder, write_text
from eaft_megatron.hooks.arguments import loss_arguments
from eaft_megatron.training.setup import Trainer

_SAME = ("seq_length", "bf16", "data_sha256", "global_batch_size", "seed", "train_samples", *loss_arguments())


def latest_iteration(folder: str | None) -> int | None:
    """Iteration of the newest whole checkpoint in the folder, or None."""
    name = newest_checkpoint(folder) if folder is not None else None
    if name == RELEASE:
        raise ValueError(f"--load: {folder} holds weights alone (release), which only pretrain_gpt.py can start from")
    return None if name is None else iteration_of(name)


def save_checkpoint(trainer: Trainer, args: argparse.Namespace, iteration: int, consumed_samples: int) -> Path:
    """Write ``--save DIR/iter_NNNNNNN``, on every rank together; returns the folder."""
    from eaft_megatron.megatron_map import dist_checkpointing

    root = Path(args.save)
    final = root / iteration_name(iteration)
    partial = final.with_suffix(".incomplete")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(trainer, is_loading=False)
    state |= {
        "iteration": iteration,
        "consumed_samples": consumed_samples,
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        "checkpoint_version": 3.0,
        "args": argparse.Namespace(**vars(args)),
    }
    dist_checkpointing.save(state, str(partial), ("torch_dist", 1))
    dist.barrier()
    if dist.get_rank() == 0:
        replace_folder(partial, final)  # the same step may have been written before
        write_text(root / TRACKER, f"{iteration}\n", durable=True)
    dist.barrier()
    return final


def load_checkpoint(trainer: Trainer, args: argparse.Namespace, iteration: int) -> int:
    """Fill model, optimizer and schedule from ``--load DIR/iter_NNNNNNN``; returns the samples consumed so far.

    Raises:
        ValueError: no such checkpoint, or the run it belongs to had other data, samples, batch size, precision, seed
            or loss: its losses could not be continued.
    """
    from eaft_megatron.megatron_map import dist_checkpointing

    folder = Path(args.load) / iteration_name(iteration)
    if not folder.is_dir():
        raise ValueError(f"--load: {folder} does not exist, although {TRACKER} names it")
    _check_same_run(dist_checkpointing.load_common_state_dict(str(folder))["args"], args, folder)
    state = _sharded_state(trainer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder))
    for key, chunk in _named_chunks(trainer):
        chunk.load_state_dict(loaded[key])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    try:
        trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    except AssertionError as error:
        raise ValueError(f"--load: {folder} was made with another learning-rate schedule: {error}") from error
    return loaded["consumed_samples"]


def _check_same_run(before: argparse.Namespace, now: argparse.Namespace, folder: Path) -> None:
    for name in _SAME:
        old, new = getattr(before, name, None), getattr(now, name)
        if old != new:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--load: {folder} was made with {flag} {old}, now it is {new}; a resumed run must not change it"
            )


def _named_chunks(trainer: Trainer) -> list[tuple[str, Any]]:
    """The bare chunks under Megatron-LM's keys: "model", or "model0", "model1", ... when stages interleave."""
    if len(trainer.model) == 1:
        return [("model", trainer.model[0].module)]
    return [(f"model{index}", chunk.module) for index, chunk in enumerate(trainer.model)]


def _sharded_state(trainer: Trainer, is_loading: bool) -> dict[str, Any]:
    from eaft_megatron.megatron_map import parallel_state

    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    state: dict[str, Any] = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(trainer)}
    state["optimizer"] = trainer.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state
