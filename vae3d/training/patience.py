"""Errors that a run bears, but not for ever."""

from __future__ import annotations

from pathlib import Path

from vae3d.data.sources import DataError
from vae3d.errors import UserError

READS_BEFORE_JUDGING = 50  # clips read before data.max_broken can stop the run


class TooManyFailures(UserError):
    """The same error, again and again."""


class FailureCounter:
    """Counts errors in a row; ranks that are told the same count the same.

    limit: at which TooManyFailures is raised; 0: never.
    what: the error, as in "10 steps in a row ...". advice: what to do.
    """

    def __init__(self, limit: int, what: str, advice: str) -> None:
        self.limit, self.what, self.advice = limit, what, advice
        self.in_row = 0

    def error(self, reason: str) -> None:
        """Raises TooManyFailures if that was one too many. reason: of this error."""
        self.in_row += 1
        if self.limit and self.in_row >= self.limit:
            raise TooManyFailures(f"{self.in_row} {self.what} ({reason}); {self.advice}")

    def reset(self) -> None:
        self.in_row = 0


def check_broken_share(reads: int, broken: int, max_broken: float, folder: Path) -> None:
    """Raises DataError if more than the share `max_broken` of the reads failed; never before there are enough."""
    if reads >= READS_BEFORE_JUDGING and broken / reads > max_broken:
        raise DataError(
            f"{broken} of {reads} reads failed, a larger share than data.max_broken={max_broken}; the files are listed "
            f"in {folder}/data_errors.jsonl"
        )
