"""Stand-ins with which real megatron-core trains on CPU with gloo. For tests and for `--device cpu` only.

megatron-core asks for CUDA by name in some hundred places. Within `cpu_standins()` those requests get the CPU's
answer; nothing of what is computed changes. Every stand-in says why it is there, all are undone on exit. Never used
where CUDA is available, and it never claims that it is: `torch.cuda.is_available()` stays False.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eaft_megatron import megatron_map
from eaft_megatron.testing.cpu_collectives import Finished, with_split_lists, with_unequal_parts

_MODULES = ("fused_softmax", "distrib_optimizer", "p2p_communication", "rng_tracker", "torch_norm", "gpt_models")
_MISSING = object()
_CUDA_NAME = re.compile(r"cuda(:\d+)?")


@contextlib.contextmanager
def cpu_standins() -> Iterator[None]:
    """Within the block megatron-core's models, schedules, optimizers and checkpoints run on CPU tensors.

    Enter it before building anything, in the thread that trains, in every process; a whole program may live in it,
    and it may be nested. Initialise torch.distributed with gloo.

    Raises:
        RuntimeError: CUDA is available: nothing may stand in for a real device.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_standins() is for machines without CUDA; torch.cuda.is_available() is True here")
    with contextlib.ExitStack() as stack:
        patch = _Patcher(stack)
        _stand_in_for_compiler(patch, stack)  # first: it keeps the imports of megatron-core below cheap
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says in many places that Apex and TransformerEngine are missing
            megatron = SimpleNamespace(**{name: getattr(megatron_map, name) for name in _MODULES})
        _stand_in_for_cuda_runtime(patch)
        _stand_in_for_cuda_memory(patch)
        _stand_in_for_cuda_rng(patch, megatron.rng_tracker)
        _stand_in_for_cuda_tensors(patch)
        _stand_in_for_megatron(patch, megatron)
        _stand_in_for_cuda_devices(patch, stack)
        yield


class _Patcher:
    """Sets attributes and puts the old ones back, last first, when the stack unwinds."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def __call__(self, owner: Any, **values: Any) -> None:
        for name, value in values.items():
            self._stack.callback(_put_back, owner, name, vars(owner).get(name, _MISSING))
            setattr(owner, name, value)


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


# ---- devices -------------------------------------------------------------------------------------------------------


def _to_cpu(device: Any) -> Any:
    """The device to use where `device` was asked for; what names no CUDA device comes back as it is."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if _CUDA_NAME.fullmatch(device) else device
    return device


def _to_cpu_or_index(device: Any) -> Any:
    """Like _to_cpu where only a device can stand: there a bare int, as from current_device(), is a CUDA device."""
    return "cpu" if isinstance(device, int) else _to_cpu(device)


def _type_name(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Tensor.type(): megatron-core's optimizers sort parameters by names like 'torch.cuda.FloatTensor'."""
    if len(args) == 1 and not kwargs:
        return func(*args).replace("torch.", "torch.cuda.", 1)
    wanted = [arg.replace("torch.cuda.", "torch.") if isinstance(arg, str) else arg for arg in args[1:]]
    return func(args[0], *wanted, **kwargs)


def _move(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Tensor.to(0) means device 0."""
    kwargs = {key: _to_cpu_or_index(value) if key == "device" else value for key, value in kwargs.items()}
    return func(args[0], *map(_to_cpu_or_index, args[1:2]), *args[2:], **kwargs)


_TENSOR_METHODS: dict[Any, Callable[[Callable, tuple, dict], Any]] = {
    torch.Tensor.cuda: lambda func, args, kwargs: args[0],
    torch.Tensor.pin_memory: lambda func, args, kwargs: args[0],  # pinning needs a CUDA driver
    torch.Tensor.to: _move,
    torch.Tensor.type: _type_name,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every request for a CUDA device to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TENSOR_METHODS:
            return _TENSOR_METHODS[func](func, args, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu_or_index(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*map(_to_cpu, args), **kwargs)


def _stand_in_for_cuda_devices(patch: _Patcher, stack: contextlib.ExitStack) -> None:
    """The mode, and the one place where it would be off although code of megatron-core runs.

    Modes are per thread. That suffices: on CPU, backward runs in the thread that called it, and megatron-core's
    checkpoint writers are forks of it. But a mode is off while a function it passed on runs, torch.autograd.backward
    and grad too: there it goes on again for the engine, so that autograd functions have it in their backward.
    """
    mode = stack.enter_context(_CudaMeansCpu())
    run = torch.autograd._engine_run_backward

    def engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    patch(torch.autograd, _engine_run_backward=engine_run_backward)


# ---- torch.cuda ----------------------------------------------------------------------------------------------------


class _Event:
    """An event of a device that finishes everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._time - self._time) * 1e3  # milliseconds, like CUDA's

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _Stream:
    """A stream of a device that has one order only."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def _returning(value: Any, *names: str) -> dict[str, Callable]:
    """For each name a function of its own: torch.compile's tables refuse one function under two names."""
    return {name: (lambda *args, **kwargs: value) for name in names}


def _stand_in_for_cuda_runtime(patch: _Patcher) -> None:
    """Streams, events, synchronisation, device properties: on a CPU-only torch these raise."""
    patch(
        torch.cuda,
        Stream=_Stream,
        Event=_Event,
        stream=lambda stream: contextlib.nullcontext(),
        device=lambda device: contextlib.nullcontext(),
        **_returning(_Stream(), "current_stream", "default_stream"),
        **_returning(None, "set_stream", "set_device", "synchronize"),
        **_returning(0, "current_device", "utilization", "temperature", "power_draw", "clock_rate"),
        **_returning(1, "device_count"),
        **_returning(False, "is_current_stream_capturing"),
        # 8.0 (A100): callers ask whether a newer generation's features are there.
        **_returning((8, 0), "get_device_capability"),
        **_returning("cpu", "get_device_name"),
        **_returning(
            SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1),
            "get_device_properties",
        ),
    )
    # Not through the function mode, which comes after the arguments' types were checked.
    patch(torch.Tensor, **_returning(None, "record_stream"))
    patch(torch.cuda.nvtx, **_returning(None, "range_push", "range_pop", "mark"))


def _stand_in_for_cuda_memory(patch: _Patcher) -> None:
    """Memory reports say zero: they feed logs only."""
    patch(
        torch.cuda,
        memory_stats=lambda device=None: defaultdict(int),
        **_returning(0, "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
        **_returning((0, 0), "mem_get_info"),
        **_returning(None, "empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated"),
    )


def _stand_in_for_cuda_rng(patch: _Patcher, tracker: ModuleType) -> None:
    """The "CUDA" generator is the CPU's: dropout and initialisation draw from it, the RNG tracker forks it."""
    cpu = torch.default_generator
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    standins: dict[str, Callable] = {
        "get_rng_state": lambda device=None: cpu.get_state(),
        "set_rng_state": lambda new_state, device=None: cpu.set_state(new_state) and None,
        "manual_seed": lambda seed: cpu.manual_seed(int(seed)) and None,
        "manual_seed_all": lambda seed: cpu.manual_seed(int(seed)) and None,
        "initial_seed": lambda: cpu.initial_seed(),
    }
    patch(torch.cuda, **standins)
    patch(torch.cuda.random, **standins)
    # The tracker reaches past torch.cuda.set_rng_state, into torch._C.
    patch(
        tracker,
        _get_cuda_rng_state=lambda device=None, clone=False, graph_safe=False: cpu.get_state(),
        _set_cuda_rng_state=lambda new_state, device=-1, graph_safe=False: cpu.set_state(new_state) and None,
    )


def _stand_in_for_cuda_tensors(patch: _Patcher) -> None:
    """torch.cuda.FloatTensor([...]) and its like: old spelling of tensors on the device."""
    names = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    patch(torch.cuda, **{f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in names})


def _stand_in_for_compiler(patch: _Patcher, stack: contextlib.ExitStack) -> None:
    """Compiled functions run as they were written.

    megatron-core compiles its small fused functions. On CPU that would start a C++ compiler in every process, and
    importing torch's compiler alone takes two seconds each. What is first imported within the block stays uncompiled.
    """

    def uncompiled(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda fn: fn

    patch(torch, compile=uncompiled)
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # for what was compiled before
        stack.enter_context(torch.compiler.set_stance("force_eager"))


# ---- megatron-core -------------------------------------------------------------------------------------------------


def _stand_in_for_megatron(patch: _Patcher, megatron: SimpleNamespace) -> None:
    patch(
        torch.distributed,
        all_to_all_single=with_split_lists(torch.distributed.all_to_all_single),
        all_gather=with_unequal_parts(torch.distributed.all_gather),
    )
    patch(megatron.p2p_communication, _p2p_ops=_waited(megatron.p2p_communication._p2p_ops))
    # With bf16 or fp16 and masked_softmax_fusion (the default) it would load a CUDA extension.
    patch(megatron.fused_softmax.FusedScaleMaskSoftmax, is_kernel_available=lambda self, mask, b, np, sq, sk: False)
    optimizer = megatron.distrib_optimizer
    if not optimizer.HAVE_APEX_OR_TE:
        patch(optimizer.DistributedOptimizer, **_with_torch_adam(optimizer.DistributedOptimizer))
    # 0.12 asks TransformerEngine to quantise even an empty list of parameters.
    quantize = optimizer.quantize_param_shard
    patch(optimizer, quantize_param_shard=lambda params, *rest: quantize(params, *rest) if params else None)
    norm = megatron.torch_norm.WrappedTorchNorm
    patch(norm, __new__=staticmethod(_torch_norm(norm.__new__)))


def _waited(p2p_ops: Callable) -> Callable:
    """Interleaved schedules free an output while its send is pending, safe in CUDA's stream order only.

    On gloo the receiver then gets what lies in that memory by now (with deallocate_pipeline_outputs, Megatron-LM's
    default): wrong losses, no error. Whoever waits again is answered at once: a second wait for a send hangs gloo.
    """

    def wait_at_once(**kwargs: Any) -> Any:
        requests = p2p_ops(**kwargs)
        for request in requests.values() if isinstance(requests, dict) else requests:
            request.wait()
        if isinstance(requests, dict):
            return {name: Finished() for name in requests}
        return [Finished() for _ in requests]

    return wait_at_once


def _with_torch_adam(cls: Any) -> dict[str, Callable]:
    """Checkpoints of the distributed optimizer over torch's Adam, which takes the place of Apex's and TE's.

    Its step count is per parameter, where theirs is per group. megatron-core reads it before there is one (the
    template for loading is made before the first step), looks for it among the loaded tensors where it just left it
    out, and gives all parameters one and the same tensor, which then counts every parameter's step.
    """
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states, get_states = cls._set_main_param_and_optimizer_states, cls._get_main_param_and_optimizer_states

    def with_step_zero(self: Any) -> Any:
        adam = self.optimizer
        if not adam.state and isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros(()), **moments}
        return state_dict(self)

    def with_steps_apart(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for values in self.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()

    def with_own_step(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        steps = {name: value for name, value in get_states(self, model_param).items() if name == "step"}
        set_states(self, model_param, {**steps, **tensors})

    return {
        "state_dict": with_step_zero,
        "load_state_dict": with_steps_apart,
        "_set_main_param_and_optimizer_states": with_own_step,
    }


def _torch_norm(new: Callable) -> Callable:
    """megatron-core's plain torch norm refuses what only Apex and TE do: sequence parallelism, and two faster kernels.

    The kernels make no difference here. For sequence parallelism all that is needed is the mark on the parameters by
    which finalize_model_grads sums their gradients over the tensor-parallel group.
    """

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)  # not dataclasses.replace, which would run the config's own checks again
        plain.sequence_parallel = plain.persist_layer_norm = plain.memory_efficient_layer_norm = False
        norm = new(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return build
