"""What must reappear: every text that a row holds, and whether a rendering holds it."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from eaft_megatron.data.views import THINKING

_TAGS = re.compile("|".join(re.escape(tag) for pair in THINKING.items() for tag in pair))


class Text(NamedTuple):
    """A text of a row: where it stands, what it is in words, the text, and how often it is written there."""

    where: str
    what: str
    text: str
    times: int = 1

    def lost(self) -> str:
        """In a message to the user."""
        return f"{self.where}: the chat template leaves {self.what} out"


def turn_texts(index: int, message: dict[str, Any], *, thinking: bool = True) -> list[Text]:
    """The texts of one message; its thinking only if asked for."""
    where = f"turn {index} ({message['role']})"
    texts = []
    content = message.get("content")
    if isinstance(content, str):
        pieces = _TAGS.split(content)  # a template may write thinking inside the content anew, or drop it
        for piece in pieces if thinking else pieces[-1:]:
            what = "the results of tools (role 'tool')" if message["role"] == "tool" else f"the content {_short(piece)}"
            texts.append(Text(where, what, piece.strip()))
    if thinking and isinstance(message.get("reasoning_content"), str):
        reasoning = message["reasoning_content"]
        texts.append(Text(where, f"the thinking {_short(reasoning)}", reasoning.strip()))
    functions = [call.get("function") or call for call in message.get("tool_calls") or []]
    for name, times in Counter(str(function.get("name")) for function in functions).items():
        texts.append(Text(where, f"the call of {name!r}", name, times))
    for function in functions:
        what = f"the arguments of the call of {function.get('name')!r}"
        texts += [Text(where, what, leaf) for leaf in _leaves(function.get("arguments"))]
    return [text for text in texts if text.text]


def tool_texts(tools: list[Any] | None) -> list[Text]:
    """Names and descriptions of the tools that a row lists."""
    texts = []
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                texts.append(Text("tools", f"the {key} of {function.get('name')!r}", function[key].strip()))
    return texts


def is_in(text: Text, written: str) -> bool:
    """Whether `written` holds the text, as it is, as JSON writes it, or with other blanks."""
    wanted = text.text
    if written.count(wanted) >= text.times:
        return True
    for form in (json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1]):
        if written.count(form) >= text.times:
            return True
    return _squeezed(written).count(_squeezed(wanted)) >= text.times


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _leaves(value: Any) -> Iterator[str]:
    """The strings and numbers inside arguments."""
    if isinstance(value, str) and value[:1] in "{[":
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield str(value).strip()


def _short(text: str) -> str:
    text = repr(text.strip())
    return text if len(text) <= 40 else text[:37] + "..."
