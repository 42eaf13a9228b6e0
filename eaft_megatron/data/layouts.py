"""Rows as people store them -> one canonical form: a conversation (OpenAI's names) with its tools, or a text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

Message = dict[str, Any]

_MESSAGES = ("messages", "conversations", "conversation")
# Prompt column -> the response columns that make it a pair.
_PAIRS = {"prompt": ("completion", "response"), "instruction": ("output", "response")}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", *_ROLES, *_CALL_ROLES}


@dataclass(frozen=True)
class Columns:
    """The names of a dataset's columns, where they are not to be recognised (None)."""

    messages: str | None = None
    tools: str | None = None
    system: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None


def canonical_row(row: dict[str, Any], columns: Columns = Columns()) -> dict[str, Any]:
    """`row` as {"messages": [...], "tools": [...] or None} or {"text": str}; the row itself is left alone.

    A row's own `chat_template_kwargs` come along, if it has some.

    Recognised, the first that fits: conversations in `messages`, `conversations` or `conversation` (OpenAI's
    role/content or ShareGPT's from/value, also as a JSON string), Alpaca (`instruction`, `input`, `output`,
    `history`), `prompt` with `completion` or `response` (strings or lists of messages), `text`. `system` and `tools`
    columns belong to any conversation; a conversation's own system turn counts before the column.

    Tool calls get OpenAI's form: arguments as objects (templates write them as JSON), legacy `function_call` and
    ShareGPT's call turns as `tool_calls`, a call without content with content "". Function schemas without their
    {"type": "function"} wrapper get one. A list of text parts is joined to one string. Keys of a message or a call
    that are None, which Arrow adds to fill its structs, are removed; other keys stay for the template to read, and
    thinking under `reasoning` or `thinking` is found under `reasoning_content`, too.

    Raises:
        ValueError: an unknown layout, a column that is not there, or a malformed message (its turn is named).
    """
    _check_columns(row, columns)
    read = _reader(row, columns)
    if read is None:
        flags = ", ".join(f"--{field.name}-column" for field in fields(Columns))
        raise ValueError(f"no known layout in the columns {sorted(map(str, row))}; name yours with {flags}")
    conversation = read()
    if isinstance(conversation, str):
        return {"text": conversation}
    messages = _canonical_messages(conversation)
    if not messages:
        raise ValueError("the conversation has no messages")
    system = row.get(columns.system or "system")
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": _text(system, "the system column")})
    canonical: dict[str, Any] = {"messages": messages, "tools": _tools(row.get(columns.tools or "tools"))}
    if variables := row.get("chat_template_kwargs"):
        canonical["chat_template_kwargs"] = _variables(variables)
    return canonical


def _variables(value: Any) -> dict[str, Any]:
    """A row's own variables for the template; those that Arrow added to fill its structs are None and left out."""
    value = _parsed(value, "chat_template_kwargs")
    if not isinstance(value, dict):
        raise ValueError(f"chat_template_kwargs must be an object, found {_short(value)}")
    return {name: item for name, item in value.items() if item is not None}


def _check_columns(row: dict[str, Any], columns: Columns) -> None:
    for field in fields(Columns):
        name = getattr(columns, field.name)
        if name is not None and name not in row:
            raise ValueError(f"--{field.name}-column {name}: no such column; this row has {sorted(map(str, row))}")
    layouts = [columns.messages, columns.prompt or columns.response, columns.text]
    if sum(name is not None for name in layouts) > 1:
        raise ValueError(
            "--messages-column, --prompt-column with --response-column, and --text-column exclude one another"
        )


def _reader(row: dict[str, Any], columns: Columns) -> Callable[[], list | str] | None:
    """What reads this row's messages or text, or None where the layout is unknown."""
    if (text := columns.text) is not None:
        return lambda: _plain_text(row, text)
    if columns.prompt is None and columns.response is None:
        for name in (columns.messages,) if columns.messages else _MESSAGES:
            if row.get(name) is not None or columns.messages:
                return lambda: _message_list(row[name], name)
    for prompt, responses in _PAIRS.items():
        name = columns.prompt or prompt
        for response in (columns.response,) if columns.response else responses:
            if row.get(name) is not None and row.get(response) is not None:
                return lambda: _pair(row, name, response)
    if columns.prompt is None and columns.response is None and row.get("text") is not None:
        return lambda: _plain_text(row, "text")
    return None


def _plain_text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"'{name}' must be a string, found {type(row[name]).__name__}")
    return row[name]


def _message_list(value: Any, name: str) -> list:
    value = _parsed(value, f"'{name}'")
    if not isinstance(value, list):
        raise ValueError(f"'{name}' must be a list of messages, found {type(value).__name__}")
    return value


def _pair(row: dict[str, Any], prompt: str, response: str) -> list:
    """Prompt and response, each a string or messages; Alpaca's `input` and `history` where the row has them."""
    asked, answered = row[prompt], row[response]
    history = []
    if prompt == "instruction":
        asked = "\n".join([asked, row["input"]]) if isinstance(asked, str) and row.get("input") else asked
        for exchange in row.get("history") or []:
            if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
                raise ValueError(f"'history' must be a list of [question, answer], found {_short(exchange)}")
            history += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    for name, value in ((prompt, asked), (response, answered)):
        if not isinstance(value, (str, list)):
            raise ValueError(f"'{name}' must be a string or a list of messages, found {type(value).__name__}")
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    answered = [{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered
    return [*history, *asked, *answered]


def _canonical_messages(raw: list) -> list[Message]:
    messages: list[Message] = []
    calling = False  # whether the message before came from a call turn, so that a further call belongs to it
    for turn, item in enumerate(raw):
        where = f"turn {turn}"
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected an object, found {_short(item)}")
        message = {key: value for key, value in item.items() if value is not None}
        role = _role(message, where)
        content = message.pop("value", None) if "content" not in message else message.pop("content")
        if role in _CALL_ROLES:
            calls = _calls(content, where)
            if calling:
                messages[-1]["tool_calls"] += calls
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            calling = True
            continue
        calling = False
        messages.append(_message(message, _ROLES.get(role, role), content, where))
    return messages


def _role(message: Message, where: str) -> str:
    """Takes role or from out of `message`."""
    role = message.pop("role", None)
    sender = message.pop("from", None)
    if role is None and isinstance(sender, str) and sender not in _KNOWN_ROLES:
        raise ValueError(f"{where}: unknown speaker {sender!r}; known: {', '.join(sorted(_KNOWN_ROLES))}")
    role = sender if role is None else role
    if not isinstance(role, str):
        raise ValueError(f"{where}: expected an object with a 'role' or 'from' string, it has {sorted(message)}")
    return role


def _message(message: Message, role: str, content: Any, where: str) -> Message:
    where = f"{where} ({role})"
    calls = message.pop("tool_calls", None)
    legacy = message.pop("function_call", None)
    calls = _calls(calls or legacy, where) if calls or legacy else None
    if content is None and not calls:
        raise ValueError(f"{where}: no content" + (" and no tool_calls" if role == "assistant" else ""))
    if role == "tool" and isinstance(content, (dict, int, float)):
        content = json.dumps(content, ensure_ascii=False)  # a result as the function returned it
    text = "" if content is None else _text(content, where)
    thinking = message.get("reasoning", message.get("thinking"))
    if isinstance(thinking, str):
        message.setdefault("reasoning_content", thinking)  # the name that most templates read
    return {"role": role, "content": text, **message, **({"tool_calls": calls} if calls else {})}


def _text(content: Any, where: str) -> str:
    """Content as a string; text parts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text or a list of text parts, found {_short(content)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}: content has a part of type {kind!r}; only text parts can be trained on")
    return "".join(part["text"] for part in content)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's tool_calls from a list or a single call, wrapped or not, as objects or JSON."""
    value = _parsed(value, f"{where}: the tool call")
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = _parsed(item, f"{where}: the tool call")
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call needs a function 'name', found {_short(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _parsed(arguments, f"{where}: the arguments of {function['name']!r}") if arguments else {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}: the arguments of {function['name']!r} must be an object: {_short(arguments)}")
        extra = {key: call[key] for key in ("id",) if call.get(key) is not None}
        calls.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    value = _parsed(value, "the tools column")
    tools = []
    for item in value if isinstance(value, list) else [value]:
        tool = _parsed(item, "the tools column")
        if not isinstance(tool, dict):
            raise ValueError(f"a tool must be a JSON schema, found {_short(tool)}")
        bare = "name" in tool and "function" not in tool
        tools.append({"type": "function", "function": tool} if bare else tool)
    return tools or None


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: not JSON, column {error.colno}: {error.msg}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
