"""Real models' chat templates with their special tokens, on the tests' byte-level tokenizer."""

from pathlib import Path
from typing import Any

from tests.data.conftest import build_tokenizer

TEMPLATES = Path(__file__).with_name("templates")
ADDED = {
    "qwen2.5-instruct": ("<tool_call>", "</tool_call>"),
    "qwen3": ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    "glm-4-0414": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "smollm2-instruct": (),
}


def template_tokenizer(name: str) -> Any:
    """The tokenizer of one of `ADDED`."""
    tokenizer = build_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_tokens(list(ADDED[name]), special_tokens=name.startswith("glm"))
    return tokenizer
