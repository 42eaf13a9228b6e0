"""Runs of a Megatron script on several ranks, each forked from a process that has Megatron and the Transformer Engine
stand-in imported: a run of a tiny model takes a second or two instead of ten.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from eaft_megatron.testing.forkserver import ForkedProcess, ForkServer

REPOSITORY = Path(__file__).resolve().parents[2]

MODEL = (  # noqa: SIM905
    "--hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.3 --tokenizer-type NullTokenizer "
    "--transformer-impl transformer_engine --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-swiglu-fusion --attention-softmax-in-fp32 --mock-data --num-workers 0 "
    "--micro-batch-size 1 --lr 1e-3 --lr-decay-style constant --seed 7 --log-interval 1 --eval-iters 0 "
    "--eval-interval 100 --calculate-per-token-loss --ckpt-format torch_dist"
).split()
LAYOUT_FLAGS = {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size"}
LAYOUT_FLAGS |= {"cp": "--context-parallel-size", "ep": "--expert-model-parallel-size"}


class JobFailed(AssertionError):
    """A rank failed or did not end; the message holds what the ranks said last."""


class Jobs:
    """One release: a folder that holds ``megatron`` and the scripts, or None for the installed package.

    Attributes:
        tree: that folder, or the one with the scripts for the wheel's training loop.
    """

    def __init__(self, tree: Path | None = None) -> None:
        self.tree = tree or Path(__file__).parent
        # The repository first, for Megatron-LM has a package `tests` too; `run` puts the script's folder in the first
        # one's place.
        paths = [str(REPOSITORY), str(REPOSITORY), str(self.tree)]
        variables = {"TORCHDYNAMO_DISABLE": "1"}
        variables |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._paths = [*paths, *(path for path in sys.path if path not in paths)]
        with self._place(variables):
            self._server = ForkServer(preload)
        self._variables = {**variables, "OMP_NUM_THREADS": "1"}

    @contextlib.contextmanager
    def _place(self, variables: dict[str, str]) -> Iterator[None]:
        path, environment = sys.path[:], dict(os.environ)
        sys.path[:] = self._paths
        os.environ.update(variables)
        try:
            yield
        finally:
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)

    def close(self) -> None:
        """End the server."""
        self._server._close()

    def run(self, script: str, flags: list[str], *, ranks: int = 1, timeout: float = 240, **layout: int) -> Result:
        """What MODEL with ``flags`` does on ``ranks`` processes; JobFailed if one of them fails."""
        flags = [*MODEL, *flags]
        for name, size in layout.items():
            flags += [LAYOUT_FLAGS[name], str(size)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            processes = self._start(folder, script, flags, ranks)
            failed = _wait(processes, timeout)
            logs = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(ranks)]
            if failed:
                raise JobFailed("\n".join(f"[rank {rank}] {logs[rank][-4000:]}" for rank in failed))
            reports = folder / f"{ranks - 1}.steps"
            steps = [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []
            return Result("".join(logs), steps)

    def _start(self, folder: Path, script: str, flags: list[str], ranks: int) -> list[ForkedProcess]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
        processes = []
        with self._place({}):
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
                environment = {**os.environ, **self._variables, **world, **own}
                arguments = (str(self.tree / script), flags, str(folder / str(rank)))
                processes.append(self._server.fork(be_rank, *arguments, environment=environment))
        return processes


class Result:
    """What a run printed, and its steps: loss and metrics, gradient norm, unrounded, as the last rank has them."""

    def __init__(self, output: str, steps: list[dict[str, float]]) -> None:
        self.output, self.steps = output, steps


def _wait(processes: list[ForkedProcess], timeout: float) -> list[int]:
    """The ranks that failed; all that still run some seconds after the first one failed, or at the end, are killed."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(not process.is_alive() and process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return [rank for rank, process in enumerate(processes) if process.exitcode]


def preload() -> None:
    """In the server: what a rank imports, the stand-in in force for good."""
    import importlib
    import logging
    import typing
    import warnings

    import torch

    from eaft_megatron.testing.te_standin import transformer_engine_standin

    if not hasattr(typing, "override"):  # Python 3.11 under Megatron-LM 0.18 and later
        typing.override = lambda method: method
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    keep_open.append(transformer_engine_standin())
    keep_open[0].__enter__()
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        for name in ("megatron.training", "eaft_megatron.run", "eaft_megatron.hooks", "transformers"):
            importlib.import_module(name)
    warnings.resetwarnings()


keep_open: list = []


def be_rank(script: str, flags: list[str], base: str, parent: int) -> None:
    """One rank: ``eaft_megatron.run --device cpu --transformer-engine standin``, its output and steps into files."""
    log = os.open(f"{base}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _record_steps(Path(f"{base}.steps"))
    from eaft_megatron.run import main

    sys.argv = [script]
    sys.exit(main(["--device", "cpu", "--transformer-engine", "standin", script, *flags]))


def _leave_with(parent: int) -> None:
    import select

    select.select([parent], [], [])
    os._exit(1)


def _record_steps(path: Path) -> None:
    """Megatron prints the gradient norm to three digits: take the numbers where it logs them."""
    from megatron.training import training

    original = training.training_log
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        step = {name: float(value) for name, value in given["loss_dict"].items()}
        step["grad norm"] = float(given["grad_norm"])
        with path.open("a") as file:
            file.write(json.dumps(step) + "\n")
        return original(*args, **kwargs)

    training.training_log = training_log
