"""Prepared rows as samples: what stands where, packed or not, and what a context-parallel rank holds of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from eaft_megatron.data.context_parallel import context_parallel_indices
from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, write_column
from eaft_megatron.data.samples import PreparedDataset, block_diagonal_mask, flow_weights
from tests.data.conftest import build_tokenizer
from tests.data.conversations import chats, write

MULTIPLE = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    """Thirty conversations, packed into 512 positions with rows padded to multiples of 4, and a column of scores."""
    folder = tmp_path_factory.mktemp("prepared")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    source = write(folder / "a.jsonl", chats(30))
    options = PrepareOptions(512, pad_to_multiple_of=MULTIPLE)
    prepare([source], str(folder / "tokenizer"), folder / "out", options)
    data = PreparedData(folder / "out")
    generator = np.random.default_rng(0)
    write_column(data, "ref_logprob", (-generator.exponential(size=n) for n in data.lengths), {"model": "none"})
    return data


def test_every_trained_token_of_every_row_is_in_one_pack(data):
    """Row by row, at its place in its pack: tokens, the next token as label, the mask, the column, positions from 0."""
    dataset = PreparedDataset(data, 512, columns=["ref_logprob"], pad_token_id=7)
    seen = []
    for index in range(len(dataset)):
        sample = dataset[index]
        bounds = dataset.boundaries(index)
        assert bounds[0] == 0 and bounds[-1] == 512 and bounds.dtype == np.int32
        for row, begin, end in zip(dataset.rows(index), bounds[:-1], bounds[1:], strict=False):
            ids, mask = data.tokens(row)
            n = len(ids) - 1
            assert begin % MULTIPLE == 0 and n <= end - begin < n + MULTIPLE
            inside = slice(begin, begin + n)
            assert sample["tokens"][inside].tolist() == ids[:-1].tolist()
            assert sample["labels"][inside].tolist() == ids[1:].tolist()
            assert sample["loss_mask"][inside].tolist() == [float(flag) for flag in mask[1:]]
            expected = np.where(mask[1:], data.column("ref_logprob", row)[1:], 0)
            assert np.array_equal(sample["ref_logprob"][inside].numpy(), expected)
            assert sample["position_ids"][begin:end].tolist() == list(range(end - begin))
            assert set(sample["sequence_ids"][begin:end].tolist()) == {row}
            assert sample["loss_mask"][begin + n : end].sum() == 0
            seen.append(row)
        rest = slice(dataset.sample_length(index), 512)
        assert sample["loss_mask"][rest].sum() == 0 and set(sample["tokens"][rest].tolist()) <= {7}
        assert set(sample["sequence_ids"][rest].tolist()) <= {-1}
    assert sorted(seen) == list(range(30))


def test_one_row_a_sample(data):
    """Unpacked samples are the rows in their order, without sequence ids."""
    dataset = PreparedDataset(data, 512, packed=False)
    assert len(dataset) == 30 and "sequence_ids" not in dataset[0]
    for index in range(30):
        ids, mask = data.tokens(index)
        assert dataset[index]["tokens"][: len(ids) - 1].tolist() == ids[:-1].tolist()
        assert dataset[index]["loss_mask"].sum() == mask[1:].sum()
        assert dataset.boundaries(index).tolist() == [0, len(ids) - 1, 512]
    with pytest.raises(IndexError):
        dataset[30]


def test_flow_weights_against_numpy(data):
    """exp(-f / median f) of each row's mean loss, the same on every trained token of the row."""
    losses = np.array(
        [-data.column("ref_logprob", row)[1:][data.tokens(row)[1][1:]].astype(np.float64).mean() for row in range(30)]
    )
    expected = np.exp(-losses / np.median(losses))
    np.testing.assert_allclose(flow_weights(data), expected, rtol=1e-6)
    dataset = PreparedDataset(data, 512, columns=["sample_weight"])
    sample = dataset[0]
    for row in dataset.rows(0):
        trained = (sample["sequence_ids"] == row) & (sample["loss_mask"] != 0)
        np.testing.assert_allclose(
            sample["sample_weight"][trained], np.full(int(trained.sum()), expected[row]), rtol=1e-6
        )
    assert (sample["sample_weight"][sample["loss_mask"] == 0] == 0).all()


def test_the_mask_keeps_rows_apart():
    """Allowed exactly: positions of the same row, not later than the query."""
    ids = torch.tensor([[3, 3, 3, 5, 5, -1]])
    actual = ~block_diagonal_mask(ids)[0, 0]
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    expected += [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert actual.int().tolist() == expected


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_slices_are_megatrons_own(size):
    """For one sequence: the positions that megatron-core's get_batch_on_this_cp_rank keeps, on every rank."""
    utils = pytest.importorskip("megatron.core.utils")
    whole = torch.arange(48).unsqueeze(0)
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils.parallel_state, "get_context_parallel_world_size", lambda: size)
            patch.setattr(utils.parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
            patch.setattr(torch.Tensor, "cuda", lambda tensor, **_: tensor)
            expected = utils.get_batch_on_this_cp_rank({"tokens": whole.clone()})["tokens"][0]
        assert torch.equal(context_parallel_indices(48, size, rank), expected)


def test_context_parallel_slices_of_a_pack_are_the_whole(data):
    """Two ranks' slices of every tensor of a packed sample put back together are the sample; so are the loss sums."""
    dataset = PreparedDataset(data, 512, columns=["ref_logprob"])
    sample, bounds = dataset[0], dataset.boundaries(0)
    parts = [context_parallel_indices(512, 2, rank, bounds) for rank in range(2)]
    assert all(len(part) == 256 for part in parts)
    losses = torch.rand(512)
    for values in sample.values():
        rebuilt = torch.empty_like(values)
        for part in parts:
            rebuilt[part] = values[part]
        assert torch.equal(rebuilt, values)
    sums = [(losses[part] * sample["loss_mask"][part]).sum() for part in parts]
    torch.testing.assert_close(sum(sums), (losses * sample["loss_mask"]).sum())
    for row in dataset.rows(0):  # each rank holds half of each row
        counts = [int((sample["sequence_ids"][part] == row).sum()) for part in parts]
        assert counts[0] == counts[1]


def test_rows_that_cannot_be_cut_are_refused():
    """An odd row says which multiple to prepare the data with."""
    with pytest.raises(ValueError, match="--pad-to-multiple-of 4"):
        context_parallel_indices(10, 2, 0, [0, 6, 10])


def test_what_does_not_fit_is_refused(data):
    """Another length than the packing's, a length below the longest row, a column that is not there or not whole."""
    with pytest.raises(ValueError, match="packed for 512.*--repack"):
        PreparedDataset(data, 1024)
    with pytest.raises(ValueError, match="rows of up to"):
        PreparedDataset(data, 16, packed=False)
    with pytest.raises(ValueError, match="no column 'topk_entropy'.*ref_logprob"):
        PreparedDataset(data, 512, columns=["topk_entropy"])
    with pytest.raises(ValueError, match="row 0 does not have a value for each token"):
        write_column(data, "short", iter([np.zeros(3)]), {})
    with pytest.raises(ValueError, match="1 rows, but the data has 30"):
        write_column(data, "few", iter([np.zeros(data.lengths[0])]), {})
    assert set(data.columns()) == {"ref_logprob"}
