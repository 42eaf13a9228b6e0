"""`eaft-megatron report` on events as eaft_megatron.train and as Megatron-LM write them."""

from __future__ import annotations

import struct

import pytest

from eaft_megatron.hooks.metrics import METRICS

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


def _write(folder, scalars: dict[str, dict[int, float]], **options) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), **options) as writer:
        for tag, curve in scalars.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)


def _curve(start: float, steps: int = 20) -> dict[int, float]:
    return {step: start / step for step in range(1, steps + 1)}


def test_both_writers_curves_are_found(tmp_path):
    """Whatever the tag is called: the metric, the gradient norm, and every evaluation set under its name."""
    from eaft_megatron.launch.curves import read_run

    ours = {name: _curve(index + 1) for index, name in enumerate(METRICS)}
    _write(tmp_path / "ours" / "tensorboard", {**ours, "grad norm": {1: 2.0}, "held out lm loss": {0: 3.0, 20: 2.0}})
    megatron = {**ours, "grad-norm": {1: 2.0}, "learning-rate": {1: 1e-5}, "lm loss vs samples": {64: 1.0}}
    megatron |= {"lm loss validation": {20: 5.0}, "lm loss validation-general": {20: 6.0}}
    megatron |= {"target/lm loss validation": {20: 7.0}, "lm loss validation ppl": {20: 8.0}}
    megatron |= {"target/lm loss validation vs samples": {64: 9.0}, "eaft weight validation": {20: 0.5}}
    _write(tmp_path / "megatron", megatron)
    first, second = read_run(tmp_path / "ours"), read_run(tmp_path / "megatron")
    assert first.training.keys() == {*METRICS, "grad norm"}
    assert first.training["lm loss"] == pytest.approx(_curve(1))
    assert first.validation == {"held out": {0: 3.0, 20: 2.0}}
    assert second.training.keys() == {*METRICS, "grad norm", "learning rate"}
    assert second.validation == {"validation": {20: 5.0}, "general": {20: 6.0}, "target": {20: 7.0}}


def test_flags_logged_as_texts_and_other_kinds_are_passed_over(tmp_path):
    """Megatron-LM calls add_text for each of its hundreds of flags, some of them numbers; histograms may be there."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from eaft_megatron.launch.curves import read_run

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("lr", "1e-05", 0)
        writer.add_text("lm loss", "7", 0)
        writer.add_text("sft_data", "None", 0)
        writer.add_histogram("weights", torch.arange(5.0), 1)
        writer.add_scalar("lm loss", 2.5, 1)
        writer.add_scalar("eaft loss", 1.5, 1, new_style=True)  # a tensor, as newer writers have it
    assert read_run(tmp_path).training == {"lm loss": {1: 2.5}, "eaft loss": {1: 1.5}}


def test_a_resumed_runs_later_values_count(tmp_path):
    """Iterations 3 and 4 were made twice, after a power loss."""
    from eaft_megatron.launch.curves import read_run

    _write(tmp_path, {"lm loss": {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}}, filename_suffix=".a")
    _write(tmp_path, {"lm loss": {3: 3.0, 4: 4.0, 5: 5.0}}, filename_suffix=".b")
    assert read_run(tmp_path).training["lm loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}


def test_table_and_picture(tmp_path, capsys):
    """First, last and mean of the last tenth; a PNG of the size that six panels take."""
    from eaft_megatron.cli import main

    _write(tmp_path / "tensorboard", {"lm loss": _curve(20), "target lm loss": {0: 4.0, 20: 1.5}})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10\n")
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "iteration 20, checkpoint of iteration 10, last logged 0 minutes ago" in lines[0]
    rows = {line[: line.index("  ")]: line.split()[-4:] for line in lines if "lm loss" in line}
    # The mean of 20/19 and 20/20.
    assert rows == {"lm loss": ["20", "1", "1.02632", "20"], "target: lm loss": ["4", "1.5", "1.5", "2"]}
    picture = (tmp_path / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (1560, 840)


def test_what_is_not_there_is_said(tmp_path, capsys):
    from eaft_megatron.cli import main

    for target, message in ((tmp_path / "nowhere", "no such run folder"), (tmp_path, "no TensorBoard events")):
        assert main(["report", str(target)]) == 1
        assert message in capsys.readouterr().err
