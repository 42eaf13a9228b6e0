"""What the judge knows of model families: which tokens they have beside the vocabulary, and at which they stop.

Tokens are those that the templates themselves name; stops are what the families' documentation and templates say, not
read from each model's generation_config.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """`signature`: what only this family's templates hold. `stops`: tokens at which generation ends.

    `call_stops`: those that may end a turn with calls, and `answer_stops` one without, where that differs.
    """

    signature: str
    stops: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    call_stops: tuple[str, ...] = ()
    answer_stops: tuple[str, ...] = ()

    def stops_of(self, calls: bool) -> tuple[str, ...]:
        return (self.call_stops if calls else self.answer_stops) or self.stops

    @property
    def eos_token(self) -> str:
        return self.eos or self.stops[0]


_GLM = {"call_stops": ("<|observation|>",), "answer_stops": ("<|user|>", "<|endoftext|>")}
_GLM_STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")
_DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>"}

# The first whose signature (a regular expression) the template holds.
FAMILIES = (
    Family(r"<\|return\|>", ("<|return|>", "<|call|>"), call_stops=("<|call|>",), answer_stops=("<|return|>",)),
    Family(r"atem:function_calls", ("<|eot|>", "<|eom|>"), bos="<|begin_of_text|>"),
    Family(r"hy_Assistant|hy_place", ("<｜hy_eos:opensource｜>",), bos="<｜hy_begin_of_sentence:opensource｜>"),
    Family(r"<\|end_of_msg\|>", ("<|end_of_msg|>",)),
    Family(r"<\|observation\|>", _GLM_STOPS, eos="<|endoftext|>", **_GLM),
    Family(r"<\|turn>", ("<turn|>", "<|tool_response>"), bos="<bos>", eos="<eos>"),
    Family(r"<end_of_turn>", ("<end_of_turn>",), bos="<bos>", eos="<eos>"),
    Family(r"<\|Bot\|>", ("<｜end▁of▁sentence｜>",), bos="<｜start▁of▁sentence｜>"),
    Family(r"<\|end_of_sentence\|>|cls_token", ("<|end_of_sentence|>",), bos="<|begin_of_sentence|>"),
    Family(r"<｜Assistant｜>|DSML", ("<｜end▁of▁sentence｜>",), **_DEEPSEEK),
    Family(r"\[e~\[", ("[e~[",), bos="]~!b["),
    Family(r"<end_of_sentence>", ("<end_of_sentence>",)),
    Family(r"<\|message_sep\|>", ("<|message_sep|>",), bos="<s>"),
    Family(r"<seed:eos>|seed:think", ("<seed:eos>",), bos="<seed:bos>"),
    Family(r"<\|assistant_end\|>", ("<|assistant_end|>", "<|tools_suffix|>"), bos="<s>"),
    Family(r"<\|role_end\|>", ("<|role_end|>",)),
    Family(r"<\|END_OF_TURN_TOKEN\|>", ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>"),
    Family(r"<\|end_of_role\|>", ("<|end_of_text|>",)),
    Family(r"〈\|EOS\|〉|</assistant>", ("</assistant>",), bos="〈|EOS|〉", eos="〈|EOS|〉"),
    Family(r"human: |<sep>", ("<sep>",)),
    Family(r"<SPECIAL_1[0-2]>", ("<SPECIAL_12>",), bos="<s>"),
    Family(r"<\|calls\|>", ("<|end|>", "<|calls|>")),
    Family(r"<\|begin_assistant\|>", ("<|end|>",), bos="<s>", eos="<|end|>"),
    Family(r"<\|im_end\|>", ("<|im_end|>",), bos="<|startoftext|>"),
    Family(r"<\|start_header_id\|>", ("<|eot_id|>", "<|eom_id|>"), bos="<|begin_of_text|>"),
    Family(r"<\|end\|>", ("<|end|>", "<|endoftext|>"), bos="<s>", eos="<|endoftext|>"),
    Family(r"<end_of_utterance>", ("<end_of_utterance>",), bos="<|im_start|>"),
    Family(r"\[INST\]", ("</s>",), bos="<s>"),
    Family(r"User: ", ("\n\n",), bos="<s>", eos="</s>"),
    Family(r"Assistant: ", ("</s>",), bos="<s>"),
)
_UNKNOWN = Family("", ("<|endoftext|>",))

# Tokens of a family's own beside the text: <|name|>, <｜name｜> and the like. Markup of words is text, except what
# models have as added, not special tokens.
_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}+]+\|>|<｜[^｜{}+]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS"
    r"|SYSTEM_PROMPT|ARGS|CALL_ID|TOOL_CONTENT|IMG|gMASK|e~)\]|\[e~\[|\]~!?b[\[\]]|<sop>|</?s>|<(?:start|end)_of_turn>"
    r"|<SPECIAL_\d+>|<(?:beginning|end)_of_sentence>|<seed:[be]os>|<end_of_utterance>|<sep>|<begin_of_document>"
)
_ADDED = re.compile(
    r"</?think>|</?tool_call>|</?tool_response>|</?arg_(?:key|value)>|</?seed:(?:think|tool_call)>|\[/?THINK\]"
    r"|</?minimax:tool_call>|</?mm:think>|</?(?:assistant|role)>|〈\|EOS\|〉"
)


def family_of(template: str) -> Family:
    return next((family for family in FAMILIES if re.search(family.signature, template)), _UNKNOWN)


def added_tokens(template: str) -> tuple[list[str], list[str]]:
    """(special, added but not special) tokens that a tokenizer of the template's family has."""
    family = family_of(template)
    stops = [stop for stop in family.stops if stop.strip()]
    special = {*_SPECIAL.findall(template), *stops, family.eos_token.strip(), *([family.bos] if family.bos else [])}
    if "hy_Assistant" in template:
        special |= {f"<｜hy_{name}:opensource｜>" for name in ("User", "Assistant", "eos", "begin_of_sentence")}
        special |= {"<think:opensource>", "</think:opensource>"}
    added = set(_ADDED.findall(template)) - special
    if "<tool_response>" in added and "reasoning_content" not in template and "<think>" not in template:
        added -= {"<tool_response>", "</tool_response>"}  # Qwen2.5 writes these as text
    return sorted(special - {""}), sorted(added)
