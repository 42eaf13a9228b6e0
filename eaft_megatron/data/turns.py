"""Where in a chat template's text an assistant turn begins and ends, found by rendering the conversation up to it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

Message = dict[str, Any]


class UnwrittenCallsError(ValueError):
    """The chat template leaves tool calls out."""


@dataclass(frozen=True)
class Turn:
    """An assistant turn, rendered as the last of its conversation.

    `text`: the conversation up to and with turn `index`. The assistant wrote `text[start:stop]`; blanks behind the
    end-of-turn token lie outside. `end_tokens`: where no token ends the turn, what may end it.
    """

    index: int
    text: str
    start: int
    stop: int
    end_tokens: tuple[str, ...]

    @property
    def kept(self) -> str:
        """What a longer conversation must begin with to hold this turn unchanged."""
        return self.text[: self.stop]

    def span_in(self, text: str) -> tuple[int, int]:
        """The assistant's characters in `text`, which begins with `kept`.

        A turn that no token ends (GLM-4) is ended by the special token of the header behind it: the model writes it.
        """
        following = [token for token in self.end_tokens if text.startswith(token, self.stop)]
        return self.start, self.stop + max(map(len, following), default=0)


class Conversation:
    """Renderings of the beginnings of one conversation, each made once."""

    def __init__(self, tokenizer: Any, messages: list[Message], tools: list | None) -> None:
        self.messages = messages
        self._tokenizer = tokenizer
        self._tools = tools
        self._texts: dict[int, str] = {}
        self._block: str | None = None

    def apply(self, count: int, where: str, **options: Any) -> Any:
        """The chat template on the first `count` messages; `where` begins the ValueError if it fails."""
        try:
            return self._tokenizer.apply_chat_template(self.messages[:count], tools=self._tools, **options)
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error

    def render(self, count: int) -> str:
        """The first `count` messages as text, without a generation prompt."""
        if count == 0:
            return ""
        if count not in self._texts:
            where = "messages" if count == len(self.messages) else self._where(count - 1)
            self._texts[count] = self.apply(count, where, tokenize=False)
        return self._texts[count]

    def turn(self, index: int) -> Turn:
        """Assistant turn `index`: what the template writes after its generation prompt for the turns before.

        Raises:
            ValueError: nothing before it; a template that writes something else than prompt and answer, ignores
                add_generation_prompt although it writes a header, or leaves tool calls out (`UnwrittenCallsError`).
        """
        where = self._where(index)
        if index == 0:
            raise ValueError(f"{where}: a conversation cannot begin with the assistant: there is no prompt to answer")
        prompt = self.apply(index, where, tokenize=False, add_generation_prompt=True)
        text = self.render(index + 1)
        stripped = text.rstrip()
        ended = len(stripped) > len(prompt) and stripped.endswith(self._added_tokens)
        stop = len(stripped if ended else text)  # behind an end-of-turn token only blanks follow
        if not (text.startswith(prompt) and len(prompt) <= stop):
            raise self.ambiguous(index)
        start = len(prompt)
        if "enable_thinking" in self._tokenizer.get_chat_template(tools=self._tools):
            block = self._empty_thinking(index, prompt)
            start += len(block) if text.startswith(block, start) else 0
        self._check_written(index, prompt, text[start:stop])
        # The header of a further assistant turn ends none: the model would go on and on.
        ended = ended or (index + 1 < len(self.messages) and self.messages[index + 1]["role"] == "assistant")
        return Turn(index, text, start, stop, () if ended else self._added_tokens)

    def check_calls(self) -> None:
        """`UnwrittenCallsError` where the text of the whole conversation has no trace of a call."""
        for index, message in enumerate(self.messages):
            for call in message.get("tool_calls") or []:
                self._check_call(index, call, self.render(len(self.messages)))

    def check_tool_results(self) -> None:
        """ValueError where the template writes nothing for the first results of tools."""
        first = next((i for i, message in enumerate(self.messages) if message["role"] == "tool"), None)
        if not first:
            return
        behind = first
        while behind < len(self.messages) and self.messages[behind]["role"] == "tool":
            behind += 1
        if self.render(behind) == self.render(first):
            raise ValueError(f"turn {first} (tool): the chat template leaves the results of tools (role 'tool') out")

    def ambiguous(self, index: int) -> ValueError:
        """The error for a turn that cannot be told from the rest."""
        return ValueError(
            f"{self._where(index)}: the chat template renders this turn, or what precedes it, differently inside the "
            "whole conversation than on its own (some templates drop earlier thinking or add a default system turn), "
            "so its tokens cannot be told apart; use a template with {% generation %} markers or one row per assistant "
            "turn"
        )

    def _where(self, index: int) -> str:
        return f"turn {index} ({self.messages[index]['role']})"

    @cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        return tuple(self._tokenizer.get_added_vocab())

    def _empty_thinking(self, index: int, prompt: str) -> str:
        """What enable_thinking=False adds to the generation prompt: thinking that the model is not asked to write."""
        if self._block is None:
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            off = self.apply(index, self._where(index), **options)
            self._block = off[len(prompt) :] if off.startswith(prompt) else ""
        return self._block

    def _check_call(self, index: int, call: Message, text: str) -> None:
        name = (call.get("function") or call).get("name")
        if not isinstance(name, str) or name not in text:
            raise UnwrittenCallsError(f"{self._where(index)}: the chat template leaves the call of {name!r} out")

    def _check_written(self, index: int, prompt: str, written: str) -> None:
        message = self.messages[index]
        for call in message.get("tool_calls") or []:
            self._check_call(index, call, written)
        content = message.get("content")
        if not isinstance(content, str):
            return
        # What stands before the answer may be thinking tags, or a header that the prompt should have held.
        answer = content.strip()
        preceded = not written.lstrip().startswith(answer) if answer else message["role"] in written
        if preceded and prompt == self.render(index):
            raise ValueError(
                f"{self._where(index)}: the chat template ignores add_generation_prompt: its role header would be "
                "trained"
            )
