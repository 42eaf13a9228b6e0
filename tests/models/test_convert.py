"""``eaft-megatron convert``: what it writes is loaded by megatron-core at any layout, and comes back bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from eaft_megatron.cli import main
from eaft_megatron.models import build_model, convert, hf_writer, read_hf_config, transformer_config
from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron
from eaft_megatron.testing.distributed import run_distributed
from tests.models import conversion_memory, ranks
from tests.models.tiny import (
    FAMILIES,
    VARIANTS,
    VOCAB,
    assert_same_tensors,
    hf_tensors,
    save,
    tiny_family,
    tiny_llama,
    token_ids,
)

LOGIT_TOLERANCE = 1e-4  # absolute; float32 logits of size about 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (transformers model, its folder); "bfloat16" beside those in float32."""
    root = tmp_path_factory.mktemp("hf")
    made = {name: tiny_llama(name) for name in VARIANTS} | {name: tiny_family(name) for name in FAMILIES}
    made["bfloat16"] = tiny_llama("untied").to(torch.bfloat16)
    return {name: (model, save(model, root / name)) for name, model in made.items()}


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory) -> dict[str, Path]:
    """name -> folder for Megatron-LM."""
    root = tmp_path_factory.mktemp("megatron")
    for name, (_, folder) in models.items():
        convert_to_megatron(folder, root / name)
    return {name: root / name for name in models}


def load_and_run(folders: dict[str, Path], tp: int, pp: int, ids: torch.Tensor, saved: Path) -> dict:
    """One rank: megatron-core loads each checkpoint into a GPTModel; logits by name. Saves the first again."""
    from megatron.core import dist_checkpointing

    answers = {}
    with ranks.layout(tp, pp), torch.no_grad():
        for name, folder in folders.items():
            (chunk,) = unloaded(folder / "hf", tp, pp)
            state = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder / "release"))
            chunk.load_state_dict(state["model"])
            answers[name] = ranks.run([chunk], ids, VOCAB, pp, backward=False)
            if name == next(iter(folders)):
                if torch.distributed.get_rank() == 0:
                    (saved / "iter_0000007").mkdir()
                    (saved / "latest_checkpointed_iteration.txt").write_text("7")
                torch.distributed.barrier()
                dist_checkpointing.save({"model": chunk.sharded_state_dict()}, str(saved / "iter_0000007"))
    return answers


def unloaded(hf_dir: Path, tp: int, pp: int) -> list:
    from megatron.core import parallel_state

    hf_config, stage = read_hf_config(hf_dir), parallel_state.get_pipeline_model_parallel_rank()
    config = transformer_config(hf_config, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return [build_model(hf_config, config, pre_process=stage == 0, post_process=stage == pp - 1)]


SLOW = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (4, 1), (2, 2))]
LOADED = ["tied", "untied", "rope_llama3", "qwen2_untied", "qwen3_tied", "glm4_bias"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), *SLOW])
def test_megatron_core_loads_it_at_any_layout(models, converted, tmp_path, tp, pp):
    """One conversion, every layout: transformers' logits, zero padding rows at every padded size (384 rows stored,
    384 or 512 wanted), and what megatron-core saves of it becomes the same Hugging Face tensors again."""
    folders = {name: converted[name] for name in (LOADED if tp < 4 else ["untied"])}
    answers = run_distributed(load_and_run, tp * pp, folders, tp, pp, token_ids(), tmp_path)
    for name in folders:
        with torch.no_grad():
            expected = models[name][0](token_ids()).logits
        logits = [answer[name] for answer in answers if answer[name] is not None]
        assert len(logits) == tp
        for actual in logits:
            torch.testing.assert_close(actual, expected, atol=LOGIT_TOLERANCE, rtol=0)
    first = next(iter(folders))
    convert_to_hf(tmp_path, tmp_path / "back", hf_config_dir=models[first][1], check=True)
    assert_same_tensors(tmp_path / "back", models[first][1])


def load_with_extra_state(folder: Path) -> list:
    """What the norms of query and key, and the final norm are given when they ask for an _extra_state."""
    from megatron.core import dist_checkpointing

    given = []
    with ranks.layout():
        (chunk,) = unloaded(folder / "hf", 1, 1)
        modules = [chunk.decoder.final_layernorm]
        for layer in chunk.decoder.layers:
            modules += [layer.self_attention.q_layernorm, layer.self_attention.k_layernorm]
        methods = {"get_extra_state": lambda self: None, "set_extra_state": lambda self, state: given.append(state)}
        for module in modules:
            module.__class__ = type("WithExtraState", (module.__class__,), methods)
        state = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder / "release"))
        chunk.load_state_dict(state["model"])
    return given


def test_modules_with_extra_state_find_one(converted):
    """As Transformer Engine's modules ask: two norms in each of four layers, the final one; attention asks too."""
    assert run_distributed(load_with_extra_state, 1, converted["qwen3_tied"]) == [[None] * 9]
    stored = FileSystemReader(converted["qwen3_tied"] / "release").read_metadata().state_dict_metadata
    assert all(f"decoder.layers.self_attention.core_attention._extra_state/shard_{i}_4" in stored for i in range(4))


@pytest.mark.parametrize("name", [*VARIANTS, *FAMILIES, "bfloat16"])
def test_there_and_back(models, converted, tmp_path, name):
    """Every tensor, bit by bit, under the same name; the other files go along; transformers loads the folder."""
    from transformers import AutoModelForCausalLM

    _, source = models[name]
    assert main(["convert", "to-hf", str(converted[name]), str(tmp_path / "back"), "--check"]) == 0
    assert_same_tensors(tmp_path / "back", source)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((source / file).read_text())
    logits = []
    for folder in (source, tmp_path / "back"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            logits.append(model.eval()(token_ids()).logits)
    assert torch.equal(*logits)


def test_command_line_and_record(models, tmp_path, capsys):
    """to-megatron prints the flags that eaft_model.json keeps; nothing but what is documented is written."""
    output = tmp_path / "megatron"
    command = ["convert", "to-megatron", str(models["bfloat16"][1]), str(output), "--check"]
    assert main([*command, "--transformer-impl", "local"]) == 0
    printed, record = capsys.readouterr().out, json.loads((output / "eaft_model.json").read_text())
    flags = record.pop("pretrain_gpt_flags")
    assert f"--load {output} --finetune {' '.join(flags)}\n" in printed and "--true-vocab-size 257" in printed
    assert flags[:2] == ["--transformer-impl", "local"]
    expected = {"format_version": 1, "architecture": "LlamaForCausalLM", "true_vocab_size": VOCAB, "tied": False}
    assert record == {**expected, "dtype": "bfloat16"}
    names = {"latest_checkpointed_iteration.txt", "release", "hf", "eaft_model.json"}
    assert {path.name for path in output.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_model_without_flags_is_converted_all_the_same(converted, tmp_path, models, capsys):
    """pretrain_gpt.py cannot interpolate positions: the reason is printed and kept, and there are no flags."""
    assert main(["convert", "to-megatron", str(models["rope_linear"][1]), str(tmp_path / "megatron")]) == 0
    assert "pretrain_gpt.py cannot build this model: config.json: rotary scaling" in capsys.readouterr().out
    assert json.loads((converted["rope_linear"] / "eaft_model.json").read_text())["pretrain_gpt_flags"] is None


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """One bit of it changed."""
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[-1] ^= 1
    return changed


def test_check_to_megatron_finds_one_bit(models, tmp_path, monkeypatch, capsys):
    """Of a weight of the third layer, changed on its way to the disk; and no output appears."""
    write = convert.write_checkpoint

    def writing(folder, pieces, tensor, *rest):
        target = next(piece for piece in pieces if piece.key.endswith("linear_fc2.weight") and piece.layer == 2)
        write(folder, pieces, lambda piece: flipped(tensor(piece)) if piece == target else tensor(piece), *rest)

    monkeypatch.setattr(convert, "write_checkpoint", writing)
    arguments = ["convert", "to-megatron", str(models["bfloat16"][1]), str(tmp_path / "megatron")]
    assert main([*arguments, "--check"]) == 1
    assert "check failed: model.layers.2.mlp.down_proj.weight differs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_to_hf_finds_one_bit(converted, tmp_path, monkeypatch):
    """The same on the way back."""
    add = hf_writer.SafetensorsWriter.add

    def adding(self, name, tensor):
        add(self, name, flipped(tensor) if name == "model.layers.1.self_attn.k_proj.weight" else tensor)

    monkeypatch.setattr(hf_writer.SafetensorsWriter, "add", adding)
    with pytest.raises(ValueError, match=r"check failed: model.layers.1.self_attn.k_proj.weight differs"):
        convert_to_hf(converted["tied"], tmp_path / "back", check=True)
    assert list(tmp_path.iterdir()) == []


def without_one(tensors, config):
    del tensors["model.layers.2.mlp.up_proj.weight"]


def with_one_more(tensors, config):
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(1)


def wrong_shape(tensors, config):
    tensors["model.norm.weight"] = torch.zeros(63)


def mixed_types(tensors, config):
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].bfloat16()


def unknown(tensors, config):
    config["architectures"] = ["MambaForCausalLM"]


BAD_SOURCES = {
    without_one: "tensor model.layers.2.mlp.up_proj.weight is missing",
    with_one_more: "tensor model.layers.4.mlp.up_proj.weight in .* has no place in the model",
    wrong_shape: r"tensor model.norm.weight in .* has shape \[63\], the model needs \[64\]",
    mixed_types: "model.layers.1.mlp.down_proj.weight is torch.bfloat16 but model.layers.0.* is torch.float32",
    unknown: "MambaForCausalLM; known here: .*LlamaForCausalLM",
}


@pytest.mark.parametrize("change", BAD_SOURCES, ids=lambda change: change.__name__)
def test_a_source_that_is_not_whole_is_refused(models, tmp_path, change):
    """By name, and before anything is written."""
    source = shutil.copytree(models["untied"][1], tmp_path / "hf")
    tensors, config = hf_tensors(source), json.loads((source / "config.json").read_text())
    change(tensors, config)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=BAD_SOURCES[change]):
        convert_to_megatron(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


BAD_CONFIGS = {
    "fewer layers": ({"num_hidden_layers": 3}, "has shape .*the model of config.json needs"),
    "larger vocabulary": ({"vocab_size": 385}, "the embedding has 384 rows, fewer than config.json's vocab_size 385"),
    "tied": ({"tie_word_embeddings": True}, "output_layer.weight in .* has no place in a LlamaForCausalLM"),
    "biases": ({"architectures": ["Qwen2ForCausalLM"]}, "linear_qkv.bias .* is missing"),
    "wider": ({"intermediate_size": 128}, r"linear_fc1.weight in .* has shape \[4, 192, 64\]"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_configuration_of_another_model_is_refused(models, converted, tmp_path, name):
    """By the first parameter that does not fit, and before anything is written."""
    changes, message = BAD_CONFIGS[name]
    config = shutil.copytree(models["untied"][1], tmp_path / "config") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        convert_to_hf(converted["untied"], tmp_path / "back", hf_config_dir=tmp_path / "config")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_folders_that_cannot_be_used(models, converted, tmp_path, capsys):
    """An output that holds something, no checkpoint, no configuration, a damaged checkpoint: one line, exit code 1."""
    hf, megatron, full, empty = map(str, (models["tied"][1], converted["tied"], tmp_path / "full", tmp_path / "empty"))
    for folder in (full, empty, tmp_path / "bare"):
        Path(folder).mkdir()
    (tmp_path / "full" / "file").touch()
    shutil.copytree(converted["tied"] / "release", tmp_path / "bare" / "iter_0000003")
    (tmp_path / "bare" / "latest_checkpointed_iteration.txt").write_text("3")
    cut = shutil.copytree(converted["tied"], tmp_path / "cut")
    os.truncate(cut / "release" / "__0_0.distcp", 100_000)
    for arguments, message in {
        ("to-megatron", hf, full): "exists and is not empty",
        ("to-hf", megatron, full): "exists and is not empty",
        ("to-hf", empty, str(tmp_path / "new")): "it holds no checkpoint",
        ("to-hf", str(tmp_path / "none"), str(tmp_path / "new")): "is not a folder",
        ("to-hf", str(tmp_path / "bare"), str(tmp_path / "new")): "--hf-config DIR",
        ("to-hf", str(cut), str(tmp_path / "new")): "is a file damaged or missing?",
        ("to-megatron", megatron, str(tmp_path / "new")): "has no config.json",
    }.items():
        assert main(["convert", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "cut", "empty", "full"]


KILLED = """
import os, sys
from eaft_megatron.models import convert, hf_writer
from eaft_megatron.models.stored_weights import Weight
names, calls = Weight.names, []

def counted(self):
    calls.append(self)
    if len(calls) > int(sys.argv[4]):
        os._exit(9)
    return names.fget(self)

Weight.names = property(counted)
getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3])
"""


# 27 parameters; to-megatron asks once more for the names of each before it writes
@pytest.mark.parametrize(("direction", "calls"), [("convert_to_megatron", 40), ("convert_to_hf", 20)])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(models, converted, tmp_path, direction, calls):
    """A hidden folder at most, and the next attempt succeeds."""
    source = converted["untied"] if direction == "convert_to_hf" else models["untied"][1]
    output = tmp_path / "output"
    killed = subprocess.run([sys.executable, "-c", KILLED, direction, str(source), str(output), str(calls)])
    assert killed.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".output.incomplete-")
    assert not list(left.rglob("config.json")) and not (left / "latest_checkpointed_iteration.txt").exists()
    getattr(convert, direction)(source, output)
    assert output.is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """The peak, checking included, stays far below the model's size, and is the same for three times the layers."""
    peaks = {}
    for layers in (12, 36):
        (tmp_path / f"{layers}").mkdir()
        for step in ("model", "to-megatron", "to-hf"):
            command = [sys.executable, conversion_memory.__file__, str(tmp_path / f"{layers}"), step, "60", str(layers)]
            peaks[step, layers] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print({key: f"{value / 1e6:.0f} MB" for key, value in peaks.items()})
    for step in ("to-megatron", "to-hf"):
        assert peaks[step, 36] < 0.35 * peaks["model", 36]
        assert peaks[step, 36] - peaks[step, 12] < 0.15 * (peaks["model", 36] - peaks["model", 12])
