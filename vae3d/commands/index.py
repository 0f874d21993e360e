"""Index tar shards, so that every sample is one range read; see docs/large_data.md. Flags: vae3d.commands.flags."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from vae3d.data.media import DataError
from vae3d.data.sources.webdataset import cached_index, find_shards, index_of, list_all
from vae3d.data.storage.paths import is_url
from vae3d.data.tars.index import Settings, build_index
from vae3d.data.tars.samples import Shard, samples_of
from vae3d.data.workers import processor_count
from vae3d.latents.tar_shards import latent_rows
from vae3d.text import byte_text, plural


def main(args: Namespace) -> None:
    shards = find_shards(list_all(args.shards))
    settings = Settings(_kind(shards[0]), args.media)
    out = args.out or index_of(args.shards, [shard.path for shard in shards])
    if is_url(str(out)):
        out = cached_index(shards, settings)
    if settings.kind == "latents" and (args.probe or args.media):
        raise DataError("--probe and --media are for videos and images; these shards hold latents")
    table = build_index(
        shards,
        Path(out),
        settings,
        scan=latent_rows if settings.kind == "latents" else None,
        probe=args.probe,
        workers=args.workers or processor_count(),
    )
    size = byte_text(Path(out).stat().st_size)
    print(f"{plural(len(table), 'sample')} in {plural(len(shards), 'shard')} -> {out} ({size})")
    if "error" in table.column_names:
        wrong = table.filter(table["error"].is_valid())
        first = wrong.slice(0, 1).to_pylist()[0]
        print(
            f"{plural(len(wrong), 'sample')} cannot be used, such as {first['key']} of {first['shard']}: "
            f"{first['error']}; data.max_broken says how many a run accepts"
        )


def _kind(shard: Shard) -> str:
    sample = next(iter(samples_of(shard)), None)
    if sample is None:
        raise DataError(f"{shard.path} has no samples")
    return "latents" if any(name.endswith(".npy") for name in sample.members) else "media"
