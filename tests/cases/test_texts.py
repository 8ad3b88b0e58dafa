"""Tables and files of texts as people have them: encodings, quoted newlines, headers with spaces, values that are no text."""

import json

import pytest

from tests.cases.inputs import refused, run, write_lines
from vlp.data.reading.annotated import Annotated, read_list
from vlp.data.reading.sentences import Sentences, nli_triples
from vlp.data.reading.tables import Lines, Table, has_columns
from vlp.errors import BadSample, UserError

ROWS = [f"a red square number {n}" for n in range(4)]


def texts(path, **fields) -> list[tuple[str, ...] | str]:
    """The texts of each row, or the reason why it is bad."""
    reader, found = Sentences(str(path), **fields).open(), []
    for row in range(len(reader)):
        try:
            sample = reader.read(0, row)
            found.append(sample.captions + sample.texts)
        except BadSample as e:
            found.append(str(e))
    return found


def test_blank_lines_are_skipped(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join([ROWS[0], "", ROWS[1], "  \t ", "", ROWS[2], "", ""]))
    assert texts(tmp_path / "t.txt") == [(row,) for row in ROWS[:3]]
    reader = Sentences(str(tmp_path / "t.txt")).open()
    assert [reader.read(0, row).key for row in range(3)] == ["1", "3", "6"]  # lines of the file


@pytest.mark.parametrize(
    "header", [" sent0,  sent1,\thard_neg", "sent0 , sent1 , hard_neg ", "\ufeffsent0,sent1,hard_neg"]
)
def test_header_with_spaces_names_the_columns(tmp_path, header):
    (tmp_path / "t.csv").write_text(header + "\na, b, c\n", encoding="utf-8")
    assert texts(tmp_path / "t.csv", columns=("sent0", "sent1", "hard_neg")) == [("a", "b", "c")]


def test_header_without_a_column_is_shown_with_its_delimiter(tmp_path):
    (tmp_path / "t.csv").write_text("sent0,sent 1\na,b\n")
    with pytest.raises(
        UserError, match=r"t.csv:1: expected a header with the columns .*; found 'sent0', 'sent 1', separated by commas"
    ):
        texts(tmp_path / "t.csv", columns=("sent0", "sent1"))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_delimiter_is_found_whatever_the_file_is_called(tmp_path, delimiter, suffix):
    rows = [["one", "two"], ["a", "b"], ["c", "d"]]
    (tmp_path / f"t.{suffix}").write_text("\n".join(delimiter.join(row) for row in rows))
    assert texts(tmp_path / f"t.{suffix}", columns=("two", "one")) == [("b", "a"), ("d", "c")]


def test_values_that_are_no_text_are_bad_samples(tmp_path):
    values = ["a", None, ["a"], {"a": 1}, 5, True, "", "b \ud83d"]
    write_lines(tmp_path / "t.jsonl", [{"s": value} for value in values] + [{}])
    found = texts(tmp_path / "t.jsonl", columns=("s",))
    missing = "a text is missing or empty"
    assert found == [
        ("a",),
        missing,
        """'s' should be a text, found ["a"]""",
        """'s' should be a text, found {"a": 1}""",
        "'s' should be a text, found 5",
        "'s' should be a text, found true",
        missing,
        ("b ?",),
        missing,
    ]


ENCODINGS = {
    "utf-16": "probably UTF-16:",
    "utf-16-le": "probably UTF-16LE:",
    "utf-16-be": "probably UTF-16BE:",
    "utf-32": "probably UTF-32:",
    "latin-1": "probably windows-1252:",
    "cp1252": "probably windows-1252:",
    "gb18030": "an encoding of its own script",
    "koi8-r": "an encoding of its own script",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.tsv", "t.jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_its_line_and_encoding(tmp_path, encoding, name):
    text = {"gb18030": "一只红色的猫坐在垫子上", "koi8-r": "красный квадрат на столе"}.get(
        encoding, "a café on the red square"
    )
    lines = {"jsonl": [json.dumps({"s": t}, ensure_ascii=False) for t in ("plain", text)], "txt": ["plain", text]}
    lines = lines.get(name.partition(".")[2], ["s", "plain", text])
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    columns = () if name == "t.txt" else ("s",)
    line = 1 if encoding.startswith("utf") else len(lines)
    with pytest.raises(
        UserError,
        match=rf"{name}:{line} is not UTF-8; it is {ENCODINGS[encoding]}"
        if "own" not in ENCODINGS[encoding]
        else ENCODINGS[encoding],
    ):
        texts(tmp_path / name, columns=columns)


def test_a_late_byte_that_is_not_utf8_is_found_in_a_long_file(tmp_path):
    """Behind the first chunks of the scan, and in the middle of a character at a chunk's end."""
    good = "é" * 999 + "\n"
    path = tmp_path / "t.txt"
    path.write_bytes(b"x" + good.encode() * 3000 + b"caf\xe9\n" + good.encode())
    with pytest.raises(UserError, match="t.txt:3001 is not UTF-8"):
        Lines(path)
    path.write_bytes(b"x" + good.encode() * 3000)
    assert len(Lines(path)) == 3000
    path.write_bytes(good.encode() + b"cut \xe4\xb8")
    with pytest.raises(UserError, match="t.txt:2 is not UTF-8"):
        Lines(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quoted_newlines_belong_to_their_cell(tmp_path, end):
    rows = [f'"one{end}line",b', 'c,"d ""quoted"", e"', "", f'f,"{end}{end}g"', "h,i"]
    (tmp_path / "t.csv").write_bytes(end.join(["x,y", *rows, ""]).encode())
    found = texts(tmp_path / "t.csv", columns=("x", "y"))
    assert found == [(f"one{end}line", "b"), ("c", 'd "quoted", e'), ("f", "g"), ("h", "i")]
    reader = Sentences(str(tmp_path / "t.csv"), columns=("x", "y")).open()
    assert [reader.read(0, row).key for row in range(4)] == ["2", "4", "6", "9"]


def test_a_quotation_mark_that_is_never_closed_is_one_bad_row(tmp_path):
    rows = ["x,y", "a,b", 'c,"d', "e,f", 'g,"h"', "i,j"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = texts(tmp_path / "t.csv", columns=("x", "y"))
    assert [row for row in found if isinstance(row, tuple)] == [("a", "b"), ("e", "f"), ("g", "h"), ("i", "j")]
    assert len(found) == 5 and "quotation mark" in found[1]


def test_a_table_of_unclosed_quotation_marks_is_refused_in_time(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n" + 'x","\n' * 30_000)
    with pytest.raises(UserError, match="quotation mark that is never closed"):
        texts(tmp_path / "t.csv", columns=("x", "y"))


def test_a_row_with_other_columns_is_bad_and_says_so(tmp_path):
    (tmp_path / "t.csv").write_text('x,y\na,b,c\n"d\ne\nf"\ng,h\n')
    assert texts(tmp_path / "t.csv", columns=("x", "y")) == [
        "3 columns; expected 2: x, y",
        "1 columns; expected 2: x, y (it extends over 3 lines: is a quotation mark missing?)",
        ("g", "h"),
    ]


def test_a_json_list_in_a_jsonl_is_called_that(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps([{"s": "a"}]))
    with pytest.raises(UserError, match="t.jsonl is a JSON list; write one object per line"):
        texts(tmp_path / "t.jsonl", columns=("s",))
    with pytest.raises(UserError, match="t.jsonl is a JSON list; write one object per line"):
        Annotated(str(tmp_path / "t.jsonl")).open()


def test_table_without_rows_is_empty(tmp_path):
    for content in ("", "\n\n", "\ufeff", "x,y\n"):
        (tmp_path / "t.csv").write_text(content, encoding="utf-8")
        assert len(Table(tmp_path / "t.csv", has_columns(["x"]), "x")) == 0


# --- annotations --------------------------------------------------------------------------------------------------------


def test_annotations_of_no_text_are_bad_samples(tmp_path):
    values = ["is it?", None, ["is it?"], {"a": 1}, 5]
    lines = [{"image": "a.jpg", "text": value, "label": "yes"} for value in values]
    lines += [{"image": "a.jpg", "text": "x", "label": label} for label in (None, ["yes"], True, "no")]
    source = Annotated(str(write_lines(tmp_path / "x.jsonl", lines)), label="label", classes=("yes", "no", "true"))
    reader, bad = source.open(), {}
    for row in range(len(reader)):
        try:
            reader.annotation(row)
        except BadSample as e:
            bad[row] = str(e)
    assert sorted(bad) == [1, 2, 3, 4, 5, 6]
    assert bad[1] == "no text in 'text'" and bad[2] == """'text' should be a text, found ["is it?"]"""
    assert bad[5] == "label '' is not among yes, no, true" and "should be a text" in bad[6]


def test_two_spellings_of_a_path_are_one_image(tmp_path):
    lines = [{"image": name, "text": "x"} for name in ("a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/../a/b.jpg", "a/c.jpg")]
    reader = Annotated(str(write_lines(tmp_path / "x.jsonl", lines))).open()
    ids = [reader.annotation(row).image_id for row in range(5)]
    assert len(set(ids[:4])) == 1 and ids[4] != ids[0]


@pytest.mark.parametrize(
    "name, content", [("c.txt", "caf\xe9\n".encode("latin-1")), ("c.json", b"[1]"), ("c.txt", b"\n")]
)
def test_lists_of_classes_are_texts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not UTF-8|is not a list of texts"):
        read_list(str(tmp_path / name))


# --- commands -----------------------------------------------------------------------------------------------------------


def test_triples_know_a_byte_order_mark_and_refuse_latin1(tmp_path, capfd):
    rows = "entailment\ta man\ta person\ncontradiction\ta man\ta woman\nentailment\tb\tc\ncontradiction\tb\td\n"
    (tmp_path / "bom.tsv").write_text(rows, encoding="utf-8-sig")
    assert list(nli_triples(tmp_path / "bom.tsv")) == [("a man", "a person", "a woman"), ("b", "c", "d")]
    code, out, _ = run(capfd, "data", "triples", tmp_path / "bom.tsv", tmp_path / "o.tsv")
    assert code == 0 and out.startswith("2 triples")
    (tmp_path / "latin1.tsv").write_bytes("entailment\ta café\tx\ncontradiction\ta café\ty\n".encode("latin-1"))
    assert "latin1.tsv:1 is not UTF-8" in refused(
        capfd, "data", "triples", tmp_path / "latin1.tsv", tmp_path / "o2.tsv"
    )


def test_paraphrase_refuses_latin1(tmp_path, capfd):
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1"))
    arguments = ("paraphrase", tmp_path / "latin1.txt", tmp_path / "p.tsv", "--translator", "builtins:list")
    assert "latin1.txt:1 is not UTF-8; it is probably windows-1252" in refused(capfd, "data", *arguments)


def test_rows_of_triples_that_cannot_be_used_are_counted_and_named(tmp_path, capfd):
    rows = ["one cell", "entailment\tp\te", "contradiction\tp", "contradiction\tp\tc", "entailment\t\tx", "\t\t\t"]
    (tmp_path / "n.tsv").write_text("\n".join(rows) + "\n")
    code, out, _ = run(capfd, "data", "triples", tmp_path / "n.tsv", tmp_path / "o.tsv")
    assert code == 0 and out.startswith("1 triples") and "3 rows skipped" in out and "n.tsv:1: 1 columns" in out
    bad = [json.loads(line) for line in (tmp_path / "o.quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"].partition(";")[0]) for line in bad] == [
        ("1", "1 columns"),
        ("3", "2 columns"),
        ("5", "a text is missing or empty"),
    ]
    (tmp_path / "n.tsv").write_text("\n".join(rows[1:2] + rows[3:4]))
    assert "skipped" not in run(capfd, "data", "triples", tmp_path / "n.tsv", tmp_path / "o.tsv")[1]
    assert not (tmp_path / "o.quarantine.jsonl").exists()
    (tmp_path / "n.tsv").write_text("entailment\t\tx\n")
    assert "none of the 1 rows" in refused(capfd, "data", "triples", tmp_path / "n.tsv", tmp_path / "o.tsv")


def test_a_line_that_is_a_list_does_not_refuse_the_others(tmp_path):
    (tmp_path / "t.jsonl").write_text('["a", "b"]\n{"s": "c"}\n{"other": 1}\n')
    assert texts(tmp_path / "t.jsonl", columns=("s",)) == [
        "json is not an object",
        ("c",),
        "a text is missing or empty: no 's' among 'other'",
    ]


@pytest.mark.parametrize(
    "start, kind",
    [
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (b"PK\x03\x04\x14", "a zip archive or an .xlsx"),
        (b"PAR1\x15\x04", "Parquet: convert it"),
    ],
)
def test_files_that_are_not_texts_are_called_what_they_are(tmp_path, start, kind, capfd):
    (tmp_path / "t.csv").write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=f"t.csv is not a text file but {kind}"):
        Sentences(str(tmp_path / "t.csv"), columns=("s",)).open()
    assert kind in refused(capfd, "data", "pack", tmp_path / "t.csv", tmp_path / "o")


def test_table_with_other_columns_is_shown_with_its_own_delimiter(tmp_path):
    (tmp_path / "t.csv").write_text("a b\t c \tlonger\n1\t2\t3\n")
    with pytest.raises(UserError, match="found 'a b', ' c ', 'longer', separated by tabs"):
        Sentences(str(tmp_path / "t.csv"), columns=("s",)).open()
