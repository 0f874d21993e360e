"""Faults that a run bears, but not for ever."""

from __future__ import annotations

from vae3d.errors import UserError


class LostPatience(UserError):
    """The same fault, again and again."""


class Patience:
    """Counts faults in a row; ranks that are told the same count the same.

    limit: at which LostPatience is raised; 0: never.
    what: the fault, as in "10 steps in a row ...". advice: what to do.
    """

    def __init__(self, limit: int, what: str, advice: str) -> None:
        self.limit, self.what, self.advice = limit, what, advice
        self.in_row = 0

    def fault(self, reason: str) -> None:
        """Raises LostPatience if that was one too many. reason: of this fault."""
        self.in_row += 1
        if self.limit and self.in_row >= self.limit:
            raise LostPatience(f"{self.in_row} {self.what} ({reason}); {self.advice}")

    def went_well(self) -> None:
        self.in_row = 0
