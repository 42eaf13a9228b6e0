"""Fine-tune a Hugging Face model on megatron-core with EAFT or plain SFT: one machine, a laptop, a test.

    torchrun --nproc-per-node 2 -m eaft_megatron.train --tensor-model-parallel-size 2 \
        --hf-model DIR --data chat.jsonl --global-batch-size 8 --train-iters 100 --loss-type eaft

Everything that trains is megatron-core's: GPTModel, schedules, data parallelism, optimizer, checkpoints. With a GPU
per process it runs on CUDA and NCCL, else on the CPU and gloo. Clusters run Megatron-LM itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as dist

from eaft_megatron.checkpoint_files import drop_old
from eaft_megatron.data.samples import PreparedDataset
from eaft_megatron.hooks import install, settings_from_args, uninstall, wrap_forward_step
from eaft_megatron.models import read_hf_config, save_hf_weights, transformer_config
from eaft_megatron.ranks import gather, on_rank_0, world_of_one
from eaft_megatron.training.arguments import parse_arguments
from eaft_megatron.training.checkpoint import latest_iteration, load_checkpoint, save_checkpoint
from eaft_megatron.training.datasets import read_datasets
from eaft_megatron.training.log import RunLog
from eaft_megatron.training.setup import Trainer, build_trainer, distributed
from eaft_megatron.training.steps import evaluate, forward_step, train_step, training_batches
from eaft_megatron.training.stopping import Stopping


def main(argv: list[str] | None = None) -> int:
    """Train as the flags say; returns the exit code. Errors a user can mend come without a traceback."""
    # megatron-core says on every rank, module by module, that Transformer Engine and Apex are not there.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    try:
        with world_of_one():
            args = parse_arguments(argv, world_size=int(os.environ["WORLD_SIZE"]))
            _check_model(args)
            with Stopping(args) as stopping:
                datasets = read_datasets(args)
                with distributed(args) as device:
                    _run(args, datasets, device, stopping)
        return 0
    except (ValueError, FileNotFoundError) as error:
        message = f"{type(error).__name__}: {error}"
    except Exception:
        message = traceback.format_exc()
    print(f"[rank {os.environ.get('RANK', '0')}] {message}", file=sys.stderr, flush=True)
    return 1


def _check_model(args: argparse.Namespace) -> None:
    """What the model's configuration rules out, said before any process group or tensor exists."""
    hf_config = read_hf_config(args.hf_model)
    transformer_config(
        hf_config,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
    )
    if args.true_vocab_size not in (None, hf_config["vocab_size"]):
        raise ValueError(
            f"--true-vocab-size {args.true_vocab_size}, but the model's config.json says {hf_config['vocab_size']}: "
            "remove the flag"
        )
    args.true_vocab_size = hf_config["vocab_size"]
    if (columns := settings_from_args(args).gate().needs_side) and not args.sft_data:
        raise ValueError(
            f"--loss-type {args.loss_type} needs scores of the frozen base model ({', '.join(columns)}) beside the "
            "data, which --data does not carry: `eaft-megatron prepare` it, `eaft-megatron score` it, and give "
            "--sft-data"
        )
    if _is_filled(args.export_hf) and latest_iteration(args.load) != args.train_iters:
        raise ValueError(f"--export-hf: {args.export_hf} exists and is not empty")


def _run(args: argparse.Namespace, datasets: dict[str | None, PreparedDataset], device: torch.device, stopping) -> None:
    start = _agreed_start(args)
    trainer = build_trainer(args, device, load_weights=start is None)
    consumed = load_checkpoint(trainer, args, start) if start is not None else 0
    hook = install(dataclasses.replace(settings_from_args(args), true_vocab_size=args.true_vocab_size))
    log = None
    try:
        log = RunLog(args, start or 0)
        _describe(log, args, datasets, start)
        step = wrap_forward_step(forward_step, hook)
        _train(args, trainer, datasets, device, log, step, stopping, start or 0, consumed)
    finally:
        if log is not None:
            log.close()
        uninstall()


def _agreed_start(args: argparse.Namespace) -> int | None:
    """The iteration to resume from, as rank 0 sees it; ``ValueError`` where another node sees another folder."""
    mine = latest_iteration(args.load)
    first = gather(mine)[0]
    if mine != first:
        raise ValueError(f"--load: {args.load} holds iteration {mine} here and {first} on rank 0: share the folder")
    return mine


def _is_filled(folder: str | None) -> bool:
    return folder is not None and os.path.isdir(folder) and bool(os.listdir(folder))


def _describe(log: RunLog, args: argparse.Namespace, datasets: dict, start: int | None) -> None:
    log.say(
        f"{args.loss_type}: {dist.get_world_size()} processes = tensor {args.tensor_model_parallel_size} x pipeline "
        f"{args.pipeline_model_parallel_size} x data {args.data_parallel_size}, torch {torch.__version__}"
    )
    for name, dataset in datasets.items():
        counts = dataset.data.manifest["counts"]
        log.say(
            f"{name or 'training'} data: {len(dataset)} samples from {dataset.path}, {dataset.truncated} cut to "
            f"{args.seq_length} tokens, {dataset.dropped} dropped (nothing left to train on)"
        )
        if counts["rows_split_into_turns"]:
            log.say(f"  {counts['rows_split_into_turns']} conversations split, one sample a turn")
        if counts["answers_without_end_token"]:
            log.say(
                f"  {counts['answers_without_end_token']} answers without an end-of-turn token, whose stop is not "
                "trained: `eaft-megatron prepare --end-token`"
            )
    if start is not None:
        log.say(f"resumed from iteration {start} in {args.load}")
    elif args.load:
        log.say(f"no checkpoint in {args.load} yet: starting from {args.hf_model}")


def _train(args, trainer: Trainer, datasets, device, log: RunLog, step, stopping, start: int, consumed: int) -> None:
    def evaluate_all(iteration: int) -> None:
        for name, dataset in datasets.items():
            if name is not None:
                log.evaluation(iteration, name, evaluate(trainer, step, dataset, args, iteration, device))

    if start == 0:
        evaluate_all(0)
    last = args.train_iters
    if args.exit_interval:
        last = min(last, start + args.exit_interval - start % args.exit_interval)
    saved = start
    for iteration in range(start + 1, last + 1):
        began = time.monotonic()
        batches = training_batches(datasets[None], args, consumed, device)
        metrics = train_step(trainer, step, batches, args, iteration)
        consumed += args.global_batch_size
        show = iteration % args.log_interval == 0 or iteration == last
        log.training(iteration, metrics, time.monotonic() - began, show)
        if args.eval_interval and iteration % args.eval_interval == 0 and iteration != args.train_iters:
            evaluate_all(iteration)
        if iteration == args.train_iters:  # before the last save: a run killed in between evaluates again
            evaluate_all(iteration)
        reason = stopping.agreed() if iteration < last else None
        if args.save and (reason or iteration == last or args.save_interval and iteration % args.save_interval == 0):
            save_checkpoint(trainer, args, iteration, consumed)
            saved = iteration
            if args.save_keep_last is not None:
                on_rank_0(lambda: drop_old(args.save, args.save_keep_last))
        if reason:
            log.say(f"stopped after iteration {iteration} of {args.train_iters}: {reason}")
            last = iteration
            break
    if args.save and saved == last:
        log.say(f"checkpoint of iteration {last} in {args.save}")
    if args.export_hf and last == args.train_iters and _is_filled(args.export_hf):
        log.say(f"training was finished before, and {args.export_hf} is there: nothing left to do")
    elif args.export_hf and last == args.train_iters:
        save_hf_weights(trainer.model, args.hf_model, args.export_hf)
        log.say(f"Hugging Face folder in {args.export_hf}")


if __name__ == "__main__":
    sys.exit(main())
