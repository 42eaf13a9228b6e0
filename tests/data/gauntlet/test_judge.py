"""The judge itself: right masks pass, and each kind of damage is named. No download, no encoder."""

import pytest

from tests.data.gauntlet.judge import judge
from tests.data.gauntlet.rows import ROWS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(tokenizer, text):
    """Token ids of `text` without its marks, and the mask of what stands between « and »."""
    ids, mask = [], []
    for number, piece in enumerate(part for run in text.split("«") for part in run.split("»")):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [number % 2 == 1] * len(tokens)
    return ids, mask


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


RIGHT = (
    turn("user", "Wombat asks?") + "<|im_start|>assistant\n«Narwhal answers.<|im_end|>»\n"
    + turn("user", "Lemur asks?") + "<|im_start|>assistant\n«Okapi answers.<|im_end|>»\n"
)  # fmt: skip
FIRST_UNTRAINED = RIGHT.replace("«Narwhal answers.<|im_end|>»", "Narwhal answers.<|im_end|>")


@pytest.mark.parametrize(
    ("row", "text", "kind", "reason"),
    [
        ("multi-turn", RIGHT, "right", ""),
        ("multi-turn", RIGHT.replace("answers.<|im_end|>»", "answers.»<|im_end|>"), "wrong", "stop not trained"),
        ("multi-turn", RIGHT.replace("<|im_end|>»\n", "<|im_end|>\n»"), "wrong", "trained past the stop"),
        ("multi-turn", FIRST_UNTRAINED, "wrong", "untrained"),
        ("multi-turn", RIGHT.replace("Lemur asks?", "«Lemur» asks?"), "wrong", "trained beside the turns: 'Lemur'"),
        ("multi-turn", RIGHT.replace("Wombat", "Badger"), "wrong", "no sample holds a prompt of inference"),
        ("multi-turn", RIGHT.replace("«Narwhal", "Nar«whal"), "wrong", "untrained"),
        ("weight 0", RIGHT, "wrong", "flag ignored"),
        ("weight 0", FIRST_UNTRAINED, "right", ""),
        ("reasoning", turn("user", "Wombat asks?") + "<|im_start|>assistant\n«Narwhal answers.<|im_end|>»\n", "lost",
         "'Civet thinks.' is in no sample"),
    ],
)  # fmt: skip
def test_damage_is_named(make_tokenizer, row, text, kind, reason):
    """One damaged mask or text each; the verdict and its reason."""
    tokenizer = make_tokenizer(CHATML)
    actual = judge(tokenizer, ROWS[row], [marked(tokenizer, text)])
    assert actual.kind == kind, actual
    assert reason in "; ".join(actual.reasons)


def test_a_turn_trained_twice(make_tokenizer):
    """In two samples: counted twice in the loss."""
    tokenizer = make_tokenizer(CHATML)
    actual = judge(tokenizer, ROWS["multi-turn"], [marked(tokenizer, RIGHT)] * 2)
    assert "turn 1: trained 2 times" in actual.reasons


def test_announced_losses(make_tokenizer):
    """A loss that the encoder names is not lost in silence."""
    tokenizer = make_tokenizer(CHATML)
    text = turn("user", "Wombat asks?") + "<|im_start|>assistant\n«Narwhal answers.<|im_end|>»\n"
    assert judge(tokenizer, ROWS["reasoning"], [marked(tokenizer, text)], ("reasoning",)).kind == "right"
