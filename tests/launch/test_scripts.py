"""The shell scripts: their parts by themselves. tests/slurm runs them under a real Slurm."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eaft_megatron.commands.launch import _submission
from eaft_megatron.launch.command import build_command
from eaft_megatron.launch.folder import write_run_folder
from eaft_megatron.launch.recipe import read_recipe
from eaft_megatron.launch.script import TEMPLATES, render, sbatch_options, settings

ROOT = Path(__file__).resolve().parents[2]
LISTENING = """
import signal, sys, time
heard = []
time.sleep(1)  # before it listens, a signal would kill it
signal.signal(signal.{signal}, lambda *rest: (print("{signal} heard", flush=True), sys.exit(0)))
time.sleep(60)
"""


@pytest.fixture
def recipe(tmp_path):
    """A run of eaft_megatron.train."""
    values = {
        "name": "tiny",
        "entrypoint": "train",
        "run_dir": str(tmp_path / "runs"),
        "model": {"hf": "a folder/with a space"},
        "data": {"jsonl": "chat.jsonl"},
        "optimization": {"train_iters": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _bash(text: str, **environment: str) -> subprocess.CompletedProcess:
    """Shell code after the functions of sft.sbatch, whose last line starts everything."""
    functions = (TEMPLATES / "sft.sbatch").read_text().rpartition('main "$@"')[0]
    return subprocess.run(
        ["bash", "-c", functions + text], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_the_scripts_in_launch_are_those_of_the_package():
    """launch/ shows what the package carries: one file, two places."""
    for shown, kept in (("slurm/sft.sbatch", "sft.sbatch"), ("local.sh", "local.sh")):
        assert (ROOT / "launch" / shown).resolve() == (TEMPLATES / kept).resolve()


def test_the_script_says_what_the_recipe_says(recipe):
    """Options, settings and the command, which the shell takes apart into the very words; and nothing else changes."""
    read = read_recipe(
        recipe, ["slurm.partition=gpu", "slurm.exclude=n[7-9]", "slurm.requeue=false", "slurm.options=[--mem=0]"]
    )
    command = build_command(read)
    text = render(read, command)
    for option in (
        "--partition=gpu",
        "--exclude=n[7-9]",
        "--no-requeue",
        "--mem=0",
        "--signal=B:USR1@600",
        "--nodes=1",
    ):
        assert f"#SBATCH {option}\n" in text
    before, _, rest = text.partition("# >>> settings\n")
    settings, _, after = rest.partition("# <<< settings")
    template = (TEMPLATES / "sft.sbatch").read_text()
    assert after == template.partition("# <<< settings")[2]
    words = subprocess.run(
        ["bash", "-c", settings + 'printf "%s\\0" "$EAFT_TRAIN_ITERS" "$@"'], capture_output=True, text=True
    )
    assert words.stdout.split("\0")[:-1] == ["4", *command.argv]


def test_without_a_run_folder_or_a_command_the_script_says_so():
    for arguments, message in (([], "EAFT_RUN_DIR"), (["-m", "x"], "EAFT_RUN_DIR")):
        done = subprocess.run(
            ["bash", str(TEMPLATES / "sft.sbatch"), *arguments],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and message in done.stderr


def test_ranks_are_told_to_stop_when_they_listen(tmp_path):
    """One rank listens to USR1, one to TERM, one to nothing: told, told, and left alone."""
    programs = [LISTENING.format(signal=name) for name in ("SIGUSR1", "SIGTERM")]
    starting = "import subprocess, sys, time\n"  # stands for torchrun, the parent of the ranks
    starting += f"ranks = [subprocess.Popen([sys.executable, '-c', text]) for text in {programs!r}]\n"
    starting += "ranks.append(subprocess.Popen(['sleep', '8']))\n"
    starting += "print([rank.wait() for rank in ranks])"
    (tmp_path / "stop").touch()
    code = 'trap "" USR1; watch_for_stop $$ & exec "$PYTHON" -c "$START"'
    variables = {"EAFT_RUN_DIR": str(tmp_path), "EAFT_STOP_FILE": "nowhere", "SLURMD_NODENAME": "n1"}
    done = _bash(code, PYTHON=sys.executable, START=starting, **variables)
    assert sorted(done.stdout.splitlines()) == sorted(
        ["SIGUSR1 heard", "SIGTERM heard", "n1: asked the ranks to save and stop", "[0, 0, 0]"]
    ), done.stderr


def test_the_exit_code_survives_signals(tmp_path):
    """`wait` returns early when a trap runs; what counts is how srun ends."""
    (tmp_path / "srun").write_text("#!/bin/sh\nsleep 2\nexit 7\n")
    (tmp_path / "srun").chmod(0o755)
    code = """
    signals=0; trap 'signals=$((signals + 1))' USR1 TERM
    (sleep 0.5; kill -USR1 $$; sleep 0.2; kill -TERM $$; sleep 0.2; kill -USR1 $$) &
    code=0; on_nodes '' x || code=$?; echo "code $code after $signals signals"
    """
    variables = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_CPUS_PER_NODE": "1", "EAFT_START": "1-0", "logs": str(tmp_path)}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = _bash(code, PATH=path, EAFT_RUN_DIR=str(tmp_path), **variables)
    assert done.stdout == "code 7 after 3 signals\n", done.stderr


FAILURE = """{noise}
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_06:55:{second}
  host      : {node}
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 77)
"""


def test_the_first_failing_rank_is_found_among_those_it_took_along(tmp_path):
    """Three nodes: one rank failed first, one in the same second because it was killed, one later."""
    for node, rank, second, code in (("n1", 1, "12", -15), ("n2", 12, "12", 1), ("n3", 20, "13", 1)):
        noise = f"rank {rank}: last words of {rank}\nrank {rank + 1}: noise"
        text = FAILURE.format(noise=noise, second=second, node=node, rank=rank, code=code)
        (tmp_path / f"5-0.{node}.log").write_text(text)
    done = _bash("logs=$EAFT_RUN_DIR; first_failure ''", EAFT_RUN_DIR=str(tmp_path), EAFT_START="5-0")
    assert done.returncode == 0, done.stderr
    lines = [line.partition("sft.sbatch: ")[2] or line for line in done.stdout.splitlines()]
    assert lines[1].startswith("rank 12 failed at 2026-11-22_06:55:12 with exit code 1")
    assert lines[-2:] == ["the last lines of rank 12:", "rank 12: last words of 12"]


@pytest.mark.slow
def test_local_sh_gives_the_exit_code_and_saves_on_interrupt(tmp_path):
    """A rank's failure is the script's; SIGTERM to the script reaches the ranks."""
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.exit(3)")
    environment = {**os.environ, "EAFT_RUN_DIR": str(tmp_path), "EAFT_PROCESSES": "1", "EAFT_PYTHON": sys.executable}
    done = subprocess.run([str(TEMPLATES / "local.sh"), str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "ended with exit code 1" in done.stderr

    program.write_text(
        LISTENING.format(signal="SIGTERM").replace("time.sleep(60)", "print('ready', flush=True); time.sleep(60)")
    )
    running = subprocess.Popen(
        [str(TEMPLATES / "local.sh"), str(program)], env=environment, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in running.stdout:
        lines.append(line.strip())
        if line.strip() == "ready":
            running.send_signal(signal.SIGTERM)
    began = time.monotonic()
    running.wait(30)
    assert "SIGTERM heard" in lines and time.monotonic() - began < 20


@pytest.mark.parametrize(("given", "expected"), [("8", "8"), ("8(x3),4", "4"), ("6,16(x20)", "6"), ("128(x2)", "128")])
def test_cores_are_those_of_the_smallest_node(given, expected):
    """Slurm's own spelling of cores per node."""
    done = _bash(f"fewest_cores '{given}'", EAFT_RUN_DIR="runs")
    assert done.stdout.strip() == expected, done.stderr


def test_submission_is_not_changed_by_slurms_variables_of_this_shell(monkeypatch):
    """What a job around `launch` exports would override the script's options; where Slurm is stays known."""
    for name in ("SBATCH_EXPORT", "SBATCH_TIMELIMIT", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    kept = _submission()
    assert [name for name in kept if name.startswith(("SBATCH_", "SLURM_", "SRUN_"))] == ["SLURM_CONF"]
    assert kept["PATH"] == os.environ["PATH"]


def test_a_job_keeps_its_recipe_when_another_is_launched_there(recipe, tmp_path):
    """The script names a recipe by its content; a second launch writes another and leaves the first."""
    scripts = []
    for nodes in (1, 2):
        read = read_recipe(recipe, [f"parallel.nodes={nodes}", "environment.TOKEN=secret"])
        folder = write_run_folder(read, dataclasses.replace(build_command(read), missing=[]))
        scripts.append((folder / "sft.sbatch").read_text())
    assert stat.S_IMODE((folder / "sft.sbatch").stat().st_mode) == 0o700
    named = [re.search(r"EAFT_RECIPE=(\S+)", text)[1] for text in scripts]
    assert [read_recipe(path).parallel.nodes for path in named] == [1, 2]
    assert {stat.S_IMODE(Path(path).stat().st_mode) for path in [*named, folder / "recipe.yaml"]} == {0o600}


def test_a_container_sees_all_that_the_recipe_names(recipe):
    """Mounts by default; srun's own options reach the script."""
    given = [
        "slurm.container=pyxis",
        "slurm.image=i.sqsh",
        "slurm.srun_options=[--mpi=pmix, --no-container-entrypoint]",
    ]
    read = read_recipe(recipe, [*given, "model.hf=/models/a", "data.jsonl=/data/chat.jsonl", "run_dir=/scratch/runs"])
    values = settings(read, build_command(read))
    assert values["EAFT_CONTAINER_MOUNTS"] == "/data/chat.jsonl,/models/a,/scratch/runs"
    assert values["EAFT_SRUN_OPTIONS"] == "--mpi=pmix --no-container-entrypoint"
    with pytest.raises(ValueError, match="srun_options.*holds a blank"):
        settings(
            dataclasses.replace(read, slurm=dataclasses.replace(read.slurm, srun_options=["--a b"])),
            build_command(read),
        )


def test_a_name_that_slurm_would_cut_is_refused(recipe):
    with pytest.raises(ValueError, match="name: 'my run'"):
        sbatch_options(read_recipe(recipe, ["name=my run"]))
