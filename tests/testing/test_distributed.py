"""The multi-process harness: values come back in order, and every way to fail is told apart and told in full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from eaft_megatron.testing import DistributedError, run_distributed


class Box:
    """A class of this module, to see that arguments and results of such types survive the trip."""

    def __init__(self, value):
        self.value = value


def ranked_sum(box, *, scale):
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return Box(
        {"rank": dist.get_rank(), "total": total * scale, "given": box.value, "threads": torch.get_num_threads()}
    )


def environment(*names):
    return [os.environ.get(name) for name in names]


def fail_on(rank, message):
    if dist.get_rank() == rank:
        raise ValueError(message)
    dist.all_reduce(torch.zeros(1))


def fail_alone(rank):
    if dist.get_rank() == rank:
        raise ValueError("only me")
    time.sleep(600)


def hang_in_here(folder):
    Path(folder, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        start_helper(folder)
        dist.recv(torch.zeros(1), src=1)  # never sent
    time.sleep(600)


def start_helper(folder):
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, "helper").write_text(str(helper.pid))


def leave_a_helper(folder, how):
    start_helper(folder)
    if how == "raise":
        raise ValueError("after starting a helper")
    if how == "exit":
        os._exit(3)


def leave(rank, how):
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os._exit(7) if how == "exit" else os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.zeros(1))


def noisy_exit():
    import atexit

    atexit.register(os.abort)
    print("hello from", dist.get_rank())
    return dist.get_rank()


def leave_traces():
    """What it sees of the traces; then it leaves them: in modules, torch's defaults, the environment, the folder."""
    import random

    import numpy

    seen = [
        hasattr(torch.nn, "trace"),
        torch.get_default_dtype(),
        torch.initial_seed(),
        torch.is_grad_enabled(),
        os.environ.get("EAFT_TRACE"),
        os.getcwd(),
        sys.path[0],
        "trace" in sys.modules,
        signal.getsignal(signal.SIGTERM),
    ]
    draws = [random.random(), float(numpy.random.rand())]  # fresh interpreters differ here
    dist.barrier()  # all ranks have looked before one changes anything
    torch.nn.trace = sys.modules["trace"] = torch
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    torch.set_grad_enabled(False)
    os.environ["EAFT_TRACE"] = str(dist.get_rank())
    os.chdir("/")
    sys.path.insert(0, "/trace")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.barrier()
    again = [torch.get_default_dtype(), torch.is_grad_enabled(), os.environ["EAFT_TRACE"]]
    assert again == [torch.float64, False, str(dist.get_rank())]
    return seen, draws


def what_is_imported(*variables):
    return "torch.nn" in sys.modules, "megatron.core.parallel_state" in sys.modules, environment(*variables)


def unpicklable():
    return lambda: None


def test_results_come_back_in_rank_order_with_tensors_and_own_types():
    """Arguments reach every rank, collectives work, results keep their rank's place."""
    results = run_distributed(ranked_sum, 3, Box(torch.arange(4)), scale=2.0)
    for rank, actual in enumerate(results):
        assert actual.value["rank"] == rank and actual.value["threads"] == 1
        assert torch.equal(actual.value["total"], torch.tensor([12.0]))
        assert torch.equal(actual.value["given"], torch.arange(4))


def test_environment_is_set_before_the_rank_starts_and_the_parent_keeps_its_own(monkeypatch):
    """RANK and friends per rank, `env` added, None removes; the parent's environment is as before."""
    monkeypatch.setenv("EAFT_GONE", "1")
    before = dict(os.environ)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "EAFT_NEW", "EAFT_GONE"]
    actual = run_distributed(environment, 2, *names, env={"EAFT_NEW": "x", "EAFT_GONE": None})
    assert actual == [["0", "0", "2", "1", "x", None], ["1", "1", "2", "1", "x", None]]
    assert dict(os.environ) == before


def test_no_state_leaks_between_runs_or_ranks():
    """Modules, torch's defaults, seeds, environment and folder: each rank of each run starts from the same."""
    runs = [run_distributed(leave_traces, 2) for _ in range(2)]
    (expected, _), *others = [rank for run in runs for rank in run]
    assert expected[:2] == [False, torch.float32] and expected[3:6] == [True, None, os.getcwd()]
    assert all(actual == expected for actual, _ in others)
    draws = [draw for run in runs for _, rank in run for draw in rank]
    assert len(set(draws)) == len(draws)


def test_a_variable_that_an_import_reads_gets_a_fresh_interpreter(monkeypatch):
    """By env= or in the parent's environment; one that is read late does not, nor does it wait for fresh=True."""
    pytest.importorskip("megatron.core")
    name = "TRITON_INTERPRET"

    def forked(**options):
        ((_, megatron, values),) = run_distributed(what_is_imported, 1, name, **options)
        return megatron, values

    assert forked() == (sys.platform == "linux", [os.environ.get(name)])
    assert forked(env={"EAFT_X": "1"})[0] == (sys.platform == "linux")
    assert forked(fresh=True)[0] is False
    assert forked(env={name: "1"}) == (False, ["1"])
    monkeypatch.setenv(name, "2")
    assert forked() == (False, ["2"])


def test_the_failing_rank_is_named_first_with_its_traceback():
    """Rank 1 raises; rank 0, whose all-reduce breaks because of it, comes after."""
    with pytest.raises(DistributedError) as caught:
        run_distributed(fail_on, 2, 1, "no such luck")
    message = str(caught.value)
    assert caught.value.failed_ranks[0] == 1
    assert "[rank 1]   ValueError: no such luck" in message and "in fail_on" in message
    assert message.index("[rank 1] raised") < message.index("[rank 0]")


def test_ranks_that_still_run_after_a_failure_are_ended_and_shown():
    """The grace is seconds, not the timeout, and the message says where the survivor was."""
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"\[rank 0\] was still running") as caught:
        run_distributed(fail_alone, 2, 1, timeout=300)
    assert time.monotonic() - start < 60
    assert caught.value.failed_ranks == [1] and "in fail_alone" in str(caught.value).split("[rank 0]", 1)[1]


def test_a_timeout_shows_where_each_rank_hangs_and_leaves_no_process(tmp_path):
    """Stacks of all ranks; the ranks and what they started are gone."""
    start = time.monotonic()
    with pytest.raises(DistributedError, match="not finished within 25 s") as caught:
        run_distributed(hang_in_here, 2, str(tmp_path), timeout=25)
    assert time.monotonic() - start < 40
    assert caught.value.failed_ranks == []
    for rank in range(2):
        own = [line for line in str(caught.value).splitlines() if line.startswith(f"[rank {rank}]")]
        assert any("in hang_in_here" in line for line in own), str(caught.value)
    assert "in recv" in str(caught.value)
    assert_gone(tmp_path, "0", "1", "helper")


def assert_gone(folder, *names):
    for name in names:
        pid = int((folder / name).read_text())
        for _ in range(50):  # a killed helper is reaped by init, a little later
            if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {name} ({pid}) still runs")


@pytest.mark.parametrize("how", ["return", "raise", "exit"])
def test_what_a_rank_leaves_behind_is_ended(tmp_path, how):
    """megatron-core's checkpoint writer keeps a helper process, which outlives a rank that ends abruptly."""
    if how == "return":
        run_distributed(leave_a_helper, 1, str(tmp_path), how)
    else:
        with pytest.raises(DistributedError):
            run_distributed(leave_a_helper, 1, str(tmp_path), how)
    assert_gone(tmp_path, "helper")


@pytest.mark.parametrize(
    ("how", "expected"), [("exit", "died with exit code 7"), ("signal", "died with exit code -11 (SIGSEGV)")]
)
def test_a_silent_death_is_reported_with_its_exit_code_and_last_words(how, expected):
    """os._exit and signals leave no traceback: exit code and output instead, before the peers' broken connections."""
    with pytest.raises(DistributedError) as caught:
        run_distributed(leave, 2, 1, how)
    assert caught.value.failed_ranks[0] == 1
    assert f"[rank 1] {expected}" in str(caught.value) and "last words" in str(caught.value)
    assert how == "exit" or "in leave" in str(caught.value)


def test_results_survive_a_noisy_exit_and_output_is_prefixed(capsys):
    """A process that aborts after its result was written still counts; its prints carry its rank."""
    assert run_distributed(noisy_exit, 2) == [0, 1]
    assert "[rank 1] hello from 1" in capsys.readouterr().out


def test_a_result_that_cannot_be_pickled_is_that_ranks_error():
    """The message names the problem instead of losing the result."""
    with pytest.raises(DistributedError, match="(?i)pickle"):
        run_distributed(unpicklable, 1)


def test_functions_a_child_cannot_find_are_refused():
    """Lambdas and inner functions, before any process starts."""
    with pytest.raises(ValueError, match="module-level"):
        run_distributed(lambda: None, 1)
    with pytest.raises(ValueError, match="world_size"):
        run_distributed(environment, 0)


@pytest.mark.parametrize("mode", [pytest.param("importlib", marks=pytest.mark.slow), "prepend"])
def test_a_test_module_that_cannot_be_imported_by_name_works(tmp_path, mode):
    """pytest's import modes put test modules under names a new process cannot import."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_inner.py").write_text(
        "from eaft_megatron.testing import run_distributed\n"
        "import pytest\n"
        "class Own:\n    value = 3\n"
        "def work(own):\n    return own.value\n"
        "def test_it():\n    assert run_distributed(work, 1, Own()) == [3]\n"
        "@pytest.mark.skipif('.' not in __name__, reason='no packages in this mode')\n"
        "def test_beside():\n    assert run_distributed(beside, 1) == [4]\n"
        "def beside():\n    from . import helper\n    return helper.value\n"
    )
    (tmp_path / "inner" / "helper.py").write_text("value = 4\n")
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "pytest", "-q", f"--import-mode={mode}", "-p", "no:cacheprovider", "../inner"]
    root = str(Path(__file__).resolve().parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("2 passed" if mode == "importlib" else "1 passed, 1 skipped") in done.stdout
