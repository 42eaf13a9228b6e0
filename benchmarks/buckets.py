"""Time the statistics kernel with 128 and with 256 buckets, which eaft_megatron/loss/kernels/tuning.py has to choose.

    python benchmarks/buckets.py --output FILE.json

Without a GPU (``TRITON_INTERPRET=1`` and small sizes) it runs and its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from eaft_megatron.loss.exchange import Message
from eaft_megatron.loss.kernels.statistics import launch_statistics
from eaft_megatron.loss.kernels.tuning import stream_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[151936, 75968, 37984, 18992], help="columns of a shard"
    )
    parser.add_argument("--topk", type=int, nargs="+", default=[20, 128])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for vocab, k in itertools.product(options.vocab, options.topk):
        times = measure(options.tokens, vocab, k, options.repeats, device)
        rows.append({"vocab": vocab, "topk": k, "ms": times, "fastest": min(times, key=times.__getitem__)})
        print(rows[-1], "now:", stream_shape(k, torch.bfloat16).buckets)
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: interpreted, the times mean nothing"
    options.output.write_text(json.dumps({"device": name, "tokens": options.tokens, "rows": rows}, indent=1) + "\n")


def measure(tokens: int, vocab: int, k: int, repeats: int, device: str) -> dict[int, float]:
    """Median milliseconds by number of buckets, interleaved; the first round compiles."""
    logits = (3 * torch.randn(tokens, vocab, device=device)).to(torch.bfloat16)
    target = torch.randint(0, vocab, (tokens,), device=device)
    message = Message.empty(tokens, k, 1, logits.dtype, logits.device)
    times: dict[int, list[float]] = {128: [], 256: []}
    for repeat, buckets in itertools.product(range(-1, repeats), times):
        shape = stream_shape(k, logits.dtype)._replace(buckets=buckets)
        synchronize(device)
        began = time.perf_counter()
        launch_statistics(
            logits, target, message.logits, message.sums, start=0, width=vocab, k=k, ignore_index=-100, shape=shape
        )
        synchronize(device)
        if repeat >= 0:
            times[buckets].append(1e3 * (time.perf_counter() - began))
    return {buckets: round(statistics.median(values), 4) for buckets, values in times.items()}


def synchronize(device: str) -> None:
    """Until the GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
