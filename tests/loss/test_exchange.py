"""The block of bytes that the packed exchange sends, and what both implementations write into it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eaft_megatron.loss import exchange, torch_impl
from eaft_megatron.loss.exchange import Message
from tests.loss.kernel_cases import shard_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 46), (torch.float16, 46), (torch.float32, 88)])
def test_bytes_per_token(dtype, expected):
    """K = 20: 46 bytes a token for half precision, 88 for float32, and at most 30 beside."""
    message = Message.empty(1000, 20, 1, dtype, torch.device("cpu"))
    assert expected * 1000 <= message.buffer.numel() <= expected * 1000 + 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("sums", [1, 2])
def test_every_bit_arrives(dtype, tokens, sums):
    """What is written through the views is read from the gathered message, sums in full precision, NaN and -inf too."""
    generator = torch.Generator().manual_seed(0)
    topk = torch.randn(tokens, 3, generator=generator).to(dtype)
    target_logit = torch.randn(tokens, generator=generator).to(dtype)
    expected_sums = torch.randn(sums, tokens, generator=generator, dtype=torch.float64)
    expected_sums = expected_sums.to(exchange.compute_dtype(dtype))
    topk[:1, 2], target_logit[:1], expected_sums[0, 1:2] = -float("inf"), float("nan"), float("nan")
    message = Message.empty(tokens, 3, sums, dtype, torch.device("cpu"))
    message.topk.copy_(topk)
    message.target_logit.copy_(target_logit)
    message.sums.copy_(expected_sums)
    gathered = message.start_gather(None)()
    for actual, expected in (
        (gathered.topk, topk),
        (gathered.target_logit, target_logit),
        (gathered.sums, expected_sums),
    ):
        torch.testing.assert_close(actual, expected.unsqueeze(0), rtol=0, atol=0, equal_nan=True)
    assert message.logits.data_ptr() % 16 == 0 or tokens == 0


def test_the_merge_takes_the_ranks_in_any_number():
    """Plain torch, four ranks' messages stacked: the unsharded softmax's numbers, whichever rank holds what."""
    generator = torch.Generator().manual_seed(1)
    full = 3 * torch.randn(6, 64, generator=generator, dtype=torch.float64)
    full[1, 17:] = -float("inf")  # whole shards of nothing
    target, vocab, k = torch.tensor([0, 16, 31, 32, -100, 60]), 61, 20
    parts = [shard_rows(full, rank, 4, vocab, k) for rank in range(4)]
    messages = [torch_impl.local_statistics(rows, target, plan) for rows, plan in parts]
    gathered = dataclasses.replace(messages[0], buffer=torch.stack([message.buffer for message in messages]))
    actual = exchange.merge_packed(gathered, target, parts[0][1])
    log_p = full[:, :vocab].log_softmax(dim=1)
    valid = target != -100
    q = full[:, :vocab].topk(k, dim=1).values.softmax(dim=1)
    expected = {
        "maximum": full[:, :vocab].amax(dim=1),
        "ce": torch.where(valid, -log_p.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1), 0),
        "entropy": torch.where(valid, torch.special.entr(q).sum(dim=1), 0),
        "sum_p_squared": torch.where(valid, (2 * log_p).exp().sum(dim=1), 0),
    }
    expected["sum_exp"] = (full[:, :vocab] - expected["maximum"].unsqueeze(1)).exp().sum(dim=1)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(actual, name), values, rtol=1e-12, atol=1e-12, msg=name)


def test_sums_are_added_in_rank_order():
    """Float32 sums of four ranks that round differently in any other order: rank 0's first, as on every rank."""
    rows, plan = shard_rows(torch.zeros(1, 8), 0, 4, 8, 2)
    message = torch_impl.local_statistics(rows, torch.tensor([0]), plan)
    gathered = dataclasses.replace(message, buffer=message.buffer.repeat(4, 1))
    gathered.sums[:, 0, 0] = torch.tensor([2.0**24, 1.0, 1.0, 1.0])
    assert exchange.merge_packed(gathered, torch.tensor([0]), plan).sum_exp.tolist() == [2.0**24]
