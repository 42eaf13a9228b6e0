"""A conversation or a text as token ids, with a mask of the tokens to train on.

The ids are those of the tokenizer's own chat template, unchanged. Only the mask is worked out here. Text in a message
that spells a special token ("<|im_end|>") becomes that token, as the tokenizer does everywhere else.
"""

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from eaft_megatron.data.turns import Conversation, Turn, UnwrittenCallsError

# The tag that transformers looks for before it tracks generation spans.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TRAIN_ON = ("all", "last")

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedSample:
    """Tokens of one sample.

    `input_ids`: n token ids. `labels_mask`: n flags; the one at position i belongs to the token at position i
    *as a label*, so it counts in the loss at position i - 1, where that token is predicted.
    """

    input_ids: list[int]
    labels_mask: list[bool]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels_mask)


@dataclass(frozen=True)
class EncodedRow:
    """The samples of one row, in the order of their last turns, and whether it took more than one to hold it."""

    samples: list[EncodedSample]
    split: bool


def encode_text(tokenizer: Any, text: str) -> EncodedSample:
    """Plain text, with whatever tokens the tokenizer itself adds; every token but the first is a label."""
    ids = list(_tokenize(tokenizer, text)["input_ids"])
    return EncodedSample(ids, [i > 0 for i in range(len(ids))])


def encode_row(
    tokenizer: Any, row: dict[str, Any], *, train_on: str = "all", end_token: str | None = None
) -> EncodedRow:
    """A canonical row (`layouts.canonical_row`) as samples whose masks hold the assistant's tokens and no other.

    An assistant turn is what the template writes after its generation prompt, up to and with the end-of-turn token; the
    role header, the newline behind it and the newline behind the end-of-turn token are not trained on. Where the
    template ends turns with the special token of the next header (GLM-4), that token is the end of turn. A token that
    is partly header and partly answer (a tokenizer may join their newlines) counts as header. A template with
    generation markers (`{% generation %}`) is taken at its word instead. Moreover:

    - Every turn is rendered as the last of its conversation, which is how the model meets it, and must reappear
      unchanged in the sample that trains it. A template may render it differently once later turns follow (Qwen3
      drops earlier thinking): such a turn gets a sample of its own that ends with it, and `split` is true. Turns that
      do agree share a sample, so every turn is trained on exactly once.
    - A turn without thinking is an answer in non-thinking mode: an empty thinking block that the template puts before
      it (Qwen3) is part of the prompt of `enable_thinking=False`, not of the answer, and is not trained on.
    - What follows the last assistant turn has no label and is left out. A conversation's very first message, if it is
      the assistant's, answers nothing: it stays as context (with generation markers the template decides).
    - Templates of the GLM-4 kind know no `tool_calls`; calls and results are put into their `metadata` form.

    Args:
        tokenizer: a transformers tokenizer with a chat template and character offsets ("fast").
        row: {"messages": [...], "tools": [...] or None} or {"text": ...}.
        train_on: "all" assistant turns or the "last" one only, which never needs a split.
        end_token: appended, and trained on, where the template leaves a row's last answer without a token that ends it:
            "<|user|>" for GLM-4, whose turns the next header ends. None: the last answer's end is not trained.

    Raises:
        ValueError: no assistant turn with a prompt; a template that fails, does not write tool calls or results, or
            whose assistant turns cannot be told from the rest; malformed messages; a bad `train_on` or `end_token`.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"--train-on must be 'all' or 'last', not {train_on!r}")
    if "messages" not in row:
        return EncodedRow([encode_text(tokenizer, row["text"])], split=False)
    if end_token is not None and end_token not in tokenizer.get_added_vocab():
        raise ValueError(f"{end_token!r} cannot end a turn: it is no special token of the tokenizer")
    messages, tools = row["messages"], row.get("tools") or None
    _check_messages(messages)
    template = _template(tokenizer, tools)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        roles = ", ".join(message["role"] for message in messages[:8])
        raise ValueError(f"no assistant turn that answers something: nothing to train on (roles: {roles})")
    messages = messages[: last + 1]
    if _GENERATION_TAG.search(template):
        return EncodedRow([_encode_marked(tokenizer, messages, tools, last_only=train_on == "last")], split=False)
    try:
        turns = _trained_turns(tokenizer, messages, tools, template, train_on)
    except UnwrittenCallsError as unwritten:
        # Some templates write calls only where there is no content.
        nulled = [{**m, "content": None} if m.get("tool_calls") and not m.get("content") else m for m in messages]
        try:
            turns = _trained_turns(tokenizer, nulled, tools, template, train_on)
        except ValueError:
            raise unwritten from None
    samples = []
    for group in _groups(turns):
        text = group[0].text
        if end_token and group[0].end_tokens and not messages[last].get("tool_calls"):
            text += end_token
        samples.append(_encode_spans(tokenizer, text, [turn.span_in(text) for turn in reversed(group)]))
    return EncodedRow(samples, len(samples) > 1)


def _template(tokenizer: Any, tools: list | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template")
    return tokenizer.get_chat_template(tools=tools)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, found {_short(messages)}")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"turn {turn}: expected an object with a 'role' string, found {_short(message)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"turn {turn} ({message['role']}): no 'content' and no 'tool_calls'")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _trained_turns(
    tokenizer: Any, messages: list[Message], tools: list | None, template: str, train_on: str
) -> list[Turn]:
    origins = list(range(len(messages)))
    if "tool_calls" not in template and "metadata" in template and "observation" in template:
        messages, origins = _with_metadata(messages)
    conversation = Conversation(tokenizer, messages, tools)
    conversation.check_calls()
    conversation.check_tool_results()
    first_trained = origins[-1] if train_on == "last" else 1
    return [
        conversation.turn(i)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and origins[i] >= first_trained
    ]


def _with_metadata(messages: list[Message]) -> tuple[list[Message], list[int]]:
    """GLM-4's form of calls and results: a message per call, its name as metadata; and where each came from."""
    converted, origins = [], []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        parts = [] if calls and not message.get("content") else [message]
        if calls and parts:
            parts = [{key: value for key, value in message.items() if key != "tool_calls"}]
        elif message["role"] == "tool":
            parts = [{**message, "role": "observation"}]
        for call in calls:
            function = call.get("function") or call
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            parts.append({"role": "assistant", "metadata": function["name"], "content": text})
        converted += parts
        origins += [index] * len(parts)
    return converted, origins


def _groups(turns: list[Turn]) -> list[list[Turn]]:
    """Turns that one text holds unchanged, the last of them (whose text it is) first."""
    groups: list[list[Turn]] = []
    for turn in reversed(turns):
        if groups and groups[-1][0].text.startswith(turn.kept):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return groups[::-1]


def _encode_marked(tokenizer: Any, messages: list[Message], tools: list | None, *, last_only: bool) -> EncodedSample:
    """By `{% generation %}` markers: those of every turn, or of the last turn alone."""
    conversation = Conversation(tokenizer, messages, tools)
    encoding = conversation.apply(
        len(messages),
        "messages",
        tokenize=True,
        return_dict=True,  # the default differs between transformers 4 and 5
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask = [bool(flag) for flag in encoding["assistant_masks"]]
    offsets = [tuple(offset) for offset in encoding["offset_mapping"]]
    # transformers closes a span at the first token of its last character; an emoji may be several tokens.
    for i in range(1, len(mask)):
        if mask[i - 1] and offsets[i] == offsets[i - 1]:
            mask[i] = True
    if last_only:
        before = conversation.render(len(messages) - 1)
        if not conversation.render(len(messages)).startswith(before):
            raise conversation.ambiguous(len(messages) - 1)
        mask = [flag and offset[0] >= len(before) for flag, offset in zip(mask, offsets, strict=True)]
    if not any(mask) and messages[-1].get("content"):
        raise ValueError("the chat template has {% generation %} markers but marks no token of an assistant turn")
    return EncodedSample(list(encoding["input_ids"]), mask)


def _encode_spans(tokenizer: Any, text: str, spans: list[Span]) -> EncodedSample:
    """`text` tokenized in one call; the tokens that lie in one of `spans` (characters) are the labels."""
    encoding = _tokenize(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    ends = [offset[1] for offset in offsets]
    if ends != sorted(ends):
        raise ValueError(
            f"{type(tokenizer).__name__} gives character offsets that go back: no mask can be made of them"
        )
    mask = [False] * len(ends)
    for start, stop in spans:
        # Byte-level tokenizers trim spaces off their offsets, so a token of spaces alone is empty and lies at its own
        # end: one that ends where the span begins stands before it.
        first, behind = bisect_right(ends, start), bisect_right(ends, stop)
        while first < behind and offsets[first][0] < start:
            first += 1
        mask[first:behind] = [True] * (behind - first)
    return EncodedSample(list(encoding["input_ids"]), mask)


def _tokenize(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, **options)
    except NotImplementedError:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed") from None
    except (TypeError, UnicodeError) as error:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half a surrogate pair, which is no character") from None
        raise ValueError(f"{type(tokenizer).__name__} fails: {error}") from error
