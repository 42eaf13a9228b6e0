"""What autograd must be told: which logits are lost, and that there is no second derivative; torch and kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eaft_megatron import vocab_parallel_eaft_loss, vocab_parallel_linear_eaft_loss
from eaft_megatron.loss.reference import reference_eaft_loss
from tests.loss.kernel_cases import DEVICE, where_kernels_run
from tests.worlds import once

pytest.importorskip("triton", "3.9" if DEVICE == "cpu" else "3.4", reason="the kernels run too (pip install triton)")

TARGET = torch.tensor([3, -100, 17, 8])
OPTIONS = {"topk": 3, "vocab_size": 37}
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()


def _loss(logits: Tensor, impl: str) -> Tensor:
    return vocab_parallel_eaft_loss(logits, TARGET.to(DEVICE), inplace_backward=True, impl=impl, **OPTIONS).sum()


def _linear_loss(hidden: Tensor, impl: str) -> Tensor:
    options = {"impl": impl, "chunk_tokens": 3, **OPTIONS}
    return vocab_parallel_linear_eaft_loss(hidden, _leaf(40, 5).detach(), TARGET.to(DEVICE), **options).sum()


def _error(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "no error"


def _second_backward(impl: str) -> str:
    loss = _loss(_leaf(4, 40) * 1, impl)
    loss.backward(retain_graph=True)
    return _error(loss.backward)


def _producer_that_saved_its_output(impl: str) -> str:
    return _error(_loss(torch.tanh(_leaf(4, 40)), impl).backward)


def _another_consumer(impl: str) -> str:
    logits = _leaf(4, 40) * 1
    z_loss = torch.logsumexp(logits, dim=1).square().sum()  # made first, so differentiated last
    return _error((_loss(logits, impl) + z_loss).backward)


def _differentiate_twice(leaf: Tensor, loss: Tensor) -> str:
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return _error((gradient.square().sum() + leaf.square().sum()).backward)


def _double_backward(impl: str) -> str:
    leaf = _leaf(4, 40)
    return _differentiate_twice(leaf, _loss(leaf * 1, impl))


def _linear_double_backward(impl: str) -> str:
    hidden = _leaf(4, 5)
    return _differentiate_twice(hidden, _linear_loss(hidden, impl))


def _linear_second_backward(impl: str) -> Tensor:
    """Nothing of the caller's is overwritten there: the second gradient is the first."""
    hidden = _leaf(4, 5)
    loss = _linear_loss(hidden, impl)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0].cpu() for _ in range(2))
    return second - first


def _expanded(impl: str) -> Tensor:
    """The gradient of one row that stands for all four."""
    leaf = _leaf(1, 40)
    _loss((leaf * 1).expand(4, 40), impl).backward()
    return leaf.grad.cpu()


def _overlapping(impl: str) -> Tensor:
    """Rows of 40 that begin 5 apart."""
    leaf = _leaf(55)
    _loss((leaf * 1).as_strided((4, 40), (5, 1)), impl).backward()
    return leaf.grad.cpu()


LOST = [_second_backward, _producer_that_saved_its_output, _another_consumer]
TWICE = [_double_backward, _linear_double_backward]
SHARED = [_expanded, _overlapping, _linear_second_backward]


def _behaviours(impl: str) -> dict:
    warnings.simplefilter("ignore")
    return {check.__name__: check(impl) for check in (*LOST, *TWICE, *SHARED)}


def _behaviour(impl: str) -> dict:
    return where_kernels_run(_behaviours, impl) if impl == "triton" else _behaviours(impl)


@pytest.fixture(scope="module")
def behaviour() -> Callable:
    """What `_behaviour` returns, computed once for each argument."""
    return once(_behaviour)


@IMPLS
@pytest.mark.parametrize("check", LOST, ids=lambda check: check.__name__)
def test_whoever_needs_the_overwritten_logits_gets_an_error(behaviour, check, impl):
    """inplace_backward: never a wrong gradient in silence."""
    assert "modified by an inplace operation" in behaviour(impl)[check.__name__]


@IMPLS
@pytest.mark.parametrize("check", TWICE, ids=lambda check: check.__name__)
def test_a_second_derivative_is_an_error(behaviour, check, impl):
    """Also beside another term that does have one, where autograd alone would take it for zero."""
    assert "differentiated once" in behaviour(impl)[check.__name__]


@IMPLS
def test_a_second_backward_through_the_linear_loss_is_the_first_again(behaviour, impl):
    """Its logits are its own."""
    assert behaviour(impl)["_linear_second_backward"].count_nonzero() == 0


@IMPLS
@pytest.mark.parametrize("name", ["_expanded", "_overlapping"])
def test_logits_that_share_memory_are_not_written_over(behaviour, name, impl):
    """The reference's gradient, summed where elements lie in one place."""
    leaf = _leaf(1, 40) if name == "_expanded" else _leaf(55)
    leaf = leaf.detach().double().cpu().requires_grad_()
    logits = leaf.expand(4, 40) if name == "_expanded" else leaf.as_strided((4, 40), (5, 1))
    reference_eaft_loss(logits, TARGET, **OPTIONS)[0].sum().backward()
    torch.testing.assert_close(behaviour(impl)[name].double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_a_row_beyond_the_chunk_that_shares_memory(behaviour, monkeypatch):
    """Plain torch with chunks of one row, where torch itself would not notice."""
    monkeypatch.setattr("eaft_megatron.loss.torch_impl._CHUNK_NUMBERS_CPU", 40)
    torch.testing.assert_close(_expanded("torch"), behaviour("torch")["_expanded"])


def test_create_graph_alone_is_no_error():
    """A training loop may keep graphs of other terms: only differentiating this gradient raises."""
    leaf = _leaf(4, 40)
    (expected,) = torch.autograd.grad(_loss(leaf * 1, "torch"), leaf)
    (actual,) = torch.autograd.grad(_loss(leaf * 1, "torch"), leaf, create_graph=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
