"""Training and evaluation sets of ``eaft_megatron.train``: prepared folders, or files prepared in memory."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from eaft_megatron.data.prepare import prepare_in_memory
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, check_token_ids, content_of, evaluation_folders, training_folder
from eaft_megatron.data.samples import PreparedDataset
from eaft_megatron.hooks import settings_from_args
from eaft_megatron.installed import choose_transformer_impl


def read_datasets(args: argparse.Namespace) -> dict[str | None, PreparedDataset]:
    """The training set under None, the evaluation sets under their names; every rank opens the same files.

    Sets ``args.train_samples`` and ``args.data_sha256``, by which a resumed run knows its data again.

    Raises:
        ValueError: data that does not fit the model, the flags or the loss.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    needs = settings_from_args(args).gate().needs_side
    training = _open(training_folder(args.sft_data) if args.sft_data else args.data, tokenizer, args, needs)
    content = [content_of(training.data.manifest), training.packed]
    args.data_sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    datasets: dict[str | None, PreparedDataset] = {None: training}
    for name, path in evaluation_sets(args).items():
        datasets[name] = _open(path, tokenizer, args)
    for dataset in datasets.values():
        check_token_ids(dataset, args.true_vocab_size, args.hf_model)
    args.train_samples = len(training)
    return datasets


def evaluation_sets(args: argparse.Namespace) -> dict[str, str | Path]:
    """Name -> file or folder: ``--eval-data``, ``--sft-eval-data``, and what a split ``--sft-data`` has set aside."""
    sets = dict(evaluation_folders(args.sft_data)) if args.sft_data else {}
    return {**sets, **args.eval_sets}


def _open(path: str | Path, tokenizer: Any, args: argparse.Namespace, columns: tuple[str, ...] = ()) -> PreparedDataset:
    if Path(path).is_dir():
        data = PreparedData(path)
        data.check_tokenizer(tokenizer)
    else:
        data = prepare_in_memory(path, tokenizer, PrepareOptions(args.seq_length, pack=False))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return PreparedDataset(data, args.seq_length, packed=_is_packed(data, args), columns=columns, pad_token_id=pad)


def _is_packed(data: PreparedData, args: argparse.Namespace) -> bool:
    if args.sft_packing == "thd":
        raise ValueError("--sft-packing thd is for Megatron-LM with --sft; this entrypoint has mask and none")
    if (
        data.path.is_file()
        or args.sft_packing == "none"
        or (args.sft_packing == "auto" and data.manifest["packing"] is None)
    ):
        return False
    if choose_transformer_impl(args.transformer_impl) == "transformer_engine":
        raise ValueError(
            f"{data.path} is packed, and Transformer Engine's causal attention would look across the rows of a pack: "
            "give --sft-packing none (one row a sample), --transformer-impl local, or train with Megatron-LM and --sft"
        )
    return True
