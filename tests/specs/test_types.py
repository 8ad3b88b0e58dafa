"""The usual type hints of a user's own specs are checked, or accepted where Python cannot check them."""

from __future__ import annotations

import collections.abc
import enum
import json
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NewType, Protocol, TypedDict, TypeVar

import pytest

from vlp.errors import UserError
from vlp.specs.json import from_plain, to_plain
from vlp.specs.types import check_types, describe_type, fits
from vlp.specs.user_code import own_types

if typing.TYPE_CHECKING:
    from decimal import Decimal

T = TypeVar("T")
Metres = NewType("Metres", float)


class Colour(enum.Enum):
    RED = 1


class Distance(Protocol):
    def __call__(self, a: float, b: float) -> float: ...


@typing.runtime_checkable
class Sized(Protocol):
    def __len__(self) -> int: ...


class Sizes(TypedDict):
    width: int


class Box(Generic[T]):
    pass


@pytest.mark.parametrize(
    ("value", "hint", "accepted"),
    [
        ([1, 2], list[int], True),
        ((1, 2), list[int], True),  # as experiment.json gives it back
        ([1, "2"], list[int], False),
        ((1, 2), list, True),
        (3, list[int], False),
        ([1], typing.List[int], True),  # noqa: UP006
        ((1, 2), Sequence[int], True),
        ((1, "2"), Sequence[int], False),
        (1, Sequence[int], False),
        ("ab", Sequence[str], True),
        ((1, 2), typing.Sequence, True),
        ({1, 2}, set[int], True),
        ({1, "2"}, set[int], False),
        (frozenset({1}), frozenset[int], True),
        ((1.5,), Iterable[float], True),
        (("a",), Collection[int], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": ["b"]}, dict[str, list[int]], False),
        ({"a": 1}, dict, True),
        ({"a": 1}, typing.Dict, True),  # noqa: UP006
        ((1, "a"), tuple[int, str], True),
        ((1, 2), tuple[int, str], False),
        ((), tuple[()], True),
        ((1, "a"), tuple, True),
        ((1, "a"), typing.Tuple, True),  # noqa: UP006
        (max, Callable[[int, int], int], True),
        (max, collections.abc.Callable, True),
        (max, typing.Callable, True),
        (3, Callable[..., Any], False),
        (max, Distance, True),
        (3, Distance, True),  # a Protocol cannot be checked unless it is runtime_checkable
        ((1,), Sized, True),
        (3, Sized, False),
        (int, type[int], True),
        (str, type[int], False),
        (3, type[int], False),
        (int, type, True),
        (1.5, Metres, True),
        ("1.5", Metres, False),
        (3, Annotated[int, "metres"], True),
        ("3", Annotated[int, "metres"], False),
        (3, T, True),
        (None, None, True),
        (3, None, False),
        (3, object, True),
        (Colour.RED, Colour, True),
        (1, Colour, False),
        ({"width": 3}, Sizes, True),
        (Box(), Box[int], True),
        (3, Box[int], False),
        ((1, None), tuple[int | None, ...], True),
        (((1, 2), (3, 4)), tuple[tuple[int, int], ...], True),
        (((1, 2), (3,)), tuple[tuple[int, int], ...], False),
        ("a", Literal["a", 1] | None, True),
        (Path("x"), Path | str, True),
        (b"x", bytes, True),
    ],
)
def test_hint(value, hint, accepted):
    assert fits(value, hint) == accepted
    assert isinstance(describe_type(hint), str)


@dataclass(frozen=True)
class Mine:
    sizes: Sequence[int] = (1, 2)
    names: list[str] = ()
    distance: Distance | None = None
    scales: Mapping[str, float] | None = None


def test_spec_with_such_hints_is_checked_after_json_too():
    spec = Mine(sizes=[3, 4], names=["a"], scales={"a": 1.0})
    check_types(spec)
    again = from_plain(json.loads(json.dumps(to_plain(spec))), own_types(spec))
    check_types(again)
    with pytest.raises(UserError, match=r"sizes is \(1, 'b'\); it takes"):
        check_types(Mine(sizes=(1, "b")))


@dataclass(frozen=True)
class Unreadable:
    price: Decimal = 0


def test_hint_of_a_name_that_is_not_imported_is_one_line():
    with pytest.raises(UserError, match="hint of Unreadable cannot be read .*Decimal.*outside of TYPE_CHECKING"):
        check_types(Unreadable())


@dataclass(frozen=True)
class Base:
    weight: float = 1.0

    def __call__(self): ...


def test_subclass_with_fields_must_be_a_dataclass_itself():
    class OnlyBehaviour(Base):
        name: typing.ClassVar[str] = "no field"

        def __call__(self): ...

    class Undecorated(Base):
        margin: float = 0.1

    class OwnInit(Base):
        def __init__(self, margin):
            super().__init__()

    check_types(OnlyBehaviour())
    for spec in (Undecorated(), OwnInit(0.1)):
        with pytest.raises(UserError, match=f"{type(spec).__name__} has fields of its own; write @dataclass"):
            check_types(spec)
