"""Experiments: overrides, the round trip through JSON, and the fields that may change on resume."""

import json
import runpy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from tests.conftest import TOY
from vlp.config import FREE_ON_RESUME, Experiment, changed_keys, load_config, load_json
from vlp.data.reading.shards import Source
from vlp.data.reading.tar_streams import WebDatasetStream
from vlp.errors import UserError
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import Lamb
from vlp.specs.json import dump, from_plain, to_plain
from vlp.specs.overrides import override
from vlp.specs.types import check_types, fits
from vlp.specs.user_code import own_types
from vlp.training.validation import validate


@pytest.fixture
def toy() -> Experiment:
    return runpy.run_path(str(TOY))["config"]()


def value_at(experiment, key: str):
    for name in key.split("."):
        if isinstance(experiment, dict):
            experiment = experiment[name]
        elif isinstance(experiment, tuple):
            experiment = experiment[int(name)]
        else:
            experiment = getattr(experiment, name)
    return experiment


@pytest.mark.parametrize(
    "assignment, expected",
    [
        ("name=again", "again"),
        ("name=a=b", "a=b"),
        ("seed=7", 7),
        ("data.batch_size=1_024", 1024),
        ("optim.lr=5e-4", 5e-4),
        ("optim.lr=1", 1.0),
        ("train.clip_norm=none", None),
        ("train.clip_norm=2", 2.0),
        ("train.steps=None", None),
        ("train.compile=true", True),
        ("train.compile=False", False),
        ("train.precision=bf16", "bf16"),
        ("train.engine=ddp", "ddp"),
        ("train.engine=none", None),
        ("optim.betas=0.8,0.9", (0.8, 0.9)),
        ("train.frozen=image.,text.", ("image.", "text.")),
        ("train.frozen=", ()),
        ("train.lr_scales.text=0.1", 0.1),
        ("data.train=a,b", (Source("a"), Source("b"))),
        ("data.train.0.weight=2", 2.0),
        ("data.val=none", None),
        ("evaluate.retrieval.ks=1,2", (1, 2)),
        ("objectives.itc.reduction=sum", "sum"),
        ("model.image.image_size=64", 64),
        ("model.text.config.vocab_size=300", 300),
        ("model.temperature=0.07", 0.07),
    ],
)
def test_override_is_parsed_as_the_type_of_the_field(toy, assignment, expected):
    changed = override(toy, [assignment])
    key = assignment.partition("=")[0]
    found = value_at(changed, key)
    assert found == expected and type(found) is type(expected)
    # no other key has changed
    assert [
        k for k in changed_all(toy, changed) if not (k == key or k.startswith(key + ".") or key.startswith(k))
    ] == []


def test_override_of_a_new_key_of_a_dict_is_parsed_as_its_declared_type():
    objective = override(MaskedText(), ["word_classes.colour=red,green", "word_classes.size=small"])
    assert objective.word_classes == {"colour": ("red", "green"), "size": ("small",)}


def changed_all(old: Experiment, new: Experiment) -> list[str]:
    from vlp.specs.json import flatten

    a, b = flatten(to_plain(old)), flatten(to_plain(new))
    return [k for k in {**a, **b} if a.get(k) != b.get(k)]


def test_overrides_apply_in_order_and_return_a_new_experiment(toy):
    before = dump(toy)
    assert override(toy, ["seed=1", "seed=2"]).seed == 2
    assert dump(toy) == before


@pytest.mark.parametrize(
    "value, hint, accepted",
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (False, float, False),
        ("1", float, False),
        (None, int | None, True),
        ("a", int | None, False),
        (True, bool, True),
        (1, bool, False),
        ((1, 2), tuple[int, ...], True),
        ([1, 2], tuple[int, ...], False),
        ((1, "2"), tuple[int, ...], False),
        ((), tuple[int, ...], True),
        ((0.1, 0.2), tuple[float, float], True),
        ((0.1,), tuple[float, float], False),
        (5, int | tuple[int, int], True),
        ("sum", Literal["sum", "mean"], True),
        ("max", Literal["sum", "mean"], False),
        ({"a": 1.0}, dict[str, float], True),
        ({"a": "x"}, dict[str, float], False),
        ({1: 1.0}, dict[str, float], False),
        (object(), Any, True),
    ],
)
def test_type_of_a_field(value, hint, accepted):
    assert fits(value, hint) == accepted


def test_wrong_type_is_found_at_any_depth(toy):
    check_types(toy)
    source = replace(toy.data.train[0], weight="much")
    with pytest.raises(UserError, match=r"data.train.0.weight is 'much'; it takes a number or none"):
        check_types(replace(toy, data=replace(toy.data, train=(source,))))
    with pytest.raises(UserError, match=r"optim.betas is \(0.9,\); it takes a tuple \(2 x a number\)"):
        check_types(replace(toy, optim=replace(toy.optim, betas=(0.9,))))


def test_json_contains_the_whole_experiment(toy, tmp_path):
    path = tmp_path / "experiment.json"
    path.write_text(dump(toy))
    assert load_json(path) == toy == load_config(str(path))
    assert changed_keys(toy, load_json(path)) == []
    resolved = toy.resolved()
    path.write_text(dump(resolved))
    assert load_json(path) == resolved


@dataclass(frozen=True)
class Odd:
    values: Any = field(default_factory=dict)


@pytest.mark.parametrize(
    "value", [{"type": "plain"}, {"type": "Dual"}, {"type": "dict"}, {"a": {"b": (1, 2)}}, (), None, "x:y", {"type": 3}]
)
def test_round_trip_of_odd_values(value):
    spec = Odd(value)
    assert from_plain(json.loads(json.dumps(to_plain(spec))), own_types(spec)) == spec


@pytest.mark.parametrize(
    "plain, message",
    [
        ({"type": "vlp.optim.optimizers:AdamX"}, "another version of vlp"),
        ({"type": "nowhere:AdamW"}, r"uses its own code \(nowhere:AdamW\)"),
        ({"type": "os:system"}, "uses its own code"),
        ({"type": "builtins:eval"}, "uses its own code"),
        ({"type": "vlp.optim.optimizers:AdamW", "momentum": 1}, "another version of vlp"),
    ],
)
def test_json_can_name_types_of_vlp_only(plain, message):
    with pytest.raises(UserError, match=message):
        from_plain(plain)


def test_value_outside_json_is_refused(toy):
    with pytest.raises(UserError, match="cannot be stored as JSON"):
        validate(replace(toy, evaluate={"retrieval": object()}))


def test_changed_keys_are_dotted_and_complete(toy):
    assert changed_keys(toy, override(toy, ["optim.lr=0.5", "data.train=x"])) == ["data.train.0.shards", "optim.lr"]
    keys = changed_keys(toy, replace(toy, optim=Lamb()))
    assert "optim.type" in keys and "optim.adapt_undecayed" in keys


def test_fields_that_may_change_on_resume(toy):
    free = [
        "name=x",
        "output=y",
        "data.workers=7",
        "data.prefetch_shards=0",
        "train.processes=2",
        "train.engine=ddp",
        "train.threads=3",
    ]
    free += [
        "train.profile=true",
        "train.stall_timeout=9",
        "save.every=1",
        "save.keep=9",
        "save.best=none",
        "log.sample_keys=false",
        "log.geometry_every=0",
    ]
    assert changed_keys(toy, override(toy, free)) == []
    streaming = replace(toy, data=replace(toy.data, train=(WebDatasetStream("x.tar"),)))
    of_stream = ["data.train.0.inexact_resume=true"]
    assert changed_keys(streaming, override(streaming, of_stream)) == []
    named = {assignment.partition("=")[0] for assignment in free + of_stream}
    assert all(any(n == key or n.startswith(key + ".") for n in named) for key in FREE_ON_RESUME)


def test_number_as_a_dict_key_is_refused_because_json_makes_it_a_text(toy):
    with pytest.raises(UserError, match="it takes a dict of texts to anything"):
        check_types(replace(toy, objectives={1: toy.objectives["itc"]}))
