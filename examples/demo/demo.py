"""Fine-tune a small real model with EAFT and with plain SFT, tensor parallel, and compare.

    python examples/demo/demo.py --output DIR [--train-iters N] [--wheels DIR] [-- FLAGS FOR eaft_megatron.train]

Fetches model and data (prepare_data.py), tokenizes and masks them (`eaft-megatron prepare`), trains once with each
loss, then prints a table and writes demo.png (comparison.py). Everything goes into DIR. The data are benchmark test
data: a demonstration, not a result to report.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHODS = ("eaft", "sft")
DATA = {"training": "bfcl_train", "target": "bfcl_heldout", "general": "general"}  # set -> JSONL and prepared folder


def default_tensor_parallel() -> int:
    """3, which divides the model's 9 heads and 3 key-value heads; 1 on a machine with fewer than 3 GPUs but some."""
    import torch

    return 1 if 0 < torch.cuda.device_count() < 3 else 3


def train_command(method: str, options: argparse.Namespace) -> list[str]:
    output, tensor_parallel = options.output, options.tensor_parallel
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", tensor_parallel]
    command += ["-m", "eaft_megatron.train", "--tensor-model-parallel-size", tensor_parallel]
    command += ["--hf-model", output / "model", "--sft-data", output / DATA["training"]]
    for name in ("target", "general"):
        command += ["--sft-eval-data", f"{name}={output / DATA[name]}"]
    command += ["--eval-samples", options.eval_samples]
    command += ["--seq-length", options.seq_length, "--micro-batch-size", options.micro_batch_size]
    command += ["--global-batch-size", options.global_batch_size, "--train-iters", options.train_iters]
    command += ["--lr", options.lr, "--lr-warmup-fraction", 0.1, "--seed", options.seed]
    command += ["--loss-type", method, "--run-dir", output / method, *options.train_flags]
    return [str(part) for part in command]


def prepare_command(name: str, options: argparse.Namespace) -> list[str]:
    """One row a sample: a packed step would hold several times as many chats, and take as much longer."""
    output = options.output
    command = [sys.executable, "-m", "eaft_megatron.cli", "prepare", "--input", output / f"{name}.jsonl"]
    command += ["--tokenizer", output / "model", "--seq-length", options.seq_length, "--no-pack", "--num-workers", 1]
    return [str(part) for part in [*command, "--output", output / name, "--overwrite"]]


def check_output(output: Path) -> None:
    """Old runs are replaced, but only in a folder that an earlier demo has filled."""
    for method in METHODS:
        if (output / method).exists() and not (output / "manifest.json").exists():
            raise SystemExit(f"demo: {output / method} is not of this demo's making; choose another --output")


def step(title: str, command: list[str]) -> None:
    """Run one step, its output passed through; end the demo with its exit status if it fails."""
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    # One thread per process: the processes share the cores, and more threads only wait for each other.
    status = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode
    if status:
        print(f"demo: '{title}' failed with exit status {status}", file=sys.stderr)
        raise SystemExit(status if status > 0 else 1)
    print(f"== {title}: {time.monotonic() - start:.0f} s", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small real model with EAFT and with SFT, and compare.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels already downloaded")
    parser.add_argument("--train-iters", type=int, default=8)
    parser.add_argument("--eval-samples", type=int, default=12, help="samples of each evaluation set")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tensor-parallel", type=int, help="default: 3, or 1 on a machine with one or two GPUs")
    parser.add_argument("train_flags", nargs="*", metavar="FLAG", help="after --: more flags for eaft_megatron.train")
    options = parser.parse_args(argv)
    if options.tensor_parallel is None:
        options.tensor_parallel = default_tensor_parallel()
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    start = time.monotonic()
    runs = {method: options.output / method for method in METHODS}
    check_output(options.output)
    prepare = [sys.executable, str(HERE / "prepare_data.py"), "--output", str(options.output)]
    step("model and data", prepare + (["--wheels", str(options.wheels)] if options.wheels else []))
    for name in DATA.values():
        step(f"tokenizing {name}", prepare_command(name, options))
    for method in METHODS:
        shutil.rmtree(runs[method], ignore_errors=True)
        step(f"training with --loss-type {method}", train_command(method, options))
    report = [sys.executable, str(HERE / "comparison.py"), "--output", str(options.output)]
    for method, folder in runs.items():
        report += [f"--{method}", str(folder)]
    step("report", report)
    print(f"\ntotal: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
