"""Tiny random Llama folders, written by transformers itself, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

VOCAB = 257  # odd: 256 or 128 rows per rank leave one token to a rank of padding
LENGTH = 17
_COMMON = {
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


def tiny_llama(variant: str, **overrides):
    """A random LlamaForCausalLM in float32 whose norms are not all ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(sorted(VARIANTS).index(variant))
    model = LlamaForCausalLM(LlamaConfig(**{**_COMMON, **VARIANTS[variant], **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
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


def transformers_answer(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits [b, s, V], gradients by name) by transformers."""
    model.zero_grad()
    logits = model(ids).logits
    next_token_loss(logits, ids).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
