"""Which tokens of a conversation are trained on, checked by decoding them."""

import re

import pytest

from eaft_megatron.data import EncodedSample, encode_row, encode_text

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
# Thinking is shown in the last turn only, as reasoning models' templates do.
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['thinking'] is defined and loop.last %}{{ '[' + message['thinking'] + ']' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
TOOLS_TEMPLATE = "{% if tools %}{{ 'tools:' + tools[0]['name'] + '\n' }}{% endif %}" + THINKING_TEMPLATE
NO_END_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **extra):
    return {"role": "assistant", "content": content, **extra}


def encode_chat(tokenizer, messages, tools=None) -> EncodedSample:
    """A conversation that one sample holds."""
    row = encode_row(tokenizer, {"messages": messages, "tools": tools})
    [sample] = row.samples
    assert not row.split
    return sample


def trained(tokenizer, sample: EncodedSample) -> list[str]:
    """The decoded runs of trained tokens."""
    runs, previous = [], False
    for token, flag in zip(sample.input_ids, sample.labels_mask, strict=True):
        if flag:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in runs]


def test_multi_turn_trains_answers_and_end_tokens_only(tokenizer):
    """Each answer with its end token, no header, no newline behind either; the ids are the template's own."""
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("one"), user("b"), assistant("two\n\nlines")]
    sample = encode_chat(tokenizer, messages)
    assert trained(tokenizer, sample) == ["one<|im_end|>", "two\n\nlines<|im_end|>"]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert sample.input_ids == expected
    assert all(type(token) is int for token in sample.input_ids)
    assert all(type(flag) is bool for flag in sample.labels_mask)


def test_default_system_turn_is_kept_and_not_trained(tokenizer):
    """The template's default system turn stands in front and shifts nothing."""
    sample = encode_chat(tokenizer, [user("hi"), assistant("hello")])
    assert tokenizer.decode(sample.input_ids).startswith(SYSTEM + "<|im_start|>user\nhi<|im_end|>\n")
    assert trained(tokenizer, sample) == ["hello<|im_end|>"]


@pytest.mark.parametrize(
    "content", ["", " ", "\n", " 你好 🙂🙂 ", "é\u2028x", "tail  ", "\n\nlead", "<|im_end|>", "🙂"]
)
def test_exact_content_is_trained(tokenizer, content):
    """Empty, blank, multi-byte and untrimmed answers: exactly the content and the end token."""
    sample = encode_chat(tokenizer, [user("q"), assistant(content), user("r"), assistant("x")])
    assert trained(tokenizer, sample) == [content + "<|im_end|>", "x<|im_end|>"]


def test_two_assistant_turns_in_a_row(tokenizer):
    """A header between two assistant turns is not trained on."""
    sample = encode_chat(tokenizer, [user("q"), assistant("x"), assistant("y")])
    assert trained(tokenizer, sample) == ["x<|im_end|>", "y<|im_end|>"]


def test_prompt_and_answer_are_tokenized_apart(make_tokenizer):
    """A tokenizer that would join the header's newline with the answer's: inference never sees that token."""
    tokenizer = make_tokenizer(merges=(("Ċ", "Ċ"),))
    sample = encode_chat(tokenizer, [user("q"), assistant("\n\nab")])
    assert trained(tokenizer, sample) == ["\n\nab<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_header_that_ends_in_a_blank(make_tokenizer, trim_offsets):
    """Tokenizers may trim blanks off their offsets: header blanks stay header, the answer's are trained."""
    tokenizer = make_tokenizer(NO_END_TEMPLATE.replace("[assistant]", "[assistant] "), trim_offsets=trim_offsets)
    tokenizer.chat_template = tokenizer.chat_template.replace("+ ']' +", "+ '] ' +")
    assert trained(tokenizer, encode_chat(tokenizer, [user("q"), assistant("x y ")])) == ["x y "]


@pytest.mark.parametrize("content", ["plain", "end 🙂", "", "🙂"])
def test_generation_markers_are_taken_at_their_word(make_tokenizer, content):
    """The marked span is trained, the unmarked end token is not; a last character of several tokens is whole."""
    tokenizer = make_tokenizer(MARKED_TEMPLATE)
    sample = encode_chat(tokenizer, [user("q"), assistant(content), user("r"), assistant("z")])
    assert trained(tokenizer, sample) == [text for text in (content, "z") if text]


def test_tools_reach_the_template_only_when_given(make_tokenizer):
    """tools=None is the same as no tools at all."""
    tokenizer = make_tokenizer(TOOLS_TEMPLATE)
    messages = [user("q"), assistant("x")]
    without = tokenizer.decode(encode_chat(tokenizer, messages).input_ids)
    with_tools = encode_chat(tokenizer, messages, tools=[{"name": "f"}])
    assert tokenizer.decode(with_tools.input_ids) == "tools:f\n" + without
    assert trained(tokenizer, with_tools) == ["x<|im_end|>"]


def test_template_without_end_token_keeps_trailing_blanks(make_tokenizer):
    """Where no token ends the turn, blanks at its end are the answer's own."""
    tokenizer = make_tokenizer(NO_END_TEMPLATE)
    assert trained(tokenizer, encode_chat(tokenizer, [user("q"), assistant("x \n")])) == ["x \n"]


def test_template_that_drops_earlier_thinking_splits_the_row(make_tokenizer):
    """Turn 1 is rendered differently once turn 3 follows: it gets a sample of its own, with its thinking."""
    tokenizer = make_tokenizer(THINKING_TEMPLATE)
    messages = [user("q"), assistant("x", thinking="hm"), user("r"), assistant("y", thinking="ho")]
    row = encode_row(tokenizer, {"messages": messages})
    assert row.split
    assert [trained(tokenizer, sample) for sample in row.samples] == [["[hm]x<|im_end|>"], ["[ho]y<|im_end|>"]]


def test_template_without_generation_prompt_is_refused(make_tokenizer):
    """Its role header would be trained on."""
    tokenizer = make_tokenizer(NO_PROMPT_TEMPLATE)
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\): .*ignores add_generation_prompt"):
        encode_chat(tokenizer, [user("q"), assistant("x")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list, found []"),
        ("hi", "messages must be a non-empty list, found 'hi'"),
        ([user("q"), "x"], "turn 1: expected an object with a 'role' string, found 'x'"),
        ([{"content": "x"}], "turn 0: expected an object with a 'role' string"),
        ([user("q"), {"role": "assistant"}], "turn 1 (assistant): no 'content' and no 'tool_calls'"),
        ([user("q"), assistant(3)], "the chat template failed: TypeError"),
        ([assistant("x")], "no assistant turn that answers something: nothing to train on (roles: assistant)"),
        ([user("q")], "no assistant turn that answers something: nothing to train on (roles: user)"),
    ],
)
def test_bad_messages(tokenizer, messages, message):
    """Every malformed conversation is a ValueError that says what is wrong and where."""
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_chat(tokenizer, messages)


def test_tokenizer_without_template(make_tokenizer):
    """A base model's tokenizer may have no template."""
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(make_tokenizer(None), [user("q"), assistant("x")])


def test_text_trains_every_token_but_the_first(tokenizer):
    """Plain text: nothing predicts the first token."""
    sample = encode_text(tokenizer, "añb")
    assert tokenizer.decode(sample.input_ids) == "añb"
    assert sample.labels_mask == [False, True, True, True]
    assert encode_text(tokenizer, "") == EncodedSample([], [])
