"""Field types of the schemas, and what they allow in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as limits
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

# Values are as Hydra parses them: numbers may be strings, as from ${oc.env:STEPS}, and names may be numbers.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


def _folder_name(value: str) -> str:
    if "/" in value or value in ("", ".", ".."):
        raise ValueError("must be the name of a folder, without /")
    return value


def _prefix(value: str) -> str:
    if value.endswith("/") or Path(value).name in ("", ".", ".."):
        raise ValueError("must be a prefix, without / at its end")
    return value


def _ascending(value: list[float]) -> list[float]:
    if value != sorted(value):
        raise ValueError("must be in ascending order")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("must not hold a value twice")
    return value


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
# A single value is a list of it: metrics=psnr.
Ints = Annotated[list[Int], BeforeValidator(as_list)]
Floats = Annotated[list[Float], BeforeValidator(as_list)]
Strings = Annotated[list[str], BeforeValidator(as_list)]
Betas = Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
Rates = Annotated[
    list[Annotated[Float, Field(gt=0, lt=1)]], BeforeValidator(as_list), AfterValidator(_distinct), Field(min_length=1)
]
Ramp = Annotated[
    list[Annotated[Int, Field(ge=0)]],
    BeforeValidator(as_list),
    AfterValidator(_ascending),
    Field(min_length=2, max_length=2),
]
Interval = Annotated[
    list[Annotated[Float, Field(ge=0, le=1)]], AfterValidator(_ascending), Field(min_length=2, max_length=2)
]
FolderName = Annotated[str, AfterValidator(_folder_name)]
PathPrefix = Annotated[str, AfterValidator(_prefix)]
Precision = Literal["fp32", "bf16", "fp16"]
Reader = Literal["auto", "pyav", "decord"]
Split = Literal["train", "val", "test"]


def fields_of(schema: Any) -> dict[str, FieldInfo]:
    return schema.__pydantic_fields__


def nested_schema(kind: Any) -> Any:
    """The schema of a section, or of the values of a dict of sections; None for other fields."""
    if typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    return kind if dataclasses.is_dataclass(kind) else None


def allowed(field: FieldInfo) -> str:
    """What a field allows: "an integer of at least 1, or null"."""
    return _words(field.annotation, field.metadata)


def allowed_entry(field: FieldInfo) -> str:
    """What an entry of a list field allows."""
    return _words(typing.get_args(field.annotation)[0])


def _words(kind: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(inner[0], [*inner[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one, metadata) for one in inner if one is not types.NoneType) + ", or null"
    if origin is Literal:
        *names, last = ("null" if choice is None else str(choice) for choice in inner)
        return f"{', '.join(names)} or {last}"
    if origin is list:
        return f"a list{_size(metadata)}; each entry: {_words(inner[0])}"
    if origin is dict:
        return f"a dict; each value: {_words(inner[1])}" if inner[1] is not Any else "a dict"
    if dataclasses.is_dataclass(kind):
        return f"a group of the keys {', '.join(fields_of(kind))}"
    name = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "see meaning"}.get(kind)
    return (name or kind.__name__) + _range(metadata)


def _limits(metadata: typing.Sequence[Any]) -> dict[type, Any]:
    """Limit class -> its value, unpacking Field(ge=...) inside of Annotated."""
    found = {}
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else [item]:
            for kind, name in ((limits.Ge, "ge"), (limits.Gt, "gt"), (limits.Le, "le"), (limits.Lt, "lt")):
                if isinstance(limit, kind):
                    found[kind] = getattr(limit, name)
            for kind, name in ((limits.MinLen, "min_length"), (limits.MaxLen, "max_length")):
                if isinstance(limit, kind):
                    found[kind] = getattr(limit, name)
    return found


def _range(metadata: typing.Sequence[Any]) -> str:
    found = _limits(metadata)
    if limits.Ge in found and limits.Le in found:
        return f" from {found[limits.Ge]:g} to {found[limits.Le]:g}"
    words = {limits.Ge: "of at least", limits.Gt: "above", limits.Le: "of at most", limits.Lt: "below"}
    parts = [f"{word} {found[kind]:g}" for kind, word in words.items() if kind in found]
    return f" {' and '.join(parts)}" if parts else ""


def _size(metadata: typing.Sequence[Any]) -> str:
    found = _limits(metadata)
    low, high = found.get(limits.MinLen), found.get(limits.MaxLen)
    if low is None:
        return ""
    return f" of {low} entries" if low == high else f" of at least {low} entries"
