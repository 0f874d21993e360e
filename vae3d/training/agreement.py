"""Check that all ranks were started with the same settings and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from vae3d import distributed
from vae3d.checkpoints.state import flatten
from vae3d.errors import UserError

# What each machine may have of its own; of the source, what is in it is compared instead of where it is.
PER_MACHINE = ("launcher", "debug", "data.source", "data.workers", "data.prefetch", "data.timeout")
PER_MACHINE += ("source", "root", "workers", "timeout", "device")


class RanksDiffer(UserError):
    """Something that must be the same on all ranks differs."""


def check_ranks_agree(facts: Mapping[str, Any]) -> None:
    """Raises RanksDiffer on all ranks, naming what differs and its values. facts: nested; every rank must call it."""
    if not distributed.is_distributed():
        return
    mine = {key: value for key, value in flatten(facts).items() if not _per_machine(key)}
    theirs: list[dict[str, Any]] = gather_object([mine])
    differing = [key for key in sorted({key for one in theirs for key in one}) if _differ(key, theirs)]
    if differing:
        told = "\n".join(f"  {key}: {_told(key, theirs)}" for key in differing)
        raise RanksDiffer(f"the ranks of this run were started with different settings or data:\n{told}")


def _per_machine(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in PER_MACHINE)


def _differ(key: str, theirs: list[dict[str, Any]]) -> bool:
    return any(one.get(key) != theirs[0].get(key) for one in theirs)


def _told(key: str, theirs: list[dict[str, Any]]) -> str:
    """Each value, and the ranks that have it."""
    by_value: dict[str, list[int]] = {}
    for rank, one in enumerate(theirs):
        by_value.setdefault(str(one.get(key)), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' * (len(which) > 1)} {', '.join(map(str, which))}" for value, which in by_value.items()
    )
