"""How time and memory are measured: on the CPU by the clock and /proc, on a GPU by events and the allocator."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class Cpu:
    """Processes joined by gloo, one per rank."""

    name = "cpu"

    def forward_backward(self, loss: Callable[[], Tensor], logits: Tensor, upstream: Tensor) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass."""
        began = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        torch.autograd.grad(value, logits, upstream)
        return middle - began, time.perf_counter() - middle

    @contextmanager
    def peak_memory(self) -> Iterator[dict]:
        """Peak resident memory of this process within the block, beyond what it had at the start (Linux)."""
        result = {"bytes": None}
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        yield result
        result["bytes"] = max(_status_bytes("VmHWM") - before, 0)

    def describe(self) -> dict:
        cpu = platform.processor() or platform.machine()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
        return {"device": cpu, "cpu": cpu, "cores": os.cpu_count()}


class Gpu:
    """One GPU and one process: a rank's shard of a tensor-parallel job, without the exchange."""

    name = "cuda"

    def forward_backward(self, loss: Callable[[], Tensor], logits: Tensor, upstream: Tensor) -> tuple[float, float]:
        """Seconds between events on the stream, launches included where the host cannot keep ahead."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        marks[0].record()
        value = loss()
        marks[1].record()
        torch.autograd.grad(value, logits, upstream)
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3

    @contextmanager
    def peak_memory(self) -> Iterator[dict]:
        """Peak of the allocator within the block, beyond what was allocated at the start."""
        result = {"bytes": None}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result["bytes"] = torch.cuda.max_memory_allocated() - before

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """A world of one, which Megatron's loss insists on."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Megatron makes gloo groups too: no look-up of the host name
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def describe(self) -> dict:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }


def copy_seconds(device: Cpu | Gpu, source: Tensor, repeats: int) -> float:
    """Median seconds of copying the logits once: a read and a write of every byte, by the machine's own copy."""
    into, times = torch.empty_like(source), []
    for repeat in range(-1, repeats):
        if device.name == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            into.copy_(source)
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            into.copy_(source)
            seconds = time.perf_counter() - began
        if repeat >= 0:
            times.append(seconds)
    return statistics.median(times)


def floor_seconds(copied: float, ignored: float) -> float:
    """What forward + backward cannot beat at the copy's bandwidth: a read, then a read and a write, of every logit.

    An ignored token's logits need not be read, and its gradient is still written. 6 bytes per bf16 logit, or 2.
    """
    passes = 3 * (1 - ignored) + 1 * ignored
    return copied / 2 * passes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
