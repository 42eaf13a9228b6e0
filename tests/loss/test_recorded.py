"""The losses' own numbers, recorded once, so that a change of the code that should change no number changes none.

exp, log and the order in which torch adds differ in the last place from one processor to the next. Where this machine
computes a fixed probe to the recorded bits, everything is compared bit by bit (a hash of each tensor); elsewhere a
weighted sum of each tensor's positive part is, to 1e-12 in float64 and to less in what is rounded to less.

To record anew, on purpose: ``python -m tests.loss.test_recorded``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron import (
    ConflictMaskGate,
    EAFTGate,
    Gate,
    SFTKLGate,
    TALRGate,
    vocab_parallel_linear_token_loss,
    vocab_parallel_token_loss,
    vocab_parallel_topk_entropy,
)
from eaft_megatron.loss import torch_impl
from eaft_megatron.testing import run_distributed


@dataclasses.dataclass(frozen=True)
class SumOfSquaresGate(Gate):
    """``p ** sum_v p_v ** 2``, by the operator that was recorded."""

    needs: ClassVar[frozenset[str]] = frozenset({"sum_p_squared"})

    def weight(self, stats, context):
        return stats.probability**stats.sum_p_squared


RECORDED = Path(__file__).with_name("recorded_losses.json")
SIZES = (1, 2)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS, COLUMNS, TRUE, WIDTH = 9, 200, 181, 5
GATES = {
    "eaft": EAFTGate(),
    "conflict mask": ConflictMaskGate(percentile=40.0),
    "talr": TALRGate(),
    "sft-kl": SFTKLGate(),
    "sum of squares": SumOfSquaresGate(),
}
LINEAR = {
    "dropped": {},
    "sequence parallel": {"sequence_parallel": True, "drop_ignored": False, "logits_scale": 0.75},
    "bounded": {"max_valid": 7},
}


def _problem() -> dict[str, Tensor]:
    """The inputs, from integers, so that they are the same numbers everywhere; ignored tokens in three runs."""

    def numbers(*shape: int, seed: int) -> Tensor:
        count = torch.Size(shape).numel()
        return ((torch.arange(count) * 7919 + seed) * 104729 % 4093 - 2046).double().reshape(shape) / 256

    target = torch.arange(TOKENS + 1) * 67 % TRUE
    target[[0, 3, 4, 8]] = -100
    logits = numbers(TOKENS + 1, COLUMNS, seed=1)
    logits[2] = logits[2].round()  # ties
    logits[5, 40:] = -torch.inf
    target[5] = 11
    return {
        "logits": logits,
        "target": target,
        "hidden": numbers(TOKENS + 1, WIDTH, seed=2) / 4,
        "weight": numbers(COLUMNS, WIDTH, seed=3) / 4,
        "upstream": numbers(TOKENS + 1, seed=4).abs(),
        "ref_logprob": -numbers(TOKENS + 1, seed=5).abs() / 4,
        "sequence_ids": torch.arange(TOKENS + 1) // 4,
    }


def _variants() -> list[dict[str, Any]]:
    plain = [
        {"gate": gate, "dtype": "float64", "exchange": exchange, "compact": compact}
        for gate in GATES
        for exchange, compact in (("packed", True), ("split", False))
    ]
    plain += [
        {"gate": "eaft", "dtype": dtype, "exchange": exchange, "compact": exchange == "split"}
        for dtype in ("float32", "bfloat16", "float16")
        for exchange in ("packed", "split")
    ]
    linear = [
        {"linear": linear, "gate": gate, "dtype": dtype, "exchange": exchange}
        for linear, dtype, exchange in (
            ("dropped", "float64", "packed"),
            ("dropped", "bfloat16", "packed"),
            ("sequence parallel", "float64", "split"),
            ("bounded", "float32", "packed"),
        )
        for gate in ("eaft", "sum of squares")
    ]
    return plain + linear


def _answer(variant: dict[str, Any]) -> dict[str, Tensor]:
    """One rank's loss, statistics and gradients."""
    problem, rank, size = _problem(), dist.get_rank(), dist.get_world_size()
    dtype = DTYPES[variant["dtype"]]
    options = {
        "group": dist.group.WORLD,
        "side": {"ref_logprob": problem["ref_logprob"]},
        "sequence_ids": problem["sequence_ids"],
        "topk": 2,  # with a shard of 100 columns and blocks of 16 the two-level top-K is taken
        "vocab_size": TRUE,
        "exchange": variant["exchange"],
        "return_stats": True,
    }
    gate, target = GATES[variant["gate"]], problem["target"]
    if "linear" in variant:
        linear = LINEAR[variant["linear"]]
        hidden = problem["hidden"].to(dtype)
        if linear.get("sequence_parallel"):
            hidden = hidden.chunk(size)[rank].clone()
        leaves = {"hidden": hidden, "weight": problem["weight"].to(dtype).chunk(size)[rank].clone()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        loss, stats = vocab_parallel_linear_token_loss(
            *leaves.values(), target, gate, chunk_tokens=4, **linear, **options
        )
    else:
        leaves = {"logits": problem["logits"].to(dtype).chunk(size, dim=1)[rank].clone().requires_grad_()}
        compact = variant["compact"]
        loss, stats = vocab_parallel_token_loss(leaves["logits"], target, gate, compact_ignored=compact, **options)
    loss.backward(problem["upstream"].to(loss.dtype))
    out = {"loss": loss, "ce": stats.ce, "entropy": stats.entropy, "weight": stats.weight}
    if stats.sum_p_squared is not None:
        out["sum_p_squared"] = stats.sum_p_squared
    return {name: tensor.detach() for name, tensor in out.items()} | {
        f"{name}.grad": leaf.grad for name, leaf in leaves.items()
    }


def _entropies() -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = {
        name: _problem()["logits"].to(dtype).chunk(size, dim=1)[rank].contiguous() for name, dtype in DTYPES.items()
    }
    return {
        name: vocab_parallel_topk_entropy(shard, group=dist.group.WORLD, topk=7, vocab_size=TRUE)
        for name, shard in shards.items()
    }


def _probe() -> str:
    """A hash of what the losses are made of: exp, log, sums and matrix products on this processor."""
    problem, out = _problem(), []
    for dtype in DTYPES.values():
        logits = problem["logits"][:2].to(dtype)
        if dtype in (torch.float64, torch.float32):
            e = (logits / 8).exp()
            out += [
                e,
                e.exp2(),
                torch.add(e[:, :1], e, alpha=1.25),
                e.sum(dim=1),
                e.log(),
                torch.log1p(e),
                e[:, :40].sum(dim=1),
                e.square().sum(dim=1),
            ]
        out.append(problem["hidden"].to(dtype) @ problem["weight"].to(dtype).t())
    return "-".join(_digest(tensor) for tensor in out)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def _all_answers() -> dict[str, Any]:
    torch_impl._BLOCK, torch_impl._BLOCKS_STEP, torch_impl._CHUNK_NUMBERS_CPU = (
        16,
        1,
        2 * COLUMNS,
    )  # several chunks; the two-level top-K
    answers = {json.dumps(variant): _answer(variant) for variant in _variants()}
    return {"probe": _probe(), "answers": answers | {"entropy alone": _entropies()}}


def _summary(ranks: list[dict[str, Tensor]]) -> dict[str, str]:
    """By tensor: a hash of its bits on every rank, and a weighted sum of all that is positive: it cannot cancel."""
    summary = {}
    for name in ranks[0]:
        bits = "".join(_digest(rank[name]) for rank in ranks)
        everything = torch.cat([rank[name].double().flatten() for rank in ranks])
        mixed = everything.clamp(min=0) @ torch.linspace(0.5, 1.5, everything.numel(), dtype=torch.float64)
        summary[name] = f"{bits} {float(mixed).hex()}"
    return summary


def _summaries(size: int) -> dict[str, Any]:
    ranks = run_distributed(_all_answers, size)
    summaries = {key: _summary([rank["answers"][key] for rank in ranks]) for key in ranks[0]["answers"]}
    return {"probe": ranks[0]["probe"], "answers": summaries}


@pytest.mark.parametrize("size", SIZES)
def test_the_numbers_are_those_recorded(size):
    """Loss, statistics and gradients of every dtype, exchange and gate, plain and linear, at TP 1 and 2."""
    expected, actual = json.loads(RECORDED.read_text())[str(size)], _summaries(size)
    assert actual["answers"].keys() == expected["answers"].keys()
    if actual["probe"] == expected["probe"]:
        assert actual["answers"] == expected["answers"]
    for key, summary in expected["answers"].items():
        exact = "float64" in key
        for name, text in summary.items():
            numbers = [float.fromhex(line.split()[1]) for line in (actual["answers"][key][name], text)]
            half = "float16" in key + name and ("grad" in name or "linear" in key)
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-12 if exact else 0.02 if half else 1e-4), (key, name)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({size: _summaries(size) for size in SIZES}, indent=0) + "\n")
