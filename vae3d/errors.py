"""Errors that users can fix. Commands print their message without a traceback."""

from __future__ import annotations

MAX_LINE = 2000  # characters per line of a message


class UserError(ValueError):
    """An error in what the user gave. The message says what is wrong, where, and how to fix it.

    on_every_rank: all ranks raise it alike, so one of them prints it.
    """

    on_every_rank = True

    def __str__(self) -> str:
        """The message, safe to print: it may contain long names or control characters from files of strangers."""
        return "\n".join(printable(line) for line in super().__str__().split("\n"))


def printable(line: str) -> str:
    """The line with control characters escaped, and shortened in the middle to MAX_LINE characters."""
    if len(line) > MAX_LINE:
        half = MAX_LINE // 2
        line = f"{line[:half]}...{line[-half:]}"
    return escape(line)


def escape(line: str) -> str:
    """The line with control characters escaped, which would change a terminal's title or hide what is printed."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)


def escape_lines(text: str) -> str:
    """escape of each line of a text."""
    return "\n".join(map(escape, text.split("\n")))
