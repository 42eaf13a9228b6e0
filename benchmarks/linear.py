"""Time and memory of output layer + loss, forward + backward, side by side.

    python benchmarks/linear.py --output FILE.json

Peers start from the last hidden states and end with the gradients of hidden states and weight. Beside ours: Megatron's
output layer (the autograd function under ColumnParallelLinear) followed by its plain cross entropy, which is what users
run today, or by our loss on whole logits; where they are installed, Liger's fused linear cross entropy (on a GPU) and
axolotl's EAFT. All of them run in one process per rank, interleaved. On the CPU the ranks of a tensor-parallel group
are real processes joined by gloo. On a GPU (--device cuda, the default where there is one) one process times one rank's
shard, without the exchange.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # freed tensors go back to the system: honest peaks

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

from devices import Cpu, Gpu  # noqa: E402
from loss import DTYPES, machine  # noqa: E402

from eaft_megatron import vocab_parallel_eaft_loss, vocab_parallel_linear_eaft_loss  # noqa: E402
from eaft_megatron.testing import run_distributed  # noqa: E402

DEFAULTS = {
    "cpu": {"tokens": [1024, 2048], "hidden": 512, "vocab": 32000, "dtype": "fp32", "tp": [1], "chunk": 256},
    "cuda": {"tokens": [8192, 16384], "hidden": 4096, "vocab": 151936, "dtype": "bf16", "tp": [1, 8], "chunk": 4096},
}
Peer = Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup], Tensor]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    about = machine(options)
    rows: list[dict] = []
    with Gpu().process_group() if options.device == "cuda" else nullcontext():
        for tokens, tp, ignored in itertools.product(options.tokens, options.tp, options.ignored):
            case = {"tokens": tokens, "tp": tp, "ignored": ignored}
            case |= {name: getattr(options, name) for name in ("hidden", "vocab", "dtype", "chunk")}
            if options.device == "cuda":
                ranks = [run_case(case, options.threads, options.repeats, "cuda")]
            else:
                ranks = run_distributed(run_case, tp, case, options.threads, options.repeats, "cpu", timeout=3600)
            rows += merge_ranks(case, ranks)
            print(table(rows[-len(ranks[0]) :]), flush=True)
    if options.output:
        command = " ".join(["benchmarks/linear.py", *(argv or sys.argv[1:])])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"command": command, **about, "rows": rows}, indent=1) + "\n")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--hidden", type=int, help="width of the hidden states")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--tp", type=int, nargs="+")
    parser.add_argument("--chunk", type=int, help="chunk_tokens of ours")
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0, 0.75], help="share of ignored tokens")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def output_layer(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[S, 1, V_local]`` logits as ColumnParallelLinear makes them, hidden gradient all-reduced in the backward."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    return linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=group.size() > 1,
        sequence_parallel=False,
        tp_group=group,
    )


def megatron(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Megatron's output layer and its plain cross entropy. It knows no ignored tokens."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(output_layer(hidden, weight, group), target.clamp(min=0))


def whole_logits(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Megatron's output layer and our loss."""
    return vocab_parallel_eaft_loss(output_layer(hidden, weight, group), target, group=group, inplace_backward=True)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup, **options) -> Tensor:
    """Ours."""
    return vocab_parallel_linear_eaft_loss(hidden, weight, target, group=group, **options)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """torch's own linear cross entropy as it comes: one rank, torch 2.13 or later."""
    loss = torch.nn.functional.linear_cross_entropy(hidden.flatten(0, 1), weight, target.flatten(), reduction="none")
    return loss.view(target.shape)


def liger(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Liger's fused linear cross entropy as trainers call it: a sum, its gradients made in the forward pass."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    total = liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, target.flatten(), reduction="sum")
    return _spread(total, target)


def axolotl(hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """axolotl's EAFT, which takes whole logits (0.19 has no linear form of it) and shifts them itself."""
    from axolotl.monkeypatch.loss.eaft import eaft_loss

    logits = (hidden.flatten(0, 1) @ weight.t()).unsqueeze(0)
    labels = torch.cat([target.new_full((1, 1), -100), target.flatten()[:-1].unsqueeze(0)], dim=1)
    return _spread(eaft_loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=1), target)


def _spread(total: Tensor, target: Tensor) -> Tensor:
    """A sum as equal losses of all tokens, for a benchmark that hands out a gradient for each of them."""
    return (total / target.numel()).expand(target.shape)


def peers_for(case: dict, device: str) -> dict[str, Peer]:
    """By name; the first is what the others are compared with. Those that are not installed are left out."""
    peers: dict[str, Peer] = {
        "megatron": megatron,
        "megatron's layer, our loss": whole_logits,
        "eaft_megatron": partial(chunked, chunk_tokens=case["chunk"], drop_ignored=True),
    }
    if case["ignored"]:
        peers["eaft_megatron, every row"] = partial(chunked, chunk_tokens=case["chunk"], drop_ignored=False)
    if case["tp"] == 1 and hasattr(torch.nn.functional, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = torch_linear_cross_entropy
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        peers["Liger, fused linear"] = liger
    if case["tp"] == 1 and importlib.util.find_spec("axolotl"):
        peers["axolotl, EAFT on logits"] = axolotl
    return peers


def run_case(case: dict, threads: int, repeats: int, device_name: str) -> dict[str, dict]:
    """On one rank: every peer's seconds per repeat and peak extra bytes, the two gradients among them."""
    torch.set_num_threads(threads)
    from megatron.core import parallel_state

    device = Gpu() if device_name == "cuda" else Cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    hidden, weight, target = _inputs(case, device_name)
    upstream = (target != -100).float()
    peers = peers_for(case, device_name)
    out: dict[str, dict] = {name: {"forward": [], "backward": []} for name in peers}
    for repeat in range(-1, repeats):  # the first round warms up, and measures memory
        for name, peer in peers.items():
            dist.barrier()

            def once(peer=peer) -> tuple[float, float]:
                leaves = (hidden, weight)
                return device.forward_backward(lambda: peer(hidden, weight, target, dist.group.WORLD), leaves, upstream)

            if repeat < 0:
                with device.peak_memory() as peak:
                    once()
                out[name]["peak_extra_bytes"] = peak["bytes"]
                continue
            forward, backward = once()
            out[name]["forward"].append(forward)
            out[name]["backward"].append(backward)
    parallel_state.destroy_model_parallel()
    return out


def _inputs(case: dict, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(hidden [S, 1, H], weight [V_local, H], target [S, 1])``; ignored tokens come in runs, as prompts do."""
    world, rank = dist.get_world_size(), dist.get_rank()
    width = -(-case["vocab"] // case["tp"])
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    hidden = torch.randn(case["tokens"], 1, case["hidden"], generator=shared)
    weight = torch.randn(width, case["hidden"], generator=own) * 3 / case["hidden"] ** 0.5
    target = torch.randint(0, min(width * world, case["vocab"]), (case["tokens"], 1), generator=shared)
    place = torch.arange(case["tokens"]) % 256
    target[place < 256 * case["ignored"]] = -100
    dtype = DTYPES[case["dtype"]]
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        target.to(device),
    )


def merge_ranks(case: dict, ranks: list[dict]) -> list[dict]:
    """One row per peer: a repeat takes as long as its slowest rank; medians over repeats."""
    rows = []
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        forward = [max(times) for times in zip(*(part["forward"] for part in parts), strict=True)]
        backward = [max(times) for times in zip(*(part["backward"] for part in parts), strict=True)]
        total = [f + b for f, b in zip(forward, backward, strict=True)]
        numbers = {
            "forward_ms": round(1e3 * statistics.median(forward), 2),
            "backward_ms": round(1e3 * statistics.median(backward), 2),
            "total_ms": round(1e3 * statistics.median(total), 2),
            "spread_ms": [round(1e3 * min(total), 2), round(1e3 * max(total), 2)],
            "peak_extra_mib": round(max(part["peak_extra_bytes"] for part in parts) / 2**20, 1),
        }
        rows.append(case | {"peer": name} | numbers)
    for row in rows:
        row["ratio_to_megatron"] = round(row["total_ms"] / rows[0]["total_ms"], 3)
        row["memory_to_megatron"] = round(row["peak_extra_mib"] / max(rows[0]["peak_extra_mib"], 0.1), 3)
    return rows


def table(rows: list[dict]) -> str:
    """Aligned text of one case."""
    case = rows[0]
    lines = [
        f"\n{case['tokens']} tokens, H {case['hidden']}, V {case['vocab']}, tp {case['tp']}, {case['dtype']}, "
        f"{case['ignored']:.0%} ignored, chunks of {case['chunk']}",
        f"  {'':28}{'forward':>10}{'backward':>10}{'total ms':>10}{'ratio':>8}{'MiB':>9}{'ratio':>8}",
    ]
    for row in rows:
        lines.append(
            f"  {row['peer']:28}{row['forward_ms']:10.1f}{row['backward_ms']:10.1f}{row['total_ms']:10.1f}"
            f"{row['ratio_to_megatron']:8.2f}{row['peak_extra_mib']:9.1f}{row['memory_to_megatron']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
