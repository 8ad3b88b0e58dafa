"""`vlp data triples` and `vlp data paraphrase` write the tables that sentence encoders are trained on."""

import argparse
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers

from vlp.commands.texts import add_parsers
from vlp.data.preparing.paraphrase import Seq2Seq, back_translate
from vlp.data.reading.sentences import Sentences
from vlp.errors import UserError

SENTENCES = ["a red square", "a dog\u2028runs", "here is a blue thing", "last"]


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    options = parser.parse_args([str(a) for a in arguments])
    return options.run(options)


def table(path: Path, *columns: str) -> list[tuple[str, ...]]:
    reader = Sentences(str(path), columns=columns).open()
    samples = [reader.read(0, row) for row in range(len(reader))]
    return [(*s.captions, *s.texts) for s in samples]


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def translators(tmp_path, monkeypatch) -> Path:
    """Write a user's module to the working directory. Its `there` fails at texts that start with the contents of FAILS."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "sentences.txt").write_text("\n".join([*SENTENCES, "", ""]))
    (folder / "mine.py").write_text(
        "from pathlib import Path\n"
        "calls = []\n"
        "def there(texts):\n"
        "    assert not any(t.startswith(Path('FAILS').read_text()) for t in texts), 'no network'\n"
        "    calls.append(len(texts))\n"
        "    return [t.upper() for t in texts]\n"
        "def back(texts):\n"
        "    return [t[::-1] for t in texts]\n"
        "def forgets(texts):\n"
        "    return texts[1:]\n"
        "def silent(texts):\n"
        "    return ['' for t in texts]\n"
    )
    (folder / "FAILS").write_text("nothing")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop("mine", None)


def test_triples_of_several_files_are_a_table_with_a_header(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.tsv").write_text(f"entailment\tp {name}\te\ncontradiction\tp {name}\tc\nneutral\tx\ty\n")
    assert command("triples", tmp_path / "one.tsv", tmp_path / "two.tsv", tmp_path / "new" / "out.tsv") == 0
    expected = [("p one", "e", "c"), ("p two", "e", "c")]
    assert table(tmp_path / "new" / "out.tsv", "sentence", "entailed", "contradicted") == expected
    assert "2 triples" in capsys.readouterr().out
    (tmp_path / "one.tsv").write_text("neutral\tx\ty\n")
    with pytest.raises(UserError, match="has both"):
        command("triples", tmp_path / "one.tsv", tmp_path / "out.tsv")
    with pytest.raises(UserError, match="no such file"):
        command("triples", tmp_path / "none.tsv", tmp_path / "out.tsv")


def test_translators_are_applied_in_order_and_the_table_has_one_row_per_sentence(translators):
    assert command("paraphrase", "sentences.txt", "out.tsv", "--translator", "mine:there", "mine:back") == 0
    assert table(Path("out.tsv"), "sentence", "paraphrase") == [
        (one_line(s), one_line(s.upper()[::-1])) for s in SENTENCES
    ]
    assert not list(translators.glob(".*.part"))
    with pytest.raises(UserError, match="exists; remove it"):
        command("paraphrase", "sentences.txt", "out.tsv", "--translator", "mine:there", "mine:back")


def test_stopped_translation_leaves_no_output_and_continues(translators):
    arguments = ("paraphrase", "sentences.txt", "out.tsv", "--batch-size", 1, "--translator", "mine:there", "mine:back")
    (translators / "FAILS").write_text("here")
    with pytest.raises(AssertionError, match="no network"):
        command(*arguments)
    mine = sys.modules["mine"]
    assert not Path("out.tsv").exists() and mine.calls == [1, 1]
    (growing,) = translators.glob(".out.tsv.*.part")
    growing.write_bytes(growing.read_bytes() + "half a lin\u00e9".encode()[:-1])  # as after a kill during a write
    (translators / "FAILS").write_text("nothing")
    assert command(*arguments) == 0
    assert mine.calls == [1, 1, 1, 1] and not list(translators.glob(".*.part"))
    resumed = Path("out.tsv").read_bytes()
    Path("out.tsv").unlink()
    command(*arguments)
    assert Path("out.tsv").read_bytes() == resumed and len(mine.calls) == 8


def test_translation_by_other_translators_is_not_continued(translators):
    (translators / "FAILS").write_text("here")
    with pytest.raises(AssertionError):
        command("paraphrase", "sentences.txt", "out.tsv", "--batch-size", 1, "--translator", "mine:there")
    command("paraphrase", "sentences.txt", "out.tsv", "--translator", "mine:back")
    assert [b for _, b in table(Path("out.tsv"), "sentence", "paraphrase")] == [
        s[::-1].replace("\u2028", " ") for s in SENTENCES
    ]


def test_invalid_translator_is_refused(translators):
    for name, message in [
        ("mine:forgets", "returned 3 texts for 4"),
        ("mine:nothing", "no translator mine:nothing"),
        ("nomodule:x", "no translator nomodule:x"),
        ("nofolder", "no translator nofolder"),
        (str(translators), "is not a translation model"),
    ]:
        with pytest.raises(UserError, match=message):
            command("paraphrase", "sentences.txt", "out.tsv", "--translator", name)
        assert not Path("out.tsv").exists()
    command("paraphrase", "sentences.txt", "out.tsv", "--translator", "mine:silent")
    assert all(a == b for a, b in table(Path("out.tsv"), "sentence", "paraphrase"))


def test_each_caption_of_an_image_is_paired_once(tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        '{"image": "1.jpg", "captions": ["a", "b", "c", "d", "e"], "split": "train"}\n'
        '{"image": "2.jpg", "captions": ["f"], "split": "train"}\n'
        '{"image": "3.jpg", "captions": ["g", "h"], "split": "val"}\n'
    )
    command("paraphrase", tmp_path / "captions.jsonl", tmp_path / "out.tsv", "--same-image", "--split", "train")
    assert table(tmp_path / "out.tsv", "sentence", "paraphrase") == [("a", "b"), ("c", "d")]
    command("paraphrase", tmp_path / "captions.jsonl", tmp_path / "out.tsv", "--same-picture")
    assert len(table(tmp_path / "out.tsv", "sentence", "paraphrase")) == 3


def marian(folder: Path) -> str:
    """Save a tiny MarianMT with random weights and a tokenizer of whole words; return its folder."""
    words = ["</s>", "<unk>", "<pad>", "a", "red", "dog", "runs", "blue", "thing"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 32,
        "max_length": 12,
    }
    tokens = {"pad_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 0}
    config = transformers.MarianConfig(vocab_size=len(words), **sizes, **tokens)
    transformers.MarianMTModel(config).eval().save_pretrained(folder)
    return str(folder)


def test_marian_folder_translates_as_transformers_does(tmp_path):
    there, back = marian(tmp_path / "there"), marian(tmp_path / "back")
    sentences = ["a red dog runs", "a blue thing", "dog"]
    translated = Seq2Seq(there)(sentences)
    model, tokenizer = (
        transformers.MarianMTModel.from_pretrained(there),
        transformers.AutoTokenizer.from_pretrained(there),
    )
    for sentence, found in zip(sentences, translated):
        ids = model.generate(**tokenizer([sentence], return_tensors="pt"))
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [found]
    back_translate(sentences, [there, back], tmp_path / "out.tsv", batch_size=2)
    expected = Seq2Seq(back)(Seq2Seq(there)(sentences))
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines == ["sentence\tparaphrase", *(f"{s}\t{' '.join(e.split()) or s}" for s, e in zip(sentences, expected))]
