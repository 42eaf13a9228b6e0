"""Rows as people store them -> one canonical form."""

import copy
import re

import pytest

from eaft_megatron.data import Columns, canonical_row

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
ARGUMENTS = {"city": "Köln", "day": None}
CALL = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7"}
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": SCHEMA}
JSON_ARGUMENTS = '{"city": "Köln", "day": null}'
JSON_CALL = '{"name": "f", "arguments": {"city": "Köln", "day": null}}'


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [S, U, A], "id": 3}, [S, U, A]),
        ({"messages": '[{"role": "user", "content": "q"}]'}, [U]),
        ({"messages": [U], "system": "s"}, [S, U]),
        ({"messages": [S, U], "system": "other"}, [S, U]),
        ({"messages": [U, A], "prompt": "q", "text": "t"}, [U, A]),
        ({"messages": None, "text": None, "prompt": "q", "completion": "a"}, [U, A]),
        ({"conversations": turns(("human", "q"), ("gpt", "a")), "system": "s"}, [S, U, A]),
        ({"conversations": turns(("user", "q"), ("chatgpt", "a"))}, [U, A]),
        ({"conversation": turns(("system", "s"), ("user", "q"), ("model", "a"))}, [S, U, A]),
        ({"conversations": [U, A]}, [U, A]),
        ({"instruction": "q", "input": "", "output": "a"}, [U, A]),
        ({"instruction": "q", "input": None, "output": "a", "system": "s", "text": "t"}, [S, U, A]),
        ({"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\nx"}, A]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"], ["q", "a"]]}, [U, A, U, A, U, A]),
        ({"prompt": "q", "completion": "a"}, [U, A]),
        ({"prompt": "q", "response": "a", "system": "s"}, [S, U, A]),
        ({"prompt": [S, U], "completion": [A]}, [S, U, A]),
        ({"prompt": [U, A, U], "response": "a"}, [U, A, U, A]),
    ],
)
def test_layouts(row, messages):
    """Each layout gives the same messages; the row itself stays as it was."""
    before = copy.deepcopy(row)
    assert canonical_row(row) == {"messages": messages, "tools": None}
    assert row == before


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "tool_calls": [{"type": "function", "function": {**CALL["function"], "extra": 1}}]}],
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": JSON_ARGUMENTS}}],
            }
        ],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ARGUMENTS}]}],
        [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": JSON_ARGUMENTS}}],
        turns(("function_call", JSON_CALL)),
        turns(("tool_call", f"[{JSON_CALL}]")),
        turns(("function_call", {"name": "f", "arguments": ARGUMENTS})),
        [{"role": "tool_call", "content": JSON_CALL}],
    ],
)
def test_tool_calls(messages):
    """Every way to write a call gives the same; null arguments are the caller's own."""
    assert canonical_row({"messages": messages})["messages"] == [CALLING]


def test_call_details():
    """Ids are kept, calls in a row belong together, no arguments are an empty object."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    [message] = canonical_row({"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]})["messages"]
    expected = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    assert message == {"role": "assistant", "content": "x", "tool_calls": expected}
    two = canonical_row({"conversations": turns(("function_call", JSON_CALL), ("function_call", JSON_CALL))})
    assert two["messages"] == [{**CALLING, "tool_calls": [CALL, CALL]}]


@pytest.mark.parametrize("role", ["tool", "observation", "tool_response", "function_response", "function"])
def test_tool_results(role):
    """A result's role goes by many names; an object is written as JSON."""
    assert canonical_row({"conversations": turns((role, "7"))})["messages"] == [RESULT]
    assert canonical_row({"messages": [{"role": role, "content": {"é": 1}}]})["messages"] == [
        {"role": "tool", "content": '{"é": 1}'}
    ]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        ([SCHEMA], [TOOL]),
        ('[{"name": "f", "description": "d", "parameters": {"type": "object"}}]', [TOOL]),
        (['{"name": "f", "description": "d", "parameters": {"type": "object"}}'], [TOOL]),
        (SCHEMA, [TOOL]),
        ([], None),
        ("", None),
        ("[]", None),
        (None, None),
    ],
)
def test_tools(tools, expected):
    """A list or JSON, with or without the wrapper; nothing is None."""
    assert canonical_row({"messages": [U], "tools": tools})["tools"] == expected


def test_nulls_of_arrow_are_removed_and_other_keys_kept():
    """A struct column fills every message with every key."""
    row = {"messages": [{**U, "tool_calls": None, "name": None}, {**A, "reasoning_content": "r", "tool_calls": None}]}
    assert canonical_row(row)["messages"] == [U, {**A, "reasoning_content": "r"}]


def test_thinking_is_found_under_the_name_that_templates_read():
    """`reasoning` and `thinking` are copied, not moved, and do not overrule `reasoning_content`."""
    for name in ("reasoning", "thinking"):
        [message] = canonical_row({"messages": [{**A, name: "r"}]})["messages"]
        assert message == {**A, name: "r", "reasoning_content": "r"}
    both = {**A, "reasoning": "r", "reasoning_content": "s"}
    assert canonical_row({"messages": [both]})["messages"] == [both]


def test_text_parts_are_joined():
    """OpenAI's list of text parts is one string."""
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert canonical_row({"messages": [{"role": "user", "content": parts}]})["messages"][0]["content"] == "a b"


def test_columns():
    """Each name replaces what would be recognised; text beats a conversation when it is asked for."""
    row = {"chat": [U], "p": "q", "r": "a", "sys": "s", "fn": [SCHEMA], "body": "t", "messages": [A], "system": "no"}
    assert canonical_row(row, Columns(messages="chat"))["messages"][1:] == [U]
    assert canonical_row(row, Columns(text="body")) == {"text": "t"}
    named = canonical_row(row, Columns(prompt="p", response="r", system="sys", tools="fn"))
    assert named == {"messages": [S, U, A], "tools": [TOOL]}
    assert canonical_row({"prompt": "q", "answer": "a"}, Columns(response="answer"))["messages"] == [U, A]
    assert canonical_row({"text": "t"}) == {"text": "t"}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"b": 1, "a": 2}, Columns(), "no known layout in the columns ['a', 'b']; name yours with --messages-column, "),
        ({"prompt": "q"}, Columns(), "--tools-column, --system-column, --prompt-column, --response-column, --text-col"),
        ({"a": 1}, Columns(messages="b"), "--messages-column b: no such column; this row has ['a']"),
        ({"a": [U], "b": ""}, Columns(messages="a", text="b"), "exclude one another"),
        ({"text": 3}, Columns(), "'text' must be a string, found int"),
        ({"messages": "x"}, Columns(), "'messages': not JSON, column 1"),
        ({"messages": {"a": 1}}, Columns(), "'messages' must be a list of messages, found dict"),
        ({"a": None}, Columns(messages="a"), "'a' must be a list of messages, found NoneType"),
        ({"messages": []}, Columns(), "the conversation has no messages"),
        ({"messages": [U, "x"]}, Columns(), "turn 1: expected an object, found 'x'"),
        ({"messages": [U, {"content": "x"}]}, Columns(), "turn 1: expected an object with a 'role' or 'from' string"),
        ({"messages": [U, {"role": "assistant"}]}, Columns(), "turn 1 (assistant): no content and no tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, Columns(), "turn 0 (user): content must be text or a list"),
        (
            {"conversations": turns((["x"], "x"))},
            Columns(),
            "turn 0: expected an object with a 'role' or 'from' string",
        ),
        ({"conversations": turns(("alien", "x"))}, Columns(), "turn 0: unknown speaker 'alien'; known: assistant, "),
        ({"conversations": turns(("function_call", "f(x)"))}, Columns(), "turn 0: the tool call: not JSON, column 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            Columns(),
            "turn 0 (user): content has a part of type 'image_url'; only text parts",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            Columns(),
            "turn 0 (assistant): the arguments of 'f': not JSON, column 2",
        ),
        ({"messages": [U], "tools": "{"}, Columns(), "the tools column: not JSON"),
        ({"messages": [U], "tools": [3]}, Columns(), "a tool must be a JSON schema, found 3"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, Columns(), "'history' must be a list of [question, an"),
        ({"prompt": "q", "completion": 3}, Columns(), "'completion' must be a string or a list of messages, found int"),
    ],
)
def test_errors(row, columns, message):
    """Every error says what was found and where, or which flag maps it."""
    with pytest.raises(ValueError, match=re.escape(message)):
        canonical_row(row, columns)
