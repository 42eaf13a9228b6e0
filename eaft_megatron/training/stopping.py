"""When to stop before the last iteration: a signal, a file, a time. Every rank comes to the same answer."""

from __future__ import annotations

import argparse
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1 is what Slurm is asked to send before the time limit, SIGTERM what preemption and torchrun send."""
_REASONS = ("", "{minutes} minutes are over", "the stop file {path} is there", *(s.name for s in SIGNALS))


class Stopping:
    """Watches for a reason to stop from construction on; a context manager that puts the signal handlers back.

    Args:
        args: ``exit_signal_handler`` (catch :data:`SIGNALS`), ``exit_duration_in_mins`` (minutes from construction,
            or None), ``stop_file`` (a path, or None: rank 0 looks whether it exists).
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._began = time.monotonic()
        self._minutes, self._file = args.exit_duration_in_mins, args.stop_file
        self._received = 0
        self._before: dict[int, Any] = {}
        if args.exit_signal_handler:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def __enter__(self) -> Stopping:
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> str | None:
        """The reason to stop now, the same on every rank, or None. One all-reduce, if there is anything to watch."""
        if not (self._before or self._minutes or self._file):
            return None
        code = torch.tensor(self._own_reason(), device=torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return _REASONS[int(code)].format(minutes=self._minutes, path=self._file) or None

    def _own_reason(self) -> int:
        """An index into _REASONS; of several the one that came from outside is worth telling."""
        if self._received:
            return self._received
        if self._file and dist.get_rank() == 0 and os.path.exists(self._file):
            return 2
        return int(bool(self._minutes) and time.monotonic() - self._began >= 60 * self._minutes)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = _REASONS.index(signal.Signals(number).name)
