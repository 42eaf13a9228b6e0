"""Golden tests: which characters real chat templates make the assistant's, written out by hand between « and »."""

import pytest

from eaft_megatron.data import encode_row
from eaft_megatron.data.layouts import canonical_row
from tests.data.marked_samples import assistant, marked, result, user
from tests.data.template_tokenizers import ADDED, TEMPLATES, template_tokenizer

QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
RESULT = "<|im_start|>user\n<tool_response>\n7°\n</tool_response><|im_end|>\n"


@pytest.fixture(scope="module")
def load():
    """A tokenizer by its template's name."""
    return template_tokenizer


def encoded(tokenizer, *messages, tools=None, **options) -> list[str]:
    row = encode_row(tokenizer, canonical_row({"messages": list(messages), "tools": tools}), **options)
    assert row.split == (len(row.samples) > 1)
    return [marked(tokenizer, sample) for sample in row.samples]


def system(content):
    return {"role": "system", "content": content}


def call(reasoning=None, content=None):
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    message = {"role": "assistant", "content": content, "tool_calls": [{"id": "c", "function": function}]}
    return {**message, "reasoning_content": reasoning}


@pytest.mark.parametrize(("name", "default"), [("qwen2.5-instruct", QWEN_SYSTEM), ("smollm2-instruct", SMOL_SYSTEM)])
def test_chatml(load, name, default):
    """Answers with their end token; headers, newlines and system turns are not trained on."""
    tokenizer = load(name)
    assert encoded(tokenizer, user("q"), assistant("one"), user("r"), assistant("two\n\nlines ")) == [
        default + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«one<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«two\n\nlines <|im_end|>»\n"
    ]
    assert encoded(tokenizer, system("S"), user("q"), assistant("")) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"
    ]
    assert encoded(tokenizer, user("q"), assistant("x"), assistant("y"), user("left out")) == [
        default + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«x<|im_end|>»\n"
        "<|im_start|>assistant\n«y<|im_end|>»\n"
    ]


def test_qwen25_tools(load):
    """A call is trained on with its tags and end token; the tools and the result are not."""
    expected = (
        "<|im_start|>system\nS\n\n" + QWEN_TOOLS + "<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\n«{CALL}<|im_end|>»\n{RESULT}<|im_start|>assistant\n«7 degrees<|im_end|>»\n"
    )
    tokenizer = load("qwen2.5-instruct")
    row = (system("S"), user("q"), call(), result(), assistant("7 degrees"))
    assert encoded(tokenizer, *row, tools=TOOLS) == [expected]
    with_content = encoded(tokenizer, user("q"), call(content="I look."))
    assert with_content == [
        QWEN_SYSTEM + f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«I look.\n{CALL}<|im_end|>»\n"
    ]


def test_qwen3_thinking_splits_the_row(load):
    """Earlier thinking is dropped from the second sample, as when the model answers; each turn is trained on once."""
    row = (user("q"), assistant("one", "hm"), user("r"), assistant("two", "so"))
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    first = head + "«<think>\nhm\n</think>\n\none<|im_end|>»\n"
    second = (
        head + "one<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nso\n</think>\n\ntwo<|im_end|>»\n"
    )
    tokenizer = load("qwen3")
    assert encoded(tokenizer, *row) == [first, second]
    assert encoded(tokenizer, *row, train_on="last") == [second]
    inline = (user("q"), assistant("<think>\nhm\n</think>\n\none"), user("r"), assistant("<think>so</think>two"))
    assert encoded(tokenizer, *inline) == [first, second]


def test_qwen3_without_thinking_is_non_thinking_mode(load):
    """The empty block that the template puts before the last answer is the prompt of enable_thinking=False."""
    tokenizer = load("qwen3")
    block = "<think>\n\n</think>\n\n"
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    tail = f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{block}"
    assert encoded(tokenizer, user("q"), assistant("one"), user("r"), assistant("two")) == [
        head + block + "«one<|im_end|>»\n",
        head + "one<|im_end|>\n" + tail + "«two<|im_end|>»\n",
    ]
    prompt = tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True)
    assert prompt == head
    quiet = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    assert tokenizer.apply_chat_template([user("q")], **quiet) == head + block
    assert encoded(tokenizer, user("q"), assistant(""), user("r"), assistant("")) == [
        head + block + "«<|im_end|>»\n",
        head + "<|im_end|>\n" + tail + "«<|im_end|>»\n",
    ]


def test_qwen3_keeps_the_turns_of_one_question_together(load):
    """Thinking stays in the text between a call and the answer: one sample; only the question before splits off."""
    tokenizer = load("qwen3")
    row = (user("p"), assistant("zero", "ah"), user("q"), call("hm"), result(), assistant("7 degrees", "so"))
    tools = "<|im_start|>system\n" + QWEN_TOOLS
    first = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(tokenizer, *row, tools=TOOLS) == [
        tools + first + "«<think>\nah\n</think>\n\nzero<|im_end|>»\n",
        tools + first + "zero<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\n«<think>\nhm\n</think>\n\n{CALL}<|im_end|>»\n{RESULT}"
        "<|im_start|>assistant\n«<think>\nso\n</think>\n\n7 degrees<|im_end|>»\n",
    ]


def test_qwen3_tools_without_thinking(load):
    """The call, rendered as the last turn, has the empty block; within the row it has none: two samples."""
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    block = "<think>\n\n</think>\n\n"
    assert encoded(load("qwen3"), user("q"), call(), result(), assistant("7 degrees")) == [
        f"{head}{block}«{CALL}<|im_end|>»\n",
        f"{head}{CALL}<|im_end|>\n{RESULT}<|im_start|>assistant\n{block}«7 degrees<|im_end|>»\n",
    ]


def test_glm4(load):
    """The header ends without a newline, so the model writes it; the next header's token ends a turn."""
    tokenizer = load("glm-4-0414")
    row = (system("S"), user("q"), assistant("one"), user("r"), assistant("two"))
    assert encoded(tokenizer, *row) == [
        "[gMASK]<sop><|system|>\nS<|user|>\nq<|assistant|>«\none<|user|>»\nr<|assistant|>«\ntwo<|user|>»"
    ]
    assert encoded(tokenizer, *row, train_on="last") == [
        "[gMASK]<sop><|system|>\nS<|user|>\nq<|assistant|>\none<|user|>\nr<|assistant|>«\ntwo<|user|>»"
    ]
    assert encoded(tokenizer, user("q"), assistant(""), user("r"), assistant("x")) == [
        "[gMASK]<sop><|user|>\nq<|assistant|>«\n<|user|>»\nr<|assistant|>«\nx<|user|>»"
    ]
    assert encoded(tokenizer, user("q"), assistant("x"), assistant("y")) == [
        "[gMASK]<sop><|user|>\nq<|assistant|>«\nx<|user|>»",
        "[gMASK]<sop><|user|>\nq<|assistant|>\nx<|assistant|>«\ny<|user|>»",
    ]


def test_glm4_tools(load):
    """Calls and results take the template's metadata and observation form; the observation's token ends a call."""
    schema = '{\n    "name": "weather",\n    "parameters": {\n        "type": "object"\n    }\n}'
    head = (
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n## weather\n\n{schema}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\nq<|assistant|>"
    )
    tokenizer = load("glm-4-0414")
    row = (user("q"), call(content="I look."), result(), assistant("7 degrees"))
    written = 'weather \n{"city": "Köln"}<|observation|>'
    tail = "\n7°<|assistant|>«\n7 degrees<|user|>»"
    assert encoded(tokenizer, *row, tools=TOOLS) == [f"{head}«\nI look.<|assistant|>{written}»{tail}"]
    plain = (user("q"), call(), result(), assistant("7 degrees"))
    assert encoded(tokenizer, *plain, tools=TOOLS) == [f"{head}«{written}»{tail}"]
    only_call = encoded(tokenizer, *row[:2], tools=TOOLS, train_on="last")
    assert only_call == [f"{head}«\nI look.<|assistant|>{written}»"]


def test_end_token_for_an_open_last_turn(load, make_tokenizer):
    """Appended where neither the template nor what it writes next ends the last answer, and only there."""
    glm, qwen = load("glm-4-0414"), load("qwen2.5-instruct")
    bare = make_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]")
    bare.chat_template = bare.chat_template.replace(
        "[assistant]", "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for tokenizer, messages, token, expected in (
        (glm, [user("q"), assistant("x")], "<|user|>", "[gMASK]<sop><|user|>\nq<|assistant|>«\nx<|user|>»"),
        (bare, [user("q"), assistant("x")], "<|im_end|>", "[user]q[assistant]«x<|im_end|>»"),
        (
            glm,
            [user("q"), call()],
            "<|user|>",
            '[gMASK]<sop><|user|>\nq<|assistant|>«weather \n{"city": "Köln"}<|observation|>»',
        ),
        (
            qwen,
            [user("q"), assistant("x")],
            "<|endoftext|>",
            QWEN_SYSTEM + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«x<|im_end|>»\n",
        ),
    ):
        row = encode_row(tokenizer, canonical_row({"messages": messages}), end_token=token)
        assert [marked(tokenizer, sample) for sample in row.samples] == [expected]
    with pytest.raises(ValueError, match="'</s>' cannot end a turn: it is no special token of the tokenizer"):
        encode_row(glm, {"messages": [user("q"), assistant("x")]}, end_token="</s>")


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(
    "content",
    [
        "你好 🙂",
        "\U0001f469\u200d\U0001f467",
        "e\u0301\u0323",
        "\u202bשלום\u202c",
        "🙂",
        " \u00a0x\u2028",
        "a<|im_end|>b",
    ],
)
def test_unicode(load, name, content):
    """Multi-byte, combining and right-to-left text, and text that spells a special token: all of it, nothing else."""
    tokenizer = load(name)
    [text] = encoded(tokenizer, user("🙂"), assistant(content), train_on="last")
    lead = "\n" if name.startswith("glm") else ""
    end = "<|user|>" if name.startswith("glm") else "<|im_end|>"
    assert text.split("«")[1].split("»")[0] == lead + content + end


def test_special_text_in_content_becomes_the_token(load):
    """The tokenizer's own behaviour, in the prompt and the answer alike: the end-of-turn token twice."""
    tokenizer = load("qwen2.5-instruct")
    row = encode_row(tokenizer, canonical_row({"prompt": "q", "completion": "a<|im_end|>b"}))
    ids = [token for token, flag in zip(row.samples[0].input_ids, row.samples[0].labels_mask, strict=True) if flag]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("name", ADDED)
def test_each_trained_turn_follows_its_generation_prompt(load, name):
    """Independent of spans: what stands before the trained characters is what a server would send the model."""
    tokenizer = load(name)
    messages = [user("q"), assistant("one", "hm"), user("r"), assistant("two", "so")]
    [text] = encoded(tokenizer, *messages, train_on="last", on_loss="keep")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text.split("«")[0] == prompt


def test_opening_assistant_turn_is_context(load):
    """Nothing asks for it, so it is kept and not trained on; alone it is an error."""
    tokenizer = load("smollm2-instruct")
    assert encoded(tokenizer, assistant("hello"), user("q"), assistant("a")) == [
        SMOL_SYSTEM + "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n«a<|im_end|>»\n"
    ]
    for messages in ([assistant("hello")], [user("q")], [assistant("hello"), user("q")]):
        with pytest.raises(ValueError, match="no assistant turn that answers something: nothing to train on"):
            encoded(tokenizer, *messages)


def test_template_that_strips_and_has_no_end_token(make_tokenizer):
    """Blanks that the template takes off are not trained on."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert encoded(tokenizer, user(" q "), assistant("  a \n"), user("r"), assistant(" b")) == [
        "[user]q\n[assistant]«a\n»[user]r\n[assistant]«b\n»"
    ]


def test_generation_markers(make_tokenizer):
    """Markers are taken at their word, also for the last turn alone; a template that marks nothing is refused."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}"
    )
    row = (user("q"), assistant("a🙂"), user("r"), assistant("🙂b"), user("left out"))
    tokenizer = make_tokenizer(template)
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    tail = "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«🙂b<|im_end|>»\n"
    assert encoded(tokenizer, *row) == [head + "«a🙂<|im_end|>»" + tail]
    assert encoded(tokenizer, *row, train_on="last") == [head + "a🙂<|im_end|>" + tail]
    silent = make_tokenizer(template.replace("m.role == 'assistant'", "m.role == 'nobody'"))
    with pytest.raises(ValueError, match="marks no token of an assistant turn"):
        encoded(silent, *row)


def test_what_cannot_be_told_apart_is_refused(load, make_tokenizer):
    """A wrong mask is never made up: two Qwen3 answers in a row, templates that drop calls, results or the header."""
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\): the chat template renders this turn, or what"):
        encoded(load("qwen3"), user("q"), assistant("x"), assistant("y"))
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\): the chat template leaves the call of 'weather' out"):
        encoded(load("smollm2-instruct"), user("q"), call(), result(), assistant("x"), train_on="last")
    deaf = (TEMPLATES / "qwen2.5-instruct.jinja").read_text().replace('role == "tool"', 'role == "nobody"')
    with pytest.raises(ValueError, match=r"turn 2 \(tool\): the chat template leaves the results of tools"):
        encoded(make_tokenizer(deaf), user("q"), call(), result(), assistant("x"))
    with pytest.raises(ValueError, match="ignores add_generation_prompt"):
        encoded(make_tokenizer("{% for m in messages %}{{ m.role + m.content }}{% endfor %}"), user("q"), assistant(""))


def test_calls_that_need_null_content(make_tokenizer):
    """Templates of DeepSeek's kind write calls only where the content is null: tried before giving up."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    [text] = encoded(make_tokenizer(template), user("q"), call())
    assert text.split("«")[1].split("»")[0] == '{"name": "weather", "arguments": {"city": "Köln"}}<|im_end|>'


def test_renders_grow_with_turns_and_tokenizer_calls_do_not(load, monkeypatch):
    """Two renderings a turn and a few more; one tokenizer call a sample."""
    tokenizer = load("qwen2.5-instruct")
    counts = {"apply_chat_template": 0, "__call__": 0}
    for name in counts:
        original = getattr(type(tokenizer), name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            counts[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(type(tokenizer), name, counted)
    encode_row(tokenizer, {"messages": [user("q"), assistant("a")] * 20})
    assert counts["apply_chat_template"] <= 2 * 20 + 3
    assert counts["__call__"] == 1


def test_text_and_bad_options(tokenizer):
    """A text row trains all but its first token; an unknown train_on names the flag."""
    row = encode_row(tokenizer, {"text": "abc"})
    assert (len(row.samples), row.split, row.samples[0].labels_mask) == (1, False, [False, True, True])
    with pytest.raises(ValueError, match="--train-on must be 'all' or 'last'"):
        encode_row(tokenizer, {"text": "abc"}, train_on="first")


def test_half_a_surrogate_pair(tokenizer):
    """JSON can hold one, a tokenizer cannot."""
    for row in ({"text": "\ud800"}, {"messages": [user("q"), assistant("\ud800")]}):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            encode_row(tokenizer, row)
