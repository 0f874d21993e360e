"""Check plain values against annotations: types, ranges, lengths. For arguments from code, conf/ and files alike.

    @check_arguments
    def __init__(self, *, latent_channels: Width = 4, latents_std: Sequence[Deviation] | None = None): ...

raises ArgumentError with the argument, its value, and the allowed ones.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

from vae3d.errors import UserError
from vae3d.text import plural

F = TypeVar("F", bound=Callable[..., Any])
MAX_TEXT = 4096  # characters of a string argument


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float

    def allows(self, value: Any) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f" from {self.low:.10g} to {self.high:.10g}"


@dataclass(frozen=True)
class Size:
    """Lists of low to high entries."""

    low: int
    high: int

    def allows(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f", {self.low} to {self.high} entries"


# Plain types: in words, and whether a value has one. Values of other types pass.
PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    types.NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a finite number", lambda value: _is_finite(value) and not isinstance(value, bool)),
    Real: ("a number", lambda value: isinstance(value, Real)),
    str: ("text", lambda value: isinstance(value, str) and len(value) <= MAX_TEXT),
}


def _is_finite(value: Any) -> bool:
    return isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))


# The upper limits are far above every published model, but low enough that any model within them is built fast.
Width = Annotated[int, Range(1, 2**16)]  # channels of a layer
Factor = Annotated[int, Range(1, 64)]  # of a width
Depth = Annotated[int, Range(1, 16)]  # blocks of a level
Depths = Annotated[Sequence[Annotated[int, Range(0, 16)]], Size(1, 10)]  # of each level; may be none
Widths = Annotated[Sequence[Width], Size(1, 10)]  # of each level; all but the last halve the resolution
Factors = Annotated[Sequence[Factor], Size(1, 10)]
Flags = Annotated[Sequence[bool], Size(0, 10)]  # of each level boundary
PixelChannels = Annotated[int, Range(1, 64)]  # of a video: 3 RGB, 4 RGBA, 1 grey or depth
Classes = Annotated[int, Range(0, 10**6)]
Count = Annotated[int, Range(1, 2**31)]  # frames or latents
Mean = Annotated[float, Range(-1e6, 1e6)]
DEVIATIONS = Range(1e-6, 1e6)
Deviation = Annotated[float, DEVIATIONS]  # also of factors that multiply


class ArgumentError(UserError):
    """An argument of the wrong type or out of its range."""


def check_arguments(function: F) -> F:
    """Decorator: check the arguments of every call against the annotations, other than tensors and modules.

    Calls raise ArgumentError. An `__init__` leaves the arguments that were given in `self.init_arguments`.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        kinds = annotations_of(function)
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name in kinds:
                check_value(value, kinds[name], name)
        result = function(*args, **kwargs)
        if function.__name__ == "__init__":
            args[0].init_arguments = {name: value for name, value in given.items() if name != "self"}
        return result

    return typing.cast(F, checked)


@functools.cache
def annotations_of(function: Any) -> dict[str, Any]:
    """{name: evaluated annotation} of a function's arguments or a class's fields."""
    kinds = typing.get_type_hints(function, include_extras=True)
    kinds.pop("return", None)
    return kinds


def check_fields(given: Any, fields: type, source: str = "", key: str = "") -> None:
    """Check the entries of a dict against a TypedDict or a dataclass; entries without a field, and a field's default
    itself, are not checked.

    source, key: the file, and the key of the dict in it, for errors.
    Raises ArgumentError for a wrong value, and for a missing one that a TypedDict requires.
    """
    where = f"{source}: " if source else ""
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{where}{key + ' ' if key else ''}is {short(given)}; give a dict")
    required = getattr(fields, "__required_keys__", frozenset())
    for name, kind in annotations_of(fields).items():
        full = f"{key}.{name}" if key else name
        if name not in given:
            if name in required:
                raise ArgumentError(f"{where}{full} is missing; give {describe(kind)}")
        elif typing.is_typeddict(kind):
            check_fields(given[name], kind, source, full)
        elif given[name] is not getattr(fields, name, MISSING):
            check_value(given[name], kind, f"{where}{full}")


def check_value(value: Any, kind: Any, name: str) -> None:
    """Raises ArgumentError if a value does not have the type and the range of an annotation."""
    mismatch = _find_mismatch(value, kind)
    if mismatch is not None:
        index, entry, allowed = mismatch
        raise ArgumentError(f"{name}{index} is {short(entry)}; give {describe(allowed)}")


def _find_mismatch(value: Any, kind: Any) -> tuple[str, Any, Any] | None:
    """(its index, value, annotation) of the first value that does not fit, or None."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    this = ("", value, kind)
    if origin in (typing.Union, types.UnionType):
        found = [_find_mismatch(value, one) for one in inner]
        if None in found:
            return None
        return next((mismatch for mismatch in found if mismatch[0]), this)  # prefer the entry of a list
    if origin is Annotated:
        if mismatch := _find_mismatch(value, inner[0]):
            return mismatch if mismatch[0] else this  # `this` includes the range
        return None if all(limit.allows(value) for limit in inner[1:]) else this
    if origin is Literal:
        same = (value == one and isinstance(value, bool) == isinstance(one, bool) for one in inner)
        return None if any(same) else this
    if origin in (Sequence, list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return this
        has_own_kinds = origin is tuple and ... not in inner and len(inner) == len(value)  # as of tuple[int, float]
        for i, entry in enumerate(value):
            if mismatch := _find_mismatch(entry, inner[i if has_own_kinds else 0]):
                return f"[{i}]{mismatch[0]}", *mismatch[1:]
        return None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return this
        keys, values = inner or (Any, Any)
        for key, entry in value.items():
            if _find_mismatch(key, keys) is not None:
                return f"[{short(key)}]", key, keys
            if mismatch := _find_mismatch(entry, values):
                return f"[{short(key)}]{mismatch[0]}", *mismatch[1:]
        return None
    return this if kind in PLAIN and not PLAIN[kind][1](value) else None


def describe(kind: Any) -> str:
    """The values that an annotation allows, such as "an integer from 1 to 64"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(one) for one in inner)
    if origin is Annotated:
        return describe(inner[0]) + "".join(map(str, inner[1:]))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Sequence, list, tuple):
        return f"a list, each entry {describe(inner[0])}"
    if typing.is_typeddict(kind) or (origin is not None and issubclass(origin, Mapping)):
        return "a dict"
    return PLAIN[kind][0] if kind in PLAIN else getattr(kind, "__name__", str(kind))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def without_source_name(key: str) -> str:
    """data.sources.NAME.height -> data.height: the setting that a source of a mixture has of its own."""
    return re.sub(r"^data\.sources\.[^.]+\.", "data.", key)


def short(value: Any) -> str:
    """repr of a value, for a message: one line of at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print very long integers
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)} entries" if len(value) > 8 else _cut(repr(value))
    return _cut(repr(value[:80] if isinstance(value, str) else value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- arguments that go together


def per_stage(name: str, given: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """`given`, or `default` for None. Raises ValueError for another number of entries."""
    given = tuple(default if given is None else given)
    if len(given) != len(default):
        raise ValueError(f"{name} has {plural(len(given), 'entry')}; give {len(default)}")
    return given


def check_level_boundaries(multipliers: Sequence[Any], downsample: Sequence[Any]) -> None:
    """Raises ValueError unless there is one entry of `downsample` between every two levels."""
    if len(downsample) != len(multipliers) - 1:
        raise ValueError(
            f"downsample has {plural(len(downsample), 'entry')} for {plural(len(multipliers), 'multiplier')}; "
            f"give one per level boundary, {len(multipliers) - 1}"
        )
