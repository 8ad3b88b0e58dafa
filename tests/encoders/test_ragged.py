"""Packed tokens, padded rows, and selected tokens are the same tokens at other positions."""

import numpy as np
import pytest
import torch

from vlp.encoders.ragged import RaggedBatch, bound_lengths

CPU = torch.device("cpu")
LENGTHS, P, L = (3, 6, 1), 5, 7


def tokens_of(lengths, patches):
    """(row, column in the padded row) of each packed token."""
    width = max(lengths)
    text = [(row, n) for row, length in enumerate(lengths) for n in range(length)]
    return text + [(row, width + n) for row in range(len(lengths)) for n in range(patches)]


@pytest.mark.parametrize(("lengths", "patches"), [(LENGTHS, P), (LENGTHS, 0), ((4, 4), P), ((4, 4), 0), ((0, 0), P)])
def test_packing_undoes_padding_and_starts_and_owners_are_those_of_the_tokens(lengths, patches):
    batch, tokens = RaggedBatch(lengths, patches, CPU), tokens_of(lengths, patches)
    states = torch.arange(1.0, 1 + len(tokens))[:, None]
    padded = batch.pad(states)
    assert padded.shape == (len(lengths), max(lengths) + patches, 1)
    assert torch.equal(batch.pack(padded), states)
    for position, (row, column) in enumerate(tokens):
        assert padded[row, column, 0] == position + 1
        assert batch.owner[position] == row
    assert (padded != 0).sum() == len(tokens)
    mask = batch.attention_mask
    assert mask is None if len(set(lengths)) == 1 else torch.equal(mask[:, 0, 0], padded[..., 0] != 0)
    assert torch.equal(padded[torch.arange(len(lengths)), 0], states[batch.starts])


def test_lengths_come_from_the_mask_and_an_empty_text_has_one_token():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert RaggedBatch.of_texts(mask).lengths == (2, 1, 3)
    unpacked = RaggedBatch.of_texts(mask, pack=False)
    assert torch.equal(unpacked.mask, torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool())
    assert not mask[1, 0]  # the argument is not changed


@pytest.mark.parametrize("pack", [True, False])
def test_without_packing_padding_counts_as_tokens(pack):
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    texts = torch.randn(3, L, 2)
    batch = RaggedBatch.of_texts(mask, pack=pack)
    packed = batch.pack(texts[:, : batch.width])
    assert batch.width == (6 if pack else L)
    assert len(packed) == batch.text_tokens == (sum(LENGTHS) if pack else 3 * L)
    padded = batch.pad(packed)
    assert torch.equal(padded[mask[:, : batch.width]], texts[mask])
    assert torch.equal(batch.mask, mask[:, : batch.width])
    row, column = mask.nonzero().unbind(1)
    selected = batch.tokens_at(row, column)
    assert torch.equal(packed[selected.packed], texts[mask])


@pytest.mark.parametrize("pack", [True, False])
def test_tokens_of_pairs_are_those_of_their_texts(pack):
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    states, pairs = torch.randn(3, L, 2), torch.tensor([2, 0, 0])
    own, of_pairs = RaggedBatch.of_texts(mask, pack=pack), RaggedBatch.of_texts(mask[pairs], pack=pack)
    packed = own.pack(states[:, : own.width])
    expected = of_pairs.pack(states[pairs][:, : of_pairs.width])
    assert torch.equal(packed[own.tokens_of(pairs, of_pairs)], expected)


@pytest.mark.parametrize(("lengths", "patches"), [(LENGTHS, P), (LENGTHS, 0), ((0, 0, 0), P)])
def test_selected_tokens_pad_to_their_columns_and_back(lengths, patches):
    batch, tokens = RaggedBatch(lengths, patches, CPU), tokens_of(lengths, patches)
    states = torch.randn(len(tokens), 2)
    first = batch.first_tokens()
    assert torch.equal(states[first.packed], batch.pad(states)[:, 0])
    assert torch.equal(first.pad(states[first.packed])[:, 0], states[first.packed])
    assert first.row.tolist() == [0, 1, 2]
    row, column = torch.tensor([1, 0, 1]), torch.tensor([0, 2, 4])
    some = batch.tokens_at(row, column)
    assert torch.equal(states[some.packed], batch.pad(states)[row, column])
    padded = some.pad(states[some.packed])
    assert torch.equal(padded[row, column], states[some.packed]) and (padded != 0).any(-1).sum() == 3
    assert torch.equal(some.pack(padded), states[some.packed]) and torch.equal(some.row, row)


def test_selected_rows_keep_their_tokens_and_the_width_of_all():
    batch, states = RaggedBatch(LENGTHS, P, CPU), torch.randn(sum(LENGTHS) + 3 * P, 2)
    kept = np.array([True, False, True])
    some, positions = batch.select_rows(kept)
    assert (some.rows, some.width, some.lengths) == (2, 6, (3, 1))
    assert torch.equal(some.pad(states[positions]), batch.pad(states)[torch.from_numpy(kept)])


def test_bounds_of_lengths_take_the_place_of_lengths_that_only_the_device_knows():
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    states, texts = torch.randn(3, L, 2), torch.tensor([0, 1, 2, 0])
    own = RaggedBatch.of_texts(mask)
    pairs = RaggedBatch.of_pairs(mask, bound_lengths(texts, np.array([3, 6, 6, 3])))
    assert pairs.lengths == (3, 6, 6, 3) and pairs.width == 6
    assert torch.equal(pairs.mask, mask[texts][:, :6])
    padded = pairs.pad(own.pack(states[:, : own.width])[own.tokens_of(texts, pairs)])
    assert torch.equal(padded[pairs.mask], states[texts][mask[texts]])
    some, positions = pairs.select_rows(np.array([False, True, True, False]))
    packed = pairs.pack(padded)
    assert torch.equal(some.pad(packed[positions])[some.mask], padded[1:3][pairs.mask[1:3]])


def test_real_tokens_are_the_first_ones_of_each_text():
    batch = RaggedBatch(LENGTHS, 0, CPU)
    assert batch.real_tokens(np.array([2, 6, 0])).tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
