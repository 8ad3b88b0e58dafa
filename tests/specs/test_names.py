"""Files of earlier versions are read: types, fields and values have the names of today."""

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import get_type_hints

import pytest

from tests.fixtures.toy import config as toy
from vlp.data.augment import RandomResizedCrop
from vlp.data.mixup import Mixup
from vlp.errors import UserError
from vlp.specs import names
from vlp.specs.json import Foreign, from_plain, read_without_code, to_plain
from vlp.specs.names import RENAMED, RENAMED_FIELDS, RENAMED_VALUES, TYPES, class_of, name_of
from vlp.specs.types import fits
from vlp.specs.user_code import own_types


@pytest.mark.parametrize("name", TYPES)
def test_every_type_of_the_table_is_a_dataclass_that_is_stored_by_its_name(name):
    cls = class_of(name)
    assert is_dataclass(cls) and name_of(cls) == name
    assert class_of(f"{cls.__module__}:{name}") is cls


def test_renames_lead_to_names_of_today():
    assert set(RENAMED.values()) <= set(TYPES) and not set(RENAMED) & set(TYPES)
    for name, renamed in RENAMED_FIELDS.items():
        known = {field.name for field in fields(class_of(name))}
        assert set(renamed.values()) <= known and not set(renamed) & known
    for (name, field), renamed in RENAMED_VALUES.items():
        hint = get_type_hints(class_of(name))[field]
        assert all(fits(value, hint) for value in renamed.values())


def test_experiment_of_an_earlier_version_is_read():
    """Module paths in place of short names, and fields that have another name today."""
    new = toy()
    new = replace(new, train=replace(new.train, mixup=Mixup()), data=replace(new.data, add_sep=False))

    def old(plain):
        if isinstance(plain, list):
            return list(map(old, plain))
        if not isinstance(plain, dict):
            return plain
        plain = {name: old(value) for name, value in plain.items()}
        module = {"Mixup": "vlp.mixing", "Experiment": "vlp.config"}.get(plain.get("type"), "vlp.elsewhere")
        back = {today: before for before, today in RENAMED_FIELDS.get(plain.get("type"), {}).items()}
        plain = {back.get(name, name): value for name, value in plain.items()}
        if "type" in plain:
            plain["type"] = f"{module}:{ {'Mixup': 'Mix'}.get(plain['type'], plain['type']) }"
        return plain

    stored = json.loads(json.dumps(old(to_plain(new))))
    assert stored["train"]["mix"]["type"] == "vlp.mixing:Mix" and stored["data"]["sep"] is False
    assert stored["log"]["samples"] is True
    assert from_plain(stored) == new


@dataclass(frozen=True)
class Base:
    unit: str = "word"


@dataclass(frozen=True)
class Derived(Base):
    share: float = 0.5


def test_renames_of_a_class_reach_a_users_subclass(monkeypatch):
    monkeypatch.setitem(names.RENAMED_FIELDS, "Base", {"of": "unit"})
    monkeypatch.setitem(names.RENAMED_VALUES, ("Base", "unit"), {"token": "subword"})
    stored = {"type": name_of(Derived), "of": "token", "share": 0.1}
    assert from_plain(stored, own_types(Derived())) == Derived("subword", 0.1)


def test_types_outside_vlp_are_built_only_if_they_are_given(tmp_path):
    spec = {"augment": Derived(), "resize": RandomResizedCrop()}
    plain = to_plain(spec)
    assert own_types(spec) == {"tests.specs.test_names:Derived": Derived}
    with pytest.raises(UserError, match="uses its own code"):
        from_plain(plain)
    assert from_plain(plain, own_types(spec)) == spec
    (tmp_path / "spec.json").write_text(json.dumps(plain))
    read = read_without_code(tmp_path / "spec.json")
    assert read["augment"] == Foreign("tests.specs.test_names:Derived", {"unit": "word", "share": 0.5})
    assert read["resize"] == RandomResizedCrop() and to_plain(read) == plain


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", r"uses its own code \(os:system\)"),
        ("Nothing", "another version"),
        ("vlp.config:Nothing", "another version"),
        ("vlp:Nothing", "another version"),
        ("vlpx.config:Experiment", "uses its own code"),
        (":Nothing", "another version"),
    ],
)
def test_unknown_type_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        class_of(name)


def test_class_inside_a_function_has_no_name_to_store():
    @dataclass(frozen=True)
    class Local:
        x: int = 0

    with pytest.raises(UserError, match="Local is defined inside a function; move it to the top of its module"):
        own_types({"a": (Local(),)})
