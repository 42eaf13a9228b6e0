"""``eaft-megatron check``: everything that would otherwise fail an hour into the night, in under two minutes.

Runs as the job will run, a process for each GPU; every process takes part in every check, and all return one code.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from eaft_megatron.installed import version_of
from eaft_megatron.launch import file_checks
from eaft_megatron.launch.command import loss_settings, run_folder
from eaft_megatron.launch.recipe import Recipe
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.loss.vocab_parallel import vocab_parallel_eaft_loss
from eaft_megatron.ranks import gather, on_rank_0, world_of_one

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers")
_TIMEOUT = datetime.timedelta(seconds=90)
_SECONDS = 5  # of all-reduces at most


class Row(NamedTuple):
    """One line of the table."""

    name: str
    ok: bool
    detail: str


def preflight(recipe: Recipe, *, min_bandwidth: float = 0.0) -> list[Row]:
    """Every check of a recipe, on every process of the job; the same rows on each of them.

    Args:
        recipe: as resolved; its run folder is created.
        min_bandwidth: GB/s of an all-reduce over all processes below which the check fails.
    """
    with world_of_one(), _process_group() as device:
        groups = _tensor_parallel_group(recipe)
        checks: list[tuple[str, Callable[[], str]]] = [
            ("layout", lambda: _check_layout(recipe)),
            ("versions", _check_versions),
            ("devices", lambda: _check_devices(recipe, device)),
            ("all-reduce", lambda: _check_bandwidth(device, min_bandwidth)),
            ("shared disk", lambda: _check_shared(run_folder(recipe))),
            ("disk space", lambda: _on_one_process(lambda: file_checks.check_disk(recipe))),
            ("recipe", lambda: _on_one_process(lambda: file_checks.check_command(recipe))),
            ("checkpoint", lambda: _on_one_process(lambda: file_checks.check_checkpoint(recipe))),
            ("data", lambda: _on_one_process(lambda: file_checks.check_data(recipe))),
            ("loss", lambda: _check_loss(recipe, groups, device)),
        ]
        return [_agreed(name, check) for name, check in checks]


def table(rows: list[Row]) -> str:
    """The rows, as text."""
    width = max(len(row.name) for row in rows)
    return "\n".join(f"{row.name:<{width}}  {'ok  ' if row.ok else 'FAIL'}  {row.detail}" for row in rows)


def _agreed(name: str, check: Callable[[], str]) -> Row:
    """One row for all processes: it is ok if it is on each of them; of several failures the first rank's is told."""
    try:
        mine = Row(name, True, check())
    except Exception as error:  # whatever it is, the other checks are worth making
        said = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        mine = Row(name, False, f"{said} (rank {dist.get_rank()}, {_host()})")
    rows = gather(mine)
    failed = [row for row in rows if not row.ok]
    if not failed:
        return rows[0]
    more = f"; and on {len(failed) - 1} more rank(s)" if len(failed) > 1 else ""
    return Row(name, False, " ".join(failed[0].detail.split()) + more)


@contextlib.contextmanager
def _process_group() -> Iterator[torch.device]:
    """NCCL with a GPU for each process, else gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if dist.is_initialized():  # a caller that brings its own group keeps it
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _tensor_parallel_group(recipe: Recipe) -> dist.ProcessGroup | None:
    """This rank's tensor-parallel group, as Megatron makes them: neighbouring ranks. None where they do not divide."""
    size = recipe.parallel.tensor
    if dist.get_world_size() % size:
        return None
    rank_group = None
    for begin in range(0, dist.get_world_size(), size):
        group = dist.new_group(list(range(begin, begin + size)))
        rank_group = group if begin <= dist.get_rank() < begin + size else rank_group
    return rank_group


def _check_layout(recipe: Recipe) -> str:
    expected = recipe.parallel.nodes * recipe.parallel.processes_per_node
    if dist.get_world_size() != expected:
        raise ValueError(
            f"{dist.get_world_size()} processes, but parallel.nodes {recipe.parallel.nodes} x processes_per_node "
            f"{recipe.parallel.processes_per_node} is {expected}: start this check as the job will be started"
        )
    return f"{expected} processes on {len(_by_node(_host()))} node(s)"


def _check_versions() -> str:
    """The same software everywhere; ours down to the last byte, for it may be a checkout."""
    mine = {"python": platform.python_version(), "eaft_megatron": _own_hash()}
    for name in _PACKAGES:
        if version := version_of(name):
            mine[name] = version
    if torch.cuda.is_available():
        mine |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    by_node = _by_node(mine)
    first_node, first = next(iter(by_node.items()))
    for node, other in by_node.items():
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(f"{name} is {first.get(name)} on {first_node} and {other.get(name)} on {node}")
    return ", ".join(f"{name} {value}" for name, value in mine.items())


def _own_hash() -> str:
    root = Path(__file__).parents[1]
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:12]


def _check_devices(recipe: Recipe, device: torch.device) -> str:
    wanted = recipe.slurm.gpus_per_node != 0 and "cpu" not in recipe.flags
    if device.type == "cpu":
        if wanted:
            raise ValueError(f"no CUDA device for {recipe.parallel.processes_per_node} processes (nvidia-smi?)")
        return "no GPU is asked for: gloo"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.device_count() < local:
        raise ValueError(f"{torch.cuda.device_count()} CUDA devices for {local} processes: exclude this node")
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        raise ValueError(f"cuda:{device.index} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another job?")
    names = sorted(set(_by_node(torch.cuda.get_device_name(device)).values()))
    if len(names) > 1:
        raise ValueError(f"different GPUs: {', '.join(names)}")
    return f"{names[0]}, {total / 2**30:.0f} GiB"


def _check_bandwidth(device: torch.device, minimum: float) -> str:
    """Bus bandwidth of an all-reduce over all processes: what each link carries, comparable across sizes."""
    size = dist.get_world_size()
    if size == 1:
        return "one process: nothing to measure"
    buffer = torch.ones((256 if device.type == "cuda" else 16) * 2**18, device=device)  # MiB of float32
    dist.all_reduce(buffer)  # connections are made now
    if not bool((buffer == size).all()):
        raise ValueError("an all-reduce of ones gives something else than the number of processes")
    times: list[float] = []
    while len(times) < 10 and sum(times) < _SECONDS:
        began = time.monotonic()
        dist.all_reduce(buffer)
        float(buffer[0])  # waits for the device
        slowest = torch.tensor([time.monotonic() - began], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # so that all ranks make the same number of rounds
        times.append(float(slowest))
    moved = 2 * (size - 1) / size * buffer.numel() * buffer.element_size()
    speed = moved / sorted(times)[len(times) // 2] / 1e9
    if speed < minimum:
        raise ValueError(f"{speed:.2f} GB/s, less than {minimum:g}: look at NCCL_SOCKET_IFNAME and NCCL_IB_HCA")
    return f"{speed:.2f} GB/s bus bandwidth, {buffer.numel() * 4 / 2**20:.0f} MiB over {size} processes"


def _check_shared(folder: Path) -> str:
    """What one node writes into the run folder, every other node reads."""
    nonce = on_rank_0(lambda: uuid.uuid4().hex)
    rank_file = folder / f".check-{nonce}-{dist.get_rank()}"
    error = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rank_file.write_text(nonce)
    except OSError as raised:
        error = raised
    dist.barrier()
    ranks = sorted(_by_node(dist.get_rank()).values())
    paths = [folder / f".check-{nonce}-{rank}" for rank in ranks]
    unseen = [path.name.rpartition("-")[2] for path in paths if not _holds(path, nonce)]
    dist.barrier()
    rank_file.unlink(missing_ok=True)
    if error is not None:
        raise ValueError(f"cannot write into {folder}: {error}")
    if unseen:
        raise ValueError(f"{folder}: what rank(s) {', '.join(unseen)} wrote is not seen here: the folder is not shared")
    return f"{folder} is written and read by every node"


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == text
    return False


def _on_one_process(check: Callable[[], str]) -> str:
    """On the first process of each node: the others would read the same files."""
    return check() if int(os.environ.get("LOCAL_RANK", "0")) == 0 else ""


def _check_loss(recipe: Recipe, group: dist.ProcessGroup | None, device: torch.device) -> str:
    """vocab_parallel_eaft_loss on this job's tensor-parallel group and device, against the float64 reference."""
    if group is None:
        raise ValueError(f"{dist.get_world_size()} processes do not divide by parallel.tensor {recipe.parallel.tensor}")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    vocab = _vocab_size(recipe)
    columns = -(-vocab // (128 * size)) * 128
    seed = torch.Generator().manual_seed(dist.get_rank() // size)
    logits = 4 * torch.randn(64, vocab, generator=seed)
    target = torch.randint(vocab, (64,), generator=seed)
    target[::7] = -100
    kept = torch.bfloat16 if recipe.optimization.bf16 else torch.float32
    full_logits = logits.to(kept).double().requires_grad_()
    settings = loss_settings(recipe)
    options = {"topk": settings.topk, "alpha": settings.alpha, "entropy_norm": settings.entropy_norm}
    expected = reference_eaft_loss(full_logits, target, **options)[0]
    expected.sum().backward()
    padded = torch.full((64, columns * size), 1e4, dtype=kept)  # padding that would be seen if it were read
    padded[:, :vocab] = logits
    mine = padded[:, rank * columns : (rank + 1) * columns].to(device).requires_grad_()
    actual = vocab_parallel_eaft_loss(mine, target.to(device), group=group, vocab_size=vocab, **options)
    actual.sum().backward()
    assert full_logits.grad is not None and mine.grad is not None
    expected_gradient = full_logits.grad[:, rank * columns : (rank + 1) * columns]
    loss_error = _relative(actual.detach().cpu().double(), expected.detach())
    gradient_error = _relative(mine.grad[:, : expected_gradient.shape[1]].cpu().double(), expected_gradient)
    allowed = 2e-2 if kept is torch.bfloat16 else 1e-4  # the gradient is rounded to the type of the logits
    if not (loss_error < 1e-4 and gradient_error < allowed):
        raise ValueError(
            f"loss differs by {loss_error:.1e}, gradient by {gradient_error:.1e} from the float64 reference: do not "
            "train with this installation"
        )
    return (
        f"EAFT on tensor {size}, {str(kept).removeprefix('torch.')}, {device.type}: loss within {loss_error:.0e}, "
        f"gradient within {gradient_error:.0e} of the float64 reference"
    )


def _vocab_size(recipe: Recipe) -> int:
    if recipe.model.config is not None:
        return recipe.model.config["vocab_size"]
    return file_checks.read_hf_config(file_checks.hf_folder(recipe))["vocab_size"]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _by_node(value: Any) -> dict[str, Any]:
    """Node -> the value of its first process. A collective."""
    values: dict[str, Any] = {}
    for node, other in gather((_host(), value)):
        values.setdefault(node, other)
    return values


def is_writing_rank() -> bool:
    """Whether this process prints the table."""
    return os.environ.get("RANK", "0") == "0"


def main(recipe: Recipe, args: argparse.Namespace) -> int:
    """Check and print; the exit code is the same on every process."""
    began = time.monotonic()
    rows = preflight(recipe, min_bandwidth=args.min_bandwidth)
    failed = sum(not row.ok for row in rows)
    if is_writing_rank():
        end = f"{failed} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed"
        print(f"{table(rows)}\n{end} in {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)
