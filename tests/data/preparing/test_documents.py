"""Lists of JSON documents are read one element at a time, with the values and the errors of json.loads."""

import json
import random

import pytest

from vlp.data.preparing import documents
from vlp.data.preparing.documents import Records, read_document
from vlp.errors import UserError

CHARACTERS = 'a"\\/é漢😀\n\t\u2028 {}[],:'


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -1, 10**25, rng.randrange(-(10**6), 10**6)])
    if kind == 2:
        return rng.choice([1.5e7, -2.5e-9, float("inf"), rng.random()])
    if kind < 6:
        return "".join(rng.choices(CHARACTERS, k=rng.randrange(30)))
    count = rng.randrange(4)
    if kind == 6:
        return {
            random_value(random.Random(rng.random()), 3).__repr__(): random_value(rng, depth + 1) for _ in range(count)
        }
    return [random_value(rng, depth + 1) for _ in range(count)]


def plain(found):
    """Return a document as json.loads does, but None in place of what `read_document` does not keep."""
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    return list(found) if isinstance(found, Records) else None


@pytest.fixture(params=[1, 7, 1 << 16])
def first_read(request, monkeypatch):
    """Also reads of few bytes, so that every value is once cut at every character."""
    monkeypatch.setattr(documents, "FIRST_READ", request.param)


@pytest.mark.usefixtures("first_read")
def test_documents_have_the_values_of_json_loads(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.json"
    for number in range(300):
        content = random_value(rng)
        if rng.random() < 0.5:
            content = {"info": content, "images": [random_value(rng) for _ in range(rng.randrange(5))], "": []}
        text = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 2, 40]))
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf", b" \n"]) + text.encode() + rng.choice([b"", b"\n\n"]))
        expected = json.loads(text)
        if isinstance(expected, dict):
            expected = {name: value if isinstance(value, list) else None for name, value in expected.items()}
        elif not isinstance(expected, list):
            expected = None
        assert plain(read_document(path)) == expected, number


@pytest.mark.usefixtures("first_read")
def test_damaged_documents_have_the_line_of_the_error_of_json_loads(tmp_path):
    rng, path, refused = random.Random(1), tmp_path / "a.json", 0
    for _ in range(300):
        content = {"info": random_value(rng), "images": [random_value(rng) for _ in range(5)]}
        text = json.dumps(rng.choice([content, content["images"]]), indent=rng.choice([None, 2]))
        at = rng.randrange(len(text))
        text = rng.choice([text[:at], text[:at] + text[at + 1 :], text[:at] + rng.choice('x,]}"') + text[at:]])
        path.write_text(text)
        try:
            json.loads(text)
        except json.JSONDecodeError as e:
            refused += 1
            with pytest.raises(UserError, match=rf"a\.json:{e.lineno} is not JSON"):
                read_document(path)
        else:
            read_document(path)
    assert refused > 200


def test_elements_are_read_in_any_order(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"n": n, "é": "漢" * n} for n in range(50)]}, ensure_ascii=False))
    images = read_document(path)["images"]
    assert len(images) == 50 and [images[n]["n"] for n in (40, 0, 49)] == [40, 0, 49]
    with pytest.raises(IndexError):
        images[50]
