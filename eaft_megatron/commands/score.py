"""``eaft-megatron score``: what a frozen model thinks of each token of a prepared folder."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the data, what to write and how to run."""
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder, with its tokenizer")
    parser.add_argument(
        "folder", metavar="DIR", help="what `eaft-megatron prepare` made; of a split folder every part is scored"
    )
    scores = parser.add_argument_group("columns", "always ref_logprob and topk_entropy, in nats, float32")
    scores.add_argument("--topk", type=int, default=20, metavar="K", help="of topk_entropy (default: 20)")
    scores.add_argument("--full-entropy", action="store_true", help="also entropy, over the whole vocabulary")
    scores.add_argument(
        "--fidelity",
        action="store_true",
        help="also topk_entropy_K for K = 5, 10, 20, 50, and entropy: `landscape` then tells how close they are",
    )
    scores.add_argument(
        "--sum-p-squared", action="store_true", help="also sum_p_squared, by which `landscape` shows deft"
    )
    scores.add_argument("--overwrite", action="store_true", help="replace scores of another model")
    how = parser.add_argument_group("execution")
    how.add_argument(
        "--backend",
        choices=["auto", "hf", "megatron"],
        default="auto",
        help="transformers on one device, or megatron-core; auto: megatron-core under torchrun, else transformers",
    )
    how.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    how.add_argument("--device", choices=["auto", "cpu"], default="auto", help="default: a GPU where there is one")
    how.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="positions of a batch, with padding (default: 4096)"
    )
    how.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="the model's, if it is not in MODEL")
    how.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP")
    how.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP")
    how.add_argument("--transformer-impl", choices=["auto", "local", "transformer_engine"], default="auto")
    how.add_argument("--distributed-timeout-minutes", type=int, default=60, metavar="N", help="default: 60")


def run(args: argparse.Namespace) -> int:
    """Score every part of the folder and say what was written."""
    import torch

    from eaft_megatron.analysis.model_record import model_record
    from eaft_megatron.analysis.scoring import ScoreOptions, score
    from eaft_megatron.data.encoding import load_tokenizer
    from eaft_megatron.data.prepared import PreparedData, evaluation_folders, training_folder

    options = ScoreOptions(
        args.topk, args.full_entropy, args.fidelity, args.batch_tokens, args.overwrite, args.sum_p_squared
    )
    parts = [PreparedData(path) for path in (training_folder(args.folder), *evaluation_folders(args.folder).values())]
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    record: dict[str, Any] = {"model": model_record(args.model)}
    for data in parts:
        data.check_tokenizer(tokenizer)
        _check_vocabulary(args.model, data)
    args.dtype = args.dtype or ("bfloat16" if args.device == "auto" and torch.cuda.is_available() else "float32")
    record["dtype"] = args.dtype
    backend = _choose_backend(args)
    record["backend"] = backend
    opened = _megatron(args) if backend == "megatron" else _transformers(args)
    with opened as (load, team):
        for data in parts:
            written = score(data, record, options, load, team=team, progress=True)
            if team.leads:
                what = f"{', '.join(written)} written" if written else "everything asked for is there already"
                print(f"{data.path}: {what}")
    return 0


def _choose_backend(args: argparse.Namespace) -> str:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = max(processes, args.tensor_model_parallel_size, args.pipeline_model_parallel_size) > 1
    if args.backend == "hf" and parallel:
        raise ValueError("--backend hf runs in one process: without torchrun and parallel sizes, or --backend megatron")
    backend = args.backend if args.backend != "auto" else "megatron" if parallel else "hf"
    split = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if backend == "megatron" and ("RANK" not in os.environ or processes % split):
        raise ValueError(
            f"--backend megatron with TP {args.tensor_model_parallel_size} and PP {args.pipeline_model_parallel_size} "
            f"needs a multiple of {split} processes: torchrun --nproc-per-node {split} -m eaft_megatron.cli score ..."
        )
    return backend


def _check_vocabulary(model: str, data: Any) -> None:
    import json

    from eaft_megatron.data.prepared import check_token_ids

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if size is not None:
        check_token_ids(data, size, model)


@contextlib.contextmanager
def _transformers(args: argparse.Namespace) -> Iterator[tuple[Callable, Any]]:
    import functools

    import torch

    from eaft_megatron.analysis.hf_backend import HFBackend
    from eaft_megatron.analysis.scoring import Team

    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    yield functools.cache(lambda: HFBackend(args.model, getattr(torch, args.dtype), device)), Team()


@contextlib.contextmanager
def _megatron(args: argparse.Namespace) -> Iterator[tuple[Callable, Any]]:
    import functools

    import torch

    from eaft_megatron.training.setup import distributed

    args.num_virtual_stages_per_pipeline_rank, args.seed = None, 1234
    with distributed(args) as device:
        from eaft_megatron.analysis.megatron_backend import MegatronBackend, MegatronTeam

        dtype = getattr(torch, args.dtype)
        yield functools.cache(lambda: MegatronBackend(args.model, dtype, device, args.transformer_impl)), MegatronTeam()
