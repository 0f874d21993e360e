"""Aspect ratios as configurations give them. Imports no NumPy, which a check of a configuration does not need."""

from __future__ import annotations

AUTO = "auto"  # aspects: those of the data
MAX_ASPECT = 8.0  # of a longer side over the shorter one


def parse_aspect(text: str) -> float:
    """Width over height, from `16:9` or `1.78`. Raises ValueError."""
    width, colon, height = text.partition(":")
    try:
        aspect = float(width) / (float(height) if colon else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text} is no aspect ratio such as 16:9") from None
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise ValueError(f"{text} is no aspect ratio from 1:8 to 8:1; in YAML put ratios in quotes: ['16:9', '4:3']")
    return aspect
