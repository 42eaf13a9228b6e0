"""``python -m module`` as forked processes: what a fresh interpreter does after its imports, without their seconds."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from eaft_megatron.ranks import free_port
from eaft_megatron.testing.forkserver import fork_server


def run_module(
    module: str, argv: list[str], *, processes: int = 1, env: Mapping[str, str] | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess:
    """What subprocess.run would return of it; with several processes, each has the variables that torchrun sets.

    Their outputs stand one after another; the exit code is that of the first rank that failed.
    """
    server = fork_server()
    assert server is not None, "processes are forked on Linux alone"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="run_module_") as folder:
        outputs = [str(Path(folder) / str(rank)) for rank in range(processes)]
        ranks = []
        for rank, output in enumerate(outputs):
            ours = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(server.fork(_run, module, argv, output, environment=environment | ours))
        try:
            for child in ranks:
                child.join(max(deadline - time.monotonic(), 0))
            codes = [child.exitcode for child in ranks]
        finally:
            for child in ranks:
                child.kill()
        stdout, stderr = ("".join(Path(f"{o}.{s}").read_text() for o in outputs) for s in ("stdout", "stderr"))
    if None in codes:
        raise TimeoutError(f"{module} ran longer than {timeout} s\n{stdout[-2000:]}{stderr[-4000:]}")
    return subprocess.CompletedProcess([module, *argv], next(filter(None, codes), 0), stdout, stderr)


def _run(module: str, argv: list[str], output: str, parent: int) -> None:
    """In the child."""
    for stream, suffix in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv[:] = [module, *argv]
    sys.path.insert(0, os.getcwd())  # as python -m has it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
