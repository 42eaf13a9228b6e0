"""What a row says of itself is honoured: flags of turns, variables for the template; and what is lost is named."""

import pytest

from eaft_megatron.data import encode_row
from eaft_megatron.data.layouts import canonical_row
from tests.data.marked_samples import assistant, marked, result, user
from tests.data.template_tokenizers import template_tokenizer

HEAD = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
TWO_CALLS = [
    {"id": f"c{number}", "function": {"name": "weather", "arguments": {"city": city}}}
    for number, city in enumerate(("Bonn", "Jena"))
]
ONE_CALL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if loop.first %}{{ call.function | tojson }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED_TEMPLATE = "{{ strftime_now('%Y-%m-%d') }}\n" + ONE_CALL_TEMPLATE


def texts(tokenizer, row, **options) -> list[str]:
    return [marked(tokenizer, sample) for sample in encode_row(tokenizer, canonical_row(row), **options).samples]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_that_is_switched_off_is_context(make_tokenizer, flag):
    """OpenAI's, axolotl's and ms-swift's flag: the turn stays where it is, and only the other one is trained on."""
    tokenizer = make_tokenizer(ONE_CALL_TEMPLATE)
    off, on = {**assistant("one"), **flag}, {**assistant("two"), "weight": 1}
    row = {"messages": [user("q"), off, user("r"), on]}
    [text] = texts(tokenizer, row)
    assert text.split("«")[1].split("»")[0] == "two<|im_end|>"
    assert HEAD + "one<|im_end|>" in text
    assert encode_row(tokenizer, canonical_row(row)).untrained == 1
    with pytest.raises(ValueError, match="switch every assistant turn off"):
        texts(tokenizer, {"messages": [user("q"), off]})


def test_variables_of_the_row_reach_the_template():
    """A row's enable_thinking wins over the command line's; both decide which prompt is learnt."""
    tokenizer = template_tokenizer("qwen3")
    row = {"messages": [user("q"), assistant("a")]}
    block = "<think>\n\n</think>\n\n"
    assert texts(tokenizer, row) == [f"{HEAD}{block}«a<|im_end|>»\n"]
    on = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    assert texts(tokenizer, on, chat_template_kwargs={"enable_thinking": False}) == [f"{HEAD}«{block}a<|im_end|>»\n"]


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("qwen2.5-instruct", [user("q"), assistant("a", "hm")], r"turn 1 \(assistant\): .*the thinking 'hm' out"),
        ("glm-4-0414", [{"role": "developer", "content": "D"}, user("q"), assistant("a")], r"turn 0 \(developer\): "),
    ],
)
def test_what_the_template_leaves_out_is_named(name, row, what):
    """Refused by default; kept or dropped where asked for, and named then as well."""
    tokenizer, row = template_tokenizer(name), canonical_row({"messages": row})
    with pytest.raises(ValueError, match=what + ".*--on-loss keep"):
        encode_row(tokenizer, row)
    kept, dropped = (encode_row(tokenizer, row, on_loss=choice) for choice in ("keep", "drop-row"))
    assert len(kept.samples) == 1
    assert dropped.samples == []
    assert len(kept.losses) == len(dropped.losses) == 1


def test_a_second_call_of_one_function_is_missed(make_tokenizer):
    """The name is there, the second call is not."""
    row = {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": TWO_CALLS}, result()]}
    with pytest.raises(ValueError, match="leaves the call of 'weather' out"):
        texts(make_tokenizer(ONE_CALL_TEMPLATE), row)


def test_the_date_is_pinned(make_tokenizer):
    """Samples do not depend on the day they are made."""
    [text] = texts(make_tokenizer(DATED_TEMPLATE), {"messages": [user("q"), assistant("a")]})
    assert text.startswith("2025-01-01\n")


def test_a_prompt_that_opens_thinking(make_tokenizer):
    """DeepSeek-R1's kind: the row's thinking follows the open tag; without any it is refused, or closed at once."""
    template = ONE_CALL_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(template)
    assert texts(tokenizer, {"messages": [user("q"), assistant("a", "hm")]}) == [
        f"{HEAD}<think>\n«hm\n</think>\n\na<|im_end|>»\n"
    ]
    with pytest.raises(ValueError, match="opens thinking.*--empty-thinking close"):
        texts(tokenizer, {"messages": [user("q"), assistant("a")]})
    closed = texts(tokenizer, {"messages": [user("q"), assistant("a")]}, empty_thinking="close")
    assert closed == [f"{HEAD}<think>\n«\n</think>\n\na<|im_end|>»\n"]


def test_a_closing_tag_ends_no_turn(make_tokenizer):
    """GLM-4.5's kind: "</tool_call>" is an added token; what the template writes next is where the model stops."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
        "{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<|assistant|>", "<|user|>", "<|tool|>"])
    row = {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": TWO_CALLS[:1]}]}
    [text] = texts(tokenizer, row)
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call><|tool|>'
    assert text == f"<|user|>q<|assistant|>«{written}»"
