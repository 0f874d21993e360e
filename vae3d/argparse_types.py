"""Types for argparse arguments: numbers in a range, sizes."""

from __future__ import annotations

import argparse
import math
import re

MAX_INT = 2**63 - 1


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
