"""The block of bytes that the packed exchange sends."""

from __future__ import annotations

import pytest
import torch

from eaft_megatron.loss.message import Message


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 46), (torch.float16, 46), (torch.float32, 88)])
def test_bytes_per_token(dtype, expected):
    """K = 20: 46 bytes a token for half precision, 88 for float32, and at most 30 beside."""
    message = Message.empty(1000, 21, 1, dtype, torch.device("cpu"))
    assert expected * 1000 <= message.buffer.numel() <= expected * 1000 + 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("sums", [1, 2])
def test_every_bit_arrives(dtype, tokens, sums):
    """Statistics of logits of that dtype survive the way there and back, sums in full precision, NaN and -inf too."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.randn(tokens, 3 + 1 + sums, generator=torch.Generator().manual_seed(0), dtype=wide)
    for column in (0, 1, 2, 4):
        expected[:, column] = expected[:, column].to(dtype)
    expected[:1, 2], expected[:1, 4], expected[1:2, 3] = -float("inf"), float("nan"), float("nan")
    message = Message.of(expected, 3, dtype)
    torch.testing.assert_close(message.statistics(), expected, rtol=0, atol=0, equal_nan=True)
    gathered = message.gather(None)
    assert gathered.values.shape == (1, tokens, 4) and gathered.sums.shape == (1, sums, tokens)
    assert message.values.data_ptr() % 16 == 0 or tokens == 0
