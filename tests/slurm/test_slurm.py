"""A real two-node Slurm: what `eaft-megatron launch` submits saves itself, is requeued, goes on, and fails loudly.

Opt-in, for it takes root and Debian packages: tests/slurm/run.sh.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.training.tiny_run import write_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("EAFT_SLURM") != "1", reason="EAFT_SLURM is not 1: tests/slurm/run.sh sets it"),
]

STEPS = 60
RECIPE = """
name: {name}
entrypoint: train
run_dir: {folder}
model: {{hf: {folder}/model, transformer_impl: local}}
data: {{jsonl: {folder}/train.jsonl, seq_length: 128}}
loss: {{type: eaft}}
optimization: {{train_iters: {steps}, global_batch_size: 4, bf16: false, lr: 1.0e-3}}
parallel: {{nodes: 2, processes_per_node: 2, tensor: 2}}
memory: {{recompute: none}}
checkpoint: {{save_interval: {save_interval}}}
slurm: {{gpus_per_node: 0, time: "10", save_seconds: 60, preflight: {preflight}, rendezvous: {rendezvous}}}
environment: {{OMP_NUM_THREADS: "1"}}
flags: [--device, cpu]
"""


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, one of them a spare; where there can be none, that is a failure, since they were asked for."""
    if reason := unavailable():
        pytest.fail(reason)
    with Cluster(nodes=3, cpus=8, last_cpus=6) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model, data and runs, on a disk that both nodes see."""
    path = tmp_path_factory.mktemp("shared")
    write_inputs(path)
    return path


def _launch(cluster: Cluster, folder: Path, name: str, **choices) -> str:
    """Submits a run of the tiny model; returns the job's number."""
    recipe = folder / f"{name}.yaml"
    defaults = {"steps": STEPS, "save_interval": STEPS, "preflight": "false", "rendezvous": "c10d"}
    recipe.write_text(RECIPE.format(name=name, folder=folder, **{**defaults, **choices}))
    printed = cluster.run(sys.executable, "-m", "eaft_megatron.cli", "launch", str(recipe))
    return printed.rpartition("job ")[2].partition(":")[0]


def _rows(folder: Path, name: str) -> list[dict]:
    path = folder / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _iteration(folder: Path, name: str) -> int:
    return max((row["iteration"] for row in _rows(folder, name)), default=0)


def _wait_for_iteration(cluster: Cluster, job: str, folder: Path, name: str, iteration: int) -> None:
    deadline = time.monotonic() + 150
    while _iteration(folder, name) < iteration:
        assert cluster.job(job)["JobState"] not in ("FAILED", "COMPLETED", "CANCELLED"), _logs(folder, name)
        assert time.monotonic() < deadline, _logs(folder, name)
        time.sleep(0.2)


def _saved(folder: Path, name: str) -> int:
    tracker = folder / name / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _logs(folder: Path, name: str) -> str:
    """All that was printed, the batch script's own log last."""
    logs = sorted((folder / name / "logs").glob("*"), key=lambda log: (log.suffix == ".out", log.name))
    return "\n".join(f"==== {log.name}\n{log.read_text()}" for log in logs)


def _numbers(rows: list[dict]) -> list[tuple]:
    names = ("iteration", "lm loss", "eaft loss", "eaft weight", "eaft entropy", "grad norm", "learning rate")
    return [tuple(row[name] for name in names) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(cluster, folder) -> list[dict]:
    """The metrics of a run that nothing disturbs, with the check before it."""
    job = _launch(cluster, folder, "whole", preflight="true")
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 200)
    assert ended["JobState"] == "COMPLETED", _logs(folder, "whole")
    log = (folder / "whole" / "logs" / f"{job}.out").read_text()
    assert "all 10 checks passed" in log and "4 processes on 2 node(s)" in log
    assert f"training is complete: iteration {STEPS}" in log
    rows = _rows(folder, "whole")
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_usr1_and_power_loss_change_no_number(cluster, folder, uninterrupted):
    """USR1: saved at the step it was in, requeued, resumed there. Then node2 loses power: requeued onto the spare,
    resumed from the last checkpoint. All steps have the very losses of the undisturbed run."""
    job = _launch(cluster, folder, "disturbed", save_interval=STEPS // 2)
    _wait_for_iteration(cluster, job, folder, "disturbed", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    requeued = cluster.wait_for(job, {"PENDING"}, 60)
    saved = _saved(folder, "disturbed")
    log = folder / "disturbed" / "logs" / f"{job}.out"
    assert 2 <= saved < STEPS // 2 and requeued["Restarts"] == "1", _logs(folder, "disturbed")
    assert f"stopped at iteration {saved} of {STEPS}; requeued" in log.read_text()
    assert f"stopped after iteration {saved} of {STEPS}: SIGUSR1" in _logs(folder, "disturbed")

    _wait_for_iteration(cluster, job, folder, "disturbed", STEPS // 2 + 1)
    assert f"resumed from iteration {saved} in" in _logs(folder, "disturbed")
    cluster.power_off("node2")
    # Not onto node2 again: Slurm repeats for a minute what it told the dead node, which would end a second start there.
    cluster.wait_for(job, {"PENDING"}, 60)
    saved_again = _saved(folder, "disturbed")
    assert saved_again == STEPS // 2

    ended = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 200)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), _logs(folder, "disturbed")
    assert f"resumed from iteration {saved_again} in" in _logs(folder, "disturbed")
    assert _numbers(_rows(folder, "disturbed")) == _numbers(uninterrupted)
    starts = [line for line in log.read_text().splitlines() if "sft.sbatch: job " in line]
    assert [line.partition("start ")[2] for line in starts] == [
        *("1, on 2 node(s): node[1-2]", "2, on 2 node(s): node[1-2]", "3, on 2 node(s): node[1,3]")
    ]


def test_preemption_with_a_grace_time_saves_and_requeues(cluster, folder, uninterrupted):
    """Slurm sends TERM to the ranks alone: they save, torchrun ends non-zero, and the job goes on afterwards."""
    cluster.power_on("node2")
    cluster.wait_for_idle(60)
    job = _launch(cluster, folder, "preempted")
    _wait_for_iteration(cluster, job, folder, "preempted", 2)
    urgent = ["--parsable", "--partition=urgent", f"--nodes={len(cluster.nodes)}", "--exclusive", "--output=/dev/null"]
    other = cluster.run("sbatch", *urgent, "--wrap", "sleep 3").strip()
    cluster.wait_for(job, {"PENDING"}, 60)
    saved = _saved(folder, "preempted")
    log = folder / "preempted" / "logs" / f"{job}.out"
    assert 2 <= saved < STEPS, _logs(folder, "preempted")
    assert f"preempted at iteration {saved} of {STEPS}; requeued" in log.read_text(), _logs(folder, "preempted")
    cluster.wait_for(other, {"COMPLETED"}, 60)
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 200)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), _logs(folder, "preempted")
    assert f"resumed from iteration {saved} in" in _logs(folder, "preempted")
    assert _numbers(_rows(folder, "preempted")) == _numbers(uninterrupted)


def test_a_failing_rank_ends_the_job_everywhere(cluster, folder):
    """Non-zero on both nodes within a minute of the failure, and the first failing rank's own words in the log."""
    cluster.power_on("node2")
    cluster.wait_for_idle(60)
    run = folder / "failing"
    run.mkdir()
    environment = {"EAFT_RUN_DIR": str(run), "EAFT_PYTHON": sys.executable, "EAFT_PROCESSES": "2"}
    environment |= {"EAFT_RENDEZVOUS": "static", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parents[2] / "launch" / "slurm" / "sft.sbatch"
    options = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--no-requeue", f"--output={run}/%j.out"]
    program = str(Path(__file__).with_name("failing_rank.py"))
    job = cluster.run("sbatch", *options, str(script), program, env=environment).strip()
    failed_at = None
    deadline = time.monotonic() + 120
    while (state := cluster.job(job))["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
        if failed_at is None and "rank 3 fails at step 3" in _logs(folder, "failing"):
            failed_at = time.monotonic()
        assert time.monotonic() < deadline, _logs(folder, "failing")
        time.sleep(0.2)
    assert failed_at is not None, _logs(folder, "failing")
    assert time.monotonic() - failed_at < 60
    log = (run / f"{job}.out").read_text()
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0", log
    assert "rank 3 failed at" in log and "RuntimeError: rank 3 fails at step 3" in log, log
    for node in ("node1", "node2"):
        assert f"{node}: task" in log, log  # srun's word on how the task of each node ended
        assert (run / "logs" / f"{job}-0.{node}.log").exists()
    cluster.wait_for_idle(30)


def _submit_program(cluster: Cluster, run: Path, *options: str, inherited: dict[str, str], **exported: str) -> str:
    """The generic script, its settings written into it as `launch` does; returns the job's number."""
    run.mkdir(exist_ok=True)
    template = (Path(__file__).parents[2] / "launch" / "slurm" / "sft.sbatch").read_text()
    head, _, rest = template.partition("# >>> settings\n")
    values = {
        "EAFT_RUN_DIR": str(run),
        "EAFT_PYTHON": sys.executable,
        "EAFT_PROCESSES": "1",
        "PATH": os.environ["PATH"],
    }
    values |= {"OMP_NUM_THREADS": "1", "EAFT_MARK": "reached", **exported}
    lines = "".join(f"export {name}='{value}'\n" for name, value in values.items())
    script = run / "sft.sbatch"
    script.write_text(head + lines + rest.partition("# <<< settings\n")[2])
    fixed = ["--parsable", "--gpus-per-node=0", "--no-requeue", f"--output={run}/%j.out"]
    program = str(Path(__file__).with_name("show_step.py"))
    return cluster.run("sbatch", *fixed, *options, str(script), program, env=inherited).strip()


def test_the_step_gets_the_environment_and_the_cores_of_the_smallest_node(cluster, folder):
    """Three nodes, one of them smaller; --export=NONE, one core and a named address of the head: each rank sees what
    the script set and 6 cores."""
    cluster.power_on("node2")
    cluster.wait_for_idle(60)
    run = folder / "step"
    options = ["--nodes=3", "--export=NONE"]
    head = {"EAFT_HEAD": cluster.addresses["node1"]}
    job = _submit_program(cluster, run, *options, inherited={"SLURM_CPUS_PER_TASK": "1"}, **head)
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 120)
    assert ended["JobState"] == "COMPLETED", (run / f"{job}.out").read_text()
    said = "".join(log.read_text() for log in (run / "logs").glob("*.log"))
    assert said.count("cores 6 mark reached") == 3, said
    assert not (run / ".job").exists()


def test_of_two_jobs_in_one_folder_one_trains(cluster, folder):
    """An array starts two at once: one trains, the other says whose folder it is. A lock left by a job that has ended
    is taken over."""
    cluster.wait_for_idle(60)
    run = folder / "array"
    run.mkdir()
    (run / ".job").write_text("1\n")
    array = _submit_program(
        cluster, run, "--nodes=1", "--array=1-2", f"--output={run}/%a.out", inherited={}, EAFT_SLEEP="15"
    )
    states = []
    for task in ("1", "2"):
        states.append(cluster.wait_for(f"{array}_{task}", {"COMPLETED", "FAILED"}, 120)["JobState"])
    said = [(run / f"{task}.out").read_text() for task in ("1", "2")]
    assert sorted(states) == ["COMPLETED", "FAILED"], said
    refused = said[states.index("FAILED")]
    assert f"is training in {run}" in refused and "--array=1-N%1" in refused
    assert len(list((run / "logs").glob("*.log"))) == 1
