import math
from itertools import groupby

import pytest
import torch

from vlp.errors import UserError
from vlp.objectives.masking import TextMasking, block_masks, choose_spans
from vlp.types import Vocabulary

PAD, CLS, SEP, MASK, SIZE = 0, 1, 2, 3, 60
CONTINUES = torch.arange(SIZE) % 3 == 1  # from 4 on, every third token continues a word
CONTINUES[:4] = False
VOCABULARY = Vocabulary(SIZE, MASK, torch.arange(SIZE) < 4, CONTINUES)


def texts(rows=400, length=40, seed=0):
    """Return texts ``[CLS] words [SEP] padding`` of 5 to ``length`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SIZE, (rows, length), generator=generator)
    lengths = torch.randint(5, length + 1, (rows, 1), generator=generator)
    place = torch.arange(length)
    ids = torch.where(place < lengths, ids, PAD)
    ids[:, 0] = CLS
    return torch.where(place == lengths - 1, SEP, ids), place < lengths


def draw(masking, ids, mask, seed=0, vocabulary=VOCABULARY):
    return masking(ids, mask, vocabulary, torch.Generator().manual_seed(seed))


def chosen_of(masked, ids):
    return torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, masked.positions, True).view_as(ids)


def near(found, expected, count, sigmas=5.0):
    """Assert that a share of ``count`` draws is within its sampling error."""
    assert abs(found - expected) < sigmas * math.sqrt(expected * (1 - expected) / count), (found, expected)


@pytest.mark.parametrize("of", ["token", "word", "span"])
def test_special_tokens_and_padding_are_never_chosen_or_drawn_and_labels_are_true_ids(of):
    ids, mask = texts()
    masked = draw(TextMasking(unit=of, probability=0.5, mask_share=0.3, random_share=0.7), ids, mask)
    chosen = chosen_of(masked, ids)
    assert not VOCABULARY.special[ids[chosen]].any() and mask[chosen].all()
    assert torch.equal(masked.labels, ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    seen = masked.input_ids[chosen]
    assert (seen == MASK).any() and not VOCABULARY.special[seen[seen != MASK]].any()
    assert seen[seen != MASK].unique().tolist() == list(range(4, SIZE))
    assert (masked.positions.diff() > 0).all()


@pytest.mark.parametrize("of", ["token", "word", "span"])
def test_chosen_tokens_are_80_percent_masked_10_replaced_10_kept(of):
    ids, mask = texts(2000)
    masked = draw(TextMasking(unit=of), ids, mask)
    words = int((mask & ~VOCABULARY.special[ids]).sum())
    # words and spans are chosen together: fewer independent draws; a span's share is rounded up in each text
    independent = {"token": 1, "word": 2, "span": 6}[of]
    expected = 0.15 if of != "span" else (0.15 * (mask.sum(1) - 2) - 1e-6).ceil().sum().item() / words
    near(len(masked.labels) / words, expected, words / independent)
    seen, count = masked.input_ids.flatten()[masked.positions], len(masked.labels) / independent
    near((seen == MASK).double().mean().item(), 0.8, count)
    near((seen == masked.labels).double().mean().item(), 0.1 + 0.1 / (SIZE - 4), count)


def test_tokens_are_chosen_independently():
    ids = torch.full((3000, 10), 5)
    chosen = chosen_of(draw(TextMasking(probability=0.4), ids, ids > 0), ids).double()
    together = (chosen.T @ chosen / len(ids)).flatten()[1:].view(9, 11)[:, :-1]  # off the diagonal
    assert (together - 0.16).abs().max() < 5 * math.sqrt(0.16 * 0.84 / 3000)


def words_of(ids):
    """Return the columns of each word, found token by token."""
    words = []
    for column, token in enumerate(ids):
        if VOCABULARY.continues[token] and words:
            words[-1].append(column)
        else:
            words.append([column])
    return words


def test_whole_words_are_masked_independently():
    ids, mask = texts(300)
    chosen = chosen_of(draw(TextMasking(unit="word", probability=0.3), ids, mask), ids)
    total = count = 0
    for row, picked, present in zip(ids.tolist(), chosen.tolist(), mask.tolist()):
        for word in words_of(row):
            free = [c for c in word if present[c] and row[c] > 3]
            assert len({picked[c] for c in free}) <= 1
            if free:
                total, count = total + picked[free[0]], count + 1
    near(total / count, 0.3, count)


def test_spans_are_runs_of_words_of_truncated_geometric_length_until_the_budget():
    rows, length = 4000, 60
    maskable = torch.ones(rows, length, dtype=torch.bool)
    word = torch.arange(length).expand(rows, -1)
    chosen, fate = choose_spans(maskable, word, 1 / length, torch.Generator().manual_seed(0))
    assert (chosen.sum(1) == 1).all()  # a budget of one token cuts every span
    chosen, fate = choose_spans(maskable, word, 0.2, torch.Generator().manual_seed(0))
    assert (chosen.sum(1) == 12).all()
    lengths = []  # of runs with one fate; a span that was cut, or overlaps an earlier one, is shorter
    for picked, fates in zip(chosen.tolist(), fate.tolist()):
        lengths += [len(list(run)) for key, run in groupby(zip(picked, fates)) if key[0]]
    assert max(lengths) == 10
    weights = [0.8**n for n in range(10)]
    mean = sum(w * n for n, w in enumerate(weights, 1)) / sum(weights)
    assert mean == pytest.approx(3.8, abs=0.01)  # as the paper says
    assert 0.75 * mean < sum(lengths) / len(lengths) < mean


def test_spans_are_whole_words_with_one_replacement_unless_truncated():
    ids, mask = texts(300, 60)
    word = (~VOCABULARY.continues[ids]).cumsum(1)
    maskable = mask & (ids > 3)
    chosen, fate = choose_spans(maskable, word, 0.15, torch.Generator().manual_seed(1))
    cut = 0
    for row in range(len(ids)):
        for number in word[row][chosen[row]].unique():
            inside = (word[row] == number) & maskable[row]
            cut += not chosen[row][inside].all()
            assert len(fate[row][inside & chosen[row]].unique()) == 1
    assert cut <= len(ids)  # the last span of a text
    masked = draw(TextMasking(unit="span", mask_share=0.5, random_share=0.0), ids, mask)
    is_masked = masked.input_ids == MASK
    alike = sum(
        len(set(is_masked[row][(word[row] == n) & chosen_of(masked, ids)[row]].tolist())) == 1
        for row in range(20)
        for n in word[row][chosen_of(masked, ids)[row]].unique()
    )
    assert alike == sum(len(word[row][chosen_of(masked, ids)[row]].unique()) for row in range(20))


def test_published_masking_excludes_only_the_first_token_and_draws_from_the_vocabulary():
    ids, mask = texts(2000)
    published = TextMasking(exclude="first", random_from="all", mask_share=0.0, random_share=1.0)
    masked = draw(published, ids, mask)
    chosen = chosen_of(masked, ids)
    assert (ids[chosen] == SEP).any() and not chosen[:, 0].any() and mask[chosen].all()
    assert masked.input_ids[chosen].unique().tolist() == list(range(SIZE))


@pytest.mark.parametrize("masking", [TextMasking(unit=of) for of in ("token", "word", "span")], ids=lambda m: m.unit)
def test_texts_without_words_are_unchanged(masking):
    ids = torch.tensor([[CLS, SEP, PAD], [CLS, SEP, PAD], [PAD, PAD, PAD]])
    masked = draw(masking, ids, ids != PAD)
    assert torch.equal(masked.input_ids, ids) and len(masked.positions) == len(masked.labels) == 0
    half = TextMasking(unit=masking.unit, capacity=0.5)
    masked = draw(half, ids, ids != PAD)
    assert masked.positions.tolist() == [0] * 5 and masked.labels.tolist() == [-100] * 5
    assert torch.equal(masked.input_ids, ids)


def test_capacity_fixes_the_number_of_positions_and_keeps_the_chosen_tokens():
    ids, mask = texts()
    exact, roomy = draw(TextMasking(), ids, mask), draw(TextMasking(capacity=0.3), ids, mask)
    assert torch.equal(exact.input_ids, roomy.input_ids)
    size, count = math.ceil(0.3 * ids.numel()), len(exact.labels)
    assert roomy.positions.shape == roomy.labels.shape == (size,)
    assert torch.equal(roomy.positions[:count], exact.positions) and torch.equal(roomy.labels[:count], exact.labels)
    assert not roomy.positions[count:].any() and (roomy.labels[count:] == -100).all()
    tight = draw(TextMasking(capacity=0.01), ids, mask)
    kept = math.ceil(0.01 * ids.numel())
    assert torch.equal(tight.positions, exact.positions[:kept]) and torch.equal(tight.labels, exact.labels[:kept])
    beyond = exact.positions[kept:]
    assert torch.equal(tight.input_ids.flatten()[beyond], ids.flatten()[beyond])


def test_draws_depend_only_on_the_generator():
    ids, mask = texts()
    for of in ("token", "word", "span"):
        first, again, other = (draw(TextMasking(unit=of), ids, mask, seed) for seed in (0, 0, 1))
        assert torch.equal(first.input_ids, again.input_ids) and not torch.equal(first.input_ids, other.input_ids)


def test_invalid_shares_and_vocabularies_are_refused():
    ids, mask = texts(3)
    with pytest.raises(UserError, match=r"needs a tokenizer with \[MASK\]"):
        draw(TextMasking(), ids, mask, vocabulary=Vocabulary(SIZE, None, VOCABULARY.special, CONTINUES))
    with pytest.raises(UserError, match="it is a share"):
        TextMasking(mask_share=0.8, random_share=0.3).validate("masking")
    TextMasking().validate("masking")


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (10, 6), (4, 4), (2, 3), (37, 37)], ids=str)
def test_every_image_has_the_same_number_of_distinct_masked_patches(grid):
    masks = block_masks(50, grid, 0.4, generator=torch.Generator().manual_seed(0))
    assert masks.shape == (50, round(0.4 * grid[0] * grid[1]))
    assert masks.min() >= 0 and masks.max() < grid[0] * grid[1] and (masks.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in masks.tolist()}) > 1


def test_masked_patches_are_adjacent_and_cover_all_positions():
    masks = block_masks(3000, (14, 14), 0.4, generator=torch.Generator().manual_seed(0))
    shown = torch.zeros(3000, 196).scatter(1, masks, 1.0).view(3000, 14, 14)
    neighbours = (shown[:, 1:] * shown[:, :-1]).sum() / (13 * 14 * 3000)
    assert neighbours > 0.3  # 0.16 if they were scattered evenly
    # a block lies anywhere, so the middle is covered more often than a corner, and left as often as right
    mean = shown.mean(0)
    assert mean.min() > 0.03 and mean[6, 6] > mean[0, 0]
    assert (mean - mean.flip(1)).abs().max() < 0.06


def test_first_block_has_the_papers_area_and_aspect_ratio():
    masks = block_masks(2000, (30, 30), 0.2, rounds=1, generator=torch.Generator().manual_seed(0))
    aspects = []
    for row in masks.tolist():
        patches = {(n // 30, n % 30) for n in row}
        # what one block left missing was taken from the top: read the block from the bottom
        bottom = max(y for y, _ in patches)
        columns = sorted(x for y, x in patches if y == bottom)
        assert columns == list(range(columns[0], columns[-1] + 1))
        top = bottom
        while all((top - 1, x) in patches for x in columns):
            top -= 1
        if top > 10:  # clear of the filling, which takes the first six rows at most
            aspects.append((bottom - top + 1) / len(columns))
            assert 16 * 0.7 <= (bottom - top + 1) * len(columns) <= 180 * 1.1
    assert len(aspects) > 200
    assert min(aspects) > 0.25 and max(aspects) < 4
    inverted = sorted(1 / a for a in aspects)
    assert abs(math.log(sorted(aspects)[len(aspects) // 2])) < 0.3 and inverted[0] < 0.5
