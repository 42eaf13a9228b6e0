"""Recipes are strict; commands follow from them, from the data's manifest, and from what `convert` recorded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from eaft_megatron.launch import file_checks
from eaft_megatron.launch.command import build_command
from eaft_megatron.launch.folder import resolved, write_run_folder
from eaft_megatron.launch.recipe import read_recipe, to_dict
from eaft_megatron.launch.time_limit import limit_seconds
from eaft_megatron.models.pretrain_flags import pretrain_flags

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe with a checkpoint, a checkout and prepared data that are not there yet."""
    values = {
        "name": "tiny",
        "run_dir": str(tmp_path / "runs"),
        "megatron_lm": str(tmp_path / "megatron"),
        "model": {"checkpoint": str(tmp_path / "checkpoint"), "config": CONFIG},
        "data": {"sft_data": str(tmp_path / "data"), "seq_length": 32, "eval": {"held out": str(tmp_path / "valid")}},
        "optimization": {"global_batch_size": 8, "epochs": 3},
        "parallel": {"nodes": 2, "processes_per_node": 4, "tensor": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _prepare(folder: Path, packs: int = 21, seq_length: int = 32) -> None:
    folder.mkdir(parents=True)
    manifest = {"rows": 99, "packing": {"packs": packs, "seq_length": seq_length}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _convert(folder: Path, **changes) -> None:
    config = {**CONFIG, **changes}
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    record = {"true_vocab_size": config["vocab_size"], "pretrain_gpt_flags": pretrain_flags(config)}
    (folder / "eaft_model.json").write_text(json.dumps(record))


def _value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


UNKNOWN = {
    "optimisation={}": "unknown key optimisation: did you mean optimization?",
    "optimization.learning_rate=1": "unknown key optimization.learning_rate: ",
    "optimization.warm_up_ratio=0": "did you mean optimization.warmup_ratio?",
    "parallel.nodse=2": "unknown key parallel.nodse: did you mean parallel.nodes?",
    "optimization.seq_length=3": "unknown key optimization.seq_length: did you mean data.seq_length?",
    "tensor=8": "unknown key tensor: did you mean parallel.tensor?",
}
WRONG = {
    "parallel.nodes=two": "parallel.nodes must be a whole number, got 'two'",
    "parallel.nodes=true": "parallel.nodes must be a whole number, got True",
    "memory.recompute=some": "memory.recompute must be one of none, selective, full, got 'some'",
    "optimization.lr=[1]": "optimization.lr must be a number, got [1]",
    "data=3": "data must be a section, got 3",
    "slurm.options=--mem=0": "slurm.options must be a list",
    "parallel.nodes.more=1": "nodes is no section",
    "flags": "--set takes section.key=value",
}


@pytest.mark.parametrize("override, message", [*UNKNOWN.items(), *WRONG.items()])
def test_a_slip_is_named_with_the_way_out(recipe, override, message):
    with pytest.raises(ValueError) as raised:
        read_recipe(recipe, [override])
    assert message in str(raised.value)


def test_numbers_as_yaml_and_people_write_them(recipe):
    """YAML reads 1e-5 as a text, and 1 is a number too."""
    assert read_recipe(recipe, ["optimization.lr=1e-5", "optimization.epochs=1"]).optimization.lr == 1e-5


def test_a_text_is_what_was_typed(recipe):
    """YAML 1.1 would make 86400 of 24:00:00, 3600 of 1:00:00, 83 of 0123 and 1.1 of 1.10."""
    text = recipe.read_text()
    recipe.write_text(
        text + "slurm: {time: 24:00:00, account: 0123, exclude: 1e3}\n"
        "environment: {VERSION: 1.10, MASK: 0x6A, SPAN: 1:30, MANY: 1_000}\n"
    )
    read = read_recipe(recipe)
    assert (read.slurm.time, read.slurm.account, read.slurm.exclude) == ("24:00:00", "0123", "1e3")
    assert read.environment == {"VERSION": "1.10", "MASK": "0x6A", "SPAN": "1:30", "MANY": "1_000"}
    assert read_recipe(recipe, ["slurm.time=1:00:00"]).slurm.time == "1:00:00"
    resolved_text = yaml.safe_dump(to_dict(read))
    recipe.write_text(resolved_text)
    assert read_recipe(recipe) == read


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("1-12", 129600), ("1-12:30", 131400), ("2-0:0:5", 172805)],
)
def test_time_limits_as_slurm_reads_them(text, seconds):
    """The forms that man sbatch lists under --time."""
    assert limit_seconds(text) == seconds
    assert limit_seconds("UNLIMITED") is None


WRONG_TIMES = {
    ("slurm.time=10",): "slurm.time 10 is 600 seconds, and slurm.save_seconds asks the ranks to save 600 seconds",
    ("slurm.time=1:00",): "slurm.time 1:00 is 60 seconds",
    ("slurm.time=one day",): "slurm.time must be minutes, MINUTES:SECONDS, HH:MM:SS",
    ("slurm.save_seconds=0",): "slurm.save_seconds must be >= 1",
    ("slurm.options=[--time=5]",): "slurm.options: --time=5 is set by the recipe itself",
    ("slurm.options=[-t 5]",): "slurm.options: -t 5 is set by the recipe itself",
    ("slurm.options=[--signal=B:USR2@60]",): "slurm.options: --signal",
}


@pytest.mark.parametrize("overrides, message", WRONG_TIMES.items())
def test_a_job_that_would_be_over_before_it_starts_is_refused(recipe, overrides, message):
    with pytest.raises(ValueError) as raised:
        build_command(read_recipe(recipe, list(overrides)))
    assert message in str(raised.value)


def test_the_resolved_recipe_reads_back(recipe, tmp_path):
    before = read_recipe(recipe)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(before)))
    assert read_recipe(tmp_path / "again.yaml") == before


def test_steps_follow_from_the_packs(recipe, tmp_path):
    """3 epochs x 21 packs / 8 = 7.875: eight steps; given outright, that counts."""
    assert build_command(read_recipe(recipe)).train_iters is None
    _prepare(tmp_path / "data")
    assert build_command(read_recipe(recipe)).train_iters == 8
    assert build_command(read_recipe(recipe, ["optimization.train_iters=5"])).train_iters == 5
    with pytest.raises(ValueError, match="packed to 32"):
        build_command(read_recipe(recipe, ["data.seq_length=64"]))


def test_the_checkpoints_flags_win_and_must_agree(recipe, tmp_path):
    """Without a config the flags are the checkpoint's, with the padding of this TP; a contradiction is refused."""
    _convert(tmp_path / "checkpoint", rope_theta=5000000)
    with pytest.raises(ValueError, match=r"--rotary-base 1000000, but .*eaft_model.json says 5000000"):
        build_command(read_recipe(recipe))
    argv = build_command(read_recipe(recipe, ["model.config=null"])).argv
    assert _value(argv, "--rotary-base") == "5000000"
    assert (_value(argv, "--padded-vocab-size"), _value(argv, "--true-vocab-size")) == ("512", "300")
    with pytest.raises(ValueError, match="model.config is missing"):
        build_command(read_recipe(recipe, ["model.config=null", "model.checkpoint=nowhere"]))


def test_data_and_evaluation_sets(recipe, tmp_path):
    argv = build_command(read_recipe(recipe)).argv
    assert _value(argv, "--sft-data") == str(tmp_path / "data")
    assert _value(argv, "--sft-eval-data") == f"held out={tmp_path / 'valid'}"


REFUSED = {
    "parallel.tensor=3": "2 nodes x 4 processes do not divide by tensor 3",
    "parallel.tensor=8": "parallel.tensor 8 spans nodes of 4 processes",
    "optimization.global_batch_size=6": "must be a multiple of micro_batch_size x data-parallel size = 4",
    "loss.type=eafd": "--loss-type must be one of",
    "loss.talr_tau=2": "--talr-tau is for --loss-type talr",
    "data.jsonl=chat.jsonl": "data.jsonl is for entrypoint train",
    "entrypoint=train": "model.hf is missing",
}


@pytest.mark.parametrize("override, message", REFUSED.items())
def test_contradictions_are_refused(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        build_command(read_recipe(recipe, [override]))


def test_the_run_folder_holds_everything_and_belongs_to_one_recipe(recipe, tmp_path, monkeypatch):
    """Nothing is launched while something is missing; the same recipe may go on, with more nodes too; another not."""
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    first = resolved(read_recipe(recipe))
    with pytest.raises(ValueError, match="not launched; what is missing"):
        write_run_folder(first, build_command(first))
    assert not (tmp_path / "runs").exists()
    _prepare(tmp_path / "data")
    _convert(tmp_path / "checkpoint")
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "pretrain_gpt.py").touch()
    folder = write_run_folder(first, build_command(first))
    names = {
        "recipe.yaml",
        "recipes",
        "sft.sbatch",
        "local.sh",
        "command.txt",
        "versions.txt",
        "environment.txt",
        "logs",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert read_recipe(folder / "recipe.yaml") == first
    assert "eaft_megatron commit " in (folder / "versions.txt").read_text()
    more_nodes = read_recipe(folder / "recipe.yaml", ["parallel.nodes=4"])
    write_run_folder(more_nodes, build_command(more_nodes))
    other = read_recipe(folder / "recipe.yaml", ["optimization.lr=1e-4"])
    with pytest.raises(ValueError, match="optimization.lr was 1e-05, now 0.0001"):
        write_run_folder(other, build_command(other))


def test_what_prepare_set_aside_is_evaluated(recipe, tmp_path, monkeypatch):
    """Split by --valid-fraction, and no data.eval: Megatron-LM is asked to evaluate; without a split it is not."""
    monkeypatch.setenv("MEGATRON_LM_PATH", str(tmp_path))
    _convert(tmp_path / "checkpoint")
    _prepare(tmp_path / "data" / "train")
    argv = build_command(resolved(read_recipe(recipe, ["log.eval_iters=7", "data.eval={}"]))).argv
    assert _value(argv, "--eval-iters") == "0"
    _prepare(tmp_path / "data" / "valid")
    argv = build_command(resolved(read_recipe(recipe, ["log.eval_iters=7", "data.eval={}"]))).argv
    assert _value(argv, "--eval-iters") == "7"


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 7), ("float32", 3.5)])
def test_a_disk_too_small_for_one_checkpoint_is_refused(recipe, tmp_path, monkeypatch, dtype, expected):
    """The size follows from the converted weights: 14 bytes a parameter, whatever type they have."""
    _convert(tmp_path / "checkpoint", dtype=dtype)
    (tmp_path / "checkpoint" / "release").mkdir()
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "checkpoint" / "release" / "__0_0.distcp").write_bytes(bytes(1000))
    read = resolved(read_recipe(recipe))
    needed = int(1000 * expected)
    for free, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(file_checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(ValueError, match="one checkpoint takes about") if refused else contextlib.nullcontext():
            file_checks.check_disk(read)
