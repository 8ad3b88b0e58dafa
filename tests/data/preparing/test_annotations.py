"""Official files of annotations become lines that `Annotated` reads by default."""

import json
import pickle
from pathlib import Path

import pytest

from vlp.cli import main
from vlp.data.preparing.annotations import convert
from vlp.data.reading.annotated import Annotated
from vlp.errors import UserError

VQA = {
    "data_subtype": "val2014",
    "questions": [{"image_id": 42, "question": "What?", "question_id": 42000}, {"image_id": 42, "question": "Is it?", "question_id": 42001}],
}  # fmt: skip
SAID = {
    "annotations": [
        {"question_id": 42001, "answers": [{"answer": a} for a in ("yes", "yes", "no")], "answer_type": "yes/no",
         "question_type": "is it", "multiple_choice_answer": "yes"},
        {"question_id": 42000, "answers": [{"answer": "cat"}] * 3, "answer_type": "other",
         "question_type": "what", "multiple_choice_answer": "cat"},
    ]
}  # fmt: skip
ALBEF = [
    {"image": "a.jpg", "question": "q?", "question_id": 1, "answer": ["x", "y", "x"], "dataset": "vqa"},
    {"image": "b.jpg", "question": "r?", "question_id": 2, "answer": "z", "dataset": "vg"},
    {"image": "c.jpg", "question": "s?", "question_id": 3},
]
GENOME = [{"id": 7, "qas": [{"qa_id": 1, "question": "Where?", "answer": "On the two tables."}]}]
IMAGES = [{"image_id": 7, "url": "https://there/rak248/VG_100K_2/7.jpg"}]
NLVR2 = [
    {"sentence": "Two dogs.", "label": "True", "identifier": "train-10171-3-0", "directory": 49},
    {"sentence": "One dog.", "label": "False", "identifier": "dev-850-0-1"},
]
CASES = {
    "vqa2": (
        (VQA, SAID),
        [
            {
                "image": "val2014/COCO_val2014_000000000042.jpg",
                "text": "What?",
                "question_id": 42000,
                "answers": ["cat"] * 3,
                "multiple_choice_answer": "cat",
                "question_type": "what",
                "answer_type": "other",
            },
            {
                "image": "val2014/COCO_val2014_000000000042.jpg",
                "text": "Is it?",
                "question_id": 42001,
                "answers": ["yes", "yes", "no"],
                "multiple_choice_answer": "yes",
                "question_type": "is it",
                "answer_type": "yes/no",
            },
        ],
    ),
    "vqa2 test": (
        (VQA | {"data_subtype": "test-dev2015"},),
        [
            {"image": "test2015/COCO_test2015_000000000042.jpg", "text": "What?", "question_id": 42000},
            {"image": "test2015/COCO_test2015_000000000042.jpg", "text": "Is it?", "question_id": 42001},
        ],
    ),
    "albef-vqa": (
        (ALBEF,),
        [
            {"image": "a.jpg", "text": "q?", "question_id": 1, "dataset": "vqa", "answers": ["x", "y", "x"]},
            {"image": "b.jpg", "text": "r?", "question_id": 2, "dataset": "vg", "answers": {"z": 0.5}},
            {"image": "c.jpg", "text": "s?", "question_id": 3},
        ],
    ),
    "visual-genome": (
        (GENOME, IMAGES),
        [{"image": "VG_100K_2/7.jpg", "text": "Where?", "question_id": 1, "answers": {"on 2 tables": 0.5}}],
    ),
    "nlvr2": (
        (NLVR2,),
        [
            {
                "image0": "images/train/49/train-10171-3-img0.png",
                "image1": "images/train/49/train-10171-3-img1.png",
                "text": "Two dogs.",
                "label": "True",
                "identifier": "train-10171-3-0",
            },
            {
                "image0": "dev/dev-850-0-img0.png",
                "image1": "dev/dev-850-0-img1.png",
                "text": "One dog.",
                "label": "False",
                "identifier": "dev-850-0-1",
            },
        ],
    ),
    "nlvr2 albef": (
        (
            [
                {"sentence": "s", "label": True, "images": ["a.png", "b.png"]},
                {"sentence": "t", "images": ["a.png", "b.png"]},
            ],
        ),
        [
            {"image0": "a.png", "image1": "b.png", "text": "s", "label": "True"},
            {"image0": "a.png", "image1": "b.png", "text": "t"},
        ],
    ),
    "snli-ve": (
        ([{"Flickr30K_ID": "36", "sentence2": "A man.", "gold_label": "neutral", "sentence1": "x"}],),
        [{"image": "36.jpg", "text": "A man.", "label": "neutral"}],
    ),
    "snli-ve albef": (
        ([{"image": "36", "sentence": "A man.", "label": "neutral"}],),
        [{"image": "36.jpg", "text": "A man.", "label": "neutral"}],
    ),
    "refcoco": (
        ([{"image": "a.jpg", "text": "left one", "ref_id": 5, "bbox": [1, 2, 3, 4]}],),
        [{"image": "a.jpg", "text": "left one", "ref_id": 5, "bbox": [1, 2, 3, 4]}],
    ),
}


def written(tmp_path, name: str, contents: tuple) -> list[str]:
    paths = []
    for n, content in enumerate(contents):
        paths.append(tmp_path / f"{n}.json")
        lines = name.split()[0] in ("nlvr2", "snli-ve") and "albef" not in name
        paths[-1].write_text("".join(json.dumps(x) + "\n" for x in content) if lines else json.dumps(content))
    return list(map(str, paths))


@pytest.mark.parametrize("name", CASES)
def test_official_file_becomes_lines(name, tmp_path, capsys):
    contents, expected = CASES[name]
    files, out = written(tmp_path, name, contents), tmp_path / "out.jsonl"
    assert list(convert(name.split()[0], files)) == expected
    assert main(["data", "annotations", name.split()[0], *files, str(out), "--split", "val"]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [line | {"split": "val"} for line in expected]
    assert f"{len(expected)} annotations" in capsys.readouterr().out


def test_written_annotations_are_read_with_default_fields(tmp_path):
    out = tmp_path / "out.jsonl"
    main(["data", "annotations", "vqa2", *written(tmp_path, "vqa2", (VQA, SAID)), str(out)])
    sample = Annotated(str(out), answers="answers", classes=("yes", "no")).open().annotation(1)
    assert sample.captions == ("Is it?",) and sample.answers == (("yes", 2 / 3), ("no", 1 / 3))
    assert sample.targets.tolist() == pytest.approx([0.6, 0.3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vqa3", "{0}", "out"], "there is no format 'vqa3'; there are vqa2, "),
        (["vqa2", "{0}", "{1}", "out"], "there is no 'data_subtype'"),
        (["vqa2", "{2}", "{3}", "out"], "1 questions are in only one of"),
        (["albef-vqa", "{2}", "out"], "expected ALBEF's list"),
        (["nlvr2", "{0}", "out"], "there is no 'identifier'"),
        (["snli-ve", "{4}", "out"], "contains no annotation"),
        (["visual-genome", "{0}", "out"], "expected Visual Genome's question_answers.json and image_data.json"),
        (["refcoco", "gone.json", "out"], "gone.json"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    contents = ({"questions": []}, {"annotations": []}, VQA, {"annotations": SAID["annotations"][:1]}, [])
    files = written(tmp_path, "vqa2", contents)
    assert main(["data", "annotations", *(a.format(*files) for a in arguments[:-1]), str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1


def refcoco_files(tmp_path) -> list[str]:
    """As they are published: refs(unc).p by Python 2."""
    phrases = [{"image": "train2014/7.jpg", "text": "red one", "ref_id": 5}]
    references = [
        {"ref_id": 5, "ann_id": 70, "image_id": 7, "split": "testA", "sentences": [{"tokens": ["red", "one"]}]}
    ]
    contents = {
        "refcoco+_test.json": phrases,
        "instances.json": {"annotations": [{"id": 70, "bbox": [1.5, 2, 3, 4], "image_id": 7}]},
        "dets.json": {"7": [[0, 0, 9, 9, 0.9], [1, 2, 3, 4, 0.5]]},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    return [str(tmp_path / name) for name in ("refcoco+_test.json", "refs(unc).p", "instances.json", "dets.json")]


def test_refcoco_phrases_get_their_boxes_and_proposals(tmp_path):
    files = refcoco_files(tmp_path)
    line = {"image": "train2014/7.jpg", "text": "red one", "ref_id": 5, "split": "testA", "box": [1.5, 2, 3, 4]}
    assert list(convert("refcoco", files[:3])) == [line]
    assert list(convert("refcoco", files)) == [line | {"proposals": [[0, 0, 9, 9], [1, 2, 3, 4]]}]


def test_references_without_their_boxes_are_one_line(tmp_path, capsys):
    assert main(["data", "annotations", "refcoco", *refcoco_files(tmp_path)[:2], str(tmp_path / "out.jsonl")]) == 2
    found = capsys.readouterr().err
    assert "give both" in found and found.count("\n") == 1


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("run"),)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps([Harm()]), "none of its code was run"),
        (b"\x80\x02c__builtin__\neval\n", "it asks for __builtin__.eval"),
        (b"no pickle", "is not a pickle"),
        (b"", "is not a pickle"),
        (pickle.dumps([{"ref_id": 6}]), "there is no 5"),
    ],
)
def test_pickles_with_code_or_other_content_are_refused(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = refcoco_files(tmp_path)
    Path(files[1]).write_bytes(content)
    assert main(["data", "annotations", "refcoco", *files, "out.jsonl"]) == 2
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
    assert not Path("run").exists() and not Path("out.jsonl").exists()


def test_list_of_answers_is_in_the_order_of_their_frequency(tmp_path, capsys):
    path, out = tmp_path / "x.jsonl", tmp_path / "answers.txt"
    given = [["Two"] * 3 + ["2"], "red", {"red": 0.5}, ["a dog"], "2.", "rare"]
    lines = [{"answers": answer, "split": "train"} for answer in given] + [{"answers": "red", "split": "val"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "answers", str(path), str(out), "--split", "train"]) == 0
    assert out.read_text().splitlines() == ["Two", "red", "2", "2.", "a dog", "rare"]
    assert main(["data", "answers", str(path), str(out), "--normalise", "--min-count", "2"]) == 0
    assert out.read_text().splitlines() == ["2", "red"]
    assert "2 answers in" in capsys.readouterr().out
    assert main(["data", "answers", str(path), str(out), "--order", "appearance"]) == 0
    assert out.read_text().splitlines() == ["Two", "2", "red", "a dog", "2.", "rare"]
    assert main(["data", "answers", str(path), str(out), "--field", "nothing"]) == 2
    assert "no answer of" in capsys.readouterr().err


def test_easy_vqa_is_read_from_its_package(tmp_path):
    pytest.importorskip("easy_vqa", reason="pip install easy-vqa (extra dev)")
    lines = list(convert("easy-vqa", ["pip:easy_vqa/data"]))
    assert (len(lines), sum(line["split"] == "test" for line in lines)) == (48_248, 9_673)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(lines[0]) + "\n")
    assert Annotated(str(path), images="pip:easy_vqa/data", answers="answers").open().read(0, 0).image
    with pytest.raises(UserError, match="cannot be read"):
        list(convert("easy-vqa", [str(path)]))


GOOD_AND_BAD = {
    "nlvr2": (
        '{"images": ["a", "b"], "sentence": "s", "label": "True"}\n{"images": ["a", "b"], "sentence": null}\nnot json\n'
        '{"images": ["a"], "sentence": "s"}\n{"images": ["a", "b"], "sentence": "s", "label": null}\n[1]\n',
        {
            "2": "no 'text'",
            "3": "json does not parse",
            "4": "its structure",
            "5": "no label",
            "6": "json is not an object",
        },
    ),
    "snli-ve": (
        '{"Flickr30K_ID": 5, "sentence2": "s", "gold_label": "neutral"}\n{"Flickr30K_ID": 5, "gold_label": "neutral"}\n'
        '{"Flickr30K_ID": null, "sentence2": "s", "gold_label": "neutral"}\n',
        {"2": "there is no 'sentence2'", "3": "no 'image'"},
    ),
    "albef-vqa": (
        '[{"image": "a", "question": "q", "answer": ["x"]}, 5, {"image": "a", "question": "q", "answer": null},\n'
        '{"image": "a", "question": ["q"]}]',
        {"[1]": "its structure differs", "[2]": "no answer", "[3]": "'text' should be a text"},
    ),
}


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_records_that_cannot_be_used_are_counted_and_named(name, tmp_path, capsys):
    text, reasons = GOOD_AND_BAD[name]
    (tmp_path / "in.json").write_text(text)
    assert main(["data", "annotations", name, str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    bad = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in bad] == list(reasons)
    assert all(line["reason"].startswith(reasons[line["key"]]) for line in bad)
    assert f"{len(bad)} rows skipped" in capsys.readouterr().out


def test_a_malformed_entry_of_either_vqa_file_is_its_own_question_only(tmp_path, capsys):
    asked = json.loads(json.dumps(VQA))
    asked["questions"] += [5, {"question_id": 1}]
    said = json.loads(json.dumps(SAID))
    said["annotations"][0].pop("question_id")
    files = written(tmp_path, "vqa2", (asked, said))
    assert main(["data", "annotations", "vqa2", *files, str(tmp_path / "out.jsonl")]) == 0
    kept = (tmp_path / "out.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == len(VQA["questions"]) - 1 and len(bad) == 3
