"""An assistant turn in a chat template's text: the prompt it answers, what the assistant writes, what ends it.

- The prompt is what the template writes for the turns before, with its generation prompt: what a server would send.
- What the assistant writes is what the template writes behind that prompt for the turn, as the last of its
  conversation. Of several views in which it does, the one that loses least is taken, then the longest prompt: thinking
  that inference opens or closes in the prompt is not trained on.
- The turn ends with the token at which the model stops: the added token that the template writes last, unless it
  closes an element that the turn itself opened ("</tool_call>"); else the one that it writes before what follows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from eaft_megatron.data.texts import Text, is_in, tool_texts, turn_texts
from eaft_megatron.data.views import THINKING, Message, View, views_of

_NAME = re.compile(r"\w[\w:]*")
_EMPTY_THINKING = re.compile(
    r"\s*(?:" + "|".join(re.escape(a) + r"\s*" + re.escape(b) for a, b in THINKING.items()) + ")"
)


@dataclass(frozen=True)
class Turn:
    """An assistant turn, rendered as the last of its conversation.

    `text`: the conversation up to and with turn `index`. The assistant wrote `text[start:stop]`, the token that ends
    the turn included where `ended`; blanks behind lie outside. `lost`: texts of the turn that are not in there.
    """

    index: int
    text: str
    start: int
    stop: int
    ended: bool
    lost: tuple[Text, ...] = ()

    def ended_by(self, token: str | None) -> Turn:
        """The turn with `token` behind it, if nothing ends it yet."""
        if self.ended or token is None:
            return self
        text = self.text + token
        return replace(self, text=text, stop=len(text), ended=True)

    @property
    def kept(self) -> str:
        """What a longer conversation must begin with to hold this turn unchanged."""
        return self.text[: self.stop]


class Conversation:
    """Renderings of the beginnings of one conversation, each made once."""

    def __init__(
        self, tokenizer: Any, messages: list[Message], tools: list | None, variables: dict[str, Any] | None = None
    ) -> None:
        self.messages = messages
        self._tokenizer = tokenizer
        self._tools = tools
        template = tokenizer.get_chat_template(tools=tools)
        self._views = views_of(template, messages, variables or {})
        self._texts: dict[tuple[int, int, bool], str | ValueError] = {}
        self._added = set(tokenizer.get_added_vocab())
        self._context: dict[int, list[Text]] = {}

    def apply(self, count: int, where: str, view: View | None = None, **options: Any) -> Any:
        """The chat template on the first `count` messages; `where` begins the ValueError if it fails."""
        view = view or self._views[0]
        return self._apply(view.until(count), where, view, **options)

    def _apply(self, messages: list[Message], where: str, view: View, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=self._tools, **{**view.variables, **options})
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error

    def render(self, count: int, view: int = 0, *, prompt: bool = False) -> str:
        """The first `count` messages as text, with the generation prompt or without."""
        if count == 0:
            return ""
        key = (count, view, prompt)
        if key not in self._texts:
            where = "messages" if count == len(self.messages) else self._where(count - 1)
            options = {"tokenize": False, **({"add_generation_prompt": True} if prompt else {})}
            try:
                self._texts[key] = self.apply(count, where, self._views[view], **options)
            except ValueError as error:
                self._texts[key] = error
        text = self._texts[key]
        if isinstance(text, ValueError):
            raise text
        return text

    def turn(self, index: int, *, empty_thinking: str = "error") -> Turn:
        """Assistant turn `index`, in the view that suits it best.

        Raises:
            ValueError: in no view does the template write prompt and answer one behind the other, or it ignores
                add_generation_prompt although it writes a header, or nothing of the turn is left.
        """
        best: tuple[tuple, int, str, str] | None = None
        failure: ValueError | None = None
        texts = turn_texts(index, self.messages[index])
        for view in range(len(self._views)):
            try:
                prompt, text = self._answered(index, view, texts, empty_thinking == "close")
            except ValueError as error:
                failure = failure or error
                continue
            written = text[len(prompt) :]
            lost = sum(not is_in(item, written) for item in texts)
            if texts and lost == len(texts):
                failure = failure or _nothing_left(texts[0])
                continue
            context = sum(not is_in(item, prompt) for item in self._context_of(index))
            thinks = any(item.what.startswith("the thinking") for item in texts)
            opened = _left_open(prompt, written)
            empty = not thinks and _EMPTY_THINKING.match(written) is not None
            key = (lost + context, opened, empty, len(written))
            if best is None or key < best[0]:
                best = key, view, prompt, text
            if not (lost or context or opened or empty) and _begins(written, texts):
                break
        if best is None:
            raise failure or self.ambiguous(index)
        (_, opened, *_), view, prompt, text = best
        if opened:
            raise ValueError(
                f"{self._where(index)}: the generation prompt opens thinking ({prompt[-12:]!r}) that this turn does "
                "not have; add its 'reasoning_content', give a template whose prompt does not with --chat-template "
                "FILE, or train the model to close it at once: --empty-thinking close"
            )
        return self._ended(index, view, prompt, text, texts)

    def _answered(self, index: int, view: int, texts: list[Text], close: bool) -> tuple[str, str]:
        """The prompt of a turn, and prompt and answer; ValueError where they do not fit together."""
        prompt = self.render(index, view, prompt=True)
        text = self.render(index + 1, view)
        if not text.startswith(prompt):
            text = self._with_thinking(index, prompt, text, close)
        written = text[len(prompt) :]
        first = texts[0].text if texts else ""
        headed = not written.lstrip().startswith(first) if first else self.messages[index]["role"] in written
        if headed and prompt == self.render(index, view) and not _is_thought(written):
            raise ValueError(
                f"{self._where(index)}: the chat template ignores add_generation_prompt: its role header "
                f"{written[:30]!r} would be trained; give a template that writes one with --chat-template FILE"
            )
        return prompt, text

    def _with_thinking(self, index: int, prompt: str, text: str, close: bool) -> str:
        """`text` with the row's thinking where the prompt opens it and the template, for a finished turn, does not."""
        tag = next((tag for tag in THINKING if prompt.rstrip().endswith(tag)), None)
        before = prompt.rstrip().removesuffix(tag or "")
        if tag is None or not text.startswith(before):
            raise self.ambiguous(index)
        reasoning, answer = self.messages[index].get("reasoning_content"), text[len(before) :].lstrip()
        if reasoning is None and not close:
            return prompt + answer
        return f"{prompt}{(reasoning or '').strip()}\n{THINKING[tag]}\n\n{answer}"

    def _context_of(self, index: int) -> list[Text]:
        """What the prompt of a turn must hold, the thinking of earlier turns aside."""
        if index not in self._context:
            texts = tool_texts(self._tools)
            for number, message in enumerate(self.messages[:index]):
                texts += turn_texts(number, message, thinking=message["role"] != "assistant")
            self._context[index] = texts
        return self._context[index]

    def lost_context(self, index: int, written: list[str]) -> list[Text]:
        """What the conversation before turn `index` holds, and none of the texts `written` does."""
        return [text for text in self._context_of(index) if not any(is_in(text, sample) for sample in written)]

    def _ended(self, index: int, view: int, prompt: str, text: str, texts: list[Text]) -> Turn:
        """The turn with the token that ends it, which may have to be taken from what the template writes next."""
        stripped = text.rstrip()
        last = self._last_token(stripped)
        if last and len(stripped) > len(prompt) and not self._closes(last, stripped[len(prompt) :]):
            stop, ended = len(stripped), True
        elif following := self._following(index, view, text, len(prompt)):
            text += following
            stop, ended = len(text), True
        else:
            stop, ended = len(text), False
        written = text[len(prompt) : stop]
        lost = tuple(item for item in texts if not is_in(item, written))
        return Turn(index, text, len(prompt), stop, ended, lost)

    def _last_token(self, text: str) -> str:
        return max((token for token in self._added if text.endswith(token)), key=len, default="")

    def _closes(self, token: str, written: str) -> bool:
        """Whether a token closes an element that the turn has opened: another added token of the same name."""
        name = _NAME.search(token)
        return name is not None and any(
            other != token and (match := _NAME.search(other)) is not None and match[0] == name[0] and other in written
            for other in self._added
        )

    def _following(self, index: int, view: int, text: str, start: int) -> str:
        """The added token that the template writes right behind the turn when the conversation goes on; "" if none."""
        shown = self._views[view]
        calls = self.messages[index].get("tool_calls") or []
        result = "observation" if any("metadata" in message for message in shown.messages) else "tool"
        probe: Message = {"role": result if calls else "user", "content": "0"}
        if calls:
            function = calls[-1].get("function") or calls[-1]
            probe |= {"name": function.get("name"), "tool_call_id": calls[-1].get("id", "")}
        try:
            longer = self._apply([*shown.until(index + 1), probe], "", shown, tokenize=False)
        except ValueError:
            return ""
        # Earlier thinking may be gone there, so the turn's last characters are looked for, of which fewer may do.
        written = text[start:]
        for tail in (text, *(written[-size:] for size in (60, 20, 8, 3))):
            at = longer.rfind(tail) if tail.strip() else -1
            if at >= 0:
                behind = longer[at + len(tail) :]
                blanks = behind[: len(behind) - len(behind.lstrip())]
                token = max((t for t in self._added if behind.startswith(blanks + t)), key=len, default="")
                return blanks + token if token else ""
        return ""

    def ambiguous(self, index: int) -> ValueError:
        """The error for a turn that cannot be told from the rest."""
        return ValueError(
            f"{self._where(index)}: the chat template renders this turn, or what precedes it, differently inside the "
            "whole conversation than in the prompt that the model answers, under every switch that it has, so its "
            "tokens cannot be told apart; give a template that does not with --chat-template FILE"
        )

    def _where(self, index: int) -> str:
        return f"turn {index} ({self.messages[index]['role']})"


def _left_open(prompt: str, written: str) -> bool:
    """Whether the prompt ends inside thinking that the answer does not close."""
    tag = next((tag for tag in THINKING if prompt.rstrip().endswith(tag)), None)
    return tag is not None and THINKING[tag] not in written


def _nothing_left(text: Text) -> ValueError:
    return ValueError(
        f"{text.lost()}, and nothing of the turn is left to train on; give a template that writes it with "
        "--chat-template FILE, or leave such rows out with --on-error skip"
    )


def _is_thought(written: str) -> bool:
    return written.lstrip().startswith(tuple(THINKING))


def _begins(written: str, texts: list[Text]) -> bool:
    """Whether the first text of the turn stands at its very beginning, so that no other prompt could be longer."""
    return not texts or written.lstrip().startswith(texts[0].text)
