"""GGUF files into Hugging Face folders, against transformers' own GGUF reader."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eaft_megatron.models import read_hf_config
from tests.models.tiny import tiny_llama, token_ids

gguf = pytest.importorskip("gguf")
from tests.examples.gguf_reader import gguf_to_hf, main  # noqa: E402

_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def gguf_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if base in _TENSORS:
        return f"{_TENSORS[base]}.weight"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{_TENSORS[rest]}.weight"


def as_llama_cpp_stores(name: str, weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's converter: rows j and j + head_dim / 2 of every head of q and k become neighbours."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    order = [j + half * head_dim // 2 for j in range(head_dim // 2) for half in (0, 1)]
    return np.concatenate([head[order] for head in np.split(weight, len(weight) // head_dim)])


def tokens() -> list[str]:
    """Three control tokens, the 256 bytes as byte-level BPE spells them, then merges; 263 in all."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the", "12", "Ġthe"]


def write_gguf(path, model, quantisation: str = "F32", change=lambda writer: None, architecture: str = "llama"):
    """A GGUF file of a transformers model, with matrices quantised and norms in float32, as llama.cpp does."""
    config, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 3 + [1] * (len(tokens()) - 3))
    writer.add_token_merges(["t h", "th e", "1 2", "Ġ the"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = as_llama_cpp_stores(name, tensor.numpy(), config.head_dim)
        if weight.ndim == 2 and quantisation != "F32":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def models():
    return {name: tiny_llama(name, vocab_size=len(tokens()), head_dim=8) for name in ("tied", "untied")}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_float32_is_bitwise_the_original(models, tmp_path, name):
    """Names, tying, and the rotary permutation of q and k undone."""
    gguf_to_hf(write_gguf(tmp_path / "m.gguf", models[name]), tmp_path / "out")
    state = models[name].state_dict()
    if name == "tied":
        del state["lm_head.weight"]
    actual = load_file(tmp_path / "out/model.safetensors")
    assert actual.keys() == state.keys()
    assert all(torch.equal(actual[key], value) for key, value in state.items())
    config = read_hf_config(tmp_path / "out")
    assert config["tie_word_embeddings"] is (name == "tied")
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-3, 5e3)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


@pytest.mark.parametrize("quantisation", ["Q4_1", "Q8_0", "F16", "BF16", "Q4_0", "Q5_1"])
def test_dequantised_as_transformers_does(models, tmp_path, quantisation):
    """The same logits as transformers' own GGUF loader, through a loader that complains about nothing."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", models["tied"], quantisation)
    gguf_to_hf(tmp_path / "m.gguf", tmp_path / "out")
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        actual, expected = ours(token_ids()).logits, theirs(token_ids()).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (expected - models["tied"](token_ids()).logits).abs().max() > 1e-4  # it was quantised


def test_tokenizer(models, tmp_path):
    """Special tokens, chat template, digits one by one, text there and back."""
    from transformers import AutoTokenizer

    gguf_to_hf(write_gguf(tmp_path / "m.gguf", models["tied"]), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == len(tokens())
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the 12th é"}], tokenize=False)
    assert text == "<|im_start|>user\nthe 12th é<|im_end|>\n"
    pieces = tokenizer.tokenize(text)
    assert pieces[0] == "<|im_start|>" and pieces[-2] == "<|im_end|>"
    assert "the" in pieces and "12" not in pieces  # the merge exists, but digits are cut apart first
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_options_and_command_line(models, tmp_path, capsys):
    """Another dtype and another tokenizer; exit status 2 and one line for what the user can mend."""
    write_gguf(tmp_path / "m.gguf", models["tied"])
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    command = [str(tmp_path / "m.gguf"), str(tmp_path / "out")]
    assert main([*command, "--dtype", "bfloat16", "--tokenizer-dir", str(tmp_path / "tokenizer")]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert main(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type is 'yarn'"),
        (lambda w: w.add_expert_count(8), "llama.expert_count"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, "float32")), "tensor rope_freqs.weight has no place"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, "float32")), "tensor blk.0.attn_q.bias has no place"),
        (lambda w: w.add_tensor("blk.9.attn_norm.weight", np.ones(64, "float32")), "layers.9.* has no place"),
        (lambda w: w.tensors[0].pop("token_embd.weight"), "lacks the tensor behind model.embed_tokens.weight"),
        (lambda w: w.kv_data[0].pop("llama.block_count"), "has no llama.block_count"),
        (lambda w: w.kv_data[0].pop("tokenizer.ggml.pre"), "'default' cannot be rebuilt .*--tokenizer-dir"),
    ],
    ids=["yarn", "experts", "partial rotary", "rope factors", "bias", "extra layer", "no embedding", "no key", "pre"],
)
def test_what_is_not_a_plain_llama_is_refused(models, tmp_path, change, words):
    """Named, and nothing is left behind."""
    write_gguf(tmp_path / "m.gguf", models["tied"], change=change)
    with pytest.raises(ValueError, match=words):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_files_that_are_not_gguf(models, tmp_path):
    """Missing, something else, another architecture, cut short."""
    with pytest.raises(ValueError, match="is not a file"):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"no" * 100)
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match="general.architecture is 'qwen2'"):
        gguf_to_hf(write_gguf(tmp_path / "q.gguf", models["tied"], architecture="qwen2"), tmp_path / "out")
    whole = write_gguf(tmp_path / "whole.gguf", models["tied"]).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "out")
