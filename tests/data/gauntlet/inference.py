"""What inference would see: the template's own prompts and full renderings, under every switch that it has."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.data.gauntlet.rows import Row, plain_messages

# Variables by which templates open, close or keep thinking, and their values.
SWITCHES: dict[str, tuple] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "preserve_thinking": (True,),
    "preserved_thinking": (True,),
    "clear_thinking": (False,),
    "drop_thinking": (False,),
    "keep_past_thinking": (True,),
    "truncate_history_thinking": (False,),
    "thinking_mode": ("enabled", "disabled", "chat", "thinking"),
    "thinking_option": ("on", "off"),
    "reasoning": (True, False),
    "skip_thinking": (True,),
    "reasoning_effort": ("no_think", "none", "low", "high"),
    "think_render_option": ("on", "off"),
}
_MOST = 24  # combinations tried


def switches_of(template: str) -> list[dict[str, Any]]:
    """Every combination of what the template reads, the default first."""
    tree = _compile_jinja_template(template).environment.parse(template)
    names = sorted(meta.find_undeclared_variables(tree) & set(SWITCHES))
    values = [[{}, *({name: value} for value in SWITCHES[name])] for name in names]
    combined = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*values)]
    return sorted(combined, key=len)[:_MOST]


def _parts(messages: list[dict]) -> list[dict]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _null_content(messages: list[dict]) -> list[dict]:
    return [{**m, "content": None} if m.get("tool_calls") and not m["content"] else m for m in messages]


def _json_arguments(messages: list[dict]) -> list[dict]:
    def written(call: dict) -> dict:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": list(map(written, m["tool_calls"]))} if m.get("tool_calls") else m for m in messages]


def _developer_as_system(messages: list[dict]) -> list[dict]:
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def _thinking_names(messages: list[dict]) -> list[dict]:
    """Thinking also under the other names that templates read (gpt-oss: "thinking")."""
    names = ("thinking", "reasoning")
    return [{**m, **dict.fromkeys(names, m["reasoning_content"])} if "reasoning_content" in m else m for m in messages]


def _metadata(messages: list[dict]) -> list[dict]:
    """GLM-4's form: one message a call, and results as observations; lengths differ, so indices are kept."""
    converted = []
    for index, message in enumerate(messages):
        message = {**message, "origin": index}
        calls = message.pop("tool_calls", [])
        if message["role"] == "tool":
            message["role"] = "observation"
        if message["content"] or not calls:
            converted.append(message)
        for call in calls:
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            converted.append({**message, "metadata": call["function"]["name"], "content": text})
    return converted


FORMS = (lambda m: m, _null_content, _parts, _json_arguments, lambda m: _null_content(_json_arguments(m)),
         _developer_as_system, _thinking_names)  # fmt: skip


class Inference:
    """Renderings of the beginnings of one row; None where the template fails."""

    def __init__(self, tokenizer: Any, row: Row) -> None:
        self._tokenizer = tokenizer
        self._tools = row.get("tools")
        self._given = row.get("chat_template_kwargs")
        self._messages = plain_messages(row)
        self._cache: dict = {}

    @cached_property
    def variants(self) -> list[tuple[list[dict], dict[str, Any]]]:
        """(messages in a form, switches): what of it gives a text at all, the plain one first."""
        template = self._tokenizer.chat_template
        # The day that the encoder pins: inference on that day.
        _compile_jinja_template(template).globals["strftime_now"] = date(2025, 1, 1).strftime
        forms = (_metadata,) if "metadata" in template and "tool_calls" not in template else FORMS
        distinct: list = []
        for form in forms:
            messages = form(self._messages)
            if messages not in distinct:
                distinct.append(messages)
        switches = [self._given] if self._given else switches_of(template)
        return [(messages, options) for messages in distinct for options in switches]

    def text(self, variant: int, count: int, prompt: bool) -> str | None:
        """The first `count` messages of the row, with the generation prompt or without."""
        key = (variant, count, prompt)
        if key not in self._cache:
            messages, options = self.variants[variant]
            chosen = [m for i, m in enumerate(messages) if m.get("origin", i) < count]
            try:
                self._cache[key] = self._tokenizer.apply_chat_template(
                    chosen,
                    tools=self._tools,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
            except Exception:  # a template is a program: what it cannot render no server can either
                self._cache[key] = None
        return self._cache[key]

    def turns(self, index: int) -> Iterator[tuple[str, str | None]]:
        """(prompt of turn `index`, what the template then writes or None) under each switch."""
        seen = set()
        for variant in range(len(self.variants)):
            prompt = self.text(variant, index, True)
            if prompt is None:
                continue
            text = self.text(variant, index + 1, False)
            answer = text[len(prompt) :] if text is not None and text.startswith(prompt) else None
            if (prompt, answer) not in seen:
                seen.add((prompt, answer))
                yield prompt, answer
