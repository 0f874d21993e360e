"""Faults that the user can mend; the entry points print their message alone, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Says what is wrong, where, and what to do.

    on_every_rank: raised alike by all processes of a run, so that one of them need say it.
    """

    on_every_rank = True
