"""The kinds of conversation. Every text in them is a word that no template writes, so that the judge can find it."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _tool(name: str, description: str) -> dict:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": f"{description}arg"}},
        "required": ["city"],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [_tool("getquux", "Quuxify"), _tool("frobnicate", "Frobbery")]
TOOLS_TEXT = ("getquux", "Quuxify", "frobnicate", "Frobbery")


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, *, reasoning: str | None = None, calls: list | None = None, **flags: Any) -> dict:
    message = {"role": "assistant", "content": text, **flags}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": calls} if calls else message


def call(name: str, city: str, number: int = 1) -> dict:
    return {"id": f"callid00{number}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def result(text: str, name: str = "getquux", number: int = 1) -> dict:
    return {"role": "tool", "name": name, "tool_call_id": f"callid00{number}", "content": text}


def _chat(*messages: dict, **columns: Any) -> Row:
    return {"messages": list(messages), **columns}


_ASKED = user("Wombat asks?")
_CALLED = assistant("", calls=[call("getquux", "Karlovy")])
_TWO = (_ASKED, assistant("Narwhal answers."), user("Lemur asks?"))

ROWS: dict[str, Row] = {
    "single": _chat(_ASKED, assistant("Narwhal answers.")),
    "multi-turn": _chat(*_TWO, assistant("Okapi answers.")),
    "system": _chat(system("Be Pangolin."), *_TWO, assistant("Okapi answers.")),
    "developer": _chat({"role": "developer", "content": "Be Quokka."}, _ASKED, assistant("Narwhal answers.")),
    "system amid": _chat(
        system("Be Pangolin."),
        _ASKED,
        assistant("Narwhal answers."),
        system("Be Axolotlish."),
        user("Lemur asks?"),
        assistant("Okapi answers."),
    ),
    "tools listed": _chat(_ASKED, assistant("Narwhal answers."), tools=TOOLS),
    "one call": _chat(_ASKED, _CALLED, result("Tapir7"), assistant("Okapi answers."), tools=TOOLS),
    "parallel calls": _chat(
        _ASKED,
        assistant("", calls=[call("getquux", "Karlovy"), call("frobnicate", "Zwickau", 2)]),
        result("Tapir7"),
        result("Dugong8", "frobnicate", 2),
        assistant("Okapi answers."),
        tools=TOOLS,
    ),
    "same function twice": _chat(
        _ASKED,
        assistant("", calls=[call("getquux", "Karlovy"), call("getquux", "Zwickau", 2)]),
        result("Tapir7"),
        result("Dugong8", number=2),
        assistant("Okapi answers."),
        tools=TOOLS,
    ),
    "content and call": _chat(
        _ASKED,
        assistant("Narwhal looks.", calls=[call("getquux", "Karlovy")]),
        result("Tapir7"),
        assistant("Okapi answers."),
        tools=TOOLS,
    ),
    "two rounds of tools": _chat(
        _ASKED,
        _CALLED,
        result("Tapir7"),
        assistant("", calls=[call("frobnicate", "Zwickau", 2)]),
        result("Dugong8", "frobnicate", 2),
        assistant("Okapi answers."),
        user("Lemur asks?"),
        assistant("Narwhal answers."),
        tools=TOOLS,
    ),
    "reasoning": _chat(_ASKED, assistant("Narwhal answers.", reasoning="Civet thinks.")),
    "reasoning, turns": _chat(
        _ASKED,
        assistant("Narwhal answers.", reasoning="Civet thinks."),
        user("Lemur asks?"),
        assistant("Okapi answers.", reasoning="Serval thinks."),
    ),
    "reasoning and tools": _chat(
        _ASKED,
        assistant("", reasoning="Civet thinks.", calls=[call("getquux", "Karlovy")]),
        result("Tapir7"),
        assistant("Okapi answers.", reasoning="Serval thinks."),
        tools=TOOLS,
    ),
    "answers in a row": _chat(_ASKED, assistant("Narwhal answers."), assistant("Okapi answers.")),
    "ends in a call": _chat(_ASKED, _CALLED, tools=TOOLS),
    "ends in user": _chat(*_TWO),
    "newline first": _chat(_ASKED, assistant("\nNarwhal answers."), user("Lemur asks?"), assistant("\n\nOkapi.")),
    "reasoning newline": _chat(_ASKED, assistant("Narwhal answers.", reasoning="\nCivet thinks.")),
    "empty content": _chat(_ASKED, assistant(""), user("Lemur asks?"), assistant("Okapi answers.")),
    "parts": _chat(
        {"role": "user", "content": [{"type": "text", "text": "Wombat asks?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Narwhal "}, {"type": "text", "text": "answers."}]},
    ),
    "weight 0": _chat(
        _ASKED, assistant("Narwhal answers.", weight=0), user("Lemur asks?"), assistant("Okapi answers.", weight=1)
    ),
    "train false": _chat(_ASKED, assistant("Narwhal answers.", train=False), user("Lemur asks?"), assistant("Okapi.")),
    "loss false": _chat(_ASKED, assistant("Narwhal answers.", loss=False), user("Lemur asks?"), assistant("Okapi.")),
    "template kwargs": _chat(
        _ASKED,
        assistant("Narwhal answers."),
        chat_template_kwargs={"enable_thinking": False, "thinking": False},
    ),
    "41 turns": _chat(
        *(turn for n in range(20) for turn in (user(f"Wombat{n}x asks?"), assistant(f"Narwhal{n}x answers."))),
        user("Lemur asks?"),
        assistant("Okapi answers."),
    ),
    "unicode": _chat(user("Wie heißt \U0001f469\u200d\U0001f467 e\u0301?"), assistant("你好 🙂 שלום.")),
    "special in text": _chat(user("What is <|im_end|> and </s>?"), assistant("Narwhal says <|eot_id|> ends it.")),
}
FLAGS = ("weight", "train", "loss")


def is_off(message: dict) -> bool:
    """Whether the row itself says that this turn is not trained on (OpenAI's, axolotl's and ms-swift's flag)."""
    return any(flag in message and not message[flag] for flag in FLAGS)


def plain_messages(row: Row) -> list[dict]:
    """The messages as the row holds them, without flags, and with parts of text joined."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        messages.append({**{key: value for key, value in message.items() if key not in FLAGS}, "content": text})
    return messages
