"""Time and memory of the losses, forward + backward, side by side.

    python benchmarks/loss.py --output benchmarks/results/NAME.json

All peers run in one process (per rank), interleaved, so that whatever drifts hits all of them. Every run gets fresh
logits, made outside the timing. Writes the JSON, a plot beside it, and a table on the terminal. CPU and gloo only in
this release.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # freed tensors go back to the system: honest peaks

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import peers_for  # noqa: E402

from eaft_megatron import __version__  # noqa: E402
from eaft_megatron.testing import run_distributed  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    cases = list(itertools.product(options.tp, options.vocab, options.dtype, options.ignored))
    about = machine(options)  # before the work, so that what is missing is missed at once
    rows: list[dict] = []
    for tp, vocab, dtype, ignored in tqdm(cases, desc="cases"):
        case = {"tp": tp, "vocab": vocab, "dtype": dtype, "ignored": ignored, "tokens": options.tokens}
        ranks = run_distributed(run_case, tp, case, options.threads, options.repeats, timeout=3600)
        rows += merge_ranks(case, ranks)
    result = {"command": " ".join(["benchmarks/loss.py", *(argv or sys.argv[1:])]), **about, "rows": rows}
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, result["title"], options.output.with_suffix(".png"))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0, 0.75], help="share of ignored tokens")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def run_case(case: dict, threads: int, repeats: int) -> dict[str, dict]:
    """On one rank: every peer's times (seconds, per repeat), peak extra memory (bytes) and traffic."""
    torch.set_num_threads(threads)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case["tp"])
    rank, width = dist.get_rank(), case["vocab"] // case["tp"]
    generator = torch.Generator().manual_seed(rank)
    # A few hundred distinct rows are enough, and quicker to make than all of them.
    block = 3 * torch.randn(min(256, case["tokens"]), 1, width, generator=generator)
    source = block.to(DTYPES[case["dtype"]]).repeat(-(-case["tokens"] // len(block)), 1, 1)[: case["tokens"]]
    shared = torch.Generator().manual_seed(99)
    target = torch.randint(0, case["vocab"], (case["tokens"], 1), generator=shared)
    target[torch.rand(target.shape, generator=shared) < case["ignored"]] = -100
    upstream = (target != -100).float()
    peers = peers_for(case["tp"], case["ignored"])
    out: dict[str, dict] = {name: {"forward": [], "backward": []} for name in peers}
    for repeat in range(-1, repeats):  # the first round warms up, and measures memory and traffic
        for name, peer in peers.items():
            logits = source.clone().requires_grad_() * 1  # not a leaf: some peers overwrite it
            dist.barrier()
            if repeat < 0:
                with peak_memory() as peak, traffic() as calls:
                    _forward_backward(peer, logits, target, upstream)
                out[name] |= {"peak_extra_bytes": peak["bytes"], "collectives": calls}
            else:
                forward, backward = _forward_backward(peer, logits, target, upstream)
                out[name]["forward"].append(forward)
                out[name]["backward"].append(backward)
            del logits
    parallel_state.destroy_model_parallel()
    return out


def _forward_backward(peer, logits, target, upstream) -> tuple[float, float]:
    began = time.perf_counter()
    loss = peer(logits, target, dist.group.WORLD)
    middle = time.perf_counter()
    torch.autograd.grad(loss, logits, upstream)
    return middle - began, time.perf_counter() - middle


@contextmanager
def peak_memory() -> Iterator[dict]:
    """Peak resident memory of this process within the block, beyond what it had at the start (Linux)."""
    result = {"bytes": None}
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    yield result
    result["bytes"] = max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


@contextmanager
def traffic() -> Iterator[list[dict]]:
    """Every collective called within the block, with the bytes this rank puts in."""
    from eaft_megatron.loss import collectives

    calls: list[dict] = []
    places = [(dist, "all_reduce", 0), (collectives, "_all_gather", 1)]
    originals = [getattr(owner, name) for owner, name, _ in places]

    def counted(name, original, index):
        def call(*args, **kwargs):
            tensor = args[index]
            calls.append({"name": name.strip("_"), "bytes": tensor.numel() * tensor.element_size()})
            return original(*args, **kwargs)

        return call

    for (owner, name, index), original in zip(places, originals, strict=True):
        setattr(owner, name, counted(name, original, index))
    try:
        yield calls
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def merge_ranks(case: dict, ranks: list[dict]) -> list[dict]:
    """One row per peer: a repeat takes as long as its slowest rank; medians over repeats."""
    rows = []
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        forward = [max(times) for times in zip(*(part["forward"] for part in parts), strict=True)]
        backward = [max(times) for times in zip(*(part["backward"] for part in parts), strict=True)]
        total = [f + b for f, b in zip(forward, backward, strict=True)]
        rows.append(
            case
            | {
                "peer": name,
                "forward_ms": round(1e3 * statistics.median(forward), 2),
                "backward_ms": round(1e3 * statistics.median(backward), 2),
                "total_ms": round(1e3 * statistics.median(total), 2),
                "spread_ms": [round(1e3 * min(total), 2), round(1e3 * max(total), 2)],
                "peak_extra_mib": round(max(part["peak_extra_bytes"] for part in parts) / 2**20, 1),
                "collectives": parts[0]["collectives"],
            }
        )
    (base,) = (row for row in rows if row["peer"] == "megatron")
    for row in rows:
        row["ratio_to_megatron"] = round(row["total_ms"] / base["total_ms"], 3)
        row["memory_to_megatron"] = round(row["peak_extra_mib"] / max(base["peak_extra_mib"], 0.1), 3)
    return rows


def machine(options: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    import importlib.metadata

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = ("torch", "megatron-core")
    return {
        "title": f"{cpu}, {options.threads} thread(s) per process, {options.tokens} tokens",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"eaft_megatron": __version__},
        "threads": options.threads,
        "repeats": options.repeats,
    }


def table(rows: list[dict]) -> str:
    """Aligned text, cases apart."""
    lines, last = [], None
    for row in rows:
        case = f"tp {row['tp']}, V {row['vocab']}, {row['dtype']}, {row['ignored']:.0%} ignored"
        if case != last:
            lines += [
                "",
                case,
                f"  {'':32}{'forward':>9}{'backward':>10}{'total ms':>10}{'ratio':>8}{'MiB':>9}  traffic",
            ]
            last = case
        sent = sum(call["bytes"] for call in row["collectives"])
        lines.append(
            f"  {row['peer']:32}{row['forward_ms']:9.1f}{row['backward_ms']:10.1f}{row['total_ms']:10.1f}"
            f"{row['ratio_to_megatron']:8.2f}{row['peak_extra_mib']:9.1f}  {len(row['collectives'])} calls, {sent:,} B"
        )
    return "\n".join(lines)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Time relative to Megatron's plain cross entropy, one group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["tp"], row["vocab"], row["dtype"], row["ignored"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(8, 1.1 * len(cases)), 5), layout="constrained")
    step = 0.8 / len(names)
    for slot, name in enumerate(names):
        chosen = [row for row in rows if row["peer"] == name]
        where = [cases.index((row["tp"], row["vocab"], row["dtype"], row["ignored"])) for row in chosen]
        heights = [row["ratio_to_megatron"] for row in chosen]
        axes.bar([x + slot * step for x in where], heights, step, label=name, color=plt.cm.tab10(slot))
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [f"tp {tp}\nV {vocab // 1000}k\n{dtype}\n{ignored:.0%} ign." for tp, vocab, dtype, ignored in cases]
    axes.set_xticks([x + 0.4 - step / 2 for x in range(len(cases))], labels, fontsize=8)
    axes.set_ylabel("time, forward + backward\n(Megatron's plain cross entropy = 1)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
