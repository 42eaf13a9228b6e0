"""Run a function in several real processes joined by a gloo process group; torch only, no ports, no megatron.

How one run works: the parent makes a temporary folder and starts the ranks, forked from a process that has torch and
megatron imported (`forkserver`), or spawned where a rank needs a fresh interpreter. Everything goes through files in
that folder: the call (call.pt), the rendezvous (store), and for each rank its output (.log), its hang dump (.stacks)
and its outcome (.result or .error, renamed into place so a file that exists is complete). A rank that has written its
result counts as successful whatever its exit code: gloo sometimes aborts an exiting process.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from eaft_megatron.testing.forkserver import ForkedProcess, ForkServer, fork_server

_GRACE_S = 2.0  # what the other ranks get after the first failure
_EXIT_GRACE_S = 10.0  # what a rank gets to exit once every result is there
_LOG_TAIL_LINES = 30


class DistributedError(RuntimeError):
    """Some rank failed, died or hung. `failed_ranks` lists those that raised or died, the first to fail first."""

    def __init__(self, message: str, failed_ranks: list[int]) -> None:
        super().__init__(message)
        self.failed_ranks = failed_ranks


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str | None] | None = None,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call fn(*args, **kwargs) in `world_size` processes and return what the ranks returned, in rank order.

    fn: a module-level function; arguments and results are pickled (tensors included: each rank gets its own copy).
    timeout: seconds for the whole run, starting the processes included.
    env: extra environment of the ranks, in place before they import anything; None as a value removes a variable.
    fresh: give each rank an interpreter of its own that has imported nothing; seconds more of CPU time a rank. Without
        it the ranks are forked with torch and megatron-core imported, unless a variable that an import may read is
        not what it was when they were imported (`env`, or a change of os.environ): then they are fresh, too.

    In each rank torch.distributed is initialised (gloo), RANK, LOCAL_RANK, WORLD_SIZE and OMP_NUM_THREADS=1 are set.
    What the ranks print is shown, prefixed with the rank, when the run ends.

    Raises:
        ValueError: fn cannot be found from another process, or world_size < 1.
        DistributedError: a rank raised, died or outlived the timeout. The message holds every rank's traceback, exit
            code or, for a rank that was still running, its stacks at that moment; the first to fail comes first.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    target = _locate(fn)
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as name:
        folder = Path(name)
        torch.save((args, kwargs), folder / "call.pt")
        run = _Run(folder, world_size, deadline=time.monotonic() + timeout)
        try:
            run.start(target, timeout, env or {}, fresh)
            timed_out = run.wait()
        finally:
            run.kill()
            run.show_output()
        if timed_out or run.failures():
            raise DistributedError(run.describe(timeout if timed_out else None), run.failures())
        return [torch.load(run.path(rank, "result"), weights_only=False) for rank in range(world_size)]


class _Run:
    """The parent's side of one run."""

    def __init__(self, folder: Path, world_size: int, deadline: float) -> None:
        self.folder, self.world_size, self.deadline = folder, world_size, deadline
        self.processes: list[mp.process.BaseProcess | ForkedProcess] = []
        self.died: dict[int, float] = {}  # rank -> time its death was seen, for ranks that left no outcome
        self.killed = False  # from then on a silent death is our own doing

    def path(self, rank: int, suffix: str) -> Path:
        return self.folder / f"rank{rank}.{suffix}"

    def start(self, target: tuple, timeout: float, env: Mapping[str, str | None], fresh: bool) -> None:
        server = None if fresh or target[0] == "__main__" else fork_server()
        for rank in range(self.world_size):
            ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world_size, "OMP_NUM_THREADS": 1}
            # Set around the start: a spawned child imports torch before any line of ours runs in it.
            with _environment({**{key: str(value) for key, value in ours.items()}, **env}):
                self.processes.append(self._start(server, (target, str(self.folder), rank, self.world_size, timeout)))

    def _start(self, server: ForkServer | None, call: tuple) -> mp.process.BaseProcess | ForkedProcess:
        if server is not None and server.matches(os.environ):
            return server.fork(_child, *call, environment=os.environ)
        process = mp.get_context("spawn").Process(target=_child, args=call, name=f"rank{call[2]}")
        process.start()
        return process

    def wait(self) -> bool:
        """Until every rank has exited, or one failed and the grace is over, or the deadline: then True."""
        deadline, exiting = self.deadline, False
        while running := [process for process in self.processes if process.is_alive()]:
            now = time.monotonic()
            if now >= deadline:
                self._dump_stacks()
                return deadline == self.deadline
            if not exiting and self.failures():
                deadline = min(deadline, now + _GRACE_S)
                exiting = True
            elif not exiting and all(self.path(rank, "result").exists() for rank in range(self.world_size)):
                deadline = now + _EXIT_GRACE_S
                exiting = True
            mp.connection.wait([process.sentinel for process in running], timeout=min(0.1, max(deadline - now, 0.0)))
        return False

    def failures(self) -> list[int]:
        """The ranks that raised or died. One that died in silence comes first: its peers raise because it is gone."""
        order = []
        for rank, process in enumerate(self.processes):
            gone = not process.is_alive()  # before looking for files: what it wrote is there once it is gone
            if self.path(rank, "error").exists():
                order.append((1, json.loads(self.path(rank, "error").read_text())["time"], rank))
            elif rank in self.died or (gone and not self.killed and not self.path(rank, "result").exists()):
                order.append((0, self.died.setdefault(rank, time.time()), rank))
        return [rank for _, _, rank in sorted(order)]

    def _dump_stacks(self) -> None:
        """Ask the ranks that are still running where they are (the file exists once a rank listens to the signal)."""
        asked = []
        for rank, process in enumerate(self.processes):
            if process.is_alive() and self.path(rank, "stacks").exists():
                with suppress(ProcessLookupError):
                    os.kill(_pid(process), signal.SIGUSR1)
                    asked.append(rank)
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not all(self.path(rank, "stacks").stat().st_size for rank in asked):
            time.sleep(0.02)
        time.sleep(0.05 if asked else 0.0)  # a dump is many small writes

    def kill(self) -> None:
        """End what still runs, whole process groups: a rank may have left helpers, also where it is gone itself."""
        self.failures()  # notes the deaths that happened before the kill
        self.killed = True
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(_pid(process), signal.SIGKILL)
            process.kill()  # for one that was too young to lead a group
            process.join()

    def _read(self, rank: int, suffix: str) -> list[str]:
        path = self.path(rank, suffix)
        text = path.read_text(errors="replace") if path.exists() else ""
        if suffix == "stacks":  # without the thread that is ours
            text = "\n\n".join(part for part in text.split("\n\n") if _leave_with_parent.__name__ not in part)
        return text.splitlines()

    def show_output(self) -> None:
        for rank in range(self.world_size):
            for line in self._read(rank, "log"):
                print(f"[rank {rank}] {line}")
        sys.stdout.flush()

    def describe(self, timeout: float | None) -> str:
        """The message: the failed ranks in order of failure, then those that hung, then the rest."""
        first = self.failures()
        head = f"ranks {first} of {self.world_size} failed" if first else "no rank failed"
        head += f"; not finished within {timeout:g} s" if timeout is not None else ""
        rest = [rank for rank in range(self.world_size) if rank not in first]
        rest.sort(key=lambda rank: self.path(rank, "result").exists())
        return "\n".join([head, *(line for rank in first + rest for line in self._describe_rank(rank))])

    def _describe_rank(self, rank: int) -> list[str]:
        lines: list[str] = []
        if self.path(rank, "error").exists():
            what = "raised"
            lines = json.loads(self.path(rank, "error").read_text())["traceback"].splitlines()
        elif rank in self.died:
            code = self.processes[rank].exitcode
            what = f"died with exit code {code}" + (f" ({signal.Signals(-code).name})" if code and code < 0 else "")
            lines = [*self._read(rank, "stacks"), "its last output:", *self._read(rank, "log")[-_LOG_TAIL_LINES:]]
        elif self.path(rank, "result").exists():
            what = "had returned"
        elif self.path(rank, "stacks").exists():
            what = "was still running, here:"
            lines = self._read(rank, "stacks")
        else:
            what = "was still starting (importing torch or unpickling)"
        return [f"[rank {rank}] {what}", *(f"[rank {rank}]   {line}" for line in lines)]


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}

    def apply(wanted: Mapping[str, str | None]) -> None:
        for key, value in wanted.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value

    apply(values)
    try:
        yield
    finally:
        apply(before)


def _locate(fn: Callable[..., Any]) -> tuple[str, str | None, str]:
    """(module, file, qualified name) by which a child finds fn; ValueError when it could not."""
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    value: Any = module
    for part in getattr(fn, "__qualname__", "?").split("."):
        value = getattr(value, part, None)
    if value is not fn:
        raise ValueError(f"{fn!r} must be a module-level function: a child process finds it by module and name")
    return fn.__module__, getattr(module, "__file__", None), fn.__qualname__


def _find(module_name: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """The function, by import, or by file where the module is not importable (pytest's importlib mode)."""
    module = sys.modules.get(module_name)  # __main__ was put there by multiprocessing
    if module is None:
        with suppress(ImportError):
            module = importlib.import_module(module_name)
    imported_from = getattr(module, "__file__", None)
    if file and (module is None or (imported_from and not os.path.samefile(imported_from, file))):
        module = _load_by_file(module_name, Path(file))
    value: Any = module
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


def _load_by_file(name: str, file: Path) -> ModuleType:
    """The module under its name in the parent process, its packages made up where they are not importable either.

    Unpickling finds classes by that name, and imports the packages on the way to it.
    """
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = ".".join(parents[:depth])
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(file.parents[len(parents) - depth])]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"not a Python file: {file}"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pid(process: mp.process.BaseProcess | ForkedProcess) -> int:
    assert process.pid is not None, "not started yet"
    return process.pid


def _sentinel_of_parent() -> int:
    process = mp.parent_process()
    assert process is not None, "not started by multiprocessing"
    return process.sentinel


def _child(target: tuple, folder: str, rank: int, world_size: int, timeout: float, parent: int | None = None) -> None:
    """One rank: outcome to a file, then leave. parent: what becomes readable once the parent is gone, if forked."""
    base = Path(folder) / f"rank{rank}"
    os.setsid()  # a process group of its own, so that the parent can end helpers of this rank too
    log = os.open(f"{base}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = open(f"{base}.stacks", "w")  # noqa: SIM115  stays open for the signal handler
    faulthandler.enable(file=stacks)  # a segmentation fault leaves its stacks there too
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    gone = _sentinel_of_parent() if parent is None else parent
    threading.Thread(target=_leave_with_parent, args=(gone,), daemon=True).start()
    try:
        result = _call(target, folder, rank, world_size, timeout)
        _write(f"{base}.result", lambda path: torch.save(result, path))
    except BaseException:
        report = json.dumps({"time": time.time(), "traceback": traceback.format_exc()})
        _write(f"{base}.error", lambda path: Path(path).write_text(report))
        sys.stdout.flush()
        os._exit(1)  # at once, without destructors: peers waiting for this rank see its sockets close
    # Nobody takes the group down while a slower rank may still be reading from it.
    while not all((Path(folder) / f"rank{other}.result").exists() for other in range(world_size)):
        time.sleep(0.01)
    if dist.is_initialized():  # a gloo group alive at exit sometimes aborts the process
        dist.destroy_process_group()


def _call(target: tuple, folder: str, rank: int, world_size: int, timeout: float) -> Any:
    torch.set_num_threads(1)
    # Without this gloo resolves the host name, which fails in containers that have none.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    fn = _find(*target)
    args, kwargs = torch.load(Path(folder) / "call.pt", weights_only=False)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    # Longer than the run's own limit: the parent's stack dump says more than a gloo time-out.
    limit = timedelta(seconds=timeout + 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    return fn(*args, **kwargs)


def _write(path: str, write: Callable[[str], Any]) -> None:
    write(f"{path}.part")
    os.replace(f"{path}.part", path)


def _leave_with_parent(gone: int) -> None:
    """A parent that was killed cannot end its children: they watch for it."""
    mp.connection.wait([gone])
    os._exit(1)
