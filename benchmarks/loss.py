"""Time and memory of the losses, forward + backward, side by side.

    python benchmarks/loss.py --output benchmarks/results/NAME.json

All peers run in one process (per rank), interleaved, so that whatever drifts hits all of them. Every run gets fresh
logits, made outside the timing. Writes the JSON, a plot beside it, and a table on the terminal.

On the CPU the ranks of a tensor-parallel group are real processes joined by gloo. On a GPU (--device cuda, the default
where there is one) a single process times one rank's shard, without the exchange. Every time is also given as a
multiple of the floor: the bytes that forward and backward must move, at the bandwidth of a plain copy of the same
logits on the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # freed tensors go back to the system: honest peaks

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

from devices import Cpu, Gpu, copy_seconds, floor_seconds  # noqa: E402
from peers import peers_for  # noqa: E402

from eaft_megatron import __version__  # noqa: E402
from eaft_megatron.testing import run_distributed  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    cases = list(itertools.product(options.tokens, options.tp, options.vocab, options.dtype, options.ignored))
    about = machine(options)  # before the work, so that what is missing is missed at once
    rows: list[dict] = []
    with Gpu().process_group() if options.device == "cuda" else nullcontext():
        for tokens, tp, vocab, dtype, ignored in tqdm(cases, desc="cases"):
            case = {"tp": tp, "vocab": vocab, "dtype": dtype, "ignored": ignored, "tokens": tokens}
            if options.device == "cuda":
                ranks = [run_case(case, options.threads, options.repeats, "cuda")]
            else:
                ranks = run_distributed(run_case, tp, case, options.threads, options.repeats, "cpu", timeout=3600)
            rows += merge_ranks(case, ranks)
    result = {"command": " ".join(["benchmarks/loss.py", *(argv or sys.argv[1:])]), **about, "rows": rows}
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, result["title"], options.output.with_suffix(".png"))
    return 0


# What is measured where nothing else is asked for. The GPU's vocabularies are those of Qwen2.5, Qwen3 and GLM-4.
DEFAULTS = {
    "cpu": {
        "tokens": [2048],
        "vocab": [32000, 151936],
        "dtype": list(DTYPES),
        "tp": [1, 2, 4],
        "ignored": [0.0, 0.5, 0.75],
    },
    "cuda": {
        "tokens": [4096, 8192, 16384, 32768],
        "vocab": [151936, 152064, 151552],
        "dtype": ["bf16"],
        "tp": [1, 2, 4, 8],
        "ignored": [0.0, 0.5, 0.9],
    },
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--tp", type=int, nargs="+")
    parser.add_argument(
        "--ignored", type=float, nargs="+", help="share of ignored tokens, drawn at random; 0.5: every second one"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads per process")
    parser.add_argument("--repeats", type=int, help="default: 5 on the CPU, 20 on a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    for name, value in (DEFAULTS[options.device] | {"repeats": 20 if options.device == "cuda" else 5}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def run_case(case: dict, threads: int, repeats: int, device_name: str) -> dict:
    """On one rank: every peer's times (seconds, per repeat), peak extra memory (bytes) and traffic."""
    torch.set_num_threads(threads)
    from megatron.core import parallel_state

    device = Gpu() if device_name == "cuda" else Cpu()
    world = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    source, target = _inputs(case, dist.get_rank(), world, device_name)
    upstream = (target != -100).float()
    peers, missing = peers_for(case["tp"], case["ignored"], device_name)
    out: dict[str, dict] = {name: {"forward": [], "backward": []} for name in peers}
    for repeat in range(-1, repeats):  # the first round warms up, and measures memory and traffic
        for name in list(peers):
            try:
                _run_once(device, out[name], peers[name], source, target, upstream, measured=repeat >= 0)
            except Exception as error:  # of another package, or of the machine: reported, and the rest goes on
                if name.startswith("eaft_megatron") and not isinstance(error, torch.OutOfMemoryError):
                    raise
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                del peers[name], out[name]
    copied = copy_seconds(device, source, repeats)
    parallel_state.destroy_model_parallel()
    return {"peers": out, "missing": missing, "copy_seconds": copied, "bytes": source.nbytes}


def _inputs(case: dict, rank: int, world: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(logits [N, 1, V_local], target [N, 1])``; with one rank for a larger tp, its targets are all in its shard."""
    width = -(-case["vocab"] // case["tp"])
    generator = torch.Generator().manual_seed(rank)
    # A few hundred distinct rows are enough, and quicker to make than all of them.
    block = 3 * torch.randn(min(256, case["tokens"]), 1, width, generator=generator)
    block = block.to(DTYPES[case["dtype"]]).to(device)
    source = block.repeat(-(-case["tokens"] // len(block)), 1, 1)[: case["tokens"]]
    shared = torch.Generator().manual_seed(99)
    target = torch.randint(0, min(width * world, case["vocab"]), (case["tokens"], 1), generator=shared)
    if case["ignored"] == 0.5:
        target[::2] = -100  # every second token: the layout that is hardest to skip
    else:
        target[torch.rand(target.shape, generator=shared) < case["ignored"]] = -100
    return source, target.to(device)


def _run_once(device: Cpu | Gpu, out: dict, peer, source, target, upstream, *, measured: bool) -> None:
    logits = source.clone().requires_grad_() * 1  # not a leaf: some peers overwrite it
    dist.barrier()

    def once() -> tuple[float, float]:
        return device.forward_backward(lambda: peer(logits, target, dist.group.WORLD), logits, upstream)

    if measured:
        forward, backward = once()
        out["forward"].append(forward)
        out["backward"].append(backward)
        return
    with device.peak_memory() as peak, traffic() as calls:
        once()
    out |= {"peak_extra_bytes": peak["bytes"], "collectives": calls}


@contextmanager
def traffic() -> Iterator[list[dict]]:
    """Every collective called within the block, with the bytes this rank puts in."""
    from eaft_megatron.loss import exchange

    calls: list[dict] = []
    places = [(dist, "all_reduce", 0), (exchange, "_all_gather", 1)]
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
    copied = max(rank["copy_seconds"] for rank in ranks)
    floor = floor_seconds(copied, case["ignored"])
    rows = []
    for name in ranks[0]["peers"]:
        parts = [rank["peers"][name] for rank in ranks]
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
                "ratio_to_floor": round(statistics.median(total) / floor, 2),
                "collectives": parts[0]["collectives"],
            }
        )
    base = next((row for row in rows if row["peer"] == "megatron"), None)
    for row in rows if base else []:
        row["ratio_to_megatron"] = round(row["total_ms"] / base["total_ms"], 3)
        row["memory_to_megatron"] = round(row["peak_extra_mib"] / max(base["peak_extra_mib"], 0.1), 3)
    bandwidth = 2 * ranks[0]["bytes"] / copied / 1e9
    for row in rows:
        row |= {"floor_ms": round(1e3 * floor, 3), "copy_gb_per_s": round(bandwidth, 1)}
    return rows + [case | {"peer": name, "missing": why} for name, why in ranks[0]["missing"].items()]


def machine(options: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    import importlib.metadata

    about = (Gpu() if options.device == "cuda" else Cpu()).describe()
    versions = {"eaft_megatron": __version__}
    for name in ("torch", "megatron-core", "triton", "transformer-engine", "liger-kernel", "flash-attn", "axolotl"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    tokens = "/".join(map(str, options.tokens))
    how = "one rank's shard" if options.device == "cuda" else f"{options.threads} thread(s) per process"
    return {
        "title": f"{about['device']}, {how}, {tokens} tokens",
        **about,
        "python": platform.python_version(),
        "versions": versions,
        "threads": options.threads,
        "repeats": options.repeats,
    }


def table(rows: list[dict]) -> str:
    """Aligned text, cases apart."""
    lines, last = [], None
    for row in rows:
        case = f"{row['tokens']} tokens, tp {row['tp']}, V {row['vocab']}, {row['dtype']}, {row['ignored']:.0%} ignored"
        if case != last:
            lines += [
                "",
                case + (f"; copy {row['copy_gb_per_s']:.0f} GB/s" if "copy_gb_per_s" in row else ""),
                f"  {'':32}{'forward':>9}{'backward':>10}{'total ms':>10}{'ratio':>8}{'floor':>8}{'MiB':>9}  traffic",
            ]
            last = case
        if "missing" in row:
            lines.append(f"  {row['peer']:32}{row['missing']}")
            continue
        sent = sum(call["bytes"] for call in row["collectives"])
        lines.append(
            f"  {row['peer']:32}{row['forward_ms']:9.2f}{row['backward_ms']:10.2f}{row['total_ms']:10.2f}"
            f"{row.get('ratio_to_megatron', math.nan):8.2f}{row['ratio_to_floor']:8.2f}{row['peak_extra_mib']:9.1f}  "
            f"{len(row['collectives'])} calls, {sent:,} B"
        )
    return "\n".join(lines)


def plotted(rows: list[dict]) -> list[dict]:
    """What one picture can hold: one number of tokens (that nearest 8192), at most two vocabularies."""
    tokens = min({row["tokens"] for row in rows}, key=lambda number: abs(number - 8192))
    vocabularies = list(dict.fromkeys(row["vocab"] for row in rows))[:2]
    return [
        row for row in rows if row["tokens"] == tokens and row["vocab"] in vocabularies and "ratio_to_megatron" in row
    ]


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Time relative to Megatron's plain cross entropy, one group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = plotted(rows)
    if not rows:
        return
    cases = list(dict.fromkeys((row["tp"], row["vocab"], row["dtype"], row["ignored"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(8, 1.1 * len(cases)), 5), layout="constrained")
    step = 0.8 / len(names)
    for slot, name in enumerate(names):
        chosen = [row for row in rows if row["peer"] == name]
        where = [cases.index((row["tp"], row["vocab"], row["dtype"], row["ignored"])) for row in chosen]
        heights = [row["ratio_to_megatron"] for row in chosen]
        axes.bar([x + slot * step for x in where], heights, step, label=name, color=plt.cm.tab20(slot))
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
