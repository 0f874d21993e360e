from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypedDict

import numpy as np
import pytest
from omegaconf import OmegaConf

from vae3d.arguments import (
    ArgumentError,
    Count,
    Deviation,
    Flags,
    Range,
    Width,
    Widths,
    check_arguments,
    check_fields,
    check_value,
    short,
)
from vae3d.config.schema import CONF
from vae3d.models.registry import MODELS

GOOD = [
    (Width, 1), (Width, 65536), (Width, np.int64(4)), (Deviation, 1), (Deviation, 0.5), (Deviation, np.float32(0.5)),
    (Widths, (8, 8)), (Widths, [8]), (Flags, []), (Flags, [True]), (Count | None, None), (Mapping[str, Any], {"a": ...}),
    (float | Sequence[float], 1.0), (float | Sequence[float], [1, 2.0]), (Literal["a", 1], "a"), (Literal["a", 1], 1), (str, ""),
    (bool, False), (object, ...),
]  # fmt: skip
BAD = [
    (Width, 0, "an integer from 1 to 65536"), (Width, 65537, "from 1"), (Width, 1.0, "integer"), (Width, True, "integer"),
    (Width, "8", "integer"), (Width, None, "integer"), (Width, [8], "integer"), (Width, 10**5000, "an integer of 16610 bits"),
    (Deviation, 0, "from 1e-06"), (Deviation, float("nan"), "nan"), (Deviation, float("inf"), "inf"), (Deviation, 10**400, "bits"),
    (Widths, [], "1 to 10 entries"), (Widths, [8] * 11, "entries"), (Widths, [8, -1], r"x\[1\] is -1"), (Widths, "88", "a list"),
    (Widths, {8: 8}, "a list"), (Flags, [1], r"x\[0\] is 1; give true or false"), (Count | None, 0, "or null"),
    (Mapping[str, Any], [], "a dict"), (float | Sequence[float], [1, "2"], r"x\[1\] is '2'"), (float | Sequence[float], "1", "or a list"),
    (Literal["a", 1], True, "one of a, 1"), (Literal["a", 1], ["a"], "one of"), (str, 1, "text"), (str, "x" * 5000, "text"),
    (bool, 0, "true or false"), (bool, "no", "true or false"), (Annotated[int, Range(2, 3)], 4, "from 2 to 3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), GOOD, ids=lambda x: str(x)[:40])
def test_what_fits_an_annotation_passes(kind, value):
    check_value(value, kind, "x")


@pytest.mark.parametrize(("kind", "value", "message"), BAD, ids=lambda x: short(x)[:40])
def test_what_does_not_is_named_with_what_is_allowed(kind, value, message):
    with pytest.raises(ArgumentError, match=message) as error:
        check_value(value, kind, "x")
    assert len(str(error.value)) < 300


def test_calls_are_checked_by_position_and_by_name():
    @check_arguments
    def f(a: Width, *, b: bool = False, other: Unknown = None) -> int:
        return a

    assert f(3, b=True, other="x") == 3
    for call in (lambda: f(0), lambda: f(a=0), lambda: f(3, b=1)):
        with pytest.raises(ArgumentError, match=r"^[ab] is"):
            call()


class Unknown:
    """A type that has no rule."""


class Inner(TypedDict):
    a: Width


class Outer(TypedDict):
    inner: Inner
    b: str | None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "^f: is a? ?.*; give a dict"),
        ({"b": ""}, r"^f: inner is missing"),
        ({"inner": 3, "b": None}, r"^f: inner is 3; give a dict"),
        ({"inner": {}, "b": None}, r"^f: inner\.a is missing; give an integer"),
        ({"inner": {"a": 0}, "b": None}, r"^f: inner\.a is 0"),
        ({"inner": {"a": 1}, "b": 3}, r"^f: b is 3; give text or null"),
    ],
)
def test_a_dict_is_checked_by_its_fields(given, message):
    with pytest.raises(ArgumentError, match=message):
        check_fields(given, Outer, "f")
    check_fields({"inner": {"a": 1}, "b": None, "more": object()}, Outer, "f")


@dataclass
class OfAnExtension:
    limit: float = float("inf")
    size: int = None
    pair: tuple[int, float] = (1, 0)
    steps: Final[int] = 2


def test_defaults_of_a_class_need_no_check_and_a_tuple_has_a_type_per_entry():
    check_fields(vars(OfAnExtension()), OfAnExtension)
    check_fields(vars(OfAnExtension(pair=[2, 0.5], steps=3)), OfAnExtension)
    for wrong in ({"limit": -math.inf}, {"size": 0.5}, {"pair": (0.5, 2)}, {"pair": (1, "x")}):
        with pytest.raises(ArgumentError, match=f"^{next(iter(wrong))}"):
            check_fields(vars(OfAnExtension(**wrong)), OfAnExtension)


def test_every_model_of_conf_may_be_named_by_a_file_and_checks_its_arguments():
    named = {OmegaConf.load(file).get("_target_") for file in (CONF / "model").glob("*.yaml")} - {None}
    assert named <= MODELS.keys()
    assert all(hasattr(cls.__init__, "__wrapped__") for cls in MODELS.values())
