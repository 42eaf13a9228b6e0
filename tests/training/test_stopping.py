"""A run that is asked to stop saves the step it is in, on every rank, and goes on from there."""

from __future__ import annotations

import argparse
import os
import signal
import time

import psutil
import pytest

from eaft_megatron.testing import run_distributed
from eaft_megatron.testing.cpu import cpu_standins
from eaft_megatron.training.stopping import Stopping
from tests.training.tiny_run import arguments, metrics, torchrun


def _flags(**given) -> argparse.Namespace:
    return argparse.Namespace(
        **{"exit_signal_handler": False, "exit_duration_in_mins": None, "stop_file": None, **given}
    )


def _ask(path: str) -> list:
    """Runs on each rank."""
    rank = int(os.environ["RANK"])
    answers = []
    with cpu_standins():
        answers.append(Stopping(_flags()).agreed())
        for number in (signal.SIGUSR1, signal.SIGTERM):
            before = signal.getsignal(number)
            with Stopping(_flags(exit_signal_handler=True)) as stopping:
                answers.append(stopping.agreed())
                if rank == 1:  # one rank alone gets it
                    os.kill(os.getpid(), number)
                answers.append(stopping.agreed())
            assert signal.getsignal(number) == before
        stopping = Stopping(_flags(stop_file=path, exit_duration_in_mins=0.02))
        answers.append(stopping.agreed())
        time.sleep(1.3)
        answers.append(stopping.agreed())
        if rank == 0:
            open(path, "w").close()
        answers.append(stopping.agreed())
    return answers


def test_every_rank_comes_to_the_same_answer(tmp_path):
    """A signal to one rank, a file, a time; nothing asked: no answer."""
    path = str(tmp_path / "stop")
    expected = [None, None, "SIGUSR1", None, "SIGTERM", None, "0.02 minutes are over", f"the stop file {path} is there"]
    for actual in run_distributed(_ask, 2, path):
        assert actual == expected


@pytest.mark.parametrize("flags", [["--exit-signal-handler"], ["--stop-file", "x"], ["--exit-duration-in-mins", "3"]])
def test_without_save_it_is_refused(folder, flags, capsys, monkeypatch):
    from eaft_megatron.train import main

    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(arguments(folder, "bad", *flags)) == 1
    assert f"{flags[0]} without --save" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(folder):
    """As preemption does it: torchrun passes SIGTERM on, the ranks save, and the next start has the rest to do."""
    checkpoints = folder / "asked" / "checkpoints"
    argv = arguments(folder, "asked", "--tensor-model-parallel-size", "2", "--train-iters", "400", "--lr", "1e-5")
    argv += ["--save", str(checkpoints), "--load", str(checkpoints), "--exit-signal-handler"]
    process = torchrun(2, argv)
    path = folder / "asked" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("grad norm") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert f"stopped after iteration {saved} of 400: SIGTERM" in output
    assert saved == len(metrics(folder, "asked")) >= 2
    assert not psutil.pid_exists(process.pid)
