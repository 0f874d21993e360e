"""Words of messages, and which texts can be written."""

from __future__ import annotations


def plural(count: int | str, noun: str) -> str:
    """The count, a number or its text, with its noun: 1 frame, 2 frames, 3 micro-batches, 4 epochs, 5 entries."""
    if f"{count}" == "1":
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'sh', 'tch')) else 's'}"


def significant(value: float, digits: int = 3) -> str:
    """A number rounded to so many significant digits, a large one without exponent: 0.364, 20.5, 1230."""
    return f"{float(f'{value:.{digits}g}'):.15g}"


def epoch_text(epochs: float) -> str:
    """0.364 epochs, 1 epoch, 138182 epochs."""
    return plural(significant(epochs) if epochs < 1000 else f"{epochs:.0f}", "epoch")


def byte_text(count: int) -> str:
    """Bytes in the largest unit of 1000 that they fill: 512 B, 20.5 kB, 1.02 GB."""
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{significant(count / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def is_utf8(text: str) -> bool:
    """Whether a text can be written. Lone surrogates cannot, which JSON can hold, and names of files of other bytes."""
    return text.isprintable() or not any("\ud800" <= character <= "\udfff" for character in text)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error in one line, or its type if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
