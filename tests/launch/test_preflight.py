"""`eaft-megatron check` on two gloo processes: a table that passes, and every way to fail it that needs no GPU."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import pytest
import yaml

from eaft_megatron.launch import preflight
from eaft_megatron.launch.recipe import Recipe, read_recipe
from eaft_megatron.testing import run_distributed

CHECKS = ["layout", "versions", "devices", "all-reduce", "shared disk", "disk space", "recipe", "checkpoint", "data"]
CHECKS += ["loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, chats, and a recipe of two processes at tensor parallel 2."""
    pytest.importorskip("transformers")
    from tests.training.tiny_run import write_inputs

    path = tmp_path_factory.mktemp("preflight")
    write_inputs(path)
    values = {
        "name": "tiny",
        "entrypoint": "train",
        "run_dir": str(path / "runs"),
        "model": {"hf": str(path / "model"), "transformer_impl": "local"},
        "data": {"jsonl": str(path / "train.jsonl"), "seq_length": 128},
        "optimization": {"train_iters": 4, "global_batch_size": 4},
        "parallel": {"nodes": 1, "processes_per_node": 2, "tensor": 2},
        "slurm": {"gpus_per_node": 0},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(path / "model", path / "torn")
    (path / "torn" / "model.safetensors").unlink()
    return path


def _rows(recipe: Recipe, **replaced) -> dict[str, tuple[bool, str]]:
    """The table, with functions of the module replaced on this rank."""
    before = {name: getattr(preflight, name) for name in replaced}
    for name, value in replaced.items():
        setattr(preflight, name, value)
    try:
        return {row.name: (row.ok, row.detail) for row in preflight.preflight(recipe)}
    finally:
        for name, value in before.items():
            setattr(preflight, name, value)


def _on_local_columns(logits, target, *, group, **options):
    """The mistake that the self-test is for: the top K of this rank's own columns."""
    from eaft_megatron.loss.vocab_parallel import vocab_parallel_eaft_loss, vocab_parallel_topk_entropy

    loss, stats = vocab_parallel_eaft_loss(logits, target, group=group, return_stats=True, **options)
    own = vocab_parallel_topk_entropy(logits, topk=options["topk"])
    return loss * own / stats.entropy.clamp_min(1e-6)


def _check(folder: Path) -> list:
    """Runs on each rank: every table."""
    rank = int(os.environ["RANK"])

    def recipe(*overrides: str) -> Recipe:
        return read_recipe(folder / "recipe.yaml", list(overrides))

    os.environ["LOCAL_RANK"] = "0"  # from here on two nodes of one process
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    return [
        preflight.main(recipe(), argparse.Namespace(min_bandwidth=0.0)),
        _rows(recipe()),
        preflight.main(recipe("parallel.nodes=4"), argparse.Namespace(min_bandwidth=1e9)),
        _rows(recipe("parallel.nodes=4", "data.jsonl=nowhere.jsonl", f"model.hf={folder / 'torn'}")),
        _rows(recipe("slurm.gpus_per_node=null"), _own_hash=lambda: f"hash{rank}"),
        _rows(recipe(), run_folder=lambda recipe: folder / f"disk of n{rank}"),
        _rows(recipe(), vocab_parallel_eaft_loss=_on_local_columns),
    ]


@pytest.fixture(scope="module")
def tables(folder) -> list:
    """What both ranks returned: the same."""
    first, second = run_distributed(_check, 2, folder)
    assert first == second
    return first


def test_a_healthy_job_passes(tables):
    """Exit code 0; the self-test says how near the float64 reference it came; nothing is left behind."""
    code, rows, *_ = tables
    assert code == 0
    assert list(rows) == CHECKS and all(ok for ok, _ in rows.values()), rows
    assert "2 processes on 2 node(s)" in rows["layout"][1]
    assert "EAFT on tensor 2, bfloat16, cpu: loss within " in rows["loss"][1]
    assert "GB/s bus bandwidth, 16 MiB over 2 processes" in rows["all-reduce"][1]


def test_nothing_is_left_in_the_run_folder(tables, folder):
    assert not list(folder.rglob(".check-*"))


FAILURES = [  # (table, check, what is told)
    (3, "layout", "2 processes, but parallel.nodes 4 x processes_per_node 2 is 8"),
    (3, "checkpoint", "torn has no model.safetensors"),
    (3, "data", "nowhere.jsonl"),
    (4, "versions", "eaft_megatron is hash0 on n0 and hash1 on n1"),
    (4, "devices", "no CUDA device for 2 processes"),
    (5, "shared disk", "the folder is not shared"),
    (6, "loss", "from the float64 reference: do not train with this installation"),
]


@pytest.mark.parametrize("table, check, message", FAILURES)
def test_what_is_wrong_is_named(tables, table, check, message):
    """The failing row says what; every other check was still made."""
    rows = tables[table]
    assert list(rows) == CHECKS
    ok, detail = rows[check]
    assert not ok and message in detail


def test_failures_make_the_exit_code(tables):
    assert tables[2] == 1


def test_prepared_data_must_be_this_models(folder, tmp_path, capsys):
    """The data's tokenizer, vocabulary and length are compared with the model's and the recipe's."""
    pytest.importorskip("pyarrow")
    from transformers import AutoTokenizer

    from eaft_megatron.cli import main
    from eaft_megatron.launch.file_checks import check_data

    prepared = tmp_path / "prepared"
    argv = ["--input", str(folder / "train.jsonl"), "--tokenizer", str(folder / "model"), "--output", str(prepared)]
    assert main(["prepare", *argv, "--seq-length", "128", "--num-workers", "1"]) == 0

    def recipe(*overrides: str) -> Recipe:
        return read_recipe(folder / "recipe.yaml", ["data.jsonl=null", f"data.sft_data={prepared}", *overrides])

    assert "the tokenizer is the model's" in check_data(recipe())
    with pytest.raises(ValueError, match="packed to 128, not 64"):
        check_data(recipe("data.seq_length=64"))
    other = tmp_path / "other"
    shutil.copytree(folder / "model", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        check_data(recipe(f"model.hf={other}"))
