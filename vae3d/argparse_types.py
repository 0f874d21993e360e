"""Types for argparse: numbers in their range."""

from __future__ import annotations

import argparse
import math

MAX_INT = 2**63 - 1


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """A whole number of 0 or more."""
    return _whole(text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    number = finite_float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def finite_float(text: str) -> float:
    """Any number but nan and inf."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _whole(text: str, least: int) -> int:
    try:
        number = int(text) if len(text) < 20 else -1
    except ValueError:
        number = -1
    if not least <= number <= MAX_INT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return number
