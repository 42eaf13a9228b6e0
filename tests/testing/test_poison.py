"""Poisoned scratch memory is seen wherever our code allocates, and nowhere else."""

import threading

import pytest
import torch

from eaft_megatron.testing import poisoned_memory


class HalfWritten(torch.autograd.Function):
    """Forgets the last element of its scratch memory, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        HalfWritten.threads = [threading.get_ident()]
        out = torch.empty_like(x)
        out[:-1] = x[:-1]
        return out

    @staticmethod
    def backward(ctx, grad):
        HalfWritten.threads.append(threading.get_ident())
        out = grad.new_empty(grad.shape)
        out[:-1] = grad[:-1]
        return out


ALLOCATIONS = {
    "empty": lambda dtype: torch.empty(3, 2, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 2, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3, 2), (1, 3), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((3, 2), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3, 2),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((3, 2), (2, 1)),
    "Tensor.new": lambda dtype: torch.zeros(1, dtype=dtype).new(3, 2),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_scratch_memory_is_nan(name, dtype):
    """Every way to ask for uninitialised memory, every floating type we use."""
    with poisoned_memory() as poison:
        assert ALLOCATIONS[name](dtype).isnan().all()
    assert poison.count == 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.int64, -(2**63)), (torch.int32, -(2**31)), (torch.uint8, 255), (torch.bool, True)],
)
def test_integer_scratch_memory_is_extreme(dtype, expected):
    """Integers have no NaN: a value that no index or count takes."""
    with poisoned_memory():
        assert (torch.empty(5, dtype=dtype) == expected).all()


def test_what_the_torch_kernels_allocate_for_themselves_is_left_alone():
    """Results of operators, zeros and full included, are what they are without poison."""
    x = torch.linspace(-1, 1, 24).reshape(4, 6).requires_grad_()
    expected = torch.autograd.grad(torch.softmax(x @ x.T, -1).square().sum(), x)[0]
    with poisoned_memory():
        actual = torch.autograd.grad(torch.softmax(x @ x.T, -1).square().sum(), x)[0]
        assert torch.equal(torch.zeros(3), torch.tensor([0.0, 0.0, 0.0])) and (torch.full((2,), 7) == 7).all()
    assert torch.equal(actual, expected)


def test_autograd_functions_are_covered_forward_and_backward():
    """The forgotten elements show; on CPU backward runs in the calling thread (noted here, relied on nowhere)."""
    x = torch.ones(4, requires_grad=True)
    with poisoned_memory():
        out = HalfWritten.apply(x)
        out.sum().backward()
    assert out.isnan().tolist() == [False, False, False, True]
    assert x.grad.isnan().tolist() == [False, False, False, True]
    assert HalfWritten.threads == [threading.get_ident()] * 2


def test_it_ends_with_the_block():
    """After the block, also after an exception, memory is as torch gives it."""
    with pytest.raises(KeyError), poisoned_memory() as poison:
        raise KeyError
    torch.empty(1000)
    assert poison.count == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the engine's device threads need a device")
def test_backward_in_a_device_thread_is_covered():
    """On a GPU backward runs in another thread; the dispatch mode goes along."""
    x = torch.ones(4, device="cuda", requires_grad=True)
    with poisoned_memory():
        HalfWritten.apply(x).sum().backward()
    assert x.grad.isnan().tolist() == [False, False, False, True]
    assert HalfWritten.threads[0] != HalfWritten.threads[1]
