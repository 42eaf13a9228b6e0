"""The stand-in for Transformer Engine against plain torch, in float64, whole and over real processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eaft_megatron.testing import run_distributed
from eaft_megatron.testing.te_standin.attention import DotProductAttention
from eaft_megatron.testing.te_standin.linear import GroupedLinear, LayerNormLinear, Linear
from eaft_megatron.testing.te_standin.norms import LayerNorm, RMSNorm
from eaft_megatron.testing.te_standin.packing import thd_get_partitioned_indices
from eaft_megatron.testing.te_standin.rotary import apply_rotary_pos_emb

HEADS, GROUPS, WIDTH = 4, 2, 6
ROWS = [8, 4, 12]  # lengths of the packed sequences, each a multiple of 2 x 2
BOUNDS = torch.tensor([0, 8, 12, 24], dtype=torch.int32)
MADE = dict(params_dtype=torch.float64, device="cpu", init_method=lambda weight: weight.normal_())


def qkv(*leading: int) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of two groups."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(*leading, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def one_row(query, key, value):
    """Causal attention of one sequence, ``[s, h, d]``: torch's own."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (query, key, value)), is_causal=True)
    return out.transpose(0, 1).flatten(1)


def zigzag(length: int, ranks: int, rank: int) -> list[int]:
    """The positions of a sequence that a context-parallel rank has, counted out."""
    piece = length // (2 * ranks)
    return [n for n in range(length) if n // piece in (rank, 2 * ranks - 1 - rank)]


def attention(**options) -> DotProductAttention:
    return DotProductAttention(HEADS, WIDTH, GROUPS, **options)


def packed_options() -> dict:
    return dict(
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=BOUNDS,
        cu_seqlens_kv=BOUNDS,
        max_seqlen_q=12,
        max_seqlen_kv=12,
    )


def test_packed_sequences_do_not_see_each_other():
    """THD: each sequence's output and gradients are those it has alone."""
    layers, alone = qkv(sum(ROWS)), qkv(sum(ROWS))
    expected = torch.cat([one_row(*parts) for parts in zip(*(x.split(ROWS) for x in alone), strict=True)])
    actual = attention()(*layers, **packed_options())
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for x, other in zip(layers, alone, strict=True):
        torch.testing.assert_close(x.grad, other.grad)


def test_room_between_sequences_is_not_seen():
    """Padded boundaries: what stands between a sequence's end and the next start changes nothing, and gives 0."""
    layers = qkv(16)
    options = packed_options() | dict(cu_seqlens_q_padded=torch.tensor([0, 8, 16], dtype=torch.int32))
    options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), torch.tensor([0, 5, 12], dtype=torch.int32))
    actual = attention()(*layers, **options)
    for begin, length in ((0, 5), (8, 7)):
        expected = one_row(*(x[begin : begin + length] for x in layers))
        torch.testing.assert_close(actual[begin : begin + length], expected)
        assert not actual[begin + length : begin + 8].any()
    actual.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in layers)


def test_a_causal_mask_type_ignores_the_mask():
    """As Transformer Engine does, which is why an attention mask cannot keep rows of a pack apart there."""
    layers = qkv(8, 2)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    expected = torch.stack([one_row(*(x[:, row] for x in layers)) for row in range(2)], dim=1)
    torch.testing.assert_close(attention()(*layers, mask), expected)


def cut_attention() -> list[float]:
    """Largest differences of output and gradients from the whole: rows of a batch, then packed."""
    rank, ranks, worst = dist.get_rank(), dist.get_world_size(), []
    packs = [BOUNDS[n].item() + p for n, length in enumerate(ROWS) for p in zigzag(length, ranks, rank)]
    for leading, held, options in (((24, 2), zigzag(24, ranks, rank), {}), ((24,), packs, packed_options())):
        whole, part = qkv(*leading), [x.detach()[held].requires_grad_() for x in qkv(*leading)]
        expected = attention()(*whole, **options)
        actual = attention(cp_group=dist.group.WORLD)(*part, **options)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        (expected * weights).sum().backward()
        (actual * weights[held]).sum().backward()
        worst.append(float((actual - expected[held]).detach().abs().max()))
        worst += [float((x.grad - y.grad[held]).abs().max()) for x, y in zip(part, whole, strict=True)]
    return worst


@pytest.mark.parametrize("ranks", [2])
def test_context_parallel_ranks_compute_their_part_of_the_whole(ranks):
    """Zigzag pieces on each rank, of rows and of packed sequences: output and gradients of the whole."""
    assert all(max(worst) < 1e-12 for worst in run_distributed(cut_attention, ranks))


def test_the_pieces_of_a_rank():
    """From the front and from the back, in every sequence; what does not cut into equal pieces is refused."""
    actual = [thd_get_partitioned_indices(BOUNDS, 24, 2, rank).tolist() for rank in (0, 1)]
    assert actual[0] == [0, 1, 6, 7, 8, 11, 12, 13, 14, 21, 22, 23]
    assert sorted(actual[0] + actual[1]) == list(range(24))
    with pytest.raises(ValueError, match="does not cut into 4 equal pieces"):
        thd_get_partitioned_indices(torch.tensor([0, 6, 24], dtype=torch.int32), 24, 2, 0)
    with pytest.raises(ValueError, match="from 0 to 32"):
        thd_get_partitioned_indices(BOUNDS, 32, 2, 0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_start_anew_in_every_sequence(interleaved):
    """The fused form against a complex rotation; packed, whole and as two context-parallel ranks have it."""
    x = torch.randn(24, HEADS, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(24.0, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64))
    doubled = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    freqs = doubled[:, None, None]
    positions = torch.cat([torch.arange(length) for length in ROWS])
    pairs = x[..., :4].unflatten(-1, (2, 2) if interleaved else (2, 2))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles[positions])[:, None]
    expected = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
    expected = torch.cat((expected, x[..., 4:]), -1)
    options = dict(tensor_format="thd", interleaved=interleaved, cu_seqlens=BOUNDS)
    torch.testing.assert_close(apply_rotary_pos_emb(x, freqs, **options), expected)
    for rank in (0, 1):
        held = thd_get_partitioned_indices(BOUNDS, 24, 2, rank)
        actual = apply_rotary_pos_emb(x[held], freqs, **options, cp_size=2, cp_rank=rank)
        torch.testing.assert_close(actual, expected[held])


def sharded_layers() -> list[tuple[str, float]]:
    """Largest differences of a norm, a column- and a row-parallel layer from unsharded ones."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    differences = []
    for sequence_parallel in (False, True):
        torch.manual_seed(5)
        whole = [LayerNormLinear(6, 8, **MADE), Linear(8, 6, **MADE)]
        x = torch.randn(8, 2, 6, dtype=torch.float64)
        shared = dict(**MADE, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel)
        parts = [LayerNormLinear(6, 8, parallel_mode="column", **shared)]
        parts.append(Linear(8, 6, parallel_mode="row", **shared))
        with torch.no_grad():
            for layer, full, dim in zip(parts, whole, (0, 1), strict=True):
                layer.weight.copy_(full.weight.chunk(ranks, dim)[rank])
        expected_x, held = x.clone().requires_grad_(), x.chunk(ranks)[rank] if sequence_parallel else x
        actual_x = held.clone().requires_grad_()
        expected, actual = whole[1](whole[0](expected_x)), parts[1](parts[0](actual_x))
        expected.pow(2).sum().backward()
        actual.pow(2).sum().backward()
        cut = (lambda y: y.chunk(ranks)[rank]) if sequence_parallel else lambda y: y
        differences.append(("output", float((actual - cut(expected)).detach().abs().max())))
        differences.append(("input", float((actual_x.grad - cut(expected_x.grad)).abs().max())))
        for layer, full, dim in zip(parts, whole, (0, 1), strict=True):
            expected_grad = full.weight.grad.chunk(ranks, dim)[rank]
            differences.append(("weight", float((layer.weight.grad - expected_grad).abs().max())))
        norm = parts[0].layer_norm_weight
        assert norm.sequence_parallel == parts[1].bias.sequence_parallel == sequence_parallel
        if sequence_parallel:  # megatron-core sums what carries this mark
            dist.all_reduce(norm.grad)
        differences.append(("norm", float((norm.grad - whole[0].layer_norm_weight.grad).abs().max())))
    return differences


def test_sharded_layers_are_the_whole_ones():
    """Column- then row-parallel over two ranks, with and without sequence parallelism: values and gradients."""
    for differences in run_distributed(sharded_layers, 2):
        assert len(differences) == 10 and all(value < 1e-10 for _, value in differences), differences


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_layer_norm_linear_hands_out_its_norm_when_told_so_later(normalization):
    """LoRA sets return_layernorm_output on the finished layer."""
    layer = LayerNormLinear(6, 4, normalization=normalization, return_bias=True, **MADE)
    x = torch.randn(3, 6, dtype=torch.float64)
    norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[normalization](6, 1e-5, dtype=x.dtype)
    assert len(layer(x)) == 2
    layer.return_layernorm_output = True
    out, bias, normed = layer(x)
    torch.testing.assert_close(normed, norm(x))
    torch.testing.assert_close(out, norm(x) @ layer.weight.T)
    assert bias.shape == (4,)


def test_grouped_layers_are_linear_layers_side_by_side():
    """Each run of rows meets its own weight; a run may be empty."""
    layer = GroupedLinear(3, 6, 4, bias=False, **MADE)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.cat([x[:2] @ layer.weight0.T, x[2:] @ layer.weight2.T])
    torch.testing.assert_close(layer(x, [2, 0, 3]), expected)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(zero_centered):
    """torch's own, with weights that start at 1, or at 0 and count from there."""
    x = torch.randn(3, 6, dtype=torch.float64)
    for ours, torchs in ((LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)):
        layer = ours(6, 1e-5, params_dtype=torch.float64, zero_centered_gamma=zero_centered, device="cpu")
        assert float(layer.weight.detach().sum()) == (0 if zero_centered else 6)
        torch.testing.assert_close(layer(x), torchs(6, 1e-5, dtype=x.dtype)(x))


def test_every_module_has_an_extra_state():
    """An empty one, as without fp8, which loads from None too; a state that holds something is refused."""
    for layer in (attention(), Linear(2, 2, **MADE), LayerNormLinear(2, 2, **MADE), RMSNorm(2, device="cpu")):
        state = layer.state_dict()["_extra_state"]
        assert state.dtype == torch.uint8 and state.numel() == 0
        layer.set_extra_state(state)
        layer.set_extra_state(None)
        with pytest.raises(NotImplementedError, match="fp8 state"):
            layer.set_extra_state(torch.ones(3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: attention(attention_dropout=0.1), "attention dropout"),
        (lambda: attention(window_size=(4, 0)), "a window of"),
        (lambda: attention(softmax_type="learnable"), "softmax_type"),
        (lambda: attention(cp_group=[None]), "hierarchical"),
        (lambda: attention(qkv_format="bshd")(*qkv(2, 2)), "qkv_format bshd"),
        (lambda: attention(attn_mask_type="padding")(*qkv(2, 2)), "attn_mask_type padding"),
        (lambda: Linear(2, 2, fuse_wgrad_accumulation=True, **MADE), "--no-gradient-accumulation-fusion"),
        (lambda: Linear(2, 2, delay_wgrad_compute=True, **MADE), "delay_wgrad_compute"),
        (lambda: Linear(2, 2, never_heard_of=1, **MADE), "never_heard_of"),
        (lambda: GroupedLinear(2, 2, 2, **MADE), "experts with a bias"),
    ],
)
def test_what_it_cannot_do_is_an_error(make, message):
    """Nothing is passed over in silence."""
    with pytest.raises(NotImplementedError, match=message):
        make()


def test_attention_scale_is_obeyed():
    """softmax_scale in place of 1 / sqrt(d)."""
    layers = qkv(4, 1)
    expected = attention()(layers[0] / 2, layers[1], layers[2])
    actual = attention(softmax_scale=0.5 / math.sqrt(WIDTH))(*layers)
    torch.testing.assert_close(actual, expected)
