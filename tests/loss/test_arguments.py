"""What the losses say of their arguments, to a type checker and at run time."""

from __future__ import annotations

import sys
import typing

import pytest
import torch

import eaft_megatron
from eaft_megatron.testing.distributed import run_distributed

LOSSES = [name for name in eaft_megatron.__all__ if name.startswith("vocab_parallel") and name.endswith("_loss")]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is of Python 3.11")
@pytest.mark.parametrize("name", LOSSES)
def test_return_stats_decides_the_type_of_the_result(name):
    """A type checker is told Tensor without statistics, and a pair with them."""
    told = {
        overload.__annotations__["return_stats"]: overload.__annotations__["return"]
        for overload in typing.get_overloads(getattr(eaft_megatron, name))
    }
    pair = "tuple[Tensor, TokenStats]"
    assert told == {"Literal[False]": "Tensor", "Literal[True]": pair, "bool": f"Tensor | {pair}"}


@pytest.mark.parametrize("name", [name for name in LOSSES if "eaft" in name])
def test_columns_of_other_gates_are_refused_by_eaft(name):
    """EAFT's gate would not look at them; the function for any gate is named."""
    logits, target = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    arguments = (logits, target) if "linear" not in name else (torch.zeros(2, 3), torch.zeros(5, 3), target)
    with pytest.raises(TypeError, match=f"'side': it is for the gates of {name.replace('eaft', 'token')}"):
        getattr(eaft_megatron, name)(*arguments, side={"ref_logprob": torch.zeros(2)})


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_argument_is_refused(name):
    """Also those that travel in **options are looked at."""
    gate = [eaft_megatron.SFTGate()] if "token" in name else []
    tensors = [torch.zeros(2, 3), torch.zeros(8, 3)] if "linear" in name else [torch.zeros(2, 8)]
    with pytest.raises(TypeError, match="top_k"):
        getattr(eaft_megatron, name)(*tensors, torch.tensor([0, 1]), *gate, top_k=3)


def _gathered(vocab_size: int) -> str:
    group = torch.distributed.group.WORLD
    with pytest.raises(ValueError) as raised:
        eaft_megatron.vocab_parallel_eaft_loss(
            torch.zeros(2, 160), torch.zeros(2, dtype=torch.int64), group=group, vocab_size=vocab_size
        )
    return str(raised.value)


@pytest.mark.parametrize("vocab_size", [160, 150])
def test_logits_that_were_gathered_are_noticed(vocab_size):
    """Every rank holds the whole vocabulary, with or without padding: the loss would be right, the gradient not."""
    for message in run_distributed(_gathered, 2, vocab_size):
        assert f"holds 160 columns, the whole vocabulary of {vocab_size}" in message and "group=None" in message
