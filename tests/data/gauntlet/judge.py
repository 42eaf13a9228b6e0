"""Whether samples train what inference would meet: right, or everything that is wrong with them, or lost.

Knows the template, the row and the tokens at which the model stops; nothing of how the masks were made.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.data.gauntlet.families import Family, family_of
from tests.data.gauntlet.inference import Inference
from tests.data.gauntlet.rows import TOOLS_TEXT, Row, is_off, plain_messages
from tests.data.gauntlet.tokenizers import token_bytes

_OPEN_THINKING = re.compile(r"<think>\s*$")
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINKING = re.compile(rb"\s*(?:<think>\s*</think>|<\|START_THINKING\|><\|END_THINKING\|>)")


@dataclass
class Verdict:
    """`kind`: right, refused, lost (text of the row, in silence) or wrong; and why."""

    kind: str
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sample:
    ids: list[int]
    mask: list[bool]
    pieces: list[bytes]

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)

    def tokens_before(self, position: int) -> int | None:
        """The number of tokens that make the first `position` bytes; None where a token straddles it."""
        size = 0
        for count, piece in enumerate(self.pieces):
            if size >= position:
                return count if size == position else None
            size += len(piece)
        return len(self.pieces) if size == position else None


@dataclass(frozen=True)
class _Place:
    """Where a turn is trained: tokens first to last of a sample, after `prompt`; the template's `answer` or None."""

    sample: int
    first: int
    last: int
    prompt: str
    answer: str | None


def judge(tokenizer: Any, row: Row, samples: list[tuple[list[int], list[bool]]], losses: tuple = ()) -> Verdict:
    """The verdict on the samples of a row. `losses`: what the encoder itself says it could not keep."""
    read = [_Sample(ids, mask, token_bytes(tokenizer, ids)) for ids, mask in samples]
    inference = Inference(tokenizer, row)
    family = family_of(tokenizer.chat_template)
    messages = plain_messages(row)
    wrong: list[str] = []
    claimed = [[False] * len(sample.ids) for sample in read]
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        places = _places(inference, index, read, message)
        for place in places:
            claimed[place.sample][place.first : place.last] = [True] * (place.last - place.first)
        if is_off(row["messages"][index]):
            wrong += [f"turn {index}: flag ignored"] * bool(places)
        elif not places:
            wrong.append(f"turn {index}: {_missing(inference, index, read)}")
        else:
            wrong += [f"turn {index}: trained {len(places)} times"] * (len(places) > 1)
            wrong += [f"turn {index}: {what}" for what in _turn_faults(tokenizer, family, read, places[-1], message)]
    for sample, owned in zip(read, claimed, strict=True):
        extra = [p for p, flag, own in zip(sample.pieces, sample.mask, owned, strict=True) if flag and not own]
        if extra:
            wrong.append(f"trained beside the turns: {b''.join(extra)[:60].decode(errors='replace')!r}")
    if wrong:
        return Verdict("wrong", wrong)
    lost = [what for what in _texts(row, messages) if not any(_holds(sample.text, what[1]) for sample in read)]
    if lost and not losses:
        return Verdict("lost", [f"{where}: {text!r} is in no sample" for where, text in lost])
    return Verdict("right", list(losses))


def _places(inference: Inference, index: int, samples: list[_Sample], message: dict) -> list[_Place]:
    """Where the turn is trained, at most one place a sample: the run after the longest prompt that fits."""
    places = []
    for number, sample in enumerate(samples):
        text = sample.text
        best: tuple | None = None
        for prompt, answer in inference.turns(index):
            encoded = prompt.encode()
            if not text.startswith(encoded):
                continue
            first = sample.tokens_before(len(encoded))
            if first is None or first >= len(sample.ids) or not sample.mask[first]:
                continue
            written = answer.encode().rstrip() if answer is not None else None
            if written is not None and text[len(encoded) :].startswith(written):
                fit = 2
            else:
                fit = 1
            starts_run = first == 0 or not sample.mask[first - 1]
            rank = (fit, starts_run, len(encoded))
            if best is None or rank > best[0]:
                best = (rank, first, prompt, answer)
        if best is not None:
            (fit, *_), first, prompt, answer = best
            last = first
            while last < len(sample.ids) and sample.mask[last]:
                last += 1
            last = _end_of_turn(inference, index, sample, first, last)
            places.append(_Place(number, first, last, prompt, answer if fit == 2 else None))
    return places


def _missing(inference: Inference, index: int, samples: list[_Sample]) -> str:
    """Why a turn has no place: a token that joins prompt and answer, a mask that is off, or another context."""
    faults = set()
    for sample in samples:
        for prompt, _ in inference.turns(index):
            if sample.text.startswith(prompt.encode()):
                joined = sample.tokens_before(len(prompt.encode())) is None
                faults.add("a token joins the end of the prompt and the answer" if joined else "untrained")
    return "; ".join(sorted(faults)) or "no sample holds a prompt of inference"


def _end_of_turn(inference: Inference, index: int, sample: _Sample, first: int, last: int) -> int:
    """`last`, or where the next turn's prompt ends within the run: two answers with no header between."""
    if index + 1 >= len(inference.variants[0][0]):
        return last
    for prompt, _ in inference.turns(index + 1):
        if sample.text.startswith(prompt.encode()):
            behind = sample.tokens_before(len(prompt.encode()))
            if behind is not None and first < behind < last:
                return behind
    return last


def _turn_faults(tokenizer: Any, family: Family, samples: list[_Sample], place: _Place, message: dict) -> list[str]:
    """What is wrong with a turn that is trained after a prompt of inference."""
    sample = samples[place.sample]
    trained = b"".join(sample.pieces[place.first : place.last])
    if _MARKERS.search(tokenizer.chat_template):  # blanks behind the stop are the template's own decision
        trained = trained.rstrip()
    faults = _context_faults(tokenizer, sample, place)
    stops = [stop.encode() for stop in family.stops_of(bool(message.get("tool_calls")))]
    ended = next((stop for stop in stops if trained.endswith(stop)), None)
    if ended is None:
        bare = trained.rstrip()
        past = any(bare.endswith(stop) for stop in stops)
        faults.append("trained past the stop" if past else f"stop not trained: ends in {_tail(trained)}")
    body = trained[: -len(ended)] if ended else trained
    if place.answer is not None:
        expected = place.answer.encode()
        for stop in stops:
            expected = expected.rstrip().removesuffix(stop) if expected.rstrip().endswith(stop) else expected
        if body.rstrip() != expected.rstrip():
            faults.append(f"trained {_tail(body)} where the template writes {_tail(expected)}")
    faults += [f"{text!r} untrained" for text in _turn_texts(message, place.answer) if not _holds(trained, text)]
    if _OPEN_THINKING.search(place.prompt) and b"</think>" not in trained:
        faults.append("thinking left open")
    if not message.get("reasoning_content") and _EMPTY_THINKING.match(trained) and "</think>" not in place.prompt[-40:]:
        faults += ["empty thinking trained"] * ("enable_thinking" in tokenizer.chat_template)
    return faults


def _context_faults(tokenizer: Any, sample: _Sample, place: _Place) -> list[str]:
    """Tokens right before the turn, which must be those of the prompt tokenized alone.

    Further back, in an earlier trained turn, the split into tokens may be that of the generated ones.
    """
    prompt = tokenizer(place.prompt, add_special_tokens=False)["input_ids"]
    segment = place.first
    while segment > 0 and not sample.mask[segment - 1]:
        segment -= 1
    length = place.first - segment
    same = length == 0 or prompt[-length:] == sample.ids[segment : place.first]
    return [] if same else ["the tokens of the context are not those of inference"]


def _turn_texts(message: dict, answer: str | None) -> list[str]:
    """The row's texts that must be trained; what the template drops is lost, which is another matter."""
    texts = [message["content"].strip(), *_call_texts(message)]
    reasoning = (message.get("reasoning_content") or "").strip()
    texts += [reasoning] if reasoning else []
    return [text for text in texts if text and (answer is None or _holds(answer.encode(), text))]


def _call_texts(message: dict) -> list[str]:
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [text for f in functions for text in (f["name"], *map(str, f["arguments"].values()))]


def _texts(row: Row, messages: list[dict]) -> list[tuple[str, str]]:
    """(where, text) of everything that the row holds up to its last assistant turn."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    texts = [("tools", text) for text in TOOLS_TEXT] if row.get("tools") else []
    for index, message in enumerate(messages[: last + 1]):
        where = f"turn {index} ({message['role']})"
        found = [message["content"].strip(), (message.get("reasoning_content") or "").strip(), *_call_texts(message)]
        texts += [(where, text) for text in found if text]
    return texts


def _holds(text: bytes, wanted: str) -> bool:
    escaped = json.dumps(wanted, ensure_ascii=False)[1:-1]
    return wanted.encode() in text or escaped.encode() in text or json.dumps(wanted)[1:-1].encode() in text


def _tail(text: bytes) -> str:
    return repr(text[-40:].decode(errors="replace"))
