"""Field types of the schemas, and what a field allows in words."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from vae3d.config.issues import MISSING
from vae3d.data.batches.aspects import AUTO, parse_aspect

# Values are as Hydra parses them: numbers may be strings, as from ${oc.env:STEPS}, and names may be numbers.
# defer_build: --help needs no validators, and a command only those of its own schema.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, defer_build=True)


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "must be a number")
    return value


def as_list(value: Any) -> Any:
    """A single value is a list of it: metrics=psnr."""
    return [value] if isinstance(value, str | int | float) and value != MISSING else value


def as_buckets(value: Any) -> Any:
    """A list of shapes is {shapes: list}, and [frames, height, width] is {frames: ..., height: ..., width: ...}."""
    value = {"shapes": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or not isinstance(value.get("shapes"), list):
        return value
    keys = ("frames", "height", "width")
    for shape in value["shapes"]:
        if isinstance(shape, list) and len(shape) != len(keys):
            raise ValueError(f"has the bucket {shape}; one is [frames, height, width], or a group with these keys")
    shapes = [
        dict(zip(keys, shape, strict=True)) if isinstance(shape, list) and len(shape) == len(keys) else shape
        for shape in value["shapes"]
    ]
    return {**value, "shapes": shapes}


def _aspects(value: list[str]) -> list[str]:
    if AUTO in value and len(value) > 1:
        raise ValueError(f"must be {AUTO} alone, or a list of ratios")
    for text in value:
        if text != AUTO:
            parse_aspect(text)
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value):
        raise ValueError("must be a name of letters, digits, _ and -")
    return value


def _not_empty(value: str) -> str:
    # As from an unset variable of the shell. It would be the working directory, and as run.root make the run's /NAME.
    if not value:
        raise ValueError("must not be empty")
    return value


def _folder_name(value: str) -> str:
    if "/" in value or value in ("", ".", ".."):
        raise ValueError("must be a name without /")
    return value


def _prefix(value: str) -> str:
    if value.endswith("/") or Path(value).name in ("", ".", ".."):
        raise ValueError("must be a prefix, without / at its end")
    return value


def _starts(value: Any) -> Any:
    """One error for the whole value, where pydantic has one for each type that it may have."""
    starts = value.values() if isinstance(value, dict) else [value]
    if not all(isinstance(start, str | int | float) and not isinstance(start, bool) for start in starts):
        raise ValueError("must be random, or a checkpoint, or a dict of these by submodule")
    return value


def _ascending(value: list[float]) -> list[float]:
    if value != sorted(value):
        raise ValueError("must be in ascending order")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("must not hold a value twice")
    return value


Int = Annotated[int, BeforeValidator(not_bool)]
Float = Annotated[float, BeforeValidator(not_bool)]
Strings = Annotated[list[str], BeforeValidator(as_list)]
Betas = Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
Rates = Annotated[
    list[Annotated[Float, Field(gt=0, lt=1)]], BeforeValidator(as_list), AfterValidator(_distinct), Field(min_length=1)
]
Ramp = Annotated[list[Annotated[Int, Field(ge=0)]], AfterValidator(_ascending), Field(min_length=2, max_length=2)]
Interval = Annotated[
    list[Annotated[Float, Field(ge=0, le=1)]], AfterValidator(_ascending), Field(min_length=2, max_length=2)
]
Counts = Annotated[
    list[Annotated[Int, Field(ge=1)]], BeforeValidator(as_list), AfterValidator(_distinct), Field(min_length=1)
]
Aspects = Annotated[
    list[str], BeforeValidator(as_list), AfterValidator(_distinct), AfterValidator(_aspects), Field(min_length=1)
]
Name = Annotated[str, AfterValidator(_name)]
Folder = Annotated[str, AfterValidator(_not_empty)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
PathPrefix = Annotated[str, AfterValidator(_prefix)]
InitFrom = Annotated[str | dict[str, str], BeforeValidator(_starts)]
Precision = Literal["fp32", "bf16", "fp16"]
Reader = Literal["auto", "pyav", "decord", "torchcodec", "torchcodec_cuda"]
Split = Literal["train", "val", "test"]


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field. default: the value, or a function that makes it. limits: as of pydantic's Field."""
    kind = "default_factory" if callable(default) else "default"
    return Field(**{kind: default}, description=description, **limits)


def fields_of(schema: Any) -> dict[str, FieldInfo]:
    return schema.__pydantic_fields__


def defaults_of(schema: Any) -> dict[str, Any]:
    """The default of each field, of nested schemas as dicts. Unlike an instance it needs no validators."""
    return {
        name: defaults_of(field.default_factory)
        if dataclasses.is_dataclass(field.default_factory)
        else field.get_default(call_default_factory=True)
        for name, field in fields_of(schema).items()
    }


def bare(kind: Any) -> Any:
    """A field's type without limits and null."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return bare(inner[0])
    if origin in (typing.Union, types.UnionType) and types.NoneType in inner and len(inner) == 2:
        return bare(next(one for one in inner if one is not types.NoneType))
    return kind


def nested_schema(kind: Any) -> Any:
    """The schema of a section, which may be null, or of the entries of a dict or list of sections; None for other
    types."""
    kind = bare(kind)
    if typing.get_origin(kind) in (dict, list):
        kind = typing.get_args(kind)[-1]
    return kind if dataclasses.is_dataclass(kind) else None


def allowed(field: FieldInfo) -> str:
    """What a field allows: "an integer of at least 1, or null"."""
    return _words(field.annotation, field.metadata)


def allowed_entry(field: FieldInfo) -> str:
    """What an entry of a list or dict field allows."""
    return _words(typing.get_args(bare(field.annotation))[-1])


def _words(kind: Any, metadata: Sequence[Any] = ()) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(inner[0], [*inner[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        words = " or ".join(_words(one, metadata) for one in inner if one is not types.NoneType)
        return f"{words}, or null" if types.NoneType in inner else words
    if origin is Literal:
        *names, last = map(str, inner)
        return f"{', '.join(names)} or {last}"
    limits = _limits(metadata)
    if origin is list:
        low, high = limits.get(MinLen), limits.get(MaxLen)
        size = "" if low is None else f" of {low}" if low == high else f" of at least {low}"
        return f"a list{size}; each entry: {_words(inner[0])}"
    if origin is dict:
        return "a dict" if inner[1] is Any else f"a dict; each value: {_words(inner[1])}"
    if dataclasses.is_dataclass(kind):
        return f"a group of the keys {', '.join(fields_of(kind))}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "see meaning"}
    return names[kind] + _range(limits)


def _limits(metadata: Sequence[Any]) -> dict[type, Any]:
    """Kind of limit -> its value. Field(...) inside of Annotated holds limits of its own."""
    names = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt", MinLen: "min_length", MaxLen: "max_length"}
    flat = [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return {kind: getattr(limit, name) for limit in flat for kind, name in names.items() if isinstance(limit, kind)}


def _range(limits: dict[type, Any]) -> str:
    if Ge in limits and Le in limits:
        return f" from {limits[Ge]:g} to {limits[Le]:g}"
    words = {Ge: "of at least", Gt: "above", Le: "of at most", Lt: "below"}
    parts = [f"{word} {limits[kind]:g}" for kind, word in words.items() if kind in limits]
    return f" {' and '.join(parts)}" if parts else ""
