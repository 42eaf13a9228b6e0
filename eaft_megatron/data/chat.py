"""A conversation or a text as token ids, with a mask of the tokens to train on.

The ids are those of the tokenizer's own chat template, unchanged. Only the mask is worked out here.
"""

import re
from dataclasses import dataclass
from typing import Any

# The tag that transformers looks for before it tracks generation spans.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

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

    def truncate(self, max_length: int) -> "EncodedSample":
        """The first `max_length` tokens."""
        return EncodedSample(self.input_ids[:max_length], self.labels_mask[:max_length])


def encode_text(tokenizer: Any, text: str) -> EncodedSample:
    """Plain text, with whatever tokens the tokenizer itself adds; every token but the first is a label."""
    ids = list(tokenizer(text)["input_ids"])
    return EncodedSample(ids, [i > 0 for i in range(len(ids))])


def encode_chat(
    tokenizer: Any, messages: list[Message], *, tools: list | None = None, max_length: int | None = None
) -> EncodedSample:
    """A conversation through the tokenizer's chat template; the assistant's tokens are the labels.

    A template with generation markers (`{% generation %}`) is taken at its word. For any other, an assistant turn is
    what the template writes after its generation prompt, up to and with the end-of-turn token; the role header, the
    newline behind it and the newline behind the end-of-turn token are not trained on. A token that is partly header
    and partly answer (a tokenizer may join their newlines) counts as header.

    Args:
        tokenizer: a transformers tokenizer with a chat template and character offsets ("fast").
        messages: dicts with "role" and "content" (or "tool_calls"), as apply_chat_template takes them.
        tools: JSON schemas for the template; None means that the template sees none.
        max_length: keep this many tokens at most, cut on the right.

    Raises:
        ValueError: malformed messages; no chat template; a template that fails, or that renders a turn differently
            once later turns follow it (then no span of the whole conversation is that turn).
    """
    _check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template")
    template = tokenizer.get_chat_template(tools=tools)
    if _GENERATION_TAG.search(template):
        sample = _encode_marked(tokenizer, messages, tools)
    else:
        sample = _encode_by_prefix(tokenizer, messages, tools)
    return sample if max_length is None else sample.truncate(max_length)


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


def _apply_template(tokenizer: Any, messages: list[Message], tools: list | None, where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error


def _encode_marked(tokenizer: Any, messages: list[Message], tools: list | None) -> EncodedSample:
    encoding = _apply_template(
        tokenizer,
        messages,
        tools,
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
    return EncodedSample(list(encoding["input_ids"]), mask)


def _encode_by_prefix(tokenizer: Any, messages: list[Message], tools: list | None) -> EncodedSample:
    text = _apply_template(tokenizer, messages, tools, "messages", tokenize=False)
    spans = [
        _assistant_span(tokenizer, messages, tools, turn, text)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed") from None
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    return EncodedSample(ids, [any(_inside(offset, span) for span in spans) for offset in offsets])


def _inside(offset: Span, span: Span) -> bool:
    # Byte-level tokenizers trim spaces off their offsets, so a token of spaces alone is empty and lies at its own end:
    # one that ends where the span begins stands before it.
    return offset[0] >= span[0] and offset[1] <= span[1] and offset[1] > span[0]


def _assistant_span(tokenizer: Any, messages: list[Message], tools: list | None, turn: int, text: str) -> Span:
    """Characters of `text` that the assistant writes in `turn`, the end-of-turn token included."""
    where = f"turn {turn} (assistant)"
    before = messages[:turn]
    if not before:
        raise ValueError(f"{where}: a conversation cannot begin with the assistant: there is no prompt to answer")
    prompt = _apply_template(tokenizer, before, tools, where, tokenize=False, add_generation_prompt=True)
    through = _apply_template(tokenizer, messages[: turn + 1], tools, where, tokenize=False)
    stripped = through.rstrip()
    if stripped.endswith(tuple(tokenizer.get_added_vocab())):
        through = stripped  # only blanks follow the end-of-turn token
    if not (through.startswith(prompt) and text.startswith(through)):
        raise ValueError(
            f"{where}: the chat template renders this turn, or what precedes it, differently inside the whole "
            "conversation than on its own (some templates drop earlier thinking or add a default system turn), so its "
            "tokens cannot be told apart; use a template with {% generation %} markers or one row per assistant turn"
        )
    written = through[len(prompt) :]
    content = messages[turn].get("content")
    # What stands before the answer may be thinking tags, or a header that the prompt should have held.
    preceded = isinstance(content, str) and not written.lstrip().startswith(content.strip())
    if preceded and prompt == _apply_template(tokenizer, before, tools, where, tokenize=False):
        raise ValueError(f"{where}: the chat template ignores add_generation_prompt: its role header would be trained")
    return len(prompt), len(through)
