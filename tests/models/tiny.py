"""Tiny random models of every architecture, written by transformers itself, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from eaft_megatron.loss.reference import reference_eaft_loss

VOCAB = 257  # odd: 256 or 128 rows per rank leave one token to a rank of padding
LENGTH = 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 16,
    "rms_norm_eps": 1e-3,  # large enough to see
    "rope_theta": 5e3,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
VARIANTS = {
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one_group": {"num_key_value_heads": 1, "tie_word_embeddings": False},  # fewer KV groups than ranks
    "rope_linear": {
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3},
    },
    "rope_llama3": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 5e5,
        },
    },
}


_QWEN2 = {"head_dim": None, "use_sliding_window": False, "sliding_window": 8}  # 64 / 8 wide heads
_GLM4 = {"partial_rotary_factor": 0.5, "pad_token_id": None}  # a padding token's embedding would get no gradient
FAMILIES = {
    "qwen2_tied": ("Qwen2", {**_QWEN2, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", {**_QWEN2, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2_one_group": ("Qwen2", {**_QWEN2, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3_tied": ("Qwen3", {"head_dim": 24, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "glm4_bias": ("Glm4", {**_GLM4, "num_key_value_heads": 2, "attention_bias": True}),
    "glm4": ("Glm4", {**_GLM4, "num_key_value_heads": 4, "attention_bias": False, "head_dim": 24}),
}


def tiny_llama(variant: str, **overrides):
    """A random LlamaForCausalLM in float32 whose norms are not all ones."""
    return _tiny("Llama", sorted(VARIANTS).index(variant), {**VARIANTS[variant], **overrides})


def tiny_family(variant: str, **overrides):
    """A random model of another family in float32, biases and norms random too."""
    family, fields = FAMILIES[variant]
    return _tiny(family, 100 + list(FAMILIES).index(variant), {**fields, **overrides})


def _tiny(family: str, seed: int, fields: dict):
    import transformers

    config = getattr(transformers, f"{family}Config")
    # None stands for a field that this family's config.json does not have.
    values = {name: value for name, value in {**SIZES, **fields}.items() if (name, value) != ("head_dim", None)}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.eval()


def save(model, folder: Path) -> Path:
    """Several shards and an index, so that both are read."""
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not to be carried along")
    return folder


def token_ids() -> torch.Tensor:
    """[2, LENGTH], the last id of the vocabulary among them."""
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    ids[0, 3] = VOCAB - 1
    return ids


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def transformers_answer(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """(logits [b, s, V], gradients of the reference EAFT loss by name, that loss) by transformers."""
    model.zero_grad()
    logits = model(ids).logits
    loss = reference_eaft_loss(logits[:, :-1], ids[:, 1:])[0].mean()
    loss.backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, loss.item()


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint for Hugging Face."""
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_tensors(actual: Path, expected: Path) -> None:
    """Names, types and every bit."""
    ours, theirs = hf_tensors(actual), hf_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
