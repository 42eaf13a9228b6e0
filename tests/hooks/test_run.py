"""``python -m eaft_megatron.run`` on a script in the shape of pretrain_gpt.py, see small_megatron/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.methods import METHODS
from eaft_megatron.ranks import free_port
from eaft_megatron.testing import run_distributed
from tests.forked import run_module
from tests.hooks.megatron_script import PLAIN

SCRIPT = Path(__file__).parent / "small_megatron" / "pretrain_small.py"
OURS = ["-m", "eaft_megatron.run", "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *OURS]
WITHOUT_US = ["-c", PLAIN]


def start(
    *flags: str,
    script: Path = SCRIPT,
    processes: int = 1,
    style: str = "old",
    command: list[str] | None = None,
) -> subprocess.CompletedProcess:
    """The finished process of a run: forked ranks, or `command` of a fresh interpreter in front of the script."""
    if command is None:
        argv = ["--device", "cpu", str(script), *flags]
        return run_module("eaft_megatron.run", argv, processes=processes, env={"STYLE": style})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STYLE": style}
    if command == WITHOUT_US:  # eaft_megatron.run sets these where torchrun did not
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    argv = [sys.executable, *command, str(script), *flags]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)


def lines(done: subprocess.CompletedProcess) -> list[dict[str, float]]:
    """The numbers of each printed iteration and evaluation."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    printed = [line for line in done.stdout.splitlines() if re.match(r" (iteration|validation)", line)]
    return [{name: float(value) for name, value in re.findall(r"\| ([a-zA-Z ]+): (\S+)", line)} for line in printed]


def _expected() -> dict[str, float]:
    """Means over the first global batch, from the tiny model's own logits and the reference."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, global_batch, model_parallel, tiny_config

        with model_parallel(), torch.no_grad():
            batch = global_batch(0)
            logits = build_tiny_gpt(tiny_config())[0](batch["tokens"], batch["position_ids"], None).double()
            target = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
            columns = reference_eaft_loss(logits, target)
    names = ("eaft loss", "lm loss", "eaft entropy", "eaft weight")
    count = batch["loss_mask"].sum()
    return {name: float(column.sum() / count) for name, column in zip(names, columns, strict=True)}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """What the first iteration must print."""
    return run_distributed(_expected, 1)[0]


@pytest.mark.parametrize("style, report, processes", [("old", "tensor", 2), ("new", "tuple", 2), ("new", "tensor", 1)])
def test_an_untouched_script_trains_with_the_loss(expected, style, report, processes):
    """Flags parsed within pretrain or before it, reports of every kind, tensor parallel 1 and 2."""
    layout = ("--tensor-model-parallel-size", str(processes))
    command = TORCHRUN if style == "old" else None  # one real torchrun
    done = start("--loss-type", "eaft", "--report", report, *layout, processes=processes, style=style, command=command)
    first, second, evaluated, metrics = lines(done)
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-5), name
    assert second["eaft loss"] < first["eaft loss"]
    # Megatron's own line has the plain cross entropy alone: it prints a perplexity of whatever stands there.
    assert set(evaluated) == {"lm loss value", "lm loss PPL"}
    assert set(metrics) == {"eaft loss", "eaft weight", "eaft entropy", "eaft conflict rate"}
    assert evaluated["lm loss value"] > metrics["eaft loss"] > 0


def test_several_validation_sets_and_a_scalar_report():
    """Each set's metrics stand under its number; a scalar report is a mean of the micro-batches' means."""
    done = start("--loss-type", "eaft", "--report", "scalar", "--multiple-validation-sets")
    first, *_ = lines(done)
    assert 0 < first["eaft weight"] < 1 and first["eaft loss"] < first["lm loss"]
    assert " validation-0 at the end | eaft loss" in done.stdout
    assert " validation-1 at the end | eaft loss" in done.stdout


def test_sft_is_the_scripts_own_loss():
    """--loss-type sft prints what the script prints without us."""
    assert lines(start("--loss-type", "sft")) == lines(start(command=WITHOUT_US))


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_what_is_not_finite_ends_the_run_where_megatron_does_not_look(value):
    """fp16 with a dynamic loss scale turns Megatron's check off; ours takes its place."""
    done = start("--loss-type", "eaft", "--fp16", "--poison", value)
    assert done.returncode != 0 and "NaN or inf in the forward pass" in done.stderr


def test_a_loss_computed_elsewhere_ends_the_run():
    """The script never asks the model for its loss."""
    done = start("--loss-type", "eaft", "--without-model-loss")
    assert done.returncode != 0 and "the loss hook was not called in this forward pass" in done.stderr


def _prepared(folder: Path, rows: int, seed: int) -> Path:
    """A prepared folder of random rows for the tiny model, packed into 24 positions, with a column of scores."""
    pytest.importorskip("datasets")
    import numpy as np
    import pyarrow as pa

    from eaft_megatron.data.arrow import ShardWriter
    from eaft_megatron.data.prepared import ROW_SCHEMA, PreparedData, write_column, write_manifest, write_packing

    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 20, rows)
    ids = [generator.integers(0, 96, n).tolist() for n in lengths]
    masks = [[i % 3 != 0 for i in range(n)] for n in lengths]
    columns = [ids, masks, list(range(rows)), ["here"] * rows]
    arrays = [pa.array(values, type=field.type) for values, field in zip(columns, ROW_SCHEMA, strict=True)]
    with ShardWriter(folder / "rows", ROW_SCHEMA) as writer:
        writer.write(pa.record_batch(arrays, schema=ROW_SCHEMA))
    counts = dict.fromkeys(("truncated", "dropped_overlong", "dropped_nothing_to_train_on"), 0)
    manifest = {"format_version": 1, "rows": rows, "max_token_id": 95, "longest_row": int(lengths.max())}
    manifest |= {"counts": counts, "files": writer.files, "packing": write_packing(folder, lengths, 24, 1)}
    manifest |= {"tokenizer": {"sha256": "", "chat_template_sha256": ""}, "inputs": [], "options": {}, "part": "train"}
    write_manifest(folder, manifest)
    data = PreparedData(folder)
    write_column(data, "ref_logprob", (-generator.exponential(size=n) for n in data.lengths), {})
    return folder


def test_prepared_data_takes_the_place_of_the_scripts(tmp_path):
    """--sft-data at TP 2, with scores carried beside get_batch, is --sft-data on one process; sets go by their names.

    A set that does not fill its last batch gives the same loss packed and one row a sample.
    """
    train, held = _prepared(tmp_path / "train", 40, seed=1), _prepared(tmp_path / "held", 11, seed=2)
    flags = ["--loss-type", "sft-kl", "--calculate-per-token-loss", "--sft-data", str(train), "--eval-iters", "50"]
    flags += ["--sft-eval-data", f"held={held}", "--sft-eval-data", f"same={train}"]
    one, two = start(*flags), start(*flags, "--tensor-model-parallel-size", "2", processes=2)
    assert lines(two) and "packed, kept apart by an attention mask" in two.stdout
    for expected, actual in zip(lines(one), lines(two), strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)
    names = re.findall(r"validation loss at the end \((\w+)\)", one.stdout)
    assert names == ["held", "same"]
    rows = start(*flags, "--sft-packing", "none", "--train-iters", "0")
    packed = start(*flags, "--train-iters", "0")
    for expected, actual in zip(lines(rows), lines(packed), strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)


def test_a_wrong_flag_is_one_line(tmp_path):
    """No traceback where the message says it all, and the rank in front."""
    done = start("--loss-type", "eaft", "--use-legacy-models")
    assert done.returncode == 1
    assert "[rank 0] ValueError: --loss-type eaft: --use-legacy-models computes its loss outside" in done.stderr
    assert "refusals.py" not in done.stderr


def test_help_has_a_group_of_its_own():
    """The flags are found where a user looks for them."""
    done = start("--help", command=OURS)
    assert done.returncode == 0
    group = done.stdout[done.stdout.index("\neaft:") :]
    assert f"--loss-type {{{','.join(METHODS)}}}" in group and "--eaft-topk K" in group


def test_a_flag_that_the_script_adds_itself(tmp_path):
    """The script's own --loss-type is named with the way out, wherever the script adds it."""
    script = tmp_path / "fork.py"
    script.write_text(
        "from megatron.training.arguments import parse_args\n"
        "parse_args(lambda parser: parser.add_argument('--loss-type') and parser)\n"
    )
    (tmp_path / "megatron").symlink_to(SCRIPT.parent / "megatron")
    done = start(script=script)
    assert done.returncode == 1
    assert "this script defines --loss-type itself" in done.stderr and "hooks.install" in done.stderr


def test_a_missing_script_or_megatron_is_said(tmp_path):
    """Before anything heavy is imported."""
    done = start(script=tmp_path / "nowhere.py", command=OURS)
    assert done.returncode == 1 and "no such script" in done.stderr
    (tmp_path / "alone.py").write_text("")
    (tmp_path / "megatron").mkdir()  # a package without `training`, whatever is installed
    (tmp_path / "megatron" / "__init__.py").write_text("")
    done = start(script=tmp_path / "alone.py", command=OURS)
    assert done.returncode == 1 and "must lie in a Megatron-LM checkout" in done.stderr
