"""Fine-tune a small real model by each method, on clean and on conflicting data, and see what it learns and forgets.

    python examples/forgetting/experiment.py --output DIR

Builds the inputs (tasks.py), tokenizes and masks them (`eaft-megatron prepare`), scores the training sets with the
model as it is (`eaft-megatron score`; FLOW and SFT-KL need it), trains every method on every training set with every
seed (`eaft_megatron.train`), and measures held-out chats and general text before and after (evaluation.py). Writes
results.json, table.md and pareto.png (outcome.py) into DIR.

Methods differ in --loss-type alone. Killed, the same command goes on after the last finished run. About an hour on
two CPU cores with bfloat16 instructions (AMX); not run on a GPU yet. The data are benchmark test data: see tasks.py.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import outcome  # noqa: E402
import tasks  # noqa: E402

from eaft_megatron.files import write_json  # noqa: E402

METHODS = ("sft", "eaft", "dft", "talr", "flow", "sft-kl")
BASE = "base"
GENERAL_TOKENS = 256  # of each general text
_OVERLONG = {True: "truncate", False: "error"}  # a general text is cut, a held-out answer never
TRAINING = ("train_iters", "lr", "seq_length", "global_batch_size", "dtype")  # what a result depends on


def run_name(run: dict[str, Any]) -> str:
    return f"{run['task']}-{run['data']}-{run['method']}-{run['seed']}"


def train_flags(run: dict[str, Any], options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of eaft_megatron.train: the same for every method, but for the loss."""
    flags: dict[str, Any] = {
        "--hf-model": options.model,
        "--sft-data": options.output / "prepared" / f"{run['task']}_{run['data']}",
        "--seq-length": options.seq_length,
        "--micro-batch-size": 1,
        "--global-batch-size": options.global_batch_size,
        "--train-iters": options.train_iters,
        "--lr": options.lr,
        "--lr-warmup-fraction": 0.1,
        "--seed": run["seed"],
        "--loss-type": run["method"],
        "--run-dir": folder,
        "--export-hf": folder / "hf",
        "--device": "cpu" if options.device == "cpu" else "auto",
    }
    precision = ["--bf16"] if options.dtype == "bfloat16" else []
    return [str(part) for pair in flags.items() for part in pair] + precision


def evaluation_sets(task: str, output: Path) -> dict[str, Path]:
    return {"target": output / "prepared" / f"{task}_heldout", "general": output / "prepared" / "general"}


def run_one(run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate in this process; the result is in the run's folder when it is whole, and only then."""
    import torch
    from evaluation import evaluate

    torch.set_num_threads(options.threads)
    folder = options.output / "runs" / run_name(run)
    if (done := _finished(folder, run, options)) is not None:
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    model, statistics = options.model, {}
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if run["method"] != BASE:
                statistics = _train(run, options, folder)
                model = folder / "hf"
            trained = time.monotonic()
            sets = evaluation_sets(run["task"], options.output)
            measured = evaluate(model, sets, dtype=options.dtype, device=options.device)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{run_name(run)} failed: {error!r}; see {folder / 'log.txt'}") from error
    result = {
        **run,
        **measured,
        **statistics,
        **_depends_on(options),
        "train_seconds": round(trained - began, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    shutil.rmtree(folder / "hf", ignore_errors=True)
    write_json(folder / "result.json", result)
    return result


def _finished(folder: Path, run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """The result of an earlier start with the same inputs and settings, if there is one."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    wanted = {**run, **_depends_on(options)}
    return result if all(result.get(key) == value for key, value in wanted.items()) else None


def _depends_on(options: argparse.Namespace) -> dict[str, Any]:
    """What else decides a result: settings, input files, model, and what computes."""
    settings = {name: getattr(options, name) for name in TRAINING}
    return {"training": settings, "inputs": options.inputs, "made_by": options.made_by}


def _train(run: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train; returns the mean weight, the mean plain loss and the tokens over all iterations."""
    from eaft_megatron import train

    if train.main(train_flags(run, options, folder)):
        raise RuntimeError("training stopped")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = sum(row["tokens"] for row in rows)
    means = {name: sum(row[name] * row["tokens"] for row in rows) / tokens for name in ("eaft weight", "lm loss")}
    return {"mean_weight": means["eaft weight"], "train_loss": means["lm loss"], "train_tokens": tokens}


def prepare_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Inputs, prepared folders and scores; what is there already stays. Returns the record of the inputs."""
    output = options.output
    if not (output / tasks.TASKS_FILE).exists():
        tasks.build(output, options.wheels or output / "wheels")
    record = json.loads((output / tasks.TASKS_FILE).read_text(encoding="utf-8"))
    training = [f"{task}_{data}" for task in options.tasks for data in options.data]
    for name in [*training, *(f"{task}_heldout" for task in options.tasks), "general"]:
        command = ["prepare", "--input", f"{output / name}.jsonl", "--tokenizer", options.model]
        length = min(options.seq_length, GENERAL_TOKENS) if name == "general" else options.seq_length
        command += ["--seq-length", length, "--num-workers", 1, "--output", output / "prepared" / name]
        _step(command if name in training else [*command, "--no-pack", "--overlong", _OVERLONG[name == "general"]])
    device = ["--device", "cpu"] if options.device == "cpu" else []
    for name in training:
        folder = output / "prepared" / name
        _step(["score", options.model, folder, "--dtype", options.dtype, "--batch-tokens", 2048, *device])
        _step(["landscape", folder, "--output", output / "landscape" / name, "--top", 20])
    return record


def _step(arguments: list[Any]) -> None:
    """One command of eaft-megatron; its failure ends the experiment."""
    from eaft_megatron.cli import main

    command = [str(argument) for argument in arguments]
    print("== eaft-megatron", *command, flush=True)
    if main(command):
        raise RuntimeError("stopped; what another model or other settings left in --output needs another --output")


def conflict_shares(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each training set, before training: the share of confident conflicts and their share of the loss."""
    shares = {}
    for task in options.tasks:
        for data in options.data:
            name = f"{task}_{data}"
            summary = json.loads((options.output / "landscape" / name / "summary.json").read_text(encoding="utf-8"))
            corner = summary["quadrants"]["conflict"]
            shares[name] = {
                "tokens": summary["tokens"],
                "loss": summary["mean_loss"],
                "conflict_share": corner["share"],
                "conflict_loss_share": corner["loss_share"],
            }
    return shares


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What computed the numbers."""
    import torch

    from eaft_megatron import __version__

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")][0]
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor
    return {
        "device": name,
        "capability": None if options.device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads_per_job": options.threads,
        "torch": torch.__version__,
        "eaft_megatron": __version__,
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is not finished yet, `options.jobs` at a time; the results in order."""
    from tqdm import tqdm

    runs = [dict(task=task, data=None, method=BASE, seed=None) for task in options.tasks]
    runs += [
        dict(task=task, data=data, method=method, seed=seed)
        for seed in options.seeds
        for task in options.tasks
        for data in options.data
        for method in options.methods
    ]
    results: dict[int, dict[str, Any]] = {}
    # Spawned: torch and its threads do not survive a fork.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_one, run, options): index for index, run in enumerate(runs)}
        with tqdm(total=len(runs), desc="runs", unit="run") as bar:
            try:
                for future in as_completed(waiting):
                    result = results[waiting[future]] = future.result()
                    values = {name: f"{result[name]['loss']:.4f}" for name in ("target", "general")}
                    bar.set_postfix(run=run_name(result), **values)
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [results[index] for index in range(len(runs))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each method learns and forgets, on a small real model.")
    parser.add_argument("--output", type=Path, default=Path("forgetting-out"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels already downloaded")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face folder (default: SmolLM2, OUTPUT/model)"
    )
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    parser.add_argument("--data", nargs="+", choices=tasks.DATA, default=list(tasks.DATA))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--train-iters", type=int, default=12)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=1, help="packs of --seq-length tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: CPU cores; 1 on a GPU)")
    options = parser.parse_args(argv)
    import torch

    options.output = options.output.resolve()
    options.model = (options.model or options.output / "model").resolve()
    options.device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.jobs = options.jobs or (1 if options.device == "cuda" else cores)
    options.threads = max(cores // options.jobs, 1)
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds: the same seed twice")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        record = prepare_inputs(options)
        from eaft_megatron.analysis.model_record import model_record

        model = {key: value for key, value in model_record(options.model).items() if key != "name"}
        options.made_by = {**machine(options), "model": model}
        options.inputs = {name: file["sha256"] for name, file in record["files"].items()}
        runs = run_all(options)
    except (tasks.demo.DemoError, RuntimeError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 1
    results = {
        "command": " ".join(["python examples/forgetting/experiment.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": options.made_by,
        "jobs": options.jobs,
        "training": {name: getattr(options, name) for name in TRAINING},
        "seeds": options.seeds,
        "inputs": record,
        "conflicts": conflict_shares(options),
        "minutes_of_this_start": round((time.monotonic() - began) / 60, 1),
        "minutes_of_all_runs": round(sum(run["seconds"] for run in runs) / 60, 1),  # one after another
        "runs": [{key: value for key, value in run.items() if key not in _depends_on(options)} for run in runs],
    }
    write_json(options.output / "results.json", results)
    return outcome.main(["--results", str(options.output / "results.json"), "--output", str(options.output)])


if __name__ == "__main__":
    sys.exit(main())
