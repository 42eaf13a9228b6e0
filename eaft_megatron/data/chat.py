"""A conversation or a text as token ids, with a mask of the tokens to train on.

The ids are those of the tokenizer's own chat template, unchanged. Only the mask is worked out here. Text in a message
that spells a special token ("<|im_end|>") becomes that token, as the tokenizer does everywhere else.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from eaft_megatron.data.texts import Text
from eaft_megatron.data.turns import Conversation, Turn

# The tag that transformers looks for before it tracks generation spans.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TRAIN_ON = ("all", "last")
ON_LOSS = ("error", "keep", "drop-row")
# OpenAI's, axolotl's and ms-swift's flag of a message: false or 0, and the turn is context only.
FLAGS = ("weight", "train", "loss")

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
    """The samples of one row, in the order of their last turns, and whether it took more than one to hold it.

    `losses`: what the row holds and no sample does, in words; `untrained`: turns that are context by their own flag.
    """

    samples: list[EncodedSample]
    split: bool
    losses: tuple[str, ...] = ()
    untrained: int = 0


def encode_text(tokenizer: Any, text: str) -> EncodedSample:
    """Plain text, with whatever tokens the tokenizer itself adds; every token but the first is a label."""
    ids = list(_tokenize(tokenizer, text)["input_ids"])
    return EncodedSample(ids, [i > 0 for i in range(len(ids))])


def encode_row(
    tokenizer: Any,
    row: dict[str, Any],
    *,
    train_on: str = "all",
    end_token: str | None = None,
    on_loss: str = "error",
    empty_thinking: str = "error",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> EncodedRow:
    """A canonical row (`layouts.canonical_row`) as samples whose masks hold the assistant's tokens and no other.

    What an assistant turn is, `turns` says: the prompt, the answer, the token that ends it. A template with generation
    markers (`{% generation %}`) is taken at its word instead. Moreover:

    - Every turn is rendered as the last of its conversation, which is how the model meets it, and must reappear
      unchanged, its end included, in the sample that trains it. A template may render it differently once later turns
      follow (Qwen3 drops earlier thinking): such a turn gets a sample of its own that ends with it, and `split` is
      true. Turns that do agree share a sample, so every turn is trained on exactly once.
    - A prompt and its answer are tokenized apart, as inference does, where the tokenizer allows it.
    - Whatever the row holds must reappear in a sample; `on_loss` says what happens otherwise.
    - A turn whose message says `"weight": 0`, `"train": false` or `"loss": false` stays context. So do a conversation's
      very first message, if it is the assistant's, and what follows the last trained turn is left out.

    Args:
        tokenizer: a transformers tokenizer with a chat template and character offsets ("fast").
        row: {"messages": [...], "tools": [...] or None, "chat_template_kwargs": {...} or None} or {"text": ...}.
        train_on: "all" assistant turns or the "last" one only, which never needs a split.
        end_token: appended, and trained on, where neither the template's turn nor what it writes next ends an answer.
        on_loss: "error"; "keep" the row and name in `losses` what is missing; or "drop-row": no sample, losses named.
        empty_thinking: a turn without thinking behind a prompt that opens it (DeepSeek-R1): "error", or "close" it.
        chat_template_kwargs: variables for the template; the row's own come before. None: what suits each turn.

    Raises:
        ValueError: no assistant turn with a prompt; a template that fails, leaves text of the row out, or
            whose assistant turns cannot be told from the rest; malformed messages; a bad option.
    """
    _check_options(tokenizer, train_on, end_token, on_loss)
    if "messages" not in row:
        return EncodedRow([encode_text(tokenizer, row["text"])], split=False)
    messages, tools = row["messages"], row.get("tools") or None
    _check_messages(messages)
    template = _template(tokenizer, tools)
    trained = _trained_turns(messages, train_on)
    untrained = sum(is_off(message) for message in messages[1:] if message["role"] == "assistant")
    messages = [{k: v for k, v in message.items() if k not in FLAGS} for message in messages[: trained[-1] + 1]]
    variables = {**(chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    conversation = Conversation(tokenizer, messages, tools, variables)
    if _GENERATION_TAG.search(template):
        marked = _encode_marked(conversation, trained, every=train_on == "all" and not untrained)
        samples, lost = [marked], conversation.lost_context(len(messages), [conversation.render(len(messages))])
    else:
        turns = [conversation.turn(index, empty_thinking=empty_thinking) for index in trained]
        groups = _groups([turn.ended_by(end_token) for turn in turns])
        samples = [_encode_turns(tokenizer, group) for group in groups]
        lost = [text for turn in turns for text in turn.lost]
        lost += conversation.lost_context(trained[-1], [group[0].text for group in groups])
    if lost and on_loss == "error":
        raise ValueError(_lost_message(lost))
    losses = tuple(text.lost() for text in lost)
    return EncodedRow([] if lost and on_loss == "drop-row" else samples, len(samples) > 1, losses, untrained)


def is_off(message: Message) -> bool:
    """Whether a message's own flag says that it is not trained on."""
    return any(message.get(flag) is not None and not message[flag] for flag in FLAGS)


def _check_options(tokenizer: Any, train_on: str, end_token: str | None, on_loss: str) -> None:
    if train_on not in TRAIN_ON:
        raise ValueError(f"--train-on must be 'all' or 'last', not {train_on!r}")
    if on_loss not in ON_LOSS:
        raise ValueError(f"--on-loss must be one of {', '.join(ON_LOSS)}, not {on_loss!r}")
    if end_token is not None and end_token not in tokenizer.get_added_vocab():
        raise ValueError(f"{end_token!r} cannot end a turn: it is no special token of the tokenizer")


def _trained_turns(messages: list[Message], train_on: str) -> list[int]:
    """The assistant turns to train on, by number; ValueError where there is none."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    trained = [i for i in (turns[-1:] if train_on == "last" else turns) if not is_off(messages[i])]
    if not turns:
        roles = ", ".join(message["role"] for message in messages[:8])
        raise ValueError(f"no assistant turn that answers something: nothing to train on (roles: {roles})")
    if not trained:
        raise ValueError("the flags (weight, train, loss) switch every assistant turn off: nothing to train on")
    return trained


def _lost_message(lost: Sequence[Text]) -> str:
    more = f", and {len(lost) - 1} more texts of the row" if len(lost) > 1 else ""
    return (
        f"{lost[0].lost()}{more}: give a template that writes it with --chat-template FILE; or skip such rows "
        "(drop-row) or train on what is left with --on-loss keep"
    )


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


def _groups(turns: list[Turn]) -> list[list[Turn]]:
    """Turns that one text holds unchanged, the last of them (whose text it is) first."""
    groups: list[list[Turn]] = []
    for turn in reversed(turns):
        if groups and groups[-1][0].text.startswith(turn.kept):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return groups[::-1]


def _encode_marked(conversation: Conversation, trained: list[int], *, every: bool) -> EncodedSample:
    """By `{% generation %}` markers: those of every turn, or of the `trained` ones alone."""
    count = len(conversation.messages)
    encoding = conversation.apply(
        count,
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
    if not every:
        spans = [_marked_span(conversation, index) for index in trained]
        inside = [any(start <= offset[0] < stop for start, stop in spans) for offset in offsets]
        mask = [flag and inner for flag, inner in zip(mask, inside, strict=True)]
    if not any(mask) and conversation.messages[-1].get("content"):
        raise ValueError("the chat template has {% generation %} markers but marks no token of an assistant turn")
    return EncodedSample(list(encoding["input_ids"]), mask)


def _marked_span(conversation: Conversation, index: int) -> Span:
    before, behind = conversation.render(index), conversation.render(index + 1)
    if not (conversation.render(len(conversation.messages)).startswith(behind) and behind.startswith(before)):
        raise conversation.ambiguous(index)
    return len(before), len(behind)


def _encode_turns(tokenizer: Any, turns: list[Turn]) -> EncodedSample:
    """The text of the first of `turns`, which holds them all; each prompt and what follows it tokenized apart."""
    text, spans = turns[0].text, [(turn.start, turn.stop) for turn in reversed(turns)]
    cuts = sorted({0, len(text), *(start for start, _ in spans)}) if _joins_unchanged(tokenizer) else [0, len(text)]
    pieces = [(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if start < stop]
    encoding = _tokenize(
        tokenizer, [text[a:b] for a, b in pieces], add_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[int] = []
    offsets: list[Span] = []
    for (start, _), piece, places in zip(pieces, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        ids += piece
        offsets += [(a + start, b + start) for a, b in places]
    ends = [offset[1] for offset in offsets]
    if ends != sorted(ends):
        raise ValueError(
            f"{type(tokenizer).__name__} gives character offsets that go back: no mask can be made of them"
        )
    mask = [False] * len(ids)
    for start, stop in spans:
        # Byte-level tokenizers trim spaces off their offsets, so a token of spaces alone is empty and lies at its own
        # end: one that ends where the span begins stands before it.
        first, behind = bisect_right(ends, start), bisect_right(ends, stop)
        while first < behind and offsets[first][0] < start:
            first += 1
        mask[first:behind] = [True] * (behind - first)
    return EncodedSample(ids, mask)


@lru_cache(maxsize=16)
def _joins_unchanged(tokenizer: Any) -> bool:
    """Whether tokens of two pieces are tokens of the whole: not where each text gets a blank in front (Llama 2)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    ids = [backend.encode(text, add_special_tokens=False).ids for text in ("\na", "\n", "a")]
    return ids[0] == ids[1] + ids[2]


def _tokenize(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    try:
        return tokenizer(text, **options)
    except NotImplementedError:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed") from None
    except (TypeError, UnicodeError) as error:
        try:
            "".join(text).encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half a surrogate pair, which is no character") from None
        raise ValueError(f"{type(tokenizer).__name__} fails: {error}") from error
