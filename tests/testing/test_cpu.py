"""The stand-ins give CPU answers to CUDA requests, everywhere megatron-core asks, and are gone afterwards."""

import importlib.util

import pytest
import torch

from eaft_megatron.testing import run_distributed

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the stand-ins are refused where CUDA is available", allow_module_level=True)

from eaft_megatron import megatron_map  # noqa: E402
from eaft_megatron.testing.cpu import _MODULES, cpu_standins  # noqa: E402

REQUESTS = {
    "empty": lambda: torch.empty(2, device="cuda"),
    "index": lambda: torch.zeros(2, device=torch.cuda.current_device()),
    "cuda:0": lambda: torch.ones(2, device="cuda:0"),
    "torch.device": lambda: torch.tensor([1.0], device=torch.device("cuda", 0)),
    "like": lambda: torch.empty_like(torch.ones(2), device="cuda"),
    "new": lambda: torch.ones(2).new_zeros(2, device="cuda"),
    "pinned": lambda: torch.empty(2, device="cpu", pin_memory=True),
    "cuda()": lambda: torch.ones(2).cuda(),
    "cuda(index)": lambda: torch.ones(2).cuda(torch.cuda.current_device(), non_blocking=True),
    "to(str)": lambda: torch.ones(2).to("cuda"),
    "to(index)": lambda: torch.ones(2).to(torch.cuda.current_device()),
    "to(device=)": lambda: torch.ones(2).to(device=0, dtype=torch.float64),
    "pin_memory()": lambda: torch.ones(2).pin_memory(),
    "FloatTensor": lambda: torch.cuda.FloatTensor([1.0, 2.0]),
    "type": lambda: torch.ones(2).type("torch.cuda.HalfTensor"),
    "module": lambda: torch.nn.Linear(2, 2).cuda().weight,
    "module to": lambda: torch.nn.Linear(2, 2).to("cuda").weight,
    "module device": lambda: torch.nn.Linear(2, 2, device="cuda").weight,
}


class AsksInBackward(torch.autograd.Function):
    """Allocates on "cuda" in backward, as megatron-core's linear layers do."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        out = torch.empty(grad.shape, device=torch.cuda.current_device())
        return out.copy_(2 * grad)


def touched():
    """Everything the stand-ins may change, by name."""
    owners = [torch, torch.Tensor, torch.autograd, torch.cuda, torch.cuda.random, torch.cuda.nvtx]
    for name in _MODULES:
        module = getattr(megatron_map, name)
        owners += [module, *(value for value in vars(module).values() if isinstance(value, type))]
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_for_cuda_come_out_on_the_cpu(name):
    """Every spelling of "on the device" that megatron-core uses."""
    with cpu_standins():
        assert REQUESTS[name]().device == torch.device("cpu")


def test_without_the_stand_ins_the_same_requests_fail():
    """The test above would otherwise pass for nothing."""
    for name in ("empty", "cuda()", "to(str)", "module"):
        with pytest.raises((AssertionError, RuntimeError)):
            REQUESTS[name]()


@pytest.mark.parametrize("how", ["method", "function", "grad"])
def test_backward_has_them_too(how):
    """A function mode is off within torch.autograd.backward and grad; autograd functions need it all the same."""
    x = torch.ones(3, requires_grad=True)
    with cpu_standins():
        loss = AsksInBackward.apply(x).sum()
        if how == "method":
            loss.backward()
        elif how == "function":
            torch.autograd.backward([loss])
        else:
            x.grad = torch.autograd.grad(loss, x)[0]
        assert torch.equal(x.grad, torch.full((3,), 2.0)) and x.grad.device.type == "cpu"


def test_types_carry_their_cuda_names():
    """megatron-core's optimizers sort parameters by these names."""
    with cpu_standins():
        names = [torch.ones(1, dtype=dtype).type() for dtype in (torch.float32, torch.float16, torch.bfloat16)]
        assert torch.ones(1).type(torch.float64).dtype is torch.float64
    assert names == ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_streams_events_and_reports_answer():
    """What megatron-core asks of the CUDA runtime: no error, and the answers of an idle device."""
    with cpu_standins():
        stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.device(0):
            start.record()
            torch.ones(2).record_stream(stream)
            end.record(torch.cuda.default_stream())
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_push("x")
        torch.cuda.nvtx.range_pop()
        assert start.elapsed_time(end) >= 0 and end.query()
        assert torch.cuda.memory_allocated() == torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
        assert torch.cuda.device_count() == 1 and not torch.cuda.is_available()
        assert torch.cuda.get_device_properties(0).major == 8


def test_the_rng_tracker_forks_the_cpu_generator():
    """Draws inside a fork depend on the fork's seed alone and leave the outer sequence as it was."""
    with cpu_standins():
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        torch.manual_seed(5)
        expected_outer = torch.rand(2, 3)
        torch.manual_seed(7)
        expected_inner = torch.rand(2, 3)
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(5)
        tracker.add("model-parallel-rng", 7)
        outer, inner = [torch.rand(3)], []
        with tracker.fork():
            inner.append(torch.rand(3))
        outer.append(torch.rand(3))
        with tracker.fork():
            inner.append(torch.rand(3))
    assert torch.equal(torch.stack(outer), expected_outer)
    assert torch.equal(torch.stack(inner), expected_inner)


def changes_over_time():
    for name in _MODULES:
        getattr(megatron_map, name)  # imports it
    before, after = touched(), None
    try:
        with cpu_standins():
            with cpu_standins():
                changed = [key for key, value in touched().items() if before.get(key) is not value]
            still = torch.empty(1, device="cuda").device.type  # the outer block still stands
            raise KeyError
    except KeyError:
        after = touched()
    left = [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]
    return changed, still, left


def test_everything_is_back_on_exit_also_nested_and_after_an_error():
    """Not one attribute of torch or megatron-core is other than before; in a fresh process, so before is before."""
    changed, still, left = run_distributed(changes_over_time, 1, fresh=True)[0]
    assert ("torch.cuda", "current_device") in changed and ("Tensor", "record_stream") in changed
    assert still == "cpu" and left == []


def test_refused_where_cuda_is_available(monkeypatch):
    """Nothing may stand in for a real device, and nothing is changed by the refusal."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = touched()
    with pytest.raises(RuntimeError, match="without CUDA"), cpu_standins():
        pass
    assert touched() == before


def compile_within_and_after():
    import sys

    with cpu_standins():
        assert "torch._dynamo" not in sys.modules, "importing megatron-core pulled torch's compiler in"
        plain = torch.compile(lambda x: x + 1, dynamic=False)
        importlib.import_module("torch._dynamo")  # what some other package may do

        inside = float(plain(torch.ones(())))
    after = torch.compile(lambda x: x + 1, backend="eager")
    return inside, float(after(torch.ones(())))


def test_torch_compile_is_a_no_op_within_and_itself_afterwards():
    """In a fresh process: the compiler is not imported, may be imported within, and works after."""
    assert run_distributed(compile_within_and_after, 1, fresh=True) == [(2.0, 2.0)]
