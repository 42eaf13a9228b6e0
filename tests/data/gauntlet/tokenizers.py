"""One real byte-level BPE vocabulary, without its family's special tokens, dressed as any template's tokenizer."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from tests.data.gauntlet import sources
from tests.data.gauntlet.families import added_tokens, family_of


@cache
def _plain(folder: Path) -> Any:
    """Qwen2's vocabulary and its rules for splitting text, nothing added; kept as a file after the first time."""
    import json

    from tokenizers import Tokenizer

    cached = folder / "plain-tokenizer.json"
    if not cached.exists():
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, gguf_file=sources.vocabulary(folder).name)
        state = json.loads(loaded.backend_tokenizer.to_str())
        names = {token["content"] for token in state["added_tokens"]}
        state["added_tokens"] = []
        state["model"]["vocab"] = {k: v for k, v in state["model"]["vocab"].items() if k not in names}
        cached.write_text(json.dumps(state))
    return Tokenizer.from_file(str(cached))


def build(folder: Path, template: str) -> Any:
    """A tokenizer with `template` and the added tokens of its family."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(_plain(folder))
    special, added = added_tokens(template)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    family = family_of(template)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos or special[0],
        eos_token=family.eos_token if family.eos_token.strip() else special[0],
        chat_template=template,
    )


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def token_bytes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """What each token adds to the text."""
    table = _bytes_of_characters()
    added = tokenizer.added_tokens_decoder
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        str(added[i]).encode() if i in added else bytes(table[character] for character in piece)
        for i, piece in zip(ids, pieces, strict=True)
    ]
