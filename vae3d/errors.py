"""Errors that the user can mend; the entry points print their message alone, without a traceback."""

from __future__ import annotations

MAX_LINE = 2000  # characters of a line of a message


class UserError(ValueError):
    """Says what is wrong, where, and what to do.

    on_every_rank: raised alike by all processes of a run, so that one of them need say it.
    """

    on_every_rank = True

    def __str__(self) -> str:
        """Names in a stranger's file may be long, or hold what a terminal obeys: that is escaped."""
        return "\n".join(printable(line) for line in super().__str__().split("\n"))


def printable(line: str) -> str:
    """Without control characters, which are escaped, and of at most MAX_LINE characters."""
    if len(line) > MAX_LINE:
        half = MAX_LINE // 2
        line = f"{line[:half]}...{line[-half:]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
