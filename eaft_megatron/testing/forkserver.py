"""Processes forked from one that has torch and megatron imported: a start costs milliseconds, not seconds.

The server is a fresh interpreter, started when it is first asked for a process. It imports `_PRELOADED` (the same
whoever asks first), megatron under the CPU stand-ins, then forks a child for each request and tells its exit code.
A child starts with the caller's environment, folder, `sys.path` and `sys.argv`, without threads, process group or
open files of anybody; what it changes is its own and ends with it. Server and children end with the caller.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from eaft_megatron.megatron_map import is_core_installed

# Beside torch and, where it is installed and this is a machine without CUDA, megatron-core: what ranks of tests import.
_PRELOADED = ("eaft_megatron.hooks", "pytest", "transformers", "transformers.models.llama.modeling_llama")
# Read when they are needed, never at an import; a difference in any other variable asks for a fresh interpreter.
_READ_LATE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PWD", "OLDPWD"}
_READ_LATE |= {"TOKENIZERS_PARALLELISM", "GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE", "COLUMNS", "LINES"}
_READ_LATE |= {"TORCHINDUCTOR_CACHE_DIR"}  # set by the import of torch's compiler
_READ_LATE_PREFIXES = ("EAFT_", "PYTEST_")
_LENGTH = struct.Struct("!Q")
_EXIT_CODE = struct.Struct("!i")


class ForkedProcess:
    """A child of the server, with the part of multiprocessing.Process's interface that a supervisor needs."""

    def __init__(self, connection: socket.socket) -> None:
        self.sentinel = connection  # readable once the process has ended
        self.pid = _EXIT_CODE.unpack(_receive(connection, _EXIT_CODE.size))[0]
        self._exit_code: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; minus the signal's number if one ended it."""
        return None if self.is_alive() else self._exit_code

    def is_alive(self) -> bool:
        return not self._ended(timeout=0)

    def join(self, timeout: float | None = None) -> None:
        self._ended(timeout)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self._exit_code is None and select.select([self.sentinel], [], [], timeout)[0]:
            try:
                self._exit_code = _EXIT_CODE.unpack(_receive(self.sentinel, _EXIT_CODE.size))[0]
            except (EOFError, ConnectionError):  # the server was killed, and the child with it
                self._exit_code = -signal.SIGKILL
        return self._exit_code is not None


class ForkServer:
    """The caller's side. `matches` says whether a child of this server is what a fresh interpreter would be.

    preload: a module-level function that does other imports than `_PRELOADED` in the server.
    """

    def __init__(self, preload: Callable[[], Any] | None = None) -> None:
        self._owner, self._environment = os.getpid(), server_environment()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  the server writes there as long as it lives
        self._socket, other = socket.socketpair()
        imports = preload or _preload
        serve = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
            f"from {imports.__module__} import {imports.__name__} as preload; serve({other.fileno()}, preload)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", serve],
            env=self._environment,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        other.close()
        atexit.register(self._close)

    def _close(self) -> None:
        """End the server and wait for it, so that what its children used counts as used by the caller's children."""
        if self._owner == os.getpid():
            self._socket.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)

    def usable(self) -> bool:
        """Whether it is this process's and still there."""
        return self._owner == os.getpid() and self._process.poll() is None

    def matches(self, environment: Mapping[str, str]) -> bool:
        """Whether nothing that is read at an import differs from the environment in which the imports were done."""
        differing = {name for name, _ in environment.items() ^ self._environment.items()}
        return all(name in _READ_LATE or name.startswith(_READ_LATE_PREFIXES) for name in differing)

    def fork(self, target: Callable[..., Any], *args: Any, environment: Mapping[str, str]) -> ForkedProcess:
        """Start target(*args, parent) in a child; `parent` is a file descriptor, readable once the caller is gone.

        target: a module-level function of an importable module; args: plain picklable values.
        """
        place = {"path": sys.path, "argv": sys.argv, "folder": os.getcwd(), "environment": dict(environment)}
        request = pickle.dumps({**place, "module": target.__module__, "name": target.__name__, "args": args})
        ours, childs = socket.socketpair()
        with childs:
            try:
                socket.send_fds(self._socket, [_LENGTH.pack(len(request))], [childs.fileno()])
                self._socket.sendall(request)
            except OSError as error:
                raise RuntimeError(f"the server of test processes did not start:\n{self._said()}") from error
        try:
            return ForkedProcess(ours)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the server of test processes died:\n{self._said()}") from error

    def _said(self) -> str:
        self._process.wait(10)
        self._errors.seek(0)
        return self._errors.read()


_server: ForkServer | None = None


def server_environment() -> dict[str, str]:
    """The caller's environment as every rank has it: one thread for OpenMP, which reads this when torch is loaded."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def fork_server() -> ForkServer | None:
    """This process's server, started if need be; None where forking a process with torch in it is not safe."""
    global _server
    if sys.platform != "linux":
        return None
    if _server is None or not _server.usable():
        _server = ForkServer()
    return _server


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the other side has closed the connection")
        data += part
    return data


# ---- the server's side ---------------------------------------------------------------------------------------------


def serve(fd: int, preload: Callable[[], Any]) -> None:
    """Import, then fork for every request until the caller is gone."""
    preload()
    if (count := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"an import has started {count - 1} threads, which no child would have")
    requests = socket.socket(fileno=fd)
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    children: dict[int, socket.socket] = {}
    while True:
        readable = select.select([requests, woken], [], [])[0]
        if woken in readable:
            woken.recv(4096)
            _tell_exit_codes(children)
        if requests not in readable:
            continue
        header, fds, _, _ = socket.recv_fds(requests, _LENGTH.size, 1)
        if not fds:
            os._exit(0)
        request = _receive(requests, *_LENGTH.unpack(header))
        connection = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            for inherited in (requests, woken, waker, *children.values()):
                inherited.close()
            _be_child(request, connection)
        children[pid] = connection
        with contextlib.suppress(OSError):  # its caller may be gone
            connection.sendall(_EXIT_CODE.pack(pid))


def _tell_exit_codes(children: dict[int, socket.socket]) -> None:
    """Reap every child that has ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as connection, contextlib.suppress(OSError):
            connection.sendall(_EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))


def _preload() -> None:
    """The imports, without starting a thread or touching a GPU: neither survives a fork."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA: no fork survives that
        if not torch.cuda.is_available() and is_core_installed():
            from eaft_megatron.testing.cpu import cpu_standins

            with cpu_standins():
                importlib.import_module("eaft_megatron.testing.tiny_gpt")
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _be_child(request: bytes, connection: socket.socket) -> None:
    """Take the caller's place over, call, and leave as an interpreter leaves."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        call = pickle.loads(request)
        for name in os.environ.keys() - call["environment"].keys():
            del os.environ[name]
        os.environ.update(call["environment"])
        os.chdir(call["folder"])
        sys.path[:], sys.argv[:] = call["path"], call["argv"]
        importlib.invalidate_caches()
        if "numpy" in sys.modules:  # torch starts from the same seed in every process, numpy from a random one
            sys.modules["numpy"].random.seed()
        function = getattr(importlib.import_module(call["module"]), call["name"])
        function(*call["args"], connection.fileno())
        code = 0
    except SystemExit as left:
        code = _exit_code(left)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _exit_code(left: SystemExit) -> int:
    """What sys.exit(value) means to the interpreter."""
    if left.code is None:
        return 0
    if isinstance(left.code, int):
        return left.code & 0xFF
    print(left.code, file=sys.stderr)
    return 1
