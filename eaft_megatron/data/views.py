"""What a chat template can be asked for: the forms of messages it may want, and the switches it reads.

A view is a form with a setting of the switches. Families differ in which view shows them a conversation as inference
shows it; nothing here says which, `turns` tries them. All that is known of families stands in the tables below.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

Message = dict[str, Any]

# Variables by which templates open, close or keep thinking -> what to try beside leaving them out.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "thinking_mode": ("chat", "thinking", "disabled", "enabled"),
    "thinking_option": ("off", "on"),
    "think_render_option": ("off", "on"),
    "reasoning": (False, True),
    "skip_thinking": (True,),
    "reasoning_effort": ("none", "no_think", "low", "high"),
    "preserve_thinking": (True,),
    "preserved_thinking": (True,),
    "keep_past_thinking": (True,),
    "clear_thinking": (False,),
    "drop_thinking": (False,),
    "truncate_history_thinking": (False,),
}
# Opening tags of thinking -> closing ones.
THINKING = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<think:opensource>": "</think:opensource>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
_MOST_SETTINGS = 24
_THINKING_NAMES = ("thinking", "reasoning")  # beside reasoning_content
DATE = date(2025, 1, 1)
"""What `strftime_now` gives, so that samples do not depend on the day they are made."""


class View(NamedTuple):
    """Messages in a form, where each came from (the number of the row's message), and variables for the template."""

    messages: tuple[Message, ...]
    origins: tuple[int, ...]
    variables: dict[str, Any]

    def until(self, count: int) -> list[Message]:
        """The messages that come from the first `count` of the row."""
        return [message for message, origin in zip(self.messages, self.origins, strict=True) if origin < count]


def views_of(template: str, messages: list[Message], given: dict[str, Any]) -> list[View]:
    """The views to try, the plainest first; variables that are `given` stay as they are and no other is tried."""
    if "strftime_now" in template:
        _compiled(template).globals["strftime_now"] = DATE.strftime
    settings = [given] if given else _settings(template)
    return [View(*form, setting) for form in _forms(template, messages) for setting in settings]


def _compiled(template: str) -> Any:
    """The template as transformers compiles it, once for as long as it is in use."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


@lru_cache(maxsize=16)
def _settings(template: str) -> list[dict[str, Any]]:
    """Every combination of the switches that the template reads, the default first."""
    from jinja2 import meta

    names: list[str] = []
    if any(name in template for name in SWITCHES):
        tree = _compiled(template).environment.parse(template)
        names = sorted(meta.find_undeclared_variables(tree) & set(SWITCHES))
    values = [[{}, *({name: value} for value in SWITCHES[name])] for name in names]
    combined = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*values)]
    return sorted(combined, key=len)[:_MOST_SETTINGS]


Form = tuple[tuple[Message, ...], tuple[int, ...]]


def _forms(template: str, messages: list[Message]) -> list[Form]:
    if "tool_calls" not in template and "metadata" in template and "observation" in template:
        return [_with_metadata(messages)]
    changes: list[Callable[[Message], Message]] = [
        lambda m: m,
        _null_content,
        _json_arguments,
        lambda m: _null_content(_json_arguments(m)),
        _thinking_names,
        _parts,
        _developer_as_system,
    ]
    forms: list[Form] = []
    for change in changes:
        form = tuple(map(change, messages)), tuple(range(len(messages)))
        if form not in forms:
            forms.append(form)
    return forms


def _null_content(message: Message) -> Message:
    """Some templates write calls only where there is no content."""
    return {**message, "content": None} if message.get("tool_calls") and not message.get("content") else message


def _json_arguments(message: Message) -> Message:
    def written(call: Message) -> Message:
        function = call.get("function") or call
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": list(map(written, calls))} if calls else message


def _thinking_names(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    return {**message, **{name: message.get(name, message["reasoning_content"]) for name in _THINKING_NAMES}}


def _parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _developer_as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _with_metadata(messages: list[Message]) -> Form:
    """GLM-4's form of calls and results: a message per call, its name as metadata; results are observations."""
    converted, origins = [], []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        parts = [] if calls and not message.get("content") else [plain]
        if message["role"] == "tool":
            parts = [{**plain, "role": "observation"}]
        for call in calls:
            function = call.get("function") or call
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            parts.append({"role": "assistant", "metadata": function["name"], "content": text})
        converted += parts
        origins += [index] * len(parts)
    return tuple(converted), tuple(origins)
