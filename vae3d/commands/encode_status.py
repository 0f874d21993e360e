"""Show how much of a latent cache is encoded, and by which processes; see docs/latents.md.

Flags: vae3d.commands.flags.
"""

from __future__ import annotations

from argparse import Namespace

from vae3d.commands.console import show
from vae3d.latents.cache_storage import read_meta, storage_of
from vae3d.latents.encode import FINISH
from vae3d.latents.shards import COMPLETE, shards_in


def main(args: Namespace) -> int:
    storage = storage_of(args.cache)
    total = shards_in(read_meta(storage))
    done = len(storage.done())
    complete = storage.stamp(COMPLETE) is not None
    state = "complete" if complete else "not complete"
    print(f"{args.cache}: {state}, {done} of {total} shards ({done / total:.0%})")
    for holder in storage.claims(args.stale).holders():  # not entered, which would write
        state = "lost, the next free process takes over" if holder.stale else "at work"
        what = "index and statistics" if holder.name == FINISH else holder.name.replace("-", " ")
        seen = f"last sign of life {holder.silent:.0f} s ago"
        show(f"  {what}: process {holder.pid} of {holder.host}, {state} ({seen})")
    return 0 if complete else 1
