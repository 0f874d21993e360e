"""Print the statistics of a latent cache, and write its scale into an export; see docs/latents.md.

Flags: vae3d.commands.flags.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from vae3d.commands.console import show
from vae3d.commands.measure_scale import load_unscaled, rescale
from vae3d.latents.cache import LatentCache, SizeGroup
from vae3d.latents.cache_storage import LocalStorage, ObjectStorage, partial_statistics, storage_of
from vae3d.latents.scale import LatentStats, off_scale
from vae3d.latents.shards import shards_in
from vae3d.loading import load, open_codec
from vae3d.text import plural

SHOWN = ("0.1", "50", "99.9")  # percentiles
SHOWN_SIZES = 12


def main(args: Namespace) -> None:
    if args.partial:
        print_partial(storage_of(args.cache))
        return
    cache = LatentCache(args.cache, verify=args.verify)
    hint = "" if args.write else "; if the export has not been updated since, use --write EXPORT --per_channel"
    entries, classes = plural(len(cache), "entry"), f"; {plural(len(cache.classes), 'class')}"
    print_table(cache.statistics, cache.meta, cache.name, entries, classes, hint, cache.sizes())
    if args.write is not None:
        write(args)


def print_partial(storage: LocalStorage | ObjectStorage) -> None:
    """Print the statistics of the shards that are complete, merged."""
    meta, numbers, statistics = partial_statistics(storage)
    total = shards_in(meta)
    print(f"{len(numbers)} of {plural(total, 'shard')} ({len(numbers) / total:.1%}) are complete; of these:")
    print_table(statistics.summary(), meta, storage.name, plural(statistics.clips, "entry"), "", "")


def print_table(
    stats: dict[str, Any],
    meta: dict[str, Any],
    name: str | Path,
    entries: str,
    classes: str,
    hint: str,
    sizes: Sequence[SizeGroup] = (),
) -> None:
    vae, transform = meta["vae"], meta["transform"]
    shown = {key: value for key, value in transform.items() if value not in (None, False) and key != "buckets"}
    settings = ", ".join(f"{key}={value}" for key, value in shown.items())
    show(f"{name}: {entries} ({meta['store']}, {meta['dtype']}; {settings})")
    show(f"of {vae['checkpoint']} ({vae['model']}), encoder {vae['encoder'][:12]}{classes}")
    if len(sizes) > 1:
        counts = [f"{'x'.join(map(str, group.size))} ({len(group.entries)})" for group in sizes[:SHOWN_SIZES]]
        more = f", and {len(sizes) - SHOWN_SIZES} more" if len(sizes) > SHOWN_SIZES else ""
        print(f"{plural(len(sizes), 'size')}: {', '.join(counts)}{more}")
    names = ("mean", "std", "std_of_mean", "posterior_std", "kurtosis")
    columns = {name: stats[name] for name in names} | {f"{p} %": stats["percentiles"][p] for p in SHOWN}
    print(pd.DataFrame(columns, dtype=float).to_string(float_format="%.5f", na_rep="-", col_space=12))
    print(f"all: mean {stats['shift']:.5f}, std {stats['scale']:.5f}, 1 / std {stats['scaling_factor'] or 0:.5f}")
    if stats["other_frames"] is not None:
        for name in ("first_frame", "other_frames"):
            means, stds = (_list(stats[name][key]) for key in ("mean", "std"))
            print(f"{name.replace('_', ' ')}: mean {means}, std {stds}")
    print(f"eigenvalues of the covariance of the channels' means: {_list(stats['covariance_eigenvalues'])}")
    print(f"participation ratio: {stats['participation_ratio'] or 0:.2f} of {vae['channels']} channels")
    print_normalized(
        stats, vae["latents_mean"], vae["latents_std"], "the scale that the export had when the cache was made", hint
    )


def write(args: Namespace) -> None:
    checkpoint, model = load_unscaled(args.write, args.out)
    cache = LatentCache(args.cache, open_codec(args.write))  # an error if another autoencoder made it
    measured = scale_of_cache(cache, args.of_means)
    folder = rescale(checkpoint, model, measured, args.out, shift=args.shift, per_channel=args.per_channel)
    spec = load(folder).spec
    print_normalized(
        cache.statistics, spec.latents_mean, spec.latents_std, "the new scale", "; try --per_channel", args.of_means
    )


def scale_of_cache(cache: LatentCache, of_means: bool) -> LatentStats:
    stats, sizes = cache.statistics, cache.index[["frames", "height", "width"]].drop_duplicates()
    size = tuple(map(int, sizes.iloc[0])) if len(sizes) == 1 else None
    mean, std = stats["mean"], stats["std_of_mean" if of_means else "std"]
    return LatentStats(stats["clips"], *(torch.tensor(x, dtype=torch.float64) for x in (mean, std)), size)


def print_normalized(
    stats: dict[str, Any], shift: Any, scale: Any, name: str, hint: str, of_means: bool = False
) -> None:
    """Print the range of the channels' means and deviations under a scale; with the hint if they are not about 0, 1."""
    std = stats["std_of_mean" if of_means else "std"]
    means = [(mean - by) / over for mean, by, over in zip(stats["mean"], shift, scale, strict=True)]
    stds = [value / over for value, over in zip(std, scale, strict=True)]
    found = f"means {min(means):.3f} to {max(means):.3f}, deviations {min(stds):.3f} to {max(stds):.3f}"
    print(f"by {name}: {found}{hint if off_scale(means, stds) else ''}")


def _list(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
