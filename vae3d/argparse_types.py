"""The parser of commands with flags, and types of their arguments: numbers in a range, sizes."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

MAX_INT = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """Flags are spelt --two_words, as keys of the configuration are; --two-words is taken too. No argument may be
    empty. name: of the command. What it returns also has `command`, the whole command line, for pages."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.name = name

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = [*(sys.argv[1:] if args is None else args)]
        end = words.index("--") if "--" in words else len(words)
        if empty := [word for word in words[:end] if re.fullmatch("(--[^=]+=)?", word)]:  # of an unset shell variable
            self.error(f"{empty[0] or 'an argument'} is empty")
        flags = [re.sub("^--[^=]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in words[:end]]
        found, rest = super().parse_known_args([*flags, *words[end:]], namespace)
        found.command = shlex.join(["vae3d", self.name, *words])
        return found, rest


def positive_int(text: str) -> int:
    return _int_from(text, 1)


def non_negative_int(text: str) -> int:
    return _int_from(text, 0)


def positive_float(text: str) -> float:
    number = finite_float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def finite_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def byte_size(text: str) -> int:
    """Bytes: a number with B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB or TiB (powers of 1024)."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    base = 1024 if found and found[3] else 1000
    size = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if not 0 < size < MAX_INT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 500MB or 1GB")
    return size


def height_and_width(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 256x448")
    return positive_int(sides[0]), positive_int(sides[1])


def _int_from(text: str, minimum: int) -> int:
    try:
        number = int(text) if len(text) < 20 else -1
    except ValueError:
        number = -1
    if not minimum <= number <= MAX_INT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {minimum} or more")
    return number
