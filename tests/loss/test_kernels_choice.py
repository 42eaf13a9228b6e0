"""Which implementation is taken, what is said when it cannot be, and that nothing is said when Triton is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from eaft_megatron import vocab_parallel_eaft_loss, vocab_parallel_topk_entropy
from eaft_megatron.loss import implementation
from eaft_megatron.loss.implementation import choose_triton


class _OnGpu:
    """Enough of a tensor on a GPU for the choice."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Triton and an H100, as far as the choice can tell; both can be taken away by the test."""
    monkeypatch.setattr(implementation, "_triton_works", lambda: True)
    monkeypatch.setattr(implementation, "_device_obstacle", lambda index: None)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_the_kernels_on_a_gpu(gpu, dtype):
    """And "torch" still means torch."""
    assert choose_triton("auto", _OnGpu(dtype), 20) and choose_triton("triton", _OnGpu(dtype), 128)
    assert not choose_triton("torch", _OnGpu(dtype), 20)


def test_auto_takes_torch_where_the_kernels_cannot_run(gpu):
    """float64, K beyond 128, a CPU, an old GPU, no Triton: plain torch, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choose_triton("auto", _OnGpu(torch.float64), 20)
        assert not choose_triton("auto", _OnGpu(torch.bfloat16), 129)
        assert not choose_triton("auto", torch.zeros(1, 2), 20)
        gpu.setattr(implementation, "_device_obstacle", lambda index: "too old")
        assert not choose_triton("auto", _OnGpu(torch.bfloat16), 20)
        gpu.setattr(implementation, "_triton_works", lambda: False)
        assert not choose_triton("auto", _OnGpu(torch.bfloat16), 20)


def test_asking_for_the_kernels_where_they_cannot_run_says_why(gpu, monkeypatch):
    """impl="triton" never falls back in silence."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = torch.tensor([0])
    with pytest.raises(ValueError, match="got torch.float64"):
        vocab_parallel_eaft_loss(torch.zeros(1, 8, dtype=torch.float64), target, impl="triton")
    with pytest.raises(ValueError, match="up to 128, got 129"):
        vocab_parallel_eaft_loss(torch.zeros(1, 200), target, topk=129, impl="triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1.*got logits on cpu"):
        vocab_parallel_topk_entropy(torch.zeros(1, 8), impl="triton")
    gpu.setattr(implementation, "_triton_works", lambda: False)
    with pytest.raises(ValueError, match="cannot be imported.*gpu"):
        vocab_parallel_eaft_loss(torch.zeros(1, 8), target, impl="triton")


def _in_a_process_with(triton: str, code: str, folder) -> str:
    """Standard error of ``code`` where ``import triton`` finds a module of these contents; a warning is an error."""
    (folder / "triton.py").write_text(triton)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport torch\n{code}"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stderr


def test_a_missing_triton_is_no_news(tmp_path):
    """Not a warning, not a line, at import or in use; and the package does not import what is there."""
    code = """
sys.modules["triton"] = None
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else original(name, *rest)
from eaft_megatron import vocab_parallel_eaft_loss
from eaft_megatron.loss.implementation import _triton_works
vocab_parallel_eaft_loss(torch.zeros(1, 8), torch.tensor([0]))
assert not _triton_works()
"""
    assert _in_a_process_with("", code, tmp_path) == ""


def test_a_broken_triton_is_one_warning(tmp_path):
    """Installed but not importable: said once per process, and the loss goes on in torch."""
    code = """
import warnings
from eaft_megatron.loss.implementation import _triton_works
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert not _triton_works() and not _triton_works()
assert len(seen) == 1 and "libcuda is gone" in str(seen[0].message), seen
"""
    assert _in_a_process_with("raise RuntimeError('libcuda is gone')", code, tmp_path) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype):
    """No host sync, no copy of the logits, the same bits twice, and a CUDA graph that replays them."""
    pytest.importorskip("triton")
    logits = torch.randn(512, 32000, device="cuda", dtype=dtype)
    target = torch.randint(0, 32000, (512,), device="cuda")
    target[::3] = -100
    given = logits.clone()

    def step():
        leaf = given.detach().requires_grad_()
        loss = vocab_parallel_eaft_loss(leaf, target, impl="triton", vocab_size=31999)
        return loss, torch.autograd.grad(loss.sum(), leaf)[0]

    expected = [value.clone() for value in step()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < logits.nbytes + 2**20, "beyond the gradient itself there is something of the logits' size"
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given.zero_()
    graph.replay()
    assert not torch.equal(captured[0], expected[0])
    given.copy_(logits)
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))
