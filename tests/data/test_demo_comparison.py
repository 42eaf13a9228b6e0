"""The demo's table and picture from made-up metrics, and the commands the demo runs."""

import json
import math
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def report(load_demo):
    return load_demo("comparison")


@pytest.fixture(scope="module")
def demo(load_demo):
    return load_demo("demo")


def training_row(iteration: int, loss: float, **statistics: float) -> dict:
    return {"iteration": iteration, "lm loss": loss, **statistics}


def eval_row(iteration: int, name: str, loss: float) -> dict:
    return {"iteration": iteration, "eval": name, "lm loss": loss, "tokens": 100}


def write_run(folder: Path, losses: tuple[float, ...], iterations: int = 4, **statistics: float) -> Path:
    """A run whose training loss falls by 0.1 an iteration; losses: target and general before, then after."""
    rows = [eval_row(0, "target", losses[0]), eval_row(0, "general", losses[1])]
    rows += [training_row(i, 2 - 0.1 * i, **statistics) for i in range(1, iterations + 1)]
    rows += [eval_row(iterations, "target", losses[2]), eval_row(iterations, "general", losses[3])]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


STATISTICS = {"eaft weight": 0.25, "eaft entropy": 0.75, "eaft conflict rate": 0.125}


def test_table_and_picture(report, tmp_path, capsys):
    """Every number of the table is the measured one; the picture is a PNG."""
    pytest.importorskip("matplotlib")
    sft = write_run(tmp_path / "sft", (1.5, 3.0, 0.75, 3.25))
    eaft = write_run(tmp_path / "eaft", (1.5, 3.0, 1.0, 3.0625), **STATISTICS)
    output = tmp_path / "new" / "out"
    assert report.main(["--sft", str(sft), "--eaft", str(eaft), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["sft"], ["eaft"])]
    assert rows == [
        ["sft", "1.5000", "0.7500", "-0.7500", "3.0000", "3.2500", "+0.2500", "-", "-", "-"],
        ["eaft", "1.5000", "1.0000", "-0.5000", "3.0000", "3.0625", "+0.0625", "0.2500", "0.7500", "0.1250"],
    ]
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "demo.png").stat().st_size > 20_000


def test_runs_that_did_not_start_alike_are_named(report, tmp_path, capsys):
    """The picture shows one bar for both: a difference before training is said."""
    pytest.importorskip("matplotlib")
    sft, eaft = write_run(tmp_path / "a", (1.5, 3, 1, 3)), write_run(tmp_path / "b", (1.6, 3, 1, 3))
    assert report.main(["--sft", str(sft), "--eaft", str(eaft), "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "note: 'target' differs before training" in out
    assert "'general' differs" not in out


def test_later_rows_replace_earlier_ones(report, tmp_path):
    """A resumed run repeats iterations: each counts once, with its last row; other evaluation sets are ignored."""
    folder = write_run(tmp_path / "run", (1.0, 2.0, 0.5, 2.5))
    extra = [training_row(3, 9.0), eval_row(2, "target", 7.0), eval_row(4, "target", 0.25), eval_row(9, "other", 1.0)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in extra)
    run = report.read_run("sft", folder)
    assert [row["lm loss"] for row in run.train] == [1.9, 1.8, 9.0, 1.6]
    assert (run.before["target"]["lm loss"], run.after["target"]["lm loss"]) == (1.0, 0.25)
    assert run.change("general") == 0.5
    assert math.isclose(run.mean("lm loss"), (1.9 + 1.8 + 9.0 + 1.6) / 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "metrics.jsonl: no such file"),
        ([eval_row(0, "target", 1.0)], "no training iteration"),
        ([training_row(1, 1.0), eval_row(0, "target", 1.0)], "'target' was evaluated 1 times"),
        ([training_row(1, 1.0), *(eval_row(i, "target", 1.0) for i in (0, 1))], "'general' was evaluated 0 times"),
    ],
)
def test_incomplete_runs_are_clear_errors(report, tmp_path, capsys, rows, message):
    """Status 1 and the missing piece by name, no traceback."""
    folder = tmp_path / "run"
    folder.mkdir()
    if rows is not None:
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert report.main(["--sft", str(folder), "--eaft", str(folder), "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_demo_runs_every_step_in_order(demo, tmp_path, monkeypatch, capsys):
    """Fetch, tokenize each set, EAFT, SFT, report; flags after -- reach the training; old runs are replaced."""
    commands = []

    def run(command, env, **_):
        commands.append(command)
        assert "OMP_NUM_THREADS" in env
        (tmp_path / "manifest.json").touch()
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(demo.subprocess, "run", run)
    arguments = ["--output", str(tmp_path), "--tensor-parallel", "3", "--train-iters", "7", "--", "--bf16"]
    assert demo.main(arguments) == 0
    (tmp_path / "eaft").mkdir()
    assert demo.main(arguments) == 0
    assert not (tmp_path / "eaft").exists()
    fetch, *tokenize, eaft, sft, table = commands[:7]
    assert fetch[1].endswith("prepare_data.py")
    for command, name in zip(tokenize, ("bfcl_train", "bfcl_heldout", "general"), strict=True):
        assert command[command.index("--input") + 1] == str(tmp_path / f"{name}.jsonl")
        assert command[command.index("--output") + 1] == str(tmp_path / name)
    assert eaft[eaft.index("--sft-data") + 1] == str(tmp_path / "bfcl_train")
    assert table[1].endswith("comparison.py")
    assert eaft[eaft.index("--loss-type") + 1] == "eaft"
    assert sft[sft.index("--loss-type") + 1] == "sft"
    assert eaft[-1] == "--bf16"
    assert eaft[eaft.index("--train-iters") + 1] == "7"
    assert [part for part in eaft if part not in sft] == ["eaft", str(tmp_path / "eaft")]
    assert all(isinstance(part, str) for command in commands for part in command)
    assert "total: " in capsys.readouterr().out


def test_demo_stops_at_a_failed_step_and_spares_foreign_folders(demo, tmp_path, monkeypatch):
    """The exit status is the step's; a folder named eaft that no demo made is not touched."""
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: type("Result", (), {"returncode": 3}))
    with pytest.raises(SystemExit) as error:
        demo.main(["--output", str(tmp_path), "--tensor-parallel", "1"])
    assert error.value.code == 3
    (tmp_path / "eaft").mkdir()
    with pytest.raises(SystemExit, match="not of this demo's making"):
        demo.main(["--output", str(tmp_path), "--tensor-parallel", "1"])
    assert (tmp_path / "eaft").exists()
