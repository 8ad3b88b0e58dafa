import pickle
from dataclasses import replace

import pytest

from tests.conftest import SHARED
from vlp.data.reading.sentences import Sentences, nli_triples
from vlp.errors import BadSample, UserError

ROWS = [
    ("A dog runs.", "An animal moves.", "yes"),
    ('It\'s "fine", he said', "So he was", "no"),
    ("Zwölf Äpfel", "苹果", "no"),
]


def written(path, text: str, **how):
    path.write_bytes(text.encode(how.pop("encoding", "utf-8")))
    return Sentences(str(path), **how)


def texts(source) -> list[tuple[str, ...]]:
    reader = source.open()
    samples = [reader.read(0, row) for row in range(len(reader))]
    assert [s.source_row for s in samples] == list(range(len(reader)))
    return [(*s.captions, *s.texts) for s in samples]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_txt_has_one_sentence_per_line(tmp_path, end, last):
    lines = end.join(row[0] for row in ROWS) + (end if last else "")
    source = written(tmp_path / "x.txt", lines)
    assert texts(source) == [(row[0],) for row in ROWS]
    assert source.open().sizes == [3]


@pytest.mark.parametrize("kind", ["tsv", "tsv without header", "csv", "jsonl"])
def test_columns_are_views_in_the_order_asked_for_and_the_label_is_its_place(tmp_path, kind):
    import csv
    import io
    import json

    names, header = ("one", "two", "judged"), ()
    if kind.startswith("tsv"):
        header = names if "without" in kind else ()
        lines = ["\t".join(row) for row in ([] if header else [names]) + ROWS]
        text, path = "\n".join(lines) + "\n", tmp_path / "x.tsv"
    elif kind == "csv":
        out = io.StringIO()
        csv.writer(out).writerows([names, *ROWS])
        text, path = "\ufeff" + out.getvalue(), tmp_path / "x.csv"
    else:
        text, path = "".join(json.dumps(dict(zip(names, row))) + "\n" for row in ROWS), tmp_path / "x.jsonl"
    source = written(path, text, columns=("two", "one"), header=header, label="judged", classes=("no", "yes"))
    assert texts(source) == [(row[1], row[0]) for row in ROWS]
    assert [source.open().read(0, n).label for n in range(3)] == [1, 0, 0]
    assert texts(replace(source, columns=("one", "two"), join=" [SEP] ")) == [(f"{a} [SEP] {b}",) for a, b, _ in ROWS]


def test_equal_sentences_have_an_equal_index_and_others_do_not(tmp_path):
    reader = written(tmp_path / "x.txt", "a\nb\na\n").open()
    index = [reader.read(0, n).image_id for n in range(3)]
    assert index[0] == index[2] != index[1] and all(0 <= n < 2**63 for n in index)


def test_unusable_line_is_a_bad_sample_and_others_are_read(tmp_path):
    source = written(tmp_path / "x.tsv", "a\tb\nx\ty\nonly\n\tempty\nx\tz\n", columns=("a",), label="b", classes=("y",))
    reader = source.open()
    assert reader.read(0, 0).label == 0
    for row, reason in ((1, "1 columns"), (2, "empty"), (3, "label 'z'")):
        with pytest.raises(BadSample, match=reason):
            reader.read(0, row)
    assert reader.quarantine_entry(0, 1, "r") == {"source": source.path, "shard": "x.tsv", "key": "3", "reason": "r"}
    jsonl = written(tmp_path / "x.jsonl", '{"a": \n[1]\n{"b": "x"}\n', columns=("a",)).open()
    for row, reason in enumerate(["parse", "object", "missing"]):
        with pytest.raises(BadSample, match=reason):
            jsonl.read(0, row)


def test_table_without_the_columns_is_refused_in_one_line(tmp_path):
    for name, how, message in [
        ("x.tsv", {"columns": ("c",)}, "a header with the column 'c'; found 'a', 'b', separated by tabs"),
        ("x.tsv", {}, "name the columns"),
        ("x.txt", {"columns": ("a",)}, "no columns"),
        ("x.pdf", {}, "not a file of texts"),
    ]:
        with pytest.raises(UserError, match=message):
            written(tmp_path / name, "a\tb\nx\ty\n", **how).open()
    with pytest.raises(UserError, match="no such file"):
        Sentences(str(tmp_path / "none.txt")).open()


def test_reader_goes_to_workers_by_pickle_and_its_fingerprint_is_that_of_the_content(tmp_path):
    reader = written(tmp_path / "x.txt", "a\nb\n").open()
    reader.read(0, 0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(0, 1).captions == ("b",) and again.fingerprint() == reader.fingerprint()
    assert written(tmp_path / "y.txt", "a\nc\n").open().fingerprint() != reader.fingerprint()
    assert len(written(tmp_path / "z.txt", "").open()) == 0


def test_triples_are_a_premise_with_the_nth_of_each_kind(tmp_path):
    lines = ["entailment\tp\te1", "neutral\tp\tn", "contradiction\tq\tc0", "contradiction\tp\tc1", "entailment\tp\te2",
             "entailment\tp \te3", "contradiction\tp\tc2", "-\tp\tx"]  # fmt: skip
    (tmp_path / "nli.tsv").write_text("\n".join(lines) + "\n")
    assert list(nli_triples(tmp_path / "nli.tsv")) == [("p", "e1", "c1"), ("p", "e2", "c2")]
    (tmp_path / "nli.tsv").write_text("entailment\tp\n")
    with pytest.raises(UserError, match="tsv:1: expected label, premise and hypothesis"):
        list(nli_triples(tmp_path / "nli.tsv"))


def test_snli_as_people_have_it():
    path = SHARED / "data" / "sts" / "snli-dev.tsv"
    if not path.exists():
        pytest.skip(f"{path} is absent: the data folder beside the repository is not there")
    classes = ("contradiction", "neutral", "entailment")
    pairs = Sentences(
        str(path), ("premise", "hypothesis"), " [SEP] ", ("label", "premise", "hypothesis"), "label", classes
    )
    reader = pairs.open()
    first = reader.read(0, 0)
    assert len(reader) == 9842 and first.label == 1 and first.captions[0].startswith("Two women are embracing")
    triples = list(nli_triples(path))
    assert 2500 < len(triples) < 3400 and all(len({*triple}) == 3 for triple in triples[:100])
