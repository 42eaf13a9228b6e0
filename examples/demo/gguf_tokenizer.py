"""The tokenizer of a GGUF file as Hugging Face files: byte-level BPE rebuilt from vocabulary and merges.

Built here rather than by transformers, whose GGUF reader ignores tokenizer.ggml.pre (how text is cut before the
merges; SmolLM2 takes digits one by one) and names a tokenizer class that only its own version can load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def write_tokenizer(metadata: Any, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (chat template included) and generation_config.json to folder.

    metadata: anything with `get(key, default)` and `need(key)` over GGUF keys.

    Raises:
        ValueError: a tokenizer model or pre-tokenizer other than those listed here; the message says what to do.
    """
    tokens = metadata.need("tokenizer.ggml.tokens")
    tokenizer = _byte_level_bpe(metadata, tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    special = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    config = {
        # The generic class: a model's own (GPT2Tokenizer) may replace the splitting rules in tokenizer.json by its.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
        **special,
    }
    _write(folder / "tokenizer_config.json", {name: value for name, value in config.items() if value is not None})
    if special:
        _write(folder / "special_tokens_map.json", special)
    generation = {f"{name}_token_id": index for name, index in ids.items() if name != "unk" and index is not None}
    _write(folder / "generation_config.json", {"_from_model_config": True, **generation})


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _byte_level_bpe(metadata: Any, tokens: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    model = metadata.need("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    splitters = _splitters()
    if model != "gpt2" or pre not in splitters:
        raise ValueError(
            f"tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} cannot be rebuilt (known: gpt2 with "
            f"{', '.join(splitters)}): give tokenizer_dir (--tokenizer-dir), a folder with the model's own tokenizer"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = splitters[pre]
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        _add_bos(tokenizer, tokens[metadata.need("tokenizer.ggml.bos_token_id")])
    assert tokenizer.get_vocab_size() == len(tokens), "a token appears twice in tokenizer.ggml.tokens"
    return tokenizer


def _splitters() -> dict[str, Any]:
    """tokenizer.ggml.pre -> how text is cut before the merges; llama.cpp keeps the same in its llama-vocab.cpp."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {"gpt-2": words, "smollm": pre_tokenizers.Sequence([digits, words])}


def _add_bos(tokenizer: Any, bos: str) -> None:
    from tokenizers import processors

    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special
    )


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
