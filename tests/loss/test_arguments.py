"""What the losses say of their arguments, to a type checker and at run time."""

from __future__ import annotations

import sys
import typing

import pytest
import torch
import torch.distributed as dist

import eaft_megatron
from eaft_megatron import (
    ThresholdGate,
    vocab_parallel_eaft_loss,
    vocab_parallel_linear_eaft_loss,
    vocab_parallel_token_loss,
    vocab_parallel_topk_entropy,
)
from eaft_megatron.testing import run_distributed

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


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_argument_is_refused(name):
    """Also those that travel in **options are looked at."""
    gate = [eaft_megatron.SFTGate()] if "token" in name else []
    tensors = [torch.zeros(2, 3), torch.zeros(8, 3)] if "linear" in name else [torch.zeros(2, 8)]
    with pytest.raises(TypeError, match="top_k"):
        getattr(eaft_megatron, name)(*tensors, torch.tensor([0, 1]), *gate, top_k=3)


@pytest.mark.parametrize(
    "options",
    [{"topk": 2.5}, {"topk": 2.0}, {"topk": "20"}, {"vocab_size": 7.5}, {"ignore_index": 0.5}, {"chunk_tokens": 2.5}],
    ids=str,
)
def test_a_number_that_is_no_integer_is_a_value_error(options):
    """The argument is named, and nothing is rounded."""
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.* must be an integer, got"):
        vocab_parallel_linear_eaft_loss(torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([0, 1]), **options)


def _groups_that_cannot_be() -> list[str]:
    """What each rank is told when it is given the other's group, and a mesh."""
    group = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    mesh = dist.init_device_mesh("cpu", (2,))
    messages = []
    for options in ({"group": group}, {"reduce_group": group}, {"group": mesh}):
        with pytest.raises(ValueError) as caught:
            vocab_parallel_token_loss(torch.zeros(2, 8), torch.tensor([0, 1]), eaft_megatron.SFTGate(), **options)
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="is not in the process group"):
        vocab_parallel_topk_entropy(torch.zeros(2, 8), group=group)
    return messages


def test_a_group_must_be_a_process_group_that_this_rank_is_in():
    """A rank outside, and a DeviceMesh, are told so before anything is sent."""
    for rank, (outside, outside_reduce, mesh) in enumerate(run_distributed(_groups_that_cannot_be, 2, timeout=60)):
        assert outside.startswith(f"rank {rank} is not in the process group") and outside_reduce == outside
        assert "mesh.get_group()" in mesh


@pytest.mark.parametrize("percentile", [0.0, 15.0, 100.0])
def test_tokens_that_all_tie_are_not_all_dropped(percentile):
    """A micro-batch of equal entropies trains as plain fine-tuning does."""
    logits, gate = torch.arange(8.0).expand(5, 8), ThresholdGate(percentile=percentile)
    _, stats = vocab_parallel_token_loss(logits, torch.tensor([0, 1, 2, 3, -100]), gate, return_stats=True)
    assert stats.weight.tolist() == [1, 1, 1, 1, 0]


def test_a_token_outside_the_vocabulary_has_no_finite_gradient():
    """Unchecked targets (the default on a GPU): its loss is NaN, and so is its gradient; no other token's."""
    logits = torch.randn(4, 8, requires_grad=True)
    target = torch.tensor([1, 8, -1, -100])
    vocab_parallel_eaft_loss(logits, target, validate=False, topk=3).sum().backward()
    assert logits.grad.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert logits.grad.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float32"), ("float32", "bfloat16")])
def test_under_autocast_the_linear_loss_is_that_of_a_linear_layer(dtypes):
    """Operands are cast as F.linear casts them; gradients arrive in the dtypes of what was given."""
    hidden, weight = torch.randn(6, 16), torch.randn(40, 16)
    target, gradients, losses = torch.tensor([1, 2, -100, 4, 39, 0]), [], []
    for fused in (True, False):
        leaves = [
            tensor.to(getattr(torch, name)).requires_grad_()
            for tensor, name in zip((hidden, weight), dtypes, strict=True)
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss = vocab_parallel_linear_eaft_loss(*leaves, target, topk=4)
            else:
                loss = vocab_parallel_eaft_loss(torch.nn.functional.linear(*leaves), target, topk=4)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), leaves))
    torch.testing.assert_close(*losses)
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_a_fused_main_grad_nothing_to_write_to():
    """A float32 weight with gradient_accumulation_fusion under bf16 autocast: refused, with two ways out."""
    weight = torch.nn.Parameter(torch.zeros(8, 3))
    weight.main_grad = torch.zeros(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="Leave the fusion off, or call"):
        vocab_parallel_linear_eaft_loss(
            torch.zeros(2, 3), weight, torch.tensor([0, 1]), gradient_accumulation_fusion=True
        )


def _double_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 2 * vocab_parallel_eaft_loss(2 * logits, target, topk=3)


def test_torch_compile_goes_around_the_loss():
    """Same numbers between two graphs; fullgraph=True raises, as the docstring says."""
    logits, target = torch.randn(4, 8), torch.tensor([1, 2, -100, 4])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(_double_loss, backend="eager", fullgraph=True)(logits, target)
    torch._dynamo.reset()
    actual = torch.compile(_double_loss, backend="eager")(logits, target)
    torch.testing.assert_close(actual, _double_loss(logits, target), rtol=0, atol=0)
