"""Show how much of a latent cache is encoded, and by which processes; see docs/latents.md.

Flags: vae3d.commands.flags.
"""

from __future__ import annotations

import math

from vae3d.commands.flags import parse_encode_status
from vae3d.latents.cache import read_meta_file
from vae3d.latents.encode import FINISH
from vae3d.latents.places import place_of
from vae3d.latents.shards import COMPLETE, META, CacheError


def main(argv: list[str] | None = None) -> int:
    args = parse_encode_status(argv)
    place = place_of(args.cache)
    if not place.get(META):
        raise CacheError(f"{args.cache} is not a latent cache: it has no {META}; make one with vae3d encode")
    meta = read_meta_file(place.folder / META)
    total = math.ceil(meta["clips"] / meta["shard_size"])
    done = len(place.done())
    complete = place.stamp(COMPLETE) is not None
    state = "complete" if complete else "not complete"
    print(f"{args.cache}: {state}, {done} of {total} shards ({done / total:.0%})")
    with place.claims(args.stale) as claims:
        for holder in claims.holders():
            state = "lost, the next free process takes over" if holder.stale else "at work"
            what = "index and statistics" if holder.name == FINISH else holder.name.replace("-", " ")
            seen = f"last sign of life {holder.silent:.0f} s ago"
            print(f"  {what}: process {holder.pid} of {holder.host}, {state} ({seen})")
    return 0 if complete else 1
